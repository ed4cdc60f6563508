"""Site names: one grammar for every place in a model where something can be read or written.

    embed  pos_embed  layer.6.resid_pre  layer.6.resid_mid  layer.6.resid_post
    layer.6.attn.q|k|v|scores|pattern|z|result|out      layer.6.mlp.in|pre|post|out      layer.6.router
    norm.final  logits
    encoder.stages.2.layers.0.convolution               any other module by its path: its output (`.input` for what
    goes in)

`layer.*.resid_post`, `layer.0-5.mlp.out`, `layer.1,3.attn.z[head=2]` select several. Attention and MLP outputs are
*residual contributions*: what is added to the stream, after any norm or scale of the branch. TransformerLens hook names
(`blocks.6.attn.hook_z`) and nnsight paths (`transformer.h.6.output`) are accepted; the names above are what comes back.

How it can mislead: q and k are after the rotary embedding and any norm of queries and keys, so they are not x W_Q; z is
per query head even where keys and values are shared; `result` is before the branch's own norm where a family has one
(Gemma 2, OLMo 2), so its sum over heads is the projection's output and not `attn.out`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from tomoscope import axes
from tomoscope.errors import UnknownSiteError, nearest

STREAM = (axes.BATCH, axes.POSITION, axes.D_MODEL)
HEADS = (axes.BATCH, axes.POSITION, axes.HEAD, axes.HEAD_DIM)
KV_HEADS = (axes.BATCH, axes.POSITION, axes.KV_HEAD, axes.HEAD_DIM)
PATTERN = (axes.BATCH, axes.HEAD, axes.QUERY, axes.KEY)
NEURONS = (axes.BATCH, axes.POSITION, axes.D_MLP)

PART_AXES: dict[str, tuple[str, ...]] = {
    "resid_pre": STREAM,
    "resid_mid": STREAM,
    "resid_post": STREAM,
    "attn.q": HEADS,
    "attn.k": KV_HEADS,
    "attn.v": KV_HEADS,
    "attn.scores": PATTERN,
    "attn.pattern": PATTERN,
    "attn.z": HEADS,
    "attn.result": (axes.BATCH, axes.POSITION, axes.HEAD, axes.D_MODEL),
    "attn.out": STREAM,
    "mlp.in": STREAM,
    "mlp.pre": NEURONS,
    "mlp.post": NEURONS,
    "mlp.out": STREAM,
    "router": (axes.BATCH, axes.POSITION, axes.EXPERT),
}
GLOBAL_AXES: dict[str, tuple[str, ...]] = {
    "embed": STREAM,
    "pos_embed": STREAM,
    "norm.final": STREAM,
    "logits": (axes.BATCH, axes.POSITION, axes.VOCAB),
}
MODULE_AXES = (axes.BATCH,)

_ALIASES = {
    "hook_resid_pre": "resid_pre",
    "hook_resid_mid": "resid_mid",
    "hook_resid_post": "resid_post",
    "hook_attn_out": "attn.out",
    "hook_mlp_out": "mlp.out",
    "hook_mlp_in": "mlp.in",
    "attn.hook_q": "attn.q",
    "attn.hook_rot_q": "attn.q",
    "attn.hook_k": "attn.k",
    "attn.hook_rot_k": "attn.k",
    "attn.hook_v": "attn.v",
    "attn.hook_attn_scores": "attn.scores",
    "attn.hook_pattern": "attn.pattern",
    "attn.hook_z": "attn.z",
    "attn.hook_result": "attn.result",
    "mlp.hook_pre": "mlp.pre",
    "mlp.hook_post": "mlp.post",
}
_GLOBAL_ALIASES = {"hook_embed": "embed", "hook_pos_embed": "pos_embed", "ln_final.hook_normalized": "norm.final"}

_LAYER = re.compile(r"^(?:layer|blocks)\.(?P<layers>\*|[\d,\-]+)\.(?P<part>[a-z_.]+)$")
_SELECTOR = re.compile(r"^(?P<stem>[^\[\]]+)(?:\[head=(?P<heads>[\d,]+)\])?$")


@dataclass(frozen=True, order=True)
class Site:
    """One place in a model.

    Attributes:
        part: "resid_post", "attn.z", "embed", ... or "module" for any other module.
        layer: block, from 0; None for a site of the whole model.
        heads: the heads selected, empty for all. One head drops the head axis of what is read.
        path: the module's path, with `part` "module"; ends in ".input" for what goes into it.
    """

    part: str
    layer: int | None = None
    heads: tuple[int, ...] = ()
    path: str = ""

    @property
    def name(self) -> str:
        """The site's canonical name; `Site.parse(site.name)` gives the site back."""
        stem = self.path if self.part == "module" else self.part
        stem = stem if self.layer is None else f"layer.{self.layer}.{stem}"
        return f"{stem}[head={','.join(map(str, self.heads))}]" if self.heads else stem

    @property
    def whole(self) -> Site:
        """The same site with all its heads."""
        return replace(self, heads=()) if self.heads else self

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the axes of the whole value, in order; a module's own axes are known only once it has run."""
        if self.part == "module":
            return MODULE_AXES
        return PART_AXES[self.part] if self.layer is not None else GLOBAL_AXES[self.part]

    @property
    def head_axis(self) -> int | None:
        """Index of the head axis, or None where the site has none."""
        names = self.axes
        return next((i for i, axis in enumerate(names) if axis in (axes.HEAD, axes.KV_HEAD)), None)

    @property
    def position_axis(self) -> int | None:
        """Index of the axis along which `at=` selects (the query axis of a pattern), or None."""
        names = self.axes
        return next((i for i, axis in enumerate(names) if axis in (axes.POSITION, axes.QUERY)), None)

    def __str__(self) -> str:
        return self.name


