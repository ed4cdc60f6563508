"""Training dictionaries of features: sparse autoencoders, transcoders, crosscoders, cross-layer transcoders."""

from __future__ import annotations

from tomoscope.features.training.config import ARCHITECTURES, TrainConfig
from tomoscope.features.training.dictionary import DictionaryTraining, Figures
from tomoscope.features.training.diffing import Differences, train_differences
from tomoscope.features.training.export import finished_coder, finished_cross_layer
from tomoscope.features.training.start import geometric_median
from tomoscope.features.training.train import Training, train

__all__ = [
    "ARCHITECTURES",
    "DictionaryTraining",
    "Differences",
    "Figures",
    "TrainConfig",
    "Training",
    "finished_coder",
    "finished_cross_layer",
    "geometric_median",
    "train",
    "train_differences",
]
