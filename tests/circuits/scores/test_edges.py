"""Edge scores against the public reference, the gradient of rewired runs' masks, exact patching and closed forms."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from tests.circuits.reference_eap import SCORES, reference_pairs, reference_subject
from tests.circuits.test_wiring import DECODERS, prompts_of, run_by_hand, subject_of
from tomoscope.circuits import KL, Metric, Pairs, Probability
from tomoscope.circuits.scores.edges import METHODS, EdgeScores, edge_scores
from tomoscope.circuits.wiring.ablation import Ablation
from tomoscope.circuits.wiring.ports import norm_of
from tomoscope.circuits.wiring.wiring import Wiring
from tomoscope.errors import DataError, SiteError
from tomoscope.model import Subject

IN_REFERENCE = {
    "EAP": "EAP_bs1",
    "EAP-IG-inputs": "EAP-IG-inputs_bs1",
    "clean-corrupted": "clean-corrupted_bs1",
    "EAP-IG-activations (EAP-IG)": "EAP-IG-activations_bs1",
    "information-flow-routes": "information-flow-routes_bs1",
    "exact": "exact_bs3",
}


@cache
def scores(method: str, batch_size: int | None = None) -> EdgeScores:
    return edge_scores(reference_subject(), reference_pairs(), method=method, batch_size=batch_size)


def pairs_of(subject: Subject) -> Pairs:
    clean, corrupted = prompts_of(subject)
    return Pairs(clean, corrupted, torch.tensor([[5], [6], [7]]), torch.tensor([[15], [16], [17]]))


def close_to(subject: Subject) -> dict[str, float]:
    """How far a product in another order may be off: some norms and attentions compute in float32 in any model."""
    exact = subject.dtype == torch.float64 and subject.facts.family in ("gpt2", "gpt_neox", "phi", "opt", "falcon")
    return {"atol": 1e-12, "rtol": 1e-8} if exact else {"atol": 2e-6, "rtol": 2e-4}


def of_masks(subject: Subject, pairs: Pairs, ablation: Ablation, metric: Metric, mask: torch.Tensor) -> torch.Tensor:
    """[source, destination], the gradient of the mean metric for a mask: autograd through the model's own norms."""
    wiring = Wiring(subject, pairs.clean, ablation=ablation)
    mask = mask.to(subject.dtype).requires_grad_()
    logits = wiring.logits(mask)
    logits = logits if metric.tokens is None else logits[:, metric.tokens]
    return torch.autograd.grad(metric(logits, torch.arange(len(pairs))).mean(), mask)[0].double()


# ---- the reference


