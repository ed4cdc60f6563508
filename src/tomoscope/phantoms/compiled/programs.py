"""Programs to compile: each a few lines, with what it answers at every position.

Those of "Thinking like transformers" and Tracr (reverse, histogram, sort, fractions, balanced brackets, most frequent
token), and two circuits of language models: previous token and induction.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from operator import and_, eq, gt, lt, sub

from tomoscope.phantoms.compiled.rasp import (
    SOp,
    aggregate,
    constant,
    indices,
    length,
    select,
    select_all,
    selector_width,
    sequence_map,
    tokens,
)

same_token = select(tokens, tokens, eq)
up_to_here = select(indices, indices, lambda key, query: key <= query)


def reverse() -> SOp:
    """The input backwards."""
    opposite = sequence_map(lambda n, index: n - 1 - index, length, indices).named("opposite")
    return aggregate(select(indices, opposite, eq), tokens).named("reverse")


def histogram() -> SOp:
    """How often each position's token occurs."""
    return selector_width(same_token).named("histogram")


def fraction_so_far(token: Hashable) -> SOp:
    """The fraction of tokens up to each position that are `token`: a number."""
    is_token = tokens.map(lambda value: value == token, numerical=True).named(f"is_{token}")
    return aggregate(up_to_here, is_token).named(f"fraction_of_{token}")


def sort_unique() -> SOp:
    """The tokens in ascending order, for inputs without repeats (a repeated one leaves a gap: no value)."""
    place = selector_width(select(tokens, tokens, lt)).named("place")
    return aggregate(select(place, indices, eq), tokens).named("sort_unique")


def sort() -> SOp:
    """The tokens in ascending order; equal ones keep theirs."""
    before = select(tokens, tokens, lt) | (same_token & select(indices, indices, lt))
    place = selector_width(before).named("place")
    return aggregate(select(place, indices, eq), tokens).named("sort")


def most_frequent() -> SOp:
    """At every position the token that occurs most often; of several, the one that comes first."""
    count = histogram().named("count")
    better = select(count, count, gt) | (select(count, count, eq) & select(indices, indices, lt))
    rank = selector_width(better).named("rank")
    return aggregate(select(rank, constant(0), eq), tokens).named("most_frequent")


def pair_balance(opening: Hashable, closing: Hashable) -> SOp:
    """Opening less closing brackets up to each position, as a fraction of the tokens there: a number."""
    return sequence_map(sub, fraction_so_far(opening), fraction_so_far(closing)).named(f"balance_{opening}{closing}")


def balanced(*pairs: Sequence[Hashable]) -> SOp:
    """Whether the brackets up to each position are balanced: "yes" or "no". For causal models.

    Of several pairs, each kind by itself, in any interleaving (shuffle-Dyck).
    """
    balances = [pair_balance(*pair) for pair in pairs]
    never, now = None, None
    for (opening, closing), balance in zip(pairs, balances, strict=True):
        negative = balance.map(lambda value: value < 0, numerical=True).named(f"negative_{opening}{closing}")
        share = aggregate(select_all, negative).named(f"negative_share_{opening}{closing}")
        good = share.map(lambda value: value == 0).named(f"never_negative_{opening}{closing}")
        even = balance.map(lambda value: value == 0).named(f"even_{opening}{closing}")
        never = good if never is None else sequence_map(and_, never, good)
        now = even if now is None else sequence_map(and_, now, even)
    assert never is not None
    assert now is not None
    return sequence_map(lambda one, other: "yes" if one and other else "no", never, now).named("balanced")


def previous_token() -> SOp:
    """The token before each position; none at the first."""
    return aggregate(select(indices, indices, lambda key, query: key == query - 1), tokens).named("previous_token")


def induction() -> SOp:
    """The token that followed the latest earlier occurrence of each position's token; none at its first. Causal."""
    before = select(indices, indices, lambda key, query: key == query - 1)
    previous = aggregate(before, tokens).named("previous_token")
    count = selector_width(same_token).named("count")
    previous_count = aggregate(before, count).named("previous_count")
    after = select(previous, tokens, eq) & select(previous_count, count, lambda key, query: key == query - 1)
    return aggregate(after, tokens).named("induction")
