"""Facts sought together are those sought one by one; the cut model is the whole one; gradients against autograd."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.treat.edit.made import CONTEXTS, FACTS, FAMILIES, subject
from tomoscope.errors import EditError, TokenizerError
from tomoscope.model import add, build_subject
from tomoscope.treat.edit.requests import encode_labelled
from tomoscope.treat.edit.suffix import Suffix
from tomoscope.treat.edit.targets import TargetSettings, check_contexts, find_targets

SHORT = TargetSettings(steps=5)


@pytest.mark.parametrize("kind", ["mlp", "block"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_cut_model_is_the_whole_one(family, kind):
    model = subject(family)
    for layer in (0, 2):
        cut, whole = (
            find_targets(model, FACTS, layer, kind=kind, contexts=CONTEXTS, settings=SHORT, mode=mode)
            for mode in (None, "whole")
        )
        assert cut.modes == {"cut"}
        assert whole.modes == {"whole"}
        close = {"rtol": 1e-2, "atol": 1e-2} if family == "gemma2" else {"rtol": 1e-7, "atol": 1e-9}
        torch.testing.assert_close(cut.delta, whole.delta, **close)
        torch.testing.assert_close(cut.losses, whole.losses, **close)


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_together_as_one_by_one(family):
    model = subject(family)
    # one fact is done early
    settings = dataclasses.replace(SHORT, steps=12, stop=4.0, decay=0.01)
    seen = []
    together = find_targets(
        model, FACTS, 1, kind="block", contexts=CONTEXTS, settings=settings, progress=lambda *done: seen.append(done)
    )
    assert seen[-1] == (3, 3)
    ends = set()
    for place, fact in enumerate(FACTS):
        alone = find_targets(model, [fact], 1, kind="block", contexts=CONTEXTS, settings=settings)
        torch.testing.assert_close(together.delta[place], alone.delta[0], rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(together.losses[place], alone.losses[0], rtol=1e-7, atol=1e-9, equal_nan=True)
        ends.add(int(alone.losses[0, :, 0].isnan().sum()))
    pairs = find_targets(model, FACTS, 1, kind="block", contexts=CONTEXTS, settings=settings, batch=2)
    torch.testing.assert_close(pairs.delta, together.delta, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("kind", ["mlp", "block"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_end_of_the_model_against_an_edit(family, kind):
    """Logits with a vector added are those of the library's own forward under an edit at that place."""
    model = subject(family)
    batch = model.tokens([encode_labelled(model, one.labelled(c)) for one in FACTS for c in CONTEXTS])
    columns = batch.columns("subject")[0][:, 0]
    added = torch.randn(len(batch), 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    suffix = Suffix(model, batch, 1, kind=kind, columns=columns, keep=2)
    with torch.no_grad():
        mine = suffix.run(added)
    if kind == "block" or not suffix.inside:
        site = "layer.1.resid_post" if kind == "block" else "layer.1.mlp.out"
        run = model.run(batch, edits=[add(site, added, at="subject")])
        torch.testing.assert_close(mine, run.logits[:, -2:], rtol=1e-4, atol=1e-5)
    assert suffix.inside == (kind == "mlp" and family == "gemma2")
    again = Suffix(model, batch, 1, kind=kind, columns=columns, keep=2, mode="whole")
    with torch.no_grad():
        torch.testing.assert_close(again.run(added), mine, rtol=1e-4, atol=1e-5)
    assert not any(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.model.modules())
    assert all(parameter.requires_grad for parameter in model.model.parameters())


def test_one_step_is_adams(monkeypatch):
    """The first update from an independent loss: torch's Adam on the whole model with a hook."""
    model = subject("gpt2")
    fact, settings = FACTS[1], TargetSettings(steps=4, clamp=100.0)
    found = find_targets(model, [fact], 1, kind="block", settings=settings)
    tokenizer = model.tokenizer
    target = tokenizer(" Anna Smith")["input_ids"]
    prompt = tokenizer("Tom plays with")["input_ids"]
    essence = tokenizer("Tom is a")["input_ids"]
    place = len(tokenizer("Tom")["input_ids"]) - 1
    block = model.model.transformer.h[1]
    delta = torch.zeros(32, dtype=torch.float64, requires_grad=True)
    stands: list[torch.Tensor] = []

    def forward(ids):
        def hook(module, args, output):
            value = output[0] if isinstance(output, tuple) else output
            stands.append(value[0, place].detach())
            moved = value.clone()
            moved[0, place] = moved[0, place] + delta
            return (moved, *output[1:]) if isinstance(output, tuple) else moved

        handle = block.register_forward_hook(hook)
        out = model.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        handle.remove()
        return out

    adam = torch.optim.Adam([delta], lr=0.5)
    usual = None
    for step in range(4):
        adam.zero_grad()
        said = forward([*prompt, *target[:-1]])
        answer = -sum(said[len(prompt) - 1 + i, t] for i, t in enumerate(target)) / len(target)
        now = forward(essence)[place]
        usual = now.detach() if usual is None else usual
        kept = 0.0625 * (now.exp() * (now - usual)).sum()
        loss = answer + kept + 0.5 * delta.norm() / stands[0].norm() ** 2
        assert float(loss.detach()) == pytest.approx(float(found.losses[0, step, 0]), rel=1e-9)
        if step < 3:
            delta.grad = torch.autograd.grad(loss, delta)[0]
            adam.step()
    torch.testing.assert_close(found.delta[0], delta.detach(), rtol=1e-9, atol=1e-11)


def test_contexts_and_tokenizers_are_checked():
    with pytest.raises(EditError, match="bare|alone"):
        check_contexts(["So. {}", "{}"])
    with pytest.raises(EditError, match="once"):
        check_contexts(["{}", "{} {}"])
    from tests.zoo import ZOO

    bare = build_subject(ZOO["gpt2"].build())
    with pytest.raises((TokenizerError, TypeError)):
        find_targets(bare, FACTS, 1, kind="block")
