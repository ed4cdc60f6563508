"""`tomoscope scan`: examine a model by a protocol, and write a run with its report."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from tomoscope.cli import common
from tomoscope.cli.common import MODEL_HELP, DeviceOption, DtypeOption, JsonOption, TracebackOption, told

if TYPE_CHECKING:
    from tomoscope.findings import Ledger


@told
def scan(
    context: typer.Context,
    model: Annotated[str | None, typer.Argument(help=MODEL_HELP, show_default=False)] = None,
    protocol: Annotated[
        str, typer.Option("--protocol", "-p", help="quick, standard, deep, or the path of a .toml file.")
    ] = "standard",
    output: Annotated[
        Path | None, typer.Option("--out", "-o", help="The run's folder; the same folder resumes.", show_default=False)
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Instead of the protocol's seed.", show_default=False)] = None,
    budget: Annotated[
        float | None, typer.Option(min=0.001, help="Seconds; exams that would start later are not measured.")
    ] = None,
    exam: Annotated[list[str] | None, typer.Option("--exam", help="Only this exam (repeatable).")] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", help="exam.key=value, or key=value with one --exam (repeatable).")
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a former run in the folder.")] = False,
    as_json: JsonOption = False,
    traceback: TracebackOption = False,
) -> None:
    """Examine a model, and say what was found: a run's folder with its record and report.html.

    Ctrl-C keeps what is done; the same command goes on from there.
    """
    from tomoscope.findings import Ledger
    from tomoscope.scan import load_protocol, plan, run_scan, write_report
    from tomoscope.scan.progress import Progress

    chosen = load_protocol(protocol)
    steps = plan(chosen, only=exam or (), options=parse_options(option or (), exam or ()))
    if output is not None:
        Ledger.check(output)
    console = common.err()
    console.print(Text.assemble(("tomoscope ", "bold"), f"opens {model or 'the embedded model'} ..."))
    subject = common.open_subject(model, device=device, dtype=dtype)
    used_seed = chosen.seed if seed is None else seed
    folder = output or default_folder(subject.name, chosen.name, exam or (), used_seed)
    passed, defaulted = _arguments(context)
    try:
        with common.terminable(), common.quiet_stdout(), Progress(console) as progress:
            ledger = run_scan(
                subject, chosen, steps, out=folder, seed=used_seed, budget_seconds=budget,
                base_command=_base(model, device, dtype), command=shlex.join(["tomoscope", *sys.argv[1:]]),
                passed=passed, defaulted=defaulted, force=force, observer=progress,
            )  # fmt: skip
    except KeyboardInterrupt as stop:
        report = write_report(Ledger.open(folder))
        said = f"{common.word(stop)}. What is done is kept, and shown in {report}."
        console.print(Text(said, style="yellow"), soft_wrap=True)
        console.print(Text(f"To go on: {common.again(folder)}"), soft_wrap=True)
        raise typer.Exit(common.exit_code(stop)) from None
    report = write_report(ledger)
    if as_json:
        common.print_json(run_document(ledger) | {"report": str(report)})
    else:
        _summary(ledger, report)


def parse_options(texts: list[str] | tuple[()], exams: list[str] | tuple[()]) -> dict[str, dict[str, Any]]:
    """`exam.key=value` texts as options by exam; values are JSON where they parse as it, else text.

    Raises ProtocolError for a text without "=", and for a bare key where there is not exactly one --exam.
    """
    import json

    from tomoscope.errors import ProtocolError

    options: dict[str, dict[str, Any]] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        exam, dot, key = name.rpartition(".")
        if not equals or not key:
            raise ProtocolError(f"--option {text!r} is not of the form exam.key=value.", remedy="Write it so.")
        if not dot:
            if len(exams) != 1:
                raise ProtocolError(f"--option {text!r} does not name its exam.", remedy="Write exam.key=value.")
            exam = exams[0]
        try:
            parsed = json.loads(value)
        except ValueError:
            parsed = value
        options.setdefault(exam, {})[key] = parsed
    return options


def default_folder(model: str, protocol: str, exams: list[str] | tuple[()], seed: int) -> Path:
    """runs/<model>/<protocol or exams>-<seed>, with odd characters replaced."""
    what = "+".join(exams) if exams else protocol
    parts = [model.rstrip("/").rsplit("/", 1)[-1] or "model", f"{what}-{seed}"]
    clean = ["".join(char if char.isalnum() or char in "._+-" else "-" for char in part)[:80] for part in parts]
    return Path("runs", *[part.lstrip(".") or "model" for part in clean])


def run_document(ledger: Ledger) -> dict[str, Any]:
    """A run as one JSON document: manifest, exams, findings."""
    return {
        "run": str(ledger.folder),
        "manifest": ledger.manifest.model_dump(mode="json"),
        "exams": [record.model_dump(mode="json") for record in ledger.exams().values()],
        "findings": [finding.model_dump(mode="json") for finding in ledger.findings()],
    }


def _base(model: str | None, device: str | None, dtype: str | None) -> str:
    parts = ["tomoscope", "scan"]
    parts += [model] if model else []
    parts += ["--device", device] if device else []
    parts += ["--dtype", dtype] if dtype else []
    return shlex.join(parts)


def _arguments(context: typer.Context) -> tuple[dict[str, Any], dict[str, Any]]:
    """The command's arguments: those that the user gave, and those left at their defaults."""
    passed: dict[str, Any] = {}
    defaulted: dict[str, Any] = {}
    for name, value in context.params.items():
        if name in ("as_json", "traceback"):
            continue
        source = context.get_parameter_source(name)
        plain = str(value) if isinstance(value, Path) else list(value) if isinstance(value, (list, tuple)) else value
        (defaulted if source is None or source.name.startswith("DEFAULT") else passed)[name] = plain
    return passed, defaulted


def _summary(ledger: Ledger, report: Path) -> None:
    from tomoscope.cli.show import print_findings

    console = common.out()
    console.print()
    print_findings(console, ledger.findings())
    console.print(Text.assemble("\nThe record: ", (str(ledger.folder), "bold")), soft_wrap=True)
    console.print(Text.assemble("The report: ", (str(report), "bold")), soft_wrap=True)
