"""Reading a store: each row once an epoch, mixed over all shards, any step reached directly, and the text around."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from tests.activations.common import ids, subject
from tomoscope.activations import ActivationStore, write_store
from tomoscope.errors import DataError

SITES = ["layer.1.resid_post", "layer.0.mlp.post"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    folder = tmp_path_factory.mktemp("store") / "s"
    write_store(subject(), ids(), SITES, folder, chunk=150, shard_bytes=20_000, dtype="float32")
    return ActivationStore(folder, mix=200, seed=2)


def test_an_epoch_reads_each_row_once_from_all_shards(store: ActivationStore) -> None:
    batches = list(store.batches(20, epochs=1))
    assert len(batches) == store.batches_an_epoch(20)
    places = torch.cat([batch.places for batch in batches])
    assert len(places.unique()) == len(places) > len(store) - 20 * store._n_groups
    shard_of = {int(p): i for i, rows in enumerate(store.shards()) for p in rows.places}
    assert len({shard_of[int(p)] for p in batches[0].places}) > 3


def test_a_step_is_reached_directly(store: ActivationStore) -> None:
    whole = list(islice(store.batches(20), 100))
    for start in (0, 1, 9, 11, 40, 77, 99):
        got = next(iter(store.batches(20, start=start, ahead=0)))
        assert torch.equal(got.places, whole[start].places)
        assert torch.equal(got.values[SITES[0]], whole[start].values[SITES[0]])


def test_rows_lead_back_to_their_text(store: ActivationStore) -> None:
    texts = ids()
    batch = next(iter(store.batches(20)))
    for place in batch.places[:5]:
        told = store.context(place, before=4, after=2)
        text = texts[told["document"]]
        position = told["position"]
        assert told["ids"] == text[max(0, position - 4) : position + 3]
        assert told["ids"][told["at"]] == text[position]
    wanted = batch.places[[3, 1, 1, 7]]
    assert torch.equal(store.token_values(SITES[1], wanted), batch.values[SITES[1]][[3, 1, 1, 7]])
    with pytest.raises(DataError, match="no token"):
        store.text_columns(torch.tensor([10**9]))


def test_one_site_and_another_type(store: ActivationStore) -> None:
    one = ActivationStore(store.folder, sites=SITES[1:], dtype=torch.bfloat16)
    assert next(iter(one.batches(8))).values[SITES[1]].dtype == torch.bfloat16
    assert list(one.widths) == SITES[1:]
    with pytest.raises(DataError, match="holds no"):
        ActivationStore(store.folder, sites=["layer.9.mlp.out"])


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["int8", "bfloat16"])
def test_batches_hold_the_rows_of_their_places(kind: str, dtype: torch.dtype | None, tmp_path) -> None:
    write_store(subject(), ids(), SITES, tmp_path / "s", chunk=150, shard_bytes=20_000, dtype=kind)
    one = ActivationStore(tmp_path / "s", mix=200, dtype=dtype)
    for batch in islice(one.batches(20, ahead=0), 3):
        for site in SITES:
            assert torch.equal(batch.values[site], one.token_values(site, batch.places))
            assert batch.values[site].dtype == (dtype or (torch.float32 if kind == "int8" else torch.bfloat16))
