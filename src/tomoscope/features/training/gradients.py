"""The loss of a batch and its gradients, written out: no autograd, and no dense [sample, latent] matrix is kept.

Loss: the mean over samples of the squared distance between reconstruction and target, plus the penalty, plus the
auxiliary loss. Matryoshka (Bussmann et al. 2025, arXiv:2503.17547) means it over the reconstructions by the first
`widths` latents. AuxK (Gao et al. 2024): latents that have not fired for long reconstruct what is left over.

Where few latents are active, entries are listed and all sums are bags (`bags`); where many are (ReLU at its start),
rows are taken a piece at a time and all products are dense within the piece. Both give the same gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tomoscope.features.training.bags import Active, ByLatent, bag, pair_products, stable_order, starts, sums
from tomoscope.features.training.parameters import Parameters, Part
from tomoscope.features.training.rules import THETA, back, codes, penalty, step_back
from tomoscope.features.training.select import Found, select

DENSE_ROWS = 256


@dataclass(eq=False)
class Step:
    """What one batch gave.

    Attributes:
        gradients: by parameter name.
        losses: "reconstruction", "penalty", "auxiliary", their means over samples.
        fired: by part, [latent], samples on which each latent was active.
        squared: sum of squared errors of the whole reconstruction.
        entries: active codes in all.
        thresholds: by part, see `Found`.
    """

    gradients: dict[str, Tensor]
    losses: dict[str, float] = field(default_factory=dict)
    fired: list[Int[Tensor, " latent"]] = field(default_factory=list)
    squared: float = 0.0
    entries: int = 0
    thresholds: list[float] = field(default_factory=list)

    def add(self, loss: str, value: Tensor | float) -> None:
        """Add to one of the losses."""
        self.losses[loss] = self.losses.get(loss, 0.0) + float(value)


def compute(
    parameters: Parameters,
    x: Float[Tensor, "sample read"],
    y: Float[Tensor, "sample written"],
    *,
    pressure: float = 0.0,
    dense: bool = False,
    guesses: Sequence[float | None] = (),
    dead: Sequence[Bool[Tensor, " latent"]] = (),
) -> Step:
    """Loss and gradients of one batch.

    Args:
        parameters: of the dictionary.
        x: what is read.
        y: what is to be written; where b_dec is taken from the input, `x` itself.
        pressure: coefficient of the penalty.
        dense: take dense products, a piece of rows at a time (relu, gated, jumprelu).
        guesses: of thresholds, by part.
        dead: by part, latents that get the auxiliary loss.
    """
    centred = x - parameters.b_dec if parameters.config.is_centred else x
    step = Step({name: torch.zeros_like(value) for name, value in parameters.named().items() if _summed(name)})
    work = _dense if dense else _sparse
    error, pulls = work(parameters, step, centred, y, pressure, guesses or [None] * len(parameters.parts))
    step.squared = squared(error)
    if dead and any(bool(one.any()) for one in dead):
        _auxiliary(parameters, step, centred, error, dead, pulls)
    if parameters.config.is_centred:
        part = parameters.parts[0]
        step.gradients["b_dec"] -= pulls[0] @ part.W_enc
    return step


def squared(values: Tensor) -> float:
    """The sum of squares, as one product."""
    flat = values.reshape(-1)
    return float(flat @ flat)


def _summed(name: str) -> bool:
    """Gradients that are accumulated; those of the matrices are made whole by the sums by latent."""
    return not name.startswith(("W_enc", "W_dec", "W_skip"))


# ---- few entries


def _sparse(
    parameters: Parameters, step: Step, x: Tensor, y: Tensor, pressure: float, guesses: Sequence[float | None]
) -> tuple[Tensor, list[Tensor]]:
    config, n = parameters.config, len(x)
    found = [select(config, p, x[:, p.read], guess=g) for p, g in zip(parameters.parts, guesses, strict=True)]
    step.thresholds = [one.threshold for one in found]
    if config.architecture == "matryoshka":
        return _nested(parameters, step, x, y, found[0])
    begun = [starts(one.active.sample, n) for one in found]
    values, latents = [], []
    out = None
    for part, one, start in zip(parameters.parts, found, begun, strict=True):
        own = {name: value[one.active.latent] for name, value in part.latent_parameters().items() if part.extras}
        z = codes(config, one.pre, own)
        values.append(z)
        latents.append(own)
        written = bag(one.active.latent, part.low_dec, start, z).float()
        if out is None and len(parameters.parts) == 1:
            out = written.add_(parameters.b_dec)
        else:
            out = parameters.b_dec.expand(n, -1).clone() if out is None else out
            out[:, part.write] += written
    assert out is not None
    error, upstream = _residual(parameters, step, out, x, y)
    step.gradients["b_dec"] += upstream.sum(0)
    pulls = []
    for index, (part, one, z, own) in enumerate(zip(parameters.parts, found, values, latents, strict=True)):
        active = one.active
        pull = upstream[:, part.write].contiguous()
        dz = pair_products(pull, part.W_dec, active)
        gate = None
        if config.architecture == "gated":
            via = bag(active.latent, part.W_dec, begun[index], one.pre) + parameters.b_dec
            missed = via.sub_(y)
            step.add("auxiliary", squared(missed) / n)
            gate = pair_products(missed.mul_(2 / n), part.W_dec, active)
        extra_dec = None
        if config.penalty and config.penalty != "step":
            dz, gate, extra_dec = _press(parameters, step, part, active, one.pre, z, dz, gate, pressure, n)
        turned = back(config, one.pre, dz, gate, own)
        ordered = ByLatent.of(active)
        step.gradients[f"W_dec.{index}"] = ordered.rows(pull.to(part.low), z)
        if extra_dec is not None:
            step.gradients[f"W_dec.{index}"] += extra_dec
        step.gradients[f"W_enc.{index}"] = ordered.rows(x[:, part.read].to(part.low).contiguous(), turned.row)
        step.gradients[f"b_enc.{index}"] += sums(active, turned.bias)
        for name, value in turned.extras.items():
            step.gradients[f"{name}.{index}"] += sums(active, value)
        if config.penalty == "step":
            on = int((one.pre > own[THETA]).sum())
            step.gradients[f"{THETA}.{index}"] += _count_pull(parameters, step, on, n, pressure) * sums(
                active, step_back(config, one.pre, own)
            )
        pulls.append(sums(active, turned.row))
        fired = torch.bincount(active.latent[z > 0], minlength=active.n_latents)
        step.fired.append(fired)
        step.entries += int(fired.sum())
    return error, pulls


def _residual(parameters: Parameters, step: Step, out: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The error of a reconstruction (skip path included), and the loss's gradient by it."""
    if parameters.W_skip is not None:
        out = out + x @ parameters.W_skip.T
    error = out.sub_(y)
    step.add("reconstruction", squared(error) / len(x))
    upstream = error * (2 / len(x))
    if parameters.W_skip is not None:
        step.gradients["W_skip"] = upstream.T @ x
    return error, upstream


