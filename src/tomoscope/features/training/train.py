"""Training many dictionaries side by side from one stream of activations, with checkpoints and figures.

    coders = train(source, [TrainConfig(reads=("layer.3.resid_post",), latents=4096, k=k) for k in (16, 32, 64)])

Every batch is read (or harvested) once and given to every dictionary whose sites it has, so layers x sizes x sparsities
cost one harvest. With a folder, figures go to `figures.jsonl` and a checkpoint is written every so often, whole or not
at all; the same call on the same folder goes on from it, and what it ends with is bit by bit what an uninterrupted run
would have ended with (same machine, same number of threads).

How it can mislead: figures while training are of the batches themselves; a dictionary is judged on text it has not
seen.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tomoscope.activations import Source, first_rows
from tomoscope.activations.tensors import map_tensors, write_tensors
from tomoscope.errors import DataError
from tomoscope.features.training.config import TrainConfig
from tomoscope.features.training.dictionary import DictionaryTraining, Figures
from tomoscope.features.training.start import SAMPLE
from tomoscope.findings.files import append_lines, write_json, writing

CHECKPOINT = "checkpoint.safetensors"
PLAN = "training.json"
FIGURES = "figures.jsonl"

Watch = Callable[[int, Sequence[Figures], float], None]
"""Called after each step with the step, every dictionary's figures, and rows a second."""


def _unwatched(step: int, figures: Sequence[Figures], rate: float) -> None:
    return None


class Training:
    """Dictionaries in training, side by side.

    Args:
        source: of activations.
        configs: of the dictionaries; `batch` and `steps` must agree.
        folder: for checkpoint and figures; without one nothing is kept.
        every: steps between checkpoints.
        log_every: steps between lines of figures.

    Raises:
        DataError: no dictionary, configurations that disagree, a site that the source lacks, or a folder that holds
            another training.
    """

    def __init__(
        self, source: Source, configs: Sequence[TrainConfig], *, folder: str | Path | None = None, every: int = 500,
        log_every: int = 20,
    ) -> None:  # fmt: skip
        if not configs or len({(config.batch, config.steps) for config in configs}) != 1:
            raise DataError(
                "Dictionaries that are trained side by side have one batch size and one number of steps.",
                remedy="Give at least one, and train others in a run of their own.",
            )
        if len({config.title for config in configs}) < len(configs):
            raise DataError("Two dictionaries have one name.", remedy="Give each its `name`, or another seed.")
        self.source, self.configs, self.every, self.log_every = source, list(configs), every, log_every
        self.batch, self.steps = configs[0].batch, configs[0].steps
        self.folder = None if folder is None else Path(folder)
        moments = source.moments()
        self.dictionaries = [DictionaryTraining(config, source.widths, moments) for config in configs]
        self.step = 0
        if not self._resume():
            rows = first_rows(source, SAMPLE, self.batch)
            for dictionary in self.dictionaries:
                dictionary.begin(rows.values)

    # ---- the folder

    def _plan(self) -> dict[str, Any]:
        return json.loads(json.dumps({"dictionaries": [config.document() for config in self.configs]}))

    def _resume(self) -> bool:
        if self.folder is None:
            return False
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / PLAN
        if not path.exists():
            write_json(path, self._plan())
        elif json.loads(path.read_text(encoding="utf-8")) != self._plan():
            raise DataError(
                f"{self.folder} holds another training.",
                remedy="Give another folder, or the options it was begun with.",
            )
        checkpoint = self.folder / CHECKPOINT
        if not checkpoint.exists():
            (self.folder / FIGURES).unlink(missing_ok=True)
            return False
        held = map_tensors(checkpoint)
        for index, dictionary in enumerate(self.dictionaries):
            prefix = f"{index}/"
            own = {name.removeprefix(prefix): value for name, value in held.items() if name.startswith(prefix)}
            dictionary.load(own)
        self.step = int(held["step"])
        self._cut_figures()
        return True

    def _cut_figures(self) -> None:
        """Lines of steps after the checkpoint are made again."""
        path = self.folder / FIGURES if self.folder else None
        if path is None or not path.exists():
            return
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):  # a last line that a kill cut short
                if json.loads(line)["step"] <= self.step:
                    kept.append(line)
        path.unlink()
        append_lines(path, kept)

    def save(self) -> None:
        """Write the checkpoint."""
        if self.folder is None:
            return
        tensors: dict[str, Tensor] = {"step": torch.tensor(self.step)}
        for index, dictionary in enumerate(self.dictionaries):
            tensors |= {f"{index}/{name}": value for name, value in dictionary.tensors().items()}
        write_tensors(self.folder / CHECKPOINT, tensors)

    # ---- the work

    def run(self, watch: Watch = _unwatched, *, until: int | None = None) -> list[DictionaryTraining]:
        """Train to the end, or to step `until`."""
        end = min(self.steps, self.steps if until is None else until)
        if self.step >= end:
            return self.dictionaries
        begun, first = time.perf_counter(), self.step
        batches = self.source.batches(self.batch, start=self.step)
        try:
            for batch in batches:
                figures = [dictionary.step(batch.values) for dictionary in self.dictionaries]
                self.step += 1
                rate = (self.step - first) * self.batch / max(time.perf_counter() - begun, 1e-9)
                self._check(figures)
                if self.folder and (self.step % self.log_every == 0 or self.step == end):
                    self._log(figures, rate)
                watch(self.step, figures, rate)
                if self.step % self.every == 0 or self.step == end:
                    self.save()
                if self.step >= end:
                    break
        finally:
            close = getattr(batches, "close", None)
            if close is not None:
                close()
        return self.dictionaries

    def _check(self, figures: Sequence[Figures]) -> None:
        for config, one in zip(self.configs, figures, strict=True):
            if not all(map(_finite, one.losses.values())):
                raise DataError(
                    f"The loss of {config.title} is not finite at step {self.step}.",
                    remedy="Lower the learning rate, or look at the activations' norms.",
                )

    def _log(self, figures: Sequence[Figures], rate: float) -> None:
        assert self.folder is not None
        lines = [
            json.dumps({"dictionary": config.title, **asdict(one), "rows_per_second": round(rate, 1)})
            for config, one in zip(self.configs, figures, strict=True)
        ]
        append_lines(self.folder / FIGURES, lines)


def _finite(value: float) -> bool:
    return value - value == 0


def train(
    source: Source,
    configs: Sequence[TrainConfig] | TrainConfig,
    *,
    folder: str | Path | None = None,
    watch: Watch = _unwatched,
    every: int = 500,
) -> list[DictionaryTraining]:
    """Train dictionaries to the end; see `Training`.

    Returns:
        The dictionaries; `finished_coder` makes `SparseCoder`s of them.
    """
    listed = [configs] if isinstance(configs, TrainConfig) else list(configs)
    return Training(source, listed, folder=folder, every=every).run(watch)
