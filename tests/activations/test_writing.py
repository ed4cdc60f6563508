"""A store against a direct harvest; killed at every file it goes on to the very same store; a bad file is named."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.activations.common import ids, subject
from tomoscope.activations import ActivationStore, Moments, StoreWriter, harvest, repair, write_store
from tomoscope.activations import writing as module
from tomoscope.errors import DataError, ResourceError

SITES = ["layer.1.resid_post", "layer.0.attn.z"]
OPTIONS = {"chunk": 150, "shard_bytes": 20_000, "seed": 4, "skip": 1}


def hashes(store: ActivationStore) -> list[str]:
    return [entry["sha256"] for part in ("text", "shards") for entry in store.manifest[part]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_store_holds_each_row_once_with_its_text(tmp_path: Path, dtype: str) -> None:
    texts = ids()
    store = write_store(subject(), texts, SITES, tmp_path / "s", dtype=dtype, **OPTIONS)
    store.verify()
    slabs = list(harvest(subject(), texts, SITES, skip=1))
    whole = {site: torch.cat([s.values[site] for s in slabs]) for site in SITES}
    places = torch.cat([s.places for s in slabs])
    assert len(store.manifest["shards"]) >= 3
    assert len(store) == len(places)
    read = list(store.shards())
    got = torch.cat([rows.places for rows in read])
    assert sorted(got.tolist()) == places.tolist()
    for rows in read:
        index = torch.searchsorted(places, rows.places)
        for site in SITES:
            expected = whole[site][index]
            bound = {"float32": 1e-4, "bfloat16": 0.01, "int8": 0.01}[dtype] * expected.abs().amax(1, keepdim=True)
            assert bool(((rows.values[site].float() - expected).abs() <= bound + 1e-5).all())
    flat = [token for text in texts for token in text]
    assert store.text_columns(got)["ids"].tolist() == [flat[i] for i in got.tolist()]
    for site in SITES:
        mine, theirs = store.moments()[site], Moments.of(whole[site])
        assert mine.n == theirs.n
        torch.testing.assert_close(mine.mean, theirs.mean, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(mine.variance, theirs.variance, atol=1e-4, rtol=1e-3)


def test_rows_of_one_text_lie_in_all_shards(tmp_path: Path) -> None:
    store = write_store(subject(), ids(), SITES[:1], tmp_path / "s", **OPTIONS)
    documents = [store.text_columns(rows.places)["documents"] for rows in store.shards()]
    # each shard's mean document is the corpus' own, to the noise of a random draw
    means = torch.tensor([d.double().mean() for d in documents])
    spread = torch.cat(documents).double().std() / (min(map(len, documents)) ** 0.5)
    assert float((means - torch.cat(documents).double().mean()).abs().max()) < 4 * float(spread)


def test_jobs_make_the_store_that_one_process_makes(tmp_path: Path) -> None:
    one = write_store(subject(), ids(), SITES, tmp_path / "one", **OPTIONS)
    writers = [StoreWriter(subject(), ids(), SITES, tmp_path / "two", **OPTIONS) for _ in range(3)]
    with pytest.raises(DataError, match="harvested"):
        writers[0].shuffle()
    for job in (2, 0, 1):
        writers[job].harvest(job=job, of=3)
    for job in (1, 0):
        writers[job].shuffle(job=job, of=2)
    assert hashes(writers[2].finish()) == hashes(one)


def test_killed_at_every_file_it_goes_on_to_the_same_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = hashes(write_store(subject(), ids(), SITES, tmp_path / "whole", **OPTIONS))
    real, made = module.write_tensors, 0

    class Killed(BaseException):
        pass

    def dying(*arguments: object, **options: object) -> object:
        nonlocal made
        made += 1
        if made % 4 == 0:
            raise Killed
        return real(*arguments, **options)

    monkeypatch.setattr(module, "write_tensors", dying)
    for _ in range(60):
        try:
            store = write_store(subject(), ids(), SITES, tmp_path / "s", **OPTIONS)
            break
        except Killed:
            continue
    assert made > 12
    assert hashes(store) == expected


def test_after_kill_9_nothing_is_lost_or_made_twice(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom tests.activations.common import ids, subject\nfrom tomoscope.activations import write_store\n"
        f"write_store(subject(), ids(400), {SITES!r}, sys.argv[1], chunk=100, shard_bytes=20_000, seed=4)\n"
    )
    root = Path(__file__).parents[2]
    env = os.environ | {"PYTHONPATH": f"{root / 'src'}{os.pathsep}{root}", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "s")], env=env, cwd=root)
    while process.poll() is None and len(list((tmp_path / "s" / "parts").glob("0*.safetensors"))) < 5:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "s" / "manifest.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "s" / "text").glob("0*.safetensors")}
    store = write_store(subject(), ids(400), SITES, tmp_path / "s", chunk=100, shard_bytes=20_000, seed=4)
    assert kept
    assert all(path.stat().st_mtime_ns == time_ for path, time_ in kept.items())
    got = torch.cat([rows.places for rows in store.shards()])
    assert sorted(got.tolist()) == list(range(sum(map(len, ids(400)))))


def test_a_bad_shard_is_named_and_mended(tmp_path: Path) -> None:
    store = write_store(subject(), ids(), SITES, tmp_path / "s", **OPTIONS)
    expected = hashes(store)
    path = tmp_path / "s" / "shards" / "000001.safetensors"
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"shards/000001\.safetensors is bad"):
        ActivationStore(tmp_path / "s").verify()
    path.write_bytes(data[:-1])
    with pytest.raises(DataError, match=r"000001\.safetensors is bad"):
        ActivationStore(tmp_path / "s")
    assert repair(tmp_path / "s") == ["shards/000001.safetensors"]
    assert hashes(write_store(subject(), ids(), SITES, tmp_path / "s", **OPTIONS)) == expected


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no store"):
        ActivationStore(tmp_path)
    write_store(subject(), ids(), SITES, tmp_path / "s", **OPTIONS)
    with pytest.raises(DataError, match="seed is 4 there, not 5"):
        StoreWriter(subject(), ids(), SITES, tmp_path / "s", **(OPTIONS | {"seed": 5}))
    with pytest.raises(DataError, match="bfloat16"):
        StoreWriter(subject(), ids(), SITES, tmp_path / "t", dtype="bfloat15")
    with pytest.raises(ResourceError, match="GiB"):
        StoreWriter(subject(), ids(), SITES, tmp_path / "t", tokens=10**14)
    begun = StoreWriter(subject(), ids(), SITES, tmp_path / "u", **OPTIONS)
    begun.harvest()
    with pytest.raises(DataError, match="not finished"):
        ActivationStore(tmp_path / "u")
    with pytest.raises(DataError, match="not the one"):
        StoreWriter(subject(), ids(seed=9), SITES, tmp_path / "u", **OPTIONS).harvest()
    assert json.loads((tmp_path / "u" / "plan.json").read_text())["sites"] == SITES
