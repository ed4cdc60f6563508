"""Greater-than: "The war lasted from the year 1732 to the year 17" -> any two digits above 32.

Source: Hanna et al. 2023, "How does GPT-2 compute greater-than?" (arXiv:2305.00586). Measures the probability of the
years after the start, less that of the years up to it. How it can mislead: a model that always prefers late years
scores well without comparing; compare starts early and late in the century.

Corruptions: `year_01` puts 01 for the start's last two digits (every year becomes greater, the paper's own);
`random_year` puts another start. Only years that the tokenizer splits into a century and two digits take part.
Spans: event, century (first two digits of the start), year (its last two), end.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

from tomoscope.data.pairs import Pair, PairSet
from tomoscope.data.prompts import Prompt, read_text
from tomoscope.data.tasks.single import choose_corruption, collect, other, parse_with_end, require, too_few
from tomoscope.data.tasks.words import EVENTS

CORRUPTIONS: tuple[str, ...] = ("year_01", "random_year")
CENTURIES: tuple[int, ...] = tuple(range(11, 20))
FEWEST_YEARS = 40
TEMPLATES: tuple[str, ...] = (
    "The {event} lasted from the year {start} to the year {century}",
    "The {event} went on from {start} to {century}",
)


def two_part_years(tokenizer: Any, *, centuries: Sequence[int] = CENTURIES) -> dict[int, list[int]]:
    """Century -> the years (0 to 99) that are that century's token and one more, whichever century; few-yeared ones
    are left out.
    """
    prefix = "from the year"
    before = read_text(tokenizer, prefix, add_special_tokens=False)["input_ids"]
    kept: dict[int, list[int]] = {}
    for century in centuries:
        head = tokenizer(f"{prefix} {century}", add_special_tokens=False)["input_ids"]
        if len(head) != len(before) + 1:
            continue
        years = tokenizer([f"{prefix} {century}{year:02d}" for year in range(100)], add_special_tokens=False)[
            "input_ids"
        ]
        found = [year for year, ids in enumerate(years) if len(ids) == len(head) + 1 and list(ids[:-1]) == list(head)]
        if len(found) >= FEWEST_YEARS and 1 in found:
            kept[century] = found
    return kept


def make(
    tokenizer: Any,
    n: int,
    *,
    seed: int = 0,
    corruption: str = "year_01",
    templates: Sequence[str] = TEMPLATES,
    centuries: Sequence[int] = CENTURIES,
) -> PairSet:
    """`n` pairs; `answers` are all later years of the century and `wrong` all others, two digits each.

    Raises DataError where no century has 40 years of two tokens, or no event is a single token.
    """
    choose_corruption(corruption, CORRUPTIONS, task="greater_than")
    years = two_part_years(tokenizer, centuries=centuries)
    if not years:
        raise too_few("greater_than", f"centuries with {FEWEST_YEARS} years", 0, len(centuries), 1)
    events = require(tokenizer, EVENTS, 1, task="greater_than", what="events")

    def draw(random: Random) -> Pair:
        century = random.choice(sorted(years))
        known = years[century]
        year = random.choice([y for y in known if 2 <= y <= 97 and y < known[-1]])
        twin = 1 if corruption == "year_01" else other(random, known, year)
        template, event = random.choice(list(templates)), random.choice(events)
        return Pair(
            clean=_prompt(template, event, century, year),
            corrupted=_prompt(template, event, century, twin),
            answers=tuple(f"{y:02d}" for y in known if y > year),
            wrong=tuple(f"{y:02d}" for y in known if y <= year),
            labels={"template": template, "century": str(century), "year": f"{year:02d}", "twin": f"{twin:02d}"},
        )

    return collect(tokenizer, n, draw, task="greater_than", seed=seed, corruption=corruption)


def _prompt(template: str, event: str, century: int, year: int) -> Prompt:
    start = f"{{century:{century}}}{{year:{year:02d}}}"
    return parse_with_end(template.format(event=f"{{event:{event}}}", start=start, century=century))
