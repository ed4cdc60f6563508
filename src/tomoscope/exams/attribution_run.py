"""One prompt's attribution graph, tested on the model itself: what `tomoscope graph` prints, and the exam's unit.

    traced = trace(subject, transcoders, "The capital of France is", seed=0)
    traced.graph, traced.scores, traced.tested      the graph, how much of it is explained, what interventions say
    traced.save("france")                           the field's JSON, our own files

Which features matter is asked of the graph; whether they do is asked of the model: each of the most influential ones
is taken away, and as many others that are active on the prompt, drawn at random. The graph is right where the first
change the answer more than the second, and by as much as it said.

How it can mislead: one prompt is one prompt; influence adds absolute values, so a feature whose paths cancel is called
important and changes nothing; the interventions keep attention as it was, and let MLPs react through the transcoders
(mode "iterative") or by themselves ("free").

Steps: local replacement model; graph; influence; interventions; a document.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tomoscope.circuits.attribution import (
    AttributionGraph,
    InterventionCheck,
    LocalReplacement,
    Pruned,
    QKAttribution,
    Scores,
    attribution_graph,
    check_interventions,
    prune,
    qk_attribution,
    save,
    scores,
    suppress,
    write_neuronpedia,
)
from tomoscope.errors import DataError
from tomoscope.features import Transcoders, load_transcoders
from tomoscope.findings.files import write_json
from tomoscope.model import Subject
from tomoscope.model.inputs import Prompts

__all__ = ["LocalReplacement", "Traced", "load_transcoders", "trace", "why_attends"]
TESTED = 8
"""Features that are taken away, and as many others."""


@dataclass(frozen=True, eq=False)
class Traced:
    """A graph and what became of its claims.

    Attributes:
        graph: the whole graph.
        pruned: what is shown of it.
        scores: how much of it is explained.
        chosen: numbers of the most influential features, the most influential first.
        others: as many other active features, drawn at random; fewer where there are no more.
        tested: each of `chosen`, then each of `others`, taken away: what the graph foretold and what came.
        together: all of `chosen` at once, then all of `others`.
    """

    graph: AttributionGraph
    pruned: Pruned
    scores: Scores
    chosen: tuple[int, ...]
    others: tuple[int, ...]
    tested: InterventionCheck
    together: InterventionCheck

    def effects(self, logit: int = 0, *, together: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Change of a logit (less the mean logit) without each of the chosen, and without each of the others."""
        check = self.together if together else self.tested
        moved = check.actual[:, self.graph.n_features + logit].double().cpu().numpy()
        cut = 1 if together else len(self.chosen)
        return moved[:cut], moved[cut:]

    def document(self) -> dict[str, Any]:
        """What was found, as JSON values."""
        graph = self.graph
        first, rest = self.effects()
        names = [graph.node(number).name for number in (*self.chosen, *self.others)]
        told = self.tested.predicted[:, graph.n_features].tolist()
        came = [*first.tolist(), *rest.tolist()]
        rows = [
            {
                "feature": name, "influence": float(self.pruned.influence[number]), "drawn": place >= len(self.chosen),
                "foretold": told[place], "came": came[place],
            }
            for place, (name, number) in enumerate(zip(names, (*self.chosen, *self.others), strict=True))
        ]  # fmt: skip
        return {
            "model": graph.model, "transcoders": graph.scan, "tokens": list(graph.tokens),
            "logits": [
                {"token": name, "probability": float(p)}
                for name, p in zip(graph.logit_names, graph.logit_probabilities, strict=True)
            ],
            "features": graph.n_features, "nodes": graph.n_nodes, "edges": graph.n_edges,
            "shown": {"nodes": int(self.pruned.nodes.sum()), "edges": int(self.pruned.edges.sum())},
            "replacement_score": self.scores.replacement, "completeness_score": self.scores.completeness,
            "unexpanded_influence": self.scores.unexpanded,
            "taken_away": rows, "answer": graph.logit_names[0], "mode": self.tested.mode,
        }  # fmt: skip

    def save(self, folder: str | Path, *, slug: str = "graph") -> list[Path]:
        """Write the document, the pruned graph in the field's JSON, and the whole graph."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "trace.json", self.document())
        save(self.graph, folder / "whole")
        return [folder / "trace.json", write_neuronpedia(self.pruned, folder, slug=slug), folder / "whole"]


def why_attends(frozen: LocalReplacement, *, layer: int, head: int, query: int, key: int) -> QKAttribution:
    """Why a head attends from one token to another: its score as a sum over nodes of the query and of the key.

    Raises:
        SiteError: there is no such head, or the query does not see the key.
    """
    return qk_attribution(frozen, layer=layer, head=head, query=query, key=key)


@torch.no_grad()
def trace(
    subject: Subject,
    transcoders: Transcoders,
    prompt: Prompts,
    *,
    targets: list[int | str] | None = None,
    max_features: int | None = None,
    nodes: float = 0.8,
    edges: float = 0.98,
    tested: int = TESTED,
    mode: str = "iterative",
    seed: int = 0,
    frozen: LocalReplacement | None = None,
    progress: Callable[[str], None] | None = None,
) -> Traced:
    """The attribution graph of a prompt, and the test of it.

    Args:
        subject: a decoder.
        transcoders: for each of its layers.
        prompt: one prompt.
        targets: tokens to explain; by default those that reach 0.95 of the probability.
        max_features: of active features only so many get rows.
        nodes, edges: shares of the influence that the shown part holds.
        tested: how many features are taken away, and how many others.
        mode: of the interventions: "iterative", "free", or "constrained".
        seed: of the others.
        frozen: the prompt's local replacement model, where it was made before.
        progress: called with what is done next.

    Raises:
        DataError: no feature is active on the prompt.
    """
    said = progress or (lambda text: None)
    if frozen is None:
        said("freezing the model on this prompt")
        frozen = LocalReplacement.of(subject, transcoders, prompt)
    said(f"attributing {frozen.n_active:,} active features")
    graph = attribution_graph(
        subject, transcoders, prompt, targets=targets, max_features=max_features, replacement=frozen
    )
    if not graph.n_features:
        raise DataError(
            "No feature of these transcoders is active on this prompt.",
            remedy="Are they this model's, and of this site? A prompt of one token has no features either.",
        )
    pruned = prune(graph, nodes=nodes, edges=edges)
    order = pruned.influence[: graph.n_features].argsort(descending=True).tolist()
    chosen, rest = order[:tested], order[tested:]
    drawn = np.random.default_rng(seed).permutation(len(rest))[: len(chosen)]
    others = [rest[i] for i in drawn]
    said(f"taking away {len(chosen)} features, and {len(others)} others")
    singles = [[number] for number in (*chosen, *others)]
    groups = [group for group in (chosen, others) if group]
    check = check_interventions(graph, frozen, [suppress(graph, some) for some in (*singles, *groups)], mode=mode)
    single, both = (_sets(check, some) for some in (slice(len(singles)), slice(len(singles), None)))
    return Traced(graph, pruned, scores(graph), tuple(chosen), tuple(others), single, both)


def _sets(check: InterventionCheck, some: slice) -> InterventionCheck:
    """Some of the sets of a check."""
    parts = {name: getattr(check, name)[some] for name in ("predicted", "actual", "compared")}
    return replace(check, **parts)
