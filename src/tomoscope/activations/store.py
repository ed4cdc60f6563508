"""A store: activations of a corpus in shards, shuffled token by token, each leading back to its text.

    store = ActivationStore(folder)
    store.verify()                                  every checksum; a bad file is named
    for batch in store.batches(4096): ...           shuffled, from memory maps, bounded memory
    store.context(batch.places[0], tokenizer)       the text around a row's token

A folder: `plan.json` (what was asked for), `text/` (all tokens in reading order), `shards/` (rows in random order, all
sites side by side), `statistics.safetensors`, `manifest.json` (written last: sizes and checksums of all). Rows of one
shard come from the whole corpus: see `writing`. Reading takes the same slice of every shard at a time (a run of rows
that lie together on disk), and takes batches from these slices in random order.

How it can mislead: a store knows the model by the hash of its weights; activations of a model changed since are not the
model's. Values are rounded to the type they are stored in.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tomoscope.activations.encoding import SCALE, restored
from tomoscope.activations.harvest import decode_tokens
from tomoscope.activations.sources import MIX, Rows, Source, generator
from tomoscope.activations.statistics import Moments
from tomoscope.activations.tensors import MEND, file_hash, map_tensors, touch
from tomoscope.errors import DataError

PLACES = "places"
MANIFEST = "manifest.json"
SCHEMA = 1


class Mapped:
    """Slices of a store's shards, one behind the other: a group of rows that is taken from the maps."""

    def __init__(
        self, shards: Sequence[Mapping[str, Tensor]], bounds: Sequence[tuple[int, int]], sites: Sequence[str],
        dtype: torch.dtype | None,
    ) -> None:  # fmt: skip
        self.pieces = [(held, *ends) for held, ends in zip(shards, bounds, strict=True) if ends[0] < ends[1]]
        self.ends = torch.tensor([stop - start for _, start, stop in self.pieces]).cumsum(0)
        self.sites, self.dtype = sites, dtype

    def __len__(self) -> int:
        return int(self.ends[-1]) if self.pieces else 0

    @property
    def first(self) -> int:
        """The place of the first row."""
        held, start, _ = self.pieces[0]
        return int(held[PLACES][start])

    def take(self, which: Int[Tensor, " row"]) -> Rows:
        """Some of the rows, in the order of shards: each is copied once, from the map to its place in the batch."""
        ranked = which.sort()[0]
        cuts = [0, *torch.searchsorted(ranked, self.ends).tolist()]
        places = torch.empty(len(which), dtype=torch.int64)
        values: dict[str, Tensor] = {}
        begun = 0
        for (held, start, stop), low, high in zip(self.pieces, cuts[:-1], cuts[1:], strict=True):
            mine = ranked[low:high] + (start - begun)
            begun += stop - start
            places[low:high] = held[PLACES].index_select(0, mine)
            for site in self.sites:
                scale = held.get(site + SCALE)
                if site not in values:
                    kind = self.dtype or (held[site].dtype if scale is None else torch.float32)
                    values[site] = torch.empty(len(which), held[site].shape[1], dtype=kind)
                out = values[site][low:high]
                if out.dtype == held[site].dtype:
                    torch.index_select(held[site], 0, mine, out=out)
                else:
                    restored(held[site].index_select(0, mine), None if scale is None else scale[mine], out.dtype, out)
        return Rows(values, places)


