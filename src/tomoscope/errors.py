"""Every error that tomoscope raises for a user's mistake or a model's limit, drawn once.

    TomoscopeError
    ├── ModelError                 the model cannot be opened or is broken
    │   ├── ModelNotFoundError     no such directory, file or hub id
    │   ├── UnsafeFormatError      only pickled weights, or the model wants to run its own code
    │   ├── CorruptModelError      truncated or wrong-shaped weights, a config that lies, NaN weights
    │   └── TokenizerError         the model has no tokenizer and text was given
    ├── SiteError                  the site's name is unknown, or this model cannot give it
    │   ├── UnknownSiteError       no such name (the nearest names are suggested)
    │   └── UnavailableSiteError   a true name, which this family can't give (and why)
    ├── PromptError                an empty prompt, one longer than the context, a span that is not there
    │   └── AlignmentError         a clean and a corrupted prompt do not align token by token
    ├── DataError                  a corpus, task or label set that cannot be read or is too small
    ├── EditError                  an edit whose value does not fit its site
    ├── LedgerError                a run's folder that cannot be written, read or resumed
    ├── ProtocolError              a scan protocol (TOML) with an unknown exam or option
    └── ResourceError              not enough memory or disk, or a device that is not there

Each message says what was wrong, when it happens, and the remedy; the command line prints it and exits with code 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TomoscopeError(Exception):
    """The root of the tree. `remedy` is what the user can do; it is part of the printed message."""

    def __init__(self, what: str, *, remedy: str = "") -> None:
        self.what = what
        self.remedy = remedy
        super().__init__(f"{what} {remedy}".strip())


class ModelError(TomoscopeError):
    """The model cannot be opened or is broken."""


class ModelNotFoundError(ModelError):
    """No such directory, file or hub id."""


class UnsafeFormatError(ModelError):
    """Only pickled weights, or the model wants to run code of its own."""


class CorruptModelError(ModelError):
    """Truncated or wrong-shaped weights, a config that lies, weights that are not finite."""


class TokenizerError(ModelError):
    """Text was given to a model that has no tokenizer."""


class SiteError(TomoscopeError):
    """The site's name is unknown, or this model cannot give it."""


class UnknownSiteError(SiteError):
    """No such site name; the message suggests the nearest ones."""


class UnavailableSiteError(SiteError):
    """A true name of the grammar which this family cannot give; the message says why."""


class PromptError(TomoscopeError):
    """An empty prompt, one longer than the context, or a span that is not there."""


class AlignmentError(PromptError):
    """A clean and a corrupted prompt do not align token by token."""


class DataError(TomoscopeError):
    """A corpus, task or label set that cannot be read or is too small."""


class EditError(TomoscopeError):
    """An edit whose value does not fit its site."""


class LedgerError(TomoscopeError):
    """A run's folder that cannot be written, read or resumed."""


class ProtocolError(TomoscopeError):
    """A scan protocol with an unknown exam or option."""


class ResourceError(TomoscopeError):
    """Not enough memory or disk, or a device that is not there."""


def nearest(name: str, known: Iterable[str], *, count: int = 3) -> str:
    """Say which known names are nearest to a mistaken one, as the end of an error message ('' if none is near)."""
    matches = difflib.get_close_matches(name, list(known), n=count, cutoff=0.5)
    return f"Did you mean {' or '.join(repr(match) for match in matches)}?" if matches else ""
