"""Path patching against runs with everything else held by plain edits, and against single edges."""

from __future__ import annotations

import pytest
import torch

from tests.circuits.test_edges import pairs_of
from tests.circuits.test_wiring import contributions, subject_of
from tomoscope.circuits.patching.path import path_patching
from tomoscope.circuits.scores.edges import edge_scores
from tomoscope.errors import DataError, SiteError
from tomoscope.model import replace


def held(subject, pairs, layer: int, head: int):
    """Edits: every attention writes what it wrote in the clean run, with one head's corrupted contribution."""
    sites = [f"layer.{i}.attn.{part}" for i in range(3) for part in ("out", "result")]
    clean, corrupted = subject.read(pairs.clean, *sites), subject.read(pairs.corrupted, *sites)
    edits = []
    for i in range(3):
        value = clean[f"layer.{i}.attn.out"]
        if i == layer:
            one, other = (contributions(subject, i, acts)[:, :, head] for acts in (clean, corrupted))
            value = value + other - one
        edits.append(replace(f"layer.{i}.attn.out", value))
    return edits


@pytest.mark.parametrize("name", ["gpt2", "llama", "gptj", "gemma2", "granite"])
def test_paths_run_through_mlps_while_heads_are_held(name: str):
    subject = subject_of(name)
    pairs = pairs_of(subject)
    metric, rows = pairs.metric(), torch.arange(3)
    senders = ["a0.h1", "a1.h3", "a0.h2"]
    out = path_patching(subject, pairs, senders, ["logits"])
    to_query = path_patching(subject, pairs, senders[:1], ["a2.h1<q>"])
    for row, (layer, head) in enumerate([(0, 1), (1, 3), (0, 2)]):
        edits = held(subject, pairs, layer, head)
        expected = metric(subject.last_logits(pairs.clean, edits=edits), rows)
        torch.testing.assert_close(out.values[row], expected, atol=3e-6, rtol=1e-5)
    edits = held(subject, pairs, 0, 1)
    stream = subject.run(pairs.clean, edits=edits, read=["layer.2.resid_pre"]).activations["layer.2.resid_pre"]
    site = "layer.2.attn.q[head=1]"
    query = subject.read(pairs.clean, site, edits=[replace("layer.2.resid_pre", stream)])[site]
    expected = metric(subject.last_logits(pairs.clean, edits=[replace(site, query)]), rows)
    torch.testing.assert_close(to_query.values[0], expected, atol=3e-6, rtol=1e-5)
    torch.testing.assert_close(out.clean, metric(subject.last_logits(pairs.clean), rows), atol=3e-6, rtol=1e-5)


def test_with_mlps_held_too_a_path_is_an_edge():
    subject = subject_of("gpt2")
    pairs = pairs_of(subject)
    exact = edge_scores(subject, pairs, method="exact")
    senders = ["embed", "a0.h1", "m0", "a1.h2"]
    for receiver in ("a2.h0<k>", "m1", "logits"):
        found = path_patching(subject, pairs, senders, [receiver], frozen="heads and MLPs")
        expected = torch.tensor([exact[sender, receiver] for sender in senders])
        torch.testing.assert_close(found.effect.float(), expected, atol=1e-6, rtol=1e-5)
    # with nothing but the stream between them, it does not matter whether MLPs are held
    ends = [
        path_patching(subject, pairs, ["m2", "m1"], ["logits"], frozen=f).values for f in ("heads", "heads and MLPs")
    ]
    torch.testing.assert_close(ends[0][0], ends[1][0])
    assert (ends[0][1] - ends[1][1]).abs().max() > 1e-4


def test_a_head_stands_for_all_its_inputs_and_senders_go_together():
    subject = subject_of("llama")
    pairs = pairs_of(subject)
    named = path_patching(subject, pairs, [["a0.h0", "m0"]], ["a2.h3"])
    assert named.receivers == ("a2.h3<q>", "a2.kv1<k>", "a2.kv1<v>")
    assert named.senders == (("a0.h0", "m0"),)
    apart = path_patching(subject, pairs, ["a0.h0", "m0"], named.receivers, batch_size=2)
    assert apart.values.shape == (2, 3)
    assert named.effect[0] != apart.effect.sum()
    assert "heads frozen" in apart.choices.set


def test_what_has_no_path_is_refused():
    subject = subject_of("gpt2")
    pairs = pairs_of(subject)
    with pytest.raises(SiteError, match="no source"):
        path_patching(subject, pairs, ["a0.h11"], ["logits"])
    with pytest.raises(SiteError, match="no destination"):
        path_patching(subject, pairs, ["a0.h1"], ["embed"])
    with pytest.raises(DataError, match="no path"):
        path_patching(subject, pairs, ["a2.h1"], ["m1"])
    with pytest.raises(DataError, match="unknown"):
        path_patching(subject, pairs, ["a0.h1"], ["logits"], frozen="none")  # ty: ignore[invalid-argument-type]
