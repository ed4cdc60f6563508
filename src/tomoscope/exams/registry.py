"""The exams there are, by name. Modules are named as strings and imported when an exam is first asked for.

So `tomoscope --help` imports no torch. Each module gives a tuple `EXAMS`; a user's own exam joins by `register`.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator, Mapping

from tomoscope.errors import ProtocolError, nearest
from tomoscope.exams.exam import Exam

MODULES = (
    "tomoscope.exams.observe", "tomoscope.exams.circuits", "tomoscope.exams.features", "tomoscope.exams.concepts",
    "tomoscope.exams.facts", "tomoscope.exams.treatments",
)  # fmt: skip


class Registry(Mapping[str, Exam]):
    """A mapping from names to exams that imports the modules at its first use."""

    def __init__(self, modules: tuple[str, ...] = MODULES) -> None:
        self._modules = modules
        self._loaded = False
        self._exams: dict[str, Exam] = {}

    def register(self, exam: Exam) -> Exam:
        """Add an exam; the same one twice is fine. Raises ProtocolError where another has its name."""
        if self._exams.get(exam.name, exam) is not exam:
            raise ProtocolError(f"There are two exams named {exam.name!r}.", remedy="Rename one of them.")
        self._exams[exam.name] = exam
        return exam

    def unregister(self, name: str) -> None:
        """Take an exam out again; unknown names are fine."""
        self._exams.pop(name, None)

    def find(self, name: str, *, where: str = "") -> Exam:
        """The exam of this name. Raises ProtocolError with the nearest names, and where the name stands."""
        if name in self:
            return self[name]
        place = f" ({where})" if where else ""
        hint = nearest(name, self) or f"There are: {', '.join(self) or 'none'}."
        raise ProtocolError(f"There is no exam {name!r}{place}.", remedy=hint)

    def _load(self) -> dict[str, Exam]:
        if not self._loaded:
            self._loaded = True
            for module in self._modules:
                if importlib.util.find_spec(module) is not None:
                    for exam in importlib.import_module(module).EXAMS:
                        self.register(exam)
        return self._exams

    def __getitem__(self, name: str) -> Exam:
        return self._load()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._load())

    def __len__(self) -> int:
        return len(self._load())


EXAMS = Registry()
"""The exams of this installation."""


def register(exam: Exam) -> Exam:
    """Add an exam of one's own to `EXAMS`, so that protocols can name it."""
    return EXAMS.register(exam)
