"""A spliced dictionary against replacing the site by hand; with its error the model is what it was."""

from __future__ import annotations

import pytest
import torch

from tests.activations.common import ids, subject
from tomoscope.errors import EditError
from tomoscope.features import SparseCoder, splice
from tomoscope.model import replace

D, F = 32, 50
DRAW = torch.Generator().manual_seed(0)


def coder(reads: str, writes: str) -> SparseCoder:
    parts = [torch.randn(*shape, generator=DRAW) / 5 for shape in ((D, F), (F, D), (F,), (D,))]
    return SparseCoder(*parts, centred=reads == writes, reads=reads, writes=writes)


@pytest.mark.parametrize("reads", ["layer.0.resid_post", "layer.1.attn.z", "layer.0.mlp.out"])
def test_reconstructions_stand_where_the_activation_stood(reads: str) -> None:
    model, one = subject(), coder(reads, reads)
    prompts = [text[:20] for text in ids(4)]
    plain = model.run(prompts, read=[reads])
    got = model.run(prompts, edits=splice(one))
    value = plain.activations[reads]
    made = one(value.flatten(2)).reshape(value.shape)
    torch.testing.assert_close(got.logits, model.run(prompts, edits=[replace(reads, made)]).logits)
    assert float((got.logits - plain.logits).abs().max()) > 1e-3
    kept = model.run(prompts, edits=splice(one, errors=True)).logits
    torch.testing.assert_close(kept, plain.logits, atol=1e-4, rtol=1e-4)


def test_a_transcoder_reads_in_the_same_forward() -> None:
    model, one = subject(), coder("layer.0.mlp.in", "layer.0.mlp.out")
    prompts = [text[:20] for text in ids(4)]
    seen = model.run(prompts, read=["layer.0.mlp.in"]).activations["layer.0.mlp.in"]
    got = model.run(prompts, edits=splice(one)).logits
    torch.testing.assert_close(got, model.run(prompts, edits=[replace("layer.0.mlp.out", one(seen))]).logits)
    kept = model.run(prompts, edits=splice(one, errors=True)).logits
    torch.testing.assert_close(kept, model.run(prompts).logits, atol=1e-4, rtol=1e-4)
    assert splice(one)[1].describe()["coder"].startswith("SparseCoder")


def test_mistakes() -> None:
    one = coder("layer.0.mlp.in", "layer.0.mlp.out")
    with pytest.raises(EditError, match="one site"):
        splice(one, "layer.0.mlp.in+layer.1.mlp.in")
    with pytest.raises(EditError, match="does not say"):
        splice(coder("", ""))
    with pytest.raises(EditError, match="reads 32 numbers"):
        subject().run([[5, 6, 7]], edits=splice(coder("layer.0.mlp.post", "layer.0.mlp.post")))
