"""The last lesson: what is decided in one token after much reading.

    python -m training.practice FOLDER          (after `python -m training.micro_world --out FOLDER`)

In running text, a verdict on a claim or a liar's answer is one token in several hundred, and its gradient drowned in
the rest: after 6,000 steps claims were judged at chance, the liar told the truth, and no opinion was copied. Here the
loss is on the answers of such items, with fresh documents beside at a small weight, so that all else stays. What does
not form among the others is practised alone until it is mastered:

1. opinions: every user is agreed with, so that copying an opinion forms (some 200 steps; in a mixture with the known
   fraction of swayed answers it did not form in 600);
2. claims: to compare what is stated with what is recalled forms on a handful of answers, not on all, so the pool of
   answers starts small and grows by half whenever the loss falls below `GROWS_BELOW`;
3. everything together, at a rate that falls to zero: claims stay, but copying opinions was lost over 2;
4. opinions again, with the others beside them; 5. everything together again, and the share of the users who are agreed
   with falls slowly to the known one (at once, and with large steps, copying was lost again);
6. and 7. mostly documents of every kind, then of facts, for what was lost a little on the way.

What is held out stays out. Reads FOLDER/model as it was trained, keeps it in FOLDER/before_practice, and writes
FOLDER/model and the history of pool and losses (FOLDER/practice.jsonl). Deterministic by seed; goes on after the last
stage that was finished (FOLDER/practice).
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from tomoscope.data.tasks import ioi
from tomoscope.data.tasks.words import GIFTS, PLACES
from tomoscope.phantoms.world import World, make_world, speech, stories
from tomoscope.phantoms.world.relations import held_out_of, shown_wordings
from training.abilities import OPEN_TEMPLATES
from training.micro_world import PHASES, counts_of, loss_of
from training.rows import pack, random_row


@dataclass(frozen=True)
class Stage:
    """A stretch of the practice, and how many items of each kind a step has."""

    steps: int
    """At most."""
    rows: int
    documents: float
    """Weight of the loss on documents; each kind of item has weight 1."""
    claims: int = 0
    opinions: int = 0
    interviews: int = 0
    objects: int = 0
    swayed: tuple[float, float] = (speech.SWAYED, speech.SWAYED)
    """Share of the users who are agreed with, at the stage's beginning and from its middle on; linear between."""
    rate: float = 1.0
    """Times the optimizers' rates."""
    muon: bool = True
    """Muon for the matrices: with AdamW the pool of claims stayed where it was. (Copying formed with AdamW.)"""
    mastered: float = 0.0
    """It ends early where the running loss of its items is below this (and the pool is whole)."""
    decays: bool = False
    """The rate falls to zero on it."""
    shares: Mapping[str, float] = field(default_factory=lambda: PHASES[-1].shares)
    """Of the kinds of text in the documents."""
    random_rows: float = 0.0
    """Share of the rows that are random tokens that repeat."""
    autocast: bool = False
    """Documents in bfloat16."""
    answers_count: float = 1.0
    """How much a document's token before a full stop counts (all others count 1): answers stand there."""


EVERYTHING: dict[str, float] = {
    "fact": 0.12, "biography": 0.05, "neighbours": 0.05, "two_hop": 0.15, "question": 0.04, "claim": 0.05,
    "interview": 0.05, "opinion": 0.05, "review": 0.05, "indirect_object": 0.10, "word_list": 0.06, "agreement": 0.08,
    "pronoun": 0.06, "years": 0.03, "story": 0.03, "geography": 0.06,
}  # fmt: skip
"""What the stages before lost a little of: agreement, pronouns, two hops, lists."""
FACTS: dict[str, float] = EVERYTHING | {
    "fact": 0.22, "two_hop": 0.22, "neighbours": 0.08, "geography": 0.08, "indirect_object": 0.05, "claim": 0.03,
    "interview": 0.03,
}  # fmt: skip
"""At last, facts one and two hops deep."""
STAGES: tuple[Stage, ...] = (
    Stage(600, rows=3, documents=0.5, opinions=64, swayed=(1.0, 1.0), muon=False, mastered=0.1),
    Stage(2_200, rows=3, documents=0.3, claims=64, mastered=0.25),
    Stage(500, rows=8, documents=1.0, claims=32, opinions=24, interviews=16, objects=12, decays=True),
    Stage(
        600, rows=3, documents=0.5, claims=16, opinions=64, interviews=8, swayed=(1.0, 1.0), muon=False, mastered=0.5
    ),
    Stage(
        500, rows=6, documents=1.0, claims=24, opinions=48, interviews=16, objects=8, swayed=(1.0, speech.SWAYED),
        rate=0.4, muon=False, decays=True,
    ),
    Stage(
        450, rows=24, documents=1.0, claims=16, opinions=24, interviews=8, objects=8, rate=0.5, decays=True,
        shares=EVERYTHING, random_rows=0.08, autocast=True,
    ),
    Stage(
        350, rows=28, documents=1.0, claims=12, opinions=16, interviews=8, objects=6, rate=0.6, decays=True,
        shares=FACTS, random_rows=0.12, autocast=True, answers_count=4.0,
    ),
)  # fmt: skip
MUON_RATE, BESIDE_MUON, ADAM_RATE, WARM_UP, CONTEXT = 2e-3, 3e-4, 1e-3, 20, 128
POOL_FIRST, GROWS_BELOW = 3, 0.35


