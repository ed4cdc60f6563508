"""What is to be changed: a fact as a request, with the probes that measure the edit; CounterFact and zsRE files.

A request's prompt holds "{}" where its subject stands, as in the field's files. How it can mislead: CounterFact's
neighbours share the true answer and so only see bleeding into that answer; zsRE's edit target is what the model is to
say, true or not (its first listed answer here, as in the ROME paper's reader).

A request that makes no sense is refused with the reason before anything is computed (`check_requests`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tomoscope.data import Prompt
from tomoscope.data.pairs import continuation
from tomoscope.errors import DataError, EditError
from tomoscope.model import Subject
from tomoscope.model.batch import Encoded, encode

ESSENCE = "{} is a"


@dataclass(frozen=True)
class Probe:
    """A text and the word that should follow it after the edit, against one that should not."""

    prompt: str
    right: str
    wrong: str = ""


@dataclass(frozen=True)
class EditRequest:
    """A fact to write.

    Attributes:
        prompt: with "{}" where the subject stands: "{} plays the sport of".
        subject: "LeBron James".
        target_new: what the model shall say.
        target_true: what it said before; "" where not known.
        case: number or name of the case: intervals are clustered by it.
        relation: name of the relation, "" where not known.
        paraphrases: whole texts that ask the same.
        neighbours: what must not change: `right` is the answer before and after.
        generation: whole texts to be continued, for fluency and consistency.
        reasoning: what follows from the new fact: `right` follows after the edit, `wrong` is what followed before.
        reversed: questions whose answer would be the subject.
    """

    prompt: str
    subject: str
    target_new: str
    target_true: str = ""
    case: str = ""
    relation: str = ""
    paraphrases: tuple[str, ...] = ()
    neighbours: tuple[Probe, ...] = ()
    generation: tuple[str, ...] = ()
    reasoning: tuple[Probe, ...] = ()
    reversed: tuple[Probe, ...] = ()

    def __post_init__(self) -> None:
        if self.prompt.count("{}") != 1:
            raise EditError(
                f"The prompt {self.prompt!r} does not hold the subject {self.subject!r} once.",
                remedy='Write "{}" where the subject stands, or give a prompt that names the subject.',
            )
        if not self.subject.strip() or not self.target_new.strip():
            raise EditError("An edit needs a subject and a target.", remedy="Give both.")
        if self.target_true and self.target_new.strip() == self.target_true.strip():
            raise EditError(
                f"{self.text!r} already has the answer {self.target_new.strip()!r}.", remedy="Give another target."
            )

    @classmethod
    def of_text(cls, prompt: str, subject: str, target: str, **rest: Any) -> EditRequest:
        """From a whole prompt that names its subject, or has "{}" in its place.

        Raises:
            EditError: the prompt does not name the subject exactly once.
        """
        if "{}" not in prompt and prompt.count(subject) == 1 and subject:
            prompt = prompt.replace(subject, "{}")
        return cls(prompt, subject, target, **rest)

    @property
    def text(self) -> str:
        """The prompt with its subject."""
        return self.prompt.replace("{}", self.subject)

    def labelled(self, template: str = "{}") -> Prompt:
        """The prompt inside a context, with its subject labelled."""
        whole = template.replace("{}", self.prompt, 1)
        at = whole.index("{}")
        return Prompt(whole.replace("{}", self.subject, 1), {"subject": (at, at + len(self.subject))})

    def essence(self) -> Prompt:
        """The text whose next word should stay what it was: "SUBJECT is a"."""
        return Prompt(ESSENCE.replace("{}", self.subject), {"subject": (0, len(self.subject))})

    def plain(self) -> dict[str, Any]:
        """What was asked, without the probes, for the record."""
        keys = ("prompt", "subject", "target_new", "target_true", "case", "relation")
        return {key: value for key, value in asdict(self).items() if key in keys and value}


def spaced(answer: str) -> str:
    """An answer with the space that stands before it."""
    return answer if answer[:1].isspace() else f" {answer}"


def target_ids(subject: Subject, prompt: Prompt | str, answer: str) -> tuple[int, ...]:
    """Tokens of an answer as it continues a prompt."""
    return continuation(subject.tokenizer, prompt, spaced(answer))


PLACES = ("subject", "last")
"""Where a fact is written: at the subject's last token (the papers' choice) or at the prompt's last token."""


def encode_labelled(subject: Subject, prompt: Prompt, at: str = "subject") -> Encoded:
    """Tokens with the subject's span, and the one token where the edit is made ("edited").

    Raises:
        EditError: an unknown place, or no token that ends where the subject ends (it runs on into the next word).
    """
    if at not in PLACES:
        raise EditError(f"A fact can't be written at {at!r}.", remedy=f"It is one of {', '.join(PLACES)}.")
    encoded = encode(prompt, subject.tokenizer, context=subject.facts.context)
    start, end = prompt.spans["subject"]
    token = subject.tokenizer.decode([encoded.ids[encoded.spans["subject"][1] - 1]]).strip()
    whole = prompt.text[start:end].strip()
    if "�" not in token and not whole.endswith(token) and not token.endswith(whole):
        raise EditError(
            f"The last token of {whole!r} is {token!r}, which runs on beyond it.",
            remedy="Give a subject that ends where a token ends.",
        )
    end = encoded.spans["subject"][1] if at == "subject" else len(encoded.ids)
    return Encoded(encoded.ids, {**encoded.spans, "edited": (end - 1, end)}, encoded.text)


