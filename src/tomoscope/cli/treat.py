"""`tomoscope treat`, `export` and `undo`: parts taken out as a treatment, made part of a model, and taken back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from tomoscope.cli import common
from tomoscope.cli.common import MODEL_HELP, DeviceOption, DtypeOption, TracebackOption, told

ModelArgument = Annotated[str | None, typer.Argument(help=MODEL_HELP, show_default=False)]
AnywayOption = Annotated[bool, typer.Option("--anyway", help="Other weights than it was made for are fine.")]


def _written(path: Path, what: str) -> None:
    common.err().print(Text.assemble("written: ", (str(path), "bold"), f" ({common.plain(what)})"), soft_wrap=True)


@told
def treat(
    output: Annotated[Path, typer.Option("--out", "-o", help="The treatment's file.")],
    model: ModelArgument = None,
    head: Annotated[list[str] | None, typer.Option("--remove-head", help="LAYER.HEAD, from 0.")] = None,
    neuron: Annotated[list[str] | None, typer.Option("--remove-neuron", help="LAYER.NEURON, from 0.")] = None,
    direction: Annotated[
        list[Path] | None, typer.Option("--remove-direction", help="A direction's file (of probe, truth, steer).")
    ] = None,
    mean: Annotated[
        Path | None,
        typer.Option("--mean", help="Texts, one a line: heads and neurons become their mean there, not zero."),
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    traceback: TracebackOption = False,
) -> None:
    """Take heads, neurons or directions out of a model, as a treatment: a small file, and nothing else changes."""
    from tomoscope.exams.treating import parts_of, removal

    parts = parts_of(head or [], neuron or [], direction or [])
    subject = common.opened(model, device, dtype)
    with common.quiet_stdout():
        made = removal(subject, parts, mean)
        made.save(output)
    _written(output, str(made))


@told
def export(
    treatment: Annotated[list[Path], typer.Option("--treatment", "-t", help="Files of treat and edit, in order.")],
    output: Annotated[Path, typer.Option("--out", "-o", help="A new directory.")],
    model: ModelArgument = None,
    anyway: AnywayOption = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    traceback: TracebackOption = False,
) -> None:
    """Make treatments part of a model: a plain transformers directory that loads and runs without tomoscope."""
    from tomoscope.exams.treating import load_treatment, merge_to

    several = [load_treatment(path) for path in treatment]
    subject = common.opened(model, device, dtype)
    with common.quiet_stdout():
        merge_to(several, subject, output, anyway=anyway)
    _written(output, ", then ".join(str(one) for one in several))


@told
def undo(
    treated: Annotated[Path, typer.Argument(help="A directory that export wrote.")],
    output: Annotated[Path, typer.Option("--out", "-o", help="A new directory, with the weights as they were.")],
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    traceback: TracebackOption = False,
) -> None:
    """Take the treatments out of an exported model again: the weights become the same bits as before."""
    from tomoscope.exams.treating import check_merged, unmerge_to

    check_merged(treated, output)
    subject = common.opened(str(treated), device, dtype)
    with common.quiet_stdout():
        unmerge_to(subject, treated, output)
    _written(output, "untreated")
