"""Features in superposition with a known dictionary: more sparse features than dimensions, every token's code known.

Source: Elhage et al. 2022, "Toy Models of Superposition" (arXiv:2209.10652); the sampler is that of sparse dictionary
learning (Sharkey et al. 2022). Each token is a sparse combination of features: its embedding, and so the stream that
enters layer 0, is exactly codes @ dictionary. Each feature is active by chance p, independent of every other, with a
strength drawn between 0.5 and 1.5.

Known in closed form: the best linear recovery of codes that are independent and of equal variance leaves the share
1 - d_model / n of their variance, whatever the dictionary (a projection of rank d_model); no unit dictionary has less
coherence than Welch's bound. Known by computing: this dictionary's coherence and mean interference.

Null: tokens drawn from the normal distribution of the same mean and covariance, in which no direction is special: a
dictionary that explains the null as well has learned the covariance and no feature.

How it can mislead: features of a trained model are correlated, of unequal frequency, and perhaps not linear; a text of
random tokens has no context. The embedding holds as many different activations as there are tokens; `sample` draws
any number of fresh ones. The layers after it write noise alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from string import ascii_lowercase

import torch
import transformers
from jaxtyping import Float
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from tomoscope.model import open_model
from tomoscope.phantoms.phantom import Card, Known, Phantom, Specimen
from tomoscope.phantoms.planted.cards import denied
from tomoscope.phantoms.planted.host import Host, Size
from tomoscope.phantoms.planted.spaces import generator_for, unit_codes
from tomoscope.phantoms.planted.words import SPECIAL

FEATURES, TOKENS, ACTIVE = 192, 4096, 0.02
LOW, HIGH = 0.5, 1.5
SIZE = Size(n_layers=2, n_heads=2, head_dim=32, d_mlp=32, context=64)
TEXTS, WORDS = 256, 32
NOISE = 0.02
SITE = "layer.0.resid_pre"

Sampler = Callable[[int, int], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Source:
    """What activations are drawn from.

    Attributes:
        dictionary: [feature, d_model], unit rows.
        active: the chance of each feature.
    """

    dictionary: Float[Tensor, "feature d_model"]
    active: float = ACTIVE

    def codes(self, n: int, generator: torch.Generator) -> Float[Tensor, "sample feature"]:
        """Sparse non-negative codes."""
        shape = (n, len(self.dictionary))
        on = torch.rand(shape, generator=generator) < self.active
        return on * (LOW + (HIGH - LOW) * torch.rand(shape, generator=generator))

    def sample(self, n: int, seed: int) -> tuple[Float[Tensor, "sample d_model"], Float[Tensor, "sample feature"]]:
        """Fresh activations and their codes."""
        codes = self.codes(n, generator_for("superposition_sample", seed))
        return codes @ self.dictionary, codes

    @property
    def moments(self) -> tuple[float, float]:
        """Mean and variance of one code."""
        mean = self.active * (LOW + HIGH) / 2
        return mean, self.active * (LOW**2 + LOW * HIGH + HIGH**2) / 3 - mean**2

    def gaussian(self, n: int, generator: torch.Generator) -> Float[Tensor, "sample d_model"]:
        """Normal activations of the same mean and covariance."""
        mean, variance = self.moments
        drawn = torch.randn(n, len(self.dictionary), generator=generator)
        return mean * self.dictionary.sum(0) + math.sqrt(variance) * drawn @ self.dictionary

    def facts(self) -> dict[str, float | int]:
        """What is known of the dictionary; see the module's docstring."""
        n, d_model = self.dictionary.shape
        cosines = (self.dictionary @ self.dictionary.T).fill_diagonal_(0.0).abs()
        return {
            "n": n, "d_model": d_model, "mean_active": self.active * n, "coherence": float(cosines.max()),
            "mean_interference": float(cosines.sum() / (n * (n - 1))),
            "welch_bound": math.sqrt((n - d_model) / (d_model * (n - 1))),
            "linear_recovery_error": 1 - d_model / n,
        }  # fmt: skip


