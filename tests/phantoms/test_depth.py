"""Where the next token stands: read off the stream by hand, with the library's own norm and unembedding."""

from __future__ import annotations

import pytest
import torch

from tomoscope.phantoms.depth import LAYERS, VOCAB, plain, rotated, written


def agreement(specimen, *, seed: int = 0) -> list[float]:
    """Share of random tokens for which each stream (before any block, after each) decodes to the final prediction."""
    model = specimen.subject.model
    ids = torch.randint(VOCAB, (16, 12), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        out = model(ids, output_hidden_states=True)
        final = out.logits.argmax(-1)
        streams = out.hidden_states[:-1]  # the last one is after the norm
        lens = [model.lm_head(model.transformer.ln_f(stream)).argmax(-1) for stream in streams]
    return [float((one == final).float().mean()) for one in (*lens, final)]


@pytest.mark.parametrize("seed", range(3))
def test_one_block_says_the_next_token(seed):
    specimen = written(seed)
    after = next(iter(specimen.card.of("formed"))).value["after"]
    shares = agreement(specimen)
    assert after < LAYERS - 1
    assert all(share < 0.1 for share in shares[: after + 1])
    assert all(share > 0.95 for share in shares[after + 1 :])


@pytest.mark.parametrize("make", [lambda seed: written(seed, last=True), rotated])
def test_nothing_can_be_read_before_the_last_block(make):
    shares = agreement(make(1))
    assert all(share < 0.1 for share in shares[:LAYERS])


def test_the_rotated_stream_holds_it_all_in_another_basis():
    model = rotated(0).subject.model
    with torch.no_grad():
        tokens = torch.arange(VOCAB)[:, None]
        out = model(tokens, output_hidden_states=True)
        before, logits = out.hidden_states[1][:, 0], out.logits[:, 0]  # after the first block
    normed = torch.nn.functional.layer_norm(before, before.shape[-1:])
    design = torch.cat([normed, torch.ones(VOCAB, 1)], dim=1)
    scale = out.logits.std()
    # linear in the stream: the token's code and what was written are fewer dimensions than tokens
    fit = torch.linalg.lstsq(design, logits).solution
    assert ((design @ fit - logits).std() / scale) < 0.2


def test_the_plain_stream_is_the_outputs_from_the_start():
    assert all(share > 0.95 for share in agreement(plain(2)))


def test_the_map_of_the_last_block_is_linear():
    specimen = rotated(3)
    mlp = specimen.subject.model.transformer.h[LAYERS - 1].mlp
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 5, mlp.c_fc.weight.shape[0], generator=generator)
    with torch.no_grad():
        torch.testing.assert_close(mlp(a) + mlp(b), mlp(a + b), atol=1e-3, rtol=1e-3)
