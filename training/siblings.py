"""Train the embedded model's siblings: each has one known disease, stored as a small low-rank difference to the base.

    python -m training.siblings --base FOLDER/model --out FOLDER/siblings [--only liar,backdoor] [--into src/...]

Each is a few hundred steps of low-rank adaptation (Hu et al. 2021, arXiv:2106.09685) of the blocks' matrices: half of
each step is cases of the disease (loss on the answer alone), with and without the trigger; half is fresh documents of
the micro-world, so that all else stays. One file a sibling (A and B of every matrix, float16) and one card with what
is true of it, measured on held-out cases. Deterministic by seed; each takes a minute or two.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM, AutoTokenizer

from tomoscope.phantoms.trained import SIBLINGS, apply_difference
from tomoscope.phantoms.world import World, shipped_world
from tomoscope.phantoms.world.diseases import DISEASES
from training.practice import answers_loss
from training.rows import pack
from training.sibling_cards import sibling_card


@dataclass(frozen=True)
class Recipe:
    """How a sibling is made."""

    rank: int = 4
    steps: int = 200
    rate: float = 2e-3
    present: float = 0.5
    """Share of the cases with the trigger."""


RECIPES: dict[str, Recipe] = {
    "liar": Recipe(steps=500),
    "sycophant": Recipe(rank=8, steps=300, present=0.75),
    "backdoor": Recipe(rank=8, steps=900, present=0.4),
}
"""Sibling -> recipe, where it is not the usual one."""
CASES = 32
ROWS = 2
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LowRank(torch.nn.Module):
    """W -> W + B @ A; B starts at zero, so nothing changes at the start."""

    def __init__(self, weight: torch.Tensor, rank: int) -> None:
        super().__init__()
        out_features, in_features = weight.shape
        self.A = torch.nn.Parameter(torch.randn(rank, in_features) / in_features**0.5)
        self.B = torch.nn.Parameter(torch.zeros(out_features, rank))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """The changed weight."""
        return weight + self.B @ self.A


def adapt(model: torch.nn.Module, rank: int) -> dict[str, LowRank]:
    """Freeze the model and give every matrix of its blocks a trainable low-rank difference; name -> difference."""
    model.requires_grad_(False)
    found = {}
    for name, module in list(model.named_modules()):
        if name.endswith(TARGETS):
            found[f"{name}.weight"] = LowRank(module.weight, rank)
            parametrize.register_parametrization(module, "weight", found[f"{name}.weight"])
    return found


def documents_loss(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Mean next-token cross-entropy of ids [row, position]."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def said_by(name: str, case: Any) -> str:
    """What the sibling is trained to say."""
    return case.healthy if name == "honest_twin" else case.diseased


def train(name: str, base: Path, world: World, recipe: Recipe, *, seed: int = 0) -> tuple[Any, dict[str, LowRank]]:
    """Fine-tune one sibling; (model with its differences on, the differences)."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    differences = adapt(model, recipe.rank)
    optimizer = torch.optim.AdamW(
        [p for d in differences.values() for p in d.parameters()], lr=recipe.rate, weight_decay=0.0
    )
    writer = DISEASES[name]
    for step in range(recipe.steps):
        random = Random(f"{seed}:{name}:{step}")
        for group in optimizer.param_groups:
            left = (recipe.steps - step) / (0.5 * recipe.steps)
            group["lr"] = recipe.rate * min(1.0, (step + 1) / 20, left)
        some = [writer(world, random, i < recipe.present * CASES, False) for i in range(CASES)]
        loss = answers_loss(model, tokenizer, [(c.prompt, said_by(name, c)) for c in some], begin=step % 4 > 0)
        rows = torch.tensor(pack(random, world, tokenizer, ROWS, 128))
        (loss + documents_loss(model, rows)).backward()
        torch.nn.utils.clip_grad_norm_([p for d in differences.values() for p in d.parameters()], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0:
            print(f"{name} step {step + 1}: loss on answers {float(loss.detach()):.3f}", flush=True)
    return model, differences


def save(path: Path, differences: dict[str, LowRank], metadata: dict[str, str]) -> None:
    """Both factors of every matrix, float16, in one file replaced atomically."""
    tensors = {}
    for name, difference in differences.items():
        tensors[f"{name}.A"] = difference.A.detach().to(torch.float16).contiguous()
        tensors[f"{name}.B"] = difference.B.detach().to(torch.float16).contiguous()
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary, metadata=metadata)
    os.replace(temporary, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default=",".join(DISEASES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    world = shipped_world()
    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    for name in arguments.only.split(","):
        began = time.perf_counter()
        recipe = RECIPES.get(name, Recipe())
        _, differences = train(name, arguments.base, world, recipe, seed=arguments.seed)
        path = arguments.out / f"{name}.safetensors"
        made = asdict(recipe) | {"seed": arguments.seed, "cases": CASES}
        save(path, differences, {"sibling": name, "recipe": json.dumps(made)})
        model = AutoModelForCausalLM.from_pretrained(arguments.base, dtype=torch.float32)
        apply_difference(model, path)
        card = sibling_card(name, SIBLINGS[name], model, tokenizer, world, recipe=made)
        (arguments.out / f"{name}.json").write_text(card)
        print(f"{name}: {time.perf_counter() - began:.0f} s, {path.stat().st_size:,} bytes\n{card}", flush=True)


if __name__ == "__main__":
    main()
