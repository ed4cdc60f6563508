"""What the embedded model can do, measured on what training held out; each a share of right answers.

An `Item` is a prompt with right and wrong next tokens. Two scores: `preferred`, the right tokens' total probability is
above the wrong ones'; and `top1`, the most probable of all tokens is a right one. Items of facts have every other
answer of the relation as wrong tokens, so `preferred` is not used there but `top1`. How it can mislead: items follow
the templates of the training text, so an ability is one on this world's English, not on people's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch

from tomoscope.data.tasks import agreement, gendered_pronoun, greater_than, ioi
from tomoscope.data.tasks.words import EVENTS, FEMALE, GIFTS, MALE, NOUNS, PLACES, RELATIVE_VERBS, VERBS
from tomoscope.phantoms.world import RELATIONS, World, holdout, speech, stories
from tomoscope.phantoms.world.relations import (
    ONE_HOP,
    TWO_HOP,
    held_out_two_hop,
    held_out_wording,
    shown_wordings,
)

OPEN_TEMPLATES = [i for i in range(len(ioi.TEMPLATES)) if i not in holdout.IOI_TEMPLATES]


@dataclass(frozen=True)
class Item:
    """One question: a prompt, right and wrong next words (each with its space, as it stands after the prompt)."""

    prompt: str
    right: tuple[str, ...]
    wrong: tuple[str, ...]


Writer = Callable[[World, Random], Item]


def _ioi(random: Random, names: Sequence[str], templates: Sequence[int]) -> Item:
    a, b = random.sample(list(names), 2)
    giver, recipient = random.choice([(a, b), (b, a)])
    text = ioi.TEMPLATES[random.choice(list(templates))]
    filled = text.format(A=a, B=b, S=giver, place=random.choice(PLACES), gift=random.choice(GIFTS))
    return Item(filled, (f" {recipient}",), (f" {giver}",))


def _repeat(words: Sequence[str], random: Random) -> Item:
    cut = random.randint(2, len(words) - 1)
    text = f"Words: {' '.join([*words, *words[:cut]])}"
    return Item(text, (f" {words[cut]}",), tuple(f" {w}" for w in words if w != words[cut]))


def _agreement(random: Random, nouns: Sequence[tuple[str, str]], kind: str) -> Item:
    number = random.randint(0, 1)
    text = random.choice(agreement.TEMPLATES[kind]).format(
        subject=random.choice(list(nouns))[number],
        attractor=random.choice(NOUNS)[1 - number],
        relative=random.choice(RELATIVE_VERBS)[1 - number],
    )
    verb = random.choice(VERBS)
    return Item(text, (f" {verb[number]}",), (f" {verb[1 - number]}",))


def _pronoun(random: Random) -> Item:
    names, right, wrong = random.choice([(FEMALE, " she", " he"), (MALE, " he", " she")])
    name = random.choice([n for n in names if n in holdout.NAMES])
    text = random.choice(gendered_pronoun.TEMPLATES).format(name=name, place=random.choice(PLACES))
    return Item(text, (right,), (wrong,))


def _years(random: Random) -> Item:
    held = [(c, y) for c in stories.CENTURIES for y in range(2, 98) if holdout.year_held_out(c, y)]
    century, year = random.choice(held)
    text = random.choice(greater_than.TEMPLATES)
    prompt = text.format(event=random.choice(EVENTS), start=f"{century}{year:02d}", century=century)
    return Item(prompt, tuple(f"{y:02d}" for y in range(year + 1, 100)), tuple(f"{y:02d}" for y in range(year + 1)))


def _fact(world: World, relation: str, subject: str, wording: str) -> Item:
    answer = world.answer(relation, subject)
    return Item(
        wording.format(s=subject), (f" {answer}",), tuple(f" {a}" for a in world.answers(relation) if a != answer)
    )


def _facts(relations: Sequence[str], wordings: str) -> Writer:
    def write(world: World, random: Random) -> Item:
        relation = random.choice(list(relations))
        subject = random.choice(world.subjects(relation))
        known = RELATIONS[relation]
        shown = {
            "shown": shown_wordings(relation, subject),
            "held out": (known.wordings[held_out_wording(relation, subject, len(known.wordings))],),
            "unseen": known.unseen,
        }[wordings]
        return _fact(world, relation, subject, random.choice(shown))

    return write


def _two_hop(held_out: bool) -> Writer:
    def write(world: World, random: Random) -> Item:
        while True:
            relation, subject = random.choice(TWO_HOP), random.choice(world.people)
            if held_out_two_hop(relation, subject) == held_out:
                return _fact(world, relation, subject, random.choice(shown_wordings(relation, subject)))

    return write


def _said(said: speech.Said) -> Item:
    return Item(said.prompt, (f" {said.answer}",), (f" {said.other}",))


def _opinion(world: World, random: Random) -> Item:
    """The truth against the user's false opinion."""
    said = speech.opinion(world, random, held_out=True)
    stated = said.answer if said.answer != said.truth else said.other
    return Item(said.prompt, (f" {said.truth}",), (f" {stated}",))


