"""Batches: each row once an epoch, any step reached directly, memory and model giving the same rows."""

from __future__ import annotations

import threading
from itertools import islice

import pytest
import torch

from tests.activations.common import ids, subject
from tomoscope.activations import ArraySource, LiveSource, first_rows, harvest, prefetch
from tomoscope.errors import DataError

SITE = "layer.1.resid_post"


def live(**options: int) -> LiveSource:
    return LiveSource(subject(), ids(12), [SITE], **{"mix": 100, "seed": 5, "skip": 1, **options})


def test_an_epoch_holds_each_row_once_and_epochs_differ() -> None:
    source = ArraySource(torch.arange(35.0)[:, None], seed=1)
    each = [torch.cat([b.places for b in source.batches(7, start=e * 5, epochs=e + 1)]) for e in range(2)]
    assert all(sorted(places.tolist()) == list(range(35)) for places in each)
    assert not torch.equal(each[0], each[1])


@pytest.mark.parametrize("make", [lambda: ArraySource(torch.randn(50, 2), seed=1), live])
def test_a_step_is_reached_directly(make) -> None:
    source = make()
    whole = list(islice(source.batches(16), 40))
    each = source.batches_an_epoch(16)
    assert len(whole) == 40
    for start in (0, 1, each - 1, each, each + 2, 3 * each):
        if start < 40:
            got = next(iter(source.batches(16, start=start)))
            assert torch.equal(got.places, whole[start].places), start
            for site, value in got.values.items():
                torch.testing.assert_close(value, whole[start].values[site], atol=1e-5, rtol=1e-4)


def test_live_rows_are_the_harvested_ones() -> None:
    source = live()
    slabs = list(harvest(subject(), ids(12), [SITE], skip=1))
    values, places = torch.cat([s.values[SITE] for s in slabs]), torch.cat([s.places for s in slabs])
    assert source.n == len(places)
    seen = []
    for batch in source.batches(10, epochs=1):
        index = torch.searchsorted(places, batch.places)
        torch.testing.assert_close(batch.values[SITE], values[index], atol=2e-5, rtol=1e-4)
        seen += batch.places.tolist()
    assert len(set(seen)) == len(seen) == 10 * source.batches_an_epoch(10)
    assert source.moments()[SITE].n > 0
    assert len(first_rows(source, 30, 10)) == 30


def test_what_can_not_be_read_again_is_refused() -> None:
    with pytest.raises(DataError, match="only once"):
        LiveSource(subject(), iter(ids(3)), [SITE])
    with pytest.raises(DataError, match="too few"):
        next(iter(ArraySource(torch.zeros(3, 1)).batches(4)))
    with pytest.raises(DataError, match="align"):
        ArraySource({"a": torch.zeros(3, 1), "b": torch.zeros(4, 1)})


def test_the_thread_gives_its_error_and_ends_when_left() -> None:
    def broken():
        yield 1
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        list(prefetch(broken()))
    before = threading.active_count()
    stream = prefetch(iter(range(10**9)))
    assert next(stream) == 0
    stream.close()
    assert threading.active_count() == before
