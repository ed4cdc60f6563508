"""What the embedded model can do, measured on items that training held out (`training.holdout`), each a count of right
answers.

A probe is a list of `Item`s: a prompt, the right continuations and the wrong ones, each a single token. Two scores:
`preferred`, the right tokens' total probability exceeds the wrong ones', and `top1`, the most probable of all tokens
is a right one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import torch

from tomoscope.data.tasks import agreement, colours, facts, gendered_pronoun, greater_than, ioi
from tomoscope.data.tasks.words import (
    ARGUMENTS,
    COLOURS,
    DESCRIPTION,
    EVENTS,
    FEMALE,
    GIFTS,
    NOUNS,
    PLACES,
    RELATIVE_VERBS,
    THINGS,
    VERBS,
)
from training import holdout, text


@dataclass(frozen=True)
class Item:
    """One question: token ids of the prompt, right and wrong next tokens."""

    prompt: tuple[int, ...]
    right: tuple[int, ...]
    wrong: tuple[int, ...]


def _items(tokenizer, rows: list[tuple[str, list[str], list[str]]]) -> list[Item]:
    def one(piece: str) -> int:
        (token,) = tokenizer(piece).input_ids
        return token

    return [Item(tuple(tokenizer(p).input_ids), tuple(map(one, r)), tuple(map(one, w))) for p, r, w in rows]


def ioi_names(random: Random) -> tuple[str, list[str], list[str]]:
    """Held-out names in known templates."""
    return _ioi(random, sorted(holdout.NAMES), [i for i in range(len(ioi.TEMPLATES)) if i not in holdout.IOI_TEMPLATES])


def ioi_templates(random: Random) -> tuple[str, list[str], list[str]]:
    """Known names in held-out templates."""
    return _ioi(random, list(text.OPEN_NAMES), sorted(holdout.IOI_TEMPLATES))


def _ioi(random: Random, names: list[str], indices: list[int]) -> tuple[str, list[str], list[str]]:
    a, b = random.sample(names, 2)
    giver, recipient = random.choice([(a, b), (b, a)])
    template = ioi.TEMPLATES[random.choice(indices)]
    prompt = template.format(A=a, B=b, S=giver, place=random.choice(PLACES), gift=random.choice(GIFTS))
    return prompt, [f" {recipient}"], [f" {giver}"]


def induction_names(random: Random) -> tuple[str, list[str], list[str]]:
    """Lists with held-out names, repeated once."""
    words = random.sample(sorted(holdout.NAMES), 9)
    cut = random.randint(2, 8)
    return (
        "Words: " + " ".join(words + words[:cut]),
        [f" {words[cut]}"],
        [f" {w}" for w in words[:cut] + words[cut + 1 :]],
    )


def agreement_attracted(random: Random) -> tuple[str, list[str], list[str]]:
    """Held-out subjects across a phrase or clause whose noun has the other number."""
    number = random.randint(0, 1)
    subject = random.choice([pair for pair in NOUNS if pair[0] in holdout.SUBJECT_NOUNS])
    template = random.choice(agreement.TEMPLATES[random.choice(["preposition", "clause"])])
    verb = random.choice(VERBS)
    prompt = template.format(
        subject=subject[number],
        attractor=random.choice(NOUNS)[1 - number],
        relative=random.choice(RELATIVE_VERBS)[1 - number],
    )
    return prompt, [f" {verb[number]}"], [f" {verb[1 - number]}"]


def pronoun(random: Random) -> tuple[str, list[str], list[str]]:
    """Held-out names in the pronoun templates."""
    name = random.choice(sorted(holdout.NAMES))
    prompt = random.choice(gendered_pronoun.TEMPLATES).format(name=name, place=random.choice(PLACES))
    right, wrong = (" she", " he") if name in FEMALE else (" he", " she")
    return prompt, [right], [wrong]


def years(random: Random) -> tuple[str, list[str], list[str]]:
    """Held-out start years."""
    pairs = [(c, y) for c in text.CENTURIES for y in range(2, 98) if holdout.year_held_out(c, y)]
    century, year = random.choice(pairs)
    prompt = random.choice(greater_than.TEMPLATES).format(
        event=random.choice(EVENTS), start=f"{century}{year:02d}", century=century
    )
    return prompt, [f"{y:02d}" for y in range(year + 1, 100)], [f"{y:02d}" for y in range(year + 1)]


def _fact(random: Random, wording: Callable[[str, str], str]) -> tuple[str, list[str], list[str]]:
    relation = random.choice(list(text.FACTS))
    subject, answer = random.choice(list(text.FACTS[relation].items()))
    others = sorted(set(text.FACTS[relation].values()) - {answer})
    return wording(relation, subject).format(subject=subject), [f" {answer}"], [f" {other}" for other in others]


def facts_trained(random: Random) -> tuple[str, list[str], list[str]]:
    """Facts in a wording shown for this subject."""

    def wording(relation: str, subject: str) -> str:
        held = holdout.fact_template_held_out(relation, subject)
        return random.choice([t for i, t in enumerate(facts.TEMPLATES[relation]) if i != held])

    return _fact(random, wording)


def facts_held_out(random: Random) -> tuple[str, list[str], list[str]]:
    """Facts in the one wording never shown for this subject (but shown for others)."""
    return _fact(random, lambda r, s: facts.TEMPLATES[r][holdout.fact_template_held_out(r, s)])


def facts_unseen(random: Random) -> tuple[str, list[str], list[str]]:
    """Facts in a wording never shown for anyone."""
    return _fact(random, lambda r, s: holdout.UNSEEN_PARAPHRASES[r])


def coloured(random: Random) -> tuple[str, list[str], list[str]]:
    """Held-out pairs of thing and colour, asked for among three."""
    statement, question = random.choice(colours.TEMPLATES)
    thing, colour = random.choice([(t, c) for t in THINGS for c in COLOURS if holdout.colour_held_out(t, c)])
    things = [thing, *random.sample([t for t in THINGS if t != thing], 2)]
    tints = [colour, *random.sample([c for c in COLOURS if c != colour], 2)]
    order = random.sample(range(3), 3)
    lines = " ".join(statement.format(thing=things[i], colour=tints[i]) for i in order)
    return f"{lines} {question.format(thing=thing)}", [f" {colour}"], [f" {c}" for c in tints[1:]]


def docstring(random: Random) -> tuple[str, list[str], list[str]]:
    """Functions whose third documented argument has a held-out name."""
    asked = random.choice(sorted(holdout.ARGUMENT_NAMES))
    others = random.sample([a for a in ARGUMENTS if a not in holdout.ARGUMENT_NAMES], 4)
    arguments = [*others[:3], asked, others[3]]
    lines = [f"    :param {a}: {random.choice(DESCRIPTION)} {random.choice(DESCRIPTION)}" for a in arguments[1:3]]
    title = " ".join(random.sample(DESCRIPTION, 3))
    head = f'\ndef {random.choice(DESCRIPTION)}(self, {", ".join(arguments)}):\n    """{title}\n\n'
    return head + "\n".join(lines) + "\n    :param", [f" {asked}"], [f" {a}" for a in others]


