"""Measure the embedded model and write its card.

    python -m training.evaluate OUT [--into src/tomoscope/model/embedded] [-n 500]

Reads OUT/model (what `training.micro_world` made), measures the loss on fresh text beside the unigram's and the
bigram's cross-entropy, every ability on what training held out, and the tasks of the library and of the micro-world as
the scan will use them; writes card.json, and copies what ships to --into. Plain forwards of transformers only: the card
is what tomoscope's own exams are compared with.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from tomoscope.data import TASKS, PairSet
from tomoscope.data.tasks import ioi
from tomoscope.errors import TomoscopeError
from tomoscope.phantoms.world import World, holdout, make_world, speech, stories
from tomoscope.phantoms.world.tasks import TASKS as WORLD_TASKS
from training import abilities
from training.micro_world import PHASES, Recipe, loss_of
from training.rows import pack
from training.shares import share

SHIPPED = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "card.json",
)
GOOD = 0.95


def counted_entropies(train: torch.Tensor, held: torch.Tensor, vocabulary: int) -> dict[str, float]:
    """Cross-entropy in nats of the held-out rows [row, position] under unigram and bigram counts of the training
    rows.
    """
    unigram = Counter(train.flatten().tolist())
    total = sum(unigram.values()) + vocabulary
    first, pairs = Counter(train[:, :-1].flatten().tolist()), Counter(zip(*_pairs(train), strict=True))

    def p_unigram(token: int) -> float:
        return (unigram[token] + 1) / total

    one = two = 0.0
    before, after = _pairs(held)
    for a, b in zip(before, after, strict=True):
        one -= math.log(p_unigram(b))
        two -= math.log((pairs[a, b] + p_unigram(b)) / (first[a] + 1))
    return {"unigram": one / len(after), "bigram": two / len(after)}


def _pairs(rows: torch.Tensor) -> tuple[list[int], list[int]]:
    return rows[:, :-1].flatten().tolist(), rows[:, 1:].flatten().tolist()


@torch.no_grad()
def losses(recipe: Recipe, world: World, model: Any, tokenizer: Any, *, rows: int = 256) -> dict[str, object]:
    """Nats per token of fresh text the model never saw, beside what counting gives."""
    held = torch.tensor(
        pack(Random(f"{recipe.seed}:evaluation"), world, tokenizer, rows, recipe.context, PHASES[-1].shares)
    )
    per_row = torch.stack([loss_of(model, row[None], autocast=False) for row in held])
    train = torch.tensor(
        pack(Random(f"{recipe.seed}:counting"), world, tokenizer, 4_000, recipe.context, PHASES[-1].shares)
    )
    half = 1.96 * float(per_row.std()) / math.sqrt(rows)
    mean = float(per_row.mean())
    return {
        "unit": "nats per token",
        "held_out_text": {"value": mean, "low": mean - half, "high": mean + half, "n": rows},
        "n_is": "rows of text",
        "counting_on_the_same_text": counted_entropies(train, held, len(tokenizer)),
        "uniform": math.log(len(tokenizer)),
    }


def measured(world: World, model: Any, tokenizer: Any, n: int) -> dict[str, dict]:
    """Every ability: how often the right token is preferred to the wrong ones, and is the most probable of all."""
    table = {}
    for name in abilities.ABILITIES:
        scores = abilities.score(model, tokenizer, abilities.items_of(world, name, n, seed=2))
        table[name] = {
            "preferred": share(int(scores.preferred.sum()), n),
            "top1": share(int(scores.top1.sum()), n),
            "mean_probability": round(float(scores.right.mean()), 4),
            "mean_probability_of_wrong": round(float(scores.wrong.mean()), 4),
        }
    ids = abilities.random_tokens(32, len(tokenizer), seed=3)
    half = ids.shape[1] // 2
    with torch.no_grad():
        hits = model(input_ids=ids).logits[:, half:-1].argmax(-1) == ids[:, half + 1 :]
    table["induction, random tokens"] = {
        "top1": share(int(hits.sum()), hits.numel()),
        "note": "tokens of one row are not independent: the interval is for rows of one token",
    }
    return table


@torch.no_grad()
def on_pairs(model: Any, tokenizer: Any, pairs: PairSet) -> dict[str, object]:
    """A task's clean prompts: the answers' probability above the wrong ones', the top token an answer, the mean logit
    difference.
    """
    aligned = pairs.encode(tokenizer)
    logits = torch.stack(
        [model(input_ids=torch.tensor([list(ids)]), logits_to_keep=1).logits[0, -1] for ids in aligned.clean_ids]
    )
    right, wrong = torch.from_numpy(aligned.answer_ids), torch.from_numpy(aligned.wrong_ids)
    p = logits.softmax(-1)
    p_right = (p.gather(1, right.clamp_min(0)) * (right >= 0)).sum(1)
    p_wrong = (p.gather(1, wrong.clamp_min(0)) * (wrong >= 0)).sum(1)
    top = (logits.argmax(1)[:, None] == right).any(1)
    difference = logits.gather(1, right[:, :1]) - logits.gather(1, wrong[:, :1])
    return {
        "corruption": pairs.corruption,
        "seed": pairs.seed,
        "preferred": share(int((p_right > p_wrong).sum()), len(pairs)),
        "top1": share(int(top.sum()), len(pairs)),
        "mean_probability": round(float(p_right.mean()), 4),
        "mean_logit_difference_of_first_answers": round(float(difference.mean()), 4),
    }


def tasks(model: Any, tokenizer: Any, n: int) -> dict[str, dict]:
    """Every task of the library and of the micro-world with this tokenizer, as the scan makes it."""
    table = {}
    for name, spec in (TASKS | WORLD_TASKS).items():
        try:
            table[name] = on_pairs(model, tokenizer, spec.make(tokenizer, 100 if name == "facts" else n))
        except TomoscopeError as error:
            print(f"{name}: not measured, {error.what}")
    return table


def held_out(recipe: Recipe) -> dict[str, object]:
    """What training never showed, for the card."""
    years = [f"{c}{y:02d}" for c in stories.CENTURIES for y in range(2, 98) if holdout.year_held_out(c, y)]
    return {
        "names": sorted(holdout.NAMES),
        "names_note": "never in indirect-object sentences, pronoun templates or word lists; in stories and facts",
        "ioi_templates": [ioi.TEMPLATES[i] for i in sorted(holdout.IOI_TEMPLATES)],
        "subject_nouns": sorted(holdout.SUBJECT_NOUNS),
        "subject_nouns_note": "never the subject across a phrase or clause",
        "years": years,
        "by_rule": "one wording of every relation for each subject, wordings shown for nobody, a fifth of the people "
        "of each two-hop relation, a fifth of the facts in claims, interviews and opinions: see "
        "tomoscope.phantoms.world.relations",
        "text": f"fresh documents of the seeds {recipe.seed}:held-out and {recipe.seed}:evaluation",
    }


def practice(out: Path) -> list[dict[str, object]]:
    """The history of the last lesson, a dozen points of each of its stages."""
    path = out / "practice.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    kept = []
    for stage in sorted({line["stage"] for line in lines}):
        own = [line for line in lines if line["stage"] == stage]
        step = max(1, len(own) // 12)
        kept += [*own[::step], *([own[-1]] if (len(own) - 1) % step else [])]
    return kept


def card(out: Path, *, n: int) -> dict[str, object]:
    """Everything measured, as one JSON value."""
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    model = AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32).eval()
    with safe_open(out / "checkpoint.safetensors", "pt") as file:
        recipe = Recipe(**json.loads(file.metadata()["recipe"]))
        curve = json.loads(file.metadata()["curve"])
    world = make_world(recipe.seed)
    found = measured(world, model, tokenizer, n)
    return {
        "name": "tomoscope-micro-world",
        "license": "Apache-2.0",
        "description": "A small Llama-architecture language model trained on generated English about a small world.",
        "commands": [
            "python -m training.micro_world --out OUT",
            "python -m training.practice OUT",
            "python -m training.evaluate OUT --into src/tomoscope/model/embedded",
        ],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "vocabulary": len(tokenizer),
        "recipe": asdict(recipe),
        "phases": [asdict(phase) for phase in PHASES],
        "tokens_seen": recipe.steps * recipe.rows * recipe.context,
        "torch": torch.__version__,
        "initial_weights": f"random; {recipe.look_back_heads} heads of layer 0 look one token back by their biases: "
        "see training.micro_world.build; all of it trained further",
        "swayed_share_of_the_text": speech.SWAYED,
        "losses": losses(recipe, world, model, tokenizer),
        "held_out": held_out(recipe),
        "abilities": found,
        "tasks_of_the_library": tasks(model, tokenizer, n),
        "below_95_percent": [
            name for name, kind in found.items() if kind.get("preferred", kind["top1"])["value"] < GOOD
        ],
        "curve": curve,
        "practice": practice(out),
        "seconds_of_training": round(curve[-1]["seconds"]),
        "score": "preferred: the right answers' total probability exceeds the wrong ones'; top1: the most probable "
        "token of all is right; intervals are 95 % Wilson",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--into", type=Path)
    parser.add_argument("-n", type=int, default=500, help="items of each ability and task")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    written = card(arguments.out, n=arguments.n)
    path = arguments.out / "model" / "card.json"
    path.write_text(json.dumps(written, indent=1, ensure_ascii=False) + "\n")
    print(json.dumps({key: written[key] for key in ("losses", "below_95_percent")}, indent=1))
    for name, kind in (written["abilities"] | written["tasks_of_the_library"]).items():
        preferred = kind.get("preferred", kind["top1"])["value"]
        print(f"{name:62} {preferred:6.1%} {kind['top1']['value']:6.1%}")
    if arguments.into:
        arguments.into.mkdir(parents=True, exist_ok=True)
        for name in SHIPPED:
            shutil.copyfile(arguments.out / "model" / name, arguments.into / name)


if __name__ == "__main__":
    main()
