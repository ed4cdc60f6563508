"""The local replacement model of one prompt: MLPs stand as features, errors and constants; all else is frozen linear.

    replacement = LocalReplacement.of(subject, transcoders, "The capital of Texas is")

With attention patterns and norm scales as the prompt gave them, the model is linear between its MLPs, and what an MLP
adds is exactly: its active features x their decoders + what the transcoder misses (the error) + its bias (+ a linear
skip path). So every pre-activation and every logit is a sum over features, errors, token embeddings and constants, and
the sweep says which. Source: Ameisen et al. 2025, "Circuit Tracing: Revealing Computational Graphs in
Language Models"; Dunefsky et al. 2024 (arXiv:2406.11944).

How it can mislead: where the model attends is taken as given (see `qk` for why it does); a feature that is not active
has no node, though raising it might matter; errors have no inside. As in the field's tool, the first position has no
features and no errors (`zeroed`): what its MLPs write is a constant.

Steps: the skeleton; one run for what each layer's norms, MLPs and transcoders gave; codes and errors; the constants
(position embeddings, biases), carried forward through the frozen model, so that rows can be checked to sum up.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tomoscope.circuits.attribution.norms import FrozenNorm, no_norm
from tomoscope.circuits.attribution.patterns import SHARE, Patterns
from tomoscope.circuits.attribution.skeleton import BlockSkeleton, Norm, Skeleton, find_skeleton
from tomoscope.errors import DataError, PromptError
from tomoscope.features import Transcoders
from tomoscope.model import Activations, Batch, Subject
from tomoscope.model.inputs import Prompts
from tomoscope.model.memory import free_bytes


@dataclass(frozen=True, eq=False)
class FrozenBlock:
    """One block, frozen at a prompt.

    Attributes:
        skeleton: its linear parts.
        attention: the norm before the values.
        end: the norm at the end of attention's branch, or None.
        reads: the norm before what the transcoder reads.
    """

    skeleton: BlockSkeleton
    attention: FrozenNorm
    end: FrozenNorm | None
    reads: FrozenNorm


@dataclass(frozen=True, eq=False)
class LocalReplacement:
    """A prompt's local replacement model; see the module's docstring.

    Attributes:
        subject: the model.
        transcoders: the dictionaries.
        batch: the prompt, one row without padding.
        zeroed: first positions without features and errors.
        blocks: from 0.
        final: the final norm.
        layer, position, feature: [active] of every active feature, in this order.
        activation: [active]; equal to the pre-activation, as every activation function of `features` has it.
        errors: [layer, position, d_model].
        tokens: [position, d_model], the embeddings.
        constants: [layer + 1, position, d_model], the part of the stream before each block (and at the end) that comes
            from no node.
        read_constants: [layer, position, d_in], the same part of what each transcoder reads.
        ending: [d_model], what the unembedding reads at the last position.
        logits: [vocab], at the last position.
    """

    subject: Subject
    transcoders: Transcoders
    batch: Batch
    zeroed: int
    blocks: tuple[FrozenBlock, ...]
    final: FrozenNorm
    layer: Int[Tensor, " active"]
    position: Int[Tensor, " active"]
    feature: Int[Tensor, " active"]
    activation: Float[Tensor, " active"]
    errors: Float[Tensor, "layer position d_model"]
    tokens: Float[Tensor, "position d_model"]
    constants: Float[Tensor, "stream position d_model"]
    read_constants: Float[Tensor, "layer position d_in"]
    ending: Float[Tensor, " d_model"]
    logits: Float[Tensor, " vocab"]
    _patterns: Patterns = field(repr=False)

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        subject: Subject,
        transcoders: Transcoders,
        prompt: Prompts,
        *,
        zeroed: int = 1,
        skeleton: Skeleton | None = None,
    ) -> LocalReplacement:
        """The local replacement model of one prompt.

        Args:
            subject: a decoder.
            transcoders: for each of its layers.
            prompt: one prompt.
            zeroed: first positions that have no features and no errors. The field's tool has 1: what stands there (a
                begin-of-text token) collects attention and fires everything.
            skeleton: from an earlier prompt of the same model, to save finding it again.

        Raises:
            PromptError: several prompts, or fewer than two tokens.
            DataError: transcoders for another number of layers or another width.
            UnavailableSiteError: a part of the model that can't be frozen, by name.
        """
        batch = _one_row(subject, prompt, zeroed)
        facts = subject.facts
        if transcoders.n_layers != facts.n_layers:
            raise DataError(
                f"There are transcoders for {transcoders.n_layers} layers; {subject.name} has {facts.n_layers}."
            )
        if transcoders.coder(0).d_in != facts.d_model:
            raise DataError(
                f"The transcoders read {transcoders.coder(0).d_in} dimensions; the model has {facts.d_model}."
            )
        return _Freezing(subject, transcoders, batch, zeroed, skeleton or find_skeleton(subject)).done()

    @property
    def n_layers(self) -> int:
        """Blocks."""
        return len(self.blocks)

    @property
    def n_positions(self) -> int:
        """Tokens of the prompt."""
        return len(self.tokens)

    @property
    def n_active(self) -> int:
        """Active features."""
        return len(self.activation)

    @property
    def n_sources(self) -> int:
        """Active features, errors and tokens: all that an edge can come from."""
        return self.n_active + (self.n_layers + 1) * self.n_positions

    @property
    def ids(self) -> tuple[int, ...]:
        """The prompt's tokens."""
        return self.batch.prompts[0].ids

    def pattern(self, layer: int) -> Float[Tensor, "head query key"]:
        """A block's attention pattern; read again from the model where they do not all fit in memory."""
        return self._patterns(layer)

    def __repr__(self) -> str:
        return (
            f"LocalReplacement({self.subject.name}: {self.n_positions} tokens, {self.n_active:,} active features in "
            f"{self.n_layers} layers)"
        )


