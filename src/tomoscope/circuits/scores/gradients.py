"""Gradients of a metric at every destination's input, kept small: those at each projection, and the norm's state.

A head's q, k and v inputs have a gradient each, d_model numbers a token, which is the projection's transpose applied to
the gradient at its output, pulled back through the norm. Only the latter is taken (one backward, no copies of the
stream) and kept:

    gradient at input n = W_n^T scaled_n  -  sum over steps of c load_n

where W_n has the norm's weight in it (and is centred where the norm is), scaled_n is the sum over steps of the
gradient at head n's output times the norm's scale, c the centred stream into the norm and load_n one number: what the
norm's own scale loses along c. So several steps of integrated gradients cost one expansion, not one each. An MLP's
input has one gradient, pulled back in closed form; the logits' is the one at the last stream.

How it can mislead: gradients are those of the run that was made (in its dtype): where attention or a norm saturates,
the product with a difference is not the effect of a patch.

Steps: hooks keep the projections' outputs and the readers' inputs in the graph; one forward, one backward with
parameters frozen; close the norms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tomoscope.circuits.metrics import Metric
from tomoscope.circuits.wiring.ending import calling_arguments, last_logits, metric_of, unembedding
from tomoscope.circuits.wiring.ports import AttentionPort, NormMap, Ports, norm_of
from tomoscope.errors import ModelError
from tomoscope.model import Batch, Subject
from tomoscope.model.bypass import bypassing
from tomoscope.model.gradients import frozen
from tomoscope.model.probe import main_input, unwrap

Push = Callable[[Tensor], Tensor]
"""What a written value [row, position, d_model] is changed to."""


@dataclass(frozen=True)
class HeadGradients:
    """Gradients at the inputs of one layer's heads, for one kind of input.

    Attributes:
        scaled: [group, pair, position, head, head_dim], at the projection's output times the norm's scale, summed over
            steps.
        load: [group, step, pair, position, head], what goes against the centred stream; None where there is no norm.
    """

    scaled: Float[Tensor, "group pair position head head_dim"]
    load: Float[Tensor, "group step pair position head"] | None


@dataclass(frozen=True)
class InputGradients:
    """Gradients at every destination's input, summed over the steps of a path; see the module's docstring.

    Attributes:
        heads: layer -> "q", "k", "v" -> gradients.
        centred: layer -> [group, step, pair, position, d_model], the centred stream into the attention's norm.
        streams: column of the graph -> [group, pair, position, d_model], of destinations that are one input.
        metric: [group, step, pair], the metric of each run.
    """

    heads: Mapping[int, Mapping[str, HeadGradients]]
    centred: Mapping[int, Float[Tensor, "group step pair position d_model"]]
    streams: Mapping[int, Float[Tensor, "group pair position d_model"]]
    metric: Float[Tensor, "group step pair"]


class Norms:
    """The maps of a model's norms by path, found once."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self._known: dict[str, NormMap] = {}

    def __getitem__(self, path: str) -> NormMap:
        if path not in self._known:
            self._known[path] = norm_of(self.subject, path)
        return self._known[path]


@dataclass(frozen=True)
class Path:
    """Which runs the gradients are taken of: groups x steps x pairs, as the rows of a batch.

    Attributes:
        groups: independent sets of gradients (1 but for paths of single sources).
        weights: [step], what each step's gradient counts.
        first: lowest block that is run.
        stream: [group x step x pair, position, d_model] into that block; None for the model's own start.
        embed: [group x step x pair, position, d_model], in place of the embedding's contribution; None for its own.
        pushes: module -> what its output (times the write's factor) is changed to.
    """

    groups: int
    weights: Float[Tensor, " step"]
    first: int = 0
    stream: Float[Tensor, "row position d_model"] | None = None
    embed: Float[Tensor, "row position d_model"] | None = None
    pushes: Mapping[str, tuple[float, Push]] = field(default_factory=dict)


def input_gradients(
    subject: Subject,
    ports: Ports,
    norms: Norms,
    batch: Batch,
    metric: Metric,
    rows: Int[Tensor, " pair"],
    path: Path,
    *,
    watch: Any = None,
) -> InputGradients:
    """One forward and one backward over all groups and steps of some pairs.

    Args:
        subject: the model.
        ports: of its graph.
        norms: the maps of its norms.
        batch: the pairs' prompts.
        metric: of the pairs.
        rows: which of the metric's pairs these are.
        path: the runs.
        watch: a context manager to enter around the forward (a `sources.Watch`).
    """
    steps, pairs = len(path.weights), len(batch)
    repeated = torch.arange(pairs).repeat(path.groups * steps)
    tiled = batch.take(repeated)
    tape = _Tape(subject, ports, len(tiled))
    with torch.enable_grad(), frozen(subject.model), unembedding(subject, metric.tokens), ExitStack() as stack:
        skipped: dict[int, Tensor | None] = dict.fromkeys(range(path.first))
        if path.stream is not None and path.first == ports.graph.n_layers:
            skipped[path.first - 1] = path.stream.detach().requires_grad_()
        stack.enter_context(bypassing(subject, skipped))
        start(subject, ports, path, stack)
        tape.attach(stack, path.first)
        if watch is not None:
            stack.enter_context(watch)
        logits = last_logits(subject.model(**calling_arguments(subject, tiled)), tiled)
        values = metric_of(metric, logits, rows[repeated])
        if not values.requires_grad:
            raise ModelError(f"The metric {metric.name!r} has no gradient.", remedy="Give one that torch can derive.")
        gradients = tape.gradients(values.sum())
    shape = (path.groups, steps, pairs)
    return _Closing(subject, ports, norms, tape, gradients, path.weights, shape).close(values.detach().reshape(shape))