class ActivationStore(Source):
    """A finished store, opened for reading.

    Args:
        folder: where it is.
        seed: of the order of reading.
        mix: rows that are mixed at a time.
        dtype: of what is read; that of the file by default (float32 for int8).

    Raises:
        DataError: no finished store, or a file that is absent or of another size than the manifest says.
    """

    def __init__(
        self, folder: str | Path, *, seed: int = 0, mix: int = MIX, dtype: torch.dtype | None = None,
        sites: Sequence[str] | None = None,
    ) -> None:  # fmt: skip
        self.folder, self.seed, self.mix, self.dtype = Path(folder), seed, mix, dtype
        self.manifest = read_manifest(self.folder)
        self.plan: dict[str, Any] = self.manifest["plan"]
        known = list(self.manifest["widths"])
        wrong = [site for site in sites or () if site not in known]
        if wrong:
            raise DataError(f"{self.folder} holds no {wrong[0]}.", remedy=f"It holds {', '.join(known)}.")
        self.sites = list(sites or known)
        for entry in self._entries():
            path = self.folder / entry["file"]
            if not path.is_file() or path.stat().st_size != entry["size"]:
                found = f"{path.stat().st_size} bytes" if path.is_file() else "absent"
                raise DataError(f"{path} is bad: {found}, not {entry['size']} bytes.", remedy=MEND)
        self._shards = [map_tensors(self.folder / entry["file"]) for entry in self.manifest["shards"]]
        self._texts: dict[int, dict[str, Tensor]] = {}
        self._text_starts = torch.tensor([entry["first"] for entry in self.manifest["text"]])

    def _entries(self) -> list[dict[str, Any]]:
        return [*self.manifest["text"], *self.manifest["shards"], self.manifest["statistics"]]

    def __len__(self) -> int:
        return sum(entry["rows"] for entry in self.manifest["shards"])

    def __repr__(self) -> str:
        return f"ActivationStore({self.folder}: {len(self):,} rows of {', '.join(self.sites)})"

    # ---- facts

    @property
    def widths(self) -> Mapping[str, int]:
        """Width of each site."""
        return {site: self.manifest["widths"][site] for site in self.sites}

    def moments(self) -> Mapping[str, Moments]:
        """Mean, spread and norm of each site, of the values before they were rounded."""
        held = map_tensors(self.folder / self.manifest["statistics"]["file"])
        return {
            site: Moments(
                int(held[f"{site}:n"]), held[f"{site}:mean"].clone(), held[f"{site}:squares"].clone(),
                float(held[f"{site}:norms"]),
            )
            for site in self.sites
        }  # fmt: skip

    def bad(self) -> list[str]:
        """Files whose checksum is not the manifest's; reads everything once."""
        return [e["file"] for e in self._entries() if file_hash(self.folder / e["file"]) != e["sha256"]]

    def verify(self) -> None:
        """Compare every checksum. Raises DataError, naming the files that are bad."""
        found = self.bad()
        if found:
            raise DataError(f"{self.folder}: {', '.join(found)} {'is' if len(found) == 1 else 'are'} bad.", remedy=MEND)

    # ---- rows

    def shard(self, index: int) -> Rows:
        """One shard, mapped (int8 is read and scaled)."""
        return self._slice(index, 0, self.manifest["shards"][index]["rows"])

    def _slice(self, index: int, start: int, stop: int) -> Rows:
        held = self._shards[index]
        values = {}
        for site in self.sites:
            scale = held.get(site + SCALE)
            values[site] = restored(held[site][start:stop], None if scale is None else scale[start:stop], self.dtype)
        return Rows(values, held[PLACES][start:stop])

    def shards(self) -> Iterator[Rows]:
        """All shards, one after the other."""
        return (self.shard(i) for i in range(len(self._shards)))

    # ---- groups: see `Source`

    @property
    def _n_groups(self) -> int:
        return max(1, -(-len(self) // self.mix))

    def _bounds(self, group: int) -> list[tuple[int, int]]:
        n = self._n_groups
        sizes = [entry["rows"] for entry in self.manifest["shards"]]
        return [(size * group // n, size * (group + 1) // n) for size in sizes]

    def _order(self, epoch: int) -> list[int]:
        return torch.randperm(self._n_groups, generator=generator(self.seed, "groups", epoch)).tolist()

    def _batches_of(self, group: int, batch: int) -> int:
        return sum(stop - start for start, stop in self._bounds(group)) // batch

    def batches_an_epoch(self, batch: int) -> int:
        """See `Source`."""
        return sum(self._batches_of(group, batch) for group in range(self._n_groups))

    def _groups_before(self, epoch: int, batch: int, skip: int) -> tuple[int, int]:
        done = 0
        for number, group in enumerate(self._order(epoch)):
            count = self._batches_of(group, batch)
            if done + count > skip:
                return number, done
            done += count
        return self._n_groups, done

    def batches_before(self, epoch: int, batch: int, skip: int) -> int:
        """See `Source`."""
        return self._groups_before(epoch, batch, skip)[1]

    def groups(self, epoch: int, batch: int, skip: int) -> Iterator[Mapped]:
        """The same slice of every shard, mapped: read from disk in one go, and copied once, into batches."""
        for group in self._order(epoch)[self._groups_before(epoch, batch, skip)[0] :]:
            bounds = self._bounds(group)
            for held, (start, stop) in zip(self._shards, bounds, strict=True):
                for site in self.sites:
                    touch(held[site][start:stop])
            yield Mapped(self._shards, bounds, self.sites, self.dtype)

    # ---- back to the text

    @property
    def n_tokens(self) -> int:
        """Tokens of the text; those left out by `skip` have no row."""
        return sum(entry["tokens"] for entry in self.manifest["text"])

    def text_columns(self, places: Int[Tensor, " row"]) -> dict[str, Int[Tensor, " row"]]:
        """Token ids, documents and positions (in the document) of the tokens at some places."""
        places = torch.as_tensor(places, dtype=torch.int64)
        if len(places) and not 0 <= int(places.min()) <= int(places.max()) < self.n_tokens:
            raise DataError(f"There is no token {int(places.max())}; the store read {self.n_tokens:,}.")
        out = {name: torch.zeros(len(places), dtype=torch.int64) for name in ("ids", "documents", "positions")}
        chunk = torch.searchsorted(self._text_starts, places, right=True) - 1
        for index in chunk.unique().tolist():
            mine = (chunk == index).nonzero()[:, 0]
            held = self._text(index)
            local = places[mine] - int(self._text_starts[index])
            for name, column in out.items():
                column[mine] = held[name][local].long()
        return out

    def _text(self, index: int) -> dict[str, Tensor]:
        if index not in self._texts:
            self._texts[index] = map_tensors(self.folder / self.manifest["text"][index]["file"])
        return self._texts[index]

    def context(
        self, place: int | Tensor, tokenizer: Any = None, *, before: int = 16, after: int = 8
    ) -> dict[str, Any]:
        """The text around a row's token.

        Args:
            place: of the token.
            tokenizer: decodes; without one, token ids stand in the text's place.
            before, after: tokens of the same document on either side.

        Returns:
            "document", "position", "ids" (the window's), "at" (which of them it is), "text" and "token".
        """
        here = int(place)
        around = torch.arange(max(0, here - before), min(self.n_tokens, here + after + 1))
        columns = self.text_columns(around)
        document = int(columns["documents"][here - int(around[0])])
        kept = columns["documents"] == document
        ids, at = columns["ids"][kept].tolist(), here - int(around[kept][0])
        return {
            "document": document, "position": int(columns["positions"][here - int(around[0])]), "ids": ids, "at": at,
            "text": decode_tokens(tokenizer, ids), "token": decode_tokens(tokenizer, ids[at : at + 1]),
        }  # fmt: skip

    def token_values(self, site: str, places: Sequence[int] | Tensor) -> Float[Tensor, "row width"]:
        """Rows of a site by their places, in that order; one pass over the places of all shards.

        Raises:
            DataError: a place has no row.
        """
        ranked, back = torch.as_tensor(places, dtype=torch.int64).unique(return_inverse=True)
        out, found = None, torch.zeros(len(ranked), dtype=torch.bool)
        for held in self._shards if len(ranked) else ():
            at = torch.searchsorted(ranked, held[PLACES]).clamp(max=len(ranked) - 1)
            mine = (ranked[at] == held[PLACES]).nonzero()[:, 0]
            scale = held.get(site + SCALE)
            rows = restored(held[site][mine], None if scale is None else scale[mine], self.dtype)
            out = rows.new_zeros(len(ranked), rows.shape[1]) if out is None else out
            out[at[mine]] = rows
            found[at[mine]] = True
        if out is None or not bool(found.all()):
            raise DataError(f"{int((~found).sum())} of the tokens asked for have no row in this store.")
        return out[back]


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished store. Raises DataError where there is none."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        begun = (folder / "plan.json").exists()
        raise DataError(
            f"{folder} is {'a store that was not finished' if begun else 'no store of activations'}.",
            remedy="Run the same harvest again; it goes on where it stopped." if begun else "Give a store's folder.",
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / MANIFEST} can't be read: {error}.", remedy=MEND) from error
    if manifest.get("schema") != SCHEMA:
        raise DataError(f"{folder} has the schema {manifest.get('schema')!r}, not {SCHEMA}.", remedy="Harvest again.")
    return manifest