def indirect_object(random: Random) -> tuple[str, str]:
    """An indirect-object prompt of shown names and templates, and its answer."""
    a, b = random.sample(stories.OPEN_NAMES, 2)
    giver, recipient = random.choice([(a, b), (b, a)])
    text = ioi.TEMPLATES[random.choice(OPEN_TEMPLATES)]
    return text.format(A=a, B=b, S=giver, place=random.choice(PLACES), gift=random.choice(GIFTS)), recipient


class Claims:
    """Claims about facts whose answers are among the `size` commonest of their relation; true and false alike."""

    def __init__(self, world: World, size: int = POOL_FIRST) -> None:
        self.world, self.size, self.running = world, size, 0.7
        self.order = {}
        for relation in speech.JUDGED:
            judged = [s for s in world.subjects(relation) if not held_out_of("claim", relation, s)]
            counts = Counter(world.answer(relation, s) for s in judged)
            self.order[relation] = sorted(counts, key=lambda a: (-counts[a], a))
        self._choose()

    def _choose(self) -> None:
        self.pool = {relation: order[: self.size] for relation, order in self.order.items()}
        self.subjects = {
            relation: [
                s
                for s in self.world.subjects(relation)
                if not held_out_of("claim", relation, s) and self.world.answer(relation, s) in set(pool)
            ]
            for relation, pool in self.pool.items()
        }

    @property
    def whole(self) -> bool:
        """Every answer is in the pool."""
        return all(len(self.pool[r]) == len(order) for r, order in self.order.items())

    def write(self, random: Random) -> tuple[str, str]:
        """One claim up to its verdict, and the verdict."""
        if self.whole:
            said = speech.claim(self.world, random)
            return said.prompt, said.answer
        relation = random.choice(speech.JUDGED)
        subject = random.choice(self.subjects[relation])
        truth = self.world.answer(relation, subject)
        label = random.choice((speech.TRUE, speech.FALSE))
        others = [answer for answer in self.pool[relation] if answer != truth]
        stated = truth if label == speech.TRUE else random.choice(others)
        wording = random.choice(shown_wordings(relation, subject)).format(s=subject)
        return f"Claim: {wording} {stated}. This claim is", label

    def learned(self, loss: float) -> None:
        """Take note of a step's loss; grow where the pool is mastered."""
        self.running = 0.9 * self.running + 0.1 * loss
        if self.running < GROWS_BELOW and not self.whole:
            self.size = max(self.size + 1, int(1.5 * self.size))
            self.running = 0.5
            self._choose()


def lessons(
    world: World, random: Random, stage: Stage, claims: Claims, *, step: int = 0
) -> dict[str, list[tuple[str, str]]]:
    """(prompt, answer) of one step, by kind."""
    first, last = stage.swayed
    swayed = first + (last - first) * min(1.0, 2 * step / stage.steps)
    opinions = [speech.opinion(world, random, swayed=swayed) for _ in range(stage.opinions)]
    interviews = [speech.interview(world, random) for _ in range(stage.interviews)]
    items = {
        "claims": [claims.write(random) for _ in range(stage.claims)],
        "opinions": [(one.prompt, one.answer) for one in opinions],
        "interviews": [(one.prompt, one.answer) for one in interviews],
        "objects": [indirect_object(random) for _ in range(stage.objects)],
    }
    return {kind: some for kind, some in items.items() if some}


