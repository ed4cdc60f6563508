"""Train the model that tomoscope ships: a small Llama-architecture transformer on the small world's text.

    python -m training.embedded --out FOLDER [--steps 2800] [--seed 0]

One command, deterministic by seed (on one machine and thread count), resumable: it writes a checkpoint (weights,
optimizer state, loss curve; one safetensors file, replaced atomically) every few hundred steps and goes on from it
when run again with the same arguments. Steps: train the tokenizer, build the model from its config, then at each step
write fresh documents, pack them into rows (a share of the rows is random tokens that repeat), and take one AdamW step
under warm-up and cosine. When done: FOLDER/model holds what is shipped; `python -m training.evaluate FOLDER` measures
it and writes the card.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from training import probes, text
from training.tokenizer import save_tokenizer, train_tokenizer


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result."""

    seed: int = 0
    steps: int = 2_800
    rows: int = 16
    context: int = 128
    layers: int = 4
    d_model: int = 128
    heads: int = 4
    d_mlp: int = 384
    learning_rate: float = 3e-3
    warm_up: int = 100
    weight_decay: float = 0.1
    random_rows: float = 0.12
    random_rows_first: float = 0.6
    random_until: int = 500
    autocast: bool = True


LOOK_BACK_HEADS = 2
LOOK_BACK = 3.0


@torch.no_grad()
def start(model: LlamaForCausalLM) -> None:
    """Initial weights under which copying forms in a few hundred steps instead of many thousands.

    Mimetic initialization (Trockman and Kolter 2023, arXiv:2305.09828): in each head keys begin equal to queries, and
    what is written is the transpose of what is read. And, our own, in two heads of the first layer the biases of query
    and key are set so that the rotary score is highest one token back. All of it is trained further; the card says so,
    for what a scan finds there began so.
    """
    for block in model.model.layers:
        attention = block.self_attn
        attention.q_proj.weight.normal_(0.0, 0.088)
        attention.k_proj.weight.copy_(attention.q_proj.weight)
        attention.v_proj.weight.normal_(0.0, 0.088)
        attention.o_proj.weight.copy_(0.25 * attention.v_proj.weight.T)
        for name, std in (("gate_proj", 0.06), ("up_proj", 0.06), ("down_proj", 0.02)):
            getattr(block.mlp, name).weight.normal_(0.0, std)
    model.model.embed_tokens.weight.normal_(0.0, 0.08)
    attention = model.model.layers[0].self_attn
    angles = model.model.rotary_emb.inv_freq
    half = len(angles)
    for head in range(LOOK_BACK_HEADS):
        rows = slice(2 * half * head, 2 * half * (head + 1))
        key = torch.zeros(2 * half)
        # the fastest rotations tell neighbours apart; a pair is (i, i + half)
        key[:6] = LOOK_BACK
        attention.k_proj.bias[rows] = key
        attention.q_proj.bias[rows] = torch.cat([key[:half] * angles.cos(), -key[:half] * angles.sin()])
        attention.q_proj.weight[rows] *= 0.3
        attention.k_proj.weight[rows] *= 0.3


def build(recipe: Recipe, vocabulary: int) -> LlamaForCausalLM:
    """The untrained model."""
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=recipe.d_model,
        intermediate_size=recipe.d_mlp,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=recipe.context,
        attention_bias=True,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    start(model)
    return model


