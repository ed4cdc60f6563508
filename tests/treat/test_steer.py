"""Steering: on generated tokens with the cache on, on the right prompts, undone after an exception, and elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open

from tests.zoo import ZOO
from tomoscope.concepts import Direction
from tomoscope.errors import DataError, EditError
from tomoscope.model import build_subject, open_model
from tomoscope.treat import (
    DoseRule,
    choose_dose,
    clamp,
    contrast_direction,
    dose_curve,
    iti_heads,
    only_where,
    orthogonalised,
    read_control_vector,
    save_steering,
    steering,
    write_control_vector,
)
from tomoscope.treat.export import HOW_TO_STEER

SITE = "layer.1.resid_post"
UP = [[5, 9, 17, 33], [8, 30, 31, 33], [21, 22, 23, 33]]
DOWN = [[5, 9, 17, 40], [8, 30, 31, 40], [21, 22, 23, 40]]


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def subject(request):
    return build_subject(ZOO[request.param].build(), name=request.param)


def test_pairs_give_their_mean_difference(subject):
    found = contrast_direction(subject, UP, DOWN, SITE)
    up, down = (subject.read(some, SITE, at="last")[SITE] for some in (UP, DOWN))
    torch.testing.assert_close(found.shift, (up - down).mean(0), rtol=1e-4, atol=1e-5)
    assert found.notes["agreement"] > 0.5
    assert bool((found.score(up) > 0).all())
    assert bool((found.score(down) < 0).all())
    one = contrast_direction(subject, UP, DOWN, SITE, method="pca")
    assert one.cosine(found) > 0.95
    with pytest.raises(DataError, match="do not differ"):
        contrast_direction(subject, UP, UP, SITE)
    with pytest.raises(DataError, match="texts with"):
        contrast_direction(subject, UP, DOWN[:2], SITE)


def test_every_generated_token_is_steered_with_the_cache(subject):
    """Counted at the block itself: prompt and new tokens, each once with a cache."""
    direction = contrast_direction(subject, UP, DOWN, SITE)
    edits, seen = steering([direction], 0.5), []
    apply = type(edits[0]).apply

    class Counting(type(edits[0])):
        def apply(self, region):
            seen.append(region.shape[1])
            return apply(self, region)

    edits = [Counting(**{name: getattr(edits[0], name) for name in edits[0].__dataclass_fields__})]
    cached = subject.generate([UP[0]], max_new_tokens=5, edits=edits)
    assert seen == [4, 1, 1, 1, 1]  # the last new token is never read
    assert cached == subject.generate([UP[0]], max_new_tokens=5, edits=edits, cached=False)
    decode = subject.generate([UP[0]], max_new_tokens=5, edits=steering([direction], 0.5, during="decode"))
    assert isinstance(decode[0], str)


def test_an_exception_leaves_the_model_as_it_was(subject):
    before = {name: value.clone() for name, value in subject.model.state_dict().items()}
    logits = subject.last_logits(UP)
    bad = Direction("bad", SITE, torch.ones(7))
    with pytest.raises(EditError):
        subject.generate(UP, max_new_tokens=3, edits=steering([bad], 1.0))
    assert torch.equal(subject.last_logits(UP), logits)
    assert all(torch.equal(value, before[name]) for name, value in subject.model.state_dict().items())
    assert not any(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in subject.model.modules())


def test_clamped_and_conditional(subject):
    direction = contrast_direction(subject, UP, DOWN, SITE)
    value = subject.read([*UP, *DOWN], SITE, at="last", edits=[clamp(direction, 2.5, at="last")])[SITE]
    torch.testing.assert_close(direction.score(value), torch.full((6,), 2.5), rtol=1e-3, atol=1e-3)
    both = [*UP, *DOWN]
    plain, steered = subject.last_logits(both), subject.last_logits(both, edits=steering([direction], 3.0))
    only = subject.last_logits(both, edits=only_where(subject, both, direction, steering([direction], 3.0)))
    torch.testing.assert_close(only[:3], steered[:3])
    torch.testing.assert_close(only[3:], plain[3:])


def test_heads_by_what_they_tell(subject):
    texts = [[5, 9, i, 33 + 7 * (i % 2)] for i in range(1, 31)]
    labels = np.array([i % 2 for i in range(1, 31)])
    heads = iti_heads(subject, texts, labels, count=3)
    assert len({head.site for head in heads}) == 3
    for head in heads:
        z = subject.read(texts, head.site, at="last")[head.site]
        assert float((z @ head.vector).std()) == pytest.approx(float(head.shift.norm()), rel=1e-2)
    assert subject.last_logits(texts, edits=steering(heads, 5.0, at="last")).shape[0] == 30
    with pytest.raises(DataError, match="heads of"):
        iti_heads(subject, texts, labels, count=1000)


def test_doses_and_the_rule(subject):
    direction = contrast_direction(subject, UP, DOWN, SITE)
    token = int((subject.last_logits(UP) - subject.last_logits(DOWN)).mean(0).argmax())

    def effect(edits):
        return subject.last_logits(DOWN * 4, edits=edits).log_softmax(-1)[:, token].numpy()

    curve = dose_curve(
        subject, [direction], doses=(1, 2), effect=effect, texts=[[1, 2, 3, 4], [7, 8, 9]], prompts=UP, draws=3,
        new_tokens=4,
    )  # fmt: skip
    assert curve.doses == (0.0, 1.0, 2.0)
    assert curve.effect.shape == (3, 12)
    assert curve.random.shape == (3, 3, 12)
    # the loss at no dose is the library's own
    with torch.no_grad():
        loss = subject.model(input_ids=torch.tensor([[1, 2, 3, 4]]), labels=torch.tensor([[1, 2, 3, 4]])).loss
    assert curve.loss[0, 0] == pytest.approx(float(loss), abs=1e-4)
    assert abs(curve.kl[0]).max() < 1e-6
    assert (curve.kl[1:] > 0).all()
    assert curve.rise(1.0).value > 0
    assert curve.rise(2.0).value == pytest.approx((curve.effect[2] - curve.effect[0]).mean())
    assert curve.wrong_way() <= 0.5
    # what the rule must not take, it does not take
    assert choose_dose(curve, DoseRule(most_loss=-100.0)) == 0.0
    assert choose_dose(curve, DoseRule(most_loss=100.0, beats_random=False, most_wrong=1.0)) in (1.0, 2.0)
    with pytest.raises(DataError, match="not measured"):
        curve.rise(7.0)


def test_a_direction_out_of_the_weights(subject, tmp_path):
    direction = contrast_direction(subject, UP, DOWN, SITE)
    made = orthogonalised(subject, [direction])
    acts = made.read(UP, "layer.*.resid_post", "embed")
    for value in acts.values():
        assert float((value @ direction.unit).abs().max()) < 1e-3 * float(value.norm(dim=-1).max())
    # the same as edits at every writer
    from tomoscope.model import project_out

    writers = ["embed", "layer.*.attn.out", "layer.*.mlp.out"] + (["pos_embed"] if subject.name == "gpt2" else [])
    edits = [project_out(site, direction.vector) for site in writers]
    torch.testing.assert_close(made.last_logits(UP), subject.last_logits(UP, edits=edits), rtol=1e-3, atol=1e-4)
    made.model.save_pretrained(tmp_path)
    again = open_model(tmp_path)
    torch.testing.assert_close(again.last_logits(UP), made.last_logits(UP), rtol=1e-4, atol=1e-5)
    with pytest.raises(EditError, match="width"):
        orthogonalised(subject, [torch.ones(5)])


def test_a_family_that_norms_its_branches_is_refused():
    gemma = build_subject(ZOO["gemma2"].build(), name="gemma2")
    with pytest.raises(EditError, match="all the same"):
        orthogonalised(gemma, [torch.ones(gemma.facts.d_model) + torch.arange(gemma.facts.d_model)])


def test_a_control_vector_and_back(subject, tmp_path):
    direction = contrast_direction(subject, UP, DOWN, SITE)
    path = write_control_vector(tmp_path / "some.gguf", [direction], strength=2.0, model_hint="llama")
    facts, vectors = read_control_vector(path)
    assert facts["general.architecture"] == "controlvector"
    assert facts["controlvector.layer_count"] == 1
    np.testing.assert_allclose(vectors[1], 2 * direction.shift.numpy(), rtol=1e-6)
    first = contrast_direction(subject, UP, DOWN, "layer.0.resid_post")
    with pytest.raises(EditError, match="cannot hold block 0"):
        write_control_vector(tmp_path / "no.gguf", [first])
    with pytest.raises(EditError, match="whole blocks' outputs"):
        write_control_vector(tmp_path / "no.gguf", [Direction("x", "layer.1.mlp.out", torch.ones(4))])
    (tmp_path / "bad.gguf").write_bytes(path.read_bytes()[:40])
    with pytest.raises(DataError, match="no control vector"):
        read_control_vector(tmp_path / "bad.gguf")
    reader = pytest.importorskip("gguf", reason="the gguf package is not installed")
    theirs = reader.GGUFReader(path)
    np.testing.assert_allclose(theirs.tensors[0].data, vectors[1])


def test_steering_with_plain_transformers(subject, tmp_path):
    direction = contrast_direction(subject, UP, DOWN, SITE)
    path = save_steering(subject, tmp_path / "steer.safetensors", [direction], strength=1.5)
    with safe_open(path, "pt") as file:
        assert file.metadata()["how"] == HOW_TO_STEER
    space: dict = {}
    exec(HOW_TO_STEER, space)
    hooks = space["steer"](subject.model, path)
    assert isinstance(subject.model, transformers.PreTrainedModel)
    with torch.no_grad():
        theirs = subject.model(input_ids=torch.tensor(UP)).logits[:, -1]
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(theirs, subject.last_logits(UP, edits=steering([direction], 1.5)), rtol=1e-4, atol=1e-5)
