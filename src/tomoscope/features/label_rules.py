"""Labels without a language model: a rule over tokens that tells where a feature fires, learned from contexts.

    rule = learn_rule(contexts, say=book_tokens, lexicon={"city": {"Paris", "Lyon"}})
    rule.text        'a city, or after "born in"'
    rule(context)    [token], what the rule expects of each token

A rule is a few clauses joined by "or": the token is X, the token before is X, the two tokens before are X Y, the
position is p, the token belongs to a word with an attribute (from a lexicon that a world or a person gives), or stands
right after one. Clauses are added while the F1 over tokens rises by at least `GAIN`; of two that are as good the one
that says more at once (an attribute before a token) is taken.

How it can mislead: a rule sees the last two tokens and nothing else, so a feature of meaning looks like its commonest
words; a feature that no rule tells is not without meaning.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from tomoscope.features.book import Context

GAIN, CLAUSES = 0.02, 6
Lexicon = Mapping[str, Collection[str]]
Say = Callable[[int], str]
# in this order where they are as good: what says more at once comes first
KINDS = ("attribute", "after attribute", "position", "before", "two before", "token")


@dataclass(frozen=True)
class Clause:
    """One way to fire.

    Attributes:
        kind: of `KINDS`.
        key: an attribute, a position, a token id, or two.
        value: the mean activation on tokens that it holds for.
    """

    kind: str
    key: Any
    value: float = 1.0

    def words(self, say: Say) -> str:
        """In words."""
        if self.kind == "attribute":
            return f"in a {self.key}"
        if self.kind == "after attribute":
            return f"right after a {self.key}"
        if self.kind == "position":
            return f"token {self.key} of the text"
        if self.kind == "token":
            return f'the token "{say(self.key)}"'
        text = "".join(say(key) for key in (self.key if isinstance(self.key, tuple) else (self.key,)))
        return f'after "{text}"'


@dataclass(frozen=True, eq=False)
class Rule:
    """A disjunction of clauses.

    Attributes:
        clauses: in the order in which they were found.
        words: the lexicon of the attributes it uses.
        say: from a token id to its text.
    """

    clauses: tuple[Clause, ...]
    words: Words
    say: Say

    @property
    def text(self) -> str:
        """In words; tokens of one kind are listed together."""
        said, tokens = [], [clause for clause in self.clauses if clause.kind == "token"]
        for clause in self.clauses:
            if clause.kind != "token":
                said.append(clause.words(self.say))
            elif clause is tokens[0]:
                listed = ", ".join(f'"{self.say(one.key)}"' for one in tokens)
                said.append(f"the token {listed}" if len(tokens) == 1 else f"the tokens {listed}")
        return ", or ".join(said)

    def __call__(self, context: Context) -> Float[np.ndarray, " token"]:
        """The activation that the rule expects at each token of a window."""
        table = Table([context], self.say, self.words)
        out = np.zeros(len(context.tokens))
        for clause in self.clauses:
            out = np.maximum(out, np.where(table.holds(clause), clause.value, 0.0))
        return out


class Table:
    """All tokens of some windows, one after the other, with what clauses ask of them."""

    def __init__(self, contexts: Sequence[Context], say: Say, words: Words) -> None:
        self.token = np.concatenate([c.tokens for c in contexts]) if contexts else np.zeros(0, dtype=np.int64)
        self.value = np.concatenate([c.values for c in contexts]).astype(float) if contexts else np.zeros(0)
        self.position = (
            np.concatenate([c.start + np.arange(len(c.tokens)) for c in contexts]) if contexts else self.token
        )
        self.before = np.concatenate([np.append(-1, c.tokens[:-1]) for c in contexts]) if contexts else self.token
        early = [np.concatenate([[-1, -1], c.tokens[:-2]])[: len(c.tokens)] for c in contexts]
        self.earlier = np.concatenate(early) if contexts else self.token
        self.attributes = words.masks(contexts, say)
        self.after: dict[str, np.ndarray] = {}
        borders = np.cumsum([0, *(len(c.tokens) for c in contexts)])[:-1]
        for name, mask in self.attributes.items():
            shifted = np.append(False, mask[:-1]) & ~mask
            shifted[borders[borders < len(shifted)]] = False
            self.after[name] = shifted

    def holds(self, clause: Clause) -> Bool[np.ndarray, " token"]:
        """Where a clause holds."""
        nowhere = np.zeros(len(self.token), dtype=bool)
        if clause.kind == "attribute":
            return self.attributes.get(clause.key, nowhere)
        if clause.kind == "after attribute":
            return self.after.get(clause.key, nowhere)
        if clause.kind == "two before":
            return (self.earlier == clause.key[0]) & (self.before == clause.key[1])
        column = {"token": self.token, "before": self.before, "position": self.position}[clause.kind]
        return column == clause.key


class Words:
    """A lexicon, compiled once: finds its words in windows of tokens."""

    def __init__(self, lexicon: Lexicon) -> None:
        self.lexicon = {name: frozenset(words) for name, words in lexicon.items()}
        self.owners: dict[str, list[str]] = {}
        for name, words in self.lexicon.items():
            for word in words:
                self.owners.setdefault(word, []).append(name)
        listed = sorted(self.owners, key=lambda word: (-len(word), word))
        found = "|".join(map(re.escape, listed))
        self.pattern = re.compile(rf"(?<!\w)(?:{found})(?!\w)") if listed else None

    def only(self, names: Collection[str]) -> Words:
        """Some attributes alone."""
        return Words({name: words for name, words in self.lexicon.items() if name in names})

    def masks(self, contexts: Sequence[Context], say: Say) -> dict[str, np.ndarray]:
        """For each attribute the tokens that belong to a word which has it, over the windows one after the other."""
        total = sum(len(context.tokens) for context in contexts)
        masks = {name: np.zeros(total, dtype=bool) for name in self.lexicon}
        if self.pattern is None:
            return masks
        done = 0
        for context in contexts:
            said = [say(int(token)) for token in context.tokens]
            ends = np.cumsum([len(word) for word in said])
            for match in self.pattern.finditer("".join(said)):
                first = int(np.searchsorted(ends, match.start(), side="right"))
                last = int(np.searchsorted(ends, match.end(), side="left"))
                for name in self.owners[match[0]]:
                    masks[name][done + first : done + last + 1] = True
            done += len(context.tokens)
        return masks


def learn_rule(
    contexts: Sequence[Context], *, say: Say, lexicon: Lexicon | Words | None = None, clauses: int = CLAUSES
) -> Rule:
    """The rule that tells best where a feature fires.

    Args:
        contexts: windows with activations, some of them silent.
        say: from a token id to its text.
        lexicon: attribute -> words; as `Words` where it is used again and again.
        clauses: at most.

    Returns:
        A rule; without clauses where nothing tells.
    """
    words = lexicon if isinstance(lexicon, Words) else Words(lexicon or {})
    table = Table(contexts, say, words)
    fires = table.value > 0
    positives, hits, predicted = int(fires.sum()), 0, 0
    free = np.ones(len(fires), dtype=bool)
    found: list[Clause] = []
    best = 0.0
    while positives and len(found) < clauses:
        options = _candidates(table, fires, free)
        scored = [
            (2 * (hits + tp) / (predicted + n + positives), -KINDS.index(kind), kind, key, tp, n)
            for kind, key, tp, n in options
        ]
        if not scored:
            break
        top = max(score for score, *_ in scored)
        # as good as the best, within rounding: the one that says more
        score, _, kind, key, tp, n = max((one for one in scored if one[0] >= top - 1e-9), key=lambda one: one[1])
        if score < best + GAIN:
            break
        clause = Clause(kind, key)
        where = table.holds(clause)
        found.append(Clause(kind, key, float(table.value[where].mean())))
        free &= ~where
        hits, predicted, best = hits + tp, predicted + n, score
    used = {clause.key for clause in found if clause.kind in ("attribute", "after attribute")}
    return Rule(tuple(found), words.only(used), say)


def _candidates(table: Table, fires: np.ndarray, free: np.ndarray) -> list[tuple[str, Any, int, int]]:
    """(kind, key, firing tokens gained, tokens gained) of every clause worth a look, among tokens not yet covered."""
    out: list[tuple[str, Any, int, int]] = []
    on = fires & free
    for kind, column in (("token", table.token), ("before", table.before), ("position", table.position)):
        out += [(kind, int(key), tp, n) for key, tp, n in _counted(column, on, free) if key >= 0]
    wide = int(table.token.max(initial=0)) + 2
    pairs = (table.earlier + 1) * wide + table.before + 1
    for key, tp, n in _counted(pairs, on, free):
        first, second = key // wide - 1, key % wide - 1
        if first >= 0 and second >= 0:
            out.append(("two before", (first, second), tp, n))
    for kind, masks in (("attribute", table.attributes), ("after attribute", table.after)):
        out += [(kind, name, int((on & mask).sum()), int((free & mask).sum())) for name, mask in masks.items()]
    return [one for one in out if one[2] > 0]


def _counted(column: np.ndarray, on: np.ndarray, free: np.ndarray) -> list[tuple[int, int, int]]:
    """The values that stand at firing tokens most often, with how often there and anywhere."""
    keys, counts = np.unique(column[on], return_counts=True)
    if not len(keys):
        return []
    places = np.searchsorted(keys, column[free])
    places = np.minimum(places, len(keys) - 1)
    same = keys[places] == column[free]
    total = np.bincount(places[same], minlength=len(keys))
    order = np.argsort(-(2 * counts - total), kind="stable")[:64]
    return [(int(keys[i]), int(counts[i]), int(total[i])) for i in order]
