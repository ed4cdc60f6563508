"""Language models that explain features and judge labels: a local one, or any OpenAI-compatible endpoint.

Both answer `ask(prompts)`; what is asked and how answers are read is here too, so that they can be compared. Answers
are kept in a file (`Cached`), by model and prompt: the same question is never paid for twice.

How they can mislead: a small model's labels read well and are wrong, which is why each is scored against another
feature's label; a judge that always says yes scores at chance.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float

from tomoscope.errors import DataError, ResourceError
from tomoscope.features.book import Context
from tomoscope.features.label_rules import Say
from tomoscope.findings.files import append_lines
from tomoscope.model import Subject

OPEN, CLOSE = "<<", ">>"
LIMIT = 1_000_000
EXPLAIN = (
    "Below are short texts. In each, some tokens are marked by << and >>. Say in a few words what the marked tokens "
    "have in common. Answer with one short phrase only.\n\n{texts}\n\nThe marked tokens are:"
)
DETECT = (
    "Description: {label}\n\nText: {text}\n\nDoes anything in the text fit the description? Answer yes or no.\nAnswer:"
)
FUZZ = (
    "Description: {label}\n\nText: {text}\n\nDo the tokens marked by << and >> fit the description? Answer yes or no.\n"
    "Answer:"
)


class LanguageModel(Protocol):
    """What explains and judges."""

    @property
    def name(self) -> str:
        """Which model, for the record and the cache."""
        ...

    def ask(self, prompts: Sequence[str], *, max_tokens: int) -> list[str]:
        """An answer to each prompt."""
        ...


@dataclass(frozen=True, eq=False)
class LocalModel:
    """A model opened here.

    Attributes:
        subject: the model, with a tokenizer.
    """

    subject: Subject

    @property
    def name(self) -> str:
        """The model's."""
        return f"local:{self.subject.name}"

    def ask(self, prompts: Sequence[str], *, max_tokens: int) -> list[str]:
        """Greedy continuations; a prompt longer than the context keeps its end."""
        room = (self.subject.facts.context or 2048) - max_tokens
        if room < 8:
            raise ResourceError(f"The context of {self.subject.name} is too short to be asked anything.")
        rows = [self.subject.tokenizer(prompt, verbose=False)["input_ids"][-room:] for prompt in prompts]
        return self.subject.generate(rows, max_new_tokens=max_tokens)


@dataclass(frozen=True, eq=False)
class Endpoint:
    """Any OpenAI-compatible server.

    Attributes:
        url: up to and without "/chat/completions".
        model: the name it is asked by.
        key: the name of the environment variable that holds the key; "" for none.
        timeout: seconds a request.
        tries: requests before giving up; 429 and 5xx are tried again after a pause.
        pause: seconds before the second try; doubled each time.
        price: (in, out) currency per million tokens, for the estimate.
    """

    url: str
    model: str
    key: str = ""
    timeout: float = 60.0
    tries: int = 4
    pause: float = 1.0
    price: tuple[float, float] = (0.0, 0.0)

    def __post_init__(self) -> None:
        if not re.match(r"https?://", self.url):
            raise DataError(f"{self.url!r} is no address of a server.", remedy="Give http://... or https://...")
        if self.key and self.key not in os.environ:
            raise DataError(f"The environment has no variable {self.key}.", remedy="Set it to the server's key.")

    @property
    def name(self) -> str:
        """Server and model."""
        return f"{self.url}:{self.model}"

    def ask(self, prompts: Sequence[str], *, max_tokens: int) -> list[str]:
        """An answer to each prompt, at temperature 0."""
        return [self._one(prompt, max_tokens) for prompt in prompts]

    def _one(self, prompt: str, max_tokens: int) -> str:
        body = {
            "model": self.model, "messages": [{"role": "user", "content": prompt}], "temperature": 0,
            "max_tokens": max_tokens,
        }  # fmt: skip
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {os.environ[self.key]}"
        request = urllib.request.Request(
            f"{self.url.rstrip('/')}/chat/completions", data=json.dumps(body).encode(), headers=headers
        )
        for turn in range(self.tries):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                    document = json.loads(answer.read(LIMIT))
                return str(document["choices"][0]["message"]["content"] or "")
            except urllib.error.HTTPError as error:
                error.close()
                if error.code != 429 and error.code < 500:
                    raise ResourceError(f"{self.url} refused the request: {error.code} {error.reason}.") from error
                last: Exception = error
            except (OSError, TimeoutError) as error:
                last = error
            except (ValueError, KeyError, IndexError, TypeError) as error:
                raise ResourceError(f"{self.url} answered with what is no completion: {error}.") from error
            if turn + 1 < self.tries:
                time.sleep(self.pause * 2**turn)
        raise ResourceError(f"{self.url} can't be reached: {last}.", remedy="What was answered is kept; run it again.")


