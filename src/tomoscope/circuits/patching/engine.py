"""The patch engine: many patches of one base run, computing only what a patch can change.

A patch at (layer, position) leaves untouched everything below its layer and, in a causal model, everything before its
position. So the base run's streams, keys and values are kept, and a patch is run from its own layer on, from its own
position on, with all heads (and prompts) of a place as rows of one batch:

    1. one block on single tokens: what the patch makes of the stream at its own place (all patches of a layer at once);
    2. the blocks above on the tokens from there on, with the keys and values before it from the base run: all patches
       of a position in one pass, each row joining the batch at its own layer, so that the products are large;
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
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from tomoscope.circuits.metrics import Metric
from tomoscope.circuits.patching.base_run import BaseRun
from tomoscope.errors import SiteError, TomoscopeError
from tomoscope.model import Edit, Site, scatter
from tomoscope.model.probe import main_input
from tomoscope.model.regions import Bound
from tomoscope.model.taps import Session

STREAM_PARTS = ("resid_pre", "resid_mid", "resid_post", "attn.out", "mlp.out")
PARTS = (*STREAM_PARTS, "attn.z")
"""The parts of a layer that a grid can patch."""
MODES = ("sliced", "suffix", "plain")
TOLERANCE = 2e-3  # of the logits' spread: float32 sums in another order


class Engine(BaseRun):
    """Patches of a base run; see the module's docstring."""

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
