"""What every source of a graph added to the stream in a run, kept small: z for heads, outputs for MLPs, the embeddings.

A head's z (times the scale of a norm at its branch's end) is head_dim numbers a token where its contribution is
d_model, so that what is kept of a run grows with the model's sites and not with its edges; contributions are expanded
from it where they are needed.

Steps: hooks at each output projection and at each writer report z and outputs (`Watch`); `Collected` keeps them;
`read_sources` runs prompts so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tomoscope.circuits.wiring.ending import calling_arguments, last_logits
from tomoscope.circuits.wiring.ports import AttentionPort, MLPPort, Ports
from tomoscope.model import Batch, Subject
from tomoscope.model.probe import main_input, unwrap
from tomoscope.model.taps import Stop


@dataclass(frozen=True)
class Sources:
    """What the sources of a graph added, in factored form; the pair and position axes may have length 1 (a constant).

    Attributes:
        embed: [pair, position, d_model], the token embedding as it stands in the stream.
        position: likewise, the position embedding where the graph has it as a source.
        heads: layer -> [pair, position, head, head_dim], z times the scale of the branch's norm.
        outs: layer -> [pair, position, d_model], an MLP's write.
        whole: layer -> likewise, the write of an attention that is one node.
    """

    embed: Float[Tensor, "pair position d_model"]
    position: Float[Tensor, "pair position d_model"] | None
    heads: Mapping[int, Float[Tensor, "pair position head head_dim"]] = field(default_factory=dict)
    outs: Mapping[int, Float[Tensor, "pair position d_model"]] = field(default_factory=dict)
    whole: Mapping[int, Float[Tensor, "pair position d_model"]] = field(default_factory=dict)

    def map(self, function: Callable[[Tensor], Tensor]) -> Sources:
        """The same with a function of each tensor."""
        return Sources(
            function(self.embed),
            None if self.position is None else function(self.position),
            {layer: function(value) for layer, value in self.heads.items()},
            {layer: function(value) for layer, value in self.outs.items()},
            {layer: function(value) for layer, value in self.whole.items()},
        )

    def zip(self, other: Sources, function: Callable[[Tensor, Tensor], Tensor]) -> Sources:
        """A function of each tensor and the other's."""
        position = None
        if self.position is not None and other.position is not None:
            position = function(self.position, other.position)
        return Sources(
            function(self.embed, other.embed),
            position,
            {layer: function(value, other.heads[layer]) for layer, value in self.heads.items()},
            {layer: function(value, other.outs[layer]) for layer, value in self.outs.items()},
            {layer: function(value, other.whole[layer]) for layer, value in self.whole.items()},
        )

    def take(self, rows: slice | Int[Tensor, " row"]) -> Sources:
        """Some pairs; constants are the same for all."""
        return self.map(lambda value: value if len(value) == 1 else value[rows])

    def tensors(self) -> list[Tensor]:
        """All of them, in the order of the graph's rows by layer."""
        out: list[Tensor] = []
        self.map(lambda value: (out.append(value), value)[1])
        return out


