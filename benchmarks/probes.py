"""Probes of all layers at once against one scikit-learn fit a layer, on states of GPT-2 small's size.

States have the spectrum of real streams (a few loud directions, a long tail). The choice among five strengths on five
folds (the same folds and strengths for both), for as many items to learn from as fewer and more than coordinates; and
one fit at one strength. Accuracy on held-out items is told beside the times.
"""

from __future__ import annotations

import time

import numpy as np
import torch

from benchmarks.common import tell
from tomoscope.concepts import States, train_probes
from tomoscope.concepts.linear import STRENGTHS, fit
from tomoscope.concepts.splits import folds_of

LAYERS, WIDTH, FOLDS = 13, 768, 5


def states(items: int, seed: int = 0) -> tuple[States, np.ndarray]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 2, (items,), generator=generator)
    out = {}
    for layer in range(LAYERS):
        spread = torch.arange(1, WIDTH + 1).float() ** -0.7
        x = torch.randn(items, WIDTH, generator=generator) * spread
        x = x @ torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator))[0]
        x[:, 0] += 0.1 * layer / LAYERS * (2 * labels - 1)
        out[f"layer.{layer}.resid_post"] = 10 * x
    return States(out), labels.numpy()


def main() -> None:
    for items in (1000, 2000, 4000):
        values, labels = states(items)
        compare(f"probes.five_strengths_on_folds_{items // 2}", values, labels, list(STRENGTHS))
    compare("probes.one_strength_2000", values, labels, [1e-2])
    rows = slice(0, 500)
    x, y = values["layer.0.resid_post"][rows], torch.as_tensor(labels[rows])
    start = time.process_time()
    fit(x, y.roll(1)[None].repeat(200, 1), 2, method="ridge", strengths=torch.full((200,), 1e-2))
    tell("probes.200_labellings_by_ridge", cpu_seconds=time.process_time() - start)


def compare(figure: str, values: States, labels: np.ndarray, path: list[float]) -> None:
    """Half of the items to learn from, the other half for the accuracy."""
    from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
    from sklearn.preprocessing import StandardScaler

    rows = (np.arange(0, len(labels), 2), np.arange(1, len(labels), 2))
    fold = folds_of(np.arange(len(rows[0])), FOLDS, seed=2, labels=labels[rows[0]])  # those of train_probes at seed 0
    parts = [(np.flatnonzero(fold != one), np.flatnonzero(fold == one)) for one in range(FOLDS)]
    costs = [1 / (strength * len(rows[0])) for strength in path]
    start = time.process_time()
    probes = train_probes(values, labels, held_out=rows, strengths=path, folds=FOLDS, nulls=0, normalise="standard")
    ours = time.process_time() - start
    start, hits = time.process_time(), []
    for value in values.by_site.values():
        scale = StandardScaler().fit(value[rows[0]].numpy())
        train, test = (scale.transform(value[part].numpy()) for part in rows)
        if len(path) == 1:
            model = LogisticRegression(C=costs[0], max_iter=5000)
        else:
            model = LogisticRegressionCV(
                Cs=costs, cv=parts, max_iter=5000, scoring="neg_log_loss", l1_ratios=(0.0,),
                use_legacy_attributes=False,
            )  # fmt: skip
        model.fit(train, labels[rows[0]])
        hits.append((model.predict(test) == labels[rows[1]]).mean())
    theirs = time.process_time() - start
    tell(
        figure, cpu_seconds=ours, scikit_learn=theirs, ratio=theirs / ours, sites=len(values), n=len(rows[0]),
        accuracy=float(probes.right.mean()), accuracy_of_scikit_learn=float(np.mean(hits)),
    )  # fmt: skip


if __name__ == "__main__":
    main()
