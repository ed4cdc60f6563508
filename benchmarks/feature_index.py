"""Search among features: the three questions against a simulated index, as it grows.

    python -m benchmarks.feature_index 100000 1000000 10000000 --folder /somewhere

Labels are drawn from a vocabulary of 30,000 words by Zipf's law, three words each, for half of the features; each
feature raises ten of 50,257 tokens. The index is written by the library's own `write_index`, and asked through
`FeatureIndex`; a question is asked of 50 words (or tokens, or texts of 640 codes) drawn alike, after one that opens the
files. Times are of the whole answer with labels looked up.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import tell
from tomoscope.features.coder import Codes
from tomoscope.features.index import FeatureIndex, connect, write_index

WORDS, VOCAB, ASKED, ACTIVE = 30_000, 50_257, 50, 640


def simulate(folder: Path, n: int) -> float:
    """Write the index of n made-up features; seconds."""
    start = time.perf_counter()
    base = connect(folder, memory="6GB")
    # a cheap Zipf: the rank of a word is WORDS to the power of a uniform number, and hash() is the generator
    uniform = "(hash(range * 7 + {i}) % 1000003) / 1000003.0"
    word = "'w' || floor(pow({words}, {u}))::INT"
    said = " || ' ' || ".join(f"({word.format(words=WORDS, u=uniform.format(i=i))})" for i in range(3))
    base.execute(
        f"""CREATE VIEW named AS SELECT range::INT AS latent, (hash(range) % 100000)::INT AS fires,
            (1 + hash(range + 1) % 100 / 10.0)::FLOAT AS max, 2.0::FLOAT AS token_entropy, 0.3::FLOAT AS single_token,
            CASE WHEN range % 2 = 0 THEN {said} ELSE '' END AS label, 0.8::FLOAT AS score FROM range({n});
        CREATE VIEW raises AS SELECT (hash(range * 11 + i) % {VOCAB})::INT AS token,
            ((hash(range * 13 + i) % 1000) / 100.0)::FLOAT AS effect, range::INT AS latent
            FROM range({n}), (SELECT unnest(range(10)) AS i)"""
    )
    write_index(base, folder / "index")
    base.close()
    return time.perf_counter() - start


def asked(folder: Path, n: int) -> dict[str, tuple[float, float]]:
    """Median and worst milliseconds of each question."""
    index, generator = FeatureIndex(folder), np.random.default_rng(0)
    words = np.floor(WORDS ** generator.random((ASKED + 1, 2))).astype(int)
    tokens = generator.integers(0, VOCAB, ASKED + 1)
    texts = [
        Codes(torch.arange(ACTIVE), torch.from_numpy(generator.integers(0, n, ACTIVE)), torch.rand(ACTIVE), ACTIVE)
        for _ in range(ASKED + 1)
    ]
    works = {
        "about": lambda i: index.about(f"w{words[i, 0]} w{words[i, 1]}"),
        "raising": lambda i: index.raising(int(tokens[i])),
        "active": lambda i: index.active(texts[i]),
    }
    out = {}
    for name, work in works.items():
        work(ASKED)
        times = []
        for i in range(ASKED):
            start = time.perf_counter()
            work(i)
            times.append((time.perf_counter() - start) * 1e3)
        out[name] = (statistics.median(times), max(times))
    index.close()
    return out


def main(arguments: list[str] | None = None) -> None:
    """The growth curve."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sizes", nargs="*", type=int, default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--folder", type=Path, default=None)
    given = parser.parse_args([] if arguments is None else arguments)
    for n in given.sizes:
        folder = Path(tempfile.mkdtemp(dir=given.folder))
        try:
            seconds = simulate(folder, n)
            size = sum(path.stat().st_size for path in (folder / "index").iterdir())
            numbers = {
                f"{name}_{part}_ms": value
                for name, pair in asked(folder, n).items()
                for part, value in zip(("median", "worst"), pair, strict=True)
            }
            tell("feature_index", features=n, build_s=seconds, gib=size / 2**30, **numbers)
        finally:
            shutil.rmtree(folder)


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
