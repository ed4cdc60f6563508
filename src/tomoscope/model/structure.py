"""From a probe forward to a map of sites: where each site lives in this model, or why it has none.

Steps, in the order of the code: find the blocks (a list of modules, each fed by the one before); solve each block for
its writers (residual.py); tell attention from MLP; find what is inside each; find embedding, final norm and head.
Nothing here knows a family's name. The identity resid_post = resid_pre + sum of writes is measured for every block and
kept as `identity_error`; opening fails to give `attn.out` and `mlp.out` of a block where it does not hold.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tomoscope.model.residual import Renormalised, Term


@dataclass(frozen=True)
class Tap:
    """Where one site lives.

    Attributes:
        path: the module.
        side: "in" or "out" of the module, an attention role ("q", "pattern", ...), or "derived".
        factor: what the module's value is multiplied by to be the site's value (a scaled write).
        heads: number of heads to split the last axis into, 0 for none.
    """

    path: str
    side: str
    factor: float = 1.0
    heads: int = 0


@dataclass
class Block:
    """One block, as found.

    Attributes:
        path: module path.
        returns: number of elements of what it returns, 0 for a bare tensor.
        kind: "sum", "renormalised" or "unsolved".
        parallel: attention and MLP read the same stream.
        attention: path of the attention module, or "".
        route: "dispatch", "trace" or "" (not seen).
        projection: path of attention's output projection, or "".
        down: path of the MLP's output projection, or "".
        writes: part -> summands of the stream ("attn", "mlp", and "other" for any third writer).
        taps: part of the grammar -> where it lives.
        missing: part -> why this block can't give it.
        identity_error: relative error of resid_post = resid_pre + writes, as solved.
    """

    path: str
    returns: int = 0
    kind: str = "unsolved"
    parallel: bool = False
    attention: str = ""
    route: str = ""
    projection: str = ""
    down: str = ""
    writes: dict[str, tuple[Term, ...]] = field(default_factory=dict)
    taps: dict[str, Tap] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    identity_error: float | None = None
    shapes: dict[str, int] = field(default_factory=dict)
    renormalised: tuple[Renormalised, ...] = ()


@dataclass
class Structure:
    """A model as found.

    Attributes:
        blocks: in order.
        taps: global sites.
        missing: why other global sites can't be given.
        d_model: width of the stream, None where there is none.
        embed_terms: summands of the stream's start.
        embed_adds: the first block's input is exactly their sum (False where a norm follows, as in BLOOM and BERT).
        silent: modules that can't be read by their path -> why.
    """

    blocks: list[Block]
    taps: dict[str, Tap]
    missing: dict[str, str]
    d_model: int | None
    embed_terms: tuple[Term, ...] = ()
    embed_adds: bool = False
    silent: dict[str, str] = field(default_factory=dict)
