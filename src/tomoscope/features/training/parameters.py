"""The parameters of a dictionary in training: float32 masters by latent, and a bfloat16 copy of each encoder.

Encoder and decoder rows are kept by latent ([latent, width]), as the sums by latent write them. A dictionary has one
part; a cross-layer transcoder one a layer, each reading its layer's columns and writing those of its own and all later
layers. In a `Layout` the sites stand one after the other along the width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from tomoscope.activations.sources import generator
from tomoscope.errors import DataError
from tomoscope.features.training.config import K_OF, TrainConfig
from tomoscope.features.training.rules import EXTRAS, THETA

MARGIN = 32
"""Columns that the product has besides those that are read, so that its width stays a multiple that is fast."""


@dataclass(frozen=True)
class Layout:
    """Widths of what is read and written, by site.

    Attributes:
        reads: width of each site that is read.
        writes: width of each site that is written.
    """

    reads: tuple[int, ...]
    writes: tuple[int, ...]

    @classmethod
    def of(cls, config: TrainConfig, widths: Mapping[str, int]) -> Layout:
        """From the widths of a source's sites.

        Raises:
            DataError: the source lacks a site.
        """
        lacking = [site for site in (*config.reads, *config.targets) if site not in widths]
        if lacking:
            raise DataError(
                f"The activations have no site {lacking[0]!r}.", remedy=f"They have {', '.join(map(repr, widths))}."
            )
        return cls(tuple(widths[site] for site in config.reads), tuple(widths[site] for site in config.targets))


@dataclass(eq=False)
class Part:
    """Latents that read some columns and write some.

    Attributes:
        read, write: the columns.
        W_enc: [latent, read].
        W_dec: [latent, write].
        b_enc: [latent].
        extras: by name, [latent].
        shadow: what the product takes: W_enc itself in float32; in bfloat16 [latent, read + 32], W_enc, b_enc in two
            columns (its rounded value and what rounding lost), and zeros.
        low_dec: W_dec in the type of the product (W_dec itself in float32), for decoding.
        blocks: widths of the sites among the written columns, whose norms are added in a penalty.
    """

    read: slice
    write: slice
    W_enc: Float[Tensor, "latent read"]
    W_dec: Float[Tensor, "latent write"]
    b_enc: Float[Tensor, " latent"]
    extras: dict[str, Tensor]
    shadow: Tensor
    low_dec: Tensor
    blocks: tuple[int, ...]

    def latent_parameters(self) -> dict[str, Tensor]:
        """The vectors with one number a latent."""
        return {"b_enc": self.b_enc, **self.extras}

    @property
    def low(self) -> torch.dtype:
        """The type of the product."""
        return self.shadow.dtype

    @property
    def rows(self) -> Float[Tensor, "latent read"]:
        """Encoder rows in the type of the product."""
        return self.shadow[:, : self.W_enc.shape[1]]

    def refresh(self) -> None:
        """Make the shadow that of the parameters."""
        if self.shadow is self.W_enc:
            return
        wide = self.W_enc.shape[1]
        self.low_dec.copy_(self.W_dec)
        self.shadow[:, :wide].copy_(self.W_enc)
        self.shadow[:, wide].copy_(self.b_enc)
        self.shadow[:, wide + 1].copy_(self.b_enc - self.shadow[:, wide].float())

    def preactivations(
        self, x: Float[Tensor, "sample read"], out: Tensor | None = None
    ) -> Float[Tensor, "sample latent"]:
        """X . W_enc + b_enc, for `x` from `widened`: the bias is part of the product, and not a pass of its own."""
        if self.shadow is self.W_enc:
            return torch.addmm(self.b_enc, x, self.shadow.T, out=out)
        return torch.mm(x, self.shadow.T, out=out)

    def widened(self, x: Float[Tensor, "sample read"]) -> Tensor:
        """What is encoded in the type of the product, with ones where the shadow has the bias."""
        if self.shadow is self.W_enc:
            return x
        wide = x.new_zeros(len(x), self.shadow.shape[1], dtype=self.low)
        wide[:, : x.shape[1]] = x
        wide[:, x.shape[1] : x.shape[1] + 2] = 1
        return wide

    def norms(self) -> Float[Tensor, " latent"]:
        """Of decoder rows: the sum over the sites that are written."""
        return torch.stack([block.norm(dim=1) for block in self.W_dec.split(self.blocks, 1)]).sum(0)


@dataclass(eq=False)
class Parameters:
    """All parameters of one dictionary.

    Attributes:
        config, layout: what it is.
        parts: see `Part`.
        b_dec: [written].
        W_skip: [written, read], or None.
    """

    config: TrainConfig
    layout: Layout
    parts: list[Part]
    b_dec: Float[Tensor, " written"]
    W_skip: Tensor | None = None
    _names: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def make(cls, config: TrainConfig, layout: Layout) -> Parameters:
        """Starting values that depend on no data: decoder rows at random, encoder rows in their directions.

        A transcoder's decoder starts at 0 where its norm is free, so that it begins by writing the mean, and encoder
        rows are random directions.
        """
        draw = generator(config.seed, "dictionary", config.latents)
        low = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
        edges = [0]
        for width in layout.reads:
            edges.append(edges[-1] + width)
        ends = [0]
        for width in layout.writes:
            ends.append(ends[-1] + width)
        whole = [(slice(0, edges[-1]), slice(0, ends[-1]), layout.writes)]
        layered = [
            (slice(edges[i], edges[i + 1]), slice(ends[i], ends[-1]), layout.writes[i:])
            for i in range(len(layout.reads))
        ]
        parts = []
        for read, write, blocks in layered if config.cross_layer else whole:
            wide, out = read.stop - read.start, write.stop - write.start
            W_dec = normalize(torch.randn(config.latents, out, generator=draw), dim=1)
            if config.transcoder:
                W_enc = normalize(torch.randn(config.latents, wide, generator=draw), dim=1)
                if config.decoder == "free":
                    W_dec.zero_()
            else:
                W_enc = W_dec * (config.encoder_start if config.architecture in K_OF else 1.0)
            zeros = {name: torch.zeros(config.latents) for name in EXTRAS.get(config.architecture, ())}
            if THETA in zeros:
                zeros[THETA] += config.threshold
            shadow = W_enc if low == torch.float32 else torch.zeros(config.latents, wide + MARGIN, dtype=low)
            low_dec = W_dec if low == torch.float32 else torch.zeros(config.latents, out, dtype=low)
            part = Part(read, write, W_enc, W_dec, torch.zeros(config.latents), zeros, shadow, low_dec, tuple(blocks))
            part.refresh()
            parts.append(part)
        skip = torch.zeros(ends[-1], edges[-1]) if config.skip else None
        return cls(config, layout, parts, torch.zeros(ends[-1]), skip)

    def named(self) -> dict[str, Tensor]:
        """Every parameter by name."""
        if not self._names:
            out = {"b_dec": self.b_dec}
            if self.W_skip is not None:
                out["W_skip"] = self.W_skip
            for index, part in enumerate(self.parts):
                own = {"W_enc": part.W_enc, "W_dec": part.W_dec, **part.latent_parameters()}
                out |= {f"{name}.{index}": value for name, value in own.items()}
            self._names = out
        return self._names

    @torch.no_grad()
    def settle(self) -> None:
        """After a step: decoder rows to norm 1 where they are kept so, thresholds at 0 at least, fresh copies."""
        for part in self.parts:
            if self.config.decoder == "unit":
                part.W_dec.div_(part.W_dec.norm(dim=1, keepdim=True).clamp_(min=1e-12))
            if THETA in part.extras:
                part.extras[THETA].clamp_(min=0)
            part.refresh()
