"""Interventions on features: set them to other values in the model itself, and see what comes of it.

    outcome = intervene(subject, transcoders, prompt, [Intervention(3, 7, 1024, 0.0)], mode="iterative")

An intervention adds (new value - value) x the feature's decoder to the MLP's output: the error, and all that the
transcoder misses, stays. What may react is the mode:

- "iterative": attention patterns stay as they were; norms and the model's own MLPs react. Several interventions are
  applied from the lowest layer up, each to what the feature then is.
- "free": all reacts.
- "constrained": in the layers given (all by default) MLPs write what they wrote, so only direct effects pass; over all
  layers the norms' scales are frozen too, and the change of any pre-activation is exactly what the graph's edges say.

How it can mislead: far outside its usual values a feature takes the model off its distribution; the "iterative" outcome
depends on MLPs, not on their transcoders. Source: Ameisen et al. 2025; Hanna et al. 2025 (circuit-tracer), whose
outcomes these are.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tomoscope.circuits.attribution.norms import FrozenNorm
from tomoscope.circuits.attribution.replacement import LocalReplacement
from tomoscope.errors import EditError
from tomoscope.model import Activations, Edit, add, replace
from tomoscope.model.probe import main_input, unwrap

MODES = ("iterative", "free", "constrained")


@dataclass(frozen=True)
class Intervention:
    """One feature at one place.

    Attributes:
        layer: of the feature.
        position: token position; None for all (but the zeroed ones).
        feature: its number.
        value: what it is set to.
        relative: `value` is a multiple of what it is.
    """

    layer: int
    position: int | None
    feature: int
    value: float
    relative: bool = False


@dataclass(frozen=True, eq=False)
class Outcome:
    """What came of sets of interventions.

    Attributes:
        logits: [set, position, vocab], or [set, vocab] at the last position.
        reads: by layer, [set, position, d_model] what each transcoder then reads.
        replacement: the prompt as it was.
        mode: as asked for.
    """

    logits: Tensor
    reads: dict[int, Float[Tensor, "set position d_model"]]
    replacement: LocalReplacement
    mode: str

    def preactivations(self, layer: int) -> Float[Tensor, "set position feature"]:
        """The pre-activations of a layer's features after the interventions."""
        return self.replacement.transcoders.coder(layer).preactivations(self.reads[layer])

    @property
    def last(self) -> Float[Tensor, "set vocab"]:
        """Logits at the last position."""
        return self.logits if self.logits.dim() == 2 else self.logits[:, -1]


def intervene(
    replacement: LocalReplacement,
    interventions: Sequence[Intervention] | Sequence[Sequence[Intervention]],
    *,
    mode: str = "iterative",
    layers: range | None = None,
    every_position: bool = False,
    read: Sequence[int] | None = None,
) -> Outcome:
    """Run the model with features set to other values.

    Args:
        replacement: the prompt's local replacement model.
        interventions: one set, or several that are run beside each other as rows of a batch.
        mode: "iterative", "free" or "constrained".
        layers: with "constrained", the layers whose MLPs are frozen; all by default.
        every_position: logits at every position, not only at the last.
        read: layers whose features' pre-activations are wanted; none by default.

    Raises:
        EditError: an unknown mode, or a place that is not there.
    """
    if mode not in MODES:
        raise EditError(f"mode={mode!r} is unknown.", remedy=f"It is one of {', '.join(MODES)}.")
    sets = _sets(interventions)
    _check(replacement, sets)
    return _Running(replacement, sets, mode, layers).outcome(every_position, read or ())


def _sets(interventions: Sequence[Any]) -> list[list[Intervention]]:
    if all(isinstance(one, Intervention) for one in interventions):
        return [list(interventions)]
    return [list(some) for some in interventions]


def _check(replacement: LocalReplacement, sets: Sequence[Sequence[Intervention]]) -> None:
    for one in (one for some in sets for one in some):
        if not 0 <= one.layer < replacement.n_layers:
            raise EditError(f"There is no layer {one.layer}; the model has {replacement.n_layers}.")
        if one.position is not None and not 0 <= one.position < replacement.n_positions:
            raise EditError(f"There is no position {one.position}; the prompt has {replacement.n_positions} tokens.")
        if not 0 <= one.feature < replacement.transcoders.coder(one.layer).n_features:
            raise EditError(f"There is no feature {one.feature} in layer {one.layer}.")


