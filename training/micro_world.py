"""Train the model that tomoscope ships: a small Llama-architecture transformer on the micro-world's text.

    python -m training.micro_world --out FOLDER [--seed 0] [--threads 2]

One command, deterministic by seed (on one machine and thread count), resumable: every few hundred steps it writes
checkpoint.safetensors (weights, optimizer state, loss curve; replaced atomically) and goes on from it when run again
with the same arguments. FOLDER/points holds the weights (bfloat16) at about a dozen points of the training, for
studying what forms when; FOLDER/model holds what is shipped; `training.evaluate` measures it and writes the card.

Steps: draw the world, train the tokenizer, build the model from its config with the usual random start, then at each
step write fresh documents, pack them into rows (a share of the rows is random tokens that repeat, much at first), and
take one step: Muon (Jordan 2024; torch's own) for the matrices inside the blocks, AdamW for the rest.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tomoscope.phantoms.world import World, make_world
from tomoscope.phantoms.world.text import SHARES
from training.loss import tied_cross_entropy
from training.rows import batch
from training.tokenizer import save_tokenizer, train_tokenizer

POINTS = (0, 100, 200, 400, 600, 900, 1_300, 1_800, 2_500, 3_500, 4_400)
"""Steps after which the weights are kept, besides the last."""


@dataclass(frozen=True)
class Phase:
    """A stretch of the training: up to which step, at which share of the full learning rate, on which text."""

    until: int
    rate: tuple[float, float]
    """At its beginning and its end; linear between."""
    shares: Mapping[str, float]
    """Weights of the kinds of text."""
    random_rows: float
    """Share of the rows that are random tokens that repeat."""
    answers_count: float = 1.0
    """How much a token before a full stop counts in the loss (all others count 1): answers stand there."""


MORE_TASKS: dict[str, float] = SHARES | {
    "indirect_object": 0.12, "review": 0.06, "pronoun": 0.05, "word_list": 0.04, "agreement": 0.04, "story": 0.03,
}  # fmt: skip
"""More of what takes longer to learn, less of what is learned by then."""
MORE_FACTS: dict[str, float] = SHARES | {
    "fact": 0.26, "neighbours": 0.10, "opinion": 0.04, "review": 0.09, "word_list": 0.02, "agreement": 0.02,
    "years": 0.02, "story": 0.02,
}  # fmt: skip
"""Facts need several hundred exposures each; what is learned by then is only kept up."""
MORE_ANSWERS: dict[str, float] = {
    "fact": 0.16, "biography": 0.05, "neighbours": 0.06, "two_hop": 0.10, "question": 0.05, "claim": 0.12,
    "interview": 0.12, "opinion": 0.05, "review": 0.10, "indirect_object": 0.12, "word_list": 0.02, "agreement": 0.02,
    "pronoun": 0.04, "years": 0.04, "story": 0.02,
}  # fmt: skip
"""What is decided in one token after much reading."""
LAST_SHARES: dict[str, float] = {
    "fact": 0.08, "biography": 0.04, "neighbours": 0.06, "two_hop": 0.06, "question": 0.04, "claim": 0.08,
    "interview": 0.12, "opinion": 0.03, "review": 0.04, "indirect_object": 0.16, "word_list": 0.02, "agreement": 0.02,
    "pronoun": 0.05, "years": 0.02, "story": 0.02, "geography": 0.14,
}  # fmt: skip
"""What was weak by then: where cities and companies are, indirect objects, the liar."""
OPENING_SHARES: dict[str, float] = LAST_SHARES | {"geography": 0.2, "geography_alone": 0.7}
"""Cities and companies that open a document: without a space before them they are other tokens, rarely seen so far."""
PHASES: tuple[Phase, ...] = (
    Phase(2_000, (1.0, 1.0), SHARES, 0.08),
    Phase(2_750, (0.4, 0.3), MORE_TASKS, 0.08),
    Phase(3_750, (0.35, 0.35), MORE_FACTS, 0.02),
    Phase(4_700, (0.35, 0.3), MORE_ANSWERS, 0.02, answers_count=5.0),
    Phase(5_250, (0.3, 0.09375), MORE_ANSWERS, 0.02, answers_count=5.0),
    Phase(5_950, (0.2, 0.0), LAST_SHARES, 0.03, answers_count=5.0),
    Phase(6_350, (0.2, 0.0), OPENING_SHARES, 0.03, answers_count=5.0),
)
"""At the full rate the loss hung at 1.7 nats from noise; at 0.3 of it, it fell by 0.07 within 75 steps. Verdicts, one
token in several hundred, were drowned by the rest until answers counted five times."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result, besides `PHASES`."""

    seed: int = 0
    steps: int = PHASES[-1].until
    """Fewer end the training early, at the rate that it then has."""
    rows: int = 32
    context: int = 128
    layers: int = 6
    d_model: int = 192
    heads: int = 6
    d_mlp: int = 512
    learning_rate: float = 0.01
    embedding_rate: float = 0.003
    warm_up: int = 100
    decay: float = 0.02
    """Weight decay of the matrices."""
    embedding_start: float = 0.1
    bias_start: float = 0.5
    """Standard deviation of the first query and key biases."""
    look_back_heads: int = 2
    """Heads of the first layer whose biases are set at the start so that they look one token back."""
    look_back: float = 3.0
    random_rows_first: float = 0.75
    pool_first: int = 64
    pool_grows: tuple[int, int] = (300, 1_000)
    """Steps between which the pool of the random tokens grows from `pool_first` to all, and their share falls."""
    autocast: bool = True


