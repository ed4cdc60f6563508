"""AtP*: the softmax's exact change against patched runs and by hand, dropped layers against gates, mended failures."""

from __future__ import annotations

import pytest
import torch

from tests.circuits.test_wiring import subject_of
from tomoscope.circuits import Pairs
from tomoscope.circuits.patching.atp import NodeGrid, atp_star, key_effects, terms, terms_beside_a_sink, verify
from tomoscope.errors import DataError
from tomoscope.model import Subject, replace

NAMES = ("gpt2", "llama", "gptj", "gemma2", "gpt_oss", "falcon_alibi")


def pairs_of(subject: Subject) -> Pairs:
    ids = torch.randint(3, 96, (3, 6), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[:, 2:4] = torch.randint(3, 96, (3, 2), generator=torch.Generator().manual_seed(1))
    answers, wrong = torch.tensor([[5], [6], [7]]), torch.tensor([[15], [16], [17]])
    return Pairs(subject.tokens(ids.tolist()), subject.tokens(other.tolist()), answers, wrong)


def last_metric(pairs: Pairs):
    metric = pairs.metric()
    return lambda logits, batch: metric(logits[torch.arange(len(batch)), batch.last][:, metric.tokens], batch.indices)


def of(grid: NodeGrid, node: str, position: int) -> torch.Tensor:
    return grid.values[grid.nodes.index(node), position]


@pytest.mark.parametrize("name", NAMES)
def test_queries_and_keys_have_the_effect_of_the_weights_that_a_patch_makes(name: str):
    subject = subject_of(name, torch.float32)
    pairs = pairs_of(subject)
    grid = atp_star(subject, pairs, grad_drop=False)
    site = "layer.1.attn.pattern"
    gradient = subject.gradients(pairs.clean, last_metric(pairs), [site]).gradients[site]
    own = subject.read(pairs.clean, site)[site]
    shared = 4 // subject.facts.n_kv_heads if "a1.kv0.k" in grid.nodes else 1
    for position in (2, 3, 5):
        for head in (0, 3):
            query = f"layer.1.attn.q[head={head}]"
            value = subject.read(pairs.corrupted, query, at=position)[query]
            new = subject.read(pairs.clean, site, edits=[replace(query, value, at=position)])[site]
            expected = -((new - own) * gradient).sum((1, 2, 3))
            torch.testing.assert_close(of(grid, f"a1.h{head}.q", position).float(), expected, atol=2e-6, rtol=2e-4)
            unit = head // shared
            key = f"layer.1.attn.k[head={unit}]"
            value = subject.read(pairs.corrupted, key, at=position)[key]
            new = subject.read(pairs.clean, site, edits=[replace(key, value, at=position)])[site]
            expected = -((new - own) * gradient).sum((1, 2, 3))
            node = f"a1.kv{unit}.k" if shared > 1 else f"a1.h{unit}.k"
            torch.testing.assert_close(of(grid, node, position).float(), expected, atol=2e-6, rtol=2e-4)


@pytest.mark.parametrize("name", NAMES)
def test_the_other_nodes_are_difference_times_gradient(name: str):
    subject = subject_of(name, torch.float32)
    pairs = pairs_of(subject)
    grid = atp_star(subject, pairs, qk_fix=False, grad_drop=False)
    sites = [f"layer.2.{part}" for part in ("attn.q", "attn.k", "attn.v", "attn.z", "mlp.out")]
    found = subject.gradients(pairs.clean, last_metric(pairs), sites)
    other = subject.read(pairs.corrupted, *sites)
    for site in sites:
        effect = -((other[site] - found.values[site]) * found.gradients[site]).sum(-1)
        nodes = [n for n, s in zip(grid.nodes, grid.sites, strict=True) if s.startswith(site)]
        stacked = torch.stack([grid.values[grid.nodes.index(node)].T for node in nodes], -1).float()
        torch.testing.assert_close(stacked, effect.reshape(stacked.shape), atol=2e-6, rtol=2e-4)


def test_one_key_changes_a_row_as_the_closed_form_says():
    generator = torch.Generator().manual_seed(0)
    scores = 3 * torch.randn(2, 2, 5, 5, generator=generator).double()
    scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), torch.finfo(torch.float64).min)
    patched = scores + torch.randn(scores.shape, generator=generator).double().masked_fill(scores < -1e300, 0.0)
    gradient = torch.randn(scores.shape, generator=generator).double()
    for sink in (None, 0.7):
        level, all_new = (
            x if sink is None else torch.cat([x, torch.full((2, 2, 5, 1), sink)], -1) for x in (scores, patched)
        )
        weights = level.softmax(-1)[..., :5]
        entries = terms(weights, scores, patched)
        if sink is not None:
            entries = terms_beside_a_sink(weights, all_new.softmax(-1)[..., :5])
        found = key_effects(weights, entries, gradient)
        for key in range(5):
            changed = level.clone()
            changed[..., key] = patched[..., key]
            expected = ((changed.softmax(-1)[..., :5] - weights) * gradient).sum((-1, -2))
            torch.testing.assert_close(found[..., key], expected, atol=1e-12, rtol=1e-10)


