"""compile_program: from a program to a model whose circuit is known, checked before it is handed over.

Steps: sets of values, a run of the program on inputs (all of them where there are few), lowering, layout, weights, a
run of the model on inputs against the program's own meaning.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tomoscope.errors import DataError, ModelError
from tomoscope.model.opening import build_subject
from tomoscope.phantoms.compiled.circuit import Circuit, only_bos, trace_circuit
from tomoscope.phantoms.compiled.domains import Domains
from tomoscope.phantoms.compiled.interpret import EXHAUSTIVE, Interpreter, some_inputs
from tomoscope.phantoms.compiled.lower import lower
from tomoscope.phantoms.compiled.rasp import Constant, SOp, order
from tomoscope.phantoms.compiled.stream import MAX_WIDTH, BasisKind, Stream
from tomoscope.phantoms.compiled.tokenizer import BOS, PAD, VALUE, Words, make_tokenizer, make_words
from tomoscope.phantoms.compiled.weights import (
    LOGIT,
    Shape,
    make_config,
    make_model,
    make_stream,
    place_heads,
    without_bos,
)
from tomoscope.phantoms.phantom import Card, Known, Specimen

TOLERANCE = {"float64": 1e-6, "float32": 1e-2}
"""How near logits must be to the program's answer, in units of one answer."""
_CHECKED = 400
"""Inputs on which a model is compared with its program before it is handed over; tests compare all."""
_ROWS = 2048


@dataclass(frozen=True)
class Compiled(Specimen):
    """A program compiled to weights: a specimen that can also be asked for its answers.

    `data` has "pairs" only where a phantom made them. `stream` says where each variable stands.
    """

    program: SOp = field(kw_only=True)
    words: Words = field(kw_only=True)
    shape: Shape = field(kw_only=True)
    circuit: Circuit = field(kw_only=True)
    stream: Stream = field(kw_only=True)
    exhaustive: bool = field(kw_only=True)
    """Whether every input was run while compiling, so that no edge is there for a case that never comes."""

    @property
    def model(self) -> Any:
        """The GPT2LMHeadModel."""
        return self.subject.model

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, BOS and PAD included."""
        return self.subject.tokenizer

    @cached_property
    def interpreter(self) -> Interpreter:
        """The program's own meaning, without weights."""
        return Interpreter(self.program, causal=self.shape.causal)

    def expected(self, prompt: str | Sequence[Hashable]) -> list[Any]:
        """What the program means on a prompt: its value at each token; None is no value."""
        return self.interpreter(self.words.parse(prompt, self.shape.max_length))

    def logits(self, prompts: Sequence[str | Sequence[Hashable]]) -> list[Tensor]:
        """Logits [position, vocab] of each prompt, BOS's left out."""
        rows = [self.words.parse(prompt, self.shape.max_length) for prompt in prompts]
        return run_model(self.model, self.words, rows)

    def answers(self, prompts: Sequence[str | Sequence[Hashable]]) -> list[list[Any]]:
        """What the model answers at each token of each prompt: a category, None, or a number."""
        return [decode(self.words, logits) for logits in self.logits(prompts)]

    def save(self, directory: str | Path) -> None:
        """Write weights (safetensors), config and tokenizer; `open_model(directory)` opens them. And card.json."""
        self.model.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)
        (Path(directory) / "card.json").write_text(self.card.to_json(), encoding="utf-8")


@torch.no_grad()
def run_model(model: Any, words: Words, rows: Sequence[Sequence[Hashable]]) -> list[Tensor]:
    """Logits [position, vocab] of inputs, BOS's left out, in batches padded on the right."""
    bos, pad = words.texts.index(BOS), words.texts.index(PAD)
    out: list[Tensor] = []
    for start in range(0, len(rows), _ROWS):
        ids = [[bos, *(words.vocabulary[value] for value in row)] for row in rows[start : start + _ROWS]]
        longest = max(map(len, ids))
        padded = torch.tensor([[*row, *[pad] * (longest - len(row))] for row in ids], device=model.device)
        logits = model(input_ids=padded, attention_mask=(padded != pad).long()).logits
        out += [one[1 : len(row)] for one, row in zip(logits, ids, strict=True)]
    return out


def decode(words: Words, logits: Tensor) -> list[Any]:
    """Answers at each position of logits [position, vocab]: the best category if it is on, else None; or the number."""
    if not words.answers:
        return logits[:, words.texts.index(VALUE)].tolist()
    values, ids = list(words.answers), list(words.answers.values())
    best = logits[:, ids].max(dim=-1)
    pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
    return [values[index] if value > LOGIT / 2 else None for value, index in pairs]


