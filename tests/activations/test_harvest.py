"""Harvested rows against one plain read a window."""

from __future__ import annotations

import pytest
import torch

from tests.activations.common import ids, subject
from tomoscope.activations import harvest
from tomoscope.activations.harvest import harvest_sites, windows
from tomoscope.errors import DataError, SiteError
from tomoscope.model.batch import Encoded

SITES = ["layer.1.resid_post", "layer.0.attn.z", "layer.0.mlp.post"]


def test_rows_are_those_of_a_read_of_each_window_alone() -> None:
    texts, model = ids(7), subject()
    slabs = list(harvest(model, texts, SITES, chunk=60))
    assert len(slabs) > 2
    ids_read = torch.cat([slab.text.ids for slab in slabs])
    assert ids_read.tolist() == [token for text in texts for token in text]
    at = 0
    for document, text in enumerate(texts):
        for start in range(0, len(text), 32):
            piece = text[start : start + 32]
            alone = model.read([Encoded(tuple(piece))], *SITES)
            for offset in range(len(piece)):
                place = at + start + offset
                slab = next(s for s in slabs if s.text.first <= place < s.text.first + len(s.text))
                row = (slab.places == place).nonzero().item()
                local = place - slab.text.first
                assert int(slab.text.documents[local]) == document
                assert int(slab.text.positions[local]) == start + offset
                for site in SITES:
                    mine = slab.values[site][row]
                    torch.testing.assert_close(mine, alone[site][0, offset].flatten(), atol=2e-5, rtol=1e-4)
        at += len(text)


def test_limits_windows_and_skips() -> None:
    texts, model = ids(5), subject()
    cut = list(windows(model, texts, tokens=50, window=8))
    assert sum(len(w.ids) for w in cut) == 50
    assert max(len(w.ids) for w in cut) == 8
    slab = next(harvest(model, texts, SITES[:1], skip=2))
    assert int(slab.text.positions[slab.places].min()) == 2
    assert len(slab) == sum(len(t) - 2 for t in texts)
    said = next(harvest(model, ["he said that she", "Mary and John"], SITES[:1]))
    assert int(said.text.documents.max()) == 1


def test_mistakes_are_told_before_the_work() -> None:
    with pytest.raises(SiteError, match="no value a token"):
        harvest_sites(subject(), ["layer.0.attn.pattern"])
    with pytest.raises(DataError, match="do not fit"):
        list(windows(subject(), ids(2), window=64))
    with pytest.raises(DataError, match="mixes"):
        list(windows(subject(), ["text", [1, 2]]))
