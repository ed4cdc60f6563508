"""What a model is asked: prompts with labelled spans, clean and corrupted pairs, text corpora, and the field's
tasks.
"""

from __future__ import annotations

from tomoscope.data.labelled import LabelledTexts, load_labelled
from tomoscope.data.loaders import load_facts, load_pairs
from tomoscope.data.pairs import AlignedPairs, Item, Pair, PairSet, continuation
from tomoscope.data.prompts import Encoded, Prompt, as_prompt, mark
from tomoscope.data.tasks import TASKS, TaskSpec, single_tokens, task
from tomoscope.data.text import Corpus, Document, Row

__all__ = [
    "TASKS",
    "AlignedPairs",
    "Corpus",
    "Document",
    "Encoded",
    "Item",
    "LabelledTexts",
    "Pair",
    "PairSet",
    "Prompt",
    "Row",
    "TaskSpec",
    "as_prompt",
    "continuation",
    "load_facts",
    "load_labelled",
    "load_pairs",
    "mark",
    "single_tokens",
    "task",
]
