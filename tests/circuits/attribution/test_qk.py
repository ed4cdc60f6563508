"""Attention scores as sums over pairs of nodes: they sum to the model's own score, and taking a node away shows."""

from __future__ import annotations

import pytest
import torch

from tests.circuits.attribution.parts import PROMPT, subject_of, transcoders
from tests.zoo import DECODERS
from tomoscope.circuits.attribution import LocalReplacement, qk_attribution
from tomoscope.circuits.attribution.interventions import frozen_norms
from tomoscope.errors import SiteError
from tomoscope.model import add, replace

REFUSED = ("openai_gpt", "deepseek_v3")
NO_DOUBLE = ("qwen3_moe", "gpt_oss")
SCORES = ((2, 3, 6, 4, None), (1, 0, 5, 3, 4), (0, 2, 3, 3, 1))


@pytest.mark.parametrize("name", [name for name in DECODERS if name not in REFUSED])
def test_parts_sum_to_the_models_own_scores(name: str) -> None:
    dtype = torch.float32 if name in NO_DOUBLE else torch.float64
    subject = subject_of(name, dtype)
    replacement = LocalReplacement.of(subject, transcoders("relu", dtype=dtype), PROMPT)
    for layer, head, query, key, against in SCORES:
        found = qk_attribution(replacement, layer=layer, head=head, query=query, key=key, against=against)
        assert found.gap < (1e-6 if dtype == torch.float64 else 1e-4)
        assert len(found.names) == len(found.query_parts) == replacement.n_sources + 1
        own = subject.read(PROMPT, f"layer.{layer}.attn.scores")[f"layer.{layer}.attn.scores"][0, head, query].double()
        if found.cap is not None:
            own = found.cap * torch.atanh(own / found.cap)
        wanted = float(own[key] if against is None else own[key] - own[against])
        assert found.score + found.offset == pytest.approx(wanted, rel=1e-3, abs=1e-5)
        assert float(found.by_query.sum()) == pytest.approx(found.score, abs=1e-5)
        assert float(found.by_key.sum()) == pytest.approx(found.score, abs=1e-5)
        first = found.pairs(3)[0]
        block = found.matrix(range(len(found.names)), range(len(found.names)))
        assert abs(first[2]) == pytest.approx(float(block.abs().max()), rel=1e-6)


@pytest.mark.parametrize("name", ["gpt2", "gptj", "llama", "gpt_neox", "bloom"])
def test_a_score_without_a_node_is_what_its_parts_say(name: str) -> None:
    """Take a node out of the stream with all else frozen by hand, and read the queries and keys that are left."""
    subject = subject_of(name)
    replacement = LocalReplacement.of(subject, transcoders("relu"), PROMPT)
    layer, head, query, key = 2, 1, 6, 3
    found = qk_attribution(replacement, layer=layer, head=head, query=query, key=key)
    clean = subject.read(PROMPT, "layer.*.mlp.out", "layer.*.attn.pattern")
    frozen = [replace(site, clean[site]) for site in clean if not site.startswith(f"layer.{layer}")]
    error = replacement.n_active + 1 * replacement.n_positions + key  # what layer 1 writes at the key beside features
    nodes = {error: add("layer.1.mlp.out", -replacement.errors[1, key], at=key)}
    feature = int(found.by_key[: replacement.n_active].abs().argmax())
    where, at = int(replacement.layer[feature]), int(replacement.position[feature])
    decoder = replacement.transcoders.coder(where).W_dec[replacement.feature[feature]]
    nodes[feature] = add(f"layer.{where}.mlp.out", -replacement.activation[feature] * decoder, at=at)
    q, k = f"layer.{layer}.attn.q", f"layer.{layer}.attn.k"
    base = subject.read(PROMPT, q, k)
    group = subject.facts.n_heads // base[k].shape[2]
    factor = found.score / float(base[q][0, query, head] @ base[k][0, key, head // group])
    for node, edit in nodes.items():
        with frozen_norms(replacement):
            acts = subject.read(PROMPT, q, k, edits=[*frozen, edit])
        left = factor * float(acts[q][0, query, head] @ acts[k][0, key, head // group])
        both = float(found.matrix([node], [node]))
        predicted = found.score - float(found.by_query[node]) - float(found.by_key[node]) + both
        assert left == pytest.approx(predicted, abs=1e-6)
        assert abs(left - found.score) > 1e-4


def test_what_is_not_there_is_refused() -> None:
    replacement = LocalReplacement.of(subject_of("gpt2"), transcoders("relu"), PROMPT)
    with pytest.raises(SiteError, match="no head 9"):
        qk_attribution(replacement, layer=0, head=9, query=3, key=1)
    with pytest.raises(SiteError, match="does not attend"):
        qk_attribution(replacement, layer=0, head=0, query=1, key=3)
    windowed = LocalReplacement.of(subject_of("mistral"), transcoders("relu"), PROMPT)
    with pytest.raises(SiteError, match="does not see"):
        qk_attribution(windowed, layer=0, head=0, query=6, key=1)
