"""A phantom: a model whose answer is known, so that an exam can be pointed at it and found right or wrong.

What is known is written as data (`Known`), not as prose, so that calibration, tests and readers can check a finding
against it. How a phantom can mislead: a truth by construction is true of the construction (weights set by hand, a
compiled program); a *trained* phantom's truth about behaviour is what its training text says, and its inner workings
stay unknown unless something was planted; so a card states only what was built in or measured, and says which.

Kinds of `Known` and their values (JSON):

- ability: {"task"}, a name of `tomoscope.data.TASKS`
- head_role: {"role", "heads": [[layer, head], ...]}
- site: {"task", "sites"}, parts which carry a behaviour, perhaps "at" which label of a position; denied beside others
  for "layer.*.mlp.out", no MLP does; denied alone, no part does
- needed: {"task", "sites"}, parts each of which the behaviour is gone without (zeroed; a patch need not show them)
- circuit: {"nodes", "edges": [[source, destination], ...]}; nodes "embed", "position", "a0.h1", "m0", "logits"; may
  say which edges are "constant" (the same for every prompt), "idle" or "faint" (some methods can't see them), and which
  "differs" under a task's corruptions
- feature_circuit: {"task", "features", "path", ...}, features of a hand-set dictionary and the path through them
- formed: {"after"}, the block that says the next token where the output reads it, before the last block; denied: only
  the last block does
- rotated: {"from", "to"}, blocks between which the next token stands where the output does not read it, until a linear
  map moves it there; denied: it stands where the output reads it from the start
- direction: {"concept", "site"}; the vector in `Specimen.data["directions"][concept]`, [d_model]; may say "at" which
  position, "from_layer", the best probe's "accuracy", and whether it is "used" by the output
- features: {"site", "n"}; the dictionary in `Specimen.data["dictionary"]`, [feature, d_model]
- neuron: {"site", "index", "what"}
- channel: {"site", "index", "what", ...}
- weights: {"from", "to", "index", "excites": [{"index", "offset"}, ...]}, channels at offsets that feed a channel
- dead: {"sites"}, layers that carry nothing to the output; denied: all of them do
- disease: {"name", ...}
- fact: {"relation", "subject", "answer"}
- measured: {"what", ...}, shares with intervals, by plain forwards of the library
- made: {"command", ...}, what made the model
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tomoscope.errors import DataError

PhantomKind = Literal["planted", "compiled", "trained"]


@dataclass(frozen=True)
class Known:
    """One statement about a model that is known to hold, or known not to."""

    kind: str
    """What sort of statement: "head_role", "circuit", ... (see the module's list)."""
    value: Mapping[str, Any]
    """The statement itself, JSON only."""
    holds: bool = True
    """False: known not to be so."""


@dataclass(frozen=True)
class Card:
    """What is known about one model, machine-readable."""

    name: str
    seed: int
    description: str
    known: tuple[Known, ...] = ()

    def of(self, kind: str) -> Iterator[Known]:
        """The statements of one kind."""
        return (known for known in self.known if known.kind == kind)

    def to_json(self) -> str:
        """The card as JSON text; `Card.from_json` reads it back equal."""
        known = [{"kind": one.kind, "holds": one.holds, "value": dict(one.value)} for one in self.known]
        value = {"name": self.name, "seed": self.seed, "description": self.description, "known": known}
        return json.dumps(value, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Card:
        """Read a card. Raises DataError where the text is no card."""
        try:
            value = json.loads(text)
            known = tuple(Known(one["kind"], one["value"], bool(one.get("holds", True))) for one in value["known"])
            return cls(str(value["name"]), int(value["seed"]), str(value["description"]), known)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"This is no phantom's card: {error!r}.", remedy="A card is what `Card.to_json` wrote."
            ) from error


@dataclass(frozen=True)
class Specimen:
    """One opened model with its card."""

    subject: Any
    """The `Subject`."""
    card: Card
    data: Mapping[str, Any] = field(default_factory=dict)
    """What the card's statements name and JSON can't hold: tensors, the world, inputs with labels."""


@dataclass(frozen=True)
class Phantom:
    """A family of models whose answer is known, one for every seed."""

    name: str
    """Lower-case words joined by "_": "induction_gpt2"."""
    kind: PhantomKind
    title: str
    """Three to eight words."""
    build: Callable[[int], Specimen]
    """Seed -> the model that has the thing. Where nothing can vary (a stored model), any seed gives the same."""
    null: Callable[[int], Specimen]
    """Seed -> the same kind of model without the thing; its card says `holds=False`."""
    varies: bool = True
    """False: every seed gives the same model, so one specimen is all there is."""