def tight_frame(dictionary: Float[Tensor, "feature d_model"], *, steps: int = 200) -> Float[Tensor, "feature d_model"]:
    """The unit dictionary near this one whose features together fill every direction equally (D^T D = n / d I)."""
    n, d_model = dictionary.shape
    for _ in range(steps):  # to the nearest tight frame, to unit rows, and again (Tropp et al. 2005)
        left, _, right = torch.linalg.svd(dictionary, full_matrices=False)
        dictionary = torch.nn.functional.normalize(math.sqrt(n / d_model) * left @ right, dim=1)
    return dictionary


def code_tokenizer(count: int) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of `count` made-up words of three letters, set apart by spaces."""
    made = ("".join(letters) for letters in product(ascii_lowercase, repeat=3))
    vocabulary = {word: i for i, word in zip(range(count + len(SPECIAL)), (*SPECIAL, *made), strict=False)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", bos_token="<eos>", unk_token="<unk>",
        padding_side="left",
    )  # fmt: skip


def wire(seed: int, *, tight: bool = False, gaussian: bool = False) -> tuple[Host, Source, Tensor]:
    """The model, what its tokens are drawn from, and the tokens' codes [token, feature] (0 in a Gaussian twin)."""
    generator = generator_for("superposition", seed)
    dictionary = unit_codes(FEATURES, SIZE.d_model, generator)
    source = Source(tight_frame(dictionary) if tight else dictionary)
    host = Host("llama", SIZE, TOKENS + len(SPECIAL))
    host.add_noise(NOISE, generator)
    codes = torch.cat([torch.zeros(len(SPECIAL), FEATURES), source.codes(TOKENS, generator)])
    host.embedding.copy_(codes @ source.dictionary)
    if gaussian:
        codes = torch.zeros_like(codes)
        host.embedding[len(SPECIAL) :] = source.gaussian(TOKENS, generator)
    return host, source, codes


def build(seed: int, *, tight: bool = False, gaussian: bool = False) -> Specimen:
    """A Llama whose stream enters layer 0 as exactly the sum of its tokens' features.

    Args:
        seed: of dictionary, codes and texts.
        tight: a tight frame instead of independent random directions.
        gaussian: the null, activations of equal mean and covariance without features.

    Returns:
        A specimen; its data has "dictionary" [feature, d_model], "codes" [token, feature], "sample" ((n, seed) ->
        activations and codes; the null's codes are 0), and "texts" of random tokens.
    """
    host, source, codes = wire(seed, tight=tight, gaussian=gaussian)
    tokenizer = code_tokenizer(TOKENS)
    drawn = torch.randint(
        len(SPECIAL), len(codes), (TEXTS, WORDS), generator=generator_for("superposition_texts", seed)
    )

    def normal(n: int, seed: int) -> tuple[Tensor, Tensor]:
        return source.gaussian(n, generator_for("superposition_sample", seed)), torch.zeros(n, FEATURES)

    known: tuple[Known, ...] = (Known("features", {"site": SITE, **source.facts()}),)
    sample: Sampler = normal if gaussian else source.sample
    data = {
        "dictionary": source.dictionary, "codes": codes, "sample": sample,
        "texts": [" ".join(tokenizer.convert_ids_to_tokens(row)) for row in drawn.tolist()],
    }  # fmt: skip
    said = f"{FEATURES} sparse features in {SIZE.d_model} dimensions; every token's embedding is the sum of its own."
    if gaussian:
        known, said = denied(known), "Normal embeddings of the covariance that the features would have had."
    subject = open_model(host.model, tokenizer=tokenizer)
    return Specimen(subject, Card("superposition", seed, said, known), data)


PHANTOMS: tuple[Phantom, ...] = (
    Phantom(
        "superposition", "planted", "Sparse features in superposition",
        build=build, null=lambda seed: build(seed, gaussian=True),
    ),
)  # fmt: skip
