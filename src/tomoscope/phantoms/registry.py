"""The phantoms there are, by name. Modules are named as strings and imported when a phantom is first asked for."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping

from tomoscope.errors import DataError, nearest
from tomoscope.phantoms.phantom import Phantom

MODULES: tuple[str, ...] = (
    "tomoscope.phantoms.planted",
    "tomoscope.phantoms.compiled",
    "tomoscope.phantoms.deep",
    "tomoscope.phantoms.depth",
    "tomoscope.phantoms.routed",
    "tomoscope.phantoms.trained",
)


class Registry(Mapping[str, Phantom]):
    """A mapping from names to phantoms that imports the modules at its first use."""

    def __init__(self, modules: tuple[str, ...] = MODULES) -> None:
        self._modules = modules
        self._phantoms: dict[str, Phantom] | None = None

    def register(self, phantom: Phantom) -> Phantom:
        """Add a phantom; the same one twice is fine. Raises DataError where another has its name."""
        known = self._load()
        if known.setdefault(phantom.name, phantom) is not phantom:
            raise DataError(f"There are two phantoms named {phantom.name!r}.", remedy="Rename one of them.")
        return phantom

    def find(self, name: str) -> Phantom:
        """The phantom of this name. Raises DataError with the nearest names."""
        if name in self:
            return self[name]
        hint = nearest(name, self) or f"There are: {', '.join(self) or 'none'}."
        raise DataError(f"There is no phantom {name!r}.", remedy=hint)

    def _load(self) -> dict[str, Phantom]:
        if self._phantoms is None:
            self._phantoms = {}
            for module in self._modules:
                for phantom in importlib.import_module(module).PHANTOMS:
                    self.register(phantom)
        return self._phantoms

    def __getitem__(self, name: str) -> Phantom:
        return self._load()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._load())

    def __len__(self) -> int:
        return len(self._load())


PHANTOMS = Registry()
"""The phantoms of this installation."""
