"""MODEL -> SITES: open any model, read its sites, edit them, take gradients, generate, look at its weights."""

from tomoscope.model.batch import Batch, Encoded
from tomoscope.model.edits import Edit, add, noise, project_out, replace, scale, scatter, zero
from tomoscope.model.facts import Facts, SiteInfo
from tomoscope.model.loading import EMBEDDED, open_model
from tomoscope.model.opening import build_subject
from tomoscope.model.results import Activations, Gradients, Run
from tomoscope.model.sites import Site
from tomoscope.model.subject import Subject
from tomoscope.model.weights import Factored, Layered, Weights

__all__ = [
    "EMBEDDED",
    "Activations",
    "Batch",
    "Edit",
    "Encoded",
    "Factored",
    "Facts",
    "Gradients",
    "Layered",
    "Run",
    "Site",
    "SiteInfo",
    "Subject",
    "Weights",
    "add",
    "build_subject",
    "noise",
    "open_model",
    "project_out",
    "replace",
    "scale",
    "scatter",
    "zero",
]