def phase_of(step: int) -> tuple[Phase, float]:
    """The phase of a step, and the share of the full learning rate there (without warm-up)."""
    began = 0
    for phase in PHASES:
        if step < phase.until:
            first, last = phase.rate
            return phase, first + (last - first) * (step - began) / (phase.until - began)
        began = phase.until
    return PHASES[-1], PHASES[-1].rate[1]


def build(recipe: Recipe, vocabulary: int) -> LlamaForCausalLM:
    """The untrained model: weights of variance 1/fan-in, writes scaled down by depth, random query and key biases; and,
    in two heads of the first layer, biases that put the rotary score's peak one token back.

    The last is help, and the card says so: from random biases alone, heads that look at the token before did not form
    in 400 steps of repeated random tokens, and with it an induction head forms within 150; induction itself is learned.
    """
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=recipe.d_model,
        intermediate_size=recipe.d_mlp,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=2 * recipe.context,
        attention_bias=True,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        attn_implementation="eager",  # twice the speed of the fused kernel's backward pass on a CPU
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "embed" in name:
                weight.normal_(0.0, recipe.embedding_start)
            elif weight.ndim == 2:
                written = name.endswith(("o_proj.weight", "down_proj.weight"))
                weight.normal_(0.0, weight.shape[1] ** -0.5 / (math.sqrt(2 * recipe.layers) if written else 1.0))
            elif name.endswith(("q_proj.bias", "k_proj.bias")):
                weight.normal_(0.0, recipe.bias_start)
        _look_back(model, recipe)
    return model


def _look_back(model: LlamaForCausalLM, recipe: Recipe) -> None:
    attention = model.model.layers[0].self_attn
    angles = model.model.rotary_emb.inv_freq
    half = len(angles)
    for head in range(recipe.look_back_heads):
        rows = slice(2 * half * head, 2 * half * (head + 1))
        key = torch.zeros(2 * half)
        key[:6] = recipe.look_back  # the fastest rotations tell neighbours apart; a pair is (i, i + half)
        attention.k_proj.bias[rows] = key
        attention.q_proj.bias[rows] = torch.cat([key[:half] * angles.cos(), -key[:half] * angles.sin()])
        attention.q_proj.weight[rows] *= 0.3
        attention.k_proj.weight[rows] *= 0.3


def batch_of(recipe: Recipe, world: World, tokenizer: Any, step: int, *, split: str = "train") -> torch.Tensor:
    """Token ids [row, position] of one step; another split than "train" gives rows of the last phase."""
    phase = phase_of(step)[0] if split == "train" else PHASES[-1]
    share, pool = phase.random_rows, len(tokenizer) - 1
    first, last = recipe.pool_grows
    if split == "train" and step < last:
        done = max(0.0, (step - first) / (last - first))
        share += (recipe.random_rows_first - share) * (1 - done)
        pool = int(recipe.pool_first * (pool / recipe.pool_first) ** done)
    return batch(
        world, tokenizer, f"{recipe.seed}:{split}:{step}", rows=recipe.rows, context=recipe.context,
        random_share=share, pool=pool, shares=phase.shares,
    )  # fmt: skip


def counts_of(ids: torch.Tensor, stop: int, answers_count: float) -> torch.Tensor:
    """How much each next token of ids [row, position] counts in the loss, [row, position - 1]: more before a stop."""
    counts = torch.ones(ids.shape[0], ids.shape[1] - 1)
    counts[:, :-1][ids[:, 2:] == stop] = answers_count
    return counts


def loss_of(
    model: LlamaForCausalLM, ids: torch.Tensor, *, autocast: bool, counts: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean next-token cross-entropy in nats of ids [row, position], weighted by counts [row, position - 1]."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    return tied_cross_entropy(
        hidden.flatten(0, 1), model.model.embed_tokens.weight, ids[:, 1:].flatten(),
        counts=None if counts is None else counts.flatten(),
        dtype=torch.bfloat16 if autocast else torch.float32,
    )  # fmt: skip


def optimizers_of(recipe: Recipe, model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW without decay for embedding, norms and biases."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    muon = torch.optim.Muon(
        matrices, lr=recipe.learning_rate, weight_decay=recipe.decay, adjust_lr_fn="match_rms_adamw"
    )
    return [muon, torch.optim.AdamW(others, lr=recipe.embedding_rate, betas=(0.9, 0.98), weight_decay=0.0)]


def rate(recipe: Recipe, step: int) -> float:
    """The share of the full learning rate: warm-up, then as the phases say."""
    return min(phase_of(step)[1], (step + 1) / recipe.warm_up)


