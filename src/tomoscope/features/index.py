"""Search among features: about something, raising a token, active on a text. DuckDB over Parquet, at any number.

    build_index("features", labels={17: ("capitals of countries", 0.9)})
    index = FeatureIndex("features")
    index.about("country capital")      index.raising(token_id)      index.active(codes)

Three files, each sorted by what it is asked for, in small row groups whose ranges let DuckDB skip all but a few:

    index/words.parquet      word, weight, latent     the words of labels, BM25; the best `CAP` features of each word
    index/raised.parquet     token, effect, latent    what each feature raises (at its largest activation); likewise
    index/features.parquet   latent, label, score, fires, max ...   one row a feature in order, so a feature's row group
                             is known without looking

How it can mislead: a word that more than CAP features share gives only the CAP best of it, so a query of two common
words may miss a feature that is low in both; a feature is listed for the tokens among its strongest only (as many as
the dashboards keep). Words are compared as written, lower-cased: "capitals" is not "capital".
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tomoscope.errors import DataError
from tomoscope.features.coder import Codes

CAP = 20_000
ROWS = 4096
K1, B = 1.2, 0.75
WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True)
class Hit:
    """One feature that answers a question.

    Attributes:
        latent: which.
        value: how well: the words' weight, the logit it raises, its activation.
        label: what it is called, "" where it has no label.
        score: the label's score, None where it has none.
        fires: tokens of the corpus on which it fires.
    """

    latent: int
    value: float
    label: str
    score: float | None
    fires: int


def words_of(text: str) -> list[str]:
    """Lower-case words."""
    return WORD.findall(text.lower())


def connect(folder: Path, threads: int = 2, memory: str = "2GB") -> Any:
    """A DuckDB in memory that spills beside the index and never reaches out."""
    import duckdb

    base = duckdb.connect(config={"threads": threads, "memory_limit": memory, "temp_directory": str(folder / ".spill")})
    base.execute("SET autoinstall_known_extensions = false")
    base.execute("SET preserve_insertion_order = true")
    return base


def build_index(
    folder: str | Path, labels: Mapping[int, tuple[str, float | None]] | None = None, *, memory: str = "2GB"
) -> Path:
    """Make (or make again, with new labels) the index of a folder of dashboards.

    Args:
        folder: of the dashboards.
        labels: feature -> (label, score).
        memory: what DuckDB may use before it spills.
    """
    import pyarrow

    folder = Path(folder)
    if not (folder / "manifest.json").exists():
        raise DataError(f"{folder} holds no finished dashboards.", remedy="Run them to their end.")
    base = connect(folder, memory=memory)
    labels = labels or {}
    table = pyarrow.table(
        {
            "latent": pyarrow.array(list(labels), pyarrow.int32()),
            "label": pyarrow.array([text for text, _ in labels.values()], pyarrow.string()),
            "score": pyarrow.array([score for _, score in labels.values()], pyarrow.float32()),
        }
    )
    base.register("labels", table)
    parts = str(folder / "features-*.parquet").replace("'", "''")
    base.execute(
        f"""CREATE VIEW parts AS SELECT * FROM read_parquet('{parts}');
        CREATE VIEW named AS SELECT p.latent, p.fires, p.max, p.token_entropy, p.single_token,
            coalesce(l.label, '') AS label, l.score FROM parts p LEFT JOIN labels l USING (latent);
        CREATE VIEW raises AS SELECT unnest(raised) AS token, unnest(raised_by) * greatest(max, 0) AS effect, latent
            FROM parts"""
    )
    write_index(base, folder / "index")
    base.close()
    return folder / "index"


def write_index(base: Any, out: Path) -> None:
    """Write the three files from the views `named` (features with labels) and `raises` (token, effect, latent)."""
    out.mkdir(parents=True, exist_ok=True)
    split = "regexp_extract_all(lower(label), '[\\pL\\pN]+')"
    base.execute(f"CREATE OR REPLACE TEMP TABLE words AS SELECT latent, {split} AS words FROM named WHERE label <> ''")
    (count, length) = base.execute("SELECT count(*), avg(len(words)) FROM words").fetchone()
    mean = float(length or 1.0)
    postings = f"""
        WITH said AS (SELECT latent, unnest(words) AS word, len(words) AS n FROM words),
        tf AS (SELECT latent, word, count(*) AS times, any_value(n) AS n FROM said GROUP BY latent, word),
        df AS (SELECT word, count(*) AS held FROM tf GROUP BY word),
        weighed AS (SELECT word, latent, ln(1 + ({count} - held + 0.5) / (held + 0.5)) * times * ({K1} + 1)
            / (times + {K1} * (1 - {B} + {B} * n / {mean})) AS weight FROM tf JOIN df USING (word))
        SELECT word, weight::FLOAT AS weight, latent FROM weighed
        QUALIFY row_number() OVER (PARTITION BY word ORDER BY weight DESC, latent) <= {CAP}
        ORDER BY word, weight DESC, latent"""
    raised = f"""
        SELECT token, effect::FLOAT AS effect, latent FROM raises
        QUALIFY row_number() OVER (PARTITION BY token ORDER BY effect DESC, latent) <= {CAP}
        ORDER BY token, effect DESC, latent"""
    for name, query in (("words", postings), ("raised", raised), ("features", "FROM named ORDER BY latent")):
        path = out / f"{name}.parquet"
        part = str(path.with_suffix(".part")).replace("'", "''")
        base.execute(f"COPY ({query}) TO '{part}' (FORMAT parquet, COMPRESSION zstd, ROW_GROUP_SIZE {ROWS})")
        Path(path.with_suffix(".part")).replace(path)


class FeatureIndex:
    """Answers from the index of a folder of dashboards. Opened once, asked often."""

    def __init__(self, folder: str | Path) -> None:
        import pyarrow.parquet as parquet

        self.folder = Path(folder)
        index = self.folder / "index"
        if not (index / "features.parquet").exists():
            raise DataError(f"{folder} has no index.", remedy="Build it with build_index.")
        self.base = connect(self.folder)
        self.base.execute("SET parquet_metadata_cache = true")
        for name in ("words", "raised"):
            path = str(index / f"{name}.parquet").replace("'", "''")
            self.base.execute(f"CREATE VIEW {name} AS SELECT * FROM read_parquet('{path}')")
        self.features = parquet.ParquetFile(index / "features.parquet", memory_map=True)
        held = self.features.metadata
        self.rows = held.num_rows
        # DuckDB writes groups of about the size that was asked for
        self.ends = np.cumsum([held.row_group(i).num_rows for i in range(held.num_row_groups)])

    def about(self, text: str, limit: int = 20) -> list[Hit]:
        """Features whose labels say the words of the text, best first."""
        words = sorted(set(words_of(text)))
        if not words:
            return []
        asked = ", ".join("?" for _ in words)
        found = self.base.execute(
            f"SELECT latent, sum(weight) AS total FROM words WHERE word IN ({asked}) GROUP BY latent "
            f"ORDER BY total DESC, latent LIMIT {int(limit)}",
            words,
        ).fetchall()
        return self._hits(found)

    def raising(self, token: int, limit: int = 20) -> list[Hit]:
        """Features that raise a token's logit most, at their largest activation."""
        found = self.base.execute(
            f"SELECT latent, effect FROM raised WHERE token = ? ORDER BY effect DESC, latent LIMIT {int(limit)}",
            [int(token)],
        ).fetchall()
        return self._hits(found)

    def active(self, codes: Codes, limit: int = 20) -> list[Hit]:
        """Features that fire on a text, most surprising first: largest activation x log of their rarity.

        Args:
            codes: of the text's tokens (`coder.sparse(activations)`).
            limit: how many.
        """
        latents = codes.feature.numpy()
        values = codes.value.numpy().astype(float)
        some, inverse = np.unique(latents, return_inverse=True)
        top = np.zeros(len(some))
        np.maximum.at(top, inverse, values)
        # rarity needs a look at each feature, so only the strongest few hundred are looked up
        order = np.argsort(-top, kind="stable")[: max(limit, 64)]
        hits = self._hits(list(zip(some[order].tolist(), top[order].tolist(), strict=True)))
        most = max((hit.fires for hit in hits), default=1)
        rarity = {hit.latent: math.log(1 + most / max(1, hit.fires)) for hit in hits}
        return sorted(hits, key=lambda hit: -hit.value * rarity[hit.latent])[:limit]

    def lookup(self, latents: Iterable[int]) -> dict[int, dict[str, Any]]:
        """The rows of some features. Raises DataError for one that is not there."""
        wanted = sorted({int(latent) for latent in latents})
        if wanted and not 0 <= wanted[0] <= wanted[-1] < self.rows:
            raise DataError(f"There is no feature {wanted[-1]}: there are {self.rows}.")
        out = {}
        groups: dict[int, list[int]] = {}
        for latent in wanted:
            groups.setdefault(int(np.searchsorted(self.ends, latent, side="right")), []).append(latent)
        for group, members in groups.items():
            table = self.features.read_row_group(group, columns=["latent", "label", "score", "fires"])
            first = int(self.ends[group]) - table.num_rows
            for row in table.take([latent - first for latent in members]).to_pylist():
                out[row["latent"]] = row
        return out

    def _hits(self, found: list[tuple[int, float]]) -> list[Hit]:
        rows = self.lookup(latent for latent, _ in found)
        return [
            Hit(int(latent), float(value), rows[latent]["label"], rows[latent]["score"], int(rows[latent]["fires"]))
            for latent, value in found
        ]

    def close(self) -> None:
        """Free the files."""
        self.base.close()
        self.features.close()
