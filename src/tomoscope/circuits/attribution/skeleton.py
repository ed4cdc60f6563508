"""The linear skeleton of a model: for every block, how attention moves the stream and what its MLP reads.

With attention patterns and norm scales frozen, a block moves what stands in the stream at position k to position q by
    norm, W_V, pattern[head, q, k], W_O, perhaps a norm or a factor at the branch's end.
Which modules these are is found from a probe of random tokens and checked on it, in any family: the norm whose output
gives the values that attention was seen to receive, the one whose output the MLP was seen to read, and whether the
heads' results reach the stream as they are, times a constant, or through a norm. What does not fit is refused by name.

Steps: probe; for each block the value path, then the output path, then the MLP's input; the final norm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tomoscope.circuits.attribution.norms import NormWeights, norm_weights
from tomoscope.errors import SiteError, UnavailableSiteError
from tomoscope.model import Subject, Weights

PROBE_ROWS, PROBE_TOKENS = 2, 12


@dataclass(frozen=True, eq=False)
class Norm:
    """A norm of the model: its module's path and its weights."""

    path: str
    weights: NormWeights


@dataclass(frozen=True, eq=False)
class BlockSkeleton:
    """The linear parts of a block.

    Attributes:
        parallel: attention and MLP read the same stream.
        attention_norm: before the values, or None.
        W_V: [kv_head, d_model, head_dim], the model's own.
        value_bias: [kv_head, head_dim].
        W_O: [head, head_dim, d_model], the model's own.
        output_bias: [d_model], of the output projection.
        end_norm: at the end of attention's branch, or None.
        factor: what attention's branch is multiplied by.
        mlp_norm: before the MLP, or None.
    """

    parallel: bool
    attention_norm: Norm | None
    W_V: Float[Tensor, "kv_head d_model head_dim"]
    value_bias: Float[Tensor, "kv_head head_dim"]
    W_O: Float[Tensor, "head head_dim d_model"]
    output_bias: Float[Tensor, " d_model"]
    end_norm: Norm | None
    factor: float
    mlp_norm: Norm | None


@dataclass(frozen=True, eq=False)
class Skeleton:
    """The linear parts of a model; see the module's docstring.

    Attributes:
        blocks: from 0.
        final_norm: before the unembedding, or None.
    """

    blocks: tuple[BlockSkeleton, ...]
    final_norm: Norm | None


def tolerance(dtype: torch.dtype) -> float:
    """How closely a linear map must give the model's own values, relative to their largest."""
    return 2e-4 if dtype in (torch.float32, torch.float64) else 4e-2


def find_skeleton(subject: Subject) -> Skeleton:
    """The linear skeleton of a decoder.

    Raises:
        SiteError: the model is no stack of blocks that add to a stream.
        UnavailableSiteError: a part of a block is none of what is known here; the message says which.
    """
    facts = subject.facts
    if not subject.structure.blocks or facts.kind != "decoder":
        raise SiteError(f"{subject.name} is no decoder made of blocks, so it has no attribution graph.")
    if facts.renormalised or facts.unsolved:
        raise SiteError(
            f"{subject.name} does not simply add to its stream, so contributions to it don't sum up.",
            remedy="`tomoscope sites` says which blocks, and why.",
        )
    finder = _Finder(subject)
    final = subject.structure.taps.get("norm.final")
    ending = None if final is None else finder.norm(final.path)
    return Skeleton(tuple(finder.block(layer) for layer in range(facts.n_layers)), ending)


