"""Writing a store: harvest chunks in any order, then shuffle them into shards; each is a file that is whole or absent.

    write_store(subject, corpus, ["layer.3.resid_post"], folder, tokens=10_000_000)

Two passes. Harvest: chunk c becomes `text/c` and `parts/c`, its rows in random order. Shuffle: shard b takes the b-th
slice of every part and permutes it, so every shard holds an equal random share of every part of the corpus, and rows of
one text lie far apart. Chunks and shards are values: job i of N does every N-th, in any order, on any machine, and a
file that is there is not made again. A process killed at any moment leaves no half file under a final name.

The disk holds the values twice while the shuffle runs; the parts are removed when the manifest stands.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tomoscope.activations.encoding import SCALE, TYPES, check_type, stored
from tomoscope.activations.harvest import (
    CHUNK,
    Chunk,
    Texts,
    chunks,
    harvest_chunk,
    harvest_sites,
    window_length,
    windows,
)
from tomoscope.activations.sources import generator
from tomoscope.activations.statistics import Moments
from tomoscope.activations.store import MANIFEST, PLACES, SCHEMA, ActivationStore
from tomoscope.activations.tensors import file_hash, map_tensors, write_tensors
from tomoscope.errors import DataError, ResourceError
from tomoscope.findings.files import write_json, writing
from tomoscope.findings.provenance import hash_arrays
from tomoscope.model import Subject

SHARD_BYTES = 2**28
Progress = Callable[[str, int, int | None], None]
"""Called with what is done ("harvest", "shuffle"), how many, and of how many (None where not known)."""


def _silent(what: str, done: int, total: int | None) -> None:
    return None


@dataclass(frozen=True)
class Plan:
    """What a store is to hold: two harvests with equal plans give equal stores.

    Attributes:
        model: hash of the model's weights.
        name: the model's.
        sites: in order.
        dtype: "bfloat16", "float16", "float32", "int8".
        window, tokens, skip, chunk: as for `harvest`.
        seed: of the shuffle.
        shard_bytes: of a shard, about.
    """

    model: str
    name: str
    sites: tuple[str, ...]
    dtype: str = "bfloat16"
    window: int = 0
    tokens: int | None = None
    skip: int = 0
    chunk: int = CHUNK
    seed: int = 0
    shard_bytes: int = SHARD_BYTES


def weights_hash(subject: Subject) -> str:
    """Hash of a model's weights."""
    state = subject.model.state_dict()
    return hash_arrays((name, _array(value)) for name, value in state.items() if isinstance(value, Tensor))


def _array(value: Tensor) -> np.ndarray:
    flat = value.detach().cpu().contiguous()
    return flat.view(torch.int16).numpy() if flat.dtype == torch.bfloat16 else flat.numpy()


