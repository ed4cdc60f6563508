"""Dictionaries of features: sparse autoencoders and transcoders as values, in the field's file formats."""

from tomoscope.features.absorption import Absorption, ClassAbsorption, measure_absorption
from tomoscope.features.activations import JumpReLU, ReLU, TopK
from tomoscope.features.baselines import measure_baselines, neuron_coder, pca_coder, random_coder
from tomoscope.features.coder import Codes, SparseCoder
from tomoscope.features.edits import FeatureEdit, only_features, without_features
from tomoscope.features.formats import load_coder, load_transcoders, save_transcoders
from tomoscope.features.perturbation import Perturbation, spurious_removal, targeted_perturbation
from tomoscope.features.probing import ProbeScore, PromptCodes, dense_probe, prompt_codes, sparse_probe
from tomoscope.features.quality import Quality, measure_activations, measure_coder
from tomoscope.features.samples import Samples, samples
from tomoscope.features.stability import Stability, match_features
from tomoscope.features.transcoders import CrossLayerTranscoder, Transcoders, TranscoderSet

__all__ = [
    "Absorption",
    "ClassAbsorption",
    "Codes",
    "CrossLayerTranscoder",
    "FeatureEdit",
    "JumpReLU",
    "Perturbation",
    "ProbeScore",
    "PromptCodes",
    "Quality",
    "ReLU",
    "Samples",
    "SparseCoder",
    "Stability",
    "TopK",
    "TranscoderSet",
    "Transcoders",
    "dense_probe",
    "load_coder",
    "load_transcoders",
    "match_features",
    "measure_absorption",
    "measure_activations",
    "measure_baselines",
    "measure_coder",
    "neuron_coder",
    "only_features",
    "pca_coder",
    "prompt_codes",
    "random_coder",
    "samples",
    "save_transcoders",
    "sparse_probe",
    "spurious_removal",
    "targeted_perturbation",
    "without_features",
]