class _Finder:
    """Reads the probe once and matches each block's modules with what was seen."""

    def __init__(self, subject: Subject) -> None:
        self.subject, self.weights = subject, Weights(subject)
        self.tolerance = tolerance(subject.dtype)
        self.norms = [self._norm_paths(block.path) for block in subject.structure.blocks]
        self.work = torch.float64
        vocab, context = subject.facts.d_vocab or 2, subject.facts.context or PROBE_TOKENS
        generator = torch.Generator().manual_seed(0)
        shape = (PROBE_ROWS, min(PROBE_TOKENS, context))
        self.ids = torch.randint(0, vocab, shape, generator=generator)

    def _norm_paths(self, block: str) -> list[str]:
        """Modules of a block that are named norms and as wide as the stream (norms of queries and keys are not)."""
        found, width = [], self.subject.facts.d_model
        for path, module in self.subject.model.get_submodule(block).named_modules():
            kind = type(module).__name__.lower()
            leaf = next(module.children(), None) is None
            wide = all(p.numel() == width for p in module.parameters(recurse=False))
            if path and leaf and wide and ("norm" in kind or kind.endswith("ln")):
                found.append(f"{block}.{path}")
        return found

    def norm(self, path: str) -> Norm:
        d_model = self.subject.facts.d_model or 0
        return Norm(path, norm_weights(self.subject.model.get_submodule(path), d_model, name=path))

    def block(self, layer: int) -> BlockSkeleton:
        block = self.subject.structure.blocks[layer]
        for part, terms in (("other", block.writes.get("other", ())), ("mlp.out", ()), ("attn.out", ())):
            missing = f"its {part} is not known ({block.missing.get(part, '')})" if part in block.missing else ""
            if terms or missing:
                raise UnavailableSiteError(
                    f"layer.{layer} has no attribution graph: {missing or 'it has a third writer to the stream'}."
                )
        seen = self._read(layer)
        W_V = self.weights._split(layer, "v")
        W_O = self.weights._W_O(layer)
        attention_norm, value_bias = self._values(layer, seen, W_V)
        end_norm, factor, output_bias = self._output(layer, seen, W_O)
        mlp_norm = self._mlp_input(layer, seen, block.parallel)
        return BlockSkeleton(
            block.parallel, attention_norm, W_V, value_bias, W_O, output_bias, end_norm, factor, mlp_norm
        )

    def _read(self, layer: int) -> Mapping[str, Tensor]:
        """Every value of the block that the matching needs, [sample, ..] in float64."""
        parts = ["resid_pre", "attn.v", "attn.z", "attn.pattern", "attn.out", "mlp.in"]
        parts += [] if self.subject.structure.blocks[layer].parallel else ["resid_mid"]
        names = {part: f"layer.{layer}.{part}" for part in parts}
        for path in self.norms[layer]:
            names |= {path: path, f"{path}.input": f"{path}.input"}
        acts = self.subject.read(self.ids, *names.values())
        out = {}
        for key, name in names.items():
            value = acts[self.subject.grammar.parse(name)[0].name].to(self.work).cpu()
            flat = key not in ("attn.pattern", "attn.v", "attn.z")
            out[key] = value.reshape(-1, value.shape[-1]) if flat else value
        return out

    def _values(self, layer: int, seen: Mapping[str, Tensor], W_V: Tensor) -> tuple[Norm | None, Tensor]:
        """The norm between the stream and the values, and the values' bias."""
        v, pattern, z = seen["attn.v"], seen["attn.pattern"], seen["attn.z"]
        heads = z.shape[2]
        repeated = v.repeat_interleave(heads // v.shape[2], dim=2)
        mixed = torch.einsum("bhqk,bkhi->bqhi", pattern, repeated)
        if float((mixed - z).abs().max()) > self.tolerance * float(z.abs().max()):
            raise UnavailableSiteError(f"layer.{layer}'s heads give more than their pattern times their values.")
        if v.shape[2] != len(W_V):  # shared values that arrive repeated
            v = v[:, :, :: v.shape[2] // len(W_V)]
        best: tuple[float, str, Tensor] | None = None
        for path in ("", *self._fed_by(layer, seen, "resid_pre")):
            read = seen["resid_pre"] if not path else seen[path]
            made = torch.einsum("sd,hdi->shi", read, W_V.detach().to(self.work).cpu())
            bias, error = _constant(v.reshape(made.shape) - made, float(v.abs().max()))
            if best is None or error < best[0]:
                best = (error, path, bias)
        assert best is not None
        if best[0] > self.tolerance:
            raise UnavailableSiteError(
                f"layer.{layer}'s values are not a norm of the stream times W_V (relative gap {best[0]:.2g}).",
                remedy="Norms or gates of the values, and values from a compressed latent, are not supported.",
            )
        return (self.norm(best[1]) if best[1] else None), best[2]

    def _output(self, layer: int, seen: Mapping[str, Tensor], W_O: Tensor) -> tuple[Norm | None, float, Tensor]:
        """What stands between the heads' results and the stream: a norm or a factor; and the projection's bias."""
        factor = self.subject.structure.blocks[layer].taps["attn.out"].factor
        out = seen["attn.out"]
        result = torch.einsum("bphi,hio->bpo", seen["attn.z"], W_O.detach().to(self.work).cpu())
        result = result.reshape(out.shape)
        bias, error = _constant(out / factor - result, float(out.abs().max()) / factor)
        if error <= self.tolerance:
            return None, factor, bias
        for path in self.norms[layer]:
            if not torch.allclose(seen[path] * factor, out, rtol=1e-3, atol=1e-6):
                continue
            given = seen[f"{path}.input"]
            bias, error = _constant(given - result, float(given.abs().max()))
            if error <= self.tolerance:
                return self.norm(path), factor, bias
        raise UnavailableSiteError(
            f"What layer.{layer}'s attention adds to the stream is not its heads' results through W_O "
            f"(relative gap {error:.2g})."
        )

    def _mlp_input(self, layer: int, seen: Mapping[str, Tensor], parallel: bool) -> Norm | None:
        stream = "resid_pre" if parallel else "resid_mid"
        given = seen["mlp.in"]
        if _same(given, seen[stream]):
            return None
        for path in self._fed_by(layer, seen, stream):
            if _same(given, seen[path]):
                return self.norm(path)
        raise UnavailableSiteError(f"What layer.{layer}'s MLP reads is no norm of the stream that was recognised.")

    def _fed_by(self, layer: int, seen: Mapping[str, Tensor], stream: str) -> list[str]:
        return [path for path in self.norms[layer] if _same(seen[f"{path}.input"], seen[stream])]


def _same(left: Tensor, right: Tensor) -> bool:
    return left.shape == right.shape and torch.allclose(left, right, rtol=1e-4, atol=1e-6)


def _constant(gap: Float[Tensor, "sample ..."], scale: float) -> tuple[Any, float]:
    """The mean over samples of what should be one constant (0 where it is rounding), and by how much it is none."""
    mean = gap.mean(0)
    spread = float((gap - mean).abs().max())
    if float(mean.abs().max()) <= 4 * spread:
        mean, spread = torch.zeros_like(mean), float(gap.abs().max())
    return mean, spread / max(scale, 1e-30)