class StoreWriter:
    """A store in the making. Opening the same folder again with the same arguments goes on with it.

    Raises:
        DataError: the folder holds another store, or an argument does not fit.
        SiteError: a site the model can't give, or one without a value a token.
        ResourceError: the disk is too small for so many tokens.
    """

    def __init__(
        self, subject: Subject, texts: Texts, sites: Iterable[str], folder: str | Path, *, dtype: str = "bfloat16",
        tokens: int | None = None, window: int | None = None, skip: int = 0, chunk: int = CHUNK, seed: int = 0,
        shard_bytes: int = SHARD_BYTES, progress: Progress = _silent,
    ) -> None:  # fmt: skip
        check_type(dtype)
        if chunk < 1 or shard_bytes < 1 or (tokens is not None and tokens < 1):
            raise DataError("A store needs at least one token, and chunks and shards of at least one.")
        self.subject, self.texts, self.folder, self.progress = subject, texts, Path(folder), progress
        self.sites = harvest_sites(subject, sites)
        self.plan = Plan(
            weights_hash(subject), subject.name, tuple(site.name for site in self.sites), dtype,
            window_length(subject, window), tokens, skip, chunk, seed, shard_bytes,
        )  # fmt: skip
        self._check_folder()
        self._check_space()

    def _check_folder(self) -> None:
        path = self.folder / "plan.json"
        mine = json.loads(json.dumps(asdict(self.plan)))
        if path.exists():
            other = json.loads(path.read_text(encoding="utf-8"))
            changed = [key for key in mine if key != "name" and other.get(key) != mine[key]]
            if changed:
                raise DataError(
                    f"{self.folder} holds another store: {changed[0]} is {other.get(changed[0])!r} there, not "
                    f"{mine[changed[0]]!r}.", remedy="Give another folder, or the arguments it was begun with.",
                )  # fmt: skip
            return
        with writing(self.folder):
            for part in ("text", "parts", "shards"):
                (self.folder / part).mkdir(parents=True, exist_ok=True)
        write_json(path, mine)

    def _check_space(self) -> None:
        if self.plan.tokens is None or (self.folder / MANIFEST).exists():
            return
        sizes = self.subject.widths
        width = 0
        for site in self.sites:
            count = 1
            for axis in site.axes[2:]:
                count *= sizes.get(axis, 1)
            width += count
        need = 2 * self.plan.tokens * width * TYPES[self.plan.dtype].itemsize
        held = sum(file.stat().st_size for part in ("parts", "shards") for file in (self.folder / part).glob("*"))
        free = shutil.disk_usage(self.folder).free
        if need - held > free:
            raise ResourceError(
                f"{self.plan.tokens:,} tokens need about {need / 2**30:.1f} GiB while they are shuffled, and "
                f"{free / 2**30:.1f} GiB are free at {self.folder}.",
                remedy="Take fewer tokens or sites, or int8, or train without a store.",
            )

    # ---- files

    def _path(self, part: str, index: int) -> Path:
        return self.folder / part / f"{index:06d}.safetensors"

    def _count(self) -> int:
        path = self.folder / "chunks.json"
        if not path.exists():
            raise DataError(f"{self.folder} has not been harvested to its end.", remedy="Run all harvest jobs first.")
        return int(json.loads(path.read_text(encoding="utf-8"))["chunks"])

    # ---- pass 1

    def harvest(self, *, job: int = 0, of: int = 1) -> None:
        """Harvest every `of`-th chunk from number `job` on; those that are whole are left.

        Raises:
            DataError: the corpus is empty, or is not the one the store was begun with.
        """
        if (self.folder / MANIFEST).exists():
            return
        index = -1
        tokens = 0
        for chunk in chunks(
            windows(self.subject, self.texts, window=self.plan.window, tokens=self.plan.tokens), chunk=self.plan.chunk
        ):
            index, tokens = chunk.index, chunk.first + sum(len(window.ids) for window in chunk.windows)
            if index % of == job:
                self._chunk(chunk)
            self.progress("harvest", tokens, self.plan.tokens)
        if index < 0:
            raise DataError("The corpus holds no token.", remedy="Give one with text.")
        write_json(self.folder / "chunks.json", {"chunks": index + 1, "tokens": tokens})

    def _chunk(self, chunk: Chunk) -> None:
        text, part = self._path("text", chunk.index), self._path("parts", chunk.index)
        if text.exists():
            if not torch.equal(map_tensors(text)["ids"], chunk.text().ids):
                raise DataError(
                    f"The corpus is not the one that {self.folder} was begun with: chunk {chunk.index} differs.",
                    remedy="Give the corpus it was begun with, or another folder.",
                )
            if part.exists():
                return
        slab = harvest_chunk(self.subject, chunk, self.sites, skip=self.plan.skip)
        order = torch.randperm(len(slab), generator=generator(self.plan.seed, "chunk", chunk.index))
        tensors: dict[str, Tensor] = {PLACES: slab.places[order]}
        for site, value in slab.values.items():
            tensors |= stored(site, value[order], self.plan.dtype)
            moments = Moments.of(value)
            tensors |= _moment_tensors(site, moments)
        write_tensors(part, tensors)
        held = slab.text
        write_tensors(text, {"ids": held.ids, "documents": held.documents, "positions": held.positions})

    # ---- pass 2

    def shards(self) -> int:
        """How many shards there are to be; all chunks must have been harvested."""
        rows = sum(len(map_tensors(path)[PLACES]) for path in self._parts())
        width = sum(map_tensors(self._path("parts", 0))[site].shape[1] for site in self.plan.sites)
        return max(1, -(-rows * width * TYPES[self.plan.dtype].itemsize // self.plan.shard_bytes))

    def _parts(self) -> list[Path]:
        paths = [self._path("parts", index) for index in range(self._count())]
        for path in paths:
            if not path.exists():
                raise DataError(f"{path} has not been harvested.", remedy="Run all harvest jobs first.")
        return paths

    def shuffle(self, *, job: int = 0, of: int = 1) -> None:
        """Make every `of`-th shard from number `job` on."""
        if (self.folder / MANIFEST).exists():
            return
        parts, count = [map_tensors(path) for path in self._parts()], self.shards()
        for index in range(job, count, of):
            if not self._path("shards", index).exists():
                bounds = [(len(p[PLACES]) * index // count, len(p[PLACES]) * (index + 1) // count) for p in parts]
                names = [
                    PLACES,
                    *(name for site in self.plan.sites for name in (site, site + SCALE) if name in parts[0]),
                ]
                order = torch.randperm(
                    sum(stop - start for start, stop in bounds), generator=generator(self.plan.seed, "shard", index)
                )
                tensors = {
                    name: torch.cat([p[name][a:b] for p, (a, b) in zip(parts, bounds, strict=True)])[order]
                    for name in names
                }
                write_tensors(self._path("shards", index), tensors)
            self.progress("shuffle", index + 1, count)

    # ---- the end

    def finish(self) -> ActivationStore:
        """Write statistics and manifest once every shard is there, remove the parts, and open the store.

        Raises:
            DataError: a shard is missing or cut short.
        """
        if not (self.folder / MANIFEST).exists():
            count = self.shards()
            paths = [self._path("shards", index) for index in range(count)]
            missing = [path for path in paths if not path.exists()]
            if missing:
                raise DataError(f"{missing[0]} has not been made.", remedy="Run all shuffle jobs first.")
            text, first = [], 0
            for path in (self._path("text", index) for index in range(self._count())):
                tokens = len(map_tensors(path)["ids"])
                text.append(self._entry(path) | {"first": first, "tokens": tokens})
                first += tokens
            totals: dict[str, Moments] = {}
            for held in map(map_tensors, self._parts()):
                for site in self.plan.sites:
                    mine = _moments(site, held)
                    totals[site] = totals[site].merge(mine) if site in totals else mine
            statistics = self.folder / "statistics.safetensors"
            write_tensors(statistics, {k: v for s, m in totals.items() for k, v in _moment_tensors(s, m).items()})
            shards = [self._entry(path) | {"rows": len(map_tensors(path)[PLACES])} for path in paths]
            write_json(self.folder / MANIFEST, {
                "schema": SCHEMA, "plan": asdict(self.plan), "text": text, "shards": shards,
                "widths": {site: len(m.mean) for site, m in totals.items()}, "statistics": self._entry(statistics),
            })  # fmt: skip
        shutil.rmtree(self.folder / "parts", ignore_errors=True)
        return ActivationStore(self.folder)

    def _entry(self, path: Path) -> dict[str, Any]:
        return {
            "file": path.relative_to(self.folder).as_posix(), "size": path.stat().st_size, "sha256": file_hash(path),
        }  # fmt: skip


def _moment_tensors(site: str, moments: Moments) -> dict[str, Tensor]:
    return {
        f"{site}:n": torch.tensor(moments.n), f"{site}:mean": moments.mean, f"{site}:squares": moments.squares,
        f"{site}:norms": torch.tensor(moments.norms, dtype=torch.float64),
    }  # fmt: skip


def _moments(site: str, held: dict[str, Tensor]) -> Moments:
    return Moments(int(held[f"{site}:n"]), held[f"{site}:mean"], held[f"{site}:squares"], float(held[f"{site}:norms"]))


def write_store(
    subject: Subject, texts: Texts, sites: Iterable[str], folder: str | Path, **options: Any
) -> ActivationStore:
    """Harvest, shuffle and finish a store in this process; a run that was stopped goes on where it was.

    Args:
        subject: a model that reads tokens.
        texts: a corpus, texts, or token ids; the same on resuming.
        sites: names or patterns.
        folder: of the store.
        options: see `StoreWriter`.

    Raises:
        DataError, SiteError, ResourceError: see `StoreWriter`.
    """
    writer = StoreWriter(subject, texts, sites, folder, **options)
    writer.harvest()
    writer.shuffle()
    return writer.finish()


def repair(folder: str | Path) -> list[str]:
    """Remove the files of a store that are absent or bad, and its manifest, so that the same harvest makes them anew.

    A bad shard needs all parts again, so everything but the text is harvested again.

    Returns:
        The bad files.
    """
    folder = Path(folder)
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    entries = [*manifest["text"], *manifest["shards"], manifest["statistics"]]
    bad = [
        e["file"] for e in entries if not (folder / e["file"]).exists() or file_hash(folder / e["file"]) != e["sha256"]
    ]
    if bad:
        (folder / MANIFEST).unlink()
        (folder / "parts").mkdir(exist_ok=True)
        for name in bad:
            (folder / name).unlink(missing_ok=True)
    return bad