def _press(
    parameters: Parameters, step: Step, part: Part, active: Active, pre: Tensor, z: Tensor, dz: Tensor,
    gate: Tensor | None, pressure: float, n: int,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Add the penalty's gradient to the codes (to the gate, where gated), and give that by the decoder's rows."""
    config = parameters.config
    norms = part.norms() if config.decoder == "free" else None
    value = pre if gate is not None else z
    cost, slope, by_norm = penalty(config, value, 1.0 if norms is None else norms[active.latent])
    step.add("penalty", cost.sum() * (pressure / n))
    slope = slope * (pressure / n)
    dz, gate = (dz, gate + slope) if gate is not None else (dz + slope, None)
    if norms is None:
        return dz, gate, None
    return dz, gate, _by_norm(part, sums(active, by_norm) * (pressure / n))


def _by_norm(part: Part, weight: Float[Tensor, " latent"]) -> Tensor:
    """The gradient by decoder rows of a sum of weight x norm."""
    blocks = part.W_dec.split(part.blocks, 1)
    return torch.cat([weight[:, None] * b / b.norm(dim=1, keepdim=True).clamp(min=1e-12) for b in blocks], 1)


def _count_pull(parameters: Parameters, step: Step, on: int, n: int, pressure: float) -> float:
    """JumpReLU: the loss's derivative by the number of active entries."""
    config = parameters.config
    if config.target_l0 is None:
        step.add("penalty", pressure * on / n)
        return pressure / n
    off = on / n / config.target_l0 - 1
    step.add("penalty", pressure * off**2)
    return 2 * pressure * off / (config.target_l0 * n)


def _nested(parameters: Parameters, step: Step, x: Tensor, y: Tensor, found: Found) -> tuple[Tensor, list[Tensor]]:
    """Matryoshka: entries in the order of nested dictionary and sample, so that one bag decodes all of them."""
    config, part, n = parameters.config, parameters.parts[0], len(x)
    widths = torch.tensor(config.widths, device=x.device)
    level = torch.bucketize(found.active.latent, widths, right=True)
    levels = len(widths)
    key = level * n + found.active.sample
    order = stable_order(key, levels * n)
    key, sample, latent, z = key[order], found.active.sample[order], found.active.latent[order], found.pre[order]
    by_level = Active(key, latent, levels * n, found.active.n_latents)
    added = bag(latent, part.low_dec, starts(key, levels * n), z).float().view(levels, n, -1)
    errors = added.cumsum_(0).add_(parameters.b_dec - y)
    step.add("reconstruction", squared(errors) / (n * levels))
    error = errors[-1].clone()
    # what one latent writes is in its own dictionary's reconstruction and in all wider ones
    upstream = (errors * (2 / (n * levels))).flip(0).cumsum(0).flip(0)
    step.gradients["b_dec"] += upstream[0].sum(0)
    table = upstream.reshape(levels * n, -1)
    dz = pair_products(table, part.W_dec, by_level) * (z > 0)
    by_latent = ByLatent.of(by_level)
    step.gradients["W_dec.0"] = by_latent.rows(table.to(part.low), z)
    ordered = ByLatent(by_latent.order, sample[by_latent.order], by_latent.start)
    step.gradients["W_enc.0"] = ordered.rows(x.to(part.low), dz)
    pull = sums(by_level, dz)
    step.gradients["b_enc.0"] += pull
    fired = torch.bincount(latent[z > 0], minlength=by_level.n_latents)
    step.fired.append(fired)
    step.entries = int(fired.sum())
    return error, [pull]


# ---- many entries


def _dense(
    parameters: Parameters, step: Step, x: Tensor, y: Tensor, pressure: float, guesses: Sequence[float | None]
) -> tuple[Tensor, list[Tensor]]:
    config, n = parameters.config, len(x)
    low = parameters.parts[0].low
    parts = parameters.parts
    for index, part in enumerate(parts):
        step.gradients[f"W_enc.{index}"] = torch.zeros_like(part.W_enc)
        step.gradients[f"W_dec.{index}"] = torch.zeros_like(part.W_dec)
        step.fired.append(torch.zeros(len(part.b_enc), dtype=torch.long, device=x.device))
    if parameters.W_skip is not None:
        skip = torch.zeros_like(parameters.W_skip)
    decoders = [part.low_dec for part in parts]
    norms = [part.norms() if config.decoder == "free" and config.penalty != "step" else None for part in parts]
    weights = [torch.zeros_like(part.b_enc) for part in parts]
    pulls = [torch.zeros_like(part.b_enc) for part in parts]
    counts = [torch.zeros_like(part.b_enc) for part in parts]
    on = [0] * len(parts)
    errors = []
    for first in range(0, n, DENSE_ROWS):
        rows, target = x[first : first + DENSE_ROWS], y[first : first + DENSE_ROWS]
        out = parameters.b_dec.expand(len(rows), -1).clone()
        held = []
        for part, decoder in zip(parts, decoders, strict=True):
            pre = part.preactivations(part.widened(rows[:, part.read])).float()
            z = codes(config, pre, part.latent_parameters())
            out[:, part.write] += (z.to(low) @ decoder).float()
            held.append((pre, z))
        if parameters.W_skip is not None:
            out += rows @ parameters.W_skip.T
        error = out.sub_(target)
        errors.append(error)
        upstream = error * (2 / n)
        if parameters.W_skip is not None:
            skip += upstream.T @ rows
        step.gradients["b_dec"] += upstream.sum(0)
        for index, (part, (pre, z)) in enumerate(zip(parts, held, strict=True)):
            own = part.latent_parameters()
            pull = upstream[:, part.write].to(low)
            dz = (pull @ decoders[index].T).float()
            gate = None
            if config.architecture == "gated":
                opened = pre.clamp(min=0)
                missed = (opened.to(low) @ decoders[index]).float() + parameters.b_dec - target
                step.add("auxiliary", missed.square().sum() / n)
                gate = ((missed * (2 / n)).to(low) @ decoders[index].T).float()
            if config.penalty != "step":
                value = pre.clamp(min=0) if gate is not None else z
                norm = norms[index]
                cost, slope, by_norm = penalty(config, value, 1.0 if norm is None else norm)
                step.add("penalty", cost.sum() * (pressure / n))
                slope *= pressure / n
                if gate is not None:
                    gate = gate + slope
                else:
                    dz = dz + slope
                weights[index] += by_norm.sum(0) * (pressure / n)
            else:
                on[index] += int((pre > own[THETA]).sum())
                counts[index] += step_back(config, pre, own).sum(0)
            turned = back(config, pre, dz, gate, own)
            step.gradients[f"W_dec.{index}"] += (z.to(low).T @ pull).float()
            step.gradients[f"W_enc.{index}"] += (turned.row.to(low).T @ rows[:, part.read].to(low)).float()
            step.gradients[f"b_enc.{index}"] += turned.bias.sum(0)
            for name, value in turned.extras.items():
                step.gradients[f"{name}.{index}"] += value.sum(0)
            pulls[index] += turned.row.sum(0)
            step.fired[index] += (z > 0).sum(0)
    for index, part in enumerate(parts):
        if norms[index] is not None:
            step.gradients[f"W_dec.{index}"] += _by_norm(part, weights[index])
        if config.penalty == "step":
            pull = _count_pull(parameters, step, on[index], n, pressure)
            step.gradients[f"{THETA}.{index}"] += pull * counts[index]
    if parameters.W_skip is not None:
        step.gradients["W_skip"] = skip
    step.entries = sum(int(fired.sum()) for fired in step.fired)
    step.thresholds = [0.0] * len(parts)
    error = torch.cat(errors)
    step.add("reconstruction", squared(error) / n)
    return error, pulls


# ---- latents that do not fire


def _auxiliary(
    parameters: Parameters, step: Step, x: Tensor, error: Tensor, dead: Sequence[Tensor], pulls: list[Tensor]
) -> None:
    """AuxK: of the dead latents the k best of each sample reconstruct what is left (which is taken as given)."""
    config, n = parameters.config, len(x)
    for index, (part, mask) in enumerate(zip(parameters.parts, dead, strict=True)):
        which = mask.nonzero()[:, 0]
        k = (part.W_dec.shape[1] // 2) if config.auxk is None else config.auxk
        if not len(which) or not k:
            continue
        share = config.auxk_coefficient * min(1.0, len(which) / k)
        low = part.low
        encoder, decoder, bias = part.rows[which], part.W_dec[which].to(low), part.b_enc[which].to(low)
        d_enc, d_dec = torch.zeros_like(part.W_enc[which]), torch.zeros_like(part.W_dec[which])
        d_bias = torch.zeros_like(part.b_enc[which])
        for first in range(0, n, DENSE_ROWS):
            rows = x[first : first + DENSE_ROWS, part.read].to(low)
            pre = torch.addmm(bias, rows, encoder.T).clamp_(min=0)
            if len(which) > k:
                best, place = pre.topk(k, dim=1, sorted=False)
                pre = torch.zeros_like(pre).scatter_(1, place, best)
            missed = (pre @ decoder).float() + error[first : first + DENSE_ROWS, part.write]
            step.add("auxiliary", share * squared(missed) / n)
            pull = (missed * (2 * share / n)).to(low)
            d_dec += (pre.T @ pull).float()
            d_pre = (pull @ decoder.T) * (pre > 0)
            d_enc += (d_pre.T @ rows).float()
            d_bias += d_pre.float().sum(0)
        step.gradients[f"W_enc.{index}"].index_add_(0, which, d_enc)
        step.gradients[f"W_dec.{index}"].index_add_(0, which, d_dec)
        step.gradients[f"b_enc.{index}"].index_add_(0, which, d_bias)
        pulls[index].index_add_(0, which, d_bias)
