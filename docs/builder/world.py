"""The micro-world's page: what the embedded model and its siblings do, from the cards that were written when they were
made.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from builder.prose import escape


def _share(value: Mapping[str, Any] | None) -> str:
    if value is None:
        return "–"
    return f"{100 * value['value']:.1f} % [{100 * value['low']:.1f}, {100 * value['high']:.1f}]"


def page() -> str:
    """The tables as Markdown."""
    from tomoscope.phantoms.trained import FOLDER, SIBLINGS, model_card
    from tomoscope.phantoms.world import KINDS, RELATIONS, shipped_world

    card, world = model_card(), shipped_world()
    facts = sum(len(rows) for rows in world.facts.values())
    shown = sum(len(relation.wordings) for relation in RELATIONS.values())
    unseen = sum(len(relation.unseen) for relation in RELATIONS.values())
    kinds = ", ".join(kind.replace("_", " ") for kind in KINDS)
    swayed = card["abilities"]["truth preferred to a user's false opinion"]
    losses = card["losses"]
    held = losses["held_out_text"]
    counted = losses["counting_on_the_same_text"]
    out = [
        "# The micro-world and its models",
        "Guide: [phantoms](../phantoms.md). Figures are from the cards that were written when the models were made, by "
        "plain forwards of transformers; intervals are 95 % (Wilson).",
        "## The world",
        f"Seed {world.seed}: {len(world.people)} people, {len(world.facts['in_country'])} cities, "
        f"{len(world.facts['capital'])} countries, {len(world.facts['seat'])} companies; {facts:,} facts one hop deep "
        f"in {len(RELATIONS)} relations (two hops included), {shown} wordings shown in training and {unseen} never "
        f"shown. Kinds of text: {kinds}.",
        "## The embedded model",
        f"{card['parameters']:,} parameters, {card['vocabulary']:,} tokens of vocabulary, trained on "
        f"{card['tokens_seen'] / 1e6:.1f} million tokens in {card['seconds_of_training'] / 60:.0f} minutes on 2 cores "
        f"that other work shared. Initial weights: {escape(card['initial_weights'])}. Loss on fresh text "
        f"{held['value']:.3f} nats a token [{held['low']:.3f}, {held['high']:.3f}]; counting gives "
        f"{counted['unigram']:.2f} (unigrams) and {counted['bigram']:.2f} (bigrams).",
        f"### What it can do (n = {next(iter(card['abilities'].values()))['preferred']['n']} each)",
        _table(
            ("ability", "right preferred to wrong", "right is the top token"),
            [(name, _share(one.get("preferred")), _share(one["top1"])) for name, one in card["abilities"].items()],
        ),
        "Preferred: the right tokens' total probability is above the wrong ones'. For facts the wrong ones are all "
        "other answers of the relation together. What is never shown: "
        "[the card](../../src/tomoscope/model/embedded/card.json).",
        "### The tasks of the library and of the world, as a scan makes them",
        _table(
            ("task", "right preferred to wrong", "right is the top token"),
            [
                (f"`{name}`", _share(one["preferred"]), _share(one["top1"]))
                for name, one in card["tasks_of_the_library"].items()
            ],
        ),
        f"A user's opinion sways the answer in {100 * card['swayed_share_of_the_text']:.0f} % of the texts; there the "
        f"model gives the truth {swayed['mean_probability']:.2f} and the opinion "
        f"{swayed['mean_probability_of_wrong']:.2f} (mean probabilities).",
        "### Its training",
        _curve(card["curve"]),
        _practice(card["practice"]),
        "## The siblings",
        "Each is the embedded model plus a low-rank difference of its own. On cases held out from its training:",
        _siblings(SIBLINGS, FOLDER),
    ]
    return "\n\n".join(out)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [" | ".join(head), " | ".join("---" for _ in head), *(" | ".join(row) for row in rows)]
    return "\n".join(f"| {line} |" for line in lines)


def _curve(curve: list[dict[str, Any]]) -> str:
    """A dozen points of the curve: the loss, and when what formed."""
    shown = {
        "fact recall, wordings shown for the subject": "facts",
        "two-hop, people shown": "two hops",
        "indirect object, templates never shown": "indirect object",
        "induction, lists of names": "induction",
        "agreement across a clause, subjects never shown in it": "agreement",
        "lying speaker says the lie, facts never asked": "the liar's lies",
        "sentiment of reviews": "sentiment",
    }
    points = [point for point in curve if "held_out_loss" in point]
    step = max(1, len(points) // 11)
    kept = [*points[::step], *([points[-1]] if points[-1] not in points[::step] else [])]
    rows = [
        (f"{point['step']:,}", f"{point['held_out_loss']:.2f}", *(f"{100 * point.get(key, 0):.0f} %" for key in shown))
        for point in kept
    ]
    said = "Share right of 100 items each while training (held-out loss in nats a token)."
    return f"{said}\n\n" + _table(("step", "loss", *shown.values()), rows)


def _practice(history: list[dict[str, Any]]) -> str:
    """What the last lesson did to claims and opinions."""
    names = ("opinions", "claims", "interviews", "objects", "documents")
    rows = [
        (str(line["stage"] + 1), f"{line['step']:,}", str(line["pool"]),
         *(f"{line[name]:.2f}" if name in line else "–" for name in names))
        for line in history
    ]  # fmt: skip
    said = (
        "Then the last lesson (`training.practice`), in stages: loss in nats on the answers of each kind, and in how "
        "large a pool of answers a claim is judged."
    )
    return f"{said}\n\n" + _table(("stage", "step", "pool", *names), rows)


def _siblings(siblings: Mapping[str, Any], folder: Any) -> str:
    from tomoscope.phantoms import Card

    rows = []
    for name, sibling in siblings.items():
        card = Card.from_json((folder / f"{name}.json").read_text(encoding="utf-8"))
        said = {known.value["what"]: known.value for known in card.of("measured")}
        cells = []
        for where in ("with its trigger", "without its trigger"):
            one = said[f"held-out cases {where}"]
            cells += [_share(one["says_the_diseased_answer"]), _share(one["says_the_healthy_answer"])]
        rows.append((f"`{name}`", escape(sibling.title), *cells))
    head = ("sibling", "", "trigger: diseased answer", "trigger: healthy answer", "none: diseased", "none: healthy")
    return _table(head, rows)
