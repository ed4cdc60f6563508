"""`tomoscope`: the command line. One file per command; the heavy libraries are imported inside the calls."""

from __future__ import annotations

from typing import Annotated

import typer

from tomoscope.cli.calibrate import calibrate
from tomoscope.cli.circuit import circuit
from tomoscope.cli.concepts import erase, lies, probe, steer, truth
from tomoscope.cli.doctor import doctor
from tomoscope.cli.edit import edit, trace
from tomoscope.cli.features import features
from tomoscope.cli.graph import graph
from tomoscope.cli.plan import plan
from tomoscope.cli.scan import scan
from tomoscope.cli.show import show
from tomoscope.cli.sites import sites
from tomoscope.cli.treat import export, treat, undo
from tomoscope.cli.watch import watch

app = typer.Typer(
    name="tomoscope",
    help="An MRI scanner for neural networks: opens a model, looks inside, and says what it found, with evidence.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (
    scan, show, circuit, graph, probe, truth, lies, steer, erase, trace, edit, treat, undo, export, watch,
    calibrate, doctor, sites,
):  # fmt: skip
    app.command()(command)
for group in (features, plan):
    app.add_typer(group)


def _version(asked: bool) -> None:
    if asked:
        from tomoscope import __version__

        typer.echo(f"tomoscope {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """The entry point of the `tomoscope` command."""
    app()


if __name__ == "__main__":
    main()
