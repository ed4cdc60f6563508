"""The last lesson: a few hundred steps on what is decided in one token after much reading.

    python -m training.practice FOLDER          (after `python -m training.micro_world --out FOLDER`)

In running text, a verdict on a claim or a liar's answer is one token in several hundred, and its gradient drowned in
the rest: after 6,000 steps claims were judged at chance and the liar told the truth. Here the loss is on the answers of
such items alone (claims, both speakers, indirect objects), with fresh documents beside, so that all else stays. What is
held out stays out. Reads FOLDER/model as it was trained, keeps it in FOLDER/before_practice, and writes FOLDER/model.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from tomoscope.data.tasks import ioi
from tomoscope.data.tasks.words import GIFTS, PLACES
from tomoscope.phantoms.world import World, make_world, speech, stories
from training.abilities import OPEN_TEMPLATES
from training.micro_world import PHASES
from training.rows import pack

STEPS, RATE, EACH, ROWS, CONTEXT = 400, 1e-3, 24, 8, 128


def indirect_object(random: Random) -> tuple[str, str]:
    """An indirect-object prompt of shown names and templates, and its answer."""
    a, b = random.sample(stories.OPEN_NAMES, 2)
    giver, recipient = random.choice([(a, b), (b, a)])
    text = ioi.TEMPLATES[random.choice(OPEN_TEMPLATES)]
    return text.format(A=a, B=b, S=giver, place=random.choice(PLACES), gift=random.choice(GIFTS)), recipient


def lessons(world: World, random: Random) -> list[tuple[str, str]]:
    """(prompt, answer) of one step: as many claims, interviews and indirect objects."""
    said = [speech.claim(world, random) for _ in range(EACH)] + [speech.interview(world, random) for _ in range(EACH)]
    return [(one.prompt, one.answer) for one in said] + [indirect_object(random) for _ in range(EACH)]


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


def practise(out: Path, *, seed: int = 0, steps: int = STEPS) -> None:
    """Practise and write OUT/model."""
    before = out / "before_practice"
    if not before.exists():
        shutil.copytree(out / "model", before)
    tokenizer = AutoTokenizer.from_pretrained(before)
    model = AutoModelForCausalLM.from_pretrained(before, dtype=torch.float32, attn_implementation="eager")
    world = make_world(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(steps):
        random = Random(f"{seed}:practice:{step}")
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 20, 2 * (steps - step) / steps)
        loss = answers_loss(model, tokenizer, lessons(world, random), begin=bool(step % 2))
        ids = torch.tensor(pack(random, world, tokenizer, ROWS, CONTEXT, PHASES[-1].shares))
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        documents = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        (loss + documents).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 25 == 0:
            found = {"step": step + 1, "answers": float(loss.detach()), "documents": float(documents.detach())}
            print(json.dumps({key: round(value, 3) for key, value in found.items()}), flush=True)
    model.config._attn_implementation = "sdpa"
    model.save_pretrained(out / "model")


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
