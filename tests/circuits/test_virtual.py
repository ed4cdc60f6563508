"""Weights alone: against small changes of a frozen model, and on circuits that were planted."""

from __future__ import annotations

import pytest
import torch

from tests.circuits.attribution.parts import PROMPT, subject_of, transcoders
from tomoscope.circuits.attribution import LocalReplacement
from tomoscope.circuits.attribution.interventions import frozen_norms
from tomoscope.circuits.virtual import VirtualWeights, composition_over_chance, copying_scores, induction_pairs
from tomoscope.errors import DataError, SiteError
from tomoscope.model import Weights, add, replace
from tomoscope.phantoms.planted import induction

FAMILIES = ("gpt2", "gpt_neox", "llama", "gemma2", "olmo2", "granite")


@pytest.mark.parametrize("kind", ["relu", "relu_mid", "relu_unit"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_features_virtual_weight_is_its_effect_up_to_the_norms_scale(name: str, kind: str) -> None:
    subject, dictionary = subject_of(name), transcoders(kind)
    replacement = LocalReplacement.of(subject, dictionary, PROMPT)
    virtual = VirtualWeights(subject, dictionary)
    got = virtual.features(0, 2, targets=torch.arange(5))
    block = replacement.blocks[2]
    stream = "layer.2.resid_pre" if block.skeleton.parallel else "layer.2.resid_mid"
    part = "layer.2." + ("mlp.in" if kind != "relu_mid" else stream.split(".")[-1])
    clean = subject.read(PROMPT, "layer.2.attn.out")["layer.2.attn.out"]
    held = [replace("layer.2.attn.out", clean)]  # over the stream alone
    for source in (0, 7):
        row = dictionary.coder(0).W_dec[source]
        with frozen_norms(replacement):
            acts = [
                subject.read(PROMPT, part, edits=[*held, *([add("layer.2.resid_pre", row, at=3)] if on else [])])[part]
                for on in (0, 1)
            ]
        change = (acts[1] - acts[0])[0, 3]
        if kind == "relu_unit" and not block.reads.centred:
            change = change / block.skeleton.mlp_norm.weights.weight if block.skeleton.mlp_norm else change
        expected = change @ dictionary.coder(2).W_enc[:, :5]
        torch.testing.assert_close(got[:, source] * block.reads.scale[3], expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_heads_ov_is_what_it_moves(name: str) -> None:
    subject = subject_of(name)
    replacement = LocalReplacement.of(subject, transcoders("relu"), PROMPT)
    virtual, block = VirtualWeights(subject), replacement.blocks[1]
    generator = torch.Generator().manual_seed(0)
    source, target = torch.randn(2, 1, 32, generator=generator, dtype=torch.float64)
    head, query, key = 2, 5, 2
    got = virtual.ov(1, head, sources=source, targets=target)
    pattern = subject.read(PROMPT, "layer.1.attn.pattern")["layer.1.attn.pattern"]
    edits = [replace("layer.1.attn.pattern", pattern)]
    out = "layer.1.attn.out"
    others = [h for h in range(4) if h != head]
    z = subject.read(PROMPT, "layer.1.attn.z")["layer.1.attn.z"]
    edits.append(replace(f"layer.1.attn.z[head={','.join(map(str, others))}]", z[:, :, others]))
    moved = [*edits, add("layer.1.resid_pre", source[0], at=key)]
    with frozen_norms(replacement):
        acts = [subject.read(PROMPT, out, edits=some)[out] for some in (edits, moved)]
    expected = float((acts[1] - acts[0])[0, query] @ target[0])
    scale = float(pattern[0, head, query, key]) * float(block.attention.scale[key])
    scale *= float(block.end.scale[query]) if block.end is not None else 1.0
    assert float(got) * scale == pytest.approx(expected, rel=1e-5, abs=1e-8)


def test_a_heads_qk_is_its_bilinear_form() -> None:
    subject = subject_of("gpt2")
    virtual, weights = VirtualWeights(subject), Weights(subject)
    generator = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(2, 3, 32, generator=generator, dtype=torch.float64)
    norm = subject.model.transformer.h[1].ln_1
    read = [(x - x.mean(-1, keepdim=True)) * norm.weight.detach() for x in (queries, keys)]
    expected = (read[0] @ weights.W_Q[1][2]) @ (read[1] @ weights.W_K[1][2]).T / 8**0.5
    torch.testing.assert_close(virtual.qk(1, 2, queries=queries, keys=keys), expected)


def test_the_strongest_features_of_all_layers_are_found() -> None:
    subject, dictionary = subject_of("gpt2"), transcoders("relu")
    virtual = VirtualWeights(subject, dictionary)
    both = torch.cat([virtual.features(i, 2, targets=torch.tensor([4]))[0] for i in range(2)])
    best = virtual.strongest(2, 4, n=5)
    assert [abs(link.weight) for link in best] == both.abs().topk(5).values.tolist()
    assert float(virtual.features(best[0].layer, 2)[4, best[0].feature]) == pytest.approx(best[0].weight)
    cross = VirtualWeights(subject, transcoders("cross"))
    decoder = cross.transcoders.W_dec[0]
    expected = cross.reads(2) @ (decoder[:, 0] + decoder[:, 1]).T
    torch.testing.assert_close(cross.features(0, 2), expected)
    with pytest.raises(SiteError, match="do not feed"):
        virtual.features(2, 2)
    with pytest.raises(SiteError, match="no layer 5"):
        virtual.reads(5)
    with pytest.raises(SiteError, match="no head 9"):
        virtual.ov(0, 9, sources=decoder[:, 0], targets=decoder[:, 0])
    with pytest.raises(DataError, match="dictionaries"):
        VirtualWeights(subject).features(0, 1)


# ---- circuits


@pytest.mark.parametrize("form", ["gpt2", "llama"])
@pytest.mark.parametrize("seed", range(3))
def test_the_planted_induction_circuit_stands_out_and_its_twins_do_not(form: str, seed: int) -> None:
    layout = induction.wire(form, seed).layout
    whole = induction_pairs(induction.build(form, seed).subject)
    assert (whole[0].previous, whole[0].induction) == (layout.previous, layout.induction)
    assert whole[0].score > 0.5 > 5 * whole[1].score
    assert whole[0].copying > 0.9
    for twin in (induction.build_severed, induction.build_scrambled):
        assert induction_pairs(twin(form, seed).subject)[0].score < 0.1


def test_unrelated_matrices_compose_by_chance() -> None:
    subject = subject_of("gpt2")
    scores = composition_over_chance(subject, "V")
    later = torch.arange(3)[:, None] < torch.arange(3)[None]
    found = scores.permute(0, 2, 1, 3)[later]
    assert 0.9 < float(found.mean()) < 1.1
    assert float(scores.permute(0, 2, 1, 3)[~later].abs().max()) == 0.0
    assert float(copying_scores(subject).abs().max()) <= 1.0
    assert len(induction_pairs(subject, n=3)) == 3
