"""Rows sum up in every family; every kind of edge is what a frozen intervention on the model's own forward does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.circuits.attribution.parts import KINDS, PROMPT, subject_of, transcoders
from tests.zoo import DECODERS
from tomoscope.circuits.attribution import (
    AttributionGraph,
    Intervention,
    LocalReplacement,
    attribution_graph,
    intervene,
)
from tomoscope.circuits.attribution.interventions import frozen_norms
from tomoscope.errors import DataError, PromptError, SiteError, UnavailableSiteError
from tomoscope.model import add, replace

REFUSED = ("openai_gpt", "deepseek_v3")
NO_DOUBLE = ("qwen3_moe", "gpt_oss")  # the library's experts have no float64
FAMILIES = [name for name in DECODERS if name not in REFUSED]
SAMPLED = ("gpt2", "gpt_neox", "llama", "qwen3", "gemma2", "olmo2", "granite", "falcon", "bloom")


def precision(name: str) -> torch.dtype:
    return torch.float32 if name in NO_DOUBLE else torch.float64


@pytest.mark.parametrize("name", FAMILIES)
def test_every_row_sums_to_its_preactivation(name: str) -> None:
    dtype = precision(name)
    for kind in ("jump_skip", "cross"):
        graph = attribution_graph(subject_of(name, dtype), transcoders(kind, dtype=dtype), PROMPT)
        # float64 models of most families compute their norms in float32 inside
        assert graph.gap < (1e-6 if dtype == torch.float64 else 1e-5)
        assert graph.n_features > 50


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["gpt2", "gptj"])
def test_every_kind_of_transcoder_sums_up_exactly(name: str, kind: str) -> None:
    assert attribution_graph(subject_of(name), transcoders(kind), PROMPT).gap < 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_precisions(dtype: torch.dtype) -> None:
    graph = attribution_graph(subject_of("llama", dtype), transcoders("relu", dtype=dtype), PROMPT)
    assert graph.gap < (1e-5 if dtype == torch.float32 else 0.05)
    assert graph.weights.dtype == torch.float32


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_be_frozen_is_refused_by_name(name: str) -> None:
    with pytest.raises((SiteError, UnavailableSiteError), match=r"simply add|no v projection"):
        attribution_graph(subject_of(name, torch.float32), transcoders("relu", dtype=torch.float32), PROMPT)


def test_wrong_prompts_and_transcoders_are_refused() -> None:
    subject = subject_of("gpt2")
    with pytest.raises(PromptError, match="one prompt"):
        attribution_graph(subject, transcoders("relu"), [PROMPT, PROMPT])
    with pytest.raises(PromptError, match="longer prompt"):
        attribution_graph(subject, transcoders("relu"), [5])
    with pytest.raises(DataError, match="2 layers"):
        attribution_graph(subject, transcoders("relu", layers=2), PROMPT)
    with pytest.raises(DataError, match="16 dimensions"):
        attribution_graph(subject, transcoders("relu", width=16), PROMPT)
    with pytest.raises(PromptError, match="no token|id 500"):
        attribution_graph(subject, transcoders("relu"), PROMPT, targets=[500])


def test_a_row_of_a_padded_batch_is_its_prompt() -> None:
    subject = subject_of("gpt2")
    batch = subject.tokens([PROMPT, [*PROMPT, 7, 8]])
    padded = attribution_graph(subject, transcoders("relu"), batch.take(torch.tensor([0])))
    plain = attribution_graph(subject, transcoders("relu"), PROMPT)
    torch.testing.assert_close(padded.adjacency(), plain.adjacency())


# ---- edges against interventions


def rows_of(replacement: LocalReplacement, graph: AttributionGraph, edits: list, *, skips: bool) -> Tensor:
    """Pre-activations of the graph's features with everything frozen by hand in the model's own forward."""
    subject, layers = replacement.subject, range(replacement.n_layers)
    part = "resid_mid" if replacement.transcoders.reads == "resid_mid" else "mlp.in"
    assert not skips
    clean = subject.read(PROMPT, "layer.*.mlp.out", "layer.*.attn.pattern")
    frozen = [replace(f"layer.{i}.attn.pattern", clean[f"layer.{i}.attn.pattern"]) for i in layers]
    frozen += [replace(f"layer.{i}.mlp.out", clean[f"layer.{i}.mlp.out"]) for i in layers]
    with frozen_norms(replacement):
        acts = subject.read(PROMPT, f"layer.*.{part}", edits=[*frozen, *edits])
    pre = torch.stack([replacement.transcoders.coder(i).preactivations(acts[f"layer.{i}.{part}"][0]) for i in layers])
    layer, position, index = graph.features.T
    return pre[layer, position, index]


@pytest.mark.parametrize("name", SAMPLED)
def test_edges_are_what_frozen_interventions_do(name: str) -> None:
    subject = subject_of(name)
    dictionary = transcoders("relu")
    replacement = LocalReplacement.of(subject, dictionary, PROMPT)
    graph = attribution_graph(subject, dictionary, PROMPT, replacement=replacement)
    dense = graph.adjacency()[: graph.n_features]
    base = rows_of(replacement, graph, [], skips=False)
    torch.testing.assert_close(base, graph.activations, rtol=0, atol=1e-6)
    generator = torch.Generator().manual_seed(1)
    strongest = dense.abs().sum(0)[: graph.n_features].topk(6).indices.tolist()
    for node in [*strongest, *torch.randperm(graph.n_features, generator=generator)[:4].tolist()]:
        layer, position, index = graph.features[node].tolist()
        gone = -graph.activations[node] * dictionary.coder(layer).W_dec[index]
        change = rows_of(replacement, graph, [add(f"layer.{layer}.mlp.out", gone, at=position)], skips=False) - base
        torch.testing.assert_close(change, -dense[:, node], rtol=0, atol=1e-6)
    for layer, position in ((0, 3), (1, 6)):
        node = graph.range_of("error").start + layer * graph.n_positions + position
        edit = add(f"layer.{layer}.mlp.out", -replacement.errors[layer, position], at=position)
        change = rows_of(replacement, graph, [edit], skips=False) - base
        torch.testing.assert_close(change, -dense[:, node], rtol=0, atol=1e-6)
    site = "embed" if subject.structure.embed_adds else "layer.0.resid_pre"
    node = graph.range_of("token").start + 2
    change = rows_of(replacement, graph, [add(site, -replacement.tokens[2], at=2)], skips=False) - base
    torch.testing.assert_close(change, -dense[:, node], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["jump_skip", "cross", "topk_mid", "relu_unit"])
@pytest.mark.parametrize("name", ["gpt2", "gptj", "gemma2"])
def test_constrained_interventions_move_features_and_logits_as_the_edges_say(name: str, kind: str) -> None:
    subject, dictionary = subject_of(name), transcoders(kind)
    replacement = LocalReplacement.of(subject, dictionary, PROMPT)
    graph = attribution_graph(subject, dictionary, PROMPT, replacement=replacement, targets=[5, 6])
    dense = graph.adjacency()
    nodes = dense.abs().sum(0)[: graph.n_features].topk(4).indices.tolist()
    sets = [[Intervention(*graph.features[n].tolist(), 0.0)] for n in nodes]
    outcome = intervene(replacement, [*sets, []], mode="constrained", read=range(3))
    layer, position, index = graph.features.T
    pre = torch.stack([outcome.preactivations(i) for i in range(3)], dim=1)[:, layer, position, index]
    logits = outcome.last - outcome.last.mean(-1, keepdim=True)
    for row, node in enumerate(nodes):
        torch.testing.assert_close(pre[row] - pre[-1], -dense[: graph.n_features, node], rtol=0, atol=1e-6)
        if name != "gemma2":  # its logits are capped after the rows' sums
            change = (logits[row] - logits[-1])[list(graph.logit_ids)]
            torch.testing.assert_close(change, -dense[-2:, node], rtol=0, atol=1e-6)
