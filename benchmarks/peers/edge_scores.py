"""The public EAP-IG code on the same model and pairs, in an environment of its own: seconds and scores.

    PYTHON benchmarks/peers/edge_scores.py FOLDER

PYTHON has transformer-lens 2.16, transformers 4.57 and the `eap` package. FOLDER holds a GPT-2 (`config.json`,
`model.safetensors`) and `pairs.json` with token ids. For every line it reads, a method with a batch size, the code is
run as it is but for its device and its tokenizer (tokens are given): with every parameter requiring a gradient, as
shipped, or with all but the position embedding frozen. Seconds are printed, scores written to `eap_*.npy`.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from eap import attribute as eap_attribute
from eap.graph import Graph
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights


def load(folder: Path) -> HookedTransformer:
    hf = transformers.GPT2LMHeadModel.from_pretrained(folder)
    c = hf.config
    cfg = HookedTransformerConfig(
        n_layers=c.n_layer, d_model=c.n_embd, d_head=c.n_embd // c.n_head, n_heads=c.n_head, d_mlp=4 * c.n_embd,
        d_vocab=c.vocab_size, n_ctx=c.n_positions, act_fn="gelu_new", normalization_type="LN", device="cpu",
        eps=c.layer_norm_epsilon, use_attn_result=True, use_split_qkv_input=True, use_hook_mlp_in=True, seed=0,
    )  # fmt: skip
    model = HookedTransformer(cfg)
    model.load_state_dict(convert_gpt2_weights(hf, cfg), strict=False)
    return model.eval()


def main(folder: Path) -> None:
    given = json.loads((folder / "pairs.json").read_text())
    model = load(folder)
    rows = {f"{kind}{i}": ids for kind in ("clean", "corrupted") for i, ids in enumerate(given[kind])}

    def tokens(model: HookedTransformer, names: list[str], max_length: int | None = None) -> tuple:
        ids = torch.tensor([rows[name] for name in names])
        return ids, torch.ones_like(ids), torch.full((len(ids),), ids.shape[1]), ids.shape[1]

    zeros = torch.zeros

    def on_cpu(*args: object, **kwargs: object) -> torch.Tensor:
        return zeros(*args, **{**kwargs, "device": "cpu"})  # ty: ignore

    eap_attribute.tokenize_plus = tokens
    torch.zeros = on_cpu  # the code asks for a cuda device by name
    answers, wrong = torch.tensor(given["answers"]), torch.tensor(given["wrong"])
    n = len(answers)

    def loader(size: int) -> list:
        pieces = [range(i, min(i + size, n)) for i in range(0, n, size)]
        return [([f"clean{i}" for i in p], [f"corrupted{i}" for i in p], torch.tensor(list(p))) for p in pieces]

    def loss(logits: torch.Tensor, clean: torch.Tensor, lengths: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        last = logits[torch.arange(len(label)), lengths - 1]
        mine = torch.arange(len(label))
        return -(last[mine, answers[label]] - last[mine, wrong[label]]).mean()

    for line in sys.stdin:
        asked = json.loads(line)
        method, frozen, size = asked["method"], asked["frozen"], asked["batch_size"]
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not frozen or name == "pos_embed.W_pos")
        graph, batches = Graph.from_model(model), loader(size)
        start = time.perf_counter()
        eap_attribute.attribute(model, graph, batches, loss, method, ig_steps=given["steps"], quiet=True)
        seconds = time.perf_counter() - start
        model.zero_grad(set_to_none=True)
        # the code divides a batch's mean by the number of pairs again
        np.save(folder / f"eap_{method}.npy", graph.scores.numpy() * size)
        print(json.dumps({"seconds": seconds}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
