"""Transcoders for every layer of a model: what stands in for its MLPs in an attribution graph.

`TranscoderSet` is one dictionary a layer; in a `CrossLayerTranscoder` (Lindsey et al. 2025, "Circuit Tracing") a
feature reads one layer and writes to that layer's MLP output and to all later ones. Both answer the same questions:
the codes of a layer, the rows of its encoder, and the rows of its decoder for each layer that it writes to.

What they read is a part of the block: "mlp.in" (after the norm), "resid_mid" (the stream before it), or "normalized"
(what an RMS norm gives before its own weights; with a layer norm, its output). What they write is "mlp.out", the MLP's
contribution to the stream.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

from jaxtyping import Float, Int
from torch import Tensor

from tomoscope.errors import DataError
from tomoscope.features.activations import Activation, ReLU
from tomoscope.features.coder import Codes, SparseCoder

READS = ("mlp.in", "resid_mid", "normalized")
"""What transcoders may read; see the module's docstring."""
WRITES = ("mlp.out",)


@dataclass(frozen=True, eq=False, kw_only=True)
class Transcoders(ABC):
    """What an attribution graph asks of its dictionaries. Made as `TranscoderSet` or `CrossLayerTranscoder`.

    Attributes:
        reads: "mlp.in", "resid_mid" or "normalized".
        writes: "mlp.out".
        scan: the name under which the features are known elsewhere (a hub id).
    """

    reads: str = "mlp.in"
    writes: str = "mlp.out"
    scan: str = ""

    @abstractmethod
    def coder(self, layer: int) -> SparseCoder:
        """The encoder of a layer with its decoder into the same layer."""

    @property
    @abstractmethod
    def n_layers(self) -> int:
        """Layers."""

    @abstractmethod
    def targets(self, layer: int) -> range:
        """Layers whose MLP output the features of this layer write to."""

    @abstractmethod
    def decoder_rows(
        self, layer: int, features: Int[Tensor, " row"], to: int, like: Tensor
    ) -> Float[Tensor, "row d_model"]:
        """What one unit of some features of `layer` writes to the MLP output of layer `to`."""

    def sparse(self, layer: int, x: Float[Tensor, "sample d_model"]) -> Codes:
        """The codes of a layer that are not zero."""
        return self.coder(layer).sparse(x)

    def _check(self) -> None:
        if self.reads not in READS or self.writes not in WRITES:
            raise DataError(
                f"Transcoders that read {self.reads!r} and write {self.writes!r} are not known.",
                remedy=f"They read one of {', '.join(READS)} and write {', '.join(WRITES)}.",
            )
        if not self.n_layers:
            raise DataError("There is no transcoder in this set.")


@dataclass(frozen=True, eq=False)
class TranscoderSet(Transcoders):
    """One transcoder a layer.

    Attributes:
        coders: by layer, from 0.
    """

    coders: Sequence[SparseCoder]

    def __post_init__(self) -> None:
        self._check()
        widths = {(coder.d_in, coder.W_dec.shape[1]) for coder in self.coders}
        if len(widths) > 1:
            raise DataError(f"The transcoders of a set read and write streams of different widths: {sorted(widths)}.")

    @property
    def n_layers(self) -> int:
        """Layers."""
        return len(self.coders)

    def coder(self, layer: int) -> SparseCoder:
        """The transcoder of a layer."""
        return self.coders[layer]

    def targets(self, layer: int) -> range:
        """The layer itself."""
        return range(layer, layer + 1)

    def decoder_rows(self, layer: int, features: Tensor, to: int, like: Tensor) -> Tensor:
        """See `Transcoders`."""
        return self.coders[layer].decoder_rows(features, like)


@dataclass(frozen=True, eq=False)
class CrossLayerTranscoder(Transcoders):
    """Features that read one layer and write to all from it on.

    Attributes:
        W_enc: by layer, [d_model, feature].
        W_dec: by layer, [feature, layer_to, d_model]; entry 0 is the layer itself.
        b_enc: by layer, [feature].
        b_dec: by layer, [d_model], of what is written to it.
        activations: by layer.
        W_skip: by layer, [d_model, d_model] (x W_skip^T), or empty.
    """

    W_enc: Sequence[Float[Tensor, "d_model _"]]
    W_dec: Sequence[Float[Tensor, "_ _ d_model"]]
    b_enc: Sequence[Float[Tensor, " _"]]
    b_dec: Sequence[Float[Tensor, " d_model"]]
    activations: Sequence[Activation] = ()
    W_skip: Sequence[Float[Tensor, "d_model d_model"]] = ()
    _coders: dict[int, SparseCoder] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        self._check()
        count = self.n_layers
        fits = all(len(one) in (count, 0) for one in (self.activations, self.W_skip))
        if not fits or not len(self.W_dec) == len(self.b_enc) == len(self.b_dec) == count:
            raise DataError("A cross-layer transcoder has one encoder, decoder and bias a layer.")
        for layer, decoder in enumerate(self.W_dec):
            if decoder.dim() != 3 or decoder.shape[1] != count - layer:
                raise DataError(
                    f"W_dec of layer {layer} is {list(decoder.shape)}, not [feature, {count - layer}, d_model]: a "
                    "feature writes to its own layer and to all later ones."
                )

    @property
    def n_layers(self) -> int:
        """Layers."""
        return len(self.W_enc)

    def coder(self, layer: int) -> SparseCoder:
        """The layer's encoder, with its decoder into the same layer."""
        if layer not in self._coders:
            self._coders[layer] = SparseCoder(
                self.W_enc[layer], self.W_dec[layer][:, 0], self.b_enc[layer], self.b_dec[layer],
                self.activations[layer] if self.activations else ReLU(),
                self.W_skip[layer] if self.W_skip else None, name=f"layer {layer}",
            )  # fmt: skip
        return self._coders[layer]

    def targets(self, layer: int) -> range:
        """The layer and all later ones."""
        return range(layer, self.n_layers)

    def decoder_rows(self, layer: int, features: Tensor, to: int, like: Tensor) -> Tensor:
        """See `Transcoders`."""
        decoder = self.W_dec[layer]
        return decoder[features.to(decoder.device), to - layer].to(like)

    def reconstruct(self, codes: Sequence[Float[Tensor, "sample feature"]], to: int) -> Float[Tensor, "sample d_model"]:
        """What all features write to the MLP output of one layer, with its bias and without a skip path.

        Args:
            codes: by layer, dense.
            to: the layer written to.
        """
        out = self.b_dec[to].to(codes[0]).expand(len(codes[0]), -1)
        for layer in range(to + 1):
            out = out + codes[layer] @ self.W_dec[layer][:, to - layer].to(codes[layer])
        return out