def _numbers(text: str, count: int, what: str, name: str) -> tuple[int, ...]:
    if text == "*":
        return tuple(range(count))
    out: list[int] = []
    for piece in text.split(","):
        low, dash, high = piece.partition("-")
        if not low.isdigit() or (dash and not high.isdigit()):
            raise UnknownSiteError(f"{name!r} has no readable {what} selection.", remedy="Write *, 3, 1,4 or 0-5.")
        out.extend(range(int(low), int(high) + 1) if dash else [int(low)])
    wrong = [n for n in out if n >= count]
    if wrong:
        raise UnknownSiteError(
            f"{name!r} asks for {what} {wrong[0]}, but the model has {count} ({what} 0 to {count - 1}).",
            remedy="`tomoscope sites MODEL` lists every site.",
        )
    return tuple(out)


@dataclass(frozen=True)
class SiteGrammar:
    """The site names that one model understands.

    Attributes:
        n_layers: number of blocks.
        n_heads: number of query heads (0 where there is no attention).
        n_kv_heads: number of key/value heads.
        modules: every module path of the model.
        module_aliases: module paths (with `.input` or `.output`) that are a named site of the grammar.
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int
    modules: frozenset[str]
    module_aliases: dict[str, Site]

    def parse(self, names: str | Site | Iterable[str | Site]) -> list[Site]:
        """Resolve names and patterns to sites, in the order given, without repeats.

        Raises:
            UnknownSiteError: a name that is no site of this model; the message suggests the nearest ones.
        """
        if isinstance(names, str | Site):
            names = [names]
        out: dict[Site, None] = {}
        for name in names:
            sites = [name] if isinstance(name, Site) else self._parse_one(name)
            out.update(dict.fromkeys(sites))
        return list(out)

    def _parse_one(self, name: str) -> Sequence[Site]:
        match = _SELECTOR.match(name.strip())
        if match is None:
            raise UnknownSiteError(f"{name!r} is no site name.", remedy="An example: layer.3.attn.z[head=2].")
        stem, heads_text = match["stem"], match["heads"]
        sites = self._stem(stem, name)
        if heads_text is None:
            return sites
        out = []
        for site in sites:
            if site.head_axis is None:
                raise UnknownSiteError(f"{site.name} has no head axis, so {name!r} selects nothing.")
            count = self.n_kv_heads if axes.KV_HEAD in site.axes else self.n_heads
            out.append(replace(site, heads=_numbers(heads_text, count, "head", name)))
        return out

    def _stem(self, stem: str, name: str) -> list[Site]:
        stem = _GLOBAL_ALIASES.get(stem, stem)
        if stem in GLOBAL_AXES:
            return [Site(stem)]
        match = _LAYER.match(stem)
        part = _ALIASES.get(match["part"], match["part"]) if match else ""
        if match and part in PART_AXES and self.n_layers:
            return [Site(part, layer) for layer in _numbers(match["layers"], self.n_layers, "layer", name)]
        if stem in self.module_aliases:
            return [self.module_aliases[stem]]
        path = stem.removesuffix(".input").removesuffix(".output")
        if path in self.modules:
            return [Site("module", path=path + ".input" if stem.endswith(".input") else path)]
        raise UnknownSiteError(
            f"{name!r} is no site of this model.",
            remedy=f"{nearest(stem, self.names())} `tomoscope sites MODEL` lists every site.".strip(),
        )

    def names(self) -> list[str]:
        """Every name of the grammar for this model, and its module paths."""
        layered = [f"layer.{layer}.{part}" for layer in range(self.n_layers) for part in PART_AXES]
        return [*GLOBAL_AXES, *layered, *sorted(self.modules)]
