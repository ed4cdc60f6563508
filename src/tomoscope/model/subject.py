"""The subject of an examination: one model, its sites, and the calls that read and write them.

    subject = open_model("gpt2")
    acts = subject.read(prompts, "layer.*.resid_post", at="last")
    run = subject.run(prompts, edits=[add("layer.6.resid_post", direction, 4.0)])

The model is the library's own and is never changed: hooks attach for one call. While only reading, its logits are
bit-identical to its own forward, which is measured at opening (`facts.parity`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tomoscope import axes
from tomoscope.errors import ModelError, PromptError, UnavailableSiteError
from tomoscope.model.batch import Batch, Encoded, PromptInput, encode
from tomoscope.model.bypass import unembed
from tomoscope.model.edits import Edit, rows_of
from tomoscope.model.facts import Facts, SiteInfo
from tomoscope.model.generation import generate_tokens
from tomoscope.model.gradients import gradients
from tomoscope.model.inputs import Prompts, forward_arguments, to_batch
from tomoscope.model.memory import row_bytes, rows_that_fit
from tomoscope.model.probe import unwrap
from tomoscope.model.regions import Bound, select
from tomoscope.model.results import Activations, Gradients, Run, join, read_axes
from tomoscope.model.sites import GLOBAL_AXES, PART_AXES, Site, SiteGrammar
from tomoscope.model.structure import Structure
from tomoscope.model.taps import Session, find_tap

Metric = Callable[[Tensor, Batch], Float[Tensor, " batch"]]


@dataclass(eq=False)
class Subject:
    """An opened model. Made by `open_model`.

    Attributes:
        model: the torch module.
        tokenizer: its tokenizer, or None.
        name: where it came from.
        facts: what opening found out.
        structure: where its sites live.
        grammar: the site names it understands.
        source: the directory or hub id, None for a module given in memory.
        accepts: names of the arguments of the model's forward.
        input_name: its main input ("input_ids", "pixel_values").
        positions: length of the stream of a model whose inputs have a fixed size (an image's patches), else 0.
    """

    model: nn.Module
    tokenizer: Any
    name: str
    facts: Facts
    structure: Structure
    grammar: SiteGrammar
    source: str | None = None
    accepts: frozenset[str] = field(default_factory=frozenset)
    input_name: str = "input_ids"
    positions: int = 0

    # ---- facts

    @property
    def config(self) -> Any:
        """The model's config, or None."""
        return getattr(self.model, "config", None)

    @property
    def device(self) -> torch.device:
        """Device of the first parameter (with a device map, where inputs go)."""
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """Type of the first floating parameter."""
        return next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32)

    @property
    def widths(self) -> dict[str, int]:
        """Size of each named axis that the model fixes."""
        facts = self.facts
        known = {
            axes.D_MODEL: facts.d_model, axes.VOCAB: facts.d_vocab, axes.D_MLP: facts.d_mlp, axes.HEAD: facts.n_heads,
            axes.KV_HEAD: facts.n_kv_heads, axes.HEAD_DIM: facts.head_dim, axes.LAYER: facts.n_layers,
        }  # fmt: skip
        return {name: size for name, size in known.items() if size}

    def sites(self, *, modules: bool = False) -> dict[str, SiteInfo]:
        """Every site of the grammar for this model (and every module's path, with `modules`)."""
        names = [Site(part) for part in GLOBAL_AXES]
        names += [Site(part, layer) for layer in range(self.facts.n_layers) for part in PART_AXES]
        out = {}
        for site in names:
            try:
                tap = find_tap(self.structure, site)
                note = f"the module's output x {tap.factor:g}" if tap.factor != 1.0 else ""
                out[site.name] = SiteInfo(site.name, site.axes, True, note=note)
            except UnavailableSiteError as error:
                reason = error.what.split("can't be given: ", 1)[-1].rstrip(".")
                out[site.name] = SiteInfo(site.name, site.axes, False, reason)
        if modules or not self.facts.n_layers:
            out.update({path: self._module_info(path) for path in sorted(self.grammar.modules)})
        return out

    def _module_info(self, path: str) -> SiteInfo:
        reason = self.structure.silent.get(path, "")
        return SiteInfo(path, (axes.BATCH,), not reason, reason)

    # ---- inputs

    def tokens(self, prompts: Prompts) -> Batch:
        """Encode and pad prompts (or wrap images and other inputs).

        Args:
            prompts: one prompt or several (texts, token ids, labelled prompts); images [batch, channel, height, width];
                or a mapping of the model's own inputs.

        Raises:
            PromptError: no prompt, an empty one, or one longer than the context.
            TokenizerError: text for a model without a tokenizer.
        """
        return to_batch(self, prompts)

    def forward_arguments(self, batch: Batch, *, cached: bool = False) -> dict[str, Any]:
        """The keyword arguments with which the model is called for a batch.

        Position ids are given where a decoder's rows are padded on the left, and derived from the mask.
        """
        return forward_arguments(self, batch, cached=cached)

    # ---- reads and writes

    def bind(self, edits: Sequence[Edit], batch: Batch, *, first_row: int = 0) -> list[Bound]:
        """Resolve edits for a batch; `first_row` shifts their rows, for a stack."""
        bound = []
        for edit in edits:
            for site in self.grammar.parse(edit.site):
                find_tap(self.structure, site)
                columns, single = batch.columns(edit.at)
                rows = None if edit.rows is None else torch.tensor(edit.rows, dtype=torch.long) + first_row
                if rows is not None and len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(batch):
                    raise PromptError(
                        f"An edit at {site.name} names row {int(rows.max())}; the batch has {len(batch)}."
                    )
                bound.append(Bound(edit, site, rows, columns, single))
        return bound

    def resolve(self, sites: Iterable[str | Site]) -> list[Site]:
        """Sites for names and patterns, each checked to be available.

        Raises:
            UnknownSiteError: no such name.
            UnavailableSiteError: a site named one by one that the model can't give, or a pattern none of which it can.
        """
        out: dict[Site, None] = {}
        for name in [sites] if isinstance(sites, str | Site) else sites:
            found = self.grammar.parse(name)
            good, last = [], None
            for site in found:
                try:
                    find_tap(self.structure, site)
                    good.append(site)
                except UnavailableSiteError as error:
                    last = error
            # a pattern skips the layers that lack the site (MLP neurons of mixture layers); a plain name must be there
            if last is not None and (not good or len(found) == 1):
                raise last
            out.update(dict.fromkeys(good))
        return list(out)

    def rows_per_call(self, width: int, sites: Sequence[Site] = (), *, gradients: bool = False) -> int:
        """Rows of `width` tokens that one call should take."""
        per_row = row_bytes(self.widths, width, sites, itemsize=max(4, self.dtype.itemsize), gradients=gradients)
        return rows_that_fit(self.device, per_row, width)

    @torch.no_grad()
    def read(
        self,
        prompts: Prompts,
        *sites: str | Site,
        at: Any = None,
        edits: Sequence[Edit] = (),
        keep_device: bool = False,
    ) -> Activations:
        """Read any number of sites in one pass, leaving the model's forward as soon as all have been read.

        Args:
            prompts: see `tokens`.
            sites: names or patterns.
            at: positions, see `Batch.columns`; one position drops the position axis.
            edits: written in the same pass.
            keep_device: leave the values on the model's device instead of moving them to the CPU.

        Returns:
            Values by canonical site name, with the site's axes; the selected heads and positions only.
        """
        batch, wanted = self.tokens(prompts), self.resolve(sites)
        if not wanted:
            raise UnavailableSiteError("No site was asked for.", remedy="Name one, for example layer.*.resid_post.")
        step = self.rows_per_call(max(batch.width, 1), wanted)
        parts = []
        for start in range(0, len(batch), step):
            piece = batch.take(slice(start, start + step))
            bound = self._bind_piece(edits, batch, piece, start)
            parts.append(self._call(piece, wanted, bound, at, keep_device, logits=False)[1])
        return join(parts, batch)

    def _bind_piece(self, edits: Sequence[Edit], batch: Batch, piece: Batch, start: int) -> list[Bound]:
        if len(piece) == len(batch):
            return self.bind(edits, batch)
        kept = (rows_of(edit, start, len(piece), len(batch), self._region_dims(edit, batch)) for edit in edits)
        return self.bind([edit for edit in kept if edit is not None], piece)

    def _region_dims(self, edit: Edit, batch: Batch) -> int:
        """Axes of the region that an edit selects; a module's own axes are as many as the value has."""
        site = self.grammar.parse(edit.site)[0]
        if site.part == "module":
            return 0 if edit.value is None or edit.value.dim() < 2 else edit.value.dim()
        return len(site.axes) - (len(site.heads) == 1) - batch.columns(edit.at)[1]

    def _call(
        self, batch: Batch, wanted: Sequence[Site], bound: Sequence[Bound], at: Any, keep_device: bool, *, logits: bool
    ) -> tuple[Tensor | None, Activations]:
        columns, single = batch.columns(at)

        def keep(site: Site, value: Tensor) -> Tensor:
            chosen = columns if site.position_axis is not None else None
            value = select(value, site, None, chosen, single=single and chosen is not None)
            return value if keep_device else value.cpu()

        heads = {site: [other for other in wanted if other.whole == site.whole] for site in wanted}
        whole = list(dict.fromkeys(site.whole for site in wanted))
        # with one selection of heads a site the rest need not be kept; with several, they are cut out below
        plain = all(len(group) == 1 for group in heads.values())
        session = Session(
            self.model,
            self.structure,
            reads=whole,
            edits=bound,
            batch_size=len(batch),
            stop=not logits,
            keep=(lambda s, v: keep(next(w for w in wanted if w.whole == s), v)) if plain else (lambda s, v: v),
        )
        output = None
        with session:
            output = self.model(**self.forward_arguments(batch))
        if plain:
            values = {site: session.values[site.whole] for site in wanted if site.whole in session.values}
        else:
            values = {site: keep(site, session.values[site.whole]) for site in wanted}
        missing = [site.name for site in wanted if site not in values]
        if missing:
            raise ModelError(f"{missing[0]} was not computed in this forward, though it was at opening.")
        named = {site.name: read_axes(site, single, values[site]) for site in wanted}
        acts = Activations({site.name: value for site, value in values.items()}, named, batch)
        return (unwrap(output)[0] if logits else None), acts

    @torch.no_grad()
    def run(self, prompts: Prompts, *, edits: Sequence[Edit] = (), read: Sequence[str] = (), at: Any = None) -> Run:
        """Run the model with edits, and give its logits and any sites.

        Returns:
            Logits [batch, position, vocab] on the model's device, the sites asked for, and the padded batch. A batch
            too large for memory is run in pieces; the result must fit.
        """
        batch, wanted = self.tokens(prompts), self.resolve(read)
        step = self.rows_per_call(max(batch.width, 1), wanted)
        logits, parts = [], []
        for start in range(0, len(batch), step):
            piece = batch.take(slice(start, start + step))
            out, acts = self._call(piece, wanted, self._bind_piece(edits, batch, piece, start), at, False, logits=True)
            assert out is not None
            logits.append(out)
            parts.append(acts)
        return Run(logits[0] if len(logits) == 1 else torch.cat(logits), join(parts, batch), batch)

    @torch.no_grad()
    def last_logits(self, prompts: Prompts, *, edits: Sequence[Edit] = ()) -> Float[Tensor, "batch vocab"]:
        """[batch, vocab] logits at each prompt's last token, keeping no others."""
        batch = self.tokens(prompts)
        step = self.rows_per_call(max(batch.width, 1))
        out = []
        for start in range(0, len(batch), step):
            piece = batch.take(slice(start, start + step))
            bound = self._bind_piece(edits, batch, piece, start)
            out.append(self._last(piece, bound))
        return torch.cat(out)

    def _last(self, batch: Batch, bound: Sequence[Bound]) -> Tensor:
        arguments = self.forward_arguments(batch)
        one = (
            self.facts.kind == "decoder"
            and "logits_to_keep" in self.accepts
            and not any(b.site.part == "logits" for b in bound)
        )
        if one:
            arguments["logits_to_keep"] = 1
        with Session(self.model, self.structure, edits=bound, batch_size=len(batch)):
            logits = unwrap(self.model(**arguments))[0]
        if logits is None:
            raise ModelError("The model gave no logits.")
        if logits.dim() == 2:
            return logits
        return logits[:, -1] if one else logits[torch.arange(len(batch)), batch.last.to(logits.device)]

    @torch.no_grad()
    def run_stack(self, prompts: Prompts, stack: Sequence[Sequence[Edit]], *, last: bool = True) -> Tensor:
        """Run the same prompts under each of a stack of edits, as few large batches.

        Args:
            prompts: n prompts.
            stack: S sequences of edits.
            last: logits of the last token only.

        Returns:
            [stack, batch, vocab], or [stack, batch, position, vocab] without `last`.
        """
        batch = self.tokens(prompts)
        step = max(1, self.rows_per_call(max(batch.width, 1)) // len(batch))
        out = []
        for start in range(0, len(stack), step):
            chunk = stack[start : start + step]
            tiled = batch.take(torch.arange(len(batch)).repeat(len(chunk)))
            bound: list[Bound] = []
            for place, edits in enumerate(chunk):
                for one in self.bind(edits, batch):
                    rows = torch.arange(len(batch)) if one.rows is None else one.rows
                    columns = None if one.columns is None else one.columns.repeat(len(chunk), 1)
                    bound.append(Bound(one.edit, one.site, rows + place * len(batch), columns, one.single))
            logits = self._last(tiled, bound) if last else self._whole(tiled, bound)
            out.append(logits.reshape(len(chunk), len(batch), *logits.shape[1:]))
        return torch.cat(out)

    def _whole(self, batch: Batch, bound: Sequence[Bound]) -> Tensor:
        with Session(self.model, self.structure, edits=bound, batch_size=len(batch)):
            logits = unwrap(self.model(**self.forward_arguments(batch)))[0]
        assert logits is not None
        return logits

    def gradients(
        self, prompts: Prompts, metric: Metric, sites: Sequence[str | Site], *, edits: Sequence[Edit] = ()
    ) -> Gradients:
        """Gradients of a metric at any sites: one forward and one backward for all of them.

        Args:
            prompts: see `tokens`.
            metric: from logits and the batch to one number a row, which depends on that row's logits only;
                `batch.indices`
                says which prompts the rows are.
            sites: names or patterns; whole sites (select heads from the result).
            edits: written in the same forward.
        """
        return gradients(self, prompts, metric, self.resolve(sites), edits=edits)

    @torch.no_grad()
    def stream(
        self, prompts: Iterable[PromptInput], *sites: str | Site, at: Any = None, batch_size: int | None = None
    ) -> Iterator[Activations]:
        """Read sites over any number of prompts in bounded memory, in their order; the batch size follows the
        memory.
        """
        wanted = self.resolve(sites)
        waiting: list[Encoded] = []
        for row, prompt in enumerate(prompts):
            one = encode(prompt, self.tokenizer, context=self.facts.context, row=row)
            widest = max(len(p.ids) for p in [*waiting, one])
            if waiting and len(waiting) >= (batch_size or self.rows_per_call(widest, wanted)):
                yield self.read(waiting, *wanted, at=at)
                waiting = []
            waiting.append(one)
        if waiting:
            yield self.read(waiting, *wanted, at=at)

    def generate(
        self,
        prompts: Prompts,
        *,
        max_new_tokens: int = 20,
        edits: Sequence[Edit] = (),
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        cached: bool = True,
    ) -> list[str]:
        """Continue prompts under edits; see `generation.generate_tokens` for the meaning of positions while
        decoding.
        """
        ids = generate_tokens(
            self,
            prompts,
            max_new_tokens=max_new_tokens,
            edits=edits,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            cached=cached,
        )
        if self.tokenizer is None:
            return [" ".join(map(str, row)) for row in ids]
        return [self._continued(p.ids, row) for p, row in zip(self.tokens(prompts).prompts, ids, strict=True)]

    def _continued(self, before: Sequence[int], after: Sequence[int]) -> str:
        """The text that tokens add: decoded alone, some tokenizers drop the space before the first word."""
        start = self.tokenizer.decode(list(before), skip_special_tokens=True)
        whole = self.tokenizer.decode([*before, *after], skip_special_tokens=True)
        return whole[len(start) :] if whole.startswith(start) else self.tokenizer.decode(list(after))

    def unembed(self, stream: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch vocab"]:
        """Logits that the model's own head gives for values of the last block's output.

        The model itself is run with its blocks bypassed, so the final norm, scales and soft-caps are its own. The
        result has a gradient where the stream asks for one.
        """
        return unembed(self, stream)

    def __repr__(self) -> str:
        f = self.facts
        return f"Subject({self.name}: {f.family} {f.kind}, {f.n_layers} layers, d_model {f.d_model}, {f.n_heads} heads)"