class _Running:
    """One call: the edits that are known so far, layer by layer."""

    def __init__(
        self, replacement: LocalReplacement, sets: list[list[Intervention]], mode: str, layers: range | None
    ) -> None:
        self.replacement, self.sets, self.mode = replacement, sets, mode
        self.subject, self.transcoders = replacement.subject, replacement.transcoders
        every = range(replacement.n_layers)
        self.frozen = () if mode != "constrained" else tuple(every if layers is None else layers)
        self.batch = self.subject.tokens([list(replacement.ids)] * len(sets))
        self.part = "resid_mid" if self.transcoders.reads == "resid_mid" else "mlp.in"
        if self.part == "resid_mid" and replacement.blocks[0].skeleton.parallel:
            self.part = "resid_pre"
        self.edits: list[Edit] = []
        self.stack = ExitStack()
        if mode != "free":
            for layer in every:
                self.edits.append(replace(f"layer.{layer}.attn.pattern", replacement.pattern(layer)[None]))
        width = replacement.tokens.shape[1]
        shape = (replacement.n_layers, len(sets), replacement.n_positions, width)
        self.added = replacement.tokens.new_zeros(shape)  # what interventions add to each MLP's output
        if self.frozen:
            names = [f"layer.{i}.{part}" for i in self.frozen for part in ("mlp.out", self.part)]
            self.clean = self.subject.read(self.subject.tokens([list(replacement.ids)]), *names, keep_device=True)

    def outcome(self, every_position: bool, read: Sequence[int]) -> Outcome:
        all_frozen = set(self.frozen) == set(range(self.replacement.n_layers))
        with frozen_norms(self.replacement) if all_frozen else ExitStack():
            for layer in range(self.replacement.n_layers):
                self._layer(layer)
            names = [f"layer.{layer}.{self.part}" for layer in read]
            if every_position or names:
                run = self.subject.run(self.batch, edits=self.edits, read=names)
                logits = run.logits if every_position else run.logits[:, -1]
                reads = {layer: self._given(layer, run.activations) for layer in read}
            else:
                logits, reads = self.subject.last_logits(self.batch, edits=self.edits), {}
        return Outcome(logits.to(self.replacement.tokens), reads, self.replacement, self.mode)

    def _layer(self, layer: int) -> None:
        """Settle what is added to a layer's MLP output, from what its features are by now."""
        mine = [(row, one) for row, some in enumerate(self.sets) for one in some if one.layer == layer]
        if mine:
            current = self._codes(layer, [one.feature for _, one in mine])
            for column, (row, one) in enumerate(mine):
                self._add(row, one, current[row, :, column])
        site = f"layer.{layer}.mlp.out"
        if layer in self.frozen:
            value = self.clean[site].to(self.added) + self.added[layer] + self._skipped(layer)
            self.edits.append(replace(site, value))
        elif bool(self.added[layer].any()):
            self.edits.append(add(site, self.added[layer]))

    def _codes(self, layer: int, features: Sequence[int]) -> Float[Tensor, "set position some"]:
        """Activations of some features: as they were if all is frozen, else as they are after the edits below."""
        coder = self.transcoders.coder(layer)
        if self.frozen:
            given = self._given(layer, self.clean if layer in self.frozen else self._now(layer, edited=False))
        else:
            given = self._given(layer, self._now(layer, edited=True))
        codes = coder.encode(given)[..., torch.tensor(features, device=given.device)]
        return codes.expand(len(self.sets), -1, -1)

    def _now(self, layer: int, *, edited: bool) -> Activations:
        batch = self.batch if edited else self.subject.tokens([list(self.replacement.ids)])
        edits = [one for one in self.edits if edited and _below(one, layer)]
        return self.subject.read(batch, f"layer.{layer}.{self.part}", edits=edits, keep_device=True)

    def _given(self, layer: int, acts: Activations) -> Float[Tensor, "set position d_model"]:
        """What a layer's transcoder reads."""
        value = acts[f"layer.{layer}.{self.part}"].to(self.replacement.tokens)
        if self.transcoders.reads == "normalized":
            norm = self.replacement.blocks[layer].skeleton.mlp_norm
            if norm is not None and not norm.weights.centred:
                return value / norm.weights.weight.to(value)
        return value

    def _add(self, row: int, one: Intervention, current: Float[Tensor, " position"]) -> None:
        places = torch.arange(self.replacement.zeroed, self.replacement.n_positions, device=current.device)
        places = places if one.position is None else torch.tensor([one.position], device=current.device)
        value = current[places] * one.value if one.relative else torch.full_like(current[places], one.value)
        feature = torch.tensor([one.feature], device=current.device)
        for to in self.transcoders.targets(one.layer):
            if self.frozen and to not in self.frozen:
                continue
            decoder = self.transcoders.decoder_rows(one.layer, feature, to, self.added)
            self.added[to, row, places] += (value - current[places])[:, None] * decoder

    def _skipped(self, layer: int) -> Tensor:
        """What a frozen MLP's skip path writes beyond what it wrote."""
        skip = self.transcoders.coder(layer).W_skip
        if skip is None:
            return torch.zeros_like(self.added[layer])
        change = self._given(layer, self._now(layer, edited=True)) - self._given(layer, self.clean)
        return change @ skip.to(change).T


