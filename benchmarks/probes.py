"""Probes of all layers at once against one scikit-learn fit a layer, on states of GPT-2 small's size.

States have the spectrum of real streams (a few loud directions, a long tail). Two works: one fit at one strength, and
the choice among five strengths on five folds. Accuracy on held-out items is told beside the times.
"""

from __future__ import annotations

import time

import numpy as np
import torch

from benchmarks.common import tell
from tomoscope.concepts import States, train_probes
from tomoscope.concepts.linear import STRENGTHS, fit

LAYERS, WIDTH, ITEMS = 12, 768, 1000


def states(seed: int = 0) -> tuple[States, np.ndarray]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 2, (ITEMS,), generator=generator)
    out = {}
    for layer in range(LAYERS):
        spread = torch.arange(1, WIDTH + 1).float() ** -0.7
        x = torch.randn(ITEMS, WIDTH, generator=generator) * spread
        x = x @ torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator))[0]
        x[:, 0] += 0.1 * layer / LAYERS * (2 * labels - 1)
        out[f"layer.{layer}.resid_post"] = 10 * x
    return States(out), labels.numpy()


def main() -> None:
    from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
    from sklearn.preprocessing import StandardScaler

    values, labels = states()
    rows = (np.arange(0, ITEMS, 2), np.arange(1, ITEMS, 2))
    for name, path, folds in (("one strength", [1e-2], 2), ("five strengths on folds", list(STRENGTHS), 5)):
        start = time.process_time()
        probes = train_probes(values, labels, held_out=rows, strengths=path, folds=folds, nulls=0, normalise="standard")
        ours = time.process_time() - start
        start, hits = time.process_time(), []
        for value in values.by_site.values():
            scale = StandardScaler().fit(value[rows[0]].numpy())
            train, test = (scale.transform(value[part].numpy()) for part in rows)
            costs = [1 / (strength * len(rows[0])) for strength in path]
            if len(path) == 1:
                model = LogisticRegression(C=costs[0], max_iter=5000)
            else:
                model = LogisticRegressionCV(Cs=costs, cv=folds, max_iter=5000, scoring="neg_log_loss")
            model.fit(train, labels[rows[0]])
            hits.append((model.predict(test) == labels[rows[1]]).mean())
        theirs = time.process_time() - start
        tell(
            f"probes.{name.replace(' ', '_')}", cpu_seconds=ours, scikit_learn=theirs, ratio=theirs / ours,
            accuracy=float(probes.right.mean()), accuracy_of_scikit_learn=float(np.mean(hits)),
        )  # fmt: skip
    x, y = values["layer.0.resid_post"][rows[0]], torch.as_tensor(labels[rows[0]])
    start = time.process_time()
    fit(x, y.roll(1)[None].repeat(200, 1), 2, method="ridge", strengths=torch.full((200,), 1e-2))
    tell("probes.200_labellings_by_ridge", cpu_seconds=time.process_time() - start)


if __name__ == "__main__":
    main()