def cat(parts: Sequence[Sources]) -> Sources:
    """Sources of consecutive rows, put together."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]

    def joined(kind: str) -> dict[int, Tensor]:
        return {layer: torch.cat([getattr(part, kind)[layer] for part in parts]) for layer in getattr(first, kind)}

    position = None if first.position is None else torch.cat([p.position for p in parts if p.position is not None])
    embed = torch.cat([part.embed for part in parts])
    return Sources(embed, position, joined("heads"), joined("outs"), joined("whole"))


class Watch:
    """Hooks that report what is written to the stream while the model runs; a context manager.

    Args:
        subject: the model.
        ports: of its graph.
        first: lowest layer to watch.
        rows: rows of the batch, to unflatten what a family flattens.
        heads: called with (layer, z [row, position, head, head_dim]) once the layer's heads are known.
        whole: called with (layer, write [row, position, d_model]) of an attention that is one node.
        mlp: likewise for an MLP.
    """

    def __init__(
        self,
        subject: Subject,
        ports: Ports,
        *,
        first: int,
        rows: int,
        heads: Callable[[int, Tensor], None],
        whole: Callable[[int, Tensor], None],
        mlp: Callable[[int, Tensor], None],
    ) -> None:
        self.subject, self.ports, self.first, self.rows = subject, ports, first, rows
        self.heads, self.whole, self.mlp = heads, whole, mlp

    def __enter__(self) -> Watch:
        self.stack = ExitStack()
        try:
            for layer in range(self.first, self.ports.graph.n_layers):
                attention, mlp = self.ports.attention[layer], self.ports.mlp[layer]
                if attention is not None:
                    self._attention(layer, attention)
                if mlp is not None:
                    self._mlp(layer, mlp)
        except BaseException:
            self.stack.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.stack.close()

    def _attention(self, layer: int, port: AttentionPort) -> None:
        if not port.projection:
            self._report(port.writer, lambda value: self.whole(layer, self._stream(value) * port.factor))
            return
        seen: dict[str, Tensor] = {}
        n_heads = len(port.writers)

        def before(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
            z = main_input(args, kwargs)[0]
            assert z is not None
            z = z.reshape(self.rows, -1, n_heads, z.shape[-1] // n_heads if z.dim() < 4 else z.shape[-1])
            if port.branch is None:
                self.heads(layer, z)
            else:
                seen["z"] = z

        module = self.subject.model.get_submodule(port.projection)
        self.stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
        branch = port.branch
        if branch is not None:

            def after(module: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
                y, out = main_input(args, kwargs)[0], unwrap(output)[0]
                assert y is not None
                assert out is not None
                scale = branch.scale(self._stream(y), self._stream(out))
                z = seen.pop("z")
                self.heads(layer, (z * scale[..., None, None]).to(z.dtype))

            norm = self.subject.model.get_submodule(branch.path)
            self.stack.callback(norm.register_forward_hook(after, with_kwargs=True).remove)

    def _mlp(self, layer: int, port: MLPPort) -> None:
        self._report(port.writer, lambda value: self.mlp(layer, self._stream(value) * port.factor))

    def _report(self, path: str, report: Callable[[Tensor], None]) -> None:
        self.stack.callback(self.subject.model.get_submodule(path).register_forward_hook(_after(report)).remove)

    def _stream(self, value: Tensor) -> Tensor:
        return value.reshape(self.rows, -1, value.shape[-1])


class Collected:
    """Collects what every source adds while the model runs; a context manager around the call.

    Args:
        subject: the model.
        ports: of its graph.
        rows: rows of the batch.
        middles: also keep the stream that each MLP reads.
        writes: also keep what each attention writes as a whole.
        stop: leave the model after its last block.
    """

    def __init__(
        self,
        subject: Subject,
        ports: Ports,
        rows: int,
        *,
        middles: bool = False,
        writes: bool = False,
        stop: bool = False,
    ) -> None:
        self.subject, self.ports, self.rows, self.stop = subject, ports, rows, stop
        self.wants_middles, self.wants_writes = middles, writes
        self.heads: dict[int, Tensor] = {}
        self.outs: dict[int, Tensor] = {}
        self.whole: dict[int, Tensor] = {}
        self.added: dict[str, Tensor] = {}
        self.streams: dict[int, Tensor] = {}
        self.middles: dict[int, Tensor] = {}
        self.writes: dict[int, Tensor] = {}

    def __enter__(self) -> Collected:
        subject, ports, self.stack = self.subject, self.ports, ExitStack()
        model, blocks = subject.model, subject.structure.blocks
        try:
            for name in ("embed", "pos_embed"):
                tap = subject.structure.taps.get(name)
                if tap is not None and tap.side == "out":
                    hook = _after(lambda value, name=name, tap=tap: self._keep(self.added, name, value * tap.factor))
                    self.stack.callback(model.get_submodule(tap.path).register_forward_hook(hook).remove)
            for layer, block in enumerate(blocks):
                self._before(block.path, self.streams, layer)
                attention, mlp = ports.attention[layer], ports.mlp[layer]
                if self.wants_writes and attention is not None:
                    self._write(layer, attention)
                if self.wants_middles and mlp is not None:
                    self._before(mlp.norm or mlp.module, self.middles, layer)
            end = _after(self._end)
            self.stack.callback(model.get_submodule(blocks[-1].path).register_forward_hook(end).remove)
            self.stack.enter_context(
                Watch(
                    subject,
                    ports,
                    first=0,
                    rows=self.rows,
                    heads=lambda layer, value: self._keep(self.heads, layer, value),
                    whole=lambda layer, value: self._keep(self.whole, layer, value),
                    mlp=lambda layer, value: self._keep(self.outs, layer, value),
                )
            )
        except BaseException:
            self.stack.close()
            raise
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
        self.stack.close()
        return kind is Stop

    def _end(self, value: Tensor) -> None:
        self._keep(self.streams, self.ports.graph.n_layers, value)
        if self.stop:
            raise Stop

    def _before(self, path: str, into: dict[int, Tensor], layer: int) -> None:
        def before(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
            value = main_input(args, kwargs)[0]
            assert value is not None
            self._keep(into, layer, value.reshape(self.rows, -1, value.shape[-1]))

        module = self.subject.model.get_submodule(path)
        self.stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)

    def _write(self, layer: int, port: AttentionPort) -> None:
        def after(value: Tensor) -> None:
            self._keep(self.writes, layer, value.reshape(self.rows, -1, value.shape[-1]) * port.factor)

        module = self.subject.model.get_submodule(port.writer)
        self.stack.callback(module.register_forward_hook(_after(after)).remove)

    def _keep(self, into: dict[Any, Tensor], name: Any, value: Tensor) -> None:
        # a clone, since a family may go on to change the tensor in place
        into[name] = value.detach().clone()

    def sources(self) -> Sources:
        """What was collected."""
        start = self.streams[0]
        embed = self.added["embed"] if self.ports.embeds and "embed" in self.added else start
        position = None
        if any(writer.kind == "position" for writer in self.ports.graph.writers):
            position = self.added["pos_embed"].reshape(-1, *start.shape[1:]).expand(self.rows, -1, -1)
        return Sources(embed.reshape(start.shape), position, self.heads, self.outs, self.whole)


def _after(report: Callable[[Tensor], None]) -> Any:
    def after(module: Any, args: tuple, output: Any) -> None:
        value = unwrap(output)[0]
        assert value is not None
        report(value)

    return after


@dataclass(frozen=True)
class SourceRun:
    """One run as its sources, its streams and its logits.

    Attributes:
        sources: what each source added.
        streams: [pair, position, d_model] into each block, and out of the last.
        logits: [pair, vocab] at each prompt's last token; empty where they were not asked for.
        middles: layer -> the stream that its MLP reads, where asked for.
        writes: layer -> what its attention added as a whole, where asked for.
    """

    sources: Sources
    streams: tuple[Float[Tensor, "pair position d_model"], ...]
    logits: Float[Tensor, "pair vocab"]
    middles: Mapping[int, Float[Tensor, "pair position d_model"]] = field(default_factory=dict)
    writes: Mapping[int, Float[Tensor, "pair position d_model"]] = field(default_factory=dict)


@torch.no_grad()
def read_sources(
    subject: Subject,
    batch: Batch,
    ports: Ports,
    *,
    middles: bool = False,
    writes: bool = False,
    logits: bool = True,
) -> SourceRun:
    """Run prompts and keep what each source added, in pieces that fit memory.

    Args:
        subject: the model.
        batch: the prompts.
        ports: of its graph.
        middles: also keep the stream that each MLP reads.
        writes: also keep what each attention writes as a whole.
        logits: of all tokens; without them the model is left after its last block.
    """
    step = max(1, min(len(batch), subject.rows_per_call(max(batch.width, 1))))
    parts = [
        _read(subject, batch.take(slice(i, i + step)), ports, middles, writes, logits)
        for i in range(0, len(batch), step)
    ]
    if len(parts) == 1:
        return parts[0]
    streams = tuple(torch.cat(values) for values in zip(*(part.streams for part in parts), strict=True))
    between = {layer: torch.cat([part.middles[layer] for part in parts]) for layer in parts[0].middles}
    wrote = {layer: torch.cat([part.writes[layer] for part in parts]) for layer in parts[0].writes}
    ends = torch.cat([part.logits for part in parts]) if logits else parts[0].logits
    return SourceRun(cat([part.sources for part in parts]), streams, ends, between, wrote)


def _read(subject: Subject, batch: Batch, ports: Ports, middles: bool, writes: bool, wanted: bool) -> SourceRun:
    logits = torch.zeros(0, 0)
    with Collected(subject, ports, len(batch), middles=middles, writes=writes, stop=not wanted) as collected:
        logits = last_logits(subject.model(**calling_arguments(subject, batch)), batch)
    streams = tuple(collected.streams[i] for i in range(ports.graph.n_layers + 1))
    return SourceRun(collected.sources(), streams, logits, collected.middles, collected.writes)


def moved(sources: Sources, columns: Int[Tensor, "pair position"]) -> Sources:
    """Values [1, place, ...] by a token's place, spread over the columns of a padded batch: [pair, position, ...]."""
    return sources.map(lambda value: value[0][columns.to(value.device)])