PROBES: dict[str, Callable[[Random], tuple[str, list[str], list[str]]]] = {
    "ioi, held-out names": ioi_names,
    "ioi, held-out templates": ioi_templates,
    "induction, held-out names": induction_names,
    "agreement, held-out subjects, attractor of the other number": agreement_attracted,
    "gendered pronoun, held-out names": pronoun,
    "greater-than, held-out years": years,
    "facts, wordings shown": facts_trained,
    "facts, wording held out for the subject": facts_held_out,
    "facts, wording never shown": facts_unseen,
    "colours, held-out pairs": coloured,
    "docstring, held-out arguments": docstring,
}


def random_token_items(vocabulary: int, n: int, random: Random) -> list[Item]:
    """Uniformly random tokens, repeated once and cut: the next token is told by induction alone."""
    items = []
    for _ in range(n):
        segment = random.sample(range(1, vocabulary), random.randint(8, 48))
        cut = random.randint(1, len(segment) - 1)
        others = segment[:cut] + segment[cut + 1 :]
        items.append(Item(tuple(segment + segment[:cut]), (segment[cut],), tuple(others)))
    return items


def items_of(tokenizer, name: str, n: int, seed: int) -> list[Item]:
    """`n` items of a probe of `PROBES`, or of "induction, random tokens"."""
    random = Random(f"{seed}:probe:{name}")
    if name == RANDOM_TOKENS:
        return random_token_items(len(tokenizer), n, random)
    return _items(tokenizer, [PROBES[name](random) for _ in range(n)])


RANDOM_TOKENS = "induction, random tokens"


@torch.no_grad()
def last_logits(model, prompts: list[tuple[int, ...]], *, batch: int = 64) -> torch.Tensor:
    """Logits [prompt, vocab] at each prompt's last token; prompts of one length run together, so nothing is padded."""
    rows: dict[int, torch.Tensor] = {}
    groups: dict[int, list[int]] = defaultdict(list)
    for i, prompt in enumerate(prompts):
        groups[len(prompt)].append(i)
    for members in groups.values():
        for start in range(0, len(members), batch):
            chunk = members[start : start + batch]
            logits = model(input_ids=torch.tensor([prompts[i] for i in chunk])).logits[:, -1].float()
            rows.update(zip(chunk, logits, strict=True))
    return torch.stack([rows[i] for i in range(len(prompts))])


def score(model, items: list[Item]) -> dict[str, int | float]:
    """Counts over the items: preferred, top1, n, and the mean probability of the right tokens."""
    probabilities = last_logits(model, [item.prompt for item in items]).softmax(-1)
    right = torch.stack([p[list(item.right)].sum() for p, item in zip(probabilities, items, strict=True)])
    wrong = torch.stack([p[list(item.wrong)].sum() for p, item in zip(probabilities, items, strict=True)])
    best = probabilities.argmax(-1).tolist()
    return {
        "n": len(items),
        "preferred": int((right > wrong).sum()),
        "top1": sum(token in item.right for token, item in zip(best, items, strict=True)),
        "mean_probability": float(right.mean()),
    }
