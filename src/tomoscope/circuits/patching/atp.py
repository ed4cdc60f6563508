"""AtP*: attribution patching of heads' queries, keys, values and outputs and of MLPs, its two known failures mended.

    grid = atp_star(subject, pairs)          grid.values [node, position, pair]
    grid.top(20)                             nodes by mean size

Plain attribution patching estimates the effect of patching an activation by difference . gradient. It fails where
attention saturates: the gradient through a softmax near 0 or 1 vanishes though a patch of the query or key moves it.
*QK fix*: keep the gradient at the attention weights and take the softmax's exact change. A query's new weights are its
row computed again; a key changes one score a query, so with a the old weights, D the change of that score and
w = a (e^D - 1), the row becomes a / (1 + w), and a e^D / (1 + w) at the key. It also fails where two paths cancel:
*GradDrop* takes the gradient with each layer's contribution left out in turn and averages the sizes.

How it can mislead: the fix is exact for the attention weights, still linear after them; with GradDrop a value is a size
without a sign; what a patch does through other heads' later softmaxes stays linear. `verify` runs some patches.

Steps: one forward with every node in the graph, one backward; the weights under patched queries and keys from reads
that stop at the layer; effects; for GradDrop one more backward from below each layer, in which it adds nothing.

Source: Kramár, Lieberum, Shah & Nanda 2024 (arXiv:2403.00745).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tomoscope.circuits.metrics import Metric
from tomoscope.circuits.patching.activation import Pairs, columns_for, encode_pairs
from tomoscope.errors import DataError, ModelError, UnavailableSiteError
from tomoscope.model import Batch, Site, Subject, replace
from tomoscope.model.gradients import _entries, _start_graph, frozen
from tomoscope.model.probe import unwrap
from tomoscope.model.taps import Session

PARTS = ("attn.q", "attn.k", "attn.v", "attn.z", "mlp.out")
"""The activations that are nodes."""


@dataclass(frozen=True, eq=False)
class NodeGrid:
    """Estimated effects of patching each node at each position alone.

    Attributes:
        values: [node, position, pair], the metric that is lost (clean less patched); a size where GradDrop was used.
        nodes: names: "a1.h0.q", "a1.kv0.k", "a1.h0" (its output), "m1".
        sites: each node's site with its head, as `Subject.run` takes it.
        positions: what the position axis holds.
        metric: the metric's name.
        clean: [pair] metric of the clean run.
        qk_fix: whether queries and keys have the exact change of the softmax.
        grad_drop: whether values are means of sizes over dropped layers.
    """

    values: Float[Tensor, "node position pair"]
    nodes: tuple[str, ...]
    sites: tuple[str, ...]
    positions: tuple[str, ...]
    metric: str
    clean: Float[Tensor, " pair"]
    qk_fix: bool
    grad_drop: bool

    @property
    def scores(self) -> Float[Tensor, "node position"]:
        """Mean over pairs of the size."""
        return self.values.abs().mean(-1)

    def top(self, n: int) -> list[tuple[str, str, float]]:
        """(node, position, score) of the n largest."""
        flat = self.scores.flatten()
        order = flat.argsort(descending=True, stable=True)[:n].tolist()
        width = len(self.positions)
        return [(self.nodes[i // width], self.positions[i % width], float(flat[i])) for i in order]


def atp_star(
    subject: Subject,
    pairs: Any,
    *,
    metric: Metric | None = None,
    positions: Sequence[int | str] | None = None,
    qk_fix: bool = True,
    grad_drop: bool = True,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> NodeGrid:
    """Estimate the effect of putting the corrupted prompt's value at each node and position of the clean run.

    Args:
        subject: a model whose attention can be watched (queries, keys, values, weights).
        pairs: a `data.PairSet`, or `Pairs`; streamed through in batches that fit memory.
        metric: of the pairs, derivable by torch; their logit difference by default.
        positions: see `Batch.columns`; all by default, where all pairs have one length.
        qk_fix: take the softmax's exact change for queries and keys.
        grad_drop: average sizes over dropped layers.
        batch_size: pairs a batch.
        progress: called with pairs done and in all.

    Raises:
        UnavailableSiteError: the model can't give its queries, keys, values or weights.
        AlignmentError: positions that do not line up.
    """
    made = pairs if isinstance(pairs, Pairs) else encode_pairs(subject, pairs)
    metric = metric or made.metric()
    columns, names = columns_for(made, positions)
    layers = range(subject.facts.n_layers)
    known = subject.sites()
    for part in (*PARTS, "attn.pattern", "attn.scores"):
        lacking = [layer for layer in layers if not known[f"layer.{layer}.{part}"].available]
        if lacking:
            site = f"layer.{lacking[0]}.{part}"
            raise UnavailableSiteError(f"{site} can't be given, which AtP* needs: {known[site].reason}.")
    kept = [Site(part, layer) for layer in layers for part in (*PARTS, "attn.pattern")]
    fit = subject.rows_per_call(max(made.clean.width, 1), kept, gradients=True)
    values, clean = [], []
    for start in range(0, len(made), batch_size or fit):
        rows = slice(start, start + (batch_size or fit))
        run = _Run(subject, made.clean.take(rows), made.corrupted.take(rows), metric, qk_fix)
        found = run.dropped() if grad_drop else run.effects(run.plain)
        values.append(torch.stack([_at(value, columns[rows]) for value in found.values()]))
        nodes = tuple(found)
        clean.append(run.metric)
        if progress is not None:
            progress(min(start + (batch_size or fit), len(made)), len(made))
    sites = tuple(_site(node) for node in nodes)
    return NodeGrid(torch.cat(values, -1), nodes, sites, names, metric.name, torch.cat(clean), qk_fix, grad_drop)


def _at(value: Float[Tensor, "pair position"], columns: Tensor) -> Float[Tensor, "position pair"]:
    return value.cpu().double().gather(1, columns).T


def _site(node: str) -> str:
    """The site of a node's name."""
    place, _, part = node.partition(".")
    if node.startswith("m"):
        return f"layer.{node[1:]}.mlp.out"
    unit, _, which = part.partition(".")
    return f"layer.{place[1:]}.attn.{which or 'z'}[head={unit.lstrip('hkv')}]"


