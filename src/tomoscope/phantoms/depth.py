"""Where in depth, and in which basis, the next token stands: GPT-2s of which one block writes the answer.

For lenses, which read the stream as if it were the last. The stream has parts that the others can't reach:

    told    the token itself, a random code; attention writes nothing, so what is predicted follows from the token
    hidden  a place that the output does not read
    said    the only place that the output reads
    noise   what the other blocks write; nothing reads it

- `written`: one block before the last says the next token (a random function of the token) where the output reads it:
  before that block the lens sees nothing, after it everything. In the null the last block is the one.
- `rotated`: the first block writes the same into the hidden place, and the last block moves it, by a linear map, to
  where the output reads it: a lens without a translator sees nothing before the end, one with an affine translator can
  see it all. In the null the embedding says the next token at once, where the output reads it, and every lens is right
  from the start. (Here the last block does the moving, so the plain lens's claim is denied.)

How it can mislead: a trained model refines its prediction block by block; here it is there or not. What is written
depends on one token, so the text that such a model writes is a random walk.

Source: nostalgebraist 2020, "interpreting GPT: the logit lens"; Belrose et al. 2023 (arXiv:2303.08112).
"""

from __future__ import annotations

import zlib
from typing import Any

import torch
import transformers
from jaxtyping import Float
from torch import Tensor

from tomoscope.model import open_model
from tomoscope.phantoms.phantom import Card, Known, Phantom, Specimen

VOCAB, LAYERS, TOLD, PLACE, NOISE = 200, 6, 64, 40, 24
D_MODEL = TOLD + 2 * PLACE + NOISE
D_MLP = 160
WRITTEN, LOGITS = 3.0, 2.5
"""Size of what is written, against 1 for the token's code; spread of the logits."""
SPACES = {
    "told": slice(0, TOLD), "hidden": slice(TOLD, TOLD + PLACE), "said": slice(TOLD + PLACE, TOLD + 2 * PLACE),
    "noise": slice(TOLD + 2 * PLACE, D_MODEL),
}  # fmt: skip


class Empty:
    """A GPT-2 without weights, and the means to let a block write.

    The stream is written in a random orthonormal basis, so that no dimension is a part by itself.
    """

    def __init__(self, seed: int, name: str) -> None:
        self.generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {seed}".encode()))
        config = transformers.GPT2Config(
            n_embd=D_MODEL, n_layer=LAYERS, n_head=4, n_positions=64, n_inner=D_MLP, vocab_size=VOCAB,
            tie_word_embeddings=False, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=0,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            self.model = transformers.GPT2LMHeadModel(config).eval()
        for parameter_name, parameter in self.model.named_parameters():
            parameter.requires_grad_(False)
            parameter.fill_(1.0 if ".ln_" in parameter_name and parameter_name.endswith("weight") else 0.0)
        # every part is orthogonal to the vector of ones, which the norm takes away
        drawn = self.normal(D_MODEL, D_MODEL)
        drawn -= drawn.mean(0, keepdim=True)
        self.basis = torch.linalg.qr(drawn[:, : D_MODEL - 1])[0]

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers of this seed."""
        return torch.randn(*shape, generator=self.generator)

    def space(self, name: str) -> Float[Tensor, "d_model width"]:
        """A part of the stream."""
        return self.basis[:, SPACES[name]]

    def embed(self, name: str, codes: Float[Tensor, "vocab width"]) -> None:
        """Add codes of the tokens to a part of the embedding."""
        self.model.transformer.wte.weight += codes @ self.space(name)[:, : codes.shape[1]].T

    def output(self) -> None:
        """Let the output read "said"."""
        width = self.space("said").shape[1]
        rows = self.normal(VOCAB, width) / width**0.5
        self.model.lm_head.weight.copy_(LOGITS * rows @ self.space("said").T)

    def function(self, layer: int, name: str, size: float) -> None:
        """Let a block's MLP write a random function of the token into a part of the stream."""
        mlp, to = self.block(layer), self.space(name)
        mlp.c_fc.weight.copy_(self.space("told") @ self.normal(TOLD, D_MLP) / TOLD**0.5 * 2)
        mlp.c_proj.weight.copy_(size * self.normal(D_MLP, to.shape[1]) @ to.T / D_MLP**0.5)

    def move(self, layer: int, size: float) -> None:
        """Let a block's MLP copy "hidden" to "said", turned: gelu(x) - gelu(-x) is x, so that the map is linear."""
        mlp, source, to = self.block(layer), self.space("hidden"), self.space("said")
        turn = torch.linalg.qr(self.normal(PLACE, PLACE))[0]
        mlp.c_fc.weight[:, : 2 * PLACE] = torch.cat([source, -source], dim=1)
        mlp.c_proj.weight[: 2 * PLACE] = size * torch.cat([turn @ to.T, -turn @ to.T])

    def block(self, layer: int) -> Any:
        """A block's MLP."""
        return self.model.transformer.h[layer].mlp


def _told(empty: Empty) -> None:
    empty.embed("told", empty.normal(VOCAB, TOLD))
    empty.output()


def _noise(empty: Empty, but: set[int]) -> None:
    for layer in set(range(LAYERS)) - but:
        empty.function(layer, "noise", 0.5)


def written(seed: int, *, last: bool = False) -> Specimen:
    """One block says the next token where the output reads it: one before the last, or (`last`) the last one."""
    empty = Empty(seed, "written")
    layer = LAYERS - 1 if last else int(torch.randint(LAYERS - 1, (1,), generator=empty.generator))
    _told(empty)
    empty.function(layer, "said", WRITTEN)
    _noise(empty, {layer})
    known = Known("formed", {} if last else {"after": layer}, holds=not last)
    said = f"Block {layer} of {LAYERS} says the next token; the others write what nothing reads."
    return Specimen(open_model(empty.model), Card("written", seed, said, (known,)))


def rotated(seed: int) -> Specimen:
    """The next token stands in a hidden place from the first block on, and the last block moves it to the output."""
    empty = Empty(seed, "rotated")
    _told(empty)
    empty.function(0, "hidden", WRITTEN)
    empty.move(LAYERS - 1, WRITTEN)
    _noise(empty, {0, LAYERS - 1})
    said = "Block 0 says the next token in a place that the output does not read; the last block moves it, linearly."
    known = (Known("rotated", {"from": 0, "to": LAYERS - 1}), Known("formed", {}, holds=False))
    return Specimen(open_model(empty.model), Card("rotated", seed, said, known))


def plain(seed: int) -> Specimen:
    """The embedding says the next token where the output reads it; no block adds to that."""
    empty = Empty(seed, "rotated")
    _told(empty)
    empty.embed("said", WRITTEN * empty.normal(VOCAB, PLACE) / 2)
    _noise(empty, set())
    known = Known("rotated", {}, holds=False)
    said = "The embedding says the next token where the output reads it, and no block adds to that."
    return Specimen(open_model(empty.model), Card("rotated", seed, said, (known,)))


PHANTOMS: tuple[Phantom, ...] = (
    Phantom("written", "planted", "The block that says the next token", written, lambda seed: written(seed, last=True)),
    Phantom("rotated", "planted", "The next token in another basis", rotated, plain),
)
"""The phantoms of depth."""
