"""Which modules write to the residual stream, solved from what they were seen to compute.

A block maps the stream x to y. If y - x is a sum of a few of its children's outputs, with constant factors, those
children are its writers; the factors are found by least squares, so a family's multipliers need not be known.
Candidates are taken from the shallowest modules first and the smallest sum that fits wins. Where no sum fits, the
block may renormalise the stream (BERT, OpenAI GPT): then y is a norm of a sum, and the same search runs on what went
into the norm.

How it can mislead: two modules with equal outputs (a linear layer and the dropout after it) cannot be told apart; the
shallowest is named. A fit in half precision is too coarse, so callers pass float32 recordings.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from torch import Tensor

from tomoscope.model.probe import Call

TOLERANCE = 1e-5


@dataclass(frozen=True)
class Term:
    """One summand: factor x the output of the module at `path`."""

    path: str
    factor: float


@dataclass(frozen=True)
class Sum:
    """A found sum and the relative error with which it holds."""

    terms: tuple[Term, ...]
    error: float


def is_stream(value: Tensor | None, like: Tensor) -> bool:
    """Whether a tensor has the stream's shape, perhaps with batch and position flattened or one row for the batch."""
    if value is None or not value.is_floating_point() or value.dim() < 2 or value.shape[-1] != like.shape[-1]:
        return False
    return value.numel() == like.numel() or (
        value.dim() == 3 and value.shape[0] == 1 and value.shape[1] == like.shape[1]
    )


def as_stream(value: Tensor, like: Tensor) -> np.ndarray:
    """A stream-shaped value as one float64 vector."""
    value = value.reshape(like.shape) if value.numel() == like.numel() else value.expand(like.shape)
    return value.detach().double().cpu().reshape(-1).numpy()


def candidates(calls: Iterable[Call], like: Tensor, *, depth: int, root: str) -> list[Call]:
    """Calls at most `depth` below `root` whose output is stream-shaped; of equal outputs the shallowest."""
    found: list[tuple[Call, np.ndarray]] = []
    level = root.count(".") + (1 if root else 0)
    fitting = [
        c for c in calls if c.times == 1 and c.path.count(".") + 1 - level <= depth and is_stream(c.output, like)
    ]
    for call in sorted(fitting, key=lambda c: (c.path.count("."), c.finish)):
        assert call.output is not None
        vector = as_stream(call.output, like)
        if np.abs(vector).max(initial=0.0) == 0.0:
            continue
        if not any(np.allclose(vector, other, rtol=1e-6, atol=1e-7 * np.abs(other).max()) for _, other in found):
            found.append((call, vector))
    return sorted((call for call, _ in found), key=lambda c: c.finish)


def solve(
    target: np.ndarray, paths: Sequence[str], columns: Sequence[np.ndarray], *, most: int = 3, coarse: bool = False
) -> Sum | None:
    """The smallest sum of columns equal to the target, or None.

    Args:
        target: what is to be explained.
        paths: name of each column.
        columns: candidate summands.
        most: largest number of summands.
        coarse: the values were computed in half precision, so fits and factors are known to three digits only.
    """
    tolerance, near = (1e-2, 1e-2) if coarse else (TOLERANCE, 1e-4)
    norm = np.linalg.norm(target)
    if norm == 0 or not len(columns):
        return None
    matrix = np.stack(columns, axis=1)
    gram, right = matrix.T @ matrix, matrix.T @ target
    best: tuple[tuple[float, ...], Sum] | None = None
    for size in range(1, most + 1):
        subsets = np.array(list(combinations(range(len(paths)), size)), dtype=int).reshape(-1, size)
        if not len(subsets):
            break
        grams = gram[subsets[:, :, None], subsets[:, None, :]]
        scale = np.sqrt(np.maximum(np.einsum("sii->si", grams), np.finfo(float).tiny))  # a summand may be all zero
        scaled = grams / (scale[:, :, None] * scale[:, None, :]) + 1e-13 * np.eye(size)
        factors = np.linalg.solve(scaled, (right[subsets] / scale)[..., None])[..., 0] / scale
        explained = np.einsum("si,si->s", factors, right[subsets])
        rough = np.sqrt(np.maximum(norm**2 - explained, 0.0)) / norm
        for row in np.flatnonzero(rough < max(1e-3, 2 * tolerance)):
            chosen, values = subsets[row], factors[row]
            if np.any(np.abs(values) < 1e-3):
                continue
            error = float(np.linalg.norm(target - matrix[:, chosen] @ values) / norm)
            if error > tolerance:
                continue
            off = float(np.abs(values - 1).sum())
            terms = tuple(Term(paths[i], plain_factor(float(v), near)) for i, v in zip(chosen, values, strict=True))
            rank = (round(off, 4), sum(paths[i].count(".") for i in chosen), error)
            if best is None or rank < best[0]:
                best = (rank, Sum(terms, error))
        if best is not None:
            return best[1]
    return None


