"""What the commands share: where words go, how errors are told, how a model is opened.

Words for people go to stderr; stdout holds the answer, and with `--json` exactly one JSON document.
"""

from __future__ import annotations

import contextlib
import functools
import json
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Generator
from pathlib import Path
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
        except KeyboardInterrupt as stop:
            err().print(f"{word(stop)}.", style="yellow")
            raise typer.Exit(exit_code(stop)) from stop

    return wrapped


class Terminated(KeyboardInterrupt):
    """The system asked the process to end (SIGTERM): it ends as by Ctrl-C, keeping what is done, with code 143."""


@contextlib.contextmanager
def terminable() -> Generator[None]:
    """While a long work runs, SIGTERM interrupts it as Ctrl-C does."""

    def stop(number: int, frame: Any) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


def word(stop: KeyboardInterrupt) -> str:
    """How the work ended, in a word."""
    return "Terminated" if isinstance(stop, Terminated) else "Interrupted"


def exit_code(stop: KeyboardInterrupt) -> int:
    """128 and the signal's number, as a shell counts."""
    return 143 if isinstance(stop, Terminated) else 130


def again(folder: Path) -> str:
    """The command that was given, for the same folder, without --force."""
    arguments = [text for text in sys.argv[1:] if text != "--force"] or ["scan"]
    named = any(text in ("--out", "-o") or text.startswith("--out=") for text in arguments)
    return shlex.join(["tomoscope", *arguments, *([] if named else ["--out", str(folder)])])


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


def opened(model: str | None, device: str | None, dtype: str | None) -> Any:
    """The subject, after a line that says what is opened."""
    err().print(Text.assemble(("tomoscope ", "bold"), f"opens {plain(model or 'the embedded model')} ..."))
    return open_subject(model, device=device, dtype=dtype)
