"""Sparse feature circuits against runs and finite differences; SHIFT on a model that rests on two known cues."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from tests.circuits.attribution.parts import subject_of
from tests.zoo import tiny_tokenizer
from tomoscope.circuits import LogitDifference, Pairs
from tomoscope.circuits.attribution import FeatureEffects, faithfulness, feature_effects, shift, sparse_circuit
from tomoscope.errors import DataError, SiteError
from tomoscope.features import ReLU, SparseCoder
from tomoscope.model import Subject, open_model, replace
from tomoscope.phantoms.planted.host import Host, Size

SITES = ("layer.0.resid_post", "layer.1.mlp.out", "layer.1.resid_post")
D, F = 32, 24


@cache
def coders(seed: int = 0) -> dict[str, SparseCoder]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        site: SparseCoder(normal(D, F) / D**0.5, normal(F, D) / F**0.5, 0.1 * normal(F), 0.1 * normal(D), ReLU(),
                          centred=True)
        for site in SITES
    }  # fmt: skip


def pairs_of(subject: Subject) -> Pairs:
    ids = torch.randint(3, 96, (3, 6), generator=torch.Generator().manual_seed(0)).tolist()
    other = [[*row[:2], 50, 51, *row[4:]] for row in ids]
    ids[0], other[0] = ids[0][1:], other[0][1:]  # one is shorter: padding must not count
    return Pairs(subject.tokens(ids), subject.tokens(other), torch.tensor([[5], [6], [7]]), torch.tensor([[15]] * 3))


@pytest.mark.parametrize("ablation", ["paired", "zero"])
@pytest.mark.parametrize("name", ["gpt2", "gptj", "gemma2"])
def test_features_and_error_sum_to_the_effect_of_the_whole_site(name: str, ablation: str) -> None:
    # torch's own attention gives nan for a left-padded Gemma in float64
    subject = subject_of(name, torch.float32 if name == "gemma2" else torch.float64)
    effects = feature_effects(subject, pairs_of(subject), coders(), steps=60, ablation=ablation)
    for site in SITES:
        total = float(effects.features[site].sum()) + effects.errors[site]
        assert total == pytest.approx(effects.whole[site], rel=0.05, abs=2e-3), site
    best = effects.top(3)
    assert abs(best[0][2]) == max(float(v.abs().max()) for v in effects.features.values())


def test_an_effect_is_the_derivative_in_the_middle() -> None:
    subject = subject_of("gpt2")
    pairs, site = pairs_of(subject), "layer.1.mlp.out"
    coder = coders()[site]
    effects = feature_effects(subject, pairs, {site: coder}, steps=1)
    x, y = (subject.read(batch, site)[site] for batch in (pairs.clean, pairs.corrupted))
    there = pairs.clean.mask[..., None]
    middle, change = (x + y) / 2, (coder.encode(y) - coder.encode(x)) * there
    for feature in (int(effects.features[site].abs().argmax()), 3):
        step = 1e-4 * change[..., feature, None] * coder.W_dec[feature]
        up, down = (
            pairs.metric()(subject.last_logits(pairs.clean, edits=[replace(site, middle + s * step)]), torch.arange(3))
            for s in (1, -1)
        )
        expected = float((up - down).mean()) / 2e-4
        assert float(effects.features[site][feature]) == pytest.approx(expected, rel=1e-4, abs=1e-9)


def test_an_edge_is_what_reaches_the_later_feature_with_the_rest_held() -> None:
    subject = subject_of("gpt2")
    pairs = pairs_of(subject)
    effects = feature_effects(subject, pairs, coders())
    circuit = sparse_circuit(subject, pairs, coders(), effects, nodes=0.0, edges=0.0)
    clean = subject.read(pairs.clean, *SITES)
    other = subject.read(pairs.corrupted, *SITES)
    there = pairs.clean.mask[..., None]
    order = circuit.weights.abs().argsort(descending=True)
    for number in [*order[:4].tolist(), *order[100:103].tolist()]:
        (start, source), (end, target) = circuit.sources[number].tolist(), circuit.targets[number].tolist()
        before, after = circuit.sites[start], circuit.sites[end]
        early, late = coders()[before], coders()[after]
        codes = early.encode(other[before]) - early.encode(clean[before])
        if source < 0:
            moved = (other[before] - clean[before] - codes @ early.W_dec) * there
        else:
            moved = codes[..., source, None] * early.W_dec[source] * there
        worth = effects.gradients[after] @ late.W_dec[target]

        def reached(
            scale: float, before: str = before, after: str = after, end: int = end, moved: Tensor = moved,
            late: SparseCoder = late, target: int = target, worth: Tensor = worth,
        ) -> float:  # fmt: skip
            edits = [
                replace(site, clean[site] + scale * moved if site == before else clean[site])
                for site in circuit.sites[:end]
            ]
            value = subject.read(pairs.clean, after, edits=edits)[after]
            pre = late.preactivations(value)[..., target]
            active = late.encode(clean[after])[..., target] > 0
            return float((pre * active * worth * there[..., 0]).sum()) / 3

        expected = (reached(1e-4) - reached(-1e-4)) / 2e-4
        assert float(circuit.weights[number]) == pytest.approx(expected, rel=1e-4, abs=1e-9)
    assert circuit.edges(1)[0][2] == float(circuit.weights[order[0]])


def test_faithfulness_of_everything_is_one_and_of_nothing_zero() -> None:
    subject = subject_of("llama")
    pairs = pairs_of(subject)
    effects = feature_effects(subject, pairs, coders())
    for ablation in ("paired", "zero"):
        every = sparse_circuit(subject, pairs, coders(), effects, nodes=-1.0, edges=9.0)
        assert every.n_nodes == 3 * F + 3
        assert faithfulness(subject, pairs, coders(), every, ablation=ablation) == pytest.approx(1.0)
        none = sparse_circuit(subject, pairs, coders(), effects, nodes=99.0)
        assert none.n_nodes == 0
        assert len(none.weights) == 0
        assert faithfulness(subject, pairs, coders(), none, ablation=ablation) == pytest.approx(0.0, abs=1e-12)


def test_wrong_sites_and_ablations_are_refused() -> None:
    subject = subject_of("gpt2")
    coder = coders()[SITES[0]]
    with pytest.raises(SiteError, match="can't have a dictionary"):
        feature_effects(subject, pairs_of(subject), {"layer.0.mlp.in": coder})
    with pytest.raises(DataError, match="unknown"):
        feature_effects(subject, pairs_of(subject), coders(), ablation="mean")
    with pytest.raises(DataError, match="no dictionary"):
        shift(subject, coders(), {"layer.2.resid_post": [1]}, {})


# ---- SHIFT


def two_cues() -> tuple[Subject, dict[str, SparseCoder]]:
    """A model that answers by two cues of a token, and the dictionary of the cues (four signs) and of noise."""
    tokenizer = tiny_tokenizer()
    host = Host("gpt2", Size(n_layers=2, n_heads=2, head_dim=16, d_mlp=8, context=64), len(tokenizer))
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(32, 32, generator=generator)).Q
    basis = basis - basis.mean(1, keepdim=True)  # a layer norm takes the mean away
    meant, cue, noise = basis[0], basis[1], basis[2:12]
    for token in range(len(tokenizer)):
        sign_of_meant, sign_of_cue = (1 if token & 1 else -1), (1 if token & 2 else -1)
        extra = torch.rand(10, generator=generator) @ noise
        host.embedding[token] = 4 * sign_of_meant * meant + 6 * sign_of_cue * cue + extra
    host.unembedding[3], host.unembedding[4] = meant + cue, -meant - cue
    directions = torch.cat([meant[None], -meant[None], cue[None], -cue[None], noise])
    coder = SparseCoder(directions.T.clone(), directions.clone(), torch.zeros(14), torch.zeros(32))
    return open_model(host.model, tokenizer=tokenizer), {"layer.0.resid_post": coder}


def test_shift_cures_a_model_of_its_shortcut_and_controls_do_not() -> None:
    subject, dictionaries = two_cues()
    tokens = list(range(8, 48))
    right = torch.tensor([[3] if t & 1 else [4] for t in tokens])
    wrong = torch.tensor([[4] if t & 1 else [3] for t in tokens])
    agree = [i for i, t in enumerate(tokens) if bool(t & 1) == bool(t & 2)]
    clash = [i for i, t in enumerate(tokens) if bool(t & 1) != bool(t & 2)]

    def measure(rows: list[int]) -> tuple[list[list[int]], LogitDifference]:
        return [[5, tokens[i]] for i in rows], LogitDifference(right[rows], wrong[rows])

    # the features with the largest effect on the clashing prompts, by what they do to the meant answer
    prompts, metric = measure(clash)
    pairs = Pairs(subject.tokens(prompts), subject.tokens(prompts), right[clash], wrong[clash])
    effects = feature_effects(subject, pairs, dictionaries, ablation="zero")
    judged = [feature for _, feature, effect in effects.top(4) if effect > 0]  # gone, the answer gets better
    assert sorted(judged) == [2, 3]
    result = shift(
        subject, dictionaries, {"layer.0.resid_post": judged}, {"agree": measure(agree), "clash": (prompts, metric)}
    )
    assert result.right("clash") == (0.0, 1.0)
    assert result.right("agree") == (1.0, 1.0)
    assert result.change("clash") > 0
    assert float(result.control_changes("clash").max()) < result.change("clash") / 3
    assert result.control["clash"].shape == (20, len(clash))
    with pytest.raises(DataError, match="other features fire"):
        shift(subject, dictionaries, {"layer.0.resid_post": list(range(10))}, {"clash": (prompts, metric)})


def test_effects_say_what_was_measured() -> None:
    subject = subject_of("gpt2")
    effects = feature_effects(subject, pairs_of(subject), coders(), steps=2)
    assert isinstance(effects, FeatureEffects)
    assert (effects.ablation, effects.metric) == ("paired", "logit difference")
    assert effects.clean.shape == effects.corrupted.shape == (3,)
