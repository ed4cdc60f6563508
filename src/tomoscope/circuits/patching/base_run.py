"""A run whose streams, keys and values are kept, so that the model can be run again from any layer and column on.

Nothing of the model is written again: blocks below are bypassed, the first block that runs is given its stream, and the
cache is the library's own. What ends the run is the metric at each row's last token.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from tomoscope.circuits.metrics import Metric
from tomoscope.errors import SiteError
from tomoscope.model import Batch, Edit, Site, Subject
from tomoscope.model.bypass import bypassing
from tomoscope.model.probe import main_input, unwrap
from tomoscope.model.regions import Bound
from tomoscope.model.taps import Session


class BaseRun:
    """A base run of some prompts, kept so that any part of the model can be run again from a layer and a column on.

    Args:
        subject: the model.
        batch: the prompts whose run is patched.
        edits: edits of the base run itself (a noise corruption); patches come on top.
        mode: "sliced", "suffix" or "plain"; None chooses the fastest that `check` allows.
    """

    def __init__(self, subject: Subject, batch: Batch, *, edits: Sequence[Edit] = (), mode: str | None = None) -> None:
        self.subject, self.batch, self.edits = subject, batch, tuple(edits)
        self.n_layers = subject.facts.n_layers
        if not self.n_layers:
            raise SiteError("This model is no stack of blocks, so there is no stream to patch.")
        self.width = batch.width
        self.last = batch.last
        self.mode = mode or ("sliced" if subject.facts.kind == "decoder" else "suffix")
        self.trims = self.mode == "sliced"
        self.grows = self.mode == "sliced" and not batch.padded and batch.input_ids is not None
        self.precision = torch.float64 if subject.dtype == torch.float64 else torch.float32
        self._base()

    # ---- the base run

    @torch.no_grad()
    def _base(self) -> None:
        subject, blocks = self.subject, self.subject.structure.blocks
        parts = [
            "resid_pre",
            *(p for p in ("attn.z", "attn.out", "mlp.out", "resid_mid") if all(p in b.taps for b in blocks)),
        ]
        sites = [Site(part, layer) for part in parts for layer in range(self.n_layers)] + [
            Site("resid_post", self.n_layers - 1)
        ]
        self.normed = "norm.final" in subject.structure.taps
        sites += [Site("norm.final")] if self.normed else []
        arguments = subject.forward_arguments(self.batch)
        cache = DynamicCache() if self.mode == "sliced" and "past_key_values" in subject.accepts else None
        if cache is not None:
            arguments |= {"past_key_values": cache, "use_cache": True}
        session = Session(
            subject.model,
            subject.structure,
            reads=sites,
            edits=subject.bind(self.edits, self.batch),
            batch_size=len(self.batch),
        )
        with session:
            logits = unwrap(subject.model(**arguments))[0]
        assert logits is not None
        self.values = session.values
        self.streams = [self.values[Site("resid_pre", i)] for i in range(self.n_layers)]
        self.streams.append(self.values[Site("resid_post", self.n_layers - 1)])
        rows = torch.arange(len(self.batch))
        self.logits = logits[rows, self.last.to(logits.device)] if logits.dim() == 3 else logits
        self.cache = self._kept(cache)
        if self.mode == "sliced" and self.cache is None:
            self.mode = "suffix"
        self._head = self._linear_head()

    def _kept(self, cache: Any) -> list[tuple[Tensor, Tensor]] | None:
        """Keys and values of every layer, or None where the library's cache does not hold them all."""
        layers = getattr(cache, "layers", None)
        if not layers or len(layers) != self.n_layers:
            return None
        kept = [(getattr(one, "keys", None), getattr(one, "values", None)) for one in layers]
        whole = all(isinstance(k, Tensor) and k.dim() == 4 and k.shape[2] == self.width for k, _ in kept)
        return kept if whole else None  # ty: ignore[invalid-explicit-return]

    def _linear_head(self) -> tuple[Tensor, Tensor | None] | None:
        """Unembedding and bias, if the logits are just the final norm times them (no scale, no soft-cap)."""
        getter = getattr(self.subject.model, "get_output_embeddings", None)
        module = getter() if getter is not None else None
        if module is None or not self.normed or not isinstance(getattr(module, "weight", None), Tensor):
            return None
        final = self.values[Site("norm.final")]
        at_last = final[torch.arange(len(final)), self.last]
        mine = torch.nn.functional.linear(at_last, module.weight, getattr(module, "bias", None))
        same = mine.shape == self.logits.shape and torch.allclose(mine, self.logits, rtol=1e-4, atol=1e-4)
        return (module.weight, getattr(module, "bias", None)) if same else None

    # ---- running from a place on

    @torch.no_grad()
    def run(
        self,
        rows: Int[Tensor, " row"],
        layer: int,
        column: int,
        metric: Metric,
        *,
        stream: Float[Tensor, "row position d_model"] | None = None,
        edits: Sequence[Bound] = (),
    ) -> Float[Tensor, " row"]:
        """The metric after running from a layer and a column on.

        Args:
            rows: which prompt of the base each row is.
            layer: first block that is run; `n_layers` runs only the model's end.
            column: first column of the padded batch that is run.
            metric: of pairs numbered as the base's rows.
            stream: the stream into that block from that column on; the base's own by default.
            edits: written on the way; their rows count these rows and their columns the padded batch.
        """
        device = self.subject.device
        rows_on = rows.to(device)
        if stream is None:
            stream = self.streams[layer][rows_on, column:]
        reads = [Site("norm.final")] if self._head is not None else []
        session = Session(
            self.subject.model, self.subject.structure, reads=reads, edits=edits, batch_size=len(rows), stop=bool(reads)
        )
        session.past = column
        output = None
        with self._from(layer, stream), self._trimmed(layer, column, edits), session:
            output = self.subject.model(**self._arguments(rows_on, layer, column))
        return metric(self._logits(session, output, rows, column, metric), rows).cpu()

    def _logits(self, session: Session, output: Any, rows: Tensor, column: int, metric: Metric) -> Tensor:
        """Logits at each row's last token: those that the metric needs, from the final norm where that is exact."""
        device, place = self.subject.device, self.last[rows] - column
        if self._head is not None:
            final = session.values[Site("norm.final")]
            final = final[torch.arange(len(rows)), place]
            weight, bias = self._head
            tokens = metric.tokens
            if tokens is not None:
                weight, bias = weight[tokens.to(device)], None if bias is None else bias[tokens.to(device)]
            return torch.nn.functional.linear(final, weight, bias)
        whole = unwrap(output)[0]
        assert whole is not None
        return whole[torch.arange(len(rows)), place.to(whole.device)] if whole.dim() == 3 else whole

    def _arguments(self, rows: Tensor, layer: int, column: int) -> dict[str, Any]:
        batch, accepts = self.batch, self.subject.accepts
        arguments: dict[str, Any] = {name: value[rows] for name, value in batch.extra.items()}
        if batch.input_ids is None:
            return arguments
        arguments["input_ids"] = batch.input_ids[rows, column:]
        if batch.attention_mask is not None and "attention_mask" in accepts:
            arguments["attention_mask"] = batch.attention_mask[rows]
        if self.cache is not None and column > 0:
            pieces = []
            for index, (keys, values) in enumerate(self.cache):
                # blocks below are bypassed, so theirs only tell the library how long the past is
                chosen = rows if index >= layer else rows[:1]
                pieces.append((keys[chosen, :, :column], values[chosen, :, :column]))
            arguments |= {"past_key_values": DynamicCache(pieces), "use_cache": True}
        elif "use_cache" in accepts:
            arguments["use_cache"] = False
        left = bool((batch.pads > 0).any())
        if (column > 0 or left) and "position_ids" in accepts and batch.attention_mask is not None:
            positions = (batch.attention_mask.long().cumsum(-1) - 1).clamp(min=0)
            arguments["position_ids"] = positions[rows, column:]
        return arguments

    def _from(self, layer: int, stream: Tensor) -> ExitStack:
        """Bypass the blocks below a layer and give that layer its stream."""
        stack = ExitStack()
        blocks = self.subject.structure.blocks
        if layer >= self.n_layers:
            outputs: dict[int, Tensor | None] = dict.fromkeys(range(self.n_layers - 1))
            outputs[self.n_layers - 1] = stream
            stack.enter_context(bypassing(self.subject, outputs))
            return stack
        stack.enter_context(bypassing(self.subject, dict.fromkeys(range(layer))))

        def enter(module: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
            return main_input(args, kwargs)[1](stream)

        block = self.subject.model.get_submodule(blocks[layer].path)
        stack.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
        return stack

    def _trimmed(self, layer: int, column: int, edits: Sequence[Bound]) -> ExitStack:
        """In the last block, let only the last token through the output projection and the MLP.

        No later block mixes positions, so the others' streams are never used; what they hold after this is meaningless.
        The sum with the residual broadcasts. A family in which that does not hold is found out by `check`.
        """
        stack = ExitStack()
        block = self.subject.structure.blocks[-1]
        tap = block.taps.get("mlp.in")
        if (
            not self.trims
            or edits
            or layer >= self.n_layers
            or column >= self.width - 1
            or tap is None
            or tap.side != "in"
        ):
            return stack

        def last_only(module: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
            value, put = main_input(args, kwargs)
            return None if value is None else put(value[:, -1:])

        for path in (block.projection, tap.path):
            if path:
                module = self.subject.model.get_submodule(path)
                stack.callback(module.register_forward_pre_hook(last_only, with_kwargs=True).remove)
        return stack

    # ---- step 1: one block, single tokens

    @torch.no_grad()
    def block_on_tokens(
        self, layer: int, part: str, rows: Int[Tensor, " token"], columns: Int[Tensor, " token"], new: Tensor
    ) -> Float[Tensor, "token d_model"]:
        """The stream after a block, at single places, when a part of it takes a new value there.

        Every place is a sequence of one token: what attention would have gathered is replaced by z or attn.out anyway.

        Args:
            layer: the block.
            part: "attn.z" (new: [token, head, head_dim], all heads), "attn.out", "mlp.out" or "resid_mid".
            rows: base row of each place.
            columns: its column.
            new: the new values.
        """
        device = self.subject.device
        rows, columns = rows.to(device), columns.to(device)
        stream = self.streams[layer][rows, columns][:, None]
        site = Site(part, layer)
        edits = [Bound(Edit(site.name, "replace", new[:, None]), site, None, None, False)]
        if part in ("mlp.out", "resid_mid"):
            # attention on a lone token is not attention in the prompt: give it what it added in the base run
            base = Site("attn.out", layer)
            kept = self.values[base][rows, columns][:, None]
            edits.insert(0, Bound(Edit(base.name, "replace", kept), base, None, None, False))
        read = Site("resid_post", layer)
        arguments: dict[str, Any] = {"input_ids": self.batch.input_ids[rows, columns][:, None]}  # ty: ignore[not-subscriptable]
        if "attention_mask" in self.subject.accepts:
            arguments["attention_mask"] = torch.ones_like(arguments["input_ids"])
        if "use_cache" in self.subject.accepts:
            arguments["use_cache"] = False
        session = Session(
            self.subject.model, self.subject.structure, reads=[read], edits=edits, batch_size=len(rows), stop=True
        )
        with self._from(layer, stream), session:
            self.subject.model(**arguments)
        return session.values[read][:, 0]