def _one_row(subject: Subject, prompt: Prompts, zeroed: int) -> Batch:
    batch = subject.tokens(prompt)
    if len(batch) != 1:
        raise PromptError(f"An attribution graph is of one prompt, not {len(batch)}.", remedy="Call it for each.")
    if batch.padded:  # a row cut out of a batch
        batch = subject.tokens([batch.prompts[0]])
    if not 0 <= zeroed < batch.width:
        raise PromptError(
            f"The first {zeroed} positions are to have no features, but the prompt has {batch.width} tokens.",
            remedy="Give a longer prompt, or zeroed=0.",
        )
    return batch


class _Freezing:
    """Reads a prompt's run, some layers at a time, and builds the replacement model on the way up."""

    def __init__(
        self, subject: Subject, transcoders: Transcoders, batch: Batch, zeroed: int, skeleton: Skeleton
    ) -> None:
        self.subject, self.transcoders, self.batch, self.zeroed = subject, transcoders, batch, zeroed
        self.skeleton = skeleton
        self.work = torch.float64 if subject.dtype == torch.float64 else torch.float32
        self.blocks: list[FrozenBlock] = []
        self.codes: list[tuple[Tensor, Tensor, Tensor]] = []
        self.errors: list[Tensor] = []
        self.constants: list[Tensor] = []
        self.read_constants: list[Tensor] = []
        self.patterns = Patterns(subject, batch, self.work)
        self.exact = subject.structure.embed_adds and subject.sites()["embed"].available

    def done(self) -> LocalReplacement:
        n_layers = len(self.skeleton.blocks)
        step = self._layers_at_once()
        tokens, constant, acts = torch.empty(0), torch.empty(0), None
        for start in range(0, n_layers, step):
            layers = range(start, min(start + step, n_layers))
            acts = self._read(layers)
            if start == 0:
                tokens, constant = self._start(acts)
            for layer in layers:
                constant = self._layer(layer, acts, constant)
        assert acts is not None  # there is no model without layers
        final, ending, logits = self._end(acts, constant)
        layer = torch.cat([torch.full_like(f, i) for i, (_, f, _) in enumerate(self.codes)])
        return LocalReplacement(
            self.subject, self.transcoders, self.batch, self.zeroed, tuple(self.blocks), final,
            layer, *(torch.cat([codes[i] for codes in self.codes]) for i in range(3)),
            torch.stack(self.errors), tokens, torch.stack(self.constants), torch.stack(self.read_constants), ending,
            logits, self.patterns,
        )  # fmt: skip

    # ---- reading

    def _layers_at_once(self) -> int:
        """How many layers are read in one run."""
        facts, width = self.subject.facts, self.batch.width
        a_layer = 4 * width * (10 * (facts.d_model or 1) + 2 * facts.n_heads * width)
        return max(1, int(SHARE * free_bytes(self.subject.device)) // a_layer)

    def _take(self, acts: Activations, name: str) -> Tensor:
        value = acts[self.subject.grammar.parse(name)[0].name]
        return value.to(self.work).reshape(-1, value.shape[-1])

    def _start(self, acts: Activations) -> tuple[Tensor, Tensor]:
        """The embeddings, and the constants that stand beside them."""
        stream = self._take(acts, "layer.0.resid_pre")
        # where a norm follows the embedding (BLOOM), all of the stream's start is the tokens'
        tokens = self._take(acts, "embed") if self.exact else stream
        return tokens, stream - tokens

    def _read(self, layers: range) -> Activations:
        """One run for some layers, and for the start and the end of the stream where these are among them."""
        names = self.patterns.names(layers)
        if 0 in layers and self.exact:
            names.append("embed")
        if layers.stop == len(self.skeleton.blocks):
            names += [f"layer.{layers.stop - 1}.resid_post"] + ["norm.final"] * (self.skeleton.final_norm is not None)
        for layer in layers:
            block = self.skeleton.blocks[layer]
            parts = ["resid_pre", "mlp.in", "mlp.out"] + ([] if block.parallel else ["resid_mid"])
            names += [f"layer.{layer}.{part}" for part in parts]
            names += [n.path for n in (block.attention_norm, block.mlp_norm) if n is not None]
            if block.end_norm is not None:
                names += [block.end_norm.path, f"{block.end_norm.path}.input"]
        acts = self.subject.read(self.batch, *names, keep_device=True)
        self.patterns.take(acts, layers)
        return acts

    # ---- one layer

    def _layer(self, layer: int, acts: Activations, constant: Tensor) -> Tensor:
        """Freeze a block, take its codes and errors, and carry the constants through it."""
        skeleton = self.skeleton.blocks[layer]
        before = self._take(acts, f"layer.{layer}.resid_pre")
        stream = before if skeleton.parallel else self._take(acts, f"layer.{layer}.resid_mid")
        out, given = (self._take(acts, f"layer.{layer}.{part}") for part in ("mlp.out", "mlp.in"))
        end = None
        if skeleton.end_norm is not None:
            path = skeleton.end_norm.path
            end = skeleton.end_norm.weights.at(self._take(acts, f"{path}.input"), self._take(acts, path))
        reads, read = self._reading(skeleton, stream, given)
        normed = None if skeleton.attention_norm is None else self._take(acts, skeleton.attention_norm.path)
        block = FrozenBlock(skeleton, _frozen(skeleton.attention_norm, before, normed), end, reads)
        self.blocks.append(block)
        self.constants.append(constant)
        middle = constant + attended(block, self.patterns(layer), constant)
        self.read_constants.append(reads.linear(constant if skeleton.parallel else middle) + reads.bias)
        return middle + self._mlp(layer, read, out)

    def _reading(self, skeleton: BlockSkeleton, stream: Tensor, given: Tensor) -> tuple[FrozenNorm, Tensor]:
        """The norm before what the transcoder reads, and what it reads."""
        if self.transcoders.reads == "resid_mid":
            return no_norm(stream), stream
        frozen = _frozen(skeleton.mlp_norm, stream, given)
        if self.transcoders.reads == "normalized":
            frozen = frozen.unit
            return frozen, frozen.linear(stream) + frozen.bias
        return frozen, given

    def _mlp(self, layer: int, read: Tensor, out: Tensor) -> Tensor:
        """Codes and errors of a layer; returns what the MLP adds that comes from no node."""
        codes = self.transcoders.sparse(layer, read[self.zeroed :])
        self.codes.append((codes.sample + self.zeroed, codes.feature, codes.value))
        coder = self.transcoders.coder(layer)
        made = torch.zeros_like(out)
        for source in range(layer + 1):
            if layer in self.transcoders.targets(source):
                position, feature, value = self.codes[source]
                rows = self.transcoders.decoder_rows(source, feature, layer, out)
                made.index_add_(0, position, rows * value[:, None])
        skip = torch.zeros_like(out) if coder.W_skip is None else read @ coder.W_skip.to(out).T
        bias = coder.b_dec.to(out).expand_as(out).clone()
        error = out - made - skip - bias
        error[: self.zeroed] = 0
        self.errors.append(error)
        constant = bias
        constant[: self.zeroed] = (out - skip)[: self.zeroed]
        return constant if coder.W_skip is None else constant + self.read_constants[layer] @ coder.W_skip.to(out).T

    # ---- the end

    def _end(self, acts: Activations, constant: Tensor) -> tuple[FrozenNorm, Tensor, Tensor]:
        self.constants.append(constant)
        norm = self.skeleton.final_norm
        stream = self._take(acts, f"layer.{len(self.blocks) - 1}.resid_post")
        normed = stream if norm is None else self._take(acts, "norm.final")
        return _frozen(norm, stream, normed), normed[-1], self.subject.last_logits(self.batch)[0].to(self.work)


def _frozen(norm: Norm | None, x: Tensor, y: Tensor | None) -> FrozenNorm:
    return no_norm(x) if norm is None or y is None else norm.weights.at(x, y)


def attended(
    block: FrozenBlock, pattern: Float[Tensor, "head query key"], stream: Float[Tensor, "position d_model"]
) -> Float[Tensor, "position d_model"]:
    """What a frozen block's attention adds to the stream for any stream, constants of the branch included."""
    parts = block.skeleton
    read = block.attention.linear(stream) + block.attention.bias
    values = torch.einsum("pd,kdi->kpi", read, parts.W_V.to(read)) + parts.value_bias.to(read)[:, None]
    groups = len(pattern) // len(values)
    z = pattern @ values.repeat_interleave(groups, dim=0)
    out = torch.einsum("hpi,hid->pd", z, parts.W_O.to(read)) + parts.output_bias.to(read)
    out = out if block.end is None else block.end.linear(out) + block.end.bias
    return out * parts.factor
