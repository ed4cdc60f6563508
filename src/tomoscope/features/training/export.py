"""From a training to a dictionary that reads and writes activations as the model has them.

Scales are folded: rows of the encoder by the scale of what is read, rows of the decoder and biases by that of what is
written. BatchTopK and matryoshka become JumpReLU with the threshold that was followed; Gated is JumpReLU exactly (its
magnitude path has the gate's directions, so that the gate is a threshold on it).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tomoscope.errors import DataError
from tomoscope.features.activations import Activation, JumpReLU, ReLU, TopK
from tomoscope.features.coder import SparseCoder
from tomoscope.features.training.parameters import Part
from tomoscope.features.training.rules import B_MAG, R_MAG, THETA
from tomoscope.features.transcoders import CrossLayerTranscoder

if TYPE_CHECKING:
    from tomoscope.features.training.dictionary import DictionaryTraining


def _rule(training: DictionaryTraining, index: int, part: Part) -> tuple[Tensor, Tensor, Activation]:
    """Encoder [latent, read], bias, and activation."""
    config = training.config
    if config.architecture == "topk":
        return part.W_enc, part.b_enc, TopK(config.k)
    if config.architecture == "jumprelu":
        return part.W_enc, part.b_enc, JumpReLU(part.extras[THETA].clone())
    if config.architecture == "gated":
        grown = part.extras[R_MAG].exp()
        threshold = (part.extras[B_MAG] - grown * part.b_enc).clamp(min=0)
        return part.W_enc * grown[:, None], part.extras[B_MAG], JumpReLU(threshold)
    if config.architecture in ("batchtopk", "matryoshka"):
        limit = max(float(training.threshold[index]), 0.0)
        return part.W_enc, part.b_enc, JumpReLU(torch.full_like(part.b_enc, limit))
    return part.W_enc, part.b_enc, ReLU()


def scaled_coders(training: DictionaryTraining) -> list[SparseCoder]:
    """By part, a dictionary of scaled activations; b_dec is 0 where several parts write together."""
    parameters, out = training.parameters, []
    for index, part in enumerate(parameters.parts):
        W_enc, b_enc, activation = _rule(training, index, part)
        alone = len(parameters.parts) == 1
        b_dec = parameters.b_dec if alone else torch.zeros(part.W_dec.shape[1])
        centred, skip = training.config.is_centred, parameters.W_skip
        skip = None if skip is None else skip.clone()
        parts = (W_enc.T.contiguous(), part.W_dec.clone(), b_enc.clone(), b_dec.clone())
        out.append(SparseCoder(*parts, activation, skip, centred=centred))
    return out


def _column_scale(training: DictionaryTraining, sites: tuple[str, ...], widths: tuple[int, ...]) -> Tensor:
    return torch.cat([torch.full((w,), training.scale[s]) for s, w in zip(sites, widths, strict=True)])


@torch.no_grad()
def finished_coder(training: DictionaryTraining) -> SparseCoder:
    """The dictionary of the model's own activations.

    Raises:
        DataError: it is a cross-layer transcoder, which is made by `finished_cross_layer`.
    """
    config = training.config
    if config.cross_layer:
        raise DataError("A cross-layer transcoder is no single dictionary.", remedy="Use finished_cross_layer.")
    (coder,) = scaled_coders(training)
    read = _column_scale(training, config.reads, training.layout.reads)
    written = _column_scale(training, config.targets, training.layout.writes)
    skip = None if coder.W_skip is None else coder.W_skip * read[None, :] / written[:, None]
    return SparseCoder(
        coder.W_enc * read[:, None], coder.W_dec / written[None, :], coder.b_enc, coder.b_dec / written,
        coder.activation, skip, centred=coder.centred, reads="+".join(config.reads), writes="+".join(config.targets),
        name=config.title,
    )  # fmt: skip


@torch.no_grad()
def finished_cross_layer(training: DictionaryTraining) -> CrossLayerTranscoder:
    """The cross-layer transcoder of the model's own activations.

    Raises:
        DataError: it is a single dictionary, or its layers have different widths.
    """
    config, layout, parts = training.config, training.layout, training.parameters.parts
    if not config.cross_layer:
        raise DataError("This is a single dictionary.", remedy="Use finished_coder.")
    if len(set(layout.writes)) > 1:
        raise DataError("The layers of a cross-layer transcoder have one width.")
    width, count = layout.writes[0], len(parts)
    encoders, decoders, biases, rules = [], [], [], []
    for index, part in enumerate(parts):
        W_enc, b_enc, activation = _rule(training, index, part)
        encoders.append(W_enc.T * training.scale[config.reads[index]])
        scale = torch.tensor([training.scale[site] for site in config.writes[index:]])
        decoders.append(part.W_dec.view(config.latents, count - index, width) / scale[None, :, None])
        biases.append(b_enc.clone())
        rules.append(activation)
    b_dec = [
        b / training.scale[site] for b, site in zip(training.parameters.b_dec.split(width), config.writes, strict=True)
    ]
    first = config.reads[0]
    reads = "resid_mid" if first.endswith("resid_mid") else "mlp.in"
    return CrossLayerTranscoder(encoders, decoders, biases, b_dec, rules, reads=reads, scan=config.title)
