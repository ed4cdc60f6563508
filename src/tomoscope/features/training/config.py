"""What a dictionary is to be and how it is trained: one record, checked before any work.

The losses are those of the field, on inputs scaled so that their mean norm is the square root of their width (SAELens's
`expected_average_only_in`); a coefficient means here what it means there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from tomoscope.errors import DataError, nearest

Architecture = Literal["relu", "gated", "topk", "batchtopk", "jumprelu", "matryoshka"]
ARCHITECTURES: tuple[str, ...] = ("relu", "gated", "topk", "batchtopk", "jumprelu", "matryoshka")
SPARSITIES = ("l1", "tanh", "log", "step")
K_OF = ("topk", "batchtopk", "matryoshka")
"""Architectures that choose k latents."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One dictionary.

    Attributes:
        reads: sites that are encoded, one after the other along the width (several: a crosscoder).
        writes: sites that are reconstructed; those that are read by default (others: a transcoder).
        latents: how many; of a cross-layer transcoder, at each layer.
        architecture: "topk", "batchtopk", "matryoshka", "jumprelu", "relu", "gated".
        k: active latents a sample (of topk; the mean of batchtopk and matryoshka).
        cross_layer: `reads` and `writes` are sites of rising layers; latents of each write to its own and later ones.
        skip: a linear path from what is read to what is written (transcoders).
        widths: sizes of matryoshka's nested dictionaries, rising, the last being `latents`.
        sparsity: the penalty of relu, gated and jumprelu: "l1" (of activation x decoder norm), "tanh" (of `sharpness`
            times that), "log" (1 + that / `epsilon`), or for jumprelu "step", the number of active latents.
        coefficient: of the penalty.
        target_l0: of jumprelu: the penalty is coefficient x (L0 / target - 1)^2 instead of coefficient x L0.
        sharpness, epsilon: see `sparsity`.
        bandwidth: of jumprelu's pseudo-derivative.
        threshold: where jumprelu's thresholds begin; with a target at the quantile that meets it.
        decoder: "unit" keeps decoder rows at norm 1; "free" does not, and the penalty counts norms.
        centred: take b_dec from the input before encoding; by default where what is read is what is written.
        auxk: latents of the auxiliary loss (0: none); by default half the width for topk, batchtopk, matryoshka.
        auxk_coefficient: of the auxiliary loss.
        dead_after: rows without firing after which a latent counts as dead.
        resample: steps at which dead latents are drawn anew from badly reconstructed inputs (relu, gated, jumprelu).
        encoder_start: length of encoder rows at the start, where k latents are chosen and the decoder's rows begin at
            length 1: short rows turn faster under Adam, whose steps have one size, and the loss falls faster for it.
        normalise: scale inputs to a mean norm of the square root of their width.
        learning_rate, beta1, beta2, adam_epsilon: of Adam.
        warmup: steps in which the rate rises.
        decay: steps at the end in which it falls to 0; a fifth of all by default.
        sparsity_warmup: steps in which the penalty rises.
        batch: rows of a step.
        steps: how many.
        precision: "bfloat16" for the encoder's product, or "float32".
        seed: of the starting values.
        name: what it is called in files; made up from the rest by default.
    """

    reads: tuple[str, ...] = ("",)
    writes: tuple[str, ...] = ()
    latents: int = 8192
    architecture: str = "topk"
    k: int = 32
    cross_layer: bool = False
    skip: bool = False
    widths: tuple[int, ...] = ()
    sparsity: str = ""
    coefficient: float = 5.0
    target_l0: float | None = None
    sharpness: float = 4.0
    epsilon: float = 0.1
    bandwidth: float = 0.05
    threshold: float = 0.01
    decoder: str = "unit"
    centred: bool | None = None
    auxk: int | None = None
    auxk_coefficient: float = 1 / 32
    dead_after: int = 1_000_000
    resample: tuple[int, ...] = ()
    encoder_start: float = 0.3
    normalise: bool = True
    learning_rate: float = 4e-4
    beta1: float = 0.9
    beta2: float = 0.999
    adam_epsilon: float = 1e-8
    warmup: int = 100
    decay: int | None = None
    sparsity_warmup: int = 500
    batch: int = 4096
    steps: int = 1000
    precision: str = "bfloat16"
    seed: int = 0
    name: str = ""

    def __post_init__(self) -> None:
        for wrong, why in self._mistakes():
            if wrong:
                raise DataError(f"This dictionary can't be trained: {why}.", remedy="See `TrainConfig`.")

    def _mistakes(self) -> Sequence[tuple[Any, str]]:
        near = nearest(self.architecture, ARCHITECTURES)
        step = self.sparsity == "step"
        return (
            (self.architecture not in ARCHITECTURES, f"the architecture {self.architecture!r} is not known. {near}"),
            (self.sparsity not in ("", *SPARSITIES), f"the sparsity {self.sparsity!r} is none of {SPARSITIES}"),
            (step and self.architecture != "jumprelu", "only jumprelu has the sparsity 'step'"),
            (self.target_l0 is not None and self.penalty != "step", "a target for L0 is jumprelu's with 'step'"),
            (self.target_l0 is not None and not 0 < self.target_l0 < self.latents, "the target L0 is out of range"),
            (self.latents < 1 or self.batch < 1 or self.steps < 1, "latents, batch and steps are at least 1"),
            (self.architecture in K_OF and not 1 <= self.k <= self.latents, f"k is {self.k} of {self.latents} latents"),
            (not self.reads, "it reads no site"),
            (self.decoder not in ("unit", "free"), f"the decoder is 'unit' or 'free', not {self.decoder!r}"),
            (self.precision not in ("bfloat16", "float32"), f"the precision {self.precision!r} is not known"),
            (self.centred and self.writes and self.writes != self.reads, "b_dec can't be taken from another site"),
            (self.skip and (self.cross_layer or not self.transcoder), "a skip path is of transcoders of one layer"),
            (
                self.cross_layer and (len(self.reads) != len(self.writes) or self.architecture == "matryoshka"),
                "a cross-layer transcoder reads and writes as many sites, and is not matryoshka",
            ),
            (
                (self.architecture == "matryoshka") != bool(self.widths)
                or (self.widths and (list(self.widths) != sorted(set(self.widths)) or self.widths[-1] != self.latents)),
                "matryoshka, and nothing else, has rising widths that end with its latents",
            ),
            (
                min(self.learning_rate, self.bandwidth, self.epsilon, self.encoder_start) <= 0,
                "rates, widths and lengths are positive",
            ),
            (self.resample and self.architecture in K_OF, "latents that compete are revived by auxk, not drawn anew"),
        )  # fmt: skip

    @property
    def targets(self) -> tuple[str, ...]:
        """Sites that are reconstructed."""
        return self.writes or self.reads

    @property
    def transcoder(self) -> bool:
        """It writes other sites than it reads."""
        return bool(self.writes) and self.writes != self.reads

    @property
    def is_centred(self) -> bool:
        """b_dec is taken from the input."""
        return not self.transcoder and len(self.reads) == 1 if self.centred is None else self.centred

    @property
    def penalty(self) -> str:
        """The penalty's name; "" where k is chosen."""
        if self.architecture in K_OF:
            return ""
        return self.sparsity or ("step" if self.architecture == "jumprelu" else "l1")

    @property
    def title(self) -> str:
        """Its name, for files and lines."""
        if self.name:
            return self.name
        size = f"k{self.k}" if self.architecture in K_OF else f"c{self.coefficient:g}"
        size = f"l0_{self.target_l0:g}" if self.target_l0 else size
        sites = "+".join(self.reads) + (f"_to_{'+'.join(self.writes)}" if self.transcoder else "")
        return "_".join(part for part in (sites, self.architecture, str(self.latents), size, f"s{self.seed}") if part)

    def rate(self, step: int) -> float:
        """The learning rate of a step, from 0."""
        decay = self.steps // 5 if self.decay is None else self.decay
        rise = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        fall = min(1.0, (self.steps - step) / decay) if decay else 1.0
        return self.learning_rate * rise * max(fall, 0.0)

    def pressure(self, step: int) -> float:
        """The penalty's coefficient at a step."""
        return self.coefficient * (min(1.0, (step + 1) / self.sparsity_warmup) if self.sparsity_warmup else 1.0)

    def document(self) -> dict[str, Any]:
        """As plain values."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_document(cls, document: dict[str, Any]) -> TrainConfig:
        """From plain values. Raises DataError for an unknown name."""
        known = {field.name for field in fields(cls)}
        wrong = sorted(set(document) - known)
        if wrong:
            raise DataError(f"A training has no option {wrong[0]!r}.", remedy=nearest(wrong[0], known))
        given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in document.items()}
        return cls(**given)