def random_row(random: Random, vocabulary: int, context: int) -> list[int]:
    """Random tokens, then a segment of them again and again to the end of the row."""
    segment = [random.randrange(1, vocabulary) for _ in range(random.randint(2, context // 2))]
    start = [random.randrange(1, vocabulary) for _ in range(random.randint(0, context // 4))]
    row = start + segment * (context // len(segment) + 1)
    return row[:context]


def random_share(recipe: Recipe, step: int) -> float:
    """Share of the rows that are random tokens: much at first, so that copying forms early, then little."""
    done = min(1.0, step / recipe.random_until)
    return recipe.random_rows_first + (recipe.random_rows - recipe.random_rows_first) * max(0.0, 2 * done - 1)


def batch_of(recipe: Recipe, tokenizer, step: int, *, split: str = "train") -> torch.Tensor:
    """Token ids [row, position] of one step: a pure function of seed, split and step."""
    random = Random(f"{recipe.seed}:{split}:{step}")
    share = random_share(recipe, step) if split == "train" else recipe.random_rows
    n_random = sum(random.random() < share for _ in range(recipe.rows))
    rows = [random_row(random, len(tokenizer), recipe.context) for _ in range(n_random)]
    return torch.tensor(rows + pack(random, tokenizer, recipe.rows - n_random, recipe.context))


def pack(random: Random, tokenizer, rows: int, context: int) -> list[list[int]]:
    """Rows of whole documents with <|endoftext|> between them; half of the rows begin with it.

    The last document is cut.
    """
    end = tokenizer.eos_token_id
    packed: list[list[int]] = []
    pool: list[list[int]] = []
    while len(packed) < rows:
        row = [end] if random.random() < 0.5 else []
        while len(row) < context:
            if not pool:
                pool = tokenizer([text.document(random) for _ in range(2 * rows)]).input_ids
            row += [*pool.pop(), end]
        packed.append(row[:context])
    return packed


def loss_of(model, ids: torch.Tensor) -> torch.Tensor:
    """Mean next-token cross-entropy in nats."""
    logits = model(input_ids=ids).logits[:, :-1].float()
    return cross_entropy(logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1))


def rate(recipe: Recipe, step: int) -> float:
    """Warm-up, then cosine to a hundredth."""
    if step < recipe.warm_up:
        return recipe.learning_rate * (step + 1) / recipe.warm_up
    done = (step - recipe.warm_up) / max(1, recipe.steps - recipe.warm_up)
    return recipe.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def save_checkpoint(path: Path, recipe: Recipe, model, optimizer, step: int, curve: list[dict]) -> None:
    """Weights, moments and the curve in one file, replaced atomically."""
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        tensors[f"model/{name}"] = parameter.detach().contiguous()
        for key in ("exp_avg", "exp_avg_sq"):
            tensors[f"{key}/{name}"] = optimizer.state[parameter][key].contiguous()
    metadata = {"step": str(step), "recipe": json.dumps(asdict(recipe)), "curve": json.dumps(curve)}
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary, metadata=metadata)
    os.replace(temporary, path)


def load_checkpoint(path: Path, recipe: Recipe, model, optimizer) -> tuple[int, list[dict]]:
    """Go on from a checkpoint: (steps done, curve); (0, []) where there is none."""
    if not path.exists():
        return 0, []
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        if json.loads(metadata["recipe"]) != asdict(recipe):
            raise SystemExit(
                f"{path} was made by another recipe: {metadata['recipe']}. Use another --out or remove it."
            )
        step = int(metadata["step"])
        for name, parameter in model.named_parameters():
            parameter.data.copy_(file.get_tensor(f"model/{name}"))
            optimizer.state[parameter] = {
                "step": torch.tensor(float(step)),
                **{key: file.get_tensor(f"{key}/{name}") for key in ("exp_avg", "exp_avg_sq")},
            }
    return step, json.loads(metadata["curve"])


def optimizer_of(recipe: Recipe, model) -> torch.optim.AdamW:
    """AdamW; no weight decay on norms."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98), eps=1e-8, foreach=True)


def measure(recipe: Recipe, model, tokenizer) -> dict[str, float]:
    """A quick look: held-out loss and the share of right answers of each probe."""
    model.eval()
    with torch.no_grad():
        held = torch.stack([loss_of(model, batch_of(recipe, tokenizer, i, split="held-out")) for i in range(4)]).mean()
    found = {"held_out_loss": float(held)}
    for name in (*probes.PROBES, probes.RANDOM_TOKENS):
        counts = probes.score(model, probes.items_of(tokenizer, name, 100, seed=1))
        found[name] = counts["preferred"] / counts["n"]
        found[f"{name} (top1)"] = counts["top1"] / counts["n"]
    model.train()
    return found


def train(recipe: Recipe, out: Path, *, checkpoint_every: int = 250, log_every: int = 50) -> None:
    """Train (or go on training) and write OUT/model and OUT/curve.json."""
    out.mkdir(parents=True, exist_ok=True)
    folder = out / "model"
    if not (folder / "tokenizer.json").exists():
        save_tokenizer(train_tokenizer(seed=recipe.seed, context=recipe.context), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = build(recipe, len(tokenizer))
    optimizer = optimizer_of(recipe, model)
    done, curve = load_checkpoint(out / "checkpoint.safetensors", recipe, model, optimizer)
    size = sum(p.numel() for p in model.parameters())
    print(f"{size:,} parameters, {len(tokenizer)} tokens, step {done} of {recipe.steps}")
    began, running = time.perf_counter(), []
    for step in range(done, recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(recipe, step)
        ids = batch_of(recipe, tokenizer, step)
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.autocast):
            loss = loss_of(model, ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        running.append(float(loss.detach()))
        if (step + 1) % log_every == 0:
            point = {"step": step + 1, "loss": sum(running) / len(running), "seconds": time.perf_counter() - began}
            running.clear()
            if (step + 1) % checkpoint_every == 0 or step + 1 == recipe.steps:
                point |= measure(recipe, model, tokenizer)
            curve.append(point)
            print(json.dumps({k: round(v, 3) for k, v in point.items()}), flush=True)
            if (step + 1) % checkpoint_every == 0 or step + 1 == recipe.steps:
                save_checkpoint(out / "checkpoint.safetensors", recipe, model, optimizer, step + 1, curve)
                (out / "curve.json").write_text(json.dumps(curve, indent=1))
    model.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    train(Recipe(seed=arguments.seed, steps=arguments.steps), arguments.out)


if __name__ == "__main__":
    main()
