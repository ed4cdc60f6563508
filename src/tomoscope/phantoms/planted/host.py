"""An empty transformers model and the means to wire it: heads, neurons, embeddings, noise, in GPT-2 and in Llama form.

Every parameter starts at 0 and every norm's weight at 1; matrices are given as the field writes them (x @ W_Q), and put
where the form stores them. Weights are for the *normed* stream, whose length is sqrt(d_model) whatever was written.

Forms: "gpt2" has learned positions, LayerNorm, GELU and as many key and value heads as heads; "llama" has rotary
positions, RMSNorm, a gated SiLU and half as many key and value heads (`grouped`), which two heads share.

How it can mislead: the models are the library's own classes, so what an exam can't do here it can't do on a trained
model of that family; but a stream of a few orthogonal parts is far cleaner than a trained one, and noise of the weights
makes up for little of that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import transformers
from jaxtyping import Float
from torch import Tensor, nn

from tomoscope.errors import DataError

Form = Literal["gpt2", "llama"]
ROPE_THETA = 500_000.0
"""Llama 3's: slow enough that 40 of a head's 64 dimensions hardly turn within the context, and can hold content."""
FAST = (0.59, 0.13, 0.09, 0.11, 0.08)
"""Weights of the fastest rotary pairs that make the sharpest peak at one offset (a linear program; margin 0.31)."""
SLOW_FROM = 12
"""The first rotary pair of a head that is slow enough for content."""


@dataclass(frozen=True)
class Size:
    """Sizes of a planted model."""

    n_layers: int = 4
    n_heads: int = 4
    head_dim: int = 64
    d_mlp: int = 64
    context: int = 128

    @property
    def d_model(self) -> int:
        """Width of the stream: the heads side by side, as GPT-2 has it."""
        return self.n_heads * self.head_dim


def empty_model(form: Form, size: Size, vocab: int) -> nn.Module:
    """A model of this form without weights: parameters 0, norms' weights 1."""
    shared: dict[str, Any] = {
        "vocab_size": vocab, "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
    }  # fmt: skip
    if form == "gpt2":
        config: Any = transformers.GPT2Config(
            n_embd=size.d_model, n_layer=size.n_layers, n_head=size.n_heads, n_inner=size.d_mlp,
            n_positions=size.context, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **shared,
        )  # fmt: skip
        kind: Any = transformers.GPT2LMHeadModel
    elif form == "llama":
        config = transformers.LlamaConfig(
            hidden_size=size.d_model, num_hidden_layers=size.n_layers, num_attention_heads=size.n_heads,
            num_key_value_heads=size.n_heads // 2, head_dim=size.head_dim, intermediate_size=size.d_mlp,
            max_position_embeddings=size.context, rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
            **shared,
        )  # fmt: skip
        kind = transformers.LlamaForCausalLM
    else:
        raise DataError(f"There is no form {form!r} of planted models.", remedy="It is 'gpt2' or 'llama'.")
    state = torch.random.get_rng_state()  # the library draws initial weights; the caller's random state stays
    model = kind(config).eval()
    torch.random.set_rng_state(state)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        parameter.fill_(1.0 if is_norm(name) and name.endswith("weight") else 0.0)
    return model


def is_norm(name: str) -> bool:
    """Whether a parameter of either form is a norm's."""
    return ".ln_" in name or "norm" in name


