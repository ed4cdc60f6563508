"""The patch engine: many patches of one base run, computing only what a patch can change.

A patch at (layer, position) leaves untouched everything below its layer and, in a causal model, everything before its
position. So the base run's streams, keys and values are kept, and a patch is run from its own layer on, from its own
position on, with all heads (and prompts) of a place as rows of one batch:

    1. one block on single tokens: what the patch makes of the stream at its own place (all patches of a layer at once);
    2. the blocks above on the tokens from there on, with the keys and values before it from the base run: all patches
    of
       a position in one pass, each row joining the batch at its own layer, so that the products are large;
    3. in the last block, only the last token after attention; then the final norm there, and only the logits that the
       metric asks for.

The mean patch costs a quarter of a forward, which is the floor for exhaustive grids. Nothing of the model is written
again: blocks below are bypassed, the cache is the library's own. Where a family does not allow it (encoders see both
ways, some have no such cache), the engine falls back to whole sequences from the layer on, or to plain runs; which one
was used is decided by comparing sampled patches with plain runs, and is recorded as `mode`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from tomoscope.circuits.metrics import Metric
from tomoscope.errors import SiteError, TomoscopeError
from tomoscope.model import Batch, Edit, Site, Subject, scatter
from tomoscope.model.bypass import bypassing
from tomoscope.model.probe import main_input, unwrap
from tomoscope.model.regions import Bound
from tomoscope.model.taps import Session

STREAM_PARTS = ("resid_pre", "resid_mid", "resid_post", "attn.out", "mlp.out")
PARTS = (*STREAM_PARTS, "attn.z")
"""The parts of a layer that a grid can patch."""
MODES = ("sliced", "suffix", "plain")
TOLERANCE = 2e-3  # of the logits' spread: float32 sums in another order


class Engine:
    """A base run of some prompts, and patches of it.

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

    # ---- a grid of patches

    def patches(
        self, layer: int, part: str, columns: Int[Tensor, "pair position"], new: Tensor, metric: Metric
    ) -> Float[Tensor, "position unit pair"]:
        """Patch one part of one layer at each of some positions (and each head) alone.

        Args:
            layer: the block.
            part: one of `PARTS`.
            columns: [pair, position] columns of the padded batch.
            new: [pair, position, d_model], or [pair, position, head, head_dim] for "attn.z".
            metric: over the base's pairs.

        Returns:
            [position, unit, pair]; unit is the head for "attn.z" and has length 1 otherwise.
        """
        if part not in PARTS:
            raise SiteError(f"{part!r} can't be patched in a grid.", remedy=f"It is one of {', '.join(PARTS)}.")
        if self.mode == "sliced":
            return self._sliced(layer, part, columns, new, metric)
        return self._whole(layer, part, columns, new, metric)

    def _sliced(self, layer: int, part: str, columns: Tensor, new: Tensor, metric: Metric) -> Tensor:
        pairs, places = columns.shape
        heads = new.shape[2] if part == "attn.z" else 1
        pair = torch.arange(pairs)[:, None, None].expand(pairs, places, heads).reshape(-1)
        column = columns[:, :, None].expand(pairs, places, heads).reshape(-1)
        start = layer + (part != "resid_pre")
        changed = self._changed(layer, part, pair, column, new, heads)
        out = torch.empty(pairs * places * heads, dtype=self.precision)
        # nothing after the last block mixes positions, so there only a change at the last token can matter
        same = (column != self.last[pair]) if start >= self.n_layers else torch.zeros_like(column, dtype=torch.bool)
        base = metric(
            self.logits if metric.tokens is None else self.logits[:, metric.tokens.to(self.logits.device)],
            torch.arange(pairs),
        ).cpu()
        out[same] = base[pair[same]].to(out.dtype)
        for one in column[~same].unique().tolist():
            rows = torch.nonzero((column == one) & ~same)[:, 0]
            step = self._rows(self.width - one)
            for chunk in rows.split(step):
                stream = self.streams[start][pair[chunk].to(self.subject.device), one:].clone()
                stream[:, 0] = changed[chunk.to(changed.device)]
                out[chunk] = self.run(pair[chunk], start, one, metric, stream=stream).to(out.dtype)
        return out.reshape(pairs, places, heads).permute(1, 2, 0)

    def grid(
        self,
        layers: Sequence[int],
        part: str,
        columns: Int[Tensor, "pair position"],
        new: dict[int, Tensor],
        metric: Metric,
    ) -> Float[Tensor, "layer position unit pair"]:
        """`patches` for several layers.

        Args:
            layers: the blocks, ascending.
            part: one of `PARTS`.
            columns: as in `patches`.
            new: layer -> its values as in `patches`.
            metric: over the base's pairs.
        """
        if self.mode != "sliced" or not self.grows:
            return torch.stack([self.patches(layer, part, columns, new[layer], metric) for layer in layers])
        return self._grown(layers, part, columns, new, metric)

    def _grown(
        self, layers: Sequence[int], part: str, columns: Tensor, new: dict[int, Tensor], metric: Metric
    ) -> Tensor:
        pairs, places = columns.shape
        heads = new[layers[0]].shape[2] if part == "attn.z" else 1
        pair = torch.arange(pairs)[:, None, None].expand(pairs, places, heads).reshape(-1)
        column = columns[:, :, None].expand(pairs, places, heads).reshape(-1)
        late = part != "resid_pre"
        inner = [layer for layer in layers if layer + late < self.n_layers]
        out = torch.empty(len(layers), len(pair), dtype=self.precision)
        for layer in layers:
            if layer not in inner:
                out[layers.index(layer)] = (
                    self._sliced(layer, part, columns, new[layer], metric).permute(2, 0, 1).reshape(-1)
                )
        changed = [self._changed(layer, part, pair, column, new[layer], heads) for layer in inner]
        for one in column.unique().tolist() if inner else ():
            rows = torch.nonzero(column == one)[:, 0]
            for chunk in rows.split(max(1, self._rows(self.width - one) // len(inner))):
                entries = [
                    (layer + late, pair[chunk], c[chunk.to(c.device)]) for layer, c in zip(inner, changed, strict=True)
                ]
                got = self._run_grown(entries, one, metric)
                for place, layer in enumerate(inner):
                    out[layers.index(layer), chunk] = got[place].to(out.dtype)
        return out.reshape(len(layers), pairs, places, heads).permute(0, 2, 3, 1)

    @torch.no_grad()
    def _run_grown(self, entries: Sequence[tuple[int, Tensor, Tensor]], column: int, metric: Metric) -> Tensor:
        """Run patches of one column that start at different layers as one batch that grows on its way up.

        Masks and positions are given for one row and broadcast: the prompts have no padding, so all rows share them.

        Args:
            entries: (first block, base rows, the stream at the column), by ascending block, with as many rows each.
            column: first column that is run.
            metric: over the base's pairs.

        Returns:
            [entry, row].
        """
        device, model = self.subject.device, self.subject.model
        streams = {}
        for start, rows, changed in entries:
            stream = self.streams[start][rows.to(device), column:].clone()
            stream[:, 0] = changed
            streams[start] = stream
        first = entries[0][0]
        reads = [Site("norm.final")] if self._head is not None else []
        present = torch.cat([rows for _, rows, _ in entries])
        session = Session(model, self.subject.structure, reads=reads, batch_size=len(present), stop=bool(reads))
        arguments = self._arguments(torch.zeros(1, dtype=torch.long, device=device), first, column)
        if self.cache is not None and column > 0:
            pieces, joined = [], torch.zeros(1, dtype=torch.long)
            for index, (keys, values) in enumerate(self.cache):
                if index in streams:
                    joined = torch.cat([rows for start, rows, _ in entries if start <= index])
                chosen = joined.to(device)
                pieces.append((keys[chosen, :, :column], values[chosen, :, :column]))
            arguments["past_key_values"] = DynamicCache(pieces)
        output = None
        with self._from(first, streams.pop(first)) as stack:
            for start, stream in streams.items():
                stack.callback(self._joining(start, stream))
            with self._trimmed(first, column, ()), session:
                output = model(**arguments)
        return metric(self._logits(session, output, present, column, metric), present).cpu().reshape(len(entries), -1)

    def _joining(self, layer: int, stream: Tensor) -> Any:
        """Let more rows into the batch where a block begins; returns what takes the hook away."""

        def join(module: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
            value, put = main_input(args, kwargs)
            return None if value is None else put(torch.cat([value, stream]))

        block = self.subject.model.get_submodule(self.subject.structure.blocks[layer].path)
        return block.register_forward_pre_hook(join, with_kwargs=True).remove

    def _changed(self, layer: int, part: str, pair: Tensor, column: Tensor, new: Tensor, heads: int) -> Tensor:
        """The stream at the patched place itself: into the block for resid_pre, after it for every other part."""
        device = self.subject.device
        flat = new.to(device).flatten(0, 1)
        if part in ("resid_pre", "resid_post"):
            return flat
        if part == "attn.z":
            z = self.values[Site("attn.z", layer)][pair.to(device), column.to(device)].clone()
            unit = torch.arange(len(z), device=device)
            z[unit, unit % heads] = flat.reshape(-1, new.shape[-1]).to(z.dtype)
            flat = z
        pieces = [
            self.block_on_tokens(layer, part, pair[chunk], column[chunk], flat[chunk.to(device)])
            for chunk in torch.arange(len(pair)).split(self._rows(1))
        ]
        return torch.cat(pieces)

    def _rows(self, width: int) -> int:
        return max(1, min(self.subject.rows_per_call(max(width, 1)), 8192 // max(width, 1)))

    def _whole(self, layer: int, part: str, columns: Tensor, new: Tensor, metric: Metric) -> Tensor:
        """Whole sequences from the layer on (or plain runs), with all the patches of the layer as rows."""
        pairs, places = columns.shape
        heads = new.shape[2] if part == "attn.z" else 1
        pair = torch.arange(pairs)[:, None, None].expand(pairs, places, heads).reshape(-1)
        column = columns[:, :, None].expand(pairs, places, heads).reshape(-1)
        unit = torch.arange(heads).expand(pairs, places, heads).reshape(-1)
        values = new.reshape(len(pair), -1)
        out = torch.empty(len(pair), dtype=self.precision)
        for chunk in torch.arange(len(pair)).split(self._rows(self.width)):
            index = torch.stack([torch.arange(len(chunk)), column[chunk], unit[chunk]], dim=1)
            edit = scatter(f"layer.{layer}.{part}", index, values[chunk])
            out[chunk] = self.with_edits(pair[chunk], layer, metric, [edit]).to(out.dtype)
        return out.reshape(pairs, places, heads).permute(1, 2, 0)

    @torch.no_grad()
    def with_edits(self, rows: Tensor, layer: int, metric: Metric, edits: Sequence[Edit]) -> Tensor:
        """The metric of rows under any edits at or above a layer: from that layer on, or plainly."""
        taken = self.batch.take(rows)
        bound = [Bound(e, s, None, None, False) for e in edits for s in self.subject.grammar.parse(e.site)]
        if self.mode != "plain":
            return self.run(rows, layer, 0, metric, edits=bound)
        own = [_repeat(edit, rows, len(self.batch)) for edit in self.edits]
        logits = self.subject._last(taken, [*self.subject.bind(own, taken), *bound])
        tokens = metric.tokens
        return metric(logits if tokens is None else logits[:, tokens.to(logits.device)], rows).cpu()

    # ---- does the fast way give what a plain run gives?

    def check(
        self, part: str, columns: Tensor, new: Tensor, metric: Metric, *, layer: int, seed: int = 0, count: int = 3
    ) -> bool:
        """Compare sampled patches of a layer with plain runs; where they differ, fall back to the next mode.

        Returns:
            Whether the mode was kept.
        """
        generator = torch.Generator().manual_seed(seed)
        # the earliest position takes every shortcut that there is, so it is always among them
        earliest = columns.float().mean(0).argmin()[None]
        places = torch.cat([earliest, torch.randperm(columns.shape[1], generator=generator)[: count - 1]]).unique()
        plain = Engine(self.subject, self.batch, edits=self.edits, mode="plain")
        expected = plain.patches(layer, part, columns[:, places], new[:, places], metric)
        kept = (self.mode, self.trims, self.grows)
        spread = float(self.logits.float().std()) or 1.0
        # the block before takes part, so that rows join on the way up
        both = [layer - 1, layer] if layer and part != "resid_pre" else [layer]
        while self.mode != "plain":
            try:
                got = self.grid(both, part, columns[:, places], dict.fromkeys(both, new[:, places]), metric)[-1]
                if torch.allclose(got, expected, rtol=TOLERANCE, atol=TOLERANCE * spread):
                    break
            except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, KeyError, TomoscopeError):
                pass  # the family does not take this way of being run; the next one asks less of it
            if self.grows:
                self.grows = False
            elif self.trims:
                self.trims = False
            else:
                self.mode = MODES[MODES.index(self.mode) + 1]
                self.cache = None
        return kept == (self.mode, self.trims, self.grows)


def _repeat(edit: Edit, rows: Tensor, total: int) -> Edit:
    """A base edit for repeated rows: a value with one entry a row follows its row."""
    if edit.value is not None and edit.value.dim() > 1 and len(edit.value) == total:
        return dataclasses.replace(edit, value=edit.value[rows])
    return edit