def test_a_saturated_head_is_seen_with_the_fix_alone():
    subject = Subject(**{**vars(subject_of("gpt2")), "model": subject_of("gpt2").model})
    pairs = pairs_of(subject)
    projection = subject.model.transformer.h[1].attn.c_attn
    with torch.no_grad():
        kept = projection.weight.clone()
        projection.weight[:, :64] *= 12
    try:
        grids = {fix: atp_star(subject, pairs, qk_fix=fix, grad_drop=False) for fix in (True, False)}
        metric, exact = pairs.metric(), []
        for node, site in zip(grids[True].nodes, grids[True].sites, strict=True):
            if node.startswith("a1.") and node[-1] in "qk":
                for position in range(6):
                    value = subject.read(pairs.corrupted, site, at=position)[site]
                    logits = subject.last_logits(pairs.clean, edits=[replace(site, value, at=position)])
                    exact.append(grids[True].clean - metric(logits, torch.arange(3)))
        wanted = torch.stack(exact).flatten()
        rows = [i for i, n in enumerate(grids[True].nodes) if n.startswith("a1.") and n[-1] in "qk"]
        errors = {
            fix: float((grid.values[rows].flatten() - wanted).norm() / wanted.norm()) for fix, grid in grids.items()
        }
    finally:
        with torch.no_grad():
            projection.weight.copy_(kept)
    assert errors[True] < 0.5 * errors[False]


@pytest.mark.parametrize("name", ["gpt2", "gptj", "gemma2"])
def test_a_dropped_layer_passes_its_gradient_straight_on(name: str):
    subject = subject_of(name, torch.float32)
    pairs = pairs_of(subject)
    grid = atp_star(subject, pairs, qk_fix=False)
    sites = ["layer.0.attn.z", "layer.0.mlp.out", "layer.1.attn.z", "layer.2.mlp.out"]
    other = subject.read(pairs.corrupted, *sites)
    total = dict.fromkeys(sites, torch.zeros(()))
    for layer in range(3):
        module = subject.model.get_submodule(subject.structure.blocks[layer].path)

        # with this layer's contribution held constant its gradient is dropped
        def hold(module, args, kwargs, output):
            given = args[0] if args else kwargs["hidden_states"]
            value = output[0] if isinstance(output, tuple) else output
            new = given + (value - given).detach()
            return (new, *output[1:]) if isinstance(output, tuple) else new

        handle = module.register_forward_hook(hold, with_kwargs=True)
        try:
            reached = [site for site in sites if int(site.split(".")[1]) != layer]
            found = subject.gradients(pairs.clean, last_metric(pairs), reached)
        finally:
            handle.remove()
        for site in reached:
            effect = ((other[site] - found.values[site]) * found.gradients[site]).sum(-1).abs()
            total[site] = total[site] + effect / 2
    for site, expected in total.items():
        nodes = [n for n, s in zip(grid.nodes, grid.sites, strict=True) if s.startswith(site)]
        stacked = torch.stack([grid.values[grid.nodes.index(node)].T for node in nodes], -1).float()
        torch.testing.assert_close(stacked, expected.reshape(stacked.shape), atol=2e-6, rtol=3e-4)


def test_batches_names_and_verification():
    subject = subject_of("llama", torch.float32)
    pairs = pairs_of(subject)
    grid = atp_star(subject, pairs)
    seen: list[tuple[int, int]] = []
    again = atp_star(subject, pairs, batch_size=2, progress=lambda *a: seen.append(a))
    torch.testing.assert_close(grid.values, again.values, atol=1e-6, rtol=1e-4)
    assert seen[-1] == (3, 3)
    assert grid.qk_fix
    assert grid.grad_drop
    assert (grid.values >= 0).all()
    assert {"a0.h3.q", "a0.kv1.k", "a0.kv1.v", "a0.h3", "m2"} <= set(grid.nodes)
    value = grid.top(1)[0][2]
    assert value == pytest.approx(float(grid.scores.max()))
    some = atp_star(subject, pairs, positions=[2, "last"])
    assert some.positions == ("2", "last")
    torch.testing.assert_close(some.values[:, 0], grid.values[:, 2], atol=1e-6, rtol=1e-4)
    checked = verify(subject, pairs, grid, top=4, sampled=10, seed=1)
    assert len(checked.places) == 14
    assert 0 <= checked.missed <= checked.bound <= 1
    place = checked.places[0]
    site = grid.sites[grid.nodes.index(place[0])]
    value = subject.read(pairs.corrupted, site, at=int(place[1]))[site]
    logits = subject.last_logits(pairs.clean, edits=[replace(site, value, at=int(place[1]))])
    exact = (grid.clean - pairs.metric()(logits, torch.arange(3))).abs().mean()
    assert float(checked.exact[0]) == pytest.approx(float(exact), rel=1e-4, abs=1e-6)
    first = slice(0, 1)
    one = Pairs(pairs.clean.take(first), pairs.corrupted.take(first), pairs.answers[:1], pairs.wrong[:1])
    with pytest.raises(DataError, match="3 pairs, not 1"):
        verify(subject, one, grid)