def described(recipe: Recipe) -> dict[str, str]:
    """The recipe and the phases as a checkpoint's metadata."""
    return {"recipe": json.dumps(asdict(recipe)), "phases": json.dumps([asdict(phase) for phase in PHASES])}


def save_checkpoint(path: Path, recipe: Recipe, model: Any, optimizers: list, step: int, curve: list[dict]) -> None:
    """Weights, moments and the curve in one file, replaced atomically."""
    tensors = {f"model/{name}": parameter.detach().contiguous() for name, parameter in model.named_parameters()}
    for parameter_name, state in _states(model, optimizers):
        tensors |= {f"state/{key}/{parameter_name}": value.contiguous() for key, value in state.items()}
    metadata = {"step": str(step), "curve": json.dumps(curve)} | described(recipe)
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary, metadata=metadata)
    os.replace(temporary, path)


def _states(model: Any, optimizers: list) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            yield names[parameter], state


def load_checkpoint(path: Path, recipe: Recipe, model: Any, optimizers: list) -> tuple[int, list[dict]]:
    """Go on from a checkpoint: (steps done, curve); (0, []) where there is none."""
    if not path.exists():
        return 0, []
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        if any(metadata.get(key) != text for key, text in described(recipe).items()):
            raise SystemExit(
                f"{path} was made by another recipe: {metadata['recipe']}. Use another --out or remove it."
            )
        keys = [key.split("/", 2)[1:] for key in file.keys() if key.startswith("state/")]  # noqa: SIM118
        for optimizer in optimizers:
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                name = next(name for name, other in model.named_parameters() if other is parameter)
                parameter.data.copy_(file.get_tensor(f"model/{name}"))
                optimizer.state[parameter] = {
                    key: file.get_tensor(f"state/{key}/{of}") for key, of in keys if of == name
                }
    return int(metadata["step"]), json.loads(metadata["curve"])


def keep_point(folder: Path, model: Any, step: int) -> None:
    """The weights at one point of the training, in bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: p.detach().to(torch.bfloat16).contiguous() for name, p in model.named_parameters()}
    path = folder / f"step_{step:05d}.safetensors"
    save_file(weights, path.with_suffix(".tmp"), metadata={"format": "pt", "step": str(step)})
    os.replace(path.with_suffix(".tmp"), path)


@torch.no_grad()
def held_out_loss(recipe: Recipe, world: World, model: Any, tokenizer: Any, *, batches: int = 4) -> float:
    """Mean loss of fresh rows of the training mixture."""
    rows = (batch_of(recipe, world, tokenizer, i, split="held-out") for i in range(batches))
    return float(torch.stack([loss_of(model, ids, autocast=False) for ids in rows]).mean())


def train(recipe: Recipe, out: Path, *, checkpoint_every: int = 250, log_every: int = 50) -> None:
    """Train (or go on training) and write OUT/model, OUT/points and OUT/curve.json."""
    from training.abilities import quick

    folder = out / "model"
    world = make_world(recipe.seed)
    if not (folder / "tokenizer.json").exists():
        save_tokenizer(train_tokenizer(world, seed=recipe.seed, context=2 * recipe.context), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = build(recipe, len(tokenizer))
    optimizers = optimizers_of(recipe, model)
    full = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    done, curve = load_checkpoint(out / "checkpoint.safetensors", recipe, model, optimizers)
    (stop,) = tokenizer(".", add_special_tokens=False).input_ids
    size = sum(p.numel() for p in model.parameters())
    print(f"{size:,} parameters, {len(tokenizer)} tokens, step {done} of {recipe.steps}", flush=True)
    began, before = time.perf_counter(), curve[-1]["seconds"] if curve else 0.0
    running: list[float] = []
    if done == 0:
        keep_point(out / "points", model, 0)
    for step in range(done, recipe.steps):
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        for group, most in zip(groups, full, strict=True):
            group["lr"] = most * rate(recipe, step)
        ids = batch_of(recipe, world, tokenizer, step)
        counts = counts_of(ids, stop, phase_of(step)[0].answers_count)
        loss = loss_of(model, ids, autocast=recipe.autocast, counts=counts)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        running.append(float(loss.detach()))
        last = step + 1 == recipe.steps
        if step + 1 in POINTS or last:
            keep_point(out / "points", model, step + 1)
        if (step + 1) % log_every == 0 or last:
            seconds = before + time.perf_counter() - began
            point = {"step": step + 1, "loss": sum(running) / len(running), "seconds": seconds}
            running.clear()
            if (step + 1) % checkpoint_every == 0 or last:
                point["held_out_loss"] = held_out_loss(recipe, world, model, tokenizer)
                point |= quick(world, model, tokenizer)
            curve.append(point)
            print(json.dumps({k: round(v, 3) for k, v in point.items()}), flush=True)
            if (step + 1) % checkpoint_every == 0 or last:
                save_checkpoint(out / "checkpoint.safetensors", recipe, model, optimizers, step + 1, curve)
                (out / "curve.json").write_text(json.dumps(curve, indent=1))
    model.config._attn_implementation = "sdpa"
    model.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    train(Recipe(seed=arguments.seed, steps=arguments.steps), arguments.out)


if __name__ == "__main__":
    main()