@dataclass(eq=False)
class Cached:
    """A language model whose answers are kept in a file of JSON lines.

    Attributes:
        inner: the model.
        path: the file.
    """

    inner: LanguageModel
    path: Path
    asked: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._known: dict[str, str] = {}
        mend(self.path)
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                    self._known[entry["key"]] = entry["answer"]
                except (ValueError, KeyError, TypeError):
                    continue  # a line cut by a crash is asked again

    @property
    def name(self) -> str:
        """The inner model's."""
        return self.inner.name

    def ask(self, prompts: Sequence[str], *, max_tokens: int) -> list[str]:
        """Answers from the file where it has them, else from the model."""
        keys = [hashlib.sha256(f"{self.name}\0{max_tokens}\0{prompt}".encode()).hexdigest() for prompt in prompts]
        new = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in self._known}
        if new:
            answers = self.inner.ask(list(new.values()), max_tokens=max_tokens)
            self.asked += len(new)
            found = dict(zip(new, answers, strict=True))
            append_lines(self.path, [json.dumps({"key": key, "answer": answer}) for key, answer in found.items()])
            self._known |= found
        return [self._known[key] for key in keys]


def mend(path: Path) -> None:
    """End a file's last line, which a crash may have cut, so that the next one begins a line."""
    if path.exists() and path.stat().st_size:
        with path.open("rb+") as file:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")


def marked(context: Context, say: Say, mask: np.ndarray | None = None) -> str:
    """A window as text; runs of marked tokens stand between << and >>. No mask: nothing is marked."""
    out, inside = [], False
    for i, token in enumerate(context.tokens.tolist()):
        on = mask is not None and bool(mask[i])
        word = say(token).replace(OPEN, "‹‹").replace(CLOSE, "››")
        if inside and not on:
            out.append(CLOSE)
        if on and not inside:
            lead = len(word) - len(word.lstrip())
            out.append(word[:lead] + OPEN)
            word = word[lead:]
        out.append(word)
        inside = on
    return "".join(out) + (CLOSE if inside else "")


def explanation_prompt(contexts: Sequence[Context], say: Say) -> str:
    """The question for a label."""
    texts = "\n".join(f"{i + 1}. {marked(c, say, c.values > 0)}" for i, c in enumerate(contexts) if c.active)
    return EXPLAIN.format(texts=texts)


def read_label(answer: str) -> str:
    """The first line of an answer, without quotation marks, of at most 200 characters."""
    lines = [line.strip(" \t\"'.*-") for line in answer.splitlines() if line.strip()]
    return lines[0][:200] if lines else ""


def read_yes(answers: Sequence[str]) -> Float[np.ndarray, " answer"]:
    """1 for yes, 0 for no, 0.5 for what is neither."""
    out = []
    for answer in answers:
        word = re.search(r"\b(yes|no)\b", answer.lower())
        out.append(0.5 if word is None else float(word[1] == "yes"))
    return np.array(out)


def describe_model(model: Any) -> str:
    """A model's name without anything that could be a secret."""
    return re.sub(r"//[^/@]*@", "//", str(model.name))
