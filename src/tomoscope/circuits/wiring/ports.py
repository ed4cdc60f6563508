"""Where each source of a graph is written, and each destination reads: modules, norms and slices of projections.

A destination of attention reads the stream through the block's own norm (where it has one) and its own columns of a
projection; an MLP reads it through a norm of its own, or the shared one of a parallel block. A head writes its z times
its rows of the output projection, and where a norm stands at the branch's end (Gemma 2, OLMo 2) times that norm's
weight and the scale it used: z times the scale is kept, so that a head's contribution stays a linear map of it and the
heads still sum to the branch's write. All of it is found from one forward of a few tokens, not from a family's name.

How it can mislead: with a norm at the branch's end a head's contribution depends on the other heads through the scale,
which is taken as it was in the run that is measured.

Steps: run a few tokens with every module watched; find the norm before each reader; find each head's columns; find what
stands between the heads and the stream, and check that they sum to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tomoscope.circuits.graph import INPUTS, Graph
from tomoscope.errors import SiteError
from tomoscope.model import Subject, Weights, families
from tomoscope.model.probe import Call, Recording, record
from tomoscope.model.residual import close, is_norm
from tomoscope.model.structure import Block
from tomoscope.model.weights import _cut, _is_linear, _named_linear

PROBE_TOKENS = 5


@dataclass(frozen=True)
class NormMap:
    """A norm as a linear map with a scale a token: out = scale x weight x (y or y - mean) + bias.

    Attributes:
        path: the module.
        weight: [d_model].
        bias: [d_model].
        centred: whether the mean is removed (layer norm).
    """

    path: str
    weight: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"]
    centred: bool

    def scale(self, y: Float[Tensor, "*rows d_model"], out: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows"]:
        """The scale that was used, from what went in and what came out."""
        shaped = self.apply(y.float() if y.dtype != torch.float64 else y)
        return ((out - self.bias) * shaped).sum(-1) / shaped.square().sum(-1).clamp(min=1e-30)

    def centre(self, y: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        """The vector without its mean, where the norm removes it."""
        return y - y.mean(-1, keepdim=True) if self.centred else y

    def apply(self, y: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        """The map at scale one, without its bias."""
        return self.centre(y) * self.weight

    def pull(
        self,
        gradient: Float[Tensor, "*rows d_model"],
        y: Float[Tensor, "*rows d_model"],
        scale: Float[Tensor, "*rows"],
    ) -> Float[Tensor, "*rows d_model"]:
        """The gradient at what went in, from the one at what came out: the scale's own dependence is in it.

        With c = centred y and scale = 1 / sqrt(mean(c^2) + epsilon), the derivative of the scale is -scale^3 c / d.
        """
        centred, pulled = self.centre(y), gradient * self.weight * scale[..., None]
        along = (centred * pulled).sum(-1, keepdim=True) * scale[..., None] ** 2 / y.shape[-1]
        return self.centre(pulled - centred * along)


@dataclass(frozen=True)
class HeadInput:
    """The inputs of one kind ("q", "k" or "v") of a layer's heads.

    Attributes:
        which: "q", "k" or "v".
        path: the projection, which may be shared with other kinds.
        weights: [head, d_model, head_dim], views of the model's own.
        bias: [head, head_dim], or None.
        columns: [head, head_dim], where each head's numbers stand in the projection's output.
        readers: their columns in the graph.
    """

    which: str
    path: str
    weights: Float[Tensor, "head d_model head_dim"]
    bias: Float[Tensor, "head head_dim"] | None
    columns: Int[Tensor, "head head_dim"]
    readers: tuple[int, ...]

    def cut(self, value: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows head head_dim"]:
        """These heads' numbers of the projection's output; a view where they stand in one run."""
        flat = self.columns.flatten()
        first = int(flat[0])
        run = int(flat[-1]) - first + 1 == len(flat) and bool((flat.diff() == 1).all())
        picked = value[..., first : first + len(flat)] if run else value[..., flat]
        return picked.unflatten(-1, tuple(self.columns.shape))


@dataclass(frozen=True)
class AttentionPort:
    """A layer's attention.

    Attributes:
        inputs: of its heads; empty where attention is one node.
        module: what takes the stream in where attention is one node, else "".
        norm: the norm between the stream and the readers, or "".
        projection: the output projection, or "" where attention is one node.
        writer: the module whose output is added to the stream.
        factor: times this.
        branch: the norm at the branch's end, or None.
        readers: all the columns of the graph that are this layer's attention's.
        writers: its rows.
    """

    inputs: tuple[HeadInput, ...]
    module: str
    norm: str
    projection: str
    writer: str
    factor: float
    branch: NormMap | None
    readers: tuple[int, ...]
    writers: tuple[int, ...]

    def contributions(
        self, maps: Float[Tensor, "head head_dim d_model"], z: Float[Tensor, "mask pair position head head_dim"]
    ) -> Float[Tensor, "mask head pair position d_model"]:
        """What heads add to the stream, given z (times the branch norm's scale)."""
        out = torch.einsum("mxphi,hio->mhxpo", z, maps.to(z.dtype))
        if self.branch is not None:
            out = self.branch.apply(out).to(z.dtype)
        return out * self.factor if self.factor != 1.0 else out


@dataclass(frozen=True)
class MLPPort:
    """A layer's MLP: `module`'s input is norm(stream), `writer`'s output times `factor` is added to the stream."""

    module: str
    norm: str
    writer: str
    factor: float
    reader: int
    row: int


@dataclass(frozen=True)
class Ports:
    """All of a model's ports; see the module's docstring.

    Attributes:
        graph: whose rows and columns the ports number.
        attention: layer -> its port, or None where the layer has none.
        mlp: likewise.
        embeds: the stream starts as a sum of embeddings (else the whole start counts as "embed").
    """

    graph: Graph
    attention: tuple[AttentionPort | None, ...]
    mlp: tuple[MLPPort | None, ...]
    embeds: bool

    @classmethod
    def of(cls, subject: Subject, graph: Graph | None = None) -> Ports:
        """Find a model's ports.

        Raises:
            SiteError: the model has no graph, or something else than a norm stands between the stream and a reader.
        """
        found = _KNOWN.get(subject)
        if found is None:
            found = _KNOWN[subject] = _find(subject, graph or Graph.of(subject))
        graph, weights = graph or found.graph, Weights(subject)
        weights._layouts = dict(found.layouts)
        layers = range(graph.n_layers)
        return cls(
            graph,
            tuple(_attention(subject, weights, graph, found, layer) for layer in layers),
            tuple(_mlp(subject, graph, found, layer) for layer in layers),
            subject.structure.embed_adds,
        )

    def maps(self, subject: Subject, layer: int) -> Float[Tensor, "head head_dim d_model"]:
        """A layer's output projection by head, as the model stores it."""
        return Weights(subject).W_O[layer]


# ---- what one forward tells, kept for each model


@dataclass(frozen=True)
class _Found:
    """Norms by path ("" for none) and layouts by layer; no weights, which may change.

    Attributes:
        graph: the model's, without positions.
        attention: layer -> the norm before its attention.
        mlp: layer -> the norm before its MLP.
        branch: layer -> the norm between its heads and the stream.
        layouts: layer -> layout of its fused projection.
    """

    graph: Graph
    attention: Mapping[int, str]
    mlp: Mapping[int, str]
    branch: Mapping[int, str]
    layouts: Mapping[int, str]


_KNOWN: WeakKeyDictionary[Subject, _Found] = WeakKeyDictionary()


def _find(subject: Subject, graph: Graph) -> _Found:
    """Run a few tokens with every module watched, and see what stands between the stream and its readers."""
    vocab = subject.facts.d_vocab or PROBE_TOKENS
    batch = subject.tokens(torch.arange(PROBE_TOKENS)[None] * 7 % vocab)
    arguments = subject.forward_arguments(batch)
    if "use_cache" in subject.accepts:
        arguments["use_cache"] = False
    if "logits_to_keep" in subject.accepts:
        arguments["logits_to_keep"] = 1
    traced = [b.attention for b in subject.structure.blocks if b.route == "trace"]
    seen = record(subject.model, (), arguments, n_heads=subject.facts.n_heads, traced=traced)
    weights, plain = Weights(subject), graph if graph.sources[1:2] != ("position",) else Graph.of(subject)
    attention: dict[int, str] = {}
    mlp: dict[int, str] = {}
    branch: dict[int, str] = {}
    for layer, block in enumerate(subject.structure.blocks):
        kinds = {reader.kind for reader in graph.readers if reader.layer == layer}
        if "attention" in kinds:
            attention[layer] = _norm_before(seen, block, seen.calls[block.attention], f"layer {layer}'s attention")
        if "head" in kinds:
            paths = {which: _projection(subject, layer, which)[0] for which in INPUTS}
            norms = {
                _norm_before(seen, block, seen.calls[path], f"layer {layer}'s {which}") for which, path in paths.items()
            }
            if len(norms) > 1:
                raise SiteError(f"Layer {layer} reads its queries, keys and values through different norms: {norms}.")
            attention[layer], branch[layer] = norms.pop(), _branch(subject, seen, block, layer)
        if "mlp" in kinds:
            taken = block.taps.get("mlp.in")
            if taken is None:
                raise SiteError(f"What layer {layer}'s MLP reads is not known: {block.missing.get('mlp.in', '')}.")
            mlp[layer] = _norm_before(seen, block, seen.calls[taken.path], f"layer {layer}'s MLP")
    layouts = {} if weights._layouts is None and not branch else weights._find_layouts()
    return _Found(plain, attention, mlp, branch, layouts)


def _projection(subject: Subject, layer: int, which: str) -> tuple[str, nn.Module, bool]:
    """Path of the module that projects a kind of input, the module, and whether it is fused with others."""
    path = subject.structure.blocks[layer].attention
    module = subject.model.get_submodule(path)
    names = {"q": families.QUERY_NAMES, "k": families.KEY_NAMES, "v": families.VALUE_NAMES}[which]
    alone = _named_linear(module, names)
    found = alone or _named_linear(module, families.FUSED_NAMES)
    assert found is not None  # the graph has its heads
    inner = next(name for name, other in module.named_modules() if other is found)
    return f"{path}.{inner}", found, alone is None


# ---- attention


def _attention(subject: Subject, weights: Weights, graph: Graph, found: _Found, layer: int) -> AttentionPort | None:
    block = subject.structure.blocks[layer]
    readers = tuple(i for i, r in enumerate(graph.readers) if r.layer == layer and r.kind in ("head", "attention"))
    if not readers:
        return None
    writers = tuple(i for i, w in enumerate(graph.writers) if w.layer == layer and w.kind in ("head", "attention"))
    tap, norm = block.taps["attn.out"], found.attention[layer]
    if graph.readers[readers[0]].kind == "attention":
        return AttentionPort((), block.attention, norm, "", tap.path, tap.factor, None, readers, writers)
    inputs = tuple(_head_input(subject, weights, graph, layer, which) for which in INPUTS)
    branch = None
    if found.branch[layer]:
        like = torch.zeros((), dtype=subject.dtype, device=subject.device)
        module = subject.model.get_submodule(found.branch[layer])
        branch = norm_map(module, found.branch[layer], subject.facts.d_model or 1, like)
    return AttentionPort(inputs, "", norm, block.projection, tap.path, tap.factor, branch, readers, writers)


def _head_input(subject: Subject, weights: Weights, graph: Graph, layer: int, which: str) -> HeadInput:
    views = weights._split(layer, which).detach()
    path, projection, fused = _projection(subject, layer, which)
    assert isinstance(projection.weight, Tensor)
    total = projection.weight.numel() // views.shape[1]
    if fused:
        columns = _fused_columns(weights, layer, which, total)
    else:
        columns = torch.arange(total).reshape(views.shape[0], views.shape[2])
    bias = getattr(projection, "bias", None)
    bias = None if bias is None else bias.detach()[columns.to(bias.device)]
    readers = tuple(
        i for i, r in enumerate(graph.readers) if r.kind == "head" and r.layer == layer and r.input == which
    )
    return HeadInput(which, path, views, bias, columns.to(views.device), readers)


def _fused_columns(weights: Weights, layer: int, which: str, total: int) -> Tensor:
    """Where each head's numbers stand in a fused projection's output: its numbers cut as its weights are."""
    facts = weights.subject.facts
    numbers = _cut(torch.arange(total)[None], weights._layout(layer), facts.n_heads, facts.head_dim or 1)
    assert numbers is not None
    return numbers[which][:, 0]


def _branch(subject: Subject, seen: Recording, block: Block, layer: int) -> str:
    """The norm between the output projection and the stream, or "" where there is nothing."""
    writer, projected = seen.calls[block.taps["attn.out"].path], seen.calls[block.projection]
    if close(writer.output, projected.output):
        return ""
    if not (is_norm(writer) and close(writer.input, projected.output)):
        raise SiteError(
            f"{writer.path} stands between layer {layer}'s heads and the stream and is no norm, so what a head adds to "
            "the stream is not known."
        )
    norm_of(subject, writer.path)  # raises where it is none that is known
    return writer.path


def norm_of(subject: Subject, path: str) -> NormMap:
    """The map of one of the model's norms, checked on random vectors.

    Raises:
        SiteError: the module is neither an RMS norm nor a layer norm.
    """
    module, width = subject.model.get_submodule(path), subject.facts.d_model or 1
    like = torch.zeros((), dtype=subject.dtype, device=subject.device)
    made = norm_map(module, path, width, like)
    generator = torch.Generator().manual_seed(0)
    x = (3.0 * torch.randn(4, 2, width, generator=generator)).to(like)
    with torch.no_grad():
        out = module(x)
    mine = made.apply(x) * made.scale(x, out)[..., None] + made.bias
    close_enough = 1e-4 if subject.dtype in (torch.float32, torch.float64) else 3e-2
    if float((mine - out).abs().max()) > close_enough * float(out.abs().max()):
        raise SiteError(f"{path} is neither an RMS norm nor a layer norm, so no gradient can be taken through it.")
    return made


@torch.no_grad()
def norm_map(module: nn.Module, path: str, width: int, like: Tensor | None = None) -> NormMap:
    """A norm's weight, bias and centring from what it makes of three vectors (its epsilon is negligible on them)."""
    like = torch.zeros(()) if like is None else like
    signs = torch.where(torch.arange(width, device=like.device) % 2 == 0, 1.0, -1.0)
    x = (1000.0 * signs).to(like.dtype)[None, None]
    up, down = module(x)[0, 0], module(-x)[0, 0]
    level = module(torch.full_like(x, 1000.0))[0, 0]
    precise = torch.float64 if like.dtype == torch.float64 else torch.float32
    bias = ((up.to(precise) + down.to(precise)) / 2).to(precise)
    centred = bool((level.to(precise) - bias).abs().max() < 1e-2 * (up.to(precise) - bias).abs().max())
    base = x[0, 0].to(precise)
    base = base - base.mean() if centred else base
    weight = (up.to(precise) - bias) * base.square().mean().sqrt() / base
    # what rounding leaves of a bias that is not there
    bias = torch.where(bias.abs() < 1e-6 * weight.abs().max(), torch.zeros_like(bias), bias)
    return NormMap(path, weight, bias, centred)


# ---- MLP


def _mlp(subject: Subject, graph: Graph, found: _Found, layer: int) -> MLPPort | None:
    column = next((i for i, r in enumerate(graph.readers) if r.kind == "mlp" and r.layer == layer), None)
    if column is None:
        return None
    block = subject.structure.blocks[layer]
    row = next(i for i, w in enumerate(graph.writers) if w.kind == "mlp" and w.layer == layer)
    taken, written = block.taps["mlp.in"], block.taps["mlp.out"]
    return MLPPort(taken.path, found.mlp[layer], written.path, written.factor, column, row)


def _norm_before(seen: Recording, block: Block, reader: Call, what: str) -> str:
    """Path of the norm between the stream and a reader, "" for none."""
    streams: Sequence[Tensor | None] = [seen.calls[block.path].input]
    middle = block.taps.get("resid_mid")
    if middle is not None and middle.side == "derived":
        streams = [seen.calls[middle.path].input, *streams]
    if any(close(reader.input, stream) for stream in streams):
        return ""
    for call in seen.inside(block.path):
        alone = next(call.module.children(), None) is None and not _is_linear(call.module)
        before = call.finish <= reader.start and alone and close(call.output, reader.input)
        if before and any(close(call.input, stream) for stream in streams):
            return call.path
    raise SiteError(f"Something else than a norm stands between the stream and {what}, so its edges are not defined.")
