"""A treatment made part of a model: a plain transformers directory that loads and runs without tomoscope.

Steps: check the treatment against the weights; write model and tokenizer of the treated subject, with a model card that
tells the provenance and the treatment itself, into a folder beside the place; rename it; undo. A crash leaves no half.
How it can mislead: numbers are rounded to the parameters' own type, so in bfloat16 a small change may vanish.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tomoscope.errors import EditError
from tomoscope.findings.files import writing
from tomoscope.model import Subject
from tomoscope.treat.treatment import Treatment

FILE = "treatment_{}.safetensors"


def merge_to(
    treatment: Treatment | Sequence[Treatment], subject: Subject, directory: str | Path, *, anyway: bool = False
) -> Path:
    """Write the treated model as a new directory.

    Args:
        treatment: one or several, applied in this order.
        subject: a transformers model; its weights are the same bits afterwards.
        directory: must not exist, or be empty.
        anyway: see `Treatment.apply`.

    Raises:
        EditError: the directory holds something, or the model has no transformers format.
        LedgerError: it cannot be written.
    """
    several = [treatment] if isinstance(treatment, Treatment) else list(treatment)
    place = Path(directory)
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise EditError(f"{place} is there already.", remedy="Give a new directory.")
    if not hasattr(subject.model, "save_pretrained"):
        raise EditError("This model is no transformers model, so it has no directory form.", remedy="Save a treatment.")
    with writing(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(dir=place.parent, prefix=f".{place.name}."))
    handles = []
    try:
        for number, one in enumerate(several):
            # each was made for the weights that the ones before it leave
            handles.append(one.apply(subject, anyway=anyway))
            one.save(beside / FILE.format(number))
        with writing(place):
            subject.model.save_pretrained(beside)  # ty: ignore[not-callable]
            if subject.tokenizer is not None:
                subject.tokenizer.save_pretrained(beside)
            (beside / "README.md").write_text(model_card(several), encoding="utf-8")
            beside.chmod(0o755)
            if place.is_dir():
                place.rmdir()
            beside.rename(place)
    finally:
        for handle in reversed(handles):
            handle.undo()
        shutil.rmtree(beside, ignore_errors=True)
    return place


def model_card(treatments: Sequence[Treatment]) -> str:
    """The card (Markdown) of a model with these treatments in its weights: what, how and for which weights."""
    lines = ["---", "tags:", "- model-editing", "---", "", "# A treated model", ""]
    lines += ["The weights of this model were changed by tomoscope. It loads with plain transformers.", ""]
    for number, one in enumerate(treatments):
        origin = one.origin
        lines += [f"## {origin.method}", ""]
        lines += [
            f"- of: `{origin.model}`, weights (SHA-256) `{origin.model_hash}`",
            f"- made: {origin.created}, seed {origin.seed}, with "
            + ", ".join(f"{name} {version}" for name, version in origin.versions.items()),
            f"- changed: {', '.join(f'`{name}` (norm {norm:.4g})' for name, norm in one.norms().items()) or 'nothing'}",
            f"- the change itself, with all settings: `{FILE.format(number)}`", "",
        ]  # fmt: skip
        if origin.requests:
            lines += ["Requests:", "", "```json", *map(_line, origin.requests), "```", ""]
    return "\n".join(lines)


def _line(request: object) -> str:
    return json.dumps(request, ensure_ascii=False)
