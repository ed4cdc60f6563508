"""The zoo itself: every entry builds quickly and seeded, runs, and is not degenerate."""

from __future__ import annotations

import pytest
import torch

from tests.zoo import FIRST_WORD, VOCAB, ZOO, tiny_tokenizer


@pytest.mark.parametrize("name", list(ZOO))
def test_an_entry_builds_seeded_and_is_not_degenerate(name):
    entry = ZOO[name]
    model, twin = entry.build(), entry.build()
    assert not model.training
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    with torch.no_grad():
        out = model(**entry.inputs(seed=0, batch=2, length=12))
        again = model(**entry.inputs(seed=0, batch=2, length=12))
    logits = out if entry.kind == "module" else out.logits
    assert torch.equal(logits, again if entry.kind == "module" else again.logits)
    assert torch.isfinite(logits).all()
    assert 0.1 < logits.std() < 20
    assert (logits[0] - logits[1]).abs().max() > 0.05
    for parameter_name, parameter in model.named_parameters():
        assert parameter.numel() == 1 or parameter.std() > 0.005, parameter_name


@pytest.mark.parametrize("vocab", [96, 160])
def test_the_tokenizer_has_the_models_vocabulary_and_round_trips(vocab):
    tokenizer = tiny_tokenizer(vocab)
    assert len(tokenizer) == vocab
    assert max(tokenizer.get_vocab().values()) == vocab - 1
    text = "When Mary and John went to the store"
    encoded = tokenizer(text, return_offsets_mapping=True)
    assert tokenizer.decode(encoded["input_ids"]) == text
    assert min(encoded["input_ids"]) >= FIRST_WORD
    assert encoded["offset_mapping"][-1][1] == len(text)
    assert tokenizer.pad_token_id == 0
    assert VOCAB == 96