def check_requests(subject: Subject, requests: Sequence[EditRequest], *, known: bool = True) -> None:
    """Refuse what makes no sense on this model, all of it before any work.

    Args:
        subject: the model.
        requests: to check.
        known: also refuse a target that the model already gives as its first answer.

    Raises:
        EditError: no request, one subject and prompt asked for two targets, a target that the model says already.
    """
    if not requests:
        raise EditError("There is no edit request.", remedy="Give at least one.")
    asked: dict[tuple[str, str], str] = {}
    for one in requests:
        other = asked.setdefault((one.prompt, one.subject), one.target_new)
        if other != one.target_new:
            raise EditError(
                f"{one.text!r} is asked to be both {other!r} and {one.target_new!r}.", remedy="Leave one of them out."
            )
    if not known:
        return
    said = [encode_labelled(subject, one.labelled()) for one in requests]
    first = subject.last_logits(said).argmax(-1).tolist()
    for one, token in zip(requests, first, strict=True):
        ids = target_ids(subject, one.labelled(), one.target_new)
        if len(ids) == 1 and ids[0] == token:
            raise EditError(
                f"The model already continues {one.text!r} with {one.target_new.strip()!r}.",
                remedy="Give another target.",
            )


def read_counterfact(path: str | Path, *, limit: int | None = None) -> list[EditRequest]:
    """The requests of a CounterFact (or multi-CounterFact) JSON file. Raises DataError, with the case, for others."""
    out = []
    for place, row in enumerate(_rows(path, limit)):
        try:
            asked = row["requested_rewrite"]
            new, true = asked["target_new"]["str"], asked["target_true"]["str"]
            out.append(
                EditRequest(
                    asked["prompt"], asked["subject"], new, true, str(row.get("case_id", place)),
                    str(asked.get("relation_id", "")), tuple(row.get("paraphrase_prompts", ())),
                    tuple(Probe(text, true, new) for text in row.get("neighborhood_prompts", ())),
                    tuple(row.get("generation_prompts", ())),
                )
            )  # fmt: skip
        except (KeyError, TypeError) as error:
            raise _no_such(path, place, "CounterFact", error) from error
    return out


def read_zsre(path: str | Path, *, limit: int | None = None) -> list[EditRequest]:
    """The requests of a zsRE file in the form of the MEND and ROME papers. Raises DataError, with the case, for others.

    The locality question (`loc`, asked as "nq question: ...?") keeps its own answer.
    """
    out = []
    for place, row in enumerate(_rows(path, limit)):
        try:
            near = str(row["loc"]).removeprefix("nq question: ").rstrip("?")
            out.append(
                EditRequest.of_text(
                    row["src"], row["subject"], row["answers"][0], case=str(place),
                    paraphrases=(row["rephrase"],), neighbours=(Probe(f"{near}?", row["loc_ans"], row["answers"][0]),),
                )
            )  # fmt: skip
        except (KeyError, TypeError, IndexError) as error:
            raise _no_such(path, place, "zsRE", error) from error
    return out


def read_requests(path: str | Path, *, limit: int | None = None) -> list[EditRequest]:
    """A file of requests: CounterFact, zsRE, or a list of objects with the fields of `EditRequest`."""
    rows = _rows(path, 1)
    first: Mapping[str, Any] = rows[0] if rows else {}
    if "requested_rewrite" in first:
        return read_counterfact(path, limit=limit)
    if "src" in first and "answers" in first:
        return read_zsre(path, limit=limit)
    out = []
    for place, row in enumerate(_rows(path, limit)):
        try:
            given = dict(row)
            for key in ("neighbours", "reasoning", "reversed"):
                given[key] = tuple(Probe(**one) for one in given.get(key, ()))
            for key in ("paraphrases", "generation"):
                given[key] = tuple(given.get(key, ()))
            prompt, subject, target = (given.pop(key) for key in ("prompt", "subject", "target_new"))
            out.append(EditRequest.of_text(prompt, subject, target, **given))
        except (KeyError, TypeError, ValueError) as error:
            raise _no_such(path, place, "edit request", error) from error
    return out


def _rows(path: str | Path, limit: int | None) -> list[dict[str, Any]]:
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} can't be read: {error}.", remedy="Give a JSON file.") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path} is no list of cases.", remedy="Give a JSON list of objects.")
    return rows[:limit]


def _no_such(path: str | Path, place: int, what: str, error: Exception) -> DataError:
    return DataError(f"Case {place} of {path} is no {what} case: {error!r}.", remedy="Compare it with the format.")
