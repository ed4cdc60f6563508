"""How a head makes its query and its key of the stream, as a linear map frozen at a prompt.

    norm (frozen), W_Q, bias, perhaps a norm of queries (frozen), perhaps a rotation by position.

The rotation is not written again: what the model's own attention makes of unit vectors, put where its queries come
from, is the map, whatever it is (rotary of any layout and share, a scale, nothing). Only the blocks' entrance is run.

Steps: the module that makes queries and where a head's are in its output; a norm of them, if there is one; the map from
there to what attention receives; and a check that it all gives the model's own queries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tomoscope.circuits.attribution.norms import norm_weights
from tomoscope.circuits.attribution.replacement import LocalReplacement
from tomoscope.circuits.attribution.skeleton import tolerance
from tomoscope.errors import UnavailableSiteError
from tomoscope.model import Subject, Weights, families, replace
from tomoscope.model.bypass import bypassing
from tomoscope.model.weights import _cut, _matrix, _named_linear

NAMES = {"q": families.QUERY_NAMES, "k": families.KEY_NAMES, "v": families.VALUE_NAMES}
BASIS_TOKENS = 2**15
"""Tokens of one call that finds the rotation."""


@dataclass(frozen=True, eq=False)
class HeadRead:
    """A head's query (or key) at one position as directions in the stream into its block.

    Attributes:
        directions: [head_dim, d_model].
        constant: [head_dim], added whatever the stream is (biases).
        value: [head_dim], the model's own.
    """

    directions: Float[Tensor, "head_dim d_model"]
    constant: Float[Tensor, " head_dim"]
    value: Float[Tensor, " head_dim"]


def head_reads(
    replacement: LocalReplacement, layer: int, head: int, which: str, positions: list[int]
) -> list[HeadRead]:
    """A head's queries or keys at some positions.

    Args:
        replacement: the prompt's local replacement model.
        layer: the block.
        head: the query head; where keys are shared, the key is that of its group.
        which: "q" or "k".
        positions: of the prompt.

    Raises:
        UnavailableSiteError: the model makes them in a way that is not known here.
    """
    subject, like = replacement.subject, replacement.tokens
    block = replacement.blocks[layer]
    weights = Weights(subject)._split(layer, which)
    own = head if which == "q" else head * len(weights) // subject.facts.n_heads
    names = [f"layer.{layer}.attn.{which}", f"layer.{layer}.resid_pre"]
    acts = subject.read(replacement.batch, *names, keep_device=True)
    stream = acts[names[1]][0].to(like)
    seen = acts[names[0]][0].to(like)  # [position, head, head_dim]
    own_seen = own if seen.shape[1] == len(weights) else head  # shared keys that arrive repeated
    W = weights.detach().to(like)
    made = torch.einsum("pd,hdi->phi", block.attention.linear(stream) + block.attention.bias, W)
    path, columns = _projection(subject, layer, which)
    bias = _bias(subject.model.get_submodule(path), columns, made)
    made = made + bias
    norm_path, normed, scale, weight, offset = _normed(replacement, layer, path, made, own)
    turned = _turned(replacement, layer, which, norm_path or path, columns, own, own_seen, positions, bool(norm_path))
    out = []
    for place, rotation in zip(positions, turned, strict=True):
        # columns of `inner` are what each coordinate before the rotation reads
        inner, constant = W[own].T, bias[own]
        if norm_path:
            shaped = torch.diag(weight) @ _centred(len(weight), normed, like)
            inner, constant = scale[place] * shaped @ inner, scale[place] * shaped @ constant + offset
        read = rotation.T @ inner  # [head_dim, d_model] in what the norm before attention gives
        directions = block.attention.fold(read) * block.attention.scale[place]
        fixed = rotation.T @ constant + read @ block.attention.bias
        value = seen[place, own_seen]
        gap = float((directions @ stream[place] + fixed - value).abs().max()) / max(float(value.abs().max()), 1e-30)
        if gap > tolerance(subject.dtype) * 5:
            raise UnavailableSiteError(
                f"The {'query' if which == 'q' else 'key'} of layer.{layer} head {head} is not a linear map of the "
                f"stream that was recognised (relative gap {gap:.2g})."
            )
        out.append(HeadRead(directions, fixed, value))
    return out


def _projection(subject: Subject, layer: int, which: str) -> tuple[str, Int[Tensor, "head head_dim"]]:
    """The module that makes queries or keys, and where each head's are in its output."""
    module = subject.model.get_submodule(subject.structure.blocks[layer].attention)
    found = _named_linear(module, NAMES[which])
    width = subject.facts.head_dim or 1
    if found is not None:
        total = _matrix(found).shape[1]
        return _path(subject, found), torch.arange(total).reshape(-1, width)
    fused = _named_linear(module, families.FUSED_NAMES)
    if fused is None:
        raise UnavailableSiteError(f"layer.{layer} has no {which} projection that was recognised.")
    matrix, values = _matrix(fused), Weights(subject)._split(layer, "v")
    numbers = torch.arange(matrix.shape[1], dtype=torch.float64)[None]
    for layout in families.FUSED_LAYOUTS:
        parts = _cut(matrix, layout, subject.facts.n_heads, width)
        if parts is not None and parts["v"].shape == values.shape and torch.equal(parts["v"], values):
            cut = _cut(numbers, layout, subject.facts.n_heads, width)
            assert cut is not None
            return _path(subject, fused), cut[which][:, 0].long()
    raise UnavailableSiteError(f"layer.{layer}'s fused projection has a layout that was not recognised.")


