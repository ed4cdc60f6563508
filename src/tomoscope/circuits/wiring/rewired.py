"""One call of the model with its destinations' inputs mixed from the stream and the sources' differences.

Used by `Wiring`; rows are masks x pairs, masks outermost. Differences (ablated less current) of sources below the first
layer that is run are the same for every mask and kept once a pair; those above are kept by row as they are written.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tomoscope.circuits.wiring.ports import AttentionPort, HeadInput, MLPPort
from tomoscope.circuits.wiring.sources import Watch
from tomoscope.model.probe import main_input, unwrap

if TYPE_CHECKING:
    from tomoscope.circuits.wiring.wiring import Wiring


class Rewired:
    """The sources' differences for some pairs of a wiring, and the calls that use them.

    Args:
        wiring: the model, its ports, its clean and ablated sources.
        pairs: which of the wiring's pairs.
        ever: [source], those that any mask misses; of the others nothing is computed.
        added: column -> [pair, position, d_model] of all pairs, added to that destination's input besides.
    """

    def __init__(
        self,
        wiring: Wiring,
        pairs: slice,
        ever: Bool[Tensor, " source"],
        added: Mapping[int, Float[Tensor, "pair position d_model"]] | None = None,
    ) -> None:
        self.added = {column: value[pairs] for column, value in (added or {}).items()}
        self.wiring, self.subject, self.ports, self.pairs = wiring, wiring.subject, wiring.ports, pairs
        self.graph = self.ports.graph
        self.clean, self.ablated = wiring.clean.take(pairs), wiring.ablated.take(pairs)
        self.count, self.width = self.clean.embed.shape[:2]
        self.kept: list[int] = torch.nonzero(ever)[:, 0].tolist()
        self.keeps = frozenset(self.kept)
        self.layers = [writer.layer for writer in self.graph.writers]
        self._below: dict[int, Tensor] = {}  # layer -> differences in the clean run of what it wrote

    # ---- differences

    def below(self, rows: Sequence[int]) -> Float[Tensor, "source rest"]:
        """Differences in the clean run of some kept sources: [source, pair x position x d_model]."""
        wanted, pieces = set(rows), []
        for layer in sorted({self.layers[row] for row in rows}):
            if layer not in self._below:
                self._below[layer] = self._clean_differences(layer)
            mine = [row for row in self.kept if self.layers[row] == layer]
            chosen = [place for place, row in enumerate(mine) if row in wanted]
            value = self._below[layer]
            pieces.append(value if len(chosen) == len(mine) else value[chosen])
        return torch.cat(pieces) if len(pieces) > 1 else pieces[0]

    def _clean_differences(self, layer: int) -> Tensor:
        if layer < 0:
            out = []
            for row in self.kept:
                if self.layers[row] == -1:
                    kind = self.graph.writers[row].kind
                    clean = self.clean.embed if kind == "embed" else self.clean.position
                    ablated = self.ablated.embed if kind == "embed" else self.ablated.position
                    assert clean is not None
                    assert ablated is not None
                    out.append((ablated - clean).expand_as(clean).reshape(1, -1))
            return torch.cat(out)
        parts = []
        attention, mlp = self.ports.attention[layer], self.ports.mlp[layer]
        if attention is not None:
            current = (self.clean.heads if attention.projection else self.clean.whole)[layer]
            parts.append(self.attention_difference(layer, attention, current[None])[1])
        if mlp is not None:
            parts.append(self.mlp_difference(layer, mlp, self.clean.outs[layer][None])[1])
        return torch.cat([part[0] for part in parts if part is not None])

    def attention_difference(self, layer: int, port: AttentionPort, current: Tensor) -> tuple[int, Tensor | None]:
        """The first row and the differences of a layer's kept heads, from [mask, pair, position, ...] to
        [mask, head, rest]; None where none is kept.
        """
        heads = [place for place, row in enumerate(port.writers) if row in self.keeps]
        if not heads:
            return -1, None
        first = port.writers[heads[0]]
        if not port.projection:
            return first, (self.ablated.whole[layer] - current).reshape(len(current), 1, -1)
        maps, ablated = self.ports.maps(self.subject, layer), self.ablated.heads[layer]
        if len(heads) < len(port.writers):
            maps, ablated, current = maps[heads], ablated[..., heads, :], current[..., heads, :]
        return first, port.contributions(maps, ablated - current).reshape(len(current), len(heads), -1)

    def mlp_difference(self, layer: int, port: MLPPort, current: Tensor) -> tuple[int, Tensor | None]:
        """Row and difference of a layer's MLP; None where it is not kept."""
        if port.row not in self.keeps:
            return -1, None
        return port.row, (self.ablated.outs[layer] - current).reshape(len(current), 1, -1)

    # ---- calls

    def final(self, stream: Tensor, absent: Tensor) -> Tensor:
        """The stream that the model's end reads, where no block is run: [mask x pair, position, d_model]."""
        return _Call(self, absent, self.graph.n_layers, stream).into_logits(stream)

    @contextmanager
    def hooked(self, absent: Tensor, start: int, stream: Tensor) -> Generator[None]:
        """Hooks of one call that starts at a layer with a stream."""
        call = _Call(self, absent, start, stream)
        with ExitStack() as stack:
            call.attach(stack)
            yield