def plain_factor(value: float, near: float) -> float:
    """A solved factor without the noise of its solution: 0.22 for 0.2200000003."""
    if abs(value - 1) < near:
        return 1.0
    plain = float(f"{value:.3g}") if near > 1e-3 else float(f"{value:.4g}")
    return plain if abs(plain - value) < 0.03 * near * abs(value) or (near > 1e-3) else value


def solve_block(block: Call, calls: Sequence[Call]) -> Sum | None:
    """The writers of a block whose output is its input plus a sum of its modules' outputs."""
    assert block.input is not None
    assert block.output is not None
    like = block.output
    target = as_stream(block.output, like) - as_stream(block.input, like)
    for depth in (1, 2, 3):
        found = candidates(calls, like, depth=depth, root=block.path)
        columns = [as_stream(call.output, like) for call in found if call.output is not None]
        answer = solve(target, [call.path for call in found], columns)
        if answer is not None:
            return answer
    return None


@dataclass(frozen=True)
class Renormalised:
    """A stream that is the norm of a sum: `norm` is its path, `base` the stream that went in ("" for the block's own
    input), `writes` what was added to it.
    """

    norm: str
    base: str
    writes: Sum


def solve_renormalised(
    output: Tensor, calls: Sequence[Call], stream_in: Tensor | None, *, coarse: bool = False
) -> Renormalised | None:
    """Explain a stream as norm(base + writes), where base is the block's input or another norm's output.

    Args:
        output: the stream after the norm.
        calls: every call inside the block.
        stream_in: the block's input; None at the embedding, where there is no stream yet.
        coarse: the values were computed in half precision.
    """
    vector = as_stream(output, output)
    norms = [c for c in calls if is_norm(c) and is_stream(c.output, output) and is_stream(c.input, output)]
    matching = [c for c in norms if np.allclose(as_stream(c.output, output), vector, rtol=1e-5, atol=1e-6)]  # ty: ignore[invalid-argument-type]
    for norm in sorted(matching, key=lambda c: c.finish):
        target = as_stream(norm.input, output)  # ty: ignore[invalid-argument-type]
        bases: list[tuple[str, np.ndarray]] = [] if stream_in is None else [("", as_stream(stream_in, output))]
        earlier = [c for c in norms if c.finish < norm.start]
        bases += [(c.path, as_stream(c.output, output)) for c in earlier]  # ty: ignore[invalid-argument-type]
        found = [c for c in calls if c.finish < norm.start and not is_norm(c)]
        pool = candidates(found, output, depth=99, root="")
        pool = [
            c
            for c in pool
            if c.output is not None
            and not any(np.allclose(as_stream(c.output, output), base, atol=1e-6) for _, base in bases)
        ]  # type: ignore[arg-type]
        columns = [as_stream(c.output, output) for c in pool]  # ty: ignore[invalid-argument-type]
        for base, stream in bases or [("", np.zeros_like(target))]:
            answer = solve(target - stream, [c.path for c in pool], columns, coarse=coarse)
            if answer is not None:
                return Renormalised(norm.path, base, answer)
    return None


def is_norm(call: Call) -> bool:
    """Whether a call is to a normalisation layer (by its class's name, and because it has no children)."""
    name = type(call.module).__name__.lower()
    return ("norm" in name or name.endswith("ln")) and next(call.module.children(), None) is None


def close(left: Tensor | None, right: Tensor | None, tolerance: float = 1e-5) -> bool:
    """Whether two tensors hold the same numbers in the same order, whatever their shapes."""
    if left is None or right is None or left.numel() != right.numel():
        return False
    if left is right:
        return True
    return gap(left, right) <= tolerance * max(float(right.abs().max()), 1e-6)


def gap(left: Tensor, right: Tensor) -> float:
    """The largest difference of two tensors of as many numbers, whatever their shapes."""
    return float((left.reshape(-1).double() - right.reshape(-1).double()).abs().max())
