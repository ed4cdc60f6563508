"""The compiled phantoms: a program each, with pairs of prompts on which patching and circuit discovery have a task.

The seed varies which tokens the vocabulary has, the places of heads and neurons, the order of the stream's dimensions,
the distractors' weights, and (odd seeds) rotates the stream, so that no direction is a dimension. `null` is the same
architecture and tokenizer with random weights, and the same pairs.

How they can mislead: compiled weights are cleaner than trained ones. Every part does one thing, attention is all or
nothing, nothing is in superposition, no two parts do the same, and steps have no gradient; a method that finds these
circuits may miss a trained model's, and one that follows gradients may do better on a trained model than here.

`Specimen.data["pairs"]` is a PairSet: clean and corrupted prompts that differ in one token, and whose answers at the
last position differ. The answer stands *at* the last token and is read from its logits, as a next token would be.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import torch

from tomoscope.data.pairs import Pair, PairSet
from tomoscope.errors import DataError
from tomoscope.model.opening import build_subject
from tomoscope.phantoms.compiled import programs
from tomoscope.phantoms.compiled.compiler import Compiled, compile_program
from tomoscope.phantoms.compiled.rasp import SOp
from tomoscope.phantoms.compiled.tokenizer import VALUE, ZERO, make_tokenizer
from tomoscope.phantoms.phantom import Card, Known, Phantom, Specimen

WORDS = tuple("abcdefghijklmnopqrstuvwxyz")
_PAIRS = 64
_TRIES = 200


@dataclass(frozen=True)
class Recipe:
    """How one phantom is made: its program for a vocabulary, and the vocabulary for a seed."""

    name: str
    title: str
    program: Callable[[Sequence[Hashable]], SOp]
    vocabulary: Callable[[Random], Sequence[Hashable]]
    max_length: int
    causal: bool = False
    roles: tuple[tuple[str, str], ...] = ()
    """Roles of heads: (name of the role, variable that the head writes)."""

    def specimen(self, seed: int) -> Specimen:
        """The compiled model with its pairs."""
        compiled = self._compile(seed)
        circuit, *rest = compiled.card.known
        known = (circuit, *self._roles(compiled), *rest)
        card = replace(compiled.card, known=known)
        return replace(compiled, card=card, data={"pairs": make_pairs(compiled, _PAIRS, seed=seed)})

    def null(self, seed: int) -> Specimen:
        """The same architecture, tokenizer and pairs; the weights are as transformers draws them at the start."""
        from transformers import GPT2LMHeadModel

        compiled = self._compile(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = GPT2LMHeadModel(compiled.model.config).to(compiled.model.dtype).eval()
        known = (*compiled.card.known, *self._roles(compiled))
        card = Card(
            f"{self.name}_null",
            seed,
            f"The architecture and tokenizer of {self.name} with random weights: it computes no program.",
            tuple(Known(one.kind, one.value, holds=False) for one in known),
        )
        tokenizer = make_tokenizer(compiled.words, model.config.n_positions)
        subject = build_subject(model, tokenizer=tokenizer, name=card.name)
        return Specimen(subject, card, {"pairs": make_pairs(compiled, _PAIRS, seed=seed)})

    def phantom(self) -> Phantom:
        """The phantom of this recipe."""
        return Phantom(self.name, "compiled", self.title, self.specimen, self.null)

    def _compile(self, seed: int) -> Compiled:
        vocabulary = self.vocabulary(Random(f"{seed}:vocabulary"))
        return compile_program(
            self.program(vocabulary), vocabulary=vocabulary, max_length=self.max_length, causal=self.causal, seed=seed,
            name=self.name, extra_heads=2, extra_neurons=8, basis="rotated" if seed % 2 else "axes",
        )  # fmt: skip

    def _roles(self, compiled: Compiled) -> list[Known]:
        found = []
        for role, variable in self.roles:
            layer, _, head = compiled.circuit.places[variable][1:].partition(".h")
            found.append(Known("head_role", {"role": role, "heads": [[int(layer), int(head)]]}))
        return found


def make_pairs(compiled: Compiled, n: int, *, seed: int, length: int | None = None) -> PairSet:
    """Clean and corrupted prompts that differ in one token and, by the program, in the answer at the last position.

    All have one length (by default the greatest), so that their positions line up.

    Answers are words; of a program that answers with a number, VALUE against ZERO (the difference of their logits is
    the number), and the clean prompt has the greater one. Raises DataError where no such pairs are found.
    """
    random = Random(f"{seed}:pairs")
    vocabulary, length = list(compiled.words.vocabulary), length or compiled.shape.max_length
    found: dict[tuple, Pair] = {}
    for _ in range(_TRIES * n):
        if len(found) == n:
            break
        clean = random.choices(vocabulary, k=length)
        place = random.randrange(len(clean))
        corrupted = [*clean]
        corrupted[place] = random.choice(vocabulary)
        right, wrong = compiled.expected(clean)[-1], compiled.expected(corrupted)[-1]
        if right == wrong or right is None or wrong is None:
            continue
        if not compiled.words.answers and right < wrong:
            clean, corrupted, right, wrong = corrupted, clean, wrong, right
        found[(*clean, None, *corrupted)] = Pair(
            compiled.words.text(clean),
            compiled.words.text(corrupted),
            (_answer(compiled, right),),
            (_answer(compiled, wrong) if compiled.words.answers else f" {ZERO}",),
            {"position": str(place + 1)},
        )
    if len(found) < 2:
        raise DataError(
            f"{compiled.card.name} has no prompts of which one token changes the last answer.",
            remedy="Give a program whose last answer depends on its input.",
        )
    return PairSet(tuple(found.values()), name=compiled.card.name, seed=seed, corruption="one token replaced")


def _answer(compiled: Compiled, value: Any) -> str:
    return f" {compiled.words.texts[compiled.words.answers[value]]}" if compiled.words.answers else f" {VALUE}"


def _letters(n: int) -> Callable[[Random], Sequence[Hashable]]:
    return lambda random: sorted(random.sample(WORDS, n))


def _numbers(n: int) -> Callable[[Random], Sequence[Hashable]]:
    return lambda random: sorted(random.sample(range(10), n))


RECIPES = (
    Recipe("compiled_reverse", "Reverse, compiled", lambda _: programs.reverse(), _letters(4), 5),
    Recipe("compiled_sort", "Sort with repeats, compiled", lambda _: programs.sort(), _numbers(4), 5),
    Recipe("compiled_sort_unique", "Sort, compiled", lambda _: programs.sort_unique(), _numbers(5), 4),
    Recipe("compiled_histogram", "Count of each token so far, compiled", lambda _: programs.histogram(), _letters(4),
           5, causal=True),
    Recipe("compiled_fraction_so_far", "Fraction of a token so far, compiled",
           lambda words: programs.fraction_so_far(words[0]), _letters(3), 6, causal=True),
    Recipe("compiled_most_frequent", "Most frequent token, compiled", lambda _: programs.most_frequent(), _letters(3),
           6),
    Recipe("compiled_balanced", "Balanced brackets (Dyck-1), compiled", lambda pair: programs.balanced(pair),
           lambda random: random.choice(["()", "[]", "{}", "<>"]), 8, causal=True),
    Recipe("compiled_shuffle_dyck", "Two kinds of balanced brackets, compiled",
           lambda four: programs.balanced(four[:2], four[2:]),
           lambda random: "".join(random.sample(["()", "[]", "{}", "<>"], 2)), 4, causal=True),
    Recipe("compiled_previous_token", "Previous token, compiled", lambda _: programs.previous_token(), _letters(4), 5,
           causal=True, roles=(("previous_token", "previous_token"),)),
    Recipe("compiled_induction", "Induction, compiled", lambda _: programs.induction(), _letters(3), 6, causal=True,
           roles=(("previous_token", "previous_token"), ("induction", "induction"))),
)  # fmt: skip

PHANTOMS = tuple(recipe.phantom() for recipe in RECIPES)
