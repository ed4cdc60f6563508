"""What every source of a graph added to the stream in a run, kept small: z for heads, outputs for MLPs, the embeddings.

A head's z (times the scale of a norm at its branch's end) is head_dim numbers a token where its contribution is
d_model, so that what is kept of a run grows with the model's sites and not with its edges; contributions are expanded
from it where they are needed.

Steps: hooks at each output projection and at each writer report z and outputs (`Watch`); `read_sources` keeps them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tomoscope.circuits.ports import AttentionPort, MLPPort, Ports
from tomoscope.errors import ModelError
from tomoscope.model import Batch, Subject
from tomoscope.model.probe import main_input, unwrap


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
            self._after(port.writer, lambda value: self.whole(layer, self._stream(value) * port.factor))
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
        self._after(port.writer, lambda value: self.mlp(layer, self._stream(value) * port.factor))

    def _after(self, path: str, report: Callable[[Tensor], None]) -> None:
        def after(module: Any, args: tuple, output: Any) -> None:
            value = unwrap(output)[0]
            assert value is not None
            report(value)

        self.stack.callback(self.subject.model.get_submodule(path).register_forward_hook(after).remove)

    def _stream(self, value: Tensor) -> Tensor:
        return value.reshape(self.rows, -1, value.shape[-1])


@dataclass(frozen=True)
class SourceRun:
    """One run as its sources, its streams and its logits.

    Attributes:
        sources: what each source added.
        streams: [pair, position, d_model] into each block, and out of the last.
        logits: [pair, vocab] at each prompt's last token.
    """

    sources: Sources
    streams: tuple[Float[Tensor, "pair position d_model"], ...]
    logits: Float[Tensor, "pair vocab"]


def calling_arguments(subject: Subject, batch: Batch) -> dict[str, Any]:
    """The arguments of a forward that keeps no cache and, where all prompts end in one column, no other logits."""
    arguments = subject.forward_arguments(batch)
    if "use_cache" in subject.accepts:
        arguments["use_cache"] = False
    if "logits_to_keep" in subject.accepts and bool((batch.last == batch.width - 1).all()):
        arguments["logits_to_keep"] = 1
    return arguments


def last_logits(output: Any, batch: Batch) -> Float[Tensor, "pair vocab"]:
    """[pair, vocab] at each prompt's last token, from what `calling_arguments` gave."""
    logits = unwrap(output)[0]
    if logits is None:
        raise ModelError("The model gave no logits.")
    if logits.dim() == 2:
        return logits
    if logits.shape[1] == 1:
        return logits[:, 0]
    rows = torch.arange(len(batch), device=logits.device)
    return logits[rows, batch.last.to(logits.device)]


def read_sources(subject: Subject, batch: Batch, ports: Ports, *, graph: bool = False) -> SourceRun:
    """Run prompts and keep what each source added, in pieces that fit memory.

    Args:
        subject: the model.
        batch: the prompts.
        ports: of its graph.
        graph: keep the autograd graph (then in one piece).
    """
    step = len(batch) if graph else min(len(batch), subject.rows_per_call(max(batch.width, 1)))
    with torch.set_grad_enabled(graph):
        parts = [_read(subject, batch.take(slice(i, i + step)), ports) for i in range(0, len(batch), max(1, step))]
    if len(parts) == 1:
        return parts[0]
    streams = tuple(torch.cat(values) for values in zip(*(part.streams for part in parts), strict=True))
    return SourceRun(cat([p.sources for p in parts]), streams, torch.cat([p.logits for p in parts]))


def _read(subject: Subject, batch: Batch, ports: Ports) -> SourceRun:
    rows, blocks = len(batch), subject.structure.blocks
    heads: dict[int, Tensor] = {}
    outs: dict[int, Tensor] = {}
    whole: dict[int, Tensor] = {}
    streams: dict[int, Tensor] = {}
    added: dict[str, Tensor] = {}
    watch = Watch(
        subject, ports, first=0, rows=rows, heads=heads.__setitem__, whole=whole.__setitem__, mlp=outs.__setitem__
    )

    def enter(layer: int) -> Any:
        def keep(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
            value = main_input(args, kwargs)[0]
            assert value is not None
            streams[layer] = value.clone()

        return keep

    def leave(module: Any, args: tuple, output: Any) -> None:
        value = unwrap(output)[0]
        assert value is not None
        streams[len(blocks)] = value.clone()

    with ExitStack() as stack:
        stack.enter_context(watch)
        for name in ("embed", "pos_embed"):
            tap = subject.structure.taps.get(name)
            if tap is not None and tap.side == "out":
                module = subject.model.get_submodule(tap.path)
                stack.callback(module.register_forward_hook(_keeper(added, name, tap.factor)).remove)
        for layer, block in enumerate(blocks):
            module = subject.model.get_submodule(block.path)
            stack.callback(module.register_forward_pre_hook(enter(layer), with_kwargs=True).remove)
        stack.callback(subject.model.get_submodule(blocks[-1].path).register_forward_hook(leave).remove)
        logits = last_logits(subject.model(**calling_arguments(subject, batch)), batch)
    whole_streams = tuple(streams[i] for i in range(len(blocks) + 1))
    embed = added["embed"] if ports.embeds and "embed" in added else whole_streams[0]
    position = None
    if any(writer.kind == "position" for writer in ports.graph.writers):
        position = added["pos_embed"].reshape(-1, *whole_streams[0].shape[1:])
        position = position.expand(rows, -1, -1)
    sources = Sources(embed.reshape(whole_streams[0].shape), position, heads, outs, whole)
    return SourceRun(sources.map(lambda value: value.clone()), whole_streams, logits)


def _keeper(into: dict[str, Tensor], name: str, factor: float) -> Any:
    def keep(module: Any, args: tuple, output: Any) -> None:
        value = unwrap(output)[0]
        assert value is not None
        into[name] = value * factor

    return keep


def moved(sources: Sources, columns: Int[Tensor, "pair position"]) -> Sources:
    """Values [1, place, ...] by a token's place, spread over the columns of a padded batch: [pair, position, ...]."""
    return sources.map(lambda value: value[0][columns.to(value.device)])


def without_position(sources: Sources) -> Sources:
    """The same with no position embedding among the sources."""
    return replace(sources, position=None)
