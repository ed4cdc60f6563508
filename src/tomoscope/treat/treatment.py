"""A treatment as a value: what to add to which parameters, where that came from, and how to take it back.

    treatment = rome(subject, request)                  # any method of this folder that changes weights
    with treatment.applied(subject): ...                # inside only; the exact bits come back, after an error too
    handle = treatment.apply(subject); handle.undo()    # until it is undone
    treatment.save("fact.safetensors"); load_treatment("fact.safetensors")
    merge_to(treatment, subject, "out/")                # (treat/merge.py) a plain transformers directory

A change is low-rank (left @ right), sparse (some entries) or dense, always in the parameter's own layout, so that
a linear layer and transformers' transposed Conv1D need nothing special. Undoing puts the stored numbers back; it does
not subtract. How it can mislead: the change was computed for one model's weights; `apply` compares the hash of the
parameters that it changes and refuses others, unless told to go on.
"""

from __future__ import annotations

import contextlib
import json
import weakref
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from tomoscope.activations.writing import weights_hash
from tomoscope.errors import DataError, EditError, nearest
from tomoscope.findings.files import write_bytes
from tomoscope.findings.provenance import hash_arrays, package_versions
from tomoscope.model import Subject

FORMAT = "tomoscope treatment 1"
_SPARSE = 0.25
"""A difference with at most this share of entries changed is kept sparse."""


@dataclass(frozen=True, eq=False)
class LowRank:
    """left @ right, added to a matrix."""

    left: Float[Tensor, "row rank"]
    right: Float[Tensor, "rank column"]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the parameter."""
        return (self.left.shape[0], self.right.shape[1])

    def dense(self) -> Tensor:
        """The whole change."""
        return self.left @ self.right

    def tensors(self) -> dict[str, Tensor]:
        """By the names they have in a file."""
        return {"left": self.left, "right": self.right}


@dataclass(frozen=True, eq=False)
class Sparse:
    """Values added at some entries (flat, row by row) of a parameter of this shape."""

    index: Int[Tensor, " entry"]
    values: Float[Tensor, " entry"]
    shape: tuple[int, ...]

    def dense(self) -> Tensor:
        """The whole change."""
        out = torch.zeros(self.shape, dtype=self.values.dtype, device=self.values.device)
        out.view(-1)[self.index] = self.values
        return out

    def tensors(self) -> dict[str, Tensor]:
        """By the names they have in a file."""
        return {"index": self.index, "values": self.values, "shape": torch.tensor(self.shape, dtype=torch.long)}


@dataclass(frozen=True, eq=False)
class Dense:
    """A whole matrix (or vector) added."""

    delta: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the parameter."""
        return tuple(self.delta.shape)

    def dense(self) -> Tensor:
        """The whole change."""
        return self.delta

    def tensors(self) -> dict[str, Tensor]:
        """By the names they have in a file."""
        return {"delta": self.delta}


Change = LowRank | Sparse | Dense


