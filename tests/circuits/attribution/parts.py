"""What the tests of attribution graphs share: random transcoders, and the reference's model with its transcoders."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_file

from tests.zoo import ZOO
from tomoscope.features import CrossLayerTranscoder, JumpReLU, ReLU, SparseCoder, TopK, Transcoders, TranscoderSet
from tomoscope.model import Subject, build_subject, open_model

REFERENCE = Path(__file__).parents[2] / "reference" / "attribution_graph"
PROMPT = [5, 9, 17, 33, 40, 41, 60]
KINDS = ("relu", "jump_skip", "topk_mid", "relu_unit", "cross")


@cache
def subject_of(name: str, dtype: torch.dtype = torch.float64) -> Subject:
    return build_subject(ZOO[name].build().to(dtype), name=name)


def transcoders(
    kind: str,
    *,
    layers: int = 3,
    width: int = 32,
    features: int = 40,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Transcoders:
    """Random dictionaries of which a third fires."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    reads = {"mid": "resid_mid", "unit": "normalized"}.get(kind.partition("_")[2], "mlp.in")
    if kind == "cross":
        return CrossLayerTranscoder(
            tuple(normal(width, features) / width**0.5 for _ in range(layers)),
            tuple(0.3 * normal(features, layers - i, width) for i in range(layers)),
            tuple(0.1 * normal(features) - 0.5 for _ in range(layers)),
            tuple(0.1 * normal(width) for _ in range(layers)),
            reads=reads,
        )
    coders = []
    for _ in range(layers):
        firing = {"relu": ReLU(), "jump": JumpReLU(0.3 * normal(features).abs() + 0.3), "topk": TopK(5)}
        skip = 0.5 * normal(width, width) / width**0.5 if "skip" in kind else None
        coders.append(
            SparseCoder(
                normal(width, features) / width**0.5, 0.3 * normal(features, width), 0.1 * normal(features) - 0.5,
                0.1 * normal(width), firing[kind.partition("_")[0]], skip,
            )
        )  # fmt: skip
    return TranscoderSet(coders, reads=reads, scan="random")


@cache
def reference_subject() -> Subject:
    model = transformers.AutoModelForCausalLM.from_pretrained(REFERENCE, dtype=torch.float64).eval()
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(REFERENCE / "tok")
    return open_model(model, tokenizer=tokenizer)


def reference_transcoders(name: str) -> TranscoderSet:
    parts = load_file(REFERENCE / f"{name}_transcoders.safetensors")
    coders = []
    for layer in range(3):
        mine = {key.split(".", 2)[2]: value for key, value in parts.items() if key.startswith(f"transcoders.{layer}.")}
        threshold = mine.get("activation_function.threshold")
        coders.append(
            SparseCoder(
                mine["W_enc"].T, mine["W_dec"], mine["b_enc"], mine["b_dec"],
                ReLU() if threshold is None else JumpReLU(threshold), mine.get("W_skip"),
            )
        )  # fmt: skip
    return TranscoderSet(coders, scan="tiny")


@cache
def reference_numbers(name: str) -> dict[str, np.ndarray]:
    with np.load(REFERENCE / f"{name}.npz", allow_pickle=False) as arrays:
        return {key: arrays[key] for key in arrays.files}
