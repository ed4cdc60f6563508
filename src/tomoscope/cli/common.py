"""What the commands share: where words go, how errors are told, how a model is opened.

Words for people go to stderr; stdout holds the answer, and with `--json` exactly one JSON document.
"""

from __future__ import annotations

import contextlib
import functools
import json
import sys
from collections.abc import Callable, Generator
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from tomoscope.errors import TomoscopeError

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, and nothing else there.")]
TracebackOption = Annotated[bool, typer.Option("--traceback", help="Show the full traceback of an error.")]
DeviceOption = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, cuda:1, mps; the model's own place by default.")
]
DtypeOption = Annotated[
    str | None, typer.Option("--dtype", help="float32, bfloat16, float16; as the checkpoint says by default.")
]
MODEL_HELP = "A directory, a hub id, or nothing for the model that ships with tomoscope."


def err() -> Console:
    """The console for words to people (stderr)."""
    return Console(stderr=True, highlight=False)


def out() -> Console:
    """The console for answers (stdout)."""
    return Console(highlight=False)


def plain(text: object) -> str:
    """Text that a terminal can show and that cannot steer it: escape and control characters become visible."""
    from tomoscope.scan.markup import visible

    return visible(text)


def print_json(document: Any) -> None:
    """Write one JSON document on stdout, in ASCII; NaN is refused, as it is not JSON."""
    sys.stdout.write(json.dumps(document, indent=2, allow_nan=False, default=str) + "\n")


def told(command: Callable[..., Any]) -> Callable[..., Any]:
    """A command whose errors of ours are told in words (exit code 2), and whose interruption ends with code 130."""

    @functools.wraps(command)
    def wrapped(*arguments: Any, **options: Any) -> Any:
        try:
            return command(*arguments, **options)
        except TomoscopeError as error:
            if options.get("traceback"):
                raise
            message = Text.assemble(("Error: ", "bold red"), plain(error.what))
            if error.remedy:
                message.append(f"\n{plain(error.remedy)}", style="dim")
            err().print(message, soft_wrap=True)
            if options.get("as_json"):
                print_json({"error": {"kind": type(error).__name__, "what": error.what, "remedy": error.remedy}})
            raise typer.Exit(2) from error
        except KeyboardInterrupt as interrupt:
            err().print("Interrupted.", style="yellow")
            raise typer.Exit(130) from interrupt

    return wrapped


def open_subject(source: str | None, *, device: str | None = None, dtype: str | None = None) -> Any:
    """Open the model that a command names, or the embedded one."""
    from tomoscope import model

    where = model.EMBEDDED if source is None else source
    with quiet_stdout():
        return model.open_model(where, device=device, dtype=dtype)


@contextlib.contextmanager
def quiet_stdout() -> Generator[None]:
    """While others' code runs, what it prints goes to stderr, so that stdout holds our answer alone."""
    with contextlib.redirect_stdout(sys.stderr):
        yield