class _Call:
    """The state of one call: what was written so far, and the coefficients of each destination."""

    def __init__(self, rewired: Rewired, absent: Tensor, start: int, stream: Tensor) -> None:
        self.rewired, self.absent, self.start, self.stream = rewired, absent, start, stream
        self.subject, self.ports, self.graph = rewired.subject, rewired.ports, rewired.graph
        self.masks, self.pairs, self.width = len(absent), rewired.count, rewired.width
        self.differentiable = torch.is_grad_enabled()
        self.changed = torch.ones_like(absent, dtype=torch.bool)
        if not self.differentiable:
            self.changed = (absent != 0).cpu()
        self.changed[:, 0, list(rewired.added)] = (
            True  # whatever the row: these destinations have an input of their own
        )
        used = self.changed.any(0).any(-1)
        self.base = [row for row in rewired.kept if rewired.layers[row] < start and used[row]]
        self.above = [row for row in rewired.kept if rewired.layers[row] >= start]
        self.written: dict[int, Tensor] = {}  # differentiable: first row -> [mask, source, rest]
        self.buffer: Tensor | None = None  # otherwise: [mask, source, rest]
        self.inputs: dict[str, Tensor] = {}

    # ---- hooks

    def attach(self, stack: ExitStack) -> None:
        """Put all hooks in place; the stack takes them away."""
        model, blocks = self.subject.model, self.subject.structure.blocks

        def enter(module: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
            return main_input(args, kwargs)[1](self.stream)

        def leave(module: Any, args: tuple, output: Any) -> Any:
            value, put = unwrap(output)
            assert value is not None
            new = self.into_logits(value)
            return None if new is value else put(new)

        first = model.get_submodule(blocks[self.start].path)
        stack.callback(first.register_forward_pre_hook(enter, with_kwargs=True).remove)
        watch = Watch(
            self.subject, self.ports, first=self.start, rows=self.masks * self.pairs,
            heads=self._heads, whole=self._heads, mlp=self._mlp,
        )  # fmt: skip
        stack.enter_context(watch)
        for layer in range(self.start, self.graph.n_layers):
            attention, mlp = self.ports.attention[layer], self.ports.mlp[layer]
            if attention is not None and self._any(attention.readers):
                self._into_attention(stack, layer, attention)
            if mlp is not None and self._any((mlp.reader,)):
                self._capture(stack, mlp.norm)
                self._replace_input(stack, mlp.module, mlp.norm, mlp.reader)
        stack.callback(model.get_submodule(blocks[-1].path).register_forward_hook(leave).remove)

    def _any(self, readers: Sequence[int]) -> bool:
        return bool(self.changed[:, :, list(readers)].any())

    def _capture(self, stack: ExitStack, path: str) -> None:
        """Keep what goes into a norm: the stream that its readers see."""

        def before(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
            value = main_input(args, kwargs)[0]
            assert value is not None
            self.inputs[path] = value

        if path:
            module = self.subject.model.get_submodule(path)
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)

    def _replace_input(self, stack: ExitStack, path: str, norm: str, reader: int) -> None:
        """Give a module that is one destination its own input."""

        def before(module: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
            value, put = main_input(args, kwargs)
            assert value is not None
            stream = self._rows(self.inputs[norm] if norm else value)
            mixed, active, _ = self.mix(stream, (reader,))
            new = self._normed(norm, mixed[:, 0])  # [active mask, pair, position, d_model]
            if len(active) == self.masks:
                return put(new.reshape(value.shape))
            out = value.clone().reshape(self.masks, self.pairs, self.width, -1)
            out[active.to(out.device)] = new
            return put(out.reshape(value.shape))

        module = self.subject.model.get_submodule(path)
        stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)

    def _into_attention(self, stack: ExitStack, layer: int, port: AttentionPort) -> None:
        self._capture(stack, port.norm)
        if port.module:
            self._replace_input(stack, port.module, port.norm, port.readers[0])
            return
        readers = [one for one in port.readers if self._any((one,))]
        shared: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        by_path: dict[str, list[HeadInput]] = {}
        for one in port.inputs:
            by_path.setdefault(one.path, []).append(one)

        def normed(given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            if not shared:
                stream = self._rows(self.inputs[port.norm] if port.norm else given)
                mixed, active, slots = self.mix(stream, readers)
                shared["mixed"] = self._normed(port.norm, mixed), active, slots
            return shared["mixed"]

        for place, (path, inputs) in enumerate(by_path.items()):
            module = self.subject.model.get_submodule(path)
            forward = _projection(self, module, inputs, readers, normed, shared, place == len(by_path) - 1)
            # an instance attribute shadows the class's method and is deleted again: nothing of the model is changed
            module.forward = forward
            stack.callback(module.__dict__.pop, "forward", None)

    # ---- values

    def _rows(self, value: Tensor) -> Tensor:
        return value.reshape(self.masks, -1)

    def _normed(self, path: str, value: Tensor) -> Tensor:
        if not path:
            return value
        shape = value.shape
        # forward itself: the norm's own hooks are for the model's call
        return self.subject.model.get_submodule(path).forward(value.reshape(-1, *shape[-2:])).reshape(shape)

    def mix(self, stream: Tensor, readers: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs of some destinations of one moment.

        Args:
            stream: [mask, pair x position x d_model].
            readers: columns of the graph.

        Returns:
            [active mask, slot, pair, position, d_model]; which masks miss anything here; and [active mask, slot], which
            of the readers each slot is (-1: none).
        """
        moment = self.graph.readers[readers[0]].moment
        before = sum(writer.moment < moment for writer in self.graph.writers)
        missing = self.changed[:, :, list(readers)].any(1)
        active = torch.nonzero(missing.any(1))[:, 0]
        slots = _slots(missing[active])
        device = stream.device
        absent = self.absent if len(active) == self.masks else self.absent[active.to(device)]
        chosen = torch.tensor(list(readers))[slots.clamp(min=0)].to(device)  # [active, slot]
        coefficients = absent.gather(2, chosen[:, None].expand(-1, absent.shape[1], -1)).transpose(1, 2)
        coefficients = coefficients * (slots >= 0).to(device)[..., None]
        stream = stream if len(active) == self.masks else stream[active.to(device)]
        mixed = stream[:, None].expand(-1, slots.shape[1], -1)
        base = [row for row in self.base if row < before]
        if base:
            below = self.rewired.below(base).to(stream.dtype)
            mixed = mixed + (coefficients[..., base].flatten(0, 1) @ below).reshape(mixed.shape)
        mixed = self._mix_above(mixed, coefficients, [row for row in self.above if row < before], active)
        mixed = self._mix_added(mixed, slots, readers)
        return mixed.reshape(*slots.shape, self.pairs, self.width, -1), active, slots

    def _mix_above(self, mixed: Tensor, coefficients: Tensor, rows: list[int], active: Tensor) -> Tensor:
        if not rows:
            return mixed
        if self.differentiable:
            # piece by piece: joining them would keep a copy of all for each layer's backward
            for first, piece in self.written.items():
                if first in rows:
                    mine = rows[rows.index(first) :][: piece.shape[1]]
                    mixed = mixed + torch.bmm(coefficients[..., mine], piece)
            return mixed
        assert self.buffer is not None
        written = self.buffer[:, : len(rows)]
        written = written if len(active) == self.masks else written[active.to(written.device)]
        return torch.baddbmm(mixed, coefficients[..., rows], written)

    def _mix_added(self, mixed: Tensor, slots: Tensor, readers: Sequence[int]) -> Tensor:
        given = [(place, self.rewired.added[one]) for place, one in enumerate(readers) if one in self.rewired.added]
        if given:
            mixed = mixed.clone()
        for place, value in given:
            mixed[(slots == place).to(mixed.device)] += value.reshape(-1).to(mixed)
        return mixed

    def into_logits(self, value: Tensor) -> Tensor:
        """The last stream with what the logits miss."""
        reader = len(self.graph.readers) - 1
        if not self._any((reader,)):
            return value
        mixed, active, _ = self.mix(self._rows(value), (reader,))
        if len(active) == self.masks:
            return mixed.reshape(value.shape)
        out = value.clone().reshape(self.masks, self.pairs, self.width, -1)
        out[active.to(out.device)] = mixed[:, 0]
        return out.reshape(value.shape)

    # ---- what is written

    def _heads(self, layer: int, value: Tensor) -> None:
        port = self.ports.attention[layer]
        assert port is not None
        current = value.reshape(self.masks, self.pairs, *value.shape[1:])
        self._write(*self.rewired.attention_difference(layer, port, current))

    def _mlp(self, layer: int, value: Tensor) -> None:
        port = self.ports.mlp[layer]
        assert port is not None
        current = value.reshape(self.masks, self.pairs, *value.shape[1:])
        self._write(*self.rewired.mlp_difference(layer, port, current))

    def _write(self, first: int, differences: Tensor | None) -> None:
        if differences is None:
            return
        if self.differentiable:
            self.written[first] = differences
            return
        if self.buffer is None:
            self.buffer = differences.new_empty(self.masks, len(self.above), differences.shape[-1])
        place = self.above.index(first)
        self.buffer[:, place : place + differences.shape[1]] = differences


def _slots(missing: Bool[Tensor, "mask reader"]) -> Tensor:
    """[mask, slot]: which readers each mask changes, first ones first, -1 where it changes fewer than others do."""
    most = int(missing.sum(1).max())
    order = (~missing).to(torch.int8).argsort(dim=1, stable=True)[:, :most]
    return torch.where(missing.gather(1, order), order, torch.full_like(order, -1))


def _projection(
    call: _Call,
    module: nn.Module,
    inputs: Sequence[HeadInput],
    readers: Sequence[int],
    normed: Any,
    shared: dict,
    last: bool,
) -> Any:
    """A projection's forward in which each head reads its own input."""
    plain = type(module).forward
    places = {reader: place for place, reader in enumerate(readers)}

    def forward(given: Tensor) -> Tensor:
        mixed, active, slots = normed(given)
        if last:
            shared.clear()
        pieces = [piece for one in inputs for piece in _projected(mixed, slots, one, places)]
        out = plain(module, given)
        shape = out.shape
        flat = out.reshape(call.masks, call.pairs * call.width, -1)
        flat = flat.clone() if call.differentiable else flat
        tokens = torch.arange(flat.shape[1], device=flat.device)
        for masks, columns, values in pieces:
            index = (active[masks].to(flat.device)[:, None, None], tokens[None, :, None], columns[:, None, :])
            flat.index_put_(index, values.reshape(len(masks), flat.shape[1], -1))
        return flat.reshape(shape)

    return forward


def _projected(
    mixed: Tensor, slots: Tensor, one: HeadInput, places: dict[int, int]
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(active masks, columns, values) of the heads of one kind of input that any mask changes."""
    out = []
    for head, reader in enumerate(one.readers):
        place = places.get(reader)
        if place is None:
            continue
        found = torch.nonzero(slots == place)
        if not len(found):
            continue
        masks, slot = found[:, 0], found[:, 1]
        given = mixed[masks.to(mixed.device), slot.to(mixed.device)]
        values = given @ one.weights[head].to(given.dtype)
        if one.bias is not None:
            values = values + one.bias[head]
        out.append((masks, one.columns[head].to(given.device).expand(len(masks), -1), values))
    return out