class Host:
    """A model that is being wired.

    Attributes:
        form, size: see the module's docstring.
        model: the transformers model.
        group: how many heads share a key and value head.
    """

    def __init__(self, form: Form, size: Size, vocab: int) -> None:
        self.form, self.size = form, size
        self.model = empty_model(form, size, vocab)
        self.group = 1 if form == "gpt2" else 2

    @property
    def embedding(self) -> Float[Tensor, "vocab d_model"]:
        """Token embedding, to be written in place."""
        return self.model.get_input_embeddings().weight  # ty: ignore[not-callable]

    @property
    def positions(self) -> Float[Tensor, "context d_model"]:
        """Learned positions, to be written in place (GPT-2 form only)."""
        return self.model.transformer.wpe.weight  # ty: ignore

    @property
    def unembedding(self) -> Float[Tensor, "vocab d_model"]:
        """Unembedding as stored, a row for each token."""
        return self.model.lm_head.weight  # ty: ignore

    def block(self, layer: int) -> Any:
        """The block's module."""
        return self.model.transformer.h[layer] if self.form == "gpt2" else self.model.model.layers[layer]  # ty: ignore

    def head(
        self,
        layer: int,
        head: int,
        *,
        query: Float[Tensor, "d_model width"] | None = None,
        key: Float[Tensor, "d_model width"] | None = None,
        value: Float[Tensor, "d_model width"] | None = None,
        output: Float[Tensor, "width d_model"] | None = None,
    ) -> None:
        """Set what one head reads and writes; narrower matrices are put first and the rest stays as it is.

        Keys and values of a head that shares them are set for those it shares them with, too.
        """
        width, attention = self.size.head_dim, self.block(layer)
        given = (("q", query, head), ("k", key, head // self.group), ("v", value, head // self.group))
        for part, matrix, place in given:
            if matrix is None:
                continue
            columns = slice(place * width, place * width + matrix.shape[1])
            if self.form == "gpt2":
                shift = "qkv".index(part) * self.size.d_model
                attention.attn.c_attn.weight[:, columns.start + shift : columns.stop + shift] = matrix
            else:
                getattr(attention.self_attn, f"{part}_proj").weight[columns] = matrix.T
        if output is not None:
            rows = slice(head * width, head * width + len(output))
            if self.form == "gpt2":
                attention.attn.c_proj.weight[rows] = output
            else:
                attention.self_attn.o_proj.weight[:, rows] = output.T

    def neuron(
        self,
        layer: int,
        index: int,
        *,
        read: Float[Tensor, " d_model"],
        write: Float[Tensor, " d_model"],
        gate: Float[Tensor, " d_model"],
    ) -> None:
        """Set one neuron: `read` decides whether it fires, and in Llama form `gate` scales what it then says."""
        block = self.block(layer)
        if self.form == "gpt2":
            block.mlp.c_fc.weight[:, index] = read
            block.mlp.c_proj.weight[index] = write
        else:
            block.mlp.gate_proj.weight[index] = read
            block.mlp.up_proj.weight[index] = gate
            block.mlp.down_proj.weight[:, index] = write

    def activation(self, pre: float, gate: float = 1.0) -> float:
        """What a neuron's value is for this reading."""
        x = torch.tensor(pre, dtype=torch.float64)
        if self.form == "gpt2":
            return float(nn.functional.gelu(x, approximate="tanh"))
        return float(nn.functional.silu(x)) * gate

    def content_columns(self, width: int) -> Tensor:
        """Columns of a head in which content keeps through rotation, `width` of them."""
        if self.form == "gpt2":
            return torch.arange(width)
        half = self.size.head_dim // 2
        pairs = torch.arange(half - 1, half - 1 - width // 2, -1)
        if width % 2 or int(pairs[-1]) < SLOW_FROM:
            raise DataError(f"A rotary head of {self.size.head_dim} dimensions can't hold {width} of content.")
        return torch.cat([pairs, pairs + half])

    def placed(self, matrix: Float[Tensor, "d_model width"]) -> Float[Tensor, "d_model head_dim"]:
        """A query's or key's columns put where content keeps through rotation."""
        out = torch.zeros(len(matrix), self.size.head_dim)
        out[:, self.content_columns(matrix.shape[1])] = matrix
        return out

    @property
    def content(self) -> int:
        """How many dimensions of content a query can hold."""
        return self.size.head_dim if self.form == "gpt2" else 2 * (self.size.head_dim // 2 - SLOW_FROM)

    def add_noise(self, std: float, generator: torch.Generator, *, only: tuple[str, ...] = ("",)) -> None:
        """Add Gaussian noise to every weight whose name holds one of `only`; norms stay."""
        for name, parameter in self.model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)  # drawn always: what is left out shifts nothing
            if not is_norm(name) and any(part in name for part in only):
                parameter.add_(std * drawn)


def rotary_offset(host: Host, offset: int) -> tuple[Tensor, Tensor]:
    """A constant query and key [head_dim], of length 1, whose product after rotary peaks at one offset (Llama form)."""
    half = host.size.head_dim // 2
    speed = ROPE_THETA ** (-torch.arange(len(FAST), dtype=torch.float64) / half)
    lengths = torch.tensor(FAST, dtype=torch.float64).sqrt()
    query, key = torch.zeros(2 * half), torch.zeros(2 * half)
    # a query at place i is turned by i x speed: turned back by offset x speed, it meets the key at i - offset
    query[: len(FAST)] = (lengths * (speed * offset).cos()).float()
    query[half : half + len(FAST)] = (-lengths * (speed * offset).sin()).float()
    key[: len(FAST)] = lengths.float()
    return query, key


def balanced(score: float, head_dim: int, reading: float) -> float:
    """The gain of both query and key at which unit codes read at this length score `score` after scaling."""
    return math.sqrt(score * math.sqrt(head_dim)) / reading
