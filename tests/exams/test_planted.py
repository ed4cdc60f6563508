"""A GPT-2 whose heads are set by hand: the exam names them, and refutes what is not there."""

from __future__ import annotations

import pytest
import torch
import transformers

from tomoscope.exams import EXAMS, examine
from tomoscope.model import open_model

TOKENS, PLACES = 200, 64


@pytest.fixture(scope="module")
def planted():
    """Head 0.1 looks to the token before, head 1.0 after the earlier copy and copies; 0.0 and 1.1 do nothing.

    The stream is [token, position, previous token]: tokens as random unit vectors, positions one-hot.
    """
    wide, generator = 128, torch.Generator().manual_seed(0)
    width = 2 * wide + PLACES
    config = transformers.GPT2Config(
        n_embd=width, n_layer=2, n_head=2, n_positions=PLACES, vocab_size=TOKENS, n_inner=4, tie_word_embeddings=False
    )
    model, size = transformers.GPT2LMHeadModel(config).eval(), width // 2
    code = torch.nn.functional.normalize(torch.randn(TOKENS, wide, generator=generator), dim=-1)
    token, place, before = slice(0, wide), slice(wide, wide + PLACES), slice(wide + PLACES, width)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight")) else 0.0)
        model.transformer.wte.weight[:, token] = code
        model.transformer.wpe.weight[:, place] = torch.eye(PLACES)
        model.lm_head.weight[:, token] = code

        def wire(layer: int, head: int, query, key, out: slice) -> None:
            attention, first = model.transformer.h[layer].attn, head * size
            for part, matrix in enumerate((query, key)):
                columns = slice(part * width + first, part * width + first + matrix.shape[1])
                attention.c_attn.weight[:, columns] = 5.0 * matrix
            attention.c_attn.weight[token, 2 * width + first : 2 * width + first + wide] = torch.eye(wide)
            attention.c_proj.weight[first : first + wide, out] = torch.eye(wide)

        def reads(where: slice, shift: int = 0) -> torch.Tensor:
            matrix = torch.zeros(width, where.stop - where.start)
            matrix[where] = torch.roll(torch.eye(where.stop - where.start), shift, dims=1)
            return matrix

        wire(0, 1, reads(place, -1), reads(place), before)
        wire(1, 0, reads(token), reads(before), token)
    return open_model(model)


def test_the_planted_heads_are_named(planted):
    found = {f.id.split("/")[1]: f for f in examine(EXAMS["observe.head_roles"], planted, options={"sequences": 16})}
    assert found["previous_token"].verdict == "confirmed"
    assert found["previous_token"].sites == ("layer.0.attn.pattern[head=1]",)
    assert found["induction"].verdict == "confirmed"
    assert found["induction"].claim.startswith("Head 1.0 is an induction head: ")
    assert found["induction"].sites == ("layer.1.attn.pattern[head=0]",)
    assert found["induction"].estimate.value > 0.5
    assert found["copying"].verdict == "confirmed"
    assert found["duplicate_token"].verdict == "refuted"
    assert found["name_mover"].verdict == "not measured"