@pytest.mark.parametrize("method", IN_REFERENCE)
def test_scores_equal_the_public_reference(method: str):
    expected = torch.from_numpy(SCORES[IN_REFERENCE[method]]).double()
    found = scores(method)
    assert found.n == 4
    torch.testing.assert_close(found.scores, expected, atol=3e-8, rtol=1e-6)  # the reference is stored in float32
    assert not found.scores[~found.graph.allowed].any()
    assert (found.steps, found.metric) == (
        5 if "IG" in method else 1,
        "" if "flow" in method else "logit difference",
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_of_another_size_changes_nothing(method: str):
    if method == "exact":
        pytest.skip("its rows are batched by rewired runs, which are tested so")
    torch.testing.assert_close(scores(method, 3).scores, scores(method).scores, atol=1e-12, rtol=1e-9)


def test_the_estimates_come_near_the_exact_scores():
    exact, allowed = scores("exact").scores, scores("exact").graph.allowed
    correlation = {
        method: float(torch.corrcoef(torch.stack([scores(method).scores[allowed], exact[allowed]]))[0, 1])
        for method in METHODS
        if method not in ("exact", "information-flow-routes")
    }
    assert correlation["EAP"] == pytest.approx(0.79, abs=0.01)
    assert correlation["EAP-IG-inputs"] == pytest.approx(0.97, abs=0.01)
    assert correlation["EAP-IG-activations"] > correlation["EAP-IG-activations (EAP-IG)"] > 0.85


# ---- every family


@pytest.mark.parametrize("name", DECODERS)
def test_attribution_is_the_gradient_of_the_mask(name: str):
    subject = subject_of(name)
    pairs = pairs_of(subject)
    found = edge_scores(subject, pairs, method="EAP")
    expected = of_masks(
        subject, pairs, Ablation.paired(pairs.corrupted), pairs.metric(), torch.ones(found.scores.shape)
    )
    torch.testing.assert_close(found.scores, expected, **close_to(subject))
    assert found.scores.abs().max() > 1e-3


@pytest.mark.parametrize("name", DECODERS)
def test_the_ends_of_the_embeddings_path_are_the_two_prompts(name: str):
    subject = subject_of(name)
    pairs = pairs_of(subject)
    both = edge_scores(subject, pairs, method="clean-corrupted").scores
    swapped = Pairs(pairs.corrupted, pairs.clean, pairs.answers, pairs.wrong)
    ends = [edge_scores(subject, one, method="EAP").scores for one in (pairs, swapped)]
    torch.testing.assert_close(both, (ends[0] - ends[1]) / 2, **close_to(subject))


@pytest.mark.parametrize("name", ["gpt2", "gptj", "gemma2", "llama", "granite", "bloom"])
def test_a_sources_path_sums_to_the_effect_of_ablating_it(name: str):
    subject = subject_of(name)
    pairs = pairs_of(subject)
    found = edge_scores(subject, pairs, method="EAP-IG-activations", steps=64)
    wiring = Wiring(subject, pairs.clean, ablation=Ablation.paired(pairs.corrupted))
    masks = torch.ones(len(found.graph.sources), *found.scores.shape)
    masks[torch.arange(len(masks)), torch.arange(len(masks))] = 0
    lost = (wiring.clean_metric(pairs.metric()) - wiring.run(masks, pairs.metric())).mean(1).double()
    torch.testing.assert_close(found.scores.sum(1), lost, atol=1e-3 * float(lost.abs().max()), rtol=1e-3)


def test_a_sources_path_is_the_mean_gradient_of_its_row_of_the_mask():
    subject = subject_of("gpt2")
    pairs = pairs_of(subject)
    found = edge_scores(subject, pairs, method="EAP-IG-activations", steps=2)
    for row in (0, 1, 4, 5, 9, 10, 15):
        expected = torch.zeros(found.scores.shape[1], dtype=torch.float64)
        for share in (0.25, 0.75):
            mask = torch.ones(found.scores.shape, dtype=torch.float64)
            mask[row] = share
            gradient = of_masks(subject, pairs, Ablation.paired(pairs.corrupted), pairs.metric(), mask)
            expected += gradient[row] / 2
        torch.testing.assert_close(found.scores[row], expected, atol=1e-12, rtol=1e-8)


def test_exact_scores_equal_edges_ablated_by_hand():
    subject = subject_of("llama")
    pairs = pairs_of(subject)
    found = edge_scores(subject, pairs, method="exact")
    own = subject.last_logits(pairs.clean)
    for edge in (("embed", "a0.h1<q>"), ("a0.h3", "m0"), ("m0", "a1.kv1<k>"), ("a1.h2", "a2.kv0<v>"), ("m2", "logits")):
        mask = ~found.graph.mask([edge])
        logits = run_by_hand(subject, pairs.clean, pairs.corrupted, mask.double())
        rows, metric = torch.arange(3), pairs.metric()
        assert found[edge] == pytest.approx(float((metric(own, rows) - metric(logits, rows)).mean()), abs=1e-7)


# ---- metrics, ablations, positions


@pytest.mark.parametrize("kind", ["zero", "mean", "mean_by_position"])
@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_any_ablation_and_metric(name: str, kind: str):
    subject = subject_of(name)
    pairs = pairs_of(subject)
    ablation = Ablation.zero() if kind == "zero" else getattr(Ablation, kind)(pairs.corrupted)
    clean = subject.last_logits(pairs.clean)
    metrics: tuple[Metric, ...] = (KL(clean + torch.linspace(0, 1, clean.shape[1])), Probability([5, 6, 7], [8, 9, 10]))
    for metric in metrics:
        found = edge_scores(subject, pairs, method="EAP", ablation=ablation, metric=metric)
        expected = of_masks(subject, pairs, ablation, metric, torch.ones(found.scores.shape))
        torch.testing.assert_close(found.scores, expected, **close_to(subject))
        assert found.choices.value == kind.replace("_", " ")
        assert found.clean == pytest.approx(float(metric(clean, torch.arange(3)).mean()), rel=1e-5)


@pytest.mark.parametrize("method", ["EAP", "EAP-IG-inputs", "clean-corrupted", "information-flow-routes"])
def test_positions_sum_to_the_whole_and_are_where_the_prompts_differ(method: str):
    subject = subject_of("llama")
    pairs = pairs_of(subject)
    found = edge_scores(subject, pairs, method=method, by_position=True)
    assert found.by_position is not None
    assert found.by_position.shape[-1] == 6
    torch.testing.assert_close(found.by_position.sum(-1), found.scores)
    torch.testing.assert_close(found.scores, edge_scores(subject, pairs, method=method).scores, atol=1e-7, rtol=1e-5)
    if "flow" in method:
        return
    # the padded pair differs in its tokens 1 and 2, the others in 2 and 3; what is before is the same in both prompts
    assert not found.by_position[:, :, 0].any()
    embed = found.by_position[0]
    assert embed[:, 1:4].any(0).all()
    assert not embed[:, 4:].any()


def test_information_flow_by_hand_with_padding():
    subject = subject_of("gemma2")
    clean, _ = prompts_of(subject)
    pairs = pairs_of(subject)
    found = edge_scores(subject, pairs, method="information-flow-routes")
    graph = found.graph
    acts = subject.read(
        clean, "embed", "layer.*.attn.result", "layer.*.attn.out", "layer.*.mlp.out", "layer.*.resid_pre"
    )
    made = {"embed": acts["embed"]}
    for layer in range(3):
        result, out = acts[f"layer.{layer}.attn.result"], acts[f"layer.{layer}.attn.out"]
        heads = result * (out / result.sum(2)).nan_to_num()[:, :, None]
        made |= {f"a{layer}.h{h}": heads[:, :, h] for h in range(4)} | {f"m{layer}": acts[f"layer.{layer}.mlp.out"]}
    for column in ("a0.h1<q>", "a1.kv0<v>", "a2.h3<q>"):
        stream = acts[f"layer.{column[1]}.resid_pre"]
        rows = [i for i in range(len(graph.sources)) if graph.allowed[i, graph.destinations.index(column)]]
        near = torch.stack(
            [(stream.abs().sum(-1) - (stream - made[graph.sources[i]]).abs().sum(-1)).clamp(min=0) for i in rows]
        )
        share = (near / near.sum(0)).nan_to_num() * clean.mask
        expected = (share.sum(-1) / clean.mask.sum(-1)).mean(-1).double()
        torch.testing.assert_close(found.scores[rows, graph.destinations.index(column)], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3", "olmo2", "phi", "gpt_oss"])
def test_the_closed_form_through_a_norm_is_autograds(name: str):
    subject = subject_of(name)
    paths = [path for path, module in subject.model.named_modules() if "norm" in type(module).__name__.lower()]
    widths = [path for path in paths if "q_" not in path and "k_" not in path]
    assert widths
    for path in widths[:3]:
        module, norm = subject.model.get_submodule(path), norm_of(subject, path)
        x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0)).to(subject.dtype).requires_grad_()
        out = module(x)
        gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        expected = torch.autograd.grad(out, x, gradient)[0]
        with torch.no_grad():
            found = norm.pull(gradient, x, norm.scale(x, out))
        loose = name not in ("gpt2", "phi")
        torch.testing.assert_close(found, expected.to(found.dtype), atol=1e-5 if loose else 1e-9, rtol=1e-4)


