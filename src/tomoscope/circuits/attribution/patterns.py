"""Attention patterns of a prompt, kept where they fit in memory and read again, block by block, where they don't."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from tomoscope.model import Activations, Batch, Subject, replace
from tomoscope.model.bypass import bypassing
from tomoscope.model.memory import free_bytes

SHARE = 0.25
"""Of the free memory, for what is read or kept at once."""


class Patterns:
    """patterns(layer) -> [head, query, key] of one prompt.

    Args:
        subject: the model.
        batch: the prompt, one row without padding.
        dtype: of what is returned.
        memory: bytes that may be kept; a share of what is free by default.
    """

    def __init__(self, subject: Subject, batch: Batch, dtype: torch.dtype, *, memory: int | None = None) -> None:
        self.subject, self.batch, self.dtype = subject, batch, dtype
        every = subject.facts.n_layers * subject.facts.n_heads * batch.width**2 * dtype.itemsize
        self.keeps = every <= (SHARE * free_bytes(subject.device) if memory is None else memory)
        self._kept: dict[int, Tensor] = {}
        self._streams: list[Tensor] | None = None

    @torch.no_grad()
    def __call__(self, layer: int) -> Float[Tensor, "head query key"]:
        """A block's pattern."""
        if layer not in self._kept:
            if not self.keeps:
                self._kept.clear()
            self._kept[layer] = self._read(layer)
        return self._kept[layer]

    def names(self, layers: Iterable[int]) -> list[str]:
        """Sites to read in a run that is made anyway, for `take`; none where patterns can't be kept."""
        return [f"layer.{layer}.attn.pattern" for layer in layers] if self.keeps else []

    def take(self, acts: Activations, layers: Iterable[int]) -> None:
        """Keep the patterns of `names`."""
        for layer in layers if self.keeps else ():
            self._kept[layer] = acts[f"layer.{layer}.attn.pattern"][0].to(self.dtype)

    def _read(self, layer: int) -> Tensor:
        name = f"layer.{layer}.attn.pattern"
        if self.keeps:
            return self.subject.read(self.batch, name, keep_device=True)[name][0].to(self.dtype)
        if self._streams is None:
            self._streams = self._checked_streams()
        if not self._streams:
            return self.subject.read(self.batch, name, keep_device=True)[name][0].to(self.dtype)
        return self._alone(layer, self._streams[layer]).to(self.dtype)

    def _alone(self, layer: int, stream: Tensor) -> Tensor:
        """The pattern of one block that is given its stream, the blocks below bypassed."""
        name = f"layer.{layer}.attn.pattern"
        with bypassing(self.subject, dict.fromkeys(range(layer))):
            edit = replace(f"layer.{layer}.resid_pre", stream)
            return self.subject.read(self.batch, name, edits=[edit], keep_device=True)[name][0]

    def _checked_streams(self) -> list[Tensor]:
        """The streams into every block, or none where a block alone does not give what the whole model gives."""
        last = self.subject.facts.n_layers - 1
        names = [f"layer.{i}.resid_pre" for i in range(last + 1)]
        acts = self.subject.read(self.batch, *names, keep_device=True)
        streams = [acts[name] for name in names]
        name = f"layer.{last}.attn.pattern"
        whole = self.subject.read(self.batch, name, keep_device=True)[name][0]
        try:
            same = torch.allclose(self._alone(last, streams[last]), whole, rtol=1e-4, atol=1e-6)
        except (RuntimeError, TypeError, ValueError, AttributeError):
            same = False  # blocks that hand on more than the stream can't be run alone
        return streams if same else []
