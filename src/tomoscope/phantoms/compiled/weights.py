"""From a lowered network to the weights of GPT2LMHeadModel (ReLU, untied head, float64).

Bidirectional programs set `config.is_causal = False`, which transformers honours for every decoder: the mask is
bidirectional and the kernels are told so. It is saved with the config, so a saved model opens the same.

A selected key outscores the rest by BETA, after which a softmax's leak is below float64's precision. One-hot answers
come out as logits of LOGIT and 0; a number as its own value.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tomoscope.phantoms.compiled.lower import Network
from tomoscope.phantoms.compiled.parts import Head
from tomoscope.phantoms.compiled.rasp import Indices, Tokens
from tomoscope.phantoms.compiled.stream import BasisKind, Stream, lay_out, width_of
from tomoscope.phantoms.compiled.tokenizer import BOS, PAD, VALUE, Words

BETA = 100.0
LOGIT = 10.0
MIN_POSITIONS = 8
HUM = 3
"""The first spare directions, in which all positions, attentions (by their bias) and MLPs (by theirs) write the same at
every position. Nobody reads it; opening a model finds what adds to the stream by looking, and can't see a part that
adds nothing."""
_JUNK = 4
"""Further spare directions, which distractors write and nobody reads."""


@dataclass(frozen=True)
class Shape:
    """What the model's size follows from.

    `max_length`: tokens after BOS. `extra_heads`, `extra_neurons`: a layer's distractors: heads and neurons that read
    tokens and positions at random and write directions that nobody reads.
    """

    max_length: int
    causal: bool
    extra_heads: int = 0
    extra_neurons: int = 0
    basis: BasisKind = "axes"
    dtype: str = "float64"


def place_heads(
    network: Network, shape: Shape, generator: np.random.Generator
) -> tuple[dict[Head, tuple[int, int]], int]:
    """A place (layer, head) for each head, in random order within its layer; and how many heads a layer has."""
    by_layer: list[list[Head]] = [[] for _ in range(network.n_layers)]
    for head in network.heads:
        by_layer[head.time // 2].append(head)
    n_heads = max(1, max(map(len, by_layer)) + shape.extra_heads)
    placed = {}
    for layer, heads in enumerate(by_layer):
        for head, index in zip(heads, generator.permutation(n_heads)[: len(heads)], strict=True):
            placed[head] = (layer, int(index))
    return placed, n_heads


def make_config(network: Network, words: Words, shape: Shape, *, n_heads: int, d_model: int) -> Any:
    """The GPT2Config of a network."""
    from transformers import GPT2Config

    by_layer = [0] * network.n_layers
    for neurons in network.neurons:
        by_layer[neurons.time // 2] += len(neurons.out)
    ids = {text: i for i, text in enumerate(words.texts)}
    config = GPT2Config(
        vocab_size=len(words.texts), n_positions=max(shape.max_length + 1, MIN_POSITIONS), n_embd=d_model,
        n_layer=network.n_layers, n_head=n_heads, n_inner=max(1, max(by_layer) + shape.extra_neurons),
        activation_function="relu", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, layer_norm_epsilon=1e-5,
        bos_token_id=ids[BOS], eos_token_id=None, pad_token_id=ids[PAD], tie_word_embeddings=False,
        use_cache=shape.causal,  # a position that reads those after it can't be cached
        dtype=shape.dtype,
    )  # fmt: skip
    config.is_causal = shape.causal
    return config


def make_stream(
    network: Network, placed: Mapping[Head, tuple[int, int]], n_heads: int, shape: Shape, generator: np.random.Generator
) -> Stream:
    """A stream wide enough for every variable and every head."""
    variables = [network.bos, *network.variables.values(), *(h.writes for h in network.heads)]
    variables = list(dict.fromkeys(variables))
    n_spare = HUM + (_JUNK if shape.extra_heads or shape.extra_neurons else 0)
    need = max((max(head.query.width, head.value.size) for head in placed), default=1)
    d_model = width_of(variables, n_heads, need, n_spare)
    return lay_out(
        variables, d_model, n_spare=n_spare, kind=shape.basis, dtype=shape.dtype, epsilon=1e-5,
        generator=generator,
    )  # fmt: skip


def make_model(
    network: Network,
    stream: Stream,
    placed: Mapping[Head, tuple[int, int]],
    words: Words,
    shape: Shape,
    config: Any,
    generator: np.random.Generator,
) -> Any:
    """The model, in eval mode."""
    from transformers import GPT2LMHeadModel

    torch_dtype = getattr(torch, shape.dtype)
    model = GPT2LMHeadModel(config).to(torch_dtype).eval()
    weights = {name: np.zeros(tuple(value.shape)) for name, value in model.state_dict().items()}
    for name in weights:
        if ".ln_" in name and name.endswith("weight"):
            weights[name][:] = stream.basis.gain
    _embed(weights, network, stream, words, shape)
    heads: dict[tuple[int, int], Head] = {place: head for head, place in placed.items()}
    for layer in range(config.n_layer):
        for part, direction in zip(("attn", "mlp"), stream.spare[1:HUM], strict=True):
            weights[f"transformer.h.{layer}.{part}.c_proj.bias"] += stream.basis.write[direction]
        for index in range(config.n_head):
            _Attention(weights, layer, index, config, stream).write(
                heads.get((layer, index)), network, shape, generator
            )
        _mlp(weights, layer, network, stream, shape, generator)
    _unembed(weights, network, stream, words)
    model.load_state_dict({name: torch.from_numpy(value).to(torch_dtype) for name, value in weights.items()})
    return model


@contextmanager
def without_bos(model: Any, place: str, stream: Stream, network: Network) -> Generator[None]:
    """While it lasts, a destination ("a0.h1<k>", "m2") does not read BOS."""
    layer, _, rest = place[1:].partition(".h")
    block = model.transformer.h[int(layer)]
    if place[0] == "m":
        weight, columns = block.mlp.c_fc.weight, slice(None)
    else:
        size = model.config.n_embd // model.config.n_head
        start = "qkv".index(place[-2]) * model.config.n_embd + int(rest.partition("<")[0]) * size
        weight, columns = block.attn.c_attn.weight, slice(start, start + size)
    kept = weight.detach().clone()
    write, read = (torch.from_numpy(v).to(kept) for v in (stream.write(network.bos), stream.read(network.bos)))
    with torch.no_grad():
        weight[:, columns] -= read @ (write @ kept[:, columns])
    try:
        yield
    finally:
        with torch.no_grad():
            weight.copy_(kept)


def _embed(weights: dict, network: Network, stream: Stream, words: Words, shape: Shape) -> None:
    tokens, positions = weights["transformer.wte.weight"], weights["transformer.wpe.weight"]
    tokens += stream.basis.constant
    tokens[words.texts.index(BOS)] += stream.write(network.bos)[0]
    for row, index in enumerate(words.vocabulary.values()):
        tokens[index] += stream.write(network.variables[Tokens()])[row]
    positions += stream.basis.hum
    positions[1 : shape.max_length + 1] += stream.write(network.variables[Indices()])


def _unembed(weights: dict, network: Network, stream: Stream, words: Words) -> None:
    assert network.output is not None
    head, read = weights["lm_head.weight"], stream.read(network.output).T
    if network.output.values is None:
        head[words.texts.index(VALUE)] = read[0]
        return
    for row, value in enumerate(network.output.values):
        head[words.answers[value]] = LOGIT * read[row]


class _Attention:
    """Writes one head's part of a layer's attention."""

    def __init__(self, weights: dict, layer: int, index: int, config: Any, stream: Stream) -> None:
        path = f"transformer.h.{layer}.attn"
        width, self.size = config.n_embd, config.n_embd // config.n_head
        self.joint, self.bias = weights[f"{path}.c_attn.weight"], weights[f"{path}.c_attn.bias"]
        self.out, self.stream = weights[f"{path}.c_proj.weight"], stream
        self.starts = [part * width + index * self.size for part in range(3)]
        self.first = index * self.size

    def write(self, head: Head | None, network: Network, shape: Shape, generator: np.random.Generator) -> None:
        if head is not None:
            # transformers divides scores by the root of the head's width
            factor = np.sqrt(BETA * np.sqrt(self.size))
            for start, part in zip(self.starts, (head.query, head.key), strict=False):
                self.joint[:, start : start + part.width] = factor * self.stream.reads(part)
                self.bias[start : start + part.width] = factor * part.bias
            start, size = self.starts[2], head.value.size
            self.joint[:, start : start + size] = self.stream.read(head.value)
            self.out[self.first : self.first + size] = self.stream.write(head.writes)
        elif shape.extra_heads:
            seen = _seen(network, self.stream)
            for start in self.starts:
                self.joint[:, start : start + self.size] = seen @ generator.standard_normal((seen.shape[1], self.size))
            mix = generator.standard_normal((self.size, _JUNK)) / np.sqrt(self.size)
            self.out[self.first : self.first + self.size] = mix @ self.stream.basis.write[self.stream.spare[HUM:]]


def _mlp(
    weights: dict, layer: int, network: Network, stream: Stream, shape: Shape, generator: np.random.Generator
) -> None:
    path = f"transformer.h.{layer}.mlp"
    inward, bias = weights[f"{path}.c_fc.weight"], weights[f"{path}.c_fc.bias"]
    outward, out_bias = weights[f"{path}.c_proj.weight"], weights[f"{path}.c_proj.bias"]
    parts: Sequence = [neurons for neurons in network.neurons if neurons.time // 2 == layer]
    order, start = generator.permutation(len(bias)), 0
    for neurons in parts:
        chosen = order[start : start + len(neurons.out)]
        start += len(chosen)
        inward[:, chosen] = stream.reads(neurons.reading)
        bias[chosen] = neurons.reading.bias
        outward[chosen] = neurons.out @ stream.write(neurons.writes)
        out_bias += neurons.out_bias @ stream.write(neurons.writes)
    if shape.extra_neurons:
        chosen, seen = order[start:], _seen(network, stream)
        inward[:, chosen] = seen @ generator.standard_normal((seen.shape[1], len(chosen)))
        bias[chosen] = 0.5 * generator.standard_normal(len(chosen))
        mix = generator.standard_normal((len(chosen), _JUNK)) / np.sqrt(max(1, len(chosen)))
        outward[chosen] = mix @ stream.basis.write[stream.spare[HUM:]]


def _seen(network: Network, stream: Stream) -> np.ndarray:
    """What distractors read: tokens, positions and BOS."""
    return np.concatenate(
        [stream.read(v) for v in (network.bos, network.variables[Tokens()], network.variables[Indices()])], axis=1
    )
