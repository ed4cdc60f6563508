"""Every code of a dictionary over a corpus, on disk: one pass, in shards that are each written whole or not at all.

    store = harvest_codes(subject, coder, rows, "codes", reads="layer.3.resid_post")

A shard is two files: `shard-00003.parquet` with (latent, place, value) sorted by latent, so that the codes of a range
of features are a few row groups; and `shard-00003.tokens.npz` with the token ids and where each row of text begins. A
place counts tokens over the whole corpus. A killed run goes on after its last whole shard; a shard whose tokens are not
those of the text given now is an error, not silently kept. Memory holds one shard.

How it can mislead: codes below single precision are kept exactly; what never fired in these tokens may fire elsewhere.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from tomoscope.errors import DataError
from tomoscope.features.coder import SparseCoder
from tomoscope.features.samples import samples, sites_of
from tomoscope.findings.files import write_bytes, write_json, writing
from tomoscope.model import Subject

FORMAT = 1
SHARD_TOKENS = 2**17
ROW_GROUP = 2**16
Progress = Callable[[int, str], None]


@dataclass(frozen=True, eq=False)
class Entries:
    """Codes that are not zero, sorted by latent.

    Attributes:
        latent: [entry].
        place: [entry], the token over the whole corpus.
        value: [entry].
    """

    latent: Int[np.ndarray, " entry"]
    place: Int[np.ndarray, " entry"]
    value: Float[np.ndarray, " entry"]

    def __len__(self) -> int:
        return len(self.latent)


@dataclass(frozen=True, eq=False)
class CodeStore:
    """The codes of a corpus on disk. Made by `harvest_codes`, opened by `CodeStore.open`.

    Attributes:
        folder: where.
        manifest: site, dictionary, shards with their tokens, rows and firing counts.
    """

    folder: Path
    manifest: dict[str, Any] = field(repr=False)

    @classmethod
    def open(cls, folder: str | Path) -> CodeStore:
        """Open a store. Raises DataError where there is none, or where it is not complete."""
        path = Path(folder) / "manifest.json"
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DataError(f"{folder} holds no finished codes.", remedy="Run the harvest to its end.") from None
        except ValueError as error:
            raise DataError(f"{path} is no JSON: {error}.", remedy="Harvest again.") from error
        if manifest.get("format") != FORMAT:
            raise DataError(f"{path} has the format {manifest.get('format')!r}, not {FORMAT}.")
        return cls(Path(folder), manifest)

    @property
    def n_features(self) -> int:
        """Features of the dictionary."""
        return int(self.manifest["n_features"])

    @property
    def n_tokens(self) -> int:
        """Tokens of the corpus."""
        return int(sum(self.manifest["tokens"]))

    @property
    def shards(self) -> int:
        """Shards."""
        return len(self.manifest["tokens"])

    @cached_property
    def starts(self) -> Int[np.ndarray, " shard"]:
        """The first place of each shard."""
        sizes = np.asarray(self.manifest["tokens"], dtype=np.int64)
        return np.cumsum(sizes) - sizes

    @cached_property
    def text(self) -> tuple[Int[np.ndarray, " token"], Int[np.ndarray, " row"]]:
        """Token ids of the whole corpus, and the place at which each row begins."""
        parts = [_tokens(self.folder, shard) for shard in range(self.shards)]
        ids = np.concatenate([ids for ids, _ in parts])
        rows = np.concatenate([rows + start for (_, rows), start in zip(parts, self.starts, strict=True)])
        return ids, rows

    def entries(self, first: int, end: int, *, shards: Sequence[int] | None = None) -> Entries:
        """The codes of features `first` to `end` (exclusive), sorted by latent and place."""
        import pyarrow.parquet as parquet

        latents, places, values = [], [], []
        for shard in range(self.shards) if shards is None else shards:
            table = parquet.read_table(
                self.folder / f"shard-{shard:05d}.parquet", filters=[("latent", ">=", first), ("latent", "<", end)]
            )
            latents.append(table["latent"].to_numpy())
            places.append(table["place"].to_numpy().astype(np.int64) + self.starts[shard])
            values.append(table["value"].to_numpy())
        latent = np.concatenate(latents).astype(np.int64)
        order = np.argsort(latent, kind="stable")  # shards are in the order of places already
        return Entries(latent[order], np.concatenate(places)[order], np.concatenate(values)[order])

    def counts(self) -> Int[np.ndarray, " feature"]:
        """Tokens on which each feature fires."""
        total = np.zeros(self.n_features, dtype=np.int64)
        for shard in range(self.shards):
            with np.load(self.folder / f"shard-{shard:05d}.tokens.npz", allow_pickle=False) as parts:
                np.add.at(total, parts["fired"], parts["fires"])
        return total

    def blocks(self, entries: int = 4_000_000) -> Iterator[tuple[int, int]]:
        """Ranges of features with about so many codes each (at least one feature, at most 65,536)."""
        ends = np.cumsum(self.counts())
        first = 0
        while first < self.n_features:
            before = ends[first - 1] if first else 0
            end = int(np.searchsorted(ends, before + entries, side="right"))
            end = min(max(end, first + 1), first + 65_536, self.n_features)
            yield first, end
            first = end


def dictionary_digest(coder: SparseCoder) -> str:
    """A hash that tells dictionaries apart: shapes, and a spread of their values."""
    digest = hashlib.sha256()
    for tensor in (coder.W_enc, coder.W_dec, coder.b_enc, coder.b_dec):
        flat = tensor.reshape(-1)
        step = max(1, len(flat) // 4096)
        digest.update(f"{tuple(tensor.shape)}".encode())
        digest.update(flat[::step][:4096].float().cpu().numpy().tobytes())
    digest.update(repr(type(coder.activation)).encode())
    return digest.hexdigest()[:16]


def harvest_codes(
    subject: Subject,
    coder: SparseCoder,
    rows: Iterable[Sequence[int] | np.ndarray],
    folder: str | Path,
    *,
    reads: str = "",
    skip_first: bool = False,
    shard_tokens: int = SHARD_TOKENS,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> CodeStore:
    """Encode a corpus, and keep every code that is not zero.

    Args:
        subject: the model.
        coder: the dictionary.
        rows: token ids of each text (`Corpus.pack(...).ids`), the same ones when a run is resumed.
        folder: where to.
        reads: the site; as the dictionary says where not given.
        skip_first: no code for a row's first token.
        shard_tokens: tokens of a shard.
        batch_size: rows at once; by the memory where not given.
        progress: called with (tokens done, what).

    Returns:
        The finished store.

    Raises:
        DataError: no rows, or the folder holds the codes of another model, dictionary, site or text.
    """
    folder, (site, _) = Path(folder), sites_of(coder, reads)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    identity = {
        "format": FORMAT, "model": subject.name, "site": site, "dictionary": coder.name,
        "digest": dictionary_digest(coder), "n_features": coder.n_features, "skip_first": skip_first,
        "shard_tokens": shard_tokens,
    }  # fmt: skip
    _same(folder / "identity.json", identity)
    tokens: list[int] = []
    for shard, some in enumerate(_shards(rows, shard_tokens)):
        _shard(subject, coder, site, some, folder, shard, skip_first, batch_size)
        tokens.append(sum(len(row) for row in some))
        if progress:
            progress(sum(tokens), "tokens")
    if not tokens:
        raise DataError("The corpus has no rows.", remedy="Give texts with tokens.")
    manifest = identity | {"tokens": tokens}
    write_json(folder / "manifest.json", manifest)
    return CodeStore(folder, manifest)


def _same(path: Path, identity: dict[str, Any]) -> None:
    if path.exists():
        known = json.loads(path.read_text(encoding="utf-8"))
        other = [key for key, value in identity.items() if known.get(key) != value]
        if other:
            raise DataError(
                f"{path.parent} holds codes whose {other[0]} is {known.get(other[0])!r}, not {identity[other[0]]!r}.",
                remedy="Give another folder.",
            )
    else:
        write_json(path, identity)


def _shards(rows: Iterable[Sequence[int] | np.ndarray], tokens: int) -> Iterator[list[np.ndarray]]:
    held: list[np.ndarray] = []
    count = 0
    for row in rows:
        ids = np.asarray(row, dtype=np.int64)
        if not len(ids):
            continue
        held.append(ids)
        count += len(ids)
        if count >= tokens:
            yield held
            held, count = [], 0
    if held:
        yield held


def _shard(
    subject: Subject,
    coder: SparseCoder,
    site: str,
    rows: list[np.ndarray],
    folder: Path,
    shard: int,
    skip_first: bool,
    batch_size: int | None,
) -> None:
    lengths = np.array([len(row) for row in rows])
    starts, ids = np.cumsum(lengths) - lengths, np.concatenate(rows).astype(np.uint32)
    codes_path, tokens_path = folder / f"shard-{shard:05d}.parquet", folder / f"shard-{shard:05d}.tokens.npz"
    if tokens_path.exists() and codes_path.exists():
        known, known_starts = _tokens(folder, shard)
        if not np.array_equal(known, ids) or not np.array_equal(known_starts, starts):
            raise DataError(
                f"Shard {shard} of {folder} was made from another text.",
                remedy="Give the same corpus, or a new folder.",
            )
        return
    latents, places, values = [], [], []
    for piece in samples(
        subject, [row.tolist() for row in rows], site, skip_first=skip_first, batch_size=batch_size
    ):  # fmt: skip
        x = piece.values[site]
        if x.shape[1] != coder.d_in:
            raise DataError(f"{site} is {x.shape[1]} wide, and {coder!r} reads {coder.d_in}.")
        with torch.no_grad():
            codes = coder.sparse(x)
        place = torch.from_numpy(starts)[piece.prompt] + piece.position
        latents.append(codes.feature.numpy())
        places.append(place[codes.sample].numpy())
        values.append(codes.value.float().numpy())
    latent, place = np.concatenate(latents), np.concatenate(places)
    order = np.lexsort((place, latent))
    write_bytes(codes_path, _parquet(latent[order], place[order], np.concatenate(values)[order]))
    fired, fires = np.unique(latent, return_counts=True)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, ids=ids, starts=starts, fired=fired, fires=fires)
    write_bytes(tokens_path, buffer.getvalue())


def _parquet(latent: np.ndarray, place: np.ndarray, value: np.ndarray) -> bytes:
    import pyarrow
    import pyarrow.parquet as parquet

    table = pyarrow.table({"latent": latent.astype(np.uint32), "place": place.astype(np.uint32), "value": value})
    buffer = io.BytesIO()
    parquet.write_table(
        table, buffer, compression="zstd", row_group_size=ROW_GROUP, use_dictionary=False,
        column_encoding={"latent": "DELTA_BINARY_PACKED", "place": "DELTA_BINARY_PACKED"},
    )  # fmt: skip
    return buffer.getvalue()


def _tokens(folder: Path, shard: int) -> tuple[np.ndarray, np.ndarray]:
    with np.load(folder / f"shard-{shard:05d}.tokens.npz", allow_pickle=False) as parts:
        return parts["ids"], parts["starts"].astype(np.int64)