def _path(subject: Subject, module: nn.Module) -> str:
    return next(name for name, other in subject.model.named_modules() if other is module)


def _bias(module: nn.Module, columns: Tensor, made: Tensor) -> Float[Tensor, "head head_dim"]:
    bias = getattr(module, "bias", None)
    if not isinstance(bias, Tensor):
        return made.new_zeros(columns.shape)
    return bias.detach().to(made)[columns.to(bias.device)].to(made.device)


def _centred(width: int, centred: bool, like: Tensor) -> Tensor:
    eye = torch.eye(width, dtype=like.dtype, device=like.device)
    return eye - 1 / width if centred else eye


def _normed(
    replacement: LocalReplacement, layer: int, projection: str, made: Float[Tensor, "position head head_dim"], own: int
) -> tuple[str, bool, Tensor, Tensor, Tensor]:
    """A norm of queries or keys: its path ("" for none), centring, scale by position, and the head's weight and bias.

    A norm over all heads at once (OLMo 2) has one scale for all of them.
    """
    subject = replacement.subject
    attention = subject.structure.blocks[layer].attention
    none = made.new_zeros(0)
    for path, module in subject.model.get_submodule(attention).named_modules():
        kind = type(module).__name__.lower()
        if not path or "norm" not in kind or next(module.children(), None) is not None:
            continue
        name = f"{attention}.{path}"
        acts = subject.read(replacement.batch, f"{name}.input", name, keep_device=True)
        given, got = (acts[one][0].to(made) for one in (f"{name}.input", name))
        given, got = _by_position(given, made), _by_position(got, made)
        if given is None or got is None or not torch.allclose(given, made, rtol=1e-3, atol=1e-4):
            continue
        each = [p.numel() for p in module.parameters(recurse=False)]
        whole = bool(each) and max(each) == made.shape[1] * made.shape[2] and made.shape[1] > 1
        width = made.shape[1] * made.shape[2] if whole else made.shape[2]
        weights = norm_weights(module, width, name=name)
        if whole:
            if weights.centred:
                raise UnavailableSiteError(f"{name} centres over all heads at once, which is not supported.")
            frozen = weights.at(given.flatten(1), got.flatten(1))
            mine = slice(own * made.shape[2], (own + 1) * made.shape[2])
            return name, False, frozen.scale, frozen.weight[mine], frozen.bias[mine]
        frozen = weights.at(given[:, own], got[:, own])
        return name, frozen.centred, frozen.scale, frozen.weight, frozen.bias
    return "", False, none, none, none


def _by_position(value: Tensor, like: Float[Tensor, "position head head_dim"]) -> Tensor | None:
    """A norm's input or output as [position, head, head_dim], whichever way the family lays it out."""
    if value.shape == like.shape:
        return value
    if value.shape == like.transpose(0, 1).shape and value.dim() == 3:
        return value.transpose(0, 1)
    return value.reshape(like.shape) if value.numel() == like.numel() and value.dim() == 2 else None


def _turned(
    replacement: LocalReplacement,
    layer: int,
    which: str,
    path: str,
    columns: Int[Tensor, "head head_dim"],
    own: int,
    own_seen: int,
    positions: list[int],
    after_norm: bool,
) -> list[Float[Tensor, "head_dim head_dim"]]:
    """At each position, what attention receives (a row each) of unit vectors put where queries or keys come from."""
    subject = replacement.subject
    width = columns.shape[1]
    site = f"layer.{layer}.attn.{which}"
    shape = subject.read(replacement.batch, path)[subject.grammar.parse(path)[0].name].shape
    step = max(1, BASIS_TOKENS // replacement.n_positions)
    found = []
    for some in torch.arange(-1, width).split(step):
        value = torch.zeros(len(some), *shape[1:], dtype=subject.dtype)
        for row, unit in enumerate(some.tolist()):
            if unit < 0:
                continue
            if not after_norm or len(shape) == 3:
                value[row, ..., columns[own, unit]] = 1
            else:
                value[row, ..., unit] = 1
        batch = subject.tokens([list(replacement.ids)] * len(some))
        with bypassing(subject, dict.fromkeys(range(layer))):
            acts = subject.read(batch, site, edits=[replace(path, value)], keep_device=True)
        found.append(acts[site][:, positions, own_seen].to(replacement.tokens))
    every = torch.cat(found)
    return [every[1:, place] - every[0, place] for place in range(len(positions))]