class _Run:
    """One batch: its graph, its gradients, and what queries and keys of the corrupted prompts make of the weights."""

    def __init__(self, subject: Subject, clean: Batch, corrupted: Batch, metric: Metric, qk_fix: bool) -> None:
        self.subject, self.batch, self.qk_fix = subject, clean, qk_fix
        self.n_layers = subject.facts.n_layers
        parts = [Site(part, layer) for layer in range(self.n_layers) for part in (*PARTS, "attn.pattern")]
        streams = [Site("resid_pre", layer) for layer in range(self.n_layers)]
        streams.append(Site("resid_post", self.n_layers - 1))
        self._forward(parts, streams, metric)
        other = subject.read(corrupted, *(s for s in parts if s.part != "attn.pattern"), keep_device=True)
        self.change = {site: other[site.name] - self.values[site] for site in parts if site.name in list(other)}
        self.patched = {layer: self._patched(layer, other) for layer in range(self.n_layers)} if qk_fix else {}

    def _forward(self, parts: Sequence[Site], streams: Sequence[Site], metric: Metric) -> None:
        subject = self.subject
        session = Session(
            subject.model, subject.structure, reads=[*parts, *streams], batch_size=len(self.batch), graph=True
        )
        with torch.enable_grad(), frozen(subject.model), ExitStack() as stack:
            for module in _entries(subject):
                stack.callback(module.register_forward_hook(_start_graph).remove)
            stack.enter_context(session)
            logits = unwrap(subject.model(**subject.forward_arguments(self.batch)))[0]
            if logits is None:
                raise ModelError("The model gave no logits to take a metric of.")
            last = logits[torch.arange(len(self.batch)), self.batch.last.to(logits.device)]
            last = last if metric.tokens is None else last[:, metric.tokens.to(last.device)]
            number = metric(last, self.batch.indices)
            self.tensors = {site: session.values[site] for site in parts}
            self.streams = [session.values[site] for site in streams]
            wanted = [*self.tensors.values(), *self.streams]
            found = torch.autograd.grad(number.sum(), wanted, retain_graph=True, allow_unused=True)
        self.metric = number.detach().cpu()
        factors = {site: session.tap(site).factor for site in self.tensors}
        self.shapes = session
        self.factors = factors
        filled = [torch.zeros_like(v) if g is None else g for v, g in zip(wanted, found, strict=True)]
        self.plain = dict(zip(self.tensors, filled[: len(self.tensors)], strict=True))
        self.at_streams = filled[len(self.tensors) :]
        self.values = {
            site: session._shaped(site, value.detach()) * factors[site] for site, value in self.tensors.items()
        }

    def _patched(self, layer: int, other: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Weights under the corrupted queries; and each corrupted key's term over the sum of the clean row's terms."""
        q, k = f"layer.{layer}.attn.q", f"layer.{layer}.attn.k"
        pattern, scores = f"layer.{layer}.attn.pattern", f"layer.{layer}.attn.scores"
        read = self.subject.read
        rows = read(self.batch, pattern, edits=[replace(q, other[q])], keep_device=True)[pattern].double()
        new = read(self.batch, pattern, scores, edits=[replace(k, other[k])], keep_device=True)
        weights = self.values[Site("attn.pattern", layer)].double()
        module = self.subject.model.get_submodule(self.subject.structure.blocks[layer].attention)
        if getattr(module, "sinks", None) is not None:
            return rows, terms_beside_a_sink(weights, new[pattern].double())
        own = read(self.batch, scores, keep_device=True)[scores].double()
        return rows, terms(weights, own, new[scores].double())

    # ---- effects

    def effects(self, gradients: Mapping[Site, Tensor]) -> dict[str, Float[Tensor, "pair position"]]:
        """Node -> what patching it does to the metric by these gradients (patched less clean, negated); nodes of
        missing gradients are left out.
        """
        out: dict[str, Tensor] = {}
        for layer in range(self.n_layers):
            weights = Site("attn.pattern", layer)
            for part in PARTS:
                site = Site(part, layer)
                fixed = self.qk_fix and part in ("attn.q", "attn.k")
                gradient = gradients.get(weights if fixed else site)
                if gradient is None:
                    continue
                shaped = self.shapes._shaped(weights if fixed else site, gradient)
                if fixed:
                    effect = self._fixed(layer, part, shaped.double())
                else:
                    effect = (self.change[site].double() * shaped.double() / self.factors[site]).sum(-1)
                for name, value in _named(layer, part, effect, self.subject.facts.n_heads):
                    out[name] = -value
        return out

    def _fixed(self, layer: int, part: str, gradient: Float[Tensor, "pair head query key"]) -> Tensor:
        """[pair, position, head], the effect through the exact change of the attention weights."""
        weights = self.values[Site("attn.pattern", layer)].double()
        rows, entries = self.patched[layer]
        if part == "attn.q":
            return ((rows - weights) * gradient).sum(-1).transpose(1, 2)
        effect = key_effects(weights, entries, gradient).transpose(1, 2)
        shared = effect.shape[2] // self.change[Site("attn.k", layer)].shape[2]
        return effect.unflatten(2, (-1, shared)).sum(3) if shared > 1 else effect

    def dropped(self) -> dict[str, Float[Tensor, "pair position"]]:
        """The mean size over dropped layers; what is above a dropped layer, or without one, has the plain gradient."""
        plain = {name: value.abs() for name, value in self.effects(self.plain).items()}
        if self.n_layers < 2:
            return plain
        total = dict.fromkeys(plain, torch.zeros(()))
        for layer in range(self.n_layers):
            below = [site for site in self.tensors if site.layer is not None and site.layer < layer]
            under: dict[str, Tensor] = {}
            if below:
                # without the layer's own contribution the gradient goes straight from its output to its input
                found = torch.autograd.grad(
                    self.streams[layer],
                    [self.tensors[site] for site in below],
                    self.at_streams[layer + 1],
                    retain_graph=True,
                    allow_unused=True,
                )
                zeros = [
                    torch.zeros_like(self.tensors[s]) if g is None else g for s, g in zip(below, found, strict=True)
                ]
                under = self.effects(dict(zip(below, zeros, strict=True)))
            for name, value in plain.items():
                own = int(name[1:].partition(".")[0])
                if own != layer:
                    total[name] = total[name] + (under[name].abs() if own < layer else value)
        return {name: value / (self.n_layers - 1) for name, value in total.items()}


def terms(
    weights: Float[Tensor, "pair head query key"],
    scores: Float[Tensor, "pair head query key"],
    patched: Float[Tensor, "pair head query key"],
) -> Float[Tensor, "pair head query key"]:
    """What a key's term of the softmax becomes, over the sum of the row's old terms.

    Args:
        weights: of attention; rows sum to 1.
        scores: before the softmax.
        patched: the same with every key replaced; a column is what its key alone makes.
    """
    largest = weights.argmax(-1, keepdim=True)
    level = scores.gather(-1, largest) - weights.gather(-1, largest).clamp(min=1e-300).log()
    return (patched - level).clamp(max=600).exp()


def terms_beside_a_sink(
    weights: Float[Tensor, "pair head query key"], patched: Float[Tensor, "pair head query key"]
) -> Float[Tensor, "pair head query key"]:
    """`terms` where a learned sink takes the rest of each row: its own term does not change, so its share measures the
    sums (scores may have been shifted by each row's largest, so they can't be compared).

    Args:
        weights: of attention.
        patched: with every key replaced.
    """
    rest, after = (1 - value.sum(-1, keepdim=True) for value in (weights, patched))
    return patched * rest.clamp(min=1e-12) / after.clamp(min=1e-12)


def key_effects(
    weights: Float[Tensor, "pair head query key"],
    entries: Float[Tensor, "pair head query key"],
    gradient: Float[Tensor, "pair head query key"],
) -> Float[Tensor, "pair head key"]:
    """What patching each key alone does, given the gradient at the attention weights: the softmax's exact change.

    Args:
        weights: of attention; rows sum to 1, or less where a sink takes the rest.
        entries: each key's new term over the sum of the old ones (`terms`).
        gradient: of the metric at the weights.
    """
    rest = 1 / (1 - weights + entries).clamp(min=1e-300)  # old sum over new sum
    new = entries * rest
    along = (weights * gradient).sum(-1, keepdim=True) - weights * gradient
    return ((rest - 1) * along + (new - weights) * gradient).nan_to_num().sum(-2)


def _named(layer: int, part: str, effect: Tensor, n_heads: int) -> list[tuple[str, Tensor]]:
    """(name, [pair, position]) of a part's nodes."""
    if part == "mlp.out":
        return [(f"m{layer}", effect)]
    heads = effect.shape[2]
    which = "" if part == "attn.z" else f".{part[-1]}"
    stem = "h" if heads == n_heads else "kv"
    return [(f"a{layer}.{stem}{head}{which}", effect[:, :, head]) for head in range(heads)]


@dataclass(frozen=True)
class Verified:
    """Exact effects of some nodes beside their estimates.

    Attributes:
        places: (node, position).
        exact: [place], mean over pairs of the size of the effect of the patch.
        estimated: [place].
        missed: of the places drawn at random, the share whose exact effect exceeds the smallest of the top's.
        bound: upper end of the 95 % Clopper-Pearson interval of that share.
    """

    places: tuple[tuple[str, str], ...]
    exact: Float[Tensor, " place"]
    estimated: Float[Tensor, " place"]
    missed: float
    bound: float


def verify(
    subject: Subject, pairs: Any, grid: NodeGrid, *, top: int = 20, sampled: int = 50, seed: int = 0
) -> Verified:
    """Patch the top nodes and a random sample of the rest exactly: what share of the rest did the estimate miss?

    Args:
        subject: the model.
        pairs: those of the grid.
        grid: of `atp_star`.
        top: largest places to patch.
        sampled: places drawn at random from the others.
        seed: of the draw.
    """
    from scipy.stats import beta

    made = pairs if isinstance(pairs, Pairs) else encode_pairs(subject, pairs)
    if len(made) != grid.values.shape[2]:
        raise DataError(f"The grid is of {grid.values.shape[2]} pairs, not {len(made)}.")
    metric, flat = made.metric(), grid.scores.flatten()
    order, width = flat.argsort(descending=True, stable=True), len(grid.positions)
    rest = order[top:]
    drawn = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))[:sampled]]
    places = torch.cat([order[:top], drawn]).tolist()
    other = {
        site: subject.read(made.corrupted, site)[site] for site in {grid.sites[place // width] for place in places}
    }
    columns, _ = columns_for(made, _positions(grid.positions))
    stack = []
    for place in places:
        site, column = grid.sites[place // width], columns[:, place % width]
        value = other[site][torch.arange(len(made)), column]
        stack.append([replace(site, value[:, None], at=_positions(grid.positions)[place % width : place % width + 1])])
    logits = subject.run_stack(made.clean, stack)
    rows = torch.arange(len(made))
    wanted = logits if metric.tokens is None else logits[..., metric.tokens.to(logits.device)]
    exact = torch.stack([(grid.clean - metric(one, rows).cpu()).abs().mean().double() for one in wanted])
    found = int((exact[top:] > exact[:top].min()).sum()) if len(drawn) else 0
    bound = float(beta.ppf(0.95, found + 1, len(drawn) - found)) if found < len(drawn) else 1.0
    names = tuple((grid.nodes[place // width], grid.positions[place % width]) for place in places)
    return Verified(names, exact, flat[places], found / max(1, len(drawn)), bound)


def _positions(names: Sequence[str]) -> list[int | str]:
    return [int(name) if name.lstrip("-").isdigit() else name for name in names]
