"""A treatment made part of a model: a plain transformers directory that loads and runs without tomoscope.

Steps: check the treatment against the weights; write model and tokenizer of the treated subject, with a model card that
tells the provenance, the treatment itself and the numbers that it replaced, into a folder beside the place; rename it;
undo. A crash leaves no half. `unmerge_to` puts the replaced numbers back: subtracting would leave rounding behind.
How it can mislead: numbers are rounded to the parameters' own type, so in bfloat16 a small change may vanish.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save

from tomoscope.errors import EditError
from tomoscope.findings.files import writing
from tomoscope.model import Subject
from tomoscope.treat.treatment import FORMAT, Treatment, load_treatment, touched_hash

FILE, BEFORE = "treatment_{}.safetensors", "before.safetensors"


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
    _check_free(place)
    if not hasattr(subject.model, "save_pretrained"):
        raise EditError("This model is no transformers model, so it has no directory form.", remedy="Save a treatment.")
    handles = []
    parameters = dict(subject.model.named_parameters(remove_duplicate=False))
    kept = {
        name: parameters[name].detach().cpu().clone() for one in several for name in one.changes if name in parameters
    }
    try:
        with _directory(place) as beside:
            for number, one in enumerate(several):
                # each was made for the weights that the ones before it leave
                handles.append(one.apply(subject, anyway=anyway))
                one.save(beside / FILE.format(number))
            tied = str(any(one.untie for one in several))
            (beside / BEFORE).write_bytes(save(kept, metadata={"format": FORMAT, "untied": tied}))
            _save(subject, beside)
            (beside / "README.md").write_text(model_card(several), encoding="utf-8")
    finally:
        for handle in reversed(handles):
            handle.undo()
    return place


def check_merged(directory: str | Path, place: str | Path) -> None:
    """Raise EditError where `unmerge_to` could not work: no directory of `merge_to`, or a place that is taken."""
    directory, place = Path(directory), Path(place)
    lacking = [name for name in (BEFORE, FILE.format(0)) if not (directory / name).is_file()]
    if lacking:
        raise EditError(
            f"{directory} has no {lacking[0]}, so it is no model that treatments were exported into.",
            remedy="Give a directory that export (merge_to) wrote.",
        )
    _check_free(place)


@torch.no_grad()
def unmerge_to(subject: Subject, directory: str | Path, place: str | Path) -> Path:
    """Write a merged model as it was before, the same bits, as a new directory.

    Args:
        subject: opened from `directory`; its weights become those from before.
        directory: what `merge_to` wrote.
        place: must not exist, or be empty.

    Raises:
        EditError: see `check_merged`; and weights that are not those from before all the same (another precision).
    """
    check_merged(directory, place)
    directory, place = Path(directory), Path(place)
    first = load_treatment(directory / FILE.format(0))
    with safe_open(directory / BEFORE, "pt") as file:
        untied = (file.metadata() or {}).get("untied") == "True"
        before = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    parameters = dict(subject.model.named_parameters(remove_duplicate=False))
    for name, value in before.items():
        if name not in parameters or parameters[name].shape != value.shape or parameters[name].dtype != value.dtype:
            raise EditError(
                f"The model has no parameter {name!r} of that shape and type.", remedy="Open it in its own precision."
            )
        parameters[name].copy_(value)
    model: Any = subject.model
    if untied:  # the unembedding shared the embedding's weights
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
        model.config.tie_word_embeddings = True
    if first.origin.touched_hash and touched_hash(subject, first.changes) != first.origin.touched_hash:
        raise EditError(
            f"The weights that came back are not those that {first.origin.method!r} was made for.",
            remedy="Its files may have been changed; take the original model.",
        )
    with _directory(place) as beside:
        _save(subject, beside)
    return place


def _check_free(place: Path) -> None:
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise EditError(f"{place} is there already.", remedy="Give a new directory.")


@contextlib.contextmanager
def _directory(place: Path) -> Generator[Path]:
    """A folder beside the place, which takes it at the end; nothing is left of it after an error."""
    with writing(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(dir=place.parent, prefix=f".{place.name}."))
    try:
        with writing(place):
            yield beside
            beside.chmod(0o755)
            if place.is_dir():
                place.rmdir()
            beside.rename(place)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _save(subject: Subject, folder: Path) -> None:
    model: Any = subject.model
    model.save_pretrained(folder)
    if subject.tokenizer is not None:
        subject.tokenizer.save_pretrained(folder)


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