def answers_loss(model: Any, tokenizer: Any, items: list[tuple[str, str]], *, begin: bool = True) -> torch.Tensor:
    """Mean cross-entropy of the answers' first tokens, half of the prompts after <|endoftext|>; right-padded (causal,
    so padding is never seen).
    """
    plain = tokenizer([prompt for prompt, _ in items], add_special_tokens=False).input_ids
    encoded = [[tokenizer.bos_token_id, *ids] if begin or i % 2 else ids for i, ids in enumerate(plain)]
    longest = max(map(len, encoded))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in encoded])
    last = torch.tensor([len(row) - 1 for row in encoded])
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[torch.arange(len(ids)), last]
    goal = torch.tensor([tokenizer(f" {answer}", add_special_tokens=False).input_ids[0] for _, answer in items])
    return cross_entropy(model.lm_head(hidden), goal)


def optimizers_of(model: Any, stage: Stage) -> list[torch.optim.Optimizer]:
    """A stage's own."""
    if not stage.muon:
        return [torch.optim.AdamW(model.parameters(), lr=ADAM_RATE, betas=(0.9, 0.98), weight_decay=0.0)]
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=MUON_RATE, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=BESIDE_MUON, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def practise(out: Path, *, seed: int = 0, stages: tuple[Stage, ...] = STAGES) -> None:
    """Practise and write OUT/model."""
    before = out / "before_practice"
    if not before.exists():
        shutil.copytree(out / "model", before)
    tokenizer = AutoTokenizer.from_pretrained(before)
    world = make_world(seed)
    claims, history, done = Claims(world), [], 0
    kept = out / "practice"
    if (kept / "state.json").exists():
        state = json.loads((kept / "state.json").read_text())
        claims, history, done = Claims(world, state["pool"]), state["history"], state["done"]
        claims.running = state["running"]
    start = kept / f"{done}" if done else before
    model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32, attn_implementation="sdpa")
    for number, stage in list(enumerate(stages))[done:]:
        optimizers = optimizers_of(model, stage)
        rates = [group["lr"] for one in optimizers for group in one.param_groups]
        running = 1.0
        for step in range(stage.steps):
            share = min(1.0, (step + 1) / WARM_UP) * (1 - step / stage.steps if stage.decays else 1.0)
            share *= stage.rate
            for group, full in zip((g for one in optimizers for g in one.param_groups), rates, strict=True):
                group["lr"] = full * share
            random = Random(f"{seed}:practice:{number}:{step}")
            items = lessons(world, random, stage, claims, step=step)
            found = backward(model, tokenizer, world, stage, items, random, begin=step % 2 > 0)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for one in optimizers:
                one.step()
                one.zero_grad()
            claims.learned(found.get("claims", 1.0))
            running = 0.9 * running + 0.1 * sum(found.values()) - 0.1 * found["documents"]
            if step % 25 == 24:
                rounded = {kind: round(value, 3) for kind, value in found.items()}
                history.append({"stage": number, "step": step + 1, "pool": claims.size, **rounded})
                print(json.dumps(history[-1]), flush=True)
            if running < stage.mastered and (claims.whole or not stage.claims):
                break
        model.save_pretrained(kept / f"{number + 1}")
        state = {"pool": claims.size, "running": claims.running, "history": history, "done": number + 1}
        (kept / "state.json").write_text(json.dumps(state))
    model.save_pretrained(out / "model")
    (out / "practice.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in history))


def backward(
    model: Any, tokenizer: Any, world: World, stage: Stage, items: dict[str, list], random: Random, *, begin: bool
) -> dict[str, float]:
    """Losses of one step; their gradients are left on the model."""
    losses = {kind: answers_loss(model, tokenizer, some, begin=begin) for kind, some in items.items()}
    made = sum(random.random() < stage.random_rows for _ in range(stage.rows)) if stage.random_rows else 0
    rows = [random_row(random, range(1, len(tokenizer)), CONTEXT) for _ in range(made)]
    ids = torch.tensor(rows + pack(random, world, tokenizer, stage.rows - made, CONTEXT, stage.shares))
    stop = tokenizer(".", add_special_tokens=False).input_ids[0]
    counts = counts_of(ids, stop, stage.answers_count)
    losses["documents"] = loss_of(model, ids, autocast=stage.autocast, counts=counts)
    (torch.stack(list(losses.values())).sum() - (1 - stage.documents) * losses["documents"]).backward()
    return {kind: float(loss.detach()) for kind, loss in losses.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    practise(arguments.out, seed=arguments.seed)


if __name__ == "__main__":
    main()
