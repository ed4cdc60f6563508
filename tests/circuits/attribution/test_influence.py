"""Influence, thresholds, pruning and scores against closed forms; sweeps in tiles; expansion and its bound."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.circuits.attribution.parts import PROMPT, subject_of, transcoders
from tomoscope.circuits.attribution import (
    AttributionGraph,
    LocalReplacement,
    Sweep,
    attribution_graph,
    node_influence,
    prune,
    scores,
)
from tomoscope.circuits.attribution.build import dense_rows
from tomoscope.circuits.attribution.patterns import Patterns
from tomoscope.circuits.attribution.rows import Collector
from tomoscope.circuits.attribution.targets import feature_rows
from tomoscope.circuits.attribution.threshold import holding
from tomoscope.errors import DataError, ResourceError


def graph_of(**options: object) -> AttributionGraph:
    return attribution_graph(subject_of("gpt2"), transcoders("relu"), PROMPT, **options)


def test_influence_is_the_sum_over_all_paths() -> None:
    graph = graph_of()
    dense = graph.adjacency().abs()
    dense = dense / dense.sum(1, keepdim=True).clamp(min=1e-30)
    w = graph.logit_weights
    inverse = torch.linalg.inv(torch.eye(len(w), dtype=dense.dtype) - dense)
    torch.testing.assert_close(node_influence(graph), w @ inverse - w)
    # what starts at the logits ends in tokens and errors
    ends = node_influence(graph)[graph.n_features : -graph.n_logits].sum()
    assert float(ends) == pytest.approx(float(w.sum()), abs=1e-12)


def test_scores_count_only_what_is_not_error() -> None:
    graph = graph_of()
    got = scores(graph)
    assert 0 < got.replacement < 1
    assert got.unexpanded == pytest.approx(0.0, abs=1e-12)
    influence = node_influence(graph)
    tokens, errors = (influence[list(graph.range_of(kind))].sum() for kind in ("token", "error"))
    assert got.replacement == pytest.approx(float(tokens / (tokens + errors)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_thresholds_are_those_of_sorting(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    for scale in (1e-6, 1.0, 1e5):
        values = (torch.randn(5000, generator=generator, dtype=dtype).abs() ** 3) * scale
        values[::7] = 0
        values[1:200:3] = values[1]
        ordered = values.sort(descending=True).values
        total = ordered.double().cumsum(0)
        assert holding(values, 1.0) == float(values[values > 0].min())
        for share in (0.0, 0.1, 0.5, 0.8, 0.98):
            place = min(int(torch.searchsorted(total, share * total[-1] * (1 - 1e-14))), len(values) - 1)
            got = holding(values, share)
            assert got == float(ordered[place]), (scale, share)
            assert float(values[values >= got].double().sum()) >= share * float(total[-1]) * (1 - 1e-9)
    assert holding(torch.zeros(3), 0.5) == 0.0


def test_pruning_keeps_what_leads_from_tokens_to_logits() -> None:
    graph = graph_of()
    pruned = prune(graph, nodes=0.6, edges=0.9)
    target = graph.row_nodes[graph.edge_rows[pruned.edges]]
    source = graph.columns[pruned.edges].long()
    assert bool(pruned.nodes[target].all())
    assert bool(pruned.nodes[source].all())
    features = pruned.nodes[: graph.n_features].nonzero()[:, 0]
    assert 0 < len(features) < graph.n_features
    assert set(features.tolist()) <= set(source.tolist())
    assert set(features.tolist()) <= set(target.tolist())
    whole = prune(graph, nodes=1.0, edges=1.0)
    reaches = (node_influence(graph) + graph.logit_weights)[graph.row_nodes[graph.edge_rows]] > 0
    assert bool((whole.edges == reaches).all())
    with pytest.raises(DataError, match="share"):
        prune(graph, nodes=1.5)


# ---- tiles and memory


@pytest.mark.parametrize("kind", ["jump_skip", "cross"])
@pytest.mark.parametrize("name", ["gpt2", "gptj"])
def test_tiles_of_any_size_give_the_same_rows(name: str, kind: str) -> None:
    replacement = LocalReplacement.of(subject_of(name), transcoders(kind), PROMPT)
    rows = feature_rows(replacement, torch.arange(replacement.n_active))
    whole = dense_rows(Sweep(replacement), rows)
    for tile in (1, 500, 3000):
        torch.testing.assert_close(dense_rows(Sweep(replacement, tile=tile), rows), whole, rtol=0, atol=1e-12)


def test_uneven_positions_are_met_one_by_one() -> None:
    replacement = LocalReplacement.of(subject_of("gpt2"), transcoders("relu"), PROMPT)
    sweep = Sweep(replacement)
    rows = feature_rows(replacement, torch.arange(replacement.n_active))
    whole = dense_rows(sweep, rows)
    for writes in sweep.writes:
        object.__setattr__(writes, "padded", None)
    torch.testing.assert_close(dense_rows(sweep, rows), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gptj", "gemma2"])
def test_tokens_are_met_alike_through_the_heads_and_in_one_product(name: str) -> None:
    replacement = LocalReplacement.of(subject_of(name), transcoders("jump_skip"), PROMPT)
    rows = feature_rows(replacement, torch.arange(replacement.n_active))
    sweep, long = Sweep(replacement), Sweep(replacement)
    assert sweep.folded.tokens is not None
    long.folded.__dict__["tokens"] = None  # as for a prompt longer than the heads are wide
    torch.testing.assert_close(dense_rows(sweep, rows), dense_rows(long, rows), rtol=0, atol=1e-12)


def test_a_long_prompt_goes_through_the_heads() -> None:
    replacement = LocalReplacement.of(subject_of("gpt2"), transcoders("relu"), list(range(3, 60)))
    assert Sweep(replacement).folded.tokens is None


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "gpt_neox", "bloom"])
def test_patterns_that_do_not_fit_are_read_block_by_block(name: str) -> None:
    subject = subject_of(name)
    batch = subject.tokens(PROMPT)
    kept, read = Patterns(subject, batch, torch.float64), Patterns(subject, batch, torch.float64, memory=0)
    assert kept.keeps
    assert not read.keeps
    for layer in (2, 0, 1):
        torch.testing.assert_close(read(layer), kept(layer), rtol=1e-6, atol=1e-7)
        assert len(read._kept) == 1


def test_the_state_of_a_tile_is_bounded() -> None:
    replacement = LocalReplacement.of(subject_of("gpt2"), transcoders("relu"), list(range(3, 60)))
    sweep, limit = Sweep(replacement, tile=16 * 57 * 32), 16 * 57 * 32
    rows = feature_rows(replacement, torch.arange(replacement.n_active))
    assert len(rows) * 57 * 32 > 20 * limit
    sizes = [len(some) * (int(rows.position[some].max()) + 1) * 32 for some in sweep._tiles(rows)]
    assert max(sizes) <= limit
    assert sum(len(some) for some in sweep._tiles(rows)) == len(rows)
    # causality: rows at early positions are not carried over later ones
    assert sum(sizes) < 0.75 * len(rows) * 57 * 32


# ---- what is left out


def test_thin_rows_keep_their_sums() -> None:
    whole, thin = graph_of(), graph_of(keep=0.9)
    assert thin.n_edges < 0.8 * whole.n_edges
    assert thin.gap < 1e-12
    torch.testing.assert_close(thin.mass, whole.mass)
    kept = torch.zeros_like(thin.mass).index_add_(0, thin.edge_rows, thin.weights.abs())
    assert bool((kept >= 0.9 * thin.mass - 1e-12).all())
    # the smallest set: without its smallest edge a row would have less
    for row in range(len(thin.values)):
        sizes = thin.weights[thin.starts[row] : thin.starts[row + 1]].abs()
        if len(sizes) > 1:
            assert float(sizes.sum() - sizes.min()) < 0.9 * float(thin.mass[row]) + 1e-12


def test_collected_rows_come_back_in_order() -> None:
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(7, 5, generator=generator) * (torch.rand(7, 5, generator=generator) > 0.4)
    collector = Collector(7)
    for rows in ([4, 1, 6], [0], [2, 5, 3]):
        collector.add(torch.tensor(rows), whole[rows])
    made = collector.done(torch.float32)
    for row in range(7):
        some = slice(int(made.starts[row]), int(made.starts[row + 1]))
        assert made.columns[some].tolist() == whole[row].nonzero()[:, 0].tolist()
        assert made.weights[some].tolist() == whole[row][whole[row] != 0].tolist()


def test_expansion_finds_what_matters_and_bounds_what_it_misses() -> None:
    whole = graph_of()
    exact = node_influence(whole)
    for count, keep in itertools.product((10, 40, 100), (1.0, 0.95)):
        part = graph_of(max_features=count, keep=keep)
        assert part.n_features == count
        assert part.gap < 1e-12
        known, missed = node_influence(part), scores(part).unexpanded
        here = [whole.number_of(*triple) for triple in part.features.tolist()]
        nodes = torch.tensor(here + list(range(whole.n_features, whole.n_nodes)))
        assert bool((known <= exact[nodes] + 1e-12).all())
        assert bool((exact[nodes] <= known + missed + 1e-12).all())
        got, true = scores(part), scores(whole)
        assert got.low - 1e-12 <= true.replacement <= got.high + 1e-12
        best = exact[: whole.n_features].topk(count).indices.tolist()
        assert len({*best} & {*here}) >= 0.8 * count


def test_too_many_edges_are_refused_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tomoscope.circuits.attribution.build.free_bytes", lambda device: 1000)
    with pytest.raises(ResourceError, match="GiB of edges"):
        graph_of()
    with pytest.raises(DataError, match="keep"):
        graph_of(keep=0.0)


class Largest(TorchDispatchMode):
    """The largest array that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else (out,):
            if isinstance(one, torch.Tensor) and one._is_view() is False:
                self.numel = max(self.numel, one.numel())
        return out


def test_no_array_of_a_sweep_grows_with_the_rows() -> None:
    replacement = LocalReplacement.of(subject_of("gpt2"), transcoders("relu"), list(range(3, 60)))
    sweep = Sweep(replacement, tile=8 * 57 * 32)
    rows = feature_rows(replacement, torch.arange(replacement.n_active))
    assert replacement.n_active > 1000
    with Largest() as seen:
        for _ in sweep.run(rows):
            pass
    # a tile's state, the heads' values, and a few tiles of rows over all sources
    bound = max(4 * 8 * 57 * 32, 8 * replacement.n_sources)
    assert seen.numel <= bound < replacement.n_active * replacement.n_sources / 20
