"""A calibration's progress in the terminal; imported when the work begins, as it needs the exams."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.text import Text

from tomoscope.cli import common
from tomoscope.exams.calibration import Watcher
from tomoscope.exams.calibration.runner import Line
from tomoscope.exams.calibration.sources import Case


class Progress(Watcher):
    """A watcher that draws one bar on a terminal, and says elsewhere when a specimen is done."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bars = Bars(
            TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            console=console, transient=True, disable=not console.is_terminal,
        )  # fmt: skip
        self._task = self._bars.add_task("calibration", total=None)
        self._case = ""

    def __enter__(self) -> Progress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def started(self, total: int, done: int) -> None:
        """Draw the bar; say what is done already."""
        if done:
            self.console.print(Text(f"Resuming: {done} of {total} are done.", style="dim"))
        self._bars.update(self._task, total=total, completed=done)

    def working(self, case: Case, what: str) -> None:
        """Name the specimen and the exam in hand."""
        self._bars.update(self._task, description=common.plain(f"{case.key}  {what}"))
        if case.key != self._case and not self.console.is_terminal:
            self.console.print(Text(common.plain(case.key), style="dim"))
        self._case = case.key

    def line(self, line: Line, count: int) -> None:
        """Move the bar; say what failed."""
        self._bars.advance(self._task, count)
        if line.status == "failed":
            said = f"{line.case} {line.exam or 'could not be made'}: {line.error}"
            self.console.print(Text(common.plain(said), style="red"), soft_wrap=True)
