"""Measure the embedded model and write its card.

    python -m training.evaluate OUT [--into src/tomoscope/model/embedded]

Reads OUT/model (what `training.embedded` made), measures the loss on fresh text beside the unigram's and the bigram's
cross-entropy, the probes on what training held out, and the tasks of `tomoscope.data.tasks` as the scan will use them;
writes card.json, and copies what ships to --into.
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

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from tomoscope.data import TASKS, PairSet
from tomoscope.data.tasks import facts, ioi
from training import holdout, probes, text
from training.embedded import Recipe, batch_of, loss_of, pack

SHIPPED = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "card.json",
)
GOOD = 0.95


def wilson(successes: int, n: int) -> tuple[float, float]:
    """The 95 % Wilson interval of a proportion."""
    z = 1.959963984540054
    share, scale = successes / n, 1 + z * z / n
    middle = (share + z * z / (2 * n)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def share(successes: int, n: int) -> dict[str, float]:
    """A proportion with its interval."""
    low, high = wilson(successes, n)
    return {"value": successes / n, "low": low, "high": high, "n": n}


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
def losses(recipe: Recipe, model, tokenizer, *, rows: int = 256) -> dict[str, object]:
    """Nats per token of fresh text the model never saw, and of the training mixture, beside what counting gives."""
    held = torch.tensor(pack(Random(f"{recipe.seed}:evaluation"), tokenizer, rows, recipe.context))
    per_row = torch.stack([loss_of(model, row[None]) for row in held])
    mixed = torch.stack([loss_of(model, batch_of(recipe, tokenizer, i, split="held-out")) for i in range(16)])
    train = torch.tensor(pack(Random(f"{recipe.seed}:counting"), tokenizer, 4_000, recipe.context))
    half = 1.96 * float(per_row.std()) / math.sqrt(rows)
    mean = float(per_row.mean())
    return {
        "unit": "nats per token",
        "held_out_text": {"value": mean, "low": mean - half, "high": mean + half, "n": int(held[:, 1:].numel())},
        "held_out_mixture": float(mixed.mean()),
        "counting_on_the_same_text": counted_entropies(train, held, len(tokenizer)),
        "uniform": math.log(len(tokenizer)),
    }


def probed(model, tokenizer, n: int) -> dict[str, dict]:
    """Every probe: how often the right token is preferred to the wrong ones, and is the most probable of all."""
    table = {}
    for name in (*probes.PROBES, probes.RANDOM_TOKENS):
        counts = probes.score(model, probes.items_of(tokenizer, name, n, seed=2))
        table[name] = {
            "preferred": share(int(counts["preferred"]), n),
            "top1": share(int(counts["top1"]), n),
            "mean_probability": counts["mean_probability"],
        }
    return table


def on_pairs(model, tokenizer, pairs: PairSet) -> dict[str, object]:
    """A task's clean prompts: the answers' probability above the wrong ones', the top token an answer, the mean logit
    difference.
    """
    aligned = pairs.encode(tokenizer)
    logits = probes.last_logits(model, list(aligned.clean_ids))
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
        "mean_probability": float(p_right.mean()),
        "mean_logit_difference_of_first_answers": float(difference.mean()),
    }


def tasks(model, tokenizer, n: int) -> dict[str, dict]:
    """Every task of the library with this tokenizer, as the scan makes it."""
    table = {
        name: on_pairs(model, tokenizer, spec.make(tokenizer, 100 if name == "facts" else n))
        for name, spec in TASKS.items()
    }
    for relation in facts.FACTS:
        made = facts.make(tokenizer, 100, relations=(relation,))
        table[f"facts: {relation}"] = on_pairs(model, tokenizer, made)
    return table


def held_out(recipe: Recipe) -> dict[str, object]:
    """What training never showed, for the card."""
    return {
        "names": sorted(holdout.NAMES),
        "names_note": "never in indirect-object sentences, pronoun templates or word lists; only in stories and facts",
        "ioi_templates": [ioi.TEMPLATES[i] for i in sorted(holdout.IOI_TEMPLATES)],
        "subject_nouns": sorted(holdout.SUBJECT_NOUNS),
        "subject_nouns_note": "never the subject across a phrase or clause",
        "docstring_arguments": sorted(holdout.ARGUMENT_NAMES),
        "years": sorted(f"{c}{y:02d}" for c in text.CENTURIES for y in range(2, 98) if holdout.year_held_out(c, y)),
        "fact_wordings": {
            f"{relation}: {subject}": facts.TEMPLATES[relation][holdout.fact_template_held_out(relation, subject)]
            for relation, rows in text.FACTS.items()
            for subject in rows
        },
        "fact_wordings_never_shown": holdout.UNSEEN_PARAPHRASES,
        "text": f"fresh documents of the seeds {recipe.seed}:held-out and {recipe.seed}:evaluation",
    }


def card(out: Path, *, n: int) -> dict[str, object]:
    """Everything measured, as one JSON value."""
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    model = AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32).eval()
    with safe_open(out / "checkpoint.safetensors", "pt") as file:
        recipe = Recipe(**json.loads(file.metadata()["recipe"]))
        curve = json.loads(file.metadata()["curve"])
    found, made = probed(model, tokenizer, n), tasks(model, tokenizer, n)
    weak = [
        f"{name} ({kind['preferred']['value']:.1%})"
        for name, kind in (found | made).items()
        if kind["preferred"]["value"] < GOOD
    ]
    return {
        "name": "tomoscope-embedded",
        "license": "Apache-2.0",
        "description": "A small Llama-architecture language model trained on generated English about a small world.",
        "commands": [
            "python -m training.embedded --out OUT",
            "python -m training.evaluate OUT --into src/tomoscope/model/embedded",
        ],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "vocabulary": len(tokenizer),
        "recipe": asdict(recipe),
        "tokens_seen": recipe.steps * recipe.rows * recipe.context,
        "kinds_of_text": {kind: weight for kind, (_, weight, _) in text.KINDS.items()},
        "torch": torch.__version__,
        "initial_weights": "mimetic (keys equal queries, outputs the transpose of values), and two heads of layer 0 "
        "looking one token back by their biases: see training.embedded.start; all of it trained further",
        "losses": losses(recipe, model, tokenizer),
        "held_out": held_out(recipe),
        "probes_on_held_out": found,
        "tasks_of_the_library": made,
        "below_95_percent": weak,
        "curve": [{key: point[key] for key in ("step", "loss", "held_out_loss") if key in point} for point in curve],
        "seconds_of_training": curve[-1]["seconds"],
        "score": "preferred: the right answers' total probability exceeds the wrong ones'; intervals are 95 % Wilson",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--into", type=Path)
    parser.add_argument("-n", type=int, default=500, help="items of each probe and task")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    written = card(arguments.out, n=arguments.n)
    path = arguments.out / "model" / "card.json"
    path.write_text(json.dumps(written, indent=1, ensure_ascii=False) + "\n")
    print(json.dumps({key: written[key] for key in ("losses", "below_95_percent")}, indent=1))
    for name, kind in (written["probes_on_held_out"] | written["tasks_of_the_library"]).items():
        preferred, top = kind["preferred"]["value"], kind["top1"]["value"]
        print(f"{name:62} {preferred:6.1%} {top:6.1%}  p={kind['mean_probability']:.3f}")
    if arguments.into:
        arguments.into.mkdir(parents=True, exist_ok=True)
        for name in SHIPPED:
            shutil.copyfile(arguments.out / "model" / name, arguments.into / name)


if __name__ == "__main__":
    main()
