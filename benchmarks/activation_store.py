"""Reading a store of bfloat16 activations in random order from a warm cache: GiB a second for one reader."""

from __future__ import annotations

import tempfile
import time
from itertools import islice
from pathlib import Path

import torch

from benchmarks.common import tell
from tomoscope.activations import ActivationStore
from tomoscope.activations.encoding import stored
from tomoscope.activations.statistics import Moments
from tomoscope.activations.tensors import file_hash, write_tensors
from tomoscope.findings.files import write_json

SITE, WIDTH, SHARDS, ROWS = "layer.0.resid_post", 512, 4, 2**18
BATCH = 4096


def made(folder: Path, dtype: str) -> ActivationStore:
    """A store of random rows: a GiB in four shards of bfloat16."""
    draw, shards = torch.Generator().manual_seed(0), []
    for part in ("text", "shards"):
        (folder / part).mkdir(parents=True)

    def entry(path: Path) -> dict:
        size = path.stat().st_size
        return {"file": path.relative_to(folder).as_posix(), "size": size, "sha256": file_hash(path)}

    for index in range(SHARDS):
        rows = torch.randn(ROWS, WIDTH, generator=draw)
        path = folder / "shards" / f"{index:06d}.safetensors"
        write_tensors(path, {"places": torch.arange(ROWS) + index * ROWS, **stored(SITE, rows, dtype)})
        shards.append(entry(path) | {"rows": ROWS})
    text, statistics = folder / "text" / "000000.safetensors", folder / "statistics.safetensors"
    n = SHARDS * ROWS
    names = ("ids", "documents", "positions")
    write_tensors(text, {name: torch.zeros(n, dtype=torch.int32) for name in names})
    moments = Moments.of(rows[:1000])
    write_tensors(statistics, {
        f"{SITE}:n": torch.tensor(n), f"{SITE}:mean": moments.mean, f"{SITE}:squares": moments.squares,
        f"{SITE}:norms": torch.tensor(moments.norms),
    })  # fmt: skip
    write_json(folder / "manifest.json", {
        "schema": 1, "plan": {"dtype": dtype}, "text": [entry(text) | {"first": 0, "tokens": n}], "shards": shards,
        "widths": {SITE: WIDTH}, "statistics": entry(statistics),
    })  # fmt: skip
    return ActivationStore(folder)


def main(rounds: int = 3) -> None:
    for dtype in ("bfloat16", "int8"):
        with tempfile.TemporaryDirectory() as folder:
            store = made(Path(folder) / "store", dtype)
            each = store.batches_an_epoch(BATCH)
            for ahead in (0, 2):
                seconds, cpu = [], []
                for _ in range(rounds + 1):
                    start, used = time.perf_counter(), time.process_time()
                    rows = sum(len(batch) for batch in islice(store.batches(BATCH, ahead=ahead), each))
                    seconds.append(time.perf_counter() - start)
                    cpu.append(time.process_time() - used)
                size = rows * WIDTH * (2 if dtype == "bfloat16" else 1) / 2**30
                tell(
                    f"activation_store.{dtype}.ahead_{ahead}", gib_per_second=size / min(seconds[1:]),
                    gib_per_cpu_second=size / min(cpu[1:]), rows_per_second=rows / min(seconds[1:]),
                )  # fmt: skip


if __name__ == "__main__":
    main()
