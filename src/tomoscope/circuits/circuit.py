"""A circuit: a set of edges of a model's graph, with how it was found; pruned, compared, printed, kept.

    circuit = Circuit(graph, mask, how={"method": "EAP", ...})
    circuit.pruned()                 without edges that lead nowhere or come from nowhere
    circuit.compare(known).edges     precision, recall, Jaccard, and the ROC area of its scores
    circuit.logits(subject, pairs)   the model with every other edge ablated
    circuit.save("ioi.json"); Circuit.load("ioi.json")

How it can mislead: an edge chosen by its score may hang in the air (its source has no input in the circuit, or nothing
reads its destination), so a circuit asked for with 100 edges can be much smaller once dead ends are pruned: numbers
here count what is there (`n_edges`), and `how` keeps what was asked for. Under an ablation other than by the paired
prompt, a part without inputs still gives a constant, so pruning can change the numbers a little. A ROC area says how
well scores rank the edges of a known circuit, not where to cut.

Steps: which destinations are the inputs of which source; pruning from both ends until nothing changes; counts and
rank areas of edges and nodes; text and JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tomoscope.circuits.graph import LOGITS, Graph, Node
from tomoscope.errors import DataError, SiteError

if TYPE_CHECKING:
    from tomoscope.circuits.wiring.ablation import Ablation
    from tomoscope.model import Subject

FORMAT, VERSION = "tomoscope circuit", 1


@lru_cache(maxsize=8)
def inputs_matrix(graph: Graph) -> Bool[Tensor, "source destination"]:
    """Which destinations are the inputs of the node that each source is the output of (as `Graph.inputs_of`)."""
    out = torch.zeros_like(graph.allowed)
    places: dict[tuple[str, int, int, bool], list[int]] = {}
    for column, reader in enumerate(graph.readers):
        places.setdefault((reader.kind, reader.layer, reader.head, ".kv" in reader.name), []).append(column)
    shared = graph.n_heads // max(1, graph.n_kv_heads)
    for row, writer in enumerate(graph.writers):
        if writer.kind in ("embed", "position"):
            continue
        own = places.get((writer.kind, writer.layer, writer.head, False), [])
        group = places.get((writer.kind, writer.layer, writer.head // shared, True), [])
        out[row, own + group] = True
    return out


@lru_cache(maxsize=8)
def starts(graph: Graph) -> Bool[Tensor, " source"]:
    """The sources that need no input: the embeddings."""
    return torch.tensor([node.kind in ("embed", "position") for node in graph.writers])


def prune(graph: Graph, mask: Bool[Tensor, "source destination"]) -> Bool[Tensor, "source destination"]:
    """The edges that lie on a way from an embedding to the logits."""
    inputs = inputs_matrix(graph)
    is_logits = torch.tensor([node.kind == LOGITS for node in graph.readers])
    mask = mask & graph.allowed
    while True:
        fed = starts(graph) | (inputs & mask.any(0)).any(1)
        alive = fed & mask.any(1)
        read = is_logits | (inputs & alive[:, None]).any(0)
        kept = mask & alive[:, None] & read
        if torch.equal(kept, mask):
            return kept
        mask = kept


@dataclass(frozen=True)
class Agreement:
    """How a found set agrees with a known one.

    Attributes:
        found: size of the found set.
        known: size of the known one.
        shared: in both.
        of: how many things there are to find.
        roc_area: that the score of a known one exceeds that of another one; None without scores, or where there is
            nothing to tell apart.
    """

    found: int
    known: int
    shared: int
    of: int
    roc_area: float | None = None

    @property
    def precision(self) -> float:
        """Share of the found that are known; 0 where nothing was found."""
        return self.shared / self.found if self.found else 0.0

    @property
    def recall(self) -> float:
        """Share of the known that were found; 1 where there is nothing to find."""
        return self.shared / self.known if self.known else 1.0

    @property
    def false_positive_rate(self) -> float:
        """Share of the others that were found."""
        others = self.of - self.known
        return (self.found - self.shared) / others if others else 0.0

    @property
    def jaccard(self) -> float:
        """Shared over all in either; 1 for two empty sets."""
        union = self.found + self.known - self.shared
        return self.shared / union if union else 1.0


@dataclass(frozen=True)
class Comparison:
    """A circuit against a known one: its edges, and its nodes."""

    edges: Agreement
    nodes: Agreement

    def __str__(self) -> str:
        lines = []
        for name, one in (("edges", self.edges), ("nodes", self.nodes)):
            area = "" if one.roc_area is None else f", ROC area {one.roc_area:.3f}"
            lines.append(
                f"{name}: {one.shared} of {one.known} known among {one.found} found (precision {one.precision:.2f}, "
                f"recall {one.recall:.2f}, Jaccard {one.jaccard:.2f}{area})"
            )
        return "\n".join(lines)


def rank_area(scores: Float[Tensor, " item"], known: Bool[Tensor, " item"]) -> float | None:
    """ROC area: how often a known item scores above another, ties counting one half; None where one kind is missing."""
    positives, negatives = int(known.sum()), int((~known).sum())
    if not positives or not negatives:
        return None
    _, place, counts = torch.unique(scores.double(), return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    ranks = (ends - (counts.double() - 1) / 2)[place]
    area = (ranks[known].sum() - positives * (positives + 1) / 2) / (positives * negatives)
    return float(area)


def node_scores(graph: Graph, scores: Float[Tensor, "source destination"]) -> Float[Tensor, " source"]:
    """The largest absolute score of an edge out of each source."""
    return scores.abs().masked_fill(~graph.allowed, 0).max(1).values


@dataclass(frozen=True, eq=False)
class Circuit:
    """A set of edges of a graph; see the module's docstring.

    Attributes:
        graph: the model's graph.
        mask: which edges are in it.
        scores: the scores that it was chosen by, NaN where an edge has none; None without.
        how: how it was found, as JSON values (method, metric, ablation, number asked for, seed ...).
    """

    graph: Graph
    mask: Bool[Tensor, "source destination"]
    scores: Float[Tensor, "source destination"] | None = None
    how: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = tuple(self.graph.allowed.shape)
        for name, value in (("mask", self.mask), ("scores", self.scores)):
            if value is not None and tuple(value.shape) != shape:
                raise DataError(f"The circuit's {name} has the shape {tuple(value.shape)}, its graph {shape}.")
        mask = self.mask.cpu().bool()
        if bool((mask & ~self.graph.allowed).any()):
            row, column = torch.nonzero(mask & ~self.graph.allowed)[0].tolist()
            raise DataError(
                f"The circuit has the edge {self.graph.sources[row]}->{self.graph.destinations[column]}, but "
                f"{self.graph.sources[row]} is not computed before it.",
                remedy="Make masks with `graph.mask(...)`, or from scores.",
            )
        object.__setattr__(self, "mask", mask)
        object.__setattr__(self, "scores", None if self.scores is None else self.scores.detach().cpu())

    @classmethod
    def of_edges(cls, graph: Graph, edges: Iterable[Sequence[str]], **how: Any) -> Circuit:
        """The circuit of edges given as (source, destination) names, or as "source->destination"."""
        return cls(graph, graph.mask(edges), how=how)

    @classmethod
    def whole(cls, graph: Graph) -> Circuit:
        """Every edge."""
        return cls(graph, graph.allowed.clone(), how={"method": "every edge"})

    # ---- what is in it

    @property
    def n_edges(self) -> int:
        """Edges that are in it."""
        return int(self.mask.sum())

    @property
    def share(self) -> float:
        """Its edges as a share of all that there can be."""
        return self.n_edges / max(1, self.graph.n_edges)

    @cached_property
    def edges(self) -> list[tuple[str, str]]:
        """(source, destination) of each edge, in the model's order."""
        return self.graph.names(self.mask)

    @cached_property
    def in_nodes(self) -> Bool[Tensor, " source"]:
        """The sources that an edge goes out of."""
        return self.mask.any(1)

    @property
    def nodes(self) -> tuple[str, ...]:
        """Names of the sources that an edge goes out of, in the model's order."""
        return tuple(name for name, there in zip(self.graph.sources, self.in_nodes.tolist(), strict=True) if there)

    @property
    def n_nodes(self) -> int:
        """How many nodes there are, the logits not counted."""
        return int(self.in_nodes.sum())

    def __len__(self) -> int:
        return self.n_edges

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Circuit):
            return NotImplemented
        return self.graph == other.graph and torch.equal(self.mask, other.mask)

    def __hash__(self) -> int:
        return hash(self.mask.numpy().tobytes())

    # ---- other circuits from it

    def pruned(self) -> Circuit:
        """Without dead ends: only edges on a way from an embedding to the logits. `how` keeps the number before."""
        mask = prune(self.graph, self.mask)
        if torch.equal(mask, self.mask):
            return self
        return replace(self, mask=mask, how={**self.how, "before pruning": self.n_edges})

    def without(self, nodes: Iterable[str]) -> Circuit:
        """Without the edges out of some nodes."""
        mask = self.mask.clone()
        mask[self.rows(nodes)] = False
        return replace(self, mask=mask)

    def rows(self, nodes: Iterable[str]) -> list[int]:
        """Rows of nodes by name."""
        known = {name: row for row, name in enumerate(self.graph.sources)}
        missing = [name for name in nodes if name not in known]
        if missing:
            raise SiteError(f"There is no node {missing[0]!r} in the graph.")
        return [known[name] for name in nodes]

    @property
    def complement(self) -> Circuit:
        """Every edge that is not in it."""
        return Circuit(self.graph, self.graph.allowed & ~self.mask, how={"method": "complement", "of": dict(self.how)})

    def logits(self, subject: Subject, pairs: Any, *, ablation: Ablation | None = None) -> Float[Tensor, "pair vocab"]:
        """Run it as a model: every edge that is not in it carries an ablated value.

        Args:
            subject: the model whose graph this is.
            pairs: a `data.PairSet`, or `Pairs`; their clean prompts are run.
            ablation: what other edges carry; by default what they carry on the pair's corrupted prompt.

        Returns:
            Logits at the last token.
        """
        from tomoscope.circuits.patching.activation import Pairs, encode_pairs
        from tomoscope.circuits.wiring.ablation import Ablation
        from tomoscope.circuits.wiring.wiring import Wiring

        made = pairs if isinstance(pairs, Pairs) else encode_pairs(subject, pairs)
        ablation = Ablation.paired(made.corrupted) if ablation is None else ablation
        return Wiring(subject, made.clean, self.graph, ablation=ablation).logits(self.mask)

    # ---- against a known one

    def compare(self, known: Circuit, *, ignore: Bool[Tensor, "source destination"] | None = None) -> Comparison:
        """Precision, recall, Jaccard and ROC area of edges and nodes.

        Args:
            known: of the same graph.
            ignore: edges that are not counted on either side.
        """
        if self.graph != known.graph:
            raise DataError("The two circuits are of different graphs.", remedy="Compare circuits of one `Graph`.")
        counted = self.graph.allowed if ignore is None else self.graph.allowed & ~ignore
        nodes = counted.any(1)
        scores = None if self.scores is None else self.scores.nan_to_num(0.0, posinf=torch.inf, neginf=-torch.inf)
        mine, theirs = self.mask & counted, known.mask & counted
        edges = _agree(mine[counted], theirs[counted], None if scores is None else scores.abs()[counted])
        by_node = None if scores is None else node_scores(self.graph, scores.masked_fill(~counted, 0))[nodes]
        return Comparison(edges, _agree(mine.any(1)[nodes], theirs.any(1)[nodes], by_node))

    # ---- print and keep

    def __repr__(self) -> str:
        method = self.how.get("method", "")
        return (
            f"Circuit({self.n_edges:,} of {self.graph.n_edges:,} edges, {self.n_nodes} of {len(self.graph.sources)} "
            f"nodes{', by ' + str(method) if method else ''})"
        )

    def __str__(self) -> str:
        lines = [repr(self)]
        rows, columns = (part.tolist() for part in torch.nonzero(self.mask, as_tuple=True))
        into: dict[int, list[int]] = {}
        for row, column in zip(rows, columns, strict=True):
            into.setdefault(column, []).append(row)
        width = max((len(self.graph.destinations[column]) for column in into), default=0)
        for column in sorted(into, key=lambda c: (-self.graph.readers[c].moment, c)):
            shown = []
            for row in into[column]:
                score = "" if self.scores is None else f" {float(self.scores[row, column]):+.3g}"
                shown.append(f"{self.graph.sources[row]}{score}")
            lines.append(f"{self.graph.destinations[column]:>{width}} <- {', '.join(shown)}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """As JSON values; `from_json` reads it back equal."""
        graph, scores = self.graph, None
        if self.scores is not None:
            flat = self.scores.double()[graph.allowed].tolist()
            scores = [value if value == value and abs(value) != float("inf") else str(value) for value in flat]
        return {
            "format": FORMAT, "version": VERSION, "how": dict(self.how),
            "graph": {
                "n_layers": graph.n_layers, "n_heads": graph.n_heads, "n_kv_heads": graph.n_kv_heads,
                "sources": [asdict(node) for node in graph.writers],
                "destinations": [asdict(node) for node in graph.readers],
            },
            "edges": [list(edge) for edge in self.edges], "scores": scores,
        }  # fmt: skip

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Circuit:
        """Read `to_json`. Raises DataError where it is none."""
        try:
            if value["format"] != FORMAT or int(value["version"]) > VERSION:
                raise DataError(
                    f"This is {value['format']!r} version {value['version']}, not {FORMAT!r} up to {VERSION}.",
                    remedy="Files of other tools are read by `circuits.read_eap_ig`; a newer version by an upgrade.",
                )
            told = value["graph"]
            writers = tuple(Node(**node) for node in told["sources"])
            readers = tuple(Node(**node) for node in told["destinations"])
            graph = Graph(writers, readers, told["n_layers"], told["n_heads"], told["n_kv_heads"])
            scores = None
            if value["scores"] is not None:
                scores = torch.full(graph.allowed.shape, torch.nan, dtype=torch.float64)
                scores[graph.allowed] = torch.tensor([float(score) for score in value["scores"]], dtype=torch.float64)
            return cls(graph, graph.mask(value["edges"]), scores, dict(value["how"]))
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise DataError(
                f"This is no circuit: {error!r}.", remedy="A circuit is what `Circuit.save` wrote."
            ) from error

    def save(self, path: str | Path) -> Path:
        """Write it as JSON; returns the path."""
        path = Path(path)
        path.write_text(json.dumps(self.to_json(), ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> Circuit:
        """Read what `save` wrote. Raises DataError where the file is not there or is no circuit."""
        try:
            value = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{path} can't be read as a circuit: {error}.") from error
        return cls.from_json(value)


def _agree(
    mine: Bool[Tensor, " item"], theirs: Bool[Tensor, " item"], scores: Float[Tensor, " item"] | None
) -> Agreement:
    area = None if scores is None else rank_area(scores, theirs)
    return Agreement(int(mine.sum()), int(theirs.sum()), int((mine & theirs).sum()), len(mine), area)