def compile_program(
    program: SOp,
    *,
    vocabulary: Sequence[Hashable],
    max_length: int,
    causal: bool = False,
    seed: int = 0,
    name: str = "",
    extra_heads: int = 0,
    extra_neurons: int = 0,
    basis: BasisKind = "axes",
    dtype: str = "float64",
) -> Compiled:
    """Compile a program to a GPT-2 model that computes it exactly.

    Args:
        program: made of the operations of this package.
        vocabulary: the tokens; their texts are `str(token)`. A string is its letters.
        max_length: the most tokens of an input, BOS not counted.
        causal: whether a position sees only itself and those before it.
        seed: order of dimensions, heads and neurons, the rotation, the distractors' weights.
        name: the program's name, for the card.
        extra_heads: distracting heads a layer, which write where nobody reads.
        extra_neurons: distracting neurons a layer.
        basis: "axes" has a dimension a direction, "rotated" spreads each over all.
        dtype: "float64" (answers within 1e-6, in fact about 1e-8), or "float32" (within 1e-2).

    Raises:
        DataError: a program that can't be compiled exactly, or one whose copies are ambiguous; it says why.
    """
    vocabulary = tuple(dict.fromkeys(vocabulary)) if isinstance(vocabulary, str) else tuple(vocabulary)
    _check_arguments(program, max_length, dtype)
    shape = Shape(max_length, causal, extra_heads, extra_neurons, basis, dtype)
    domains = Domains(vocabulary, max_length)
    words = make_words(vocabulary, None if program.numerical else domains(program))
    _check_sizes(program, domains)
    interpreter = Interpreter(program, causal=causal)
    inputs, exhaustive = some_inputs(vocabulary, max_length, most=EXHAUSTIVE, seed=seed)
    meant = [interpreter(row) for row in inputs]
    network = lower(program, domains, empty=interpreter.empty if exhaustive else None)
    generator = np.random.default_rng(seed)
    placed, n_heads = place_heads(network, shape, generator)
    stream = make_stream(network, placed, n_heads, shape, generator)
    config = make_config(network, words, shape, n_heads=n_heads, d_model=len(stream.basis.constant))
    model = make_model(network, stream, placed, words, shape, config, generator)
    sample = Random(f"{seed}:check").sample(range(len(inputs)), min(_CHECKED, len(inputs)))
    error = largest_error(model, words, [inputs[i] for i in sample], [meant[i] for i in sample])
    if not error < TOLERANCE[dtype]:
        raise ModelError(
            f"The compiled model is off its program by {error:.2g}; at most {TOLERANCE[dtype]:g} is allowed.",
            remedy="Its values may be too many or too close for the type; use float64, or a smaller max_length.",
        )
    circuit = trace_circuit(network, placed)
    if exhaustive:
        idle = []
        for edge in only_bos(circuit, network):
            with without_bos(model, edge[1], stream, network):
                if largest_error(model, words, inputs, meant) < TOLERANCE[dtype]:
                    idle.append(edge)
        circuit = replace(circuit, idle=tuple(idle))
    name = name or program.name or "program"
    card = Card(name, seed, _description(name, vocabulary, shape), (Known("circuit", circuit.to_json()),))
    subject = build_subject(model, tokenizer=make_tokenizer(words, config.n_positions), name=name)
    return Compiled(
        subject, card, {}, program=program, words=words, shape=shape, circuit=circuit, stream=stream,
        exhaustive=exhaustive,
    )  # fmt: skip


def largest_error(
    model: Any, words: Words, inputs: Sequence[Sequence[Hashable]], meant: Sequence[Sequence[Any]]
) -> float:
    """The largest difference of a model's answers from those that are meant: of numbers, or of one-hot answers."""
    logits = torch.cat(run_model(model, words, inputs))
    right = target(words, [answer for row in meant for answer in row]).to(logits)
    return float((logits - right).abs().max()) / (LOGIT if words.answers else 1.0)


def target(words: Words, answers: Sequence[Any]) -> Tensor:
    """The logits [position, vocab] that answers stand for."""
    out = torch.zeros(len(answers), len(words.texts), dtype=torch.float64)
    if not words.answers:
        out[:, words.texts.index(VALUE)] = torch.tensor([float(answer) for answer in answers], dtype=torch.float64)
        return out
    rows = [row for row, answer in enumerate(answers) if answer is not None]
    out[rows, [words.answers[answers[row]] for row in rows]] = LOGIT
    return out


def _check_arguments(program: Any, max_length: int, dtype: str) -> None:
    if not isinstance(program, SOp):
        raise DataError(
            f"The program is {program!r}, not a sequence operation.",
            remedy="Give an operation, for example aggregate(select(...), tokens).",
        )
    if max_length < 1:
        raise DataError(f"max_length is {max_length}.", remedy="Give at least 1.")
    if dtype not in TOLERANCE:
        raise DataError(f"dtype is {dtype!r}.", remedy=f"It is one of {', '.join(TOLERANCE)}.")


def _check_sizes(program: SOp, domains: Domains) -> None:
    """Refuse what can't fit before the program is run on thousands of inputs."""
    sizes = {sop: len(domains(sop)) for sop in order(program) if not sop.numerical and not isinstance(sop, Constant)}
    if sum(sizes.values()) > MAX_WIDTH:
        largest = sorted(sizes, key=lambda sop: -sizes[sop])[:3]
        listed = ", ".join(f"{sop.name or type(sop).__name__} ({sizes[sop]})" for sop in largest)
        raise DataError(
            f"The program's values need {sum(sizes.values())} dimensions of the stream, and {MAX_WIDTH} is the most; "
            f"the largest are {listed}.",
            remedy="Give a smaller vocabulary or max_length, or map to fewer categories.",
        )


def _description(name: str, vocabulary: Sequence[Hashable], shape: Shape) -> str:
    direction = "causal" if shape.causal else "bidirectional"
    return (
        f"The program {name} compiled to exact weights of GPT-2 with ReLU ({direction} attention), for up to "
        f"{shape.max_length} of the tokens {' '.join(map(str, vocabulary))}. The circuit is every edge by which a part "
        f"reads what another has written, and there are no others. Each of {shape.extra_heads} extra heads and "
        f"{shape.extra_neurons} extra neurons a layer writes where nobody reads."
    )
