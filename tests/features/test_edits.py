"""Features taken away or kept: against formulas, in pieces of a batch, at places, and beside other edits."""

from __future__ import annotations

import pytest
import torch

from tests.zoo import ZOO
from tomoscope.errors import EditError
from tomoscope.features import ReLU, SparseCoder, only_features, without_features
from tomoscope.model import Subject, add, build_subject, replace

D, F, SITE = 32, 50, "layer.1.resid_post"
PROMPTS = [[5, 9, 17, 33], [8, 30, 31, 32, 7, 40, 12]]


def subject_of() -> Subject:
    return build_subject(ZOO["llama"].build().double(), name="llama")


def dictionary(seed: int = 0) -> SparseCoder:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return SparseCoder(
        normal(D, F) / D**0.5, normal(F, D) * 0.2, 0.1 * normal(F), 0.1 * normal(D), ReLU(), centred=True
    )


def test_taking_features_away_subtracts_their_parts() -> None:
    subject, coder = subject_of(), dictionary()
    x = subject.read(PROMPTS, SITE)[SITE]
    codes = coder.encode(x)
    gone = torch.tensor([3, 7, 20])
    wanted = x - codes[..., gone] @ coder.W_dec[gone]
    expected = subject.last_logits(PROMPTS, edits=[replace(SITE, wanted)])
    got = subject.last_logits(PROMPTS, edits=[without_features(SITE, coder, gone)])
    torch.testing.assert_close(got, expected)
    one_place = x.clone()
    one_place[0, -1] = wanted[0, -1]  # left-padded: the last column is each prompt's last token
    expected = subject.last_logits(PROMPTS, edits=[replace(SITE, one_place)])
    got = subject.last_logits(PROMPTS, edits=[without_features(SITE, coder, gone, at="last", rows=[0])])
    torch.testing.assert_close(got, expected)


def test_keeping_features_replaces_the_others_and_the_error() -> None:
    subject, coder = subject_of(), dictionary()
    x = subject.read(PROMPTS, SITE)[SITE]
    codes, kept = coder.encode(x), [1, 2, 30]
    other = torch.rand(codes.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    missed = torch.randn(x.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    mixed = other.clone()
    mixed[..., kept] = codes[..., kept]
    for edit, value in (
        (only_features(SITE, coder, kept, other, missed), coder.decode(mixed) + missed),
        (only_features(SITE, coder, kept, other), coder.decode(mixed)),
        (only_features(SITE, coder, range(F), keep_errors=True), x),
        (only_features(SITE, coder, [], keep_errors=True), x - codes @ coder.W_dec),
        (only_features(SITE, coder, []), coder.b_dec.expand_as(x)),
    ):
        expected = subject.last_logits(PROMPTS, edits=[replace(SITE, value)])
        torch.testing.assert_close(subject.last_logits(PROMPTS, edits=[edit]), expected)


def test_a_batch_in_pieces_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    subject, coder = subject_of(), dictionary()
    codes = torch.rand(2, 7, F, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    edits = [only_features(SITE, coder, [4], codes), add("layer.0.mlp.out", torch.ones(D), 0.1)]
    whole = subject.last_logits(PROMPTS, edits=edits)
    monkeypatch.setattr(Subject, "rows_per_call", lambda self, width, sites=(), gradients=False: 1)
    torch.testing.assert_close(subject.last_logits(PROMPTS, edits=edits), whole)


def test_wrong_features_are_refused() -> None:
    coder = dictionary()
    with pytest.raises(EditError, match="names feature 50"):
        without_features(SITE, coder, [50])
    with pytest.raises(EditError, match="beside it"):
        only_features(SITE, coder, [1], errors=torch.zeros(D))
    narrow = SparseCoder(coder.W_enc, coder.W_dec[:, :5], coder.b_enc, coder.b_dec[:5])
    with pytest.raises(EditError, match="does not write what it reads"):
        without_features(SITE, narrow, [1])
    said = without_features(SITE, coder, [1]).describe()
    assert "50 features" in said["coder"]
    assert str(without_features(SITE, coder, [1])).startswith("features")