def start(subject: Subject, ports: Ports, path: Path, stack: ExitStack) -> None:
    """Start the graph where the path does, and change what it changes."""
    model, blocks = subject.model, subject.structure.blocks
    if path.embed is not None and ports.embeds:
        tap, embed = subject.structure.taps["embed"], path.embed

        def replace(module: Any, args: tuple, output: Any) -> Any:
            value, put = unwrap(output)
            assert value is not None
            return put((embed / tap.factor).reshape(value.shape).to(value.dtype).requires_grad_())

        stack.callback(model.get_submodule(tap.path).register_forward_hook(replace).remove)
    stream = path.stream if ports.embeds or path.embed is None else path.embed

    def enter(module: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        value, put = main_input(args, kwargs)
        assert value is not None
        if stream is not None:
            return put(stream.reshape(value.shape).to(value.dtype).detach().requires_grad_())
        return None if value.requires_grad else put(value.detach().requires_grad_())

    if path.first < len(blocks):
        module = model.get_submodule(blocks[path.first].path)
        stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
    for place, (factor, push) in path.pushes.items():
        stack.callback(model.get_submodule(place).register_forward_hook(_pushed(factor, push)).remove)


def _pushed(factor: float, push: Push) -> Any:
    def after(module: nn.Module, args: tuple, output: Any) -> Any:
        value, put = unwrap(output)
        assert value is not None
        return put((push(value * factor) / factor).to(value.dtype))

    return after


class _Tape:
    """What one forward leaves in the graph: projections' outputs, readers' inputs, the last stream."""

    def __init__(self, subject: Subject, ports: Ports, rows: int) -> None:
        self.subject, self.ports, self.rows = subject, ports, rows
        self.tensors: dict[tuple[str, Any], Tensor] = {}  # in the graph
        self.versions: dict[tuple[str, Any], int] = {}
        self.before: dict[str, Tensor] = {}  # norm -> what went in
        self.after: dict[str, Tensor] = {}  # norm -> what came out

    def attach(self, stack: ExitStack, first: int) -> None:
        """Put the hooks in place; the stack takes them away."""
        model, blocks = self.subject.model, self.subject.structure.blocks
        for layer in range(first, len(blocks)):
            attention, mlp = self.ports.attention[layer], self.ports.mlp[layer]
            norms = {port.norm for port in (attention, mlp) if port is not None and port.norm}
            for path in norms:
                stack.callback(
                    model.get_submodule(path).register_forward_hook(self._norm(path), with_kwargs=True).remove
                )
            if attention is not None:
                self._attention(stack, attention)
            if mlp is not None:
                self._reader(stack, mlp.module, mlp.reader)

        def last(module: Any, args: tuple, output: Any) -> None:
            value = unwrap(output)[0]
            assert value is not None
            self._keep(("reader", len(self.ports.graph.readers) - 1), value)

        stack.callback(model.get_submodule(blocks[-1].path).register_forward_hook(last).remove)

    def _attention(self, stack: ExitStack, port: AttentionPort) -> None:
        if port.module:
            self._reader(stack, port.module, port.readers[0])
            return
        for path in dict.fromkeys(one.path for one in port.inputs):

            def after(module: Any, args: tuple, output: Tensor, path: str = path) -> None:
                self._keep(("projection", path), output)

            stack.callback(self.subject.model.get_submodule(path).register_forward_hook(after).remove)

    def _reader(self, stack: ExitStack, path: str, reader: int) -> None:
        def before(module: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
            value, put = main_input(args, kwargs)
            assert value is not None
            # a view of its own, so that the gradient is of this reader alone where others read the same tensor
            mine = value.view_as(value)
            self._keep(("reader", reader), mine)
            return put(mine)

        stack.callback(
            self.subject.model.get_submodule(path).register_forward_pre_hook(before, with_kwargs=True).remove
        )

    def _norm(self, path: str) -> Any:
        def after(module: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            value, made = main_input(args, kwargs)[0], unwrap(output)[0]
            assert value is not None
            assert made is not None
            self.before[path], self.after[path] = value.detach(), made.detach()

        return after

    def _keep(self, name: tuple[str, Any], value: Tensor) -> None:
        self.tensors[name] = value
        self.versions[name] = value._version

    def gradients(self, total: Tensor) -> dict[tuple[str, Any], Tensor]:
        """The gradient at everything kept: one backward."""
        for name, value in self.tensors.items():
            if value._version != self.versions[name]:
                raise ModelError(
                    f"The model changes {name[1]} in place after it is computed, so no gradient can be taken at it."
                )
        wanted = {name: value for name, value in self.tensors.items() if value.requires_grad}
        found = torch.autograd.grad(total, list(wanted.values()), allow_unused=True)
        out = {
            name: torch.zeros_like(value) if grad is None else grad
            for (name, value), grad in zip(wanted.items(), found, strict=True)
        }
        self.values = {name: value.detach() for name, value in self.tensors.items()}
        self.tensors.clear()
        return out


class _Closing:
    """Closes a tape's gradients over the norms and sums them over the steps."""

    def __init__(
        self,
        subject: Subject,
        ports: Ports,
        norms: Norms,
        tape: _Tape,
        gradients: Mapping[tuple[str, Any], Tensor],
        weights: Tensor,
        shape: tuple[int, int, int],
    ) -> None:
        self.subject, self.ports, self.norms, self.tape, self.gradients = subject, ports, norms, tape, gradients
        self.shape = shape
        self.precision = torch.float64 if subject.dtype == torch.float64 else torch.float32
        self.weights = weights.to(subject.device, self.precision)

    def close(self, metric: Tensor) -> InputGradients:
        """All destinations that were reached."""
        heads: dict[int, dict[str, HeadGradients]] = {}
        centred: dict[int, Tensor] = {}
        streams: dict[int, Tensor] = {}
        graph = self.ports.graph
        for layer in range(graph.n_layers):
            attention, mlp = self.ports.attention[layer], self.ports.mlp[layer]
            if (
                attention is not None
                and attention.inputs
                and ("projection", attention.inputs[0].path) in self.gradients
            ):
                heads[layer] = self._heads(layer, attention, centred)
            elif attention is not None and ("reader", attention.readers[0]) in self.gradients:
                streams[attention.readers[0]] = self._stream(attention.readers[0], attention.norm)
            if mlp is not None and ("reader", mlp.reader) in self.gradients:
                streams[mlp.reader] = self._stream(mlp.reader, mlp.norm)
        last = len(graph.readers) - 1
        streams[last] = self._stream(last, "")
        return InputGradients(heads, centred, streams, metric)

    def _rows(self, value: Tensor) -> Tensor:
        """[group, step, pair, position, width]."""
        groups, steps, pairs = self.shape
        return value.reshape(groups, steps, pairs, -1, value.shape[-1])

    def _scale(self, path: str) -> tuple[NormMap, Tensor, Tensor]:
        norm, given = self.norms[path], self._rows(self.tape.before[path]).to(self.precision)
        return norm, given, norm.scale(given, self._rows(self.tape.after[path]).to(self.precision))

    def _stream(self, reader: int, path: str) -> Tensor:
        gradient = self._rows(self.gradients["reader", reader]).to(self.precision)
        if path:
            norm, given, scale = self._scale(path)
            gradient = norm.pull(gradient, given, scale)
        return torch.einsum("gsptd,s->gptd", gradient, self.weights)

    def _heads(self, layer: int, port: AttentionPort, centred: dict[int, Tensor]) -> dict[str, HeadGradients]:
        norm, scale = None, None
        if port.norm:
            norm, given, scale = self._scale(port.norm)
            centred[layer] = norm.centre(given)
        out = {}
        for one in port.inputs:
            gradient = one.cut(self._rows(self.gradients["projection", one.path])).to(self.precision)
            if norm is None or scale is None:
                out[one.which] = HeadGradients(torch.einsum("gspthi,s->gpthi", gradient, self.weights), None)
                continue
            value = one.cut(self._rows(self.tape.values["projection", one.path]))
            constant = one.weights.to(self.precision).transpose(1, 2) @ norm.bias.to(self.precision)
            constant = constant if one.bias is None else constant + one.bias
            # the projection less its constant is the centred stream, scaled and weighted, through it
            along = ((value - constant) * gradient).sum(-1)
            load = along * (scale.square() * self.weights[:, None, None] / norm.weight.shape[0])[..., None]
            scaled = torch.einsum("gspthi,gspt,s->gpthi", gradient, scale, self.weights)
            out[one.which] = HeadGradients(scaled, load)
        return out


def reading_weights(
    subject: Subject, norms: Norms, port: AttentionPort, dtype: torch.dtype
) -> dict[str, Float[Tensor, "head d_model head_dim"]]:
    """Each head's projections with the norm's weight in them, and centred where the norm is."""
    out = {}
    for one in port.inputs:
        weights = one.weights.to(dtype)
        if port.norm:
            norm = norms[port.norm]
            weights = weights * norm.weight.to(dtype)[:, None]
            if norm.centred:
                weights = weights - weights.mean(1, keepdim=True)
        out[one.which] = weights
    return out
