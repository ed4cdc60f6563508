"""The tiny GPT-2 and the numbers that the public EAP-IG code gave on it, for the tests of wiring and edge scores."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import torch

from tomoscope.circuits import LogitDifference, Pairs
from tomoscope.model import Subject, open_model

FOLDER = Path(__file__).parents[1] / "reference" / "eap"
SCORES = np.load(FOLDER / "scores.npz")
TOKENS = json.loads((FOLDER / "pairs.json").read_text())


@cache
def reference_subject() -> Subject:
    """The model, in float64."""
    return open_model(FOLDER, tokenizer=None, dtype="float64")


def reference_pairs() -> Pairs:
    """Its four pairs of prompts."""
    subject = reference_subject()
    answers, wrong = (torch.tensor(TOKENS[name])[:, None] for name in ("answers", "wrong"))
    return Pairs(subject.tokens(TOKENS["clean"]), subject.tokens(TOKENS["corrupted"]), answers, wrong)


def reference_metric() -> LogitDifference:
    """The logit difference that the reference measured."""
    return reference_pairs().metric()