# ---- the value


def test_the_largest_edges_and_their_names():
    found = scores("exact")
    name = found.ranked()[0]
    assert abs(found[name[:2]]) == float(found.scores.abs().max())
    assert found[name[:2]] == name[2]
    top = found.top(7)
    assert top.sum() == 7
    assert found.scores.abs()[top].min() >= found.scores.abs()[found.graph.allowed & ~top].max()
    assert found.top(10**9).sum() == found.graph.n_edges
    assert float(found.scores[found.top(1, signed=True)]) == float(found.scores.max())
    assert "262 edges" in repr(found)
    assert "one edge at a time" in str(found.choices)


def test_progress_counts_all_of_the_work():
    subject = subject_of("gpt2")
    pairs = pairs_of(subject)
    for method in ("EAP", "exact"):
        seen: list[tuple[int, int]] = []
        edge_scores(subject, pairs, method=method, batch_size=2, progress=lambda *a, s=seen: s.append(a))
        assert seen[-1][0] == seen[-1][1]


def test_what_cannot_be_is_refused():
    subject = subject_of("gpt2")
    pairs = pairs_of(subject)
    with pytest.raises(DataError, match="unknown"):
        edge_scores(subject, pairs, method="eap")  # ty: ignore[invalid-argument-type]
    with pytest.raises(DataError, match="no scores by position"):
        edge_scores(subject, pairs, method="exact", by_position=True)
    with pytest.raises(DataError, match="at least one step"):
        edge_scores(subject, pairs, steps=0)
    renormalised = subject_of("openai_gpt")
    with pytest.raises(SiteError, match="does not simply add"):
        edge_scores(renormalised, pairs_of(renormalised))


def test_parameters_and_modules_are_left_as_they_were():
    subject = subject_of("llama")
    before = {name: p.requires_grad for name, p in subject.model.named_parameters()}
    for method in METHODS:
        edge_scores(subject, pairs_of(subject), method=method, steps=2)
    assert {name: p.requires_grad for name, p in subject.model.named_parameters()} == before
    assert all(p.grad is None for p in subject.model.parameters())
    assert not any("forward" in module.__dict__ for module in subject.model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in subject.model.modules())