def _below(edit: Edit, layer: int) -> bool:
    """Whether an edit is made before a layer's MLP reads the stream."""
    number, _, part = edit.site.removeprefix("layer.").partition(".")
    return int(number) < layer or (int(number) == layer and part.startswith("attn"))


@contextmanager
def frozen_norms(replacement: LocalReplacement) -> Generator[None]:
    """The model's norms with the scales that the prompt gave, whatever they read, for the time of the context."""
    frozen: dict[str, FrozenNorm] = {}
    for block in replacement.blocks:
        parts = block.skeleton
        for norm, value in ((parts.attention_norm, block.attention), (parts.end_norm, block.end)):
            if norm is not None and value is not None:
                frozen[norm.path] = value
    model, stack = replacement.subject.model, ExitStack()
    for path, value in frozen.items():
        stack.callback(_hold(model.get_submodule(path), value))
    for path, value in _read_norms(replacement).items():
        stack.callback(_hold(model.get_submodule(path), value))
    with stack:
        yield


def _read_norms(replacement: LocalReplacement) -> dict[str, FrozenNorm]:
    """The norms before the MLPs and the last one; scales of those that transcoders pass by are read again."""
    out: dict[str, FrozenNorm] = {}
    batch, skeletons = replacement.batch, [block.skeleton for block in replacement.blocks]
    for layer, parts in enumerate(skeletons):
        if parts.mlp_norm is None:
            continue
        stream = f"layer.{layer}.{'resid_pre' if parts.parallel else 'resid_mid'}"
        acts = replacement.subject.read(batch, stream, f"layer.{layer}.mlp.in", keep_device=True)
        given, made = (acts[name][0].to(replacement.tokens) for name in (stream, f"layer.{layer}.mlp.in"))
        out[parts.mlp_norm.path] = parts.mlp_norm.weights.at(given, made)
    final = replacement.subject.structure.taps.get("norm.final")
    if final is not None:
        out[final.path] = replacement.final
    return out


def _hold(module: nn.Module, norm: FrozenNorm) -> Any:
    """Let a norm give its frozen linear map; returns what takes the hook away."""

    def after(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        given, _ = main_input(args, kwargs)
        value, put = unwrap(output)
        if given is None or value is None:
            return None
        wide = given.to(norm.weight)
        shaped = wide - wide.mean(-1, keepdim=True) if norm.centred else wide
        # rows of a batch may be flattened into one axis; positions go round
        scale = norm.scale.repeat(wide.numel() // (wide.shape[-1] * len(norm.scale))).view(*wide.shape[:-1], 1)
        return put((shaped * norm.weight * scale + norm.bias).to(value.dtype))

    return module.register_forward_hook(after, with_kwargs=True).remove