@dataclass(frozen=True)
class Origin:
    """Where a treatment comes from.

    Attributes:
        method: "ROME", "MEMIT", "remove a direction", ...
        requests: what was asked for, as plain values (facts, directions, heads).
        settings: the method's own settings, with what it drew (context templates).
        model: the model's name.
        model_hash: of all weights before.
        touched_hash: of the parameters that are changed, before.
        seed: of everything drawn.
        created: UTC, ISO 8601.
        versions: of packages.
    """

    method: str
    requests: tuple[Mapping[str, Any], ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    model: str = ""
    model_hash: str = ""
    touched_hash: str = ""
    seed: int = 0
    created: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Treatment:
    """Changes of parameters by name, and where they come from. Made by `treatment_of` or `difference`.

    Attributes:
        changes: parameter name (as in `model.named_parameters()`) -> change.
        origin: provenance.
        untie: the unembedding first gets its own weights, where it shares the embedding's.
    """

    changes: Mapping[str, Change]
    origin: Origin
    untie: bool = False

    def apply(self, subject: Subject, *, anyway: bool = False) -> Applied:
        """Change the weights in place until `undo()` of what is returned (also a context manager).

        Args:
            subject: the model.
            anyway: go on where the parameters are not those it was made for (after another treatment, in another
                precision).

        Raises:
            EditError: no such parameter, another shape, other numbers than it was made for; nothing is changed then.
        """
        self.check(subject, anyway=anyway)
        return Applied(self, subject)

    @contextlib.contextmanager
    def applied(self, subject: Subject, *, anyway: bool = False) -> Generator[Subject]:
        """The treated subject for the time of a context; the exact bits come back at its end, after an error too."""
        handle = self.apply(subject, anyway=anyway)
        try:
            yield subject
        finally:
            handle.undo()

    def check(self, subject: Subject, *, anyway: bool = False) -> None:
        """Raise EditError where the treatment does not fit the subject; see `apply`."""
        found = {name: _parameter(subject, name) for name in self.changes}
        for name, change in self.changes.items():
            if tuple(found[name].shape) != tuple(change.shape):
                raise EditError(
                    f"{name} has shape {tuple(found[name].shape)}, the treatment's change {tuple(change.shape)}.",
                    remedy="It was made for another model.",
                )
        if not anyway and self.origin.touched_hash and touched_hash(subject, self.changes) != self.origin.touched_hash:
            raise EditError(
                f"{subject.name}'s {', '.join(sorted(found))} are not the weights that this treatment was made for "
                f"({self.origin.model or 'unknown model'}).",
                remedy="Give that model in that precision and untreated, or pass anyway=True (--anyway).",
            )

    def norms(self) -> dict[str, float]:
        """Parameter -> Frobenius norm of its change."""
        return {name: float(change.dense().double().norm()) for name, change in self.changes.items()}

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file with the provenance as JSON in its header, whole or not at all."""
        path = Path(path)
        tensors = {
            f"{name}::{part}": tensor.detach().cpu().contiguous()
            for name, change in self.changes.items()
            for part, tensor in change.tensors().items()
        }
        header = {"format": FORMAT, "treatment": json.dumps({"origin": asdict(self.origin), "untie": self.untie})}
        write_bytes(path, save(tensors, metadata=header))
        return path

    def __str__(self) -> str:
        parts = ", ".join(f"{name} ({_words(change)})" for name, change in self.changes.items())
        return f"{self.origin.method}: {parts or 'nothing changed'}"


def load_treatment(path: str | Path) -> Treatment:
    """Read what `Treatment.save` wrote. Raises DataError for anything else."""
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise ValueError("its header names no treatment")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        told = json.loads(header["treatment"])
        parts: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            name, _, part = key.rpartition("::")
            parts.setdefault(name, {})[part] = tensor
        changes = {name: _change(found) for name, found in parts.items()}
        given: dict[str, Any] = told["origin"]
        given["requests"] = tuple(given["requests"])
        return Treatment(changes, Origin(**given), bool(told["untie"]))
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is no treatment: {error}.", remedy="Give a file that Treatment.save (--out) wrote."
        ) from error


def treatment_of(
    subject: Subject,
    changes: Mapping[str, Change],
    *,
    method: str,
    requests: Sequence[Mapping[str, Any]] = (),
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    untie: bool = False,
) -> Treatment:
    """A treatment with its provenance. Call it while the subject has the weights that it was made for.

    Raises:
        EditError: a parameter that is not there, another shape, or a change that is not finite.
    """
    for name, change in changes.items():
        if not all(bool(torch.isfinite(t).all()) for t in change.tensors().values() if t.is_floating_point()):
            raise EditError(
                f"{method}'s change of {name} holds NaN or infinity.",
                remedy="The second moments may be singular (more text, or a ridge), or the step too large.",
            )
    plain = json.loads(json.dumps([list(requests), dict(settings or {})]))
    origin = Origin(
        method, tuple(plain[0]), plain[1], subject.name, weights_hash(subject), touched_hash(subject, changes), seed,
        datetime.now(UTC).isoformat(timespec="seconds"), package_versions(("tomoscope", "torch", "transformers")),
    )  # fmt: skip
    made = Treatment(dict(changes), origin, untie)
    made.check(subject)
    return made


def difference(
    subject: Subject, after: Mapping[str, Tensor], *, method: str, requests: Sequence[Mapping[str, Any]] = (),
    settings: Mapping[str, Any] | None = None, seed: int = 0, untie: bool = False,
) -> Treatment:  # fmt: skip
    """The treatment that turns the subject's parameters into given ones; parameters that agree are left out, and few
    changed entries are kept sparse.

    To the bit, wherever a double holds the difference of the two numbers (in single precision: unless one is more than
    2^29 times the other and not 0); elsewhere to a double's rounding.

    Args:
        subject: before.
        after: parameter name -> its new values.
        method, requests, settings, seed, untie: provenance, see `treatment_of`.
    """
    changes: dict[str, Change] = {}
    for name, new in after.items():
        old = _parameter(subject, name).detach()
        new = new.detach().to(old)
        moved = (new != old).reshape(-1)
        if not bool(moved.any()):
            continue
        wide = _wide(old.dtype)
        delta = new.to(wide) - old.to(wide)
        if not torch.equal(_added(old, delta), new):  # rounded away: the difference of two floats fits in a double
            delta = new.double() - old.double()
        if float(moved.float().mean()) <= _SPARSE:
            index = moved.nonzero()[:, 0]
            changes[name] = Sparse(index, delta.reshape(-1)[index], tuple(old.shape))
        else:
            changes[name] = Dense(delta)
    return treatment_of(subject, changes, method=method, requests=requests, settings=settings, seed=seed, untie=untie)


def touched_hash(subject: Subject, names: Mapping[str, Any] | Sequence[str]) -> str:
    """Hash of some parameters of a model as they are now."""
    found = {name: _parameter(subject, name).detach().cpu() for name in names}
    return hash_arrays(
        (name, (value.view(torch.int16) if value.dtype == torch.bfloat16 else value).contiguous().numpy())
        for name, value in found.items()
    )


_standing: weakref.WeakKeyDictionary[nn.Module, list[Applied]] = weakref.WeakKeyDictionary()
"""Model -> treatments that stand, in order: one is undone only when nothing that came later changed its parameters."""


class Applied:
    """A treatment that stands. `undo()` puts the stored numbers back, bit for bit; calling it again does nothing."""

    def __init__(self, treatment: Treatment, subject: Subject) -> None:
        self.treatment, self.subject = treatment, subject
        self.stands = True
        self._head: tuple[nn.Module, nn.Parameter] | None = _untied(subject) if treatment.untie else None
        self._kept: list[tuple[str, Tensor, Tensor | None, Tensor]] = []
        try:
            for name, change in treatment.changes.items():
                self._write(name, change)
        except BaseException:
            self._restore()
            raise
        _standing.setdefault(subject.model, []).append(self)

    @torch.no_grad()
    def _write(self, name: str, change: Change) -> None:
        parameter = _parameter(self.subject, name)
        data = parameter.detach()
        if isinstance(change, Sparse):
            index = change.index.to(data.device)
            flat = data.reshape(-1)
            kept = flat[index].clone()
            self._kept.append((name, parameter, index, kept))
            flat = flat.clone()
            flat[index] = _added(kept, change.values)
            parameter.copy_(flat.reshape(data.shape))
            return
        self._kept.append((name, parameter, None, data.clone()))
        parameter.copy_(_added(data, change.dense()))

    @torch.no_grad()
    def _restore(self) -> None:
        for _, parameter, index, kept in reversed(self._kept):
            if index is None:
                parameter.copy_(kept)
            else:
                flat = parameter.detach().reshape(-1).clone()
                flat[index] = kept
                parameter.copy_(flat.reshape(parameter.shape))
        if self._head is not None:
            module, weight = self._head
            module.weight = weight
            _set_tied(self.subject, True)
        self.stands = False

    def undo(self) -> None:
        """Put the numbers back.

        Raises:
            EditError: a later treatment that still stands changed the same parameters.
        """
        if not self.stands:
            return
        standing = _standing.get(self.subject.model, [])
        mine = {id(parameter) for _, parameter, _, _ in self._kept}
        for other in standing[standing.index(self) + 1 :]:
            if other._head is not None or mine & {id(parameter) for _, parameter, _, _ in other._kept}:
                raise EditError(
                    f"{other.treatment.origin.method!r} was applied later and changed the same parameters.",
                    remedy="Undo treatments in the reverse order.",
                )
        self._restore()
        standing.remove(self)

    def __enter__(self) -> Subject:
        return self.subject

    def __exit__(self, *error: object) -> None:
        self.undo()


def _parameter(subject: Subject, name: str) -> nn.Parameter:
    found = dict(subject.model.named_parameters(remove_duplicate=False))
    if name not in found:
        raise EditError(f"The model has no parameter {name!r}.", remedy=nearest(name, found) or "See its parameters.")
    return found[name]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _added(value: Tensor, delta: Tensor) -> Tensor:
    """The sum in the wider of both types, rounded once to the parameter's own."""
    wide = torch.promote_types(_wide(value.dtype), delta.dtype)
    return (value.to(wide) + delta.to(device=value.device, dtype=wide)).to(value.dtype)


def _untied(subject: Subject) -> tuple[nn.Module, nn.Parameter] | None:
    """Give the unembedding weights of its own; what to put back, or None where it had them already."""
    give_in, give_out = (getattr(subject.model, f"get_{which}_embeddings", None) for which in ("input", "output"))
    inner, head = (give() if give is not None else None for give in (give_in, give_out))
    if inner is None or head is None or getattr(head, "weight", None) is not inner.weight:
        return None
    shared = head.weight
    head.weight = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)
    _set_tied(subject, False)
    return head, shared


def _set_tied(subject: Subject, tied: bool) -> None:
    if subject.config is not None:
        subject.config.tie_word_embeddings = tied


def _change(parts: Mapping[str, Tensor]) -> Change:
    kinds = {frozenset({"left", "right"}): LowRank, frozenset({"delta"}): Dense}
    if set(parts) == {"index", "values", "shape"}:
        return Sparse(parts["index"], parts["values"], tuple(parts["shape"].tolist()))
    kind = kinds.get(frozenset(parts))
    if kind is None:
        raise ValueError(f"a change is made of {sorted(parts)}")
    return kind(**parts)


def _words(change: Change) -> str:
    if isinstance(change, LowRank):
        return f"rank {change.left.shape[1]}"
    return f"{len(change.values)} entries" if isinstance(change, Sparse) else "dense"
