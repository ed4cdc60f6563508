"""The end of a model, from one layer and one column of a padded batch on, with gradients to what is added there.

A vector is added at one place of each row: to an MLP's output projection ("mlp") or to a block's output ("block").
Nothing before that place depends on it, so everything before it is computed once: blocks below are bypassed, the stream
is given, and keys and values of earlier columns come from the library's own cache. Where the projection's output goes
through a norm or a scale before it reaches the stream (Gemma 2), the block itself is run too.

How it can mislead: a family whose blocks hand on more than the stream can't be cut so. The first run, with nothing
added, is compared with the whole model's, and where they differ the whole model is run every time (`mode` says so).
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from tomoscope.errors import ModelError
from tomoscope.model import Batch, Site, Subject
from tomoscope.model.bypass import bypassing
from tomoscope.model.gradients import frozen
from tomoscope.model.probe import main_input, unwrap
from tomoscope.model.taps import Session

# several families take norms in single precision whatever the type of the rest
_CLOSE = {torch.float64: 1e-5, torch.float32: 1e-3}


class Suffix:
    """Everything after one place of each row.

    Args:
        subject: a decoder.
        batch: padded on the left.
        layer: where to add.
        kind: "mlp" (the output of the layer's output projection) or "block" (the block's output).
        columns: [row], the place of each row in the padded batch.
        keep: logits of so many last columns are given.
        mode: "cut" or "whole"; None cuts where that is seen to be exact.

    Attributes:
        value: [row, d_model], what stood at the place.
        logits: [row, keep, vocab] with nothing added.
        mode: how it runs.
    """

    def __init__(
        self, subject: Subject, batch: Batch, layer: int, *, kind: str, columns: Int[Tensor, " row"], keep: int,
        mode: str | None = None,
    ) -> None:  # fmt: skip
        self.subject, self.batch, self.layer, self.kind = subject, batch, layer, kind
        self.columns, self.keep = columns.to(subject.device), keep
        self.rows = torch.arange(len(batch), device=subject.device)
        block = subject.structure.blocks[layer]
        self.path = block.down if kind == "mlp" else block.path
        self.column = int(columns.min())
        self.mode = "cut"
        self._base()
        if mode is not None:
            self.mode = mode
        elif not self._exact():
            self.mode = "whole"

    # ---- the run that is kept

    @torch.no_grad()
    def _base(self) -> None:
        subject, layer = self.subject, self.layer
        last = layer + 1 == subject.facts.n_layers
        after, before = Site("resid_post", layer), Site("resid_pre", layer)
        plain = self.kind == "block"
        reads = [after, before]
        if self.kind == "mlp":
            inner, outer = Site("module", None, (), self.path), Site("mlp.out", layer)
            reads += [inner] + ([outer] if "mlp.out" in subject.structure.blocks[layer].taps else [])
        arguments = subject.forward_arguments(self.batch)
        cache = DynamicCache() if "past_key_values" in subject.accepts else None
        if cache is not None:
            arguments |= {"past_key_values": cache, "use_cache": True}
        session = Session(subject.model, subject.structure, reads=reads, batch_size=len(self.batch))
        with session:
            logits = unwrap(subject.model(**self._kept_logits(arguments)))[0]
        if logits is None:
            raise ModelError("The model gave no logits.")
        self.logits = logits[:, -self.keep :]
        values = session.values
        if self.kind == "mlp":
            given = values[reads[2]].reshape(values[after].shape)
            plain = len(reads) == 4 and torch.equal(given, values[reads[3]])
            plain = plain and subject.structure.blocks[layer].kind == "sum"
            self.value = given[self.rows, self.columns]
        else:
            self.value = values[after][self.rows, self.columns]
        # a plain write moves the block's output by as much as the projection's, so the block itself need not run
        self.inside = not plain
        self.start = layer if self.inside else layer + 1
        self.stream = values[before if self.inside else after]
        self.last = last and not self.inside
        self.cache = self._whole_cache(cache)
        if self.cache is None:
            self.column = 0

    def _kept_logits(self, arguments: dict[str, Any]) -> dict[str, Any]:
        return arguments | ({"logits_to_keep": self.keep} if "logits_to_keep" in self.subject.accepts else {})

    def _whole_cache(self, cache: Any) -> list[tuple[Tensor, Tensor]] | None:
        layers = getattr(cache, "layers", None)
        if not layers or len(layers) != self.subject.facts.n_layers:
            return None
        kept = [(getattr(one, "keys", None), getattr(one, "values", None)) for one in layers]
        whole = all(isinstance(k, Tensor) and k.dim() == 4 and k.shape[2] == self.batch.width for k, _ in kept)
        return kept if whole else None  # ty: ignore[invalid-explicit-return]

    @torch.no_grad()
    def _exact(self) -> bool:
        try:
            mine = self.run(torch.zeros_like(self.value))
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
            return False  # a family that can't be cut: the whole model is run instead
        limit = _CLOSE.get(mine.dtype, 3e-2) * float(self.logits.abs().max().clamp(min=1.0))
        return mine.shape == self.logits.shape and float((mine - self.logits).abs().max()) <= limit

    # ---- running on

    def run(self, added: Float[Tensor, "row d_model"]) -> Float[Tensor, "row keep vocab"]:
        """Logits of the last columns with a vector added at each row's place; differentiable in it."""
        with ExitStack() as stack:
            stack.enter_context(frozen(self.subject.model))
            column = self.column if self.mode == "cut" else 0
            if self.mode == "whole" or self.inside:
                stack.enter_context(self._adding(added, column))
            if self.mode == "cut":
                stack.enter_context(self._from(added))
            output = self.subject.model(**self._kept_logits(self._arguments(column)))
        logits = unwrap(output)[0]
        assert logits is not None
        return logits[:, -self.keep :]

    def _put(self, value: Tensor, added: Tensor, column: int) -> Tensor:
        return value.index_put((self.rows, self.columns - column), added.to(value.dtype), accumulate=True)

    def _adding(self, added: Tensor, column: int) -> ExitStack:
        stack = ExitStack()

        def after(module: Any, args: tuple, output: Any) -> Any:
            value, put = unwrap(output)
            assert value is not None
            shaped = value.reshape(len(self.rows), -1, value.shape[-1])
            return put(self._put(shaped, added, column).reshape(value.shape))

        stack.callback(self.subject.model.get_submodule(self.path).register_forward_hook(after).remove)
        return stack

    def _from(self, added: Tensor) -> ExitStack:
        stack, subject = ExitStack(), self.subject
        stream = self.stream[:, self.column :]
        if not self.inside:
            stream = self._put(stream, added, self.column)
        if self.last:
            outputs: dict[int, Tensor | None] = dict.fromkeys(range(self.layer))
            outputs[self.layer] = stream
            stack.enter_context(bypassing(subject, outputs))
            return stack
        stack.enter_context(bypassing(subject, dict.fromkeys(range(self.start))))

        def enter(module: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
            return main_input(args, kwargs)[1](stream)

        block = subject.model.get_submodule(subject.structure.blocks[self.start].path)
        stack.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
        return stack

    def _arguments(self, column: int) -> dict[str, Any]:
        subject, batch = self.subject, self.batch
        assert batch.input_ids is not None
        arguments: dict[str, Any] = {**batch.extra, "input_ids": batch.input_ids[:, column:]}
        if batch.attention_mask is not None and "attention_mask" in subject.accepts:
            arguments["attention_mask"] = batch.attention_mask
        if self.cache is not None and column > 0:
            # blocks below are bypassed, so theirs only tell the library how long the past is
            pieces = [(keys[:, :, :column], values[:, :, :column]) for keys, values in self.cache]
            arguments |= {"past_key_values": DynamicCache(pieces), "use_cache": True}
        elif "use_cache" in subject.accepts:
            arguments["use_cache"] = False
        left = bool((batch.pads > 0).any())
        if (column > 0 or left) and "position_ids" in subject.accepts and batch.attention_mask is not None:
            positions = (batch.attention_mask.long().cumsum(-1) - 1).clamp(min=0)
            arguments["position_ids"] = positions[:, column:]
        return arguments
