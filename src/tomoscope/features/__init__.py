"""Dictionaries of features: sparse autoencoders and transcoders as values, in the field's file formats."""

from tomoscope.features.absorption import Absorption, ClassAbsorption, measure_absorption
from tomoscope.features.activations import JumpReLU, ReLU, TopK
from tomoscope.features.baselines import measure_baselines, neuron_coder, pca_coder, random_coder
from tomoscope.features.book import Context, FeatureBook
from tomoscope.features.coder import Codes, SparseCoder
from tomoscope.features.codes import CodeStore, Entries, harvest_codes
from tomoscope.features.dashboard import DashboardOptions, make_dashboards
from tomoscope.features.edits import FeatureEdit, only_features, without_features
from tomoscope.features.formats import load_coder, load_transcoders, save_transcoders
from tomoscope.features.index import FeatureIndex, Hit, build_index
from tomoscope.features.interop import FORMATS, export_coder, import_coder, recentred
from tomoscope.features.interop_gemma import load_gemma_scope_2
from tomoscope.features.label_models import Cached, Endpoint, LanguageModel, LocalModel
from tomoscope.features.label_rules import Clause, Rule, learn_rule
from tomoscope.features.label_scores import Judge, Label, ModelJudge, RuleJudge
from tomoscope.features.labels import (
    Explainer,
    Labeller,
    LabelPlan,
    ModelExplainer,
    RuleExplainer,
    ScoredLabel,
    index_labels,
    plan_labels,
    read_labels,
    say_of,
)
from tomoscope.features.native import save_coder
from tomoscope.features.neuronpedia import export_batches, export_import_tree
from tomoscope.features.perturbation import Perturbation, spurious_removal, targeted_perturbation
from tomoscope.features.planning import HARDWARE, FeaturePlan, Hardware, plan_features
from tomoscope.features.probing import ProbeScore, PromptCodes, dense_probe, prompt_codes, sparse_probe
from tomoscope.features.quality import Quality, measure_activations, measure_coder
from tomoscope.features.samples import Samples, samples
from tomoscope.features.splice import SpliceEdit, splice
from tomoscope.features.stability import Stability, match_features
from tomoscope.features.transcoders import CrossLayerTranscoder, Transcoders, TranscoderSet

__all__ = [
    "FORMATS",
    "HARDWARE",
    "Absorption",
    "Cached",
    "ClassAbsorption",
    "Clause",
    "CodeStore",
    "Codes",
    "Context",
    "CrossLayerTranscoder",
    "DashboardOptions",
    "Endpoint",
    "Entries",
    "Explainer",
    "FeatureBook",
    "FeatureEdit",
    "FeatureIndex",
    "FeaturePlan",
    "Hardware",
    "Hit",
    "Judge",
    "JumpReLU",
    "Label",
    "LabelPlan",
    "Labeller",
    "LanguageModel",
    "LocalModel",
    "ModelExplainer",
    "ModelJudge",
    "Perturbation",
    "ProbeScore",
    "PromptCodes",
    "Quality",
    "ReLU",
    "Rule",
    "RuleExplainer",
    "RuleJudge",
    "Samples",
    "ScoredLabel",
    "SparseCoder",
    "SpliceEdit",
    "Stability",
    "TopK",
    "TranscoderSet",
    "Transcoders",
    "build_index",
    "dense_probe",
    "export_batches",
    "export_coder",
    "export_import_tree",
    "harvest_codes",
    "import_coder",
    "index_labels",
    "learn_rule",
    "load_coder",
    "load_gemma_scope_2",
    "load_transcoders",
    "make_dashboards",
    "match_features",
    "measure_absorption",
    "measure_activations",
    "measure_baselines",
    "measure_coder",
    "neuron_coder",
    "only_features",
    "pca_coder",
    "plan_features",
    "plan_labels",
    "prompt_codes",
    "random_coder",
    "read_labels",
    "recentred",
    "samples",
    "save_coder",
    "save_transcoders",
    "say_of",
    "sparse_probe",
    "splice",
    "spurious_removal",
    "targeted_perturbation",
    "without_features",
]
