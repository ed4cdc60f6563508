"""The tuned lens: a learned affine translator per layer, from that layer's basis to the last one's.

Belrose et al. 2023, "Eliciting Latent Predictions from Transformers with the Tuned Lens", arXiv:2303.08112. The
translator of a stream h is h + A h + b, started at A = 0, b = 0 (the logit lens), and trained to minimise KL(final ||
lens) on text. All layers train side by side: their losses are independent, so one pass over the text serves them all.
The optimiser is the paper's: SGD with Nesterov momentum 0.9, learning rate 1 x (1 - momentum) falling linearly to 0,
gradient norm at most 1 (per layer here), weight decay 1e-3; `optimiser="adam"` for small models and little text.

How it can mislead: a translator is trained to reproduce the final answer, so it can add what the layer does not use;
the number to quote is its KL on text that it was not trained on, next to the plain lens's, and both are kept in the
file.

Steps: draw a batch of prompts, stream the activations, accumulate gradients a few rows at a time, step; at the end
measure both lenses on held-out prompts. A saved lens is a folder of lens.safetensors and lens.json, written whole or
not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tomoscope.errors import DataError, LedgerError, nearest
from tomoscope.observe.lens import CHUNK_BYTES, kl_divergence, logit_lens, row_chunks, stream_sites
from tomoscope.observe.samples import stream_samples

FORMAT = 1


@dataclass(frozen=True)
class LensTraining:
    """How a tuned lens was made.

    Attributes:
        steps: steps taken (fewer than asked for if the text ran out).
        tokens: tokens trained on.
        optimiser, learning_rate, momentum, weight_decay, batch_prompts: as given.
        held_out_tokens: tokens on which the two KLs below were measured.
        kl: per site, the tuned lens's mean KL(final || lens) on held-out text, in nats.
        plain_kl: per site, the plain logit lens's on the same tokens.
    """

    steps: int
    tokens: int
    optimiser: str
    learning_rate: float
    momentum: float
    weight_decay: float
    batch_prompts: int
    held_out_tokens: int
    kl: tuple[float, ...]
    plain_kl: tuple[float, ...]


@dataclass(frozen=True)
class TunedLens:
    """Affine translators of every stream but the last.

    Attributes:
        sites: the streams translated, "layer.0.resid_pre" to the last block but one.
        weight: [site, d_model, d_model], A of h + h A^T + b.
        bias: [site, d_model].
        model: name of the model that it was trained on.
        training: how it was made and how well it does on held-out text.
    """

    sites: tuple[str, ...]
    weight: Float[Tensor, "site d_model d_model"]
    bias: Float[Tensor, "site d_model"]
    model: str
    training: LensTraining

    def translate(self, site: str, stream: Float[Tensor, "sample d_model"]) -> Float[Tensor, "sample d_model"]:
        """One site's stream in the last layer's basis, in the stream's own dtype."""
        if site not in self.sites:
            raise DataError(f"This tuned lens has no translator for {site!r}.", remedy=nearest(site, self.sites))
        index = self.sites.index(site)
        exact = stream.float()
        weight, bias = self.weight[index].to(exact.device), self.bias[index].to(exact.device)
        return (exact + exact @ weight.T + bias).to(stream.dtype)

    def save(self, folder: str | Path) -> Path:
        """Write the lens as a folder, whole or not at all; a lens already there is replaced.

        Raises:
            LedgerError: the folder can't be written.
        """
        folder = Path(folder)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        except OSError as error:
            raise LedgerError(
                f"The tuned lens can't be written to {folder}: {error}.", remedy="Choose another folder."
            ) from error
        try:
            self._write(staging)
            old = staging.with_name(staging.name + "-old")
            if folder.exists():
                os.replace(folder, old)
            os.replace(staging, folder)
            shutil.rmtree(old, ignore_errors=True)
        except (OSError, SafetensorError) as error:
            raise LedgerError(
                f"The tuned lens can't be written to {folder}: {error}.", remedy="Free space, or choose another folder."
            ) from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        return folder

    def _write(self, folder: Path) -> None:
        tensors = folder / "lens.safetensors"
        save_file({"weight": self.weight.contiguous(), "bias": self.bias.contiguous()}, tensors)
        record = {
            "format": FORMAT,
            "model": self.model,
            "sites": list(self.sites),
            "d_model": self.weight.shape[-1],
            "training": asdict(self.training),
            "sha256": hashlib.sha256(tensors.read_bytes()).hexdigest(),
        }
        (folder / "lens.json").write_text(json.dumps(record, indent=2))

    @classmethod
    def load(cls, folder: str | Path, *, subject: Any = None) -> TunedLens:
        """Read a lens back; with a subject, check that it fits that model.

        Raises:
            DataError: no lens there, a truncated or altered file, or a lens of another model's shape.
        """
        folder = Path(folder)
        try:
            record = json.loads((folder / "lens.json").read_text())
            raw = (folder / "lens.safetensors").read_bytes()
            if record["format"] != FORMAT or hashlib.sha256(raw).hexdigest() != record["sha256"]:
                raise DataError(
                    f"The tuned lens in {folder} was altered or is of another version.", remedy="Train it again."
                )
            tensors = load_file(folder / "lens.safetensors")
            made: Any = record["training"]
            training = LensTraining(**(made | {"kl": tuple(made["kl"]), "plain_kl": tuple(made["plain_kl"])}))
            lens = cls(tuple(record["sites"]), tensors["weight"], tensors["bias"], record["model"], training)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise DataError(
                f"There is no readable tuned lens in {folder}: {error}.", remedy="Train one with train_tuned_lens."
            ) from error
        if subject is not None and (
            lens.sites != stream_sites(subject)[:-1] or record["d_model"] != subject.facts.d_model
        ):
            raise DataError(
                f"The tuned lens in {folder} is for {lens.model} ({len(lens.sites)} layers of width "
                f"{record['d_model']}), not for {subject.name} ({subject.facts.n_layers} layers of width "
                f"{subject.facts.d_model}).",
                remedy="Train one for this model.",
            )
        return lens


