"""A scan's progress in the terminal: the exam in hand and the whole, each with its time left."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.text import Text

from tomoscope.findings.finding import Finding
from tomoscope.findings.ledger import Ledger
from tomoscope.findings.manifest import ExamRecord
from tomoscope.scan.markup import visible
from tomoscope.scan.protocol import Step
from tomoscope.scan.runner import Observer

SIGNS = {
    "confirmed": ("●", "green"), "refuted": ("✕", "red"), "inconclusive": ("◐", "yellow"), "not measured": ("○", "dim"),
}  # fmt: skip


class Progress(Observer):
    """An observer that draws two bars on a terminal, and one line per finished exam anywhere."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bars = Bars(
            TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeRemainingColumn(),
            console=console, transient=True, disable=not console.is_terminal,
        )  # fmt: skip
        self._whole: TaskID | None = None
        self._exam: TaskID | None = None
        self._done = 0.0

    def __enter__(self) -> Progress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def scan_started(self, steps: Sequence[Step], done: Sequence[str]) -> None:
        """Draw the whole bar; its parts are the exams' expected costs."""
        left = [step for step in steps if step.exam.name not in done]
        if done:
            self.console.print(Text(f"Resuming: {len(done)} of {len(steps)} exams are done.", style="dim"))
        self._whole = self._bars.add_task("the whole scan", total=sum(step.exam.cost for step in left) or 1.0)

    def exam_started(self, step: Step) -> None:
        """Draw the exam's bar."""
        self._exam = self._bars.add_task(step.exam.title, total=None)

    def exam_progress(self, step: Step, done: float, total: float | None, what: str) -> None:
        """Move both bars."""
        if self._exam is None or self._whole is None:
            return
        name = f"{step.exam.title}: {what}" if what else step.exam.title
        self._bars.update(self._exam, completed=done, total=total, description=visible(name))
        if total:
            self._bars.update(self._whole, completed=self._done + step.exam.cost * min(1.0, done / total))

    def exam_finished(self, step: Step, record: ExamRecord, findings: Sequence[Finding]) -> None:
        """Print the exam's line, with a sign for each verdict."""
        if self._exam is not None:
            self._bars.remove_task(self._exam)
        self._exam = None
        self._done += step.exam.cost
        if self._whole is not None:
            self._bars.update(self._whole, completed=self._done)
        line = Text.assemble(f"{record.seconds:7.1f} s  ", (f"{visible(step.exam.title):<44} ", "bold"))
        for finding in findings:
            line.append(*SIGNS[finding.verdict])
        if record.status != "done":
            line.append(f"  {visible(findings[-1].reason if findings else record.status)}", style="dim")
        self.console.print(line)

    def scan_finished(self, ledger: Ledger) -> None:
        """Say how the p-values were corrected."""
        self.console.print(Text(f"Corrected: {ledger.manifest.correction}.", style="dim"))
