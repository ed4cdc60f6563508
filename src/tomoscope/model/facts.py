"""What opening a model found out: its facts, and what is known of each of its sites."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Facts:
    """What opening a model found out about it.

    Attributes:
        family: the config's model type, or the class's name.
        kind: "decoder", "encoder", "vision", or "module".
        n_layers: blocks.
        d_model: width of the residual stream, None where there is none.
        n_heads: query heads (of the first block with attention).
        n_kv_heads: key/value heads.
        head_dim: width of a head's z.
        d_mlp: neurons of an MLP.
        d_vocab: outputs of the head.
        context: longest input in tokens, None if unbounded or unknown.
        parallel: attention and MLP read the same stream.
        renormalised: the stream is normalised after each write (BERT), so writes do not simply add up.
        n_parameters: parameters.
        dtype: of the parameters.
        parity: largest difference of logits between a plain forward and one with sites read; 0.0 is bit-identical.
        identity_error: largest relative error of resid_post = resid_pre + writes; None where a block was not solved.
        unsolved: blocks in which the identity could not be established, with why.
    """

    family: str
    kind: str
    n_layers: int
    d_model: int | None
    n_heads: int
    n_kv_heads: int
    head_dim: int | None
    d_mlp: int | None
    d_vocab: int | None
    context: int | None
    parallel: bool
    renormalised: bool
    n_parameters: int
    dtype: str
    parity: float | None = None
    identity_error: float | None = None
    unsolved: tuple[str, ...] = ()


@dataclass(frozen=True)
class SiteInfo:
    """One site of one model: its axes, whether it can be given, why not, and a note."""

    name: str
    axes: tuple[str, ...]
    available: bool
    reason: str = ""
    note: str = ""
