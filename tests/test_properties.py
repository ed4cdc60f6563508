"""Properties that every method must have: order and padding of the batch do not matter, inputs are left as they were,
a seed gives the same numbers, and looking leaves no trace on the model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.zoo import ZOO
from tomoscope.circuits import Pairs, activation_patching, attribution_patching
from tomoscope.model import Subject, add, build_subject, noise, zero
from tomoscope.observe import by_head, direct_logit_attribution, gradient_x_input, integrated_gradients, logit_lens

PROMPTS = [[5, 9, 17, 33], [8, 30, 31, 32, 7, 40, 12], [21, 22, 23, 24, 25]]
ANSWERS, WRONG = [40, 41, 42], [50, 51, 52]


def pairs(subject: Subject, prompts: list[list[int]]) -> Pairs:
    other = [[*row[:1], 60, *row[2:]] for row in prompts]
    lookup = {tuple(p): (a, w) for p, a, w in zip(PROMPTS, ANSWERS, WRONG, strict=True)}
    answers = torch.tensor([[lookup[tuple(p)][0]] for p in prompts])
    wrong = torch.tensor([[lookup[tuple(p)][1]] for p in prompts])
    return Pairs(subject.tokens(prompts), subject.tokens(other), answers, wrong)


def metric(prompts: list[list[int]]) -> Callable[[Tensor, object], Tensor]:
    wanted = torch.tensor([ANSWERS[PROMPTS.index(p)] for p in prompts])
    return lambda logits, batch: logits[:, -1].gather(1, wanted[batch.indices][:, None])[:, 0]


# name -> a function from a subject and prompts to [prompt, ...]
METHODS: dict[str, Callable[[Subject, list[list[int]]], Tensor]] = {
    "read": lambda s, p: s.read(p, "layer.*.resid_post", at="last").stack("layer.*.resid_post").transpose(0, 1),
    "patterns": lambda s, p: s.read(p, "layer.1.attn.pattern", at="last")["layer.1.attn.pattern"].sum(-1),
    "z": lambda s, p: s.read(p, "layer.1.attn.z[head=2]", at=[0, -1])["layer.1.attn.z[head=2]"],
    "last_logits": lambda s, p: s.last_logits(p),
    "edited": lambda s, p: s.last_logits(p, edits=[add("layer.1.resid_post", torch.ones(32), 0.3, at=1)]),
    "run_stack": lambda s, p: s.run_stack(p, [[], [add("layer.0.mlp.out", torch.ones(32), at="last")]]).transpose(0, 1),
    "gradients": lambda s, p: s.gradients(p, metric(p), ["layer.0.resid_post"]).gradients["layer.0.resid_post"][:, -1],
    "logit_lens": lambda s, p: logit_lens(s, p).kl.T,
    "direct_logit_attribution": lambda s, p: (
        direct_logit_attribution(s, p, *[[x[PROMPTS.index(q)] for q in p] for x in (ANSWERS, WRONG)]).values.T
    ),
    "by_head": lambda s, p: by_head(s, p, [ANSWERS[PROMPTS.index(q)] for q in p]).values.movedim(-1, 0),
    "gradient_x_input": lambda s, p: gradient_x_input(s, p, [ANSWERS[PROMPTS.index(q)] for q in p]).values[:, :4],
    "integrated_gradients": lambda s, p: integrated_gradients(
        s, p, [ANSWERS[PROMPTS.index(q)] for q in p], steps=8
    ).values[:, :4],
    "activation_patching": lambda s, p: activation_patching(
        s, pairs(s, p), part="attn.z", positions=[1, -1]
    ).values.movedim(-1, 0),
    "attribution_patching": lambda s, p: attribution_patching(
        s, pairs(s, p), part="mlp.out", positions=[1, -1]
    ).values.movedim(-1, 0),
}


@pytest.fixture(scope="module", params=["gpt2", "llama", "gemma2"])
def subject(request: pytest.FixtureRequest) -> Subject:
    return build_subject(ZOO[request.param].build(), name=request.param)


@pytest.mark.parametrize("name", METHODS)
def test_order_padding_and_company_do_not_matter(subject: Subject, name: str) -> None:
    method = METHODS[name]
    together = method(subject, PROMPTS)
    backwards = method(subject, PROMPTS[::-1]).flip(0)
    torch.testing.assert_close(together, backwards, rtol=1e-4, atol=1e-5)
    for row, prompt in enumerate(PROMPTS):
        torch.testing.assert_close(together[row], method(subject, [prompt])[0], rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("name", METHODS)
def test_the_same_call_gives_the_same_bits_and_leaves_no_trace(subject: Subject, name: str) -> None:
    before = {key: value.clone() for key, value in subject.model.state_dict().items()}
    given = [list(prompt) for prompt in PROMPTS]
    first, second = METHODS[name](subject, given), METHODS[name](subject, given)
    assert torch.equal(first, second)
    assert given == PROMPTS
    assert all(torch.equal(value, before[key]) for key, value in subject.model.state_dict().items())
    for module in subject.model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert "forward" not in module.__dict__
    assert all(parameter.requires_grad and parameter.grad is None for parameter in subject.model.parameters())


def test_a_failing_call_leaves_no_trace_either(subject: Subject) -> None:
    def broken(logits: Tensor, batch: object) -> Tensor:
        raise ZeroDivisionError("a metric of the user's own fails")

    with pytest.raises(ZeroDivisionError):
        subject.gradients(PROMPTS, broken, ["layer.*.attn.pattern", "layer.*.resid_post"])
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in subject.model.modules())
    assert all(parameter.requires_grad for parameter in subject.model.parameters())


def test_batches_run_in_pieces_give_what_one_call_gives(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    edits = [add("layer.1.resid_post", torch.randn(3, 32, generator=torch.Generator().manual_seed(1)), at="last")]
    whole = subject.run(PROMPTS, edits=edits, read=["layer.2.resid_post"], at="last")
    grads = subject.gradients(PROMPTS, metric(PROMPTS), ["layer.1.attn.z"])
    monkeypatch.setattr("tomoscope.model.subject.rows_that_fit", lambda *a: 2)
    pieces = subject.run(PROMPTS, edits=edits, read=["layer.2.resid_post"], at="last")
    torch.testing.assert_close(pieces.logits, whole.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        pieces.activations["layer.2.resid_post"], whole.activations["layer.2.resid_post"], rtol=1e-5, atol=1e-5
    )
    again = subject.gradients(PROMPTS, metric(PROMPTS), ["layer.1.attn.z"])
    torch.testing.assert_close(
        again.gradients["layer.1.attn.z"], grads.gradients["layer.1.attn.z"], rtol=1e-4, atol=1e-6
    )


def test_a_stream_of_prompts_is_read_in_order_and_in_bounded_batches(subject: Subject) -> None:
    prompts = [[3 + i % 90, 4 + i % 80, 5 + i % 70] for i in range(100)]
    seen, largest = [], 0
    for acts in subject.stream(iter(prompts), "layer.1.resid_post", at="last", batch_size=16):
        seen.append(acts["layer.1.resid_post"])
        largest = max(largest, len(acts.batch))
    assert largest == 16
    everything = subject.read(prompts, "layer.1.resid_post", at="last")["layer.1.resid_post"]
    torch.testing.assert_close(torch.cat(seen), everything, rtol=1e-5, atol=1e-5)


def test_edits_are_the_same_whole_and_in_pieces(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values by row, by position and by named rows, and noise, where there are as many positions as prompts."""
    drawn = torch.randn(3, 3, 32, generator=torch.Generator().manual_seed(2))
    site, at = "layer.1.resid_post", [0, 1, 2]
    sets = [
        [add(site, drawn[0], at=at)],  # [position, d_model]: not a value a row
        [add(site, drawn, at=at)],
        [add(site, drawn[:2, 0], at="last", rows=[2, 0])],
        [noise(site, 0.5, seed=4)],
        [zero("layer.0.attn.z[head=1]", rows=[2])],
    ]
    whole = [subject.last_logits(PROMPTS, edits=edits) for edits in sets]
    monkeypatch.setattr("tomoscope.model.subject.rows_that_fit", lambda *a: 1)
    for edits, expected in zip(sets, whole, strict=True):
        torch.testing.assert_close(subject.last_logits(PROMPTS, edits=edits), expected, rtol=1e-4, atol=1e-5)


def test_gradients_see_edits_of_results_and_give_their_values(subject: Subject) -> None:
    site, edits = "layer.1.attn.result", [zero("layer.1.attn.result[head=2]")]
    out = subject.gradients(PROMPTS, metric(PROMPTS), [site], edits=edits)
    torch.testing.assert_close(out.values[site], subject.read(PROMPTS, site, edits=edits)[site])
    logits = subject.last_logits(PROMPTS, edits=edits)
    torch.testing.assert_close(out.metric, logits.gather(1, torch.tensor(ANSWERS)[:, None])[:, 0], rtol=1e-4, atol=1e-5)