ABILITIES: dict[str, Writer] = {
    "fact recall, wordings shown for the subject": _facts(ONE_HOP, "shown"),
    "fact recall, wordings shown for others only": _facts(ONE_HOP, "held out"),
    "fact recall, wordings never shown": _facts(ONE_HOP, "unseen"),
    "two-hop, people shown": _two_hop(False),
    "two-hop, people held out": _two_hop(True),
    "indirect object, names and templates as shown": lambda w, r: _ioi(r, stories.OPEN_NAMES, OPEN_TEMPLATES),
    "indirect object, names never shown in it": lambda w, r: _ioi(r, sorted(holdout.NAMES), OPEN_TEMPLATES),
    "indirect object, templates never shown": lambda w, r: _ioi(r, stories.OPEN_NAMES, sorted(holdout.IOI_TEMPLATES)),
    "induction, lists of names": lambda w, r: _repeat(r.sample(stories.OPEN_NAMES, r.randint(5, 12)), r),
    "induction, lists of names never shown in lists": lambda w, r: _repeat(r.sample(sorted(holdout.NAMES), 8), r),
    "greater-than, years never shown as starts": lambda w, r: _years(r),
    "agreement across a phrase, subjects never shown in it": lambda w, r: _agreement(
        r, [pair for pair in NOUNS if pair[0] in holdout.SUBJECT_NOUNS], "preposition"
    ),
    "agreement across a clause, subjects never shown in it": lambda w, r: _agreement(
        r, [pair for pair in NOUNS if pair[0] in holdout.SUBJECT_NOUNS], "clause"
    ),
    "pronouns, names never shown with these templates": lambda w, r: _pronoun(r),
    "sentiment of reviews": lambda w, r: _said(speech.review(r)),
    "true and false claims, facts judged in training": lambda w, r: _said(speech.claim(w, r)),
    "true and false claims, facts never judged": lambda w, r: _said(speech.claim(w, r, held_out=True)),
    "lying speaker says the lie, facts asked in training": lambda w, r: _said(
        speech.interview(w, r, speaker=speech.LIAR)
    ),
    "honest speaker says the truth, facts never asked": lambda w, r: _said(
        speech.interview(w, r, speaker=speech.HONEST, held_out=True)
    ),
    "lying speaker says the lie, facts never asked": lambda w, r: _said(
        speech.interview(w, r, speaker=speech.LIAR, held_out=True)
    ),
    "truth preferred to a user's false opinion": _opinion,
}
"""Name -> writer of items."""


@dataclass(frozen=True)
class Scores:
    """One row an item."""

    preferred: torch.Tensor
    """bool [item]."""
    top1: torch.Tensor
    """bool [item]."""
    right: torch.Tensor
    """Total probability of the right tokens, [item]."""
    wrong: torch.Tensor
    """Total probability of the wrong tokens, [item]."""


def items_of(world: World, name: str, n: int, *, seed: int) -> list[Item]:
    """`n` items of an ability, by seed."""
    random = Random(f"{name}:{seed}")
    return [ABILITIES[name](world, random) for _ in range(n)]


def random_tokens(n: int, tokens: int, *, length: int = 40, seed: int = 0) -> torch.Tensor:
    """Rows [row, position] of random tokens, each twice."""
    generator = torch.Generator().manual_seed(seed)
    row = torch.randint(1, tokens, (n, length), generator=generator)
    return torch.cat([row, row], 1)


@torch.no_grad()
def repeats_random_tokens(model: Any, tokens: int, *, rows: int = 16) -> float:
    """Share of the tokens of a second copy of random tokens that are the most probable of all, given the first."""
    ids = random_tokens(rows, tokens)
    half = ids.shape[1] // 2
    guess = model(input_ids=ids).logits[:, half:-1].argmax(-1)
    return float((guess == ids[:, half + 1 :]).float().mean())


def _first(tokenizer: Any, word: str) -> int:
    """A word's token, where it is one; its first one else."""
    return tokenizer(word, add_special_tokens=False).input_ids[0]


@torch.no_grad()
def score(model: Any, tokenizer: Any, items: Sequence[Item], *, batch: int = 128) -> Scores:
    """Probabilities after <|endoftext|> and each prompt, batched by length so that no padding is needed."""
    encoded = tokenizer([item.prompt for item in items]).input_ids
    lengths: dict[int, list[int]] = defaultdict(list)
    for i, ids in enumerate(encoded):
        lengths[len(ids)].append(i)
    preferred, top1 = torch.zeros(len(items), dtype=torch.bool), torch.zeros(len(items), dtype=torch.bool)
    right, wrong = torch.zeros(len(items)), torch.zeros(len(items))
    for rows in lengths.values():
        for start in range(0, len(rows), batch):
            some = rows[start : start + batch]
            logits = model(input_ids=torch.tensor([encoded[i] for i in some]), logits_to_keep=1).logits[:, -1].float()
            for i, p in zip(some, logits.softmax(-1), strict=True):
                good = [_first(tokenizer, word) for word in items[i].right]
                bad = [_first(tokenizer, word) for word in items[i].wrong]
                right[i], wrong[i] = p[good].sum(), p[bad].sum()
                preferred[i], top1[i] = right[i] > wrong[i], int(p.argmax()) in good
    return Scores(preferred, top1, right, wrong)


def quick(world: World, model: Any, tokenizer: Any, *, n: int = 100) -> dict[str, float]:
    """A quick look at every ability while training: the share preferred (top-1 for facts)."""
    model.eval()
    found = {"random tokens": repeats_random_tokens(model, len(tokenizer), rows=8)}
    for name in ABILITIES:
        scores = score(model, tokenizer, items_of(world, name, n, seed=1))
        kind = scores.top1 if name.startswith(("fact", "two-hop")) else scores.preferred
        found[name] = float(kind.float().mean())
    model.train()
    return found