def train_tuned_lens(
    subject: Any,
    prompts: Iterable[Any],
    held_out: Iterable[Any],
    *,
    steps: int = 250,
    batch_prompts: int = 16,
    optimiser: str = "sgd",
    learning_rate: float | None = None,
    momentum: float = 0.9,
    weight_decay: float = 1e-3,
    chunk_bytes: int = CHUNK_BYTES,
) -> TunedLens:
    """Train a translator for every stream but the last, on every token of the prompts.

    Args:
        subject: an opened model with an unembedding; its weights are not touched.
        prompts: training text; gone through again if it is a collection shorter than steps x batch_prompts.
        held_out: prompts that are not among these, on which the KL to the final distribution is measured.
        steps: optimiser steps.
        batch_prompts: prompts of one step.
        optimiser: "sgd" (the paper's) or "adam".
        learning_rate: at the start, before the linear decay; default 1 - momentum for SGD, 1e-3 for Adam.
        momentum, weight_decay: of SGD; Adam takes neither.
        chunk_bytes: bound on the memory that logits take at once.

    Raises:
        DataError: no training or held-out prompts, or an unknown optimiser.
    """
    if optimiser not in ("sgd", "adam"):
        raise DataError(f"optimiser={optimiser!r} is unknown.", remedy="It is 'sgd' or 'adam'.")
    held_out = list(held_out)
    if not held_out:
        raise DataError("The tuned lens has no held-out prompts.", remedy="Keep some prompts out of training.")
    sites = stream_sites(subject)[:-1]
    width = subject.facts.d_model
    weight = torch.zeros(len(sites), width, width, device=subject.device, requires_grad=True)
    bias = torch.zeros(len(sites), width, device=subject.device, requires_grad=True)
    rate = learning_rate if learning_rate is not None else (1 - momentum if optimiser == "sgd" else 1e-3)
    if optimiser == "sgd":
        stepper: torch.optim.Optimizer = torch.optim.SGD(
            [weight, bias], lr=rate, momentum=momentum, nesterov=momentum > 0, weight_decay=weight_decay
        )
    else:
        stepper = torch.optim.Adam([weight, bias], lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(stepper, lambda step: 1 - step / max(1, steps))
    taken = tokens = 0
    for batch in islice(_batches(prompts, batch_prompts), steps):
        stepper.zero_grad()
        count = _accumulate(subject, batch, sites, weight, bias, chunk_bytes)
        _scale_gradients(weight, bias, count)
        stepper.step()
        schedule.step()
        taken, tokens = taken + 1, tokens + count
    if not taken:
        raise DataError("The tuned lens was given no training prompts.", remedy="Give a corpus.")
    training = LensTraining(taken, tokens, optimiser, rate, momentum, weight_decay, batch_prompts, 0, (), ())
    lens = TunedLens(sites, weight.detach().cpu(), bias.detach().cpu(), subject.name, training)
    return _measured(subject, lens, held_out, chunk_bytes)


def _batches(prompts: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Batches of prompts; a collection starts over at its end, an iterator does not."""
    once = iter(prompts)
    while True:
        found = False
        while batch := list(islice(once, size)):
            found = True
            yield batch
        if iter(prompts) is prompts or not found:
            return
        once = iter(prompts)


def _accumulate(
    subject: Any, batch: list[Any], sites: tuple[str, ...], weight: Tensor, bias: Tensor, chunk_bytes: int
) -> int:
    """Add the gradient of the summed KL over a batch's tokens; returns the number of tokens."""
    tokens = 0
    for activations, samples in stream_samples(subject, batch, *sites, "logits", at=None):
        streams = torch.stack([samples.take(activations[site]) for site in sites]).to(weight.device)
        logits = samples.take(activations["logits"]).to(weight.device)
        # four arrays of [site, row, vocab] live at once: logits, their softmax, and the gradients of both
        for rows in row_chunks(len(samples), 4 * len(sites) * logits.shape[-1], chunk_bytes):
            stream = streams[:, rows].float()
            translated = stream + torch.einsum("srd,sed->sre", stream, weight) + bias[:, None]
            decoded = subject.unembed(translated.to(streams.dtype)).float().log_softmax(-1)
            final = logits[rows].float().log_softmax(-1)
            kl_divergence(final.expand_as(decoded), decoded).sum().backward()
        tokens += len(samples)
    return tokens


def _scale_gradients(weight: Tensor, bias: Tensor, count: int) -> None:
    """From sums to means over tokens, and each layer's norm to at most 1."""
    if weight.grad is None or bias.grad is None:
        raise DataError("A training batch of the tuned lens held no tokens.", remedy="Give prompts with tokens.")
    norm = (weight.grad.flatten(1).square().sum(1) + bias.grad.square().sum(1)).sqrt() / count
    factor = 1 / (count * norm.clamp(min=1.0))
    weight.grad.mul_(factor[:, None, None])
    bias.grad.mul_(factor[:, None])


def _measured(subject: Any, lens: TunedLens, held_out: list[Any], chunk_bytes: int) -> TunedLens:
    """The lens with its KL on held-out prompts, beside the plain lens's."""
    tuned = logit_lens(subject, held_out, at=None, lens=lens, chunk_bytes=chunk_bytes)
    plain = logit_lens(subject, held_out, at=None, chunk_bytes=chunk_bytes)
    training = replace(
        lens.training,
        held_out_tokens=len(tuned.prompt),
        kl=tuple(tuned.kl[:-1].mean(1).tolist()),
        plain_kl=tuple(plain.kl[:-1].mean(1).tolist()),
    )
    return replace(lens, training=training)
