"""What the command line's concepts read and write: tables, directions, lines, exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tomoscope.concepts import Direction, load_direction
from tomoscope.data import LabelledTexts, load_labelled
from tomoscope.data.labelled import read_rows
from tomoscope.errors import DataError
from tomoscope.treat import save_steering, write_control_vector


def load_table(path: Path, **columns: Any) -> LabelledTexts:
    """See `data.load_labelled`."""
    return load_labelled(path, **columns)


def read_direction(path: Path) -> Direction:
    """See `concepts.load_direction`."""
    return load_direction(path)


def truth_data(path: Path, polarity: str = "") -> tuple[LabelledTexts, list[int] | None]:
    """Labelled statements, with topics where the table has a column "topic", and polarities where a column is named.

    Raises DataError for a polarity that is neither 1 nor -1, and see `data.load_labelled`.
    """
    rows = read_rows(path)
    topics = "topic" if rows and "topic" in rows[0] else ""
    data = load_labelled(path, group=topics)
    if not polarity:
        return data, None
    if polarity not in rows[0]:
        raise DataError(f"{path} has no column {polarity!r}.", remedy=f"There are {', '.join(map(str, rows[0]))}.")
    found = []
    for i, row in enumerate(rows, start=1):
        sign = str(row.get(polarity)).strip().removesuffix(".0").removeprefix("+")
        if sign not in ("1", "-1"):
            raise DataError(
                f"{path}, row {i}: {row.get(polarity)!r} is no polarity.", remedy="Write 1 (affirmative) or -1."
            )
        found.append(int(sign))
    return data, found


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not blank. Raises DataError where there are none."""
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}).", remedy="Convert the file to UTF-8.") from error
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror}.", remedy="Check the path.") from error
    if not lines:
        raise DataError(f"{path} has no lines.", remedy="Write one prompt a line.")
    return lines


def two_answers(answers: str, doses: str) -> tuple[tuple[str, str], list[float]]:
    """Two answers, each with its space, and doses, from what a user typed. Raises DataError for anything else."""
    words = [f" {word.strip()}" for word in answers.split(",") if word.strip()]
    if len(words) != 2:
        raise DataError(f"{answers!r} are not two answers.", remedy='Write "yes,no".')
    try:
        steps = [float(part) for part in doses.split(",")]
    except ValueError as error:
        raise DataError(f"{doses!r} are no doses.", remedy='Write "0.5,1,2".') from error
    return (words[0], words[1]), steps


def export_steering(subject: Any, path: Path, direction: Direction, dose: float) -> Path:
    """Write a direction at a dose as a control vector (.gguf) or for plain transformers (.safetensors).

    Raises DataError where the rule took no dose, or for another suffix.
    """
    if not dose:
        raise DataError("No dose kept the rule, so there is nothing to export.", remedy="Allow more loss, or see why.")
    if path.suffix == ".gguf":
        return write_control_vector(path, [direction], strength=dose, model_hint=subject.facts.family)
    if path.suffix == ".safetensors":
        return save_steering(subject, path, [direction], strength=dose)
    raise DataError(f"{path} is of no kind that is written.", remedy="Name it .gguf or .safetensors.")
