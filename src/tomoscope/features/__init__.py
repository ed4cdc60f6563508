"""Dictionaries of features: sparse autoencoders and transcoders as values, in the field's file formats."""

from tomoscope.features.activations import JumpReLU, ReLU, TopK
from tomoscope.features.coder import Codes, SparseCoder
from tomoscope.features.edits import FeatureEdit, only_features, without_features
from tomoscope.features.formats import load_coder, load_transcoders, save_transcoders
from tomoscope.features.native import save_coder
from tomoscope.features.splice import SpliceEdit, splice
from tomoscope.features.transcoders import CrossLayerTranscoder, Transcoders, TranscoderSet

__all__ = [
    "Codes",
    "CrossLayerTranscoder",
    "FeatureEdit",
    "JumpReLU",
    "ReLU",
    "SparseCoder",
    "SpliceEdit",
    "TopK",
    "TranscoderSet",
    "Transcoders",
    "load_coder",
    "load_transcoders",
    "only_features",
    "save_coder",
    "save_transcoders",
    "splice",
    "without_features",
]
