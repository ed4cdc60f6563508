"""Reading dashboards: one feature's card, its contexts with their activations, and drawn texts for scoring labels.

    book = FeatureBook.open("features")
    card = book.card(17, subject.tokenizer)

A card is plain data (numbers, strings, lists), ready for JSON or a page. A context is a window of tokens of one text
around its strongest token, with the feature's activation at each.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from tomoscope.errors import DataError
from tomoscope.features.codes import CodeStore, Entries
from tomoscope.findings.control import stable_seed

BEFORE, AFTER = 20, 8


@dataclass(frozen=True, eq=False)
class Context:
    """A window of one text.

    Attributes:
        tokens: [token], ids.
        values: [token], the feature's activation, 0 where it does not fire.
        peak: the index of the token it was chosen for.
        place: that token's place in the corpus.
        row: which text.
        bin: part of the feature's range it was drawn from; -1: the strongest texts.
        start: the position of the window's first token in its text.
    """

    tokens: Int[np.ndarray, " token"]
    values: Float[np.ndarray, " token"]
    peak: int
    place: int
    row: int
    bin: int = -1
    start: int = 0

    @property
    def active(self) -> bool:
        """Whether the feature fires in the window."""
        return bool((self.values > 0).any())


@dataclass(frozen=True, eq=False)
class FeatureBook:
    """The dashboards of a dictionary. Opened by `FeatureBook.open`.

    Attributes:
        folder: where.
        manifest: what they are of.
    """

    folder: Path
    manifest: dict[str, Any] = field(repr=False)

    @classmethod
    def open(cls, folder: str | Path) -> FeatureBook:
        """Open a folder of dashboards. Raises DataError where they are not finished."""
        path = Path(folder) / "manifest.json"
        try:
            return cls(Path(folder), json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise DataError(f"{folder} holds no finished dashboards.", remedy="Run them to their end.") from None
        except ValueError as error:
            raise DataError(f"{path} is no JSON: {error}.") from error

    @property
    def n_features(self) -> int:
        """Features."""
        return int(self.manifest["n_features"])

    @cached_property
    def store(self) -> CodeStore:
        """The codes that the dashboards summarise."""
        return CodeStore.open(self.manifest["codes"])

    def part(self, latent: int) -> str:
        """The name of the part that holds a feature. Raises DataError for one that is not there."""
        if not 0 <= latent < self.n_features:
            raise DataError(f"There is no feature {latent}: there are {self.n_features}.")
        starts = [int(name) for name in self.manifest["parts"]]
        return self.manifest["parts"][bisect_right(starts, latent) - 1]

    def summary(self, latent: int) -> dict[str, Any]:
        """The numbers of one feature."""
        import pyarrow.parquet as parquet

        path = self.folder / f"features-{self.part(latent)}.parquet"
        return parquet.read_table(path, filters=[("latent", "=", latent)]).to_pylist()[0]

    def column(self, name: str) -> np.ndarray:
        """One number of every feature, in order."""
        import pyarrow.parquet as parquet

        parts = [self.folder / f"features-{part}.parquet" for part in self.manifest["parts"]]
        return np.concatenate([parquet.read_table(path, columns=[name])[name].to_numpy() for path in parts])

    def pages(self) -> Iterator[tuple[dict[str, Any], list[Context]]]:
        """Every feature's numbers and contexts in order, a part read at once: for exports of all of them."""
        import pyarrow.parquet as parquet

        for name in self.manifest["parts"]:
            summaries = parquet.read_table(self.folder / f"features-{name}.parquet").to_pylist()
            table = parquet.read_table(self.folder / f"contexts-{name}.parquet")
            latents, places, rows, bins = (
                table[column].to_numpy() for column in ("latent", "place", "row", "bin")
            )  # fmt: skip
            first, last = summaries[0]["latent"], summaries[-1]["latent"]
            entries = self.store.entries(first, last + 1)
            for summary in summaries:
                latent = summary["latent"]
                a, b = np.searchsorted(entries.latent, [latent, latent + 1])
                own = Entries(entries.latent[a:b], entries.place[a:b], entries.value[a:b])
                c, d = np.searchsorted(latents, [latent, latent + 1])
                yield (
                    summary,
                    [self.window(own, int(places[i]), int(rows[i]), int(bins[i])) for i in range(c, d)],
                )

    def contexts(self, latent: int, *, before: int = BEFORE, after: int = AFTER) -> list[Context]:
        """The strongest texts and those drawn from each part of the range, with activations."""
        import pyarrow.parquet as parquet

        path = self.folder / f"contexts-{self.part(latent)}.parquet"
        table = parquet.read_table(path, filters=[("latent", "=", latent)]).to_pydict()
        entries = self.store.entries(latent, latent + 1)
        return [
            self.window(entries, place, row, part, before, after)
            for place, row, part in zip(table["place"], table["row"], table["bin"], strict=True)
        ]

    def window(
        self, entries: Entries, place: int, row: int, part: int = -1, before: int = BEFORE, after: int = AFTER
    ) -> Context:
        """The tokens around a place, inside its text, with a feature's activations."""
        ids, rows = self.store.text
        low = max(int(rows[row]), place - before)
        high = min(int(rows[row + 1]) if row + 1 < len(rows) else len(ids), place + after + 1)
        a, b = np.searchsorted(entries.place, [low, high])
        values = np.zeros(high - low, dtype=np.float32)
        values[entries.place[a:b] - low] = entries.value[a:b]
        return Context(ids[low:high].astype(np.int64), values, place - low, place, row, part, low - int(rows[row]))

    def drawn(
        self, latent: int, *, active: int = 100, silent: int = 100, deciles: int = 10, seed: int = 0,
        exclude: Sequence[int] = (), before: int = BEFORE, after: int = AFTER,
    ) -> tuple[list[Context], list[Context]]:  # fmt: skip
        """Texts on which a feature fires, spread over the deciles of its activation, and texts on which it is silent.

        Args:
            latent: which feature.
            active, silent: how many of each; fewer where there are not so many.
            deciles: parts by rank of the activation, from each of which as many are drawn.
            seed: of the draw.
            exclude: rows left out (those that a label was made from).
            before, after: tokens of the window.
        """
        entries = self.store.entries(latent, latent + 1)
        rng = np.random.default_rng(stable_seed(seed, "contexts", latent))
        ids, rows = self.store.text
        row = np.searchsorted(rows, entries.place, side="right") - 1
        order = np.lexsort((-entries.value, row))
        best = order[np.append(True, row[order][1:] != row[order][:-1])] if len(order) else order
        best = best[~np.isin(row[best], np.asarray(exclude, dtype=np.int64))]
        ranked = best[np.argsort(-entries.value[best], kind="stable")]
        chosen = [
            place
            for part in np.array_split(ranked, min(deciles, max(1, len(ranked))))
            for place in rng.permutation(part)[: -(-active // deciles)]
        ][:active]
        fire = [self.window(entries, int(entries.place[i]), int(row[i]), 0, before, after) for i in chosen]
        quiet = np.setdiff1d(np.arange(len(rows)), np.concatenate([row, np.asarray(exclude, dtype=row.dtype)]))
        ends = np.append(rows[1:], len(ids))
        still = []
        for one in rng.permutation(quiet)[:silent]:
            length = int(ends[one] - rows[one])
            # a silent window is centred where an active one would be: anywhere in its text
            still.append(self.window(entries, int(rows[one]) + int(rng.integers(length)), int(one), -1, before, after))
        return fire, still

    def card(self, latent: int, tokenizer: Any = None, *, label: str = "", per: int = 5) -> dict[str, Any]:
        """Everything about one feature as plain data; tokens as text where a tokenizer is given.

        Args:
            latent: which feature.
            tokenizer: the model's.
            label: what it is called.
            per: texts shown of each part of the range, and of the strongest ones four times as many.
        """
        say = token_words(tokenizer)
        summary = self.summary(latent)
        for name in ("tokens", "raised", "lowered"):
            summary[f"{name}_text"] = [say(token) for token in summary[name] if token >= 0]
        shown: dict[int, list[dict[str, Any]]] = {}
        for context in self.contexts(latent):
            some = shown.setdefault(context.bin, [])
            if len(some) < (4 * per if context.bin < 0 else per):
                some.append(
                    {
                        "tokens": [say(token) for token in context.tokens.tolist()],
                        "values": [round(float(value), 4) for value in context.values],
                        "peak": context.peak, "place": context.place, "row": context.row,
                    }
                )  # fmt: skip
        return {
            **summary, "label": label, "site": self.manifest["site"], "model": self.manifest["model"],
            "dictionary": self.manifest["dictionary"], "n_tokens": self.manifest["tokens"],
            "contexts": {"top" if part < 0 else str(part): some for part, some in sorted(shown.items())},
        }  # fmt: skip


def token_words(tokenizer: Any) -> Any:
    """From a token id to its text; without a tokenizer the number itself."""
    if tokenizer is None:
        return lambda token: f"#{token}"
    return lambda token: tokenizer.decode([int(token)])
