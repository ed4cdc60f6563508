"""Protocols: which exams, with which options, in what order, within which budget. TOML, checked before anything runs.

    name = "mine"
    description = "Heads and layers for indirect objects."
    seed = 0
    budget_seconds = 120            # exams that would start later are "not measured"
    preset = "quick"                # optional: the exams' own smaller (or larger) options
    correction = "holm"             # or "benjamini-hochberg", "none"

    [[exam]]
    name = "circuits.*"             # a name, or a pattern

    [[exam]]
    name = "observe.logit_lens"     # named again: these options are added
    options = { prompts = 64 }

Options come in this order, later ones win: the exam's defaults, its preset, the protocol's, the command line's.
"""

from __future__ import annotations

import fnmatch
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tomoscope.errors import ProtocolError, nearest
from tomoscope.exams import EXAMS, Exam, Options
from tomoscope.exams.registry import Registry


class Entry(BaseModel):
    """One `[[exam]]` of a protocol."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    """An exam's name, or a pattern with `*`."""
    options: dict[str, Any] = Field(default_factory=dict)


class Protocol(BaseModel):
    """A scan's plan, as written."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    name: str = Field(min_length=1)
    description: str = ""
    seed: int = Field(default=0, ge=0)
    budget_seconds: float | None = Field(default=None, gt=0)
    preset: str = ""
    correction: Literal["holm", "benjamini-hochberg", "none"] = "holm"
    exams: tuple[Entry, ...] = Field(alias="exam", min_length=1)
    source: str = Field(default="", exclude=True)
    """The file it came from, for messages."""


@dataclass(frozen=True)
class Step:
    """One exam of the plan with its options resolved."""

    exam: Exam
    options: Options

    def passed(self) -> dict[str, Any]:
        """The options that differ from the exam's defaults, as plain values."""
        values, defaults = self.options.model_dump(mode="json"), self.exam.options().model_dump(mode="json")
        return {key: value for key, value in values.items() if value != defaults[key]}


def built_in_protocols() -> dict[str, str]:
    """The names of the protocols that ship with the package, and their TOML texts."""
    folder = resources.files("tomoscope.scan") / "protocols"
    files = [entry for entry in folder.iterdir() if entry.name.endswith(".toml")]
    texts = {entry.name.removesuffix(".toml"): entry.read_text(encoding="utf-8") for entry in files}
    order = ("quick", "standard", "deep")
    return dict(sorted(texts.items(), key=lambda pair: (order.index(pair[0]) if pair[0] in order else 99, pair[0])))


def load_protocol(source: str | Path) -> Protocol:
    """A built-in protocol by name, or a TOML file by path.

    Raises ProtocolError, with the file, for a name that is neither, a file that is not TOML, and unknown keys.
    """
    known = built_in_protocols()
    name = str(source)
    if name in known:
        return parse_protocol(known[name], where=f"the built-in protocol {name}")
    path = Path(source)
    if not path.is_file():
        raise ProtocolError(
            f"There is no protocol {name!r}: neither a built-in one nor a file.",
            remedy=f"{nearest(name, known)} Built in are {', '.join(known)}; or give the path of a .toml file.".strip(),
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ProtocolError(f"The protocol {path} cannot be read: {error}.", remedy="Give a TOML file.") from error
    return parse_protocol(text, where=str(path))


def parse_protocol(text: str, *, where: str) -> Protocol:
    """A protocol from TOML text; `where` names it in messages."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ProtocolError(f"{where} is not TOML: {error}.", remedy="See the built-in protocols.") from error
    known = [field.alias or name for name, field in Protocol.model_fields.items() if name != "source"]
    for key in data:
        if key not in known:
            hint = nearest(key, known) or f"There are: {', '.join(known)}."
            raise ProtocolError(f"{where} has the unknown key {key!r}.", remedy=hint)
    try:
        return Protocol.model_validate(data | {"source": where})
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ProtocolError(f"{where}: {place}: {first['msg']}.", remedy="See the built-in protocols.") from error


def plan(
    protocol: Protocol,
    *,
    only: Sequence[str] = (),
    options: Mapping[str, Mapping[str, Any]] | None = None,
    exams: Registry = EXAMS,
) -> list[Step]:
    """The exams of a protocol in order, each with its options resolved and checked.

    `only` keeps the named exams (one that the protocol does not list is added with its defaults); `options` are further
    ones by exam. Raises ProtocolError for unknown exams and options, and where nothing is left to do.
    """
    where = protocol.source or f"the protocol {protocol.name}"
    chosen: dict[str, dict[str, Any]] = {}
    for entry in protocol.exams:
        for name in _matches(entry.name, exams, where):
            preset = dict(exams[name].presets.get(protocol.preset, {})) if protocol.preset else {}
            exams[name].configure(entry.options, where=where)
            chosen[name] = chosen.get(name, preset) | entry.options
    if only:
        named = list(dict.fromkeys(exams.find(name, where="--exam").name for name in only))
        chosen = {name: chosen.get(name, {}) for name in named}
    for name, extra in (options or {}).items():
        if exams.find(name, where="--option").name not in chosen:
            raise ProtocolError(
                f"--option {name}.{next(iter(extra))}: the exam {name!r} is not part of this scan.",
                remedy=f"Add --exam {name}, or choose a protocol that lists it.",
            )
        exams[name].configure(extra, where="--option")
        chosen[name] = chosen[name] | dict(extra)
    if not chosen:
        raise ProtocolError(f"{where} matches no exam.", remedy=f"There are: {', '.join(exams) or 'none'}.")
    return [Step(exams[name], exams[name].configure(values, where=where)) for name, values in chosen.items()]


def _matches(name: str, exams: Registry, where: str) -> list[str]:
    if any(mark in name for mark in "*?["):
        return [known for known in exams if fnmatch.fnmatchcase(known, name)]
    return [exams.find(name, where=where).name]
