"""What would it take? Work, bytes, hours and money of a dictionary of any size, before anything is run.

    for line in plan_features(model_params=70e9, d_model=8192, latents=30e6, tokens=8e9).lines:
        print(line)

Formulas (2 floating-point operations a multiply-add; d the width, F the latents, k the active ones, T the tokens, N the
model's parameters):

    harvest       2 N T x (share of the layers that is run)
    train         (2 d F + 8 k d) T with sparse decoding and gradients; 12 d F T where everything is dense
    activations   T d bytes a number, and 4 bytes a token for its id
    state         parameters (2 d F + F + d) x (4 master + 8 Adam + 2 shadow) bytes
    dashboards    2 d F for each of their tokens, and 10 bytes for each of their k codes

How it can mislead: hours are work over rate, so they leave out stalls, failures and sweeps (one dictionary of one
sparsity is planned); prices are assumptions to be overridden; a rate that was published for other hardware or shapes is
only a guide. Every line says its formula and where its constants come from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tomoscope.errors import DataError, nearest

GIB = 2**30


@dataclass(frozen=True)
class Hardware:
    """One kind of accelerator.

    Attributes:
        name: its name.
        flops: peak of dense bf16 products, a second.
        memory: bytes.
        price: of an hour, in dollars.
        source: of the numbers.
    """

    name: str
    flops: float
    memory: float
    price: float
    source: str


HARDWARE: dict[str, Hardware] = {
    one.name: one
    for one in (
        Hardware("A100-80GB", 312e12, 80e9, 2.0, "NVIDIA A100 data sheet; price assumed"),
        Hardware("H100-SXM", 989e12, 80e9, 3.0, "NVIDIA H100 data sheet; price assumed"),
        Hardware("H200", 989e12, 141e9, 4.0, "NVIDIA H200 data sheet; price assumed"),
        Hardware("B200", 2250e12, 180e9, 6.0, "NVIDIA B200 data sheet; price assumed"),
    )
}
"""Name -> accelerator."""

FORWARD_SHARE, TRAIN_SHARE = 0.4, 0.5
FORWARD_SOURCE = "assumed: 40 % of peak for batched forwards"
TRAIN_SOURCE = "Gemma Scope, arXiv:2408.05147: 50.8 % of peak at 131k latents"
EXPLAIN, FUZZ, DETECT = 200 / 1e6, 676 / 1e5, 588 / 1e5
LABEL_SOURCE = "delphi, arXiv:2410.13928: dollars a feature with Llama-70B, explained, fuzzing and detection scored"


@dataclass(frozen=True)
class Line:
    """One number of a plan.

    Attributes:
        group: "work", "disk", "memory", "time" or "money".
        what: in a few words.
        value: the number.
        unit: of it.
        formula: how it was made.
        source: of its constants; "" where there are none.
    """

    group: str
    what: str
    value: float
    unit: str
    formula: str
    source: str = ""


@dataclass(frozen=True)
class FeaturePlan:
    """What a dictionary takes.

    Attributes:
        given: the sizes that were asked for.
        hardware: what it is planned for.
        lines: the numbers.
    """

    given: dict[str, Any]
    hardware: Hardware
    lines: tuple[Line, ...]

    def value(self, what: str) -> float:
        """One number by its words. Raises DataError for one that is not there."""
        for line in self.lines:
            if line.what == what:
                return line.value
        raise DataError(f"The plan has no {what!r}.", remedy=nearest(what, [line.what for line in self.lines]))


def plan_features(
    *,
    model_params: float,
    d_model: int,
    latents: float,
    tokens: float,
    k: int = 64,
    depth: float = 1.0,
    hardware: str = "H100-SXM",
    price: float | None = None,
    bytes_a_number: int = 2,
    dashboard_tokens: float = 1e8,
    shard_bytes: float = 2 * GIB,
    labelled: float | None = None,
) -> FeaturePlan:
    """Work, bytes, hours and money.

    Args:
        model_params: parameters of the model that is read (active ones, for a mixture of experts).
        d_model: width of what the dictionary reads.
        latents: features.
        tokens: of training.
        k: active features a token.
        depth: share of the model's layers that is run (a dictionary of the middle layer: 0.5).
        hardware: a name of `HARDWARE`.
        price: of an hour, instead of the assumed one.
        bytes_a_number: of stored activations (2: bf16; 1: int8 with a scale a row).
        dashboard_tokens: read for dashboards.
        shard_bytes: of a shard.
        labelled: features that a language model labels; all where not given.

    Raises:
        DataError: a size that is not above 0, or hardware that is not known.
    """
    for name, value in (
        ("model parameters", model_params), ("d_model", d_model), ("latents", latents), ("tokens", tokens), ("k", k),
        ("depth", depth), ("dashboard tokens", dashboard_tokens), ("shard bytes", shard_bytes),
    ):  # fmt: skip
        if not (math.isfinite(value) and value > 0):
            raise DataError(f"The plan's {name} is {value}.", remedy="Give a number above 0.")
    if depth > 1 or k > latents:
        raise DataError("The plan runs more than the model, or more features are active than there are.")
    if hardware not in HARDWARE:
        hint = nearest(hardware, HARDWARE) or f"Known: {', '.join(HARDWARE)}."
        raise DataError(f"There is no hardware {hardware!r}.", remedy=hint)
    machine = HARDWARE[hardware]
    cost = machine.price if price is None else price
    d, F, T, N = float(d_model), float(latents), float(tokens), float(model_params)
    forward = 2 * N * T * depth
    sparse, dense = (2 * d * F + 8 * k * d) * T, 12 * d * F * T
    boards = (2 * N * depth + 2 * d * F) * dashboard_tokens
    parameters = 2 * d * F + F + d
    stored, state = T * (d * bytes_a_number + 4), parameters * 14
    number = {1: "int8", 2: "bf16", 4: "fp32"}.get(bytes_a_number, f"{bytes_a_number} bytes")
    hours = {
        "harvest": forward / (machine.flops * FORWARD_SHARE) / 3600,
        "training": sparse / (machine.flops * TRAIN_SHARE) / 3600,
        "dashboards": boards / (machine.flops * FORWARD_SHARE) / 3600,
    }
    many = F if labelled is None else float(labelled)
    labels = many * (EXPLAIN + FUZZ + DETECT)
    lines = [
        Line("work", "harvest", forward, "FLOP", "2 N T x depth"),
        Line("work", "training, sparse", sparse, "FLOP", "(2 d F + 8 k d) T"),
        Line("work", "training, if all were dense", dense, "FLOP", "12 d F T", "SAELens 6.54 as shipped"),
        Line("work", "dashboards", boards, "FLOP", "(2 N x depth + 2 d F) x dashboard tokens"),
        Line("disk", "activations", stored, "bytes", f"T (d x {bytes_a_number} + 4), {number} and token ids"),
        Line("disk", "shards", math.ceil(stored / shard_bytes), "files", f"of {shard_bytes / GIB:g} GiB"),
        Line("disk", "dictionary", parameters * 4, "bytes", "(2 d F + F + d) x 4, fp32"),
        Line("disk", "checkpoint", parameters * 12, "bytes", "with Adam's two moments"),
        Line("disk", "codes of the dashboards", dashboard_tokens * k * 10, "bytes", "10 bytes a code"),
        Line("memory", "training state", state, "bytes", "(2 d F + F + d) x (4 master + 8 Adam + 2 shadow)"),
        Line(
            "memory", "accelerators that hold it", math.ceil(state / (0.8 * machine.memory)), machine.name,
            "state / 80 % of memory; latents sharded", machine.source,
        ),
        Line("time", "harvest hours", hours["harvest"], "GPU hours", "work / (peak x 0.4)", FORWARD_SOURCE),
        Line("time", "training hours", hours["training"], "GPU hours", "work / (peak x 0.5)", TRAIN_SOURCE),
        Line("time", "dashboard hours", hours["dashboards"], "GPU hours", "work / (peak x 0.4)", FORWARD_SOURCE),
        Line("time", "reading rate needed", stored / max(hours["training"] * 3600, 1e-9) / GIB, "GiB/s",
             "activations / training time on one accelerator; times their number for several"),
        Line("money", "compute", sum(hours.values()) * cost, "dollars", f"GPU hours x {cost:g}",
             "the price given" if price is not None else machine.source),
        Line("money", "labels by a language model", labels, "dollars",
             f"{many:,.0f} features x {EXPLAIN + FUZZ + DETECT:.4f}", LABEL_SOURCE),
    ]  # fmt: skip
    given = {
        "model_params": N, "d_model": d_model, "latents": F, "tokens": T, "k": k, "depth": depth,
        "hardware": hardware, "dashboard_tokens": dashboard_tokens, "bytes_a_number": bytes_a_number,
    }  # fmt: skip
    return FeaturePlan(given, machine, tuple(lines))
