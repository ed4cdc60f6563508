"""One dictionary: an encoder that says which features are there, and a decoder that says what they write.

    coder.encode(x)                x [.., d_in] -> codes [.., feature]
    coder.decode(codes, x)         -> [.., d_out]
    coder.sparse(x)                the codes that are not zero, without keeping the dense ones

A sparse autoencoder reads and writes the same site; a transcoder reads an MLP's input and writes its output, perhaps
with a linear skip path. How it can mislead: a code is a direction's share of this input by this dictionary, and another
dictionary as good shares few of them; what the dictionary misses (the error) is part of the model all the same.

Sources: Bricken et al. 2023; Cunningham et al. 2023 (arXiv:2309.08600); Dunefsky et al. 2024 (transcoders,
arXiv:2406.11944); Paulo et al. 2025 (skip transcoders, arXiv:2501.18823).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tomoscope.errors import DataError
from tomoscope.features.activations import Activation, JumpReLU, ReLU

PIECE = 2**24
"""Pre-activations held at once."""


@dataclass(frozen=True, eq=False)
class Codes:
    """The codes of some samples that are not zero, in the order of samples and features.

    Attributes:
        sample: [entry], which sample (the position in a prompt).
        feature: [entry].
        value: [entry].
        n_samples: how many samples there were.
    """

    sample: Int[Tensor, " entry"]
    feature: Int[Tensor, " entry"]
    value: Float[Tensor, " entry"]
    n_samples: int

    def __len__(self) -> int:
        return len(self.value)


@dataclass(frozen=True, eq=False)
class SparseCoder:
    """One dictionary. Tensors may be memory-mapped and in half precision: rows are cast where they are used.

    Attributes:
        W_enc: [d_in, feature].
        W_dec: [feature, d_out]; a feature's row is what one unit of it writes.
        b_enc: [feature].
        b_dec: [d_out].
        activation: from pre-activations to codes.
        W_skip: [d_out, d_in], a linear path beside the features (x W_skip^T), or None.
        centred: b_dec is taken from the input before encoding (sparse autoencoders).
        reads: the site that is encoded ("layer.3.mlp.in"), "" where not said.
        writes: the site that is reconstructed ("layer.3.mlp.out").
        name: where it came from.
    """

    W_enc: Float[Tensor, "d_in feature"]
    W_dec: Float[Tensor, "feature d_out"]
    b_enc: Float[Tensor, " feature"]
    b_dec: Float[Tensor, " d_out"]
    activation: Activation = field(default_factory=ReLU)
    W_skip: Float[Tensor, "d_out d_in"] | None = None
    centred: bool = False
    reads: str = ""
    writes: str = ""
    name: str = ""

    def __post_init__(self) -> None:
        (d_in, n), (m, d_out) = self.W_enc.shape, self.W_dec.shape
        skip = self.W_skip is None or self.W_skip.shape == (d_out, d_in)
        jump = not isinstance(self.activation, JumpReLU) or self.activation.threshold.shape == (n,)
        if n != m or self.b_enc.shape != (n,) or self.b_dec.shape != (d_out,) or not skip or not jump:
            raise DataError(
                f"The dictionary {self.name or ''} has parts that do not fit: W_enc {[d_in, n]}, W_dec {[m, d_out]}, "
                f"b_enc {list(self.b_enc.shape)}, b_dec {list(self.b_dec.shape)}.",
                remedy="W_enc is [d_in, feature] and W_dec [feature, d_out]; some formats store them transposed.",
            )
        if self.centred and d_in != d_out:
            raise DataError("A dictionary that takes b_dec from its input reads what it writes.")

    @property
    def n_features(self) -> int:
        """Features."""
        return self.W_enc.shape[1]

    @property
    def d_in(self) -> int:
        """Width of what is read."""
        return self.W_enc.shape[0]

    # ---- codes

    def preactivations(self, x: Float[Tensor, "*sample d_in"]) -> Float[Tensor, "*sample feature"]:
        """What the activation is applied to."""
        shifted = x - self.b_dec.to(x) if self.centred else x
        return shifted @ self.W_enc.to(x) + self.b_enc.to(x)

    def encode(self, x: Float[Tensor, "*sample d_in"]) -> Float[Tensor, "*sample feature"]:
        """Codes, dense."""
        return self.activation(self.preactivations(x))

    def sparse(self, x: Float[Tensor, "sample d_in"]) -> Codes:
        """The codes that are not zero; of the dense ones only a piece is held at a time."""
        samples, features, values = [], [], []
        step = max(1, PIECE // self.n_features)
        for start in range(0, len(x), step):
            codes = self.encode(x[start : start + step])
            sample, feature = codes.nonzero(as_tuple=True)
            samples.append(sample + start)
            features.append(feature)
            values.append(codes[sample, feature])
        if not samples:
            none = torch.zeros(0, dtype=torch.long, device=x.device)
            return Codes(none, none, x.new_zeros(0), 0)
        return Codes(torch.cat(samples), torch.cat(features), torch.cat(values), len(x))

    # ---- reconstructions

    def decode(
        self, codes: Float[Tensor, "*sample feature"], x: Float[Tensor, "*sample d_in"] | None = None
    ) -> Float[Tensor, "*sample d_out"]:
        """The reconstruction; `x` is needed where there is a skip path.

        Raises:
            DataError: a skip path and no `x`.
        """
        out = codes @ self.W_dec.to(codes) + self.b_dec.to(codes)
        if self.W_skip is None:
            return out
        if x is None:
            raise DataError("This dictionary has a skip path, so decoding needs what was encoded.")
        return out + x @ self.W_skip.to(x).T

    def __call__(self, x: Float[Tensor, "*sample d_in"]) -> Float[Tensor, "*sample d_out"]:
        """Encode and decode."""
        return self.decode(self.encode(x), x)

    # ---- rows, cast to a type

    def encoder_rows(self, features: Int[Tensor, " row"], like: Tensor) -> Float[Tensor, "row d_in"]:
        """Encoder directions of some features, in the type and on the device of `like`."""
        return self.W_enc.index_select(1, features.to(self.W_enc.device)).T.to(like)

    def decoder_rows(self, features: Int[Tensor, " row"], like: Tensor) -> Float[Tensor, "row d_out"]:
        """Decoder directions of some features."""
        return self.W_dec[features.to(self.W_dec.device)].to(like)

    def biases(self, features: Int[Tensor, " row"], like: Tensor) -> Float[Tensor, " row"]:
        """What is added to x @ W_enc for some features, the input's centring included."""
        out = self.b_enc[features.to(self.b_enc.device)].to(like)
        return out - self.encoder_rows(features, like) @ self.b_dec.to(like) if self.centred else out

    def __repr__(self) -> str:
        kind = type(self.activation).__name__
        skip = ", skip" if self.W_skip is not None else ""
        return f"SparseCoder({self.name or self.writes}: {self.n_features:,} features, {kind}{skip})"
