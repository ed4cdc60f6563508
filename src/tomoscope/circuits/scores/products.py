"""Sums over tokens of (difference of a source) . (gradient at a destination), for every edge, tile by tile.

Differences and gradients are kept in factored form; a tile of tokens is expanded at a time, so memory does not grow
with edges and every source is expanded once. What a norm's scale loses along the centred stream (`gradients`) is
one product of differences with streams for all layers together, and small ones of the result.

Steps: choose tiles of real tokens (all tokens of one position each, where positions are asked for); expand the sources;
multiply them with the gradients of a few layers at a time, so that the products are large; subtract the norms' part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tomoscope.circuits.scores.gradients import InputGradients, Norms, reading_weights
from tomoscope.circuits.wiring.ports import Ports
from tomoscope.circuits.wiring.sources import Sources
from tomoscope.model import Batch, Subject

TILE_BYTES = 1 << 26  # of expanded sources
GROUP_COLUMNS = 64  # destinations multiplied together


def edge_products(
    subject: Subject,
    ports: Ports,
    norms: Norms,
    differences: Sources,
    gradients: InputGradients,
    batch: Batch,
    *,
    group: int = 0,
    by_position: bool = False,
) -> Float[Tensor, "place source destination"]:
    """Sum over pairs and tokens of difference . gradient, in float64 on the CPU; the sign is that of their product.

    Args:
        subject: the model.
        ports: of its graph.
        norms: the maps of its norms.
        differences: of every source, [pair, position, ...].
        gradients: at every destination.
        batch: the pairs' prompts, whose padding counts for nothing.
        group: which group of the gradients.
        by_position: keep positions (counted from a prompt's first token) apart.

    Returns:
        [place, source, destination], with one place if positions are not kept apart.
    """
    products = _Products(subject, ports, norms, differences, gradients, group)
    places = max(batch.lengths) if by_position else 1
    shape = (places, len(ports.graph.sources), len(ports.graph.destinations))
    out = torch.zeros(shape, dtype=torch.float64, device=subject.device)
    for place, tokens in tiles(batch, products.tile, by_position=by_position):
        out[place] += products.of(tokens.to(subject.device))
    return (out * ports.graph.allowed.to(out.device)).cpu()


def tiles(batch: Batch, size: int, *, by_position: bool) -> Iterator[tuple[int, Int[Tensor, " token"]]]:
    """(place, tokens as numbers of pair x column) such that a tile has one place, if they are kept apart."""
    tokens = torch.nonzero(batch.mask.cpu().flatten())[:, 0]
    if not by_position:
        for tile in tokens.split(size):
            yield 0, tile
        return
    places = (torch.arange(batch.width)[None] - batch.pads.cpu()[:, None]).flatten()[tokens]
    for place in places.unique().tolist():
        for tile in tokens[places == place].split(size):
            yield int(place), tile


def tile_size(subject: Subject, rows: int) -> int:
    """Tokens of a tile in which each has so many vectors."""
    size = (subject.facts.d_model or 1) * (torch.finfo(precision_of(subject)).bits // 8)
    return max(1, TILE_BYTES // (rows * size))


def precision_of(subject: Subject) -> torch.dtype:
    """The type in which products are summed: float64 for a float64 model, else float32."""
    return torch.float64 if subject.dtype == torch.float64 else torch.float32


class Expansion:
    """Sources from factored form to what they add to the stream.

    Args:
        subject: the model.
        ports: of its graph.
        sources: contributions, or differences of them.
    """

    def __init__(self, subject: Subject, ports: Ports, sources: Sources) -> None:
        self.subject, self.ports, self.sources, self.graph = subject, ports, sources, ports.graph
        self.precision = precision_of(subject)
        self._maps: dict[int, Tensor] = {}

    def tokens(self, tokens: Int[Tensor, " token"]) -> Float[Tensor, "source token d_model"]:
        """Every source at some tokens (numbers of pair x column)."""
        shape = (len(self.graph.sources), len(tokens), self.subject.facts.d_model or 1)
        out = torch.empty(shape, dtype=self.precision, device=self.subject.device)
        for layer in range(-1, self.graph.n_layers):
            for kind, rows in self._rows(layer).items():
                out[rows] = self._contributions(layer, kind, None, lambda value: _at(value, tokens)[None])[:, 0]
        return out

    def of(self, layer: int, kind: str, rows: Sequence[int]) -> Float[Tensor, "source pair position d_model"]:
        """Some sources of one layer and kind ("embed", "position", "head", "attention", "mlp") at all tokens."""
        all_rows = self._rows(layer)[kind]
        chosen = None if list(rows) == all_rows else [all_rows.index(row) for row in rows]
        return self._contributions(layer, kind, chosen, lambda value: value)

    def _rows(self, layer: int) -> dict[str, list[int]]:
        out: dict[str, list[int]] = {}
        for row, writer in enumerate(self.graph.writers):
            if writer.layer == layer:
                out.setdefault(writer.kind, []).append(row)
        return out

    def _contributions(
        self, layer: int, kind: str, heads: list[int] | None, pick: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "source pair position d_model"]:
        given = self.sources
        if kind != "head":
            value = {
                "embed": given.embed, "position": given.position, "mlp": given.outs.get(layer),
                "attention": given.whole.get(layer),
            }[kind]  # fmt: skip
            assert value is not None
            return pick(value)[None].to(self.precision)
        port = self.ports.attention[layer]
        assert port is not None
        if layer not in self._maps:
            self._maps[layer] = self.ports.maps(self.subject, layer).to(self.precision)
        maps, z = self._maps[layer], pick(given.heads[layer]).to(self.precision)
        if heads is not None:
            maps, z = maps[heads], z[..., heads, :]
        return port.contributions(maps, z[None])[0]


class _Products:
    """Expands tiles and multiplies them."""

    def __init__(
        self,
        subject: Subject,
        ports: Ports,
        norms: Norms,
        differences: Sources,
        gradients: InputGradients,
        group: int,
    ) -> None:
        self.subject, self.ports, self.norms, self.group = subject, ports, norms, group
        self.gradients, self.graph = gradients, ports.graph
        self.precision = precision_of(subject)
        self.steps = gradients.metric.shape[1]
        rows = len(self.graph.sources) + GROUP_COLUMNS + len(gradients.centred) * self.steps
        self.tile = tile_size(subject, rows)
        self.expansion = Expansion(subject, ports, differences)

    def of(self, tokens: Int[Tensor, " token"]) -> Float[Tensor, "source destination"]:
        """The sums over some tokens."""
        sources = self.expansion.tokens(tokens)
        out = torch.zeros(len(sources), len(self.graph.readers), dtype=torch.float64, device=sources.device)
        flat = sources.flatten(1)
        for readers, before, gradient in self._readers(tokens):
            out[:before, readers] += flat[:before] @ gradient.flatten(1).T
        self._subtract_norms(sources, tokens, out)
        return out

    # ---- destinations

    def _readers(self, tokens: Int[Tensor, " token"]) -> Iterator[tuple[list[int], int, Tensor]]:
        """(columns, sources before the last of them, gradients [column, token, d_model]), some layers at a time."""
        columns: list[int] = []
        pieces: list[Tensor] = []
        for layer in range(self.graph.n_layers + 1):
            for readers, gradient in self._layer(layer, tokens):
                columns += readers
                pieces.append(gradient)
            if columns and (len(columns) >= GROUP_COLUMNS or layer == self.graph.n_layers):
                yield columns, self._before(columns), torch.cat(pieces)
                columns, pieces = [], []

    def _before(self, columns: Sequence[int]) -> int:
        moment = max(self.graph.readers[column].moment for column in columns)
        return sum(writer.moment < moment for writer in self.graph.writers)

    def _layer(self, layer: int, tokens: Tensor) -> Iterator[tuple[list[int], Tensor]]:
        if layer in self.gradients.heads:
            port = self.ports.attention[layer]
            assert port is not None
            weights = reading_weights(self.subject, self.norms, port, self.precision)
            for one in port.inputs:
                scaled = _at(self.gradients.heads[layer][one.which].scaled[self.group], tokens)  # token, head, head_dim
                yield list(one.readers), torch.bmm(scaled.transpose(0, 1), weights[one.which].transpose(1, 2))
        mine = [c for c, r in enumerate(self.graph.readers) if r.layer == layer and c in self.gradients.streams]
        for column in mine:
            yield [column], _at(self.gradients.streams[column][self.group], tokens)[None]

    def _subtract_norms(self, sources: Tensor, tokens: Tensor, out: Tensor) -> None:
        layers = sorted(self.gradients.centred)
        if not layers:
            return
        # token, layer x step, d_model
        streams = torch.cat([_steps_at(self.gradients.centred[i][self.group], tokens) for i in layers], dim=1)
        along = torch.bmm(sources.transpose(0, 1), streams.transpose(1, 2))  # token, source, layer x step
        for place, layer in enumerate(layers):
            mine = along[:, :, place * self.steps : (place + 1) * self.steps].transpose(0, 1).flatten(1)
            port = self.ports.attention[layer]
            assert port is not None
            for one in port.inputs:
                load = self.gradients.heads[layer][one.which].load
                assert load is not None
                out[:, list(one.readers)] -= mine @ _steps_at(load[self.group], tokens).flatten(0, 1)


def _at(value: Tensor, tokens: Tensor) -> Tensor:
    """Tokens of [pair, position, ...]: [token, ...]."""
    return value.flatten(0, 1)[tokens]


def _steps_at(value: Tensor, tokens: Tensor) -> Tensor:
    """Tokens of [step, pair, position, ...]: [token, step, ...]."""
    return value.flatten(1, 2)[:, tokens].transpose(0, 1)


def source_products(
    subject: Subject,
    ports: Ports,
    norms: Norms,
    row: Sequence[int],
    differences: Float[Tensor, "group pair position d_model"],
    gradients: InputGradients,
    mask: Bool[Tensor, "pair position"],
) -> Float[Tensor, "group destination"]:
    """Sums over tokens of one source's difference . gradient for each group, which has a source of its own.

    Args:
        subject: the model.
        ports: of its graph.
        norms: the maps of its norms.
        row: [group], the sources.
        differences: of each group's source.
        gradients: of each group.
        mask: True at tokens.

    Returns:
        [group, destination]; zero where the destination is not after the source.
    """
    precision = precision_of(subject)
    delta = differences.to(precision) * mask.to(differences.device)[None, :, :, None]
    out = torch.zeros(len(row), len(ports.graph.readers), dtype=torch.float64, device=delta.device)
    for layer, kinds in gradients.heads.items():
        port = ports.attention[layer]
        assert port is not None
        weights = reading_weights(subject, norms, port, precision)
        along = None
        if layer in gradients.centred:
            along = torch.einsum("gptd,gsptd->gspt", delta, gradients.centred[layer])
        for one in port.inputs:
            read = torch.einsum("gptd,hdi->gpthi", delta, weights[one.which])
            value = torch.einsum("gpthi,gpthi->gh", read, kinds[one.which].scaled).double()
            load = kinds[one.which].load
            if along is not None and load is not None:
                value = value - torch.einsum("gspt,gspth->gh", along, load)
            out[:, list(one.readers)] = value
    for column, gradient in gradients.streams.items():
        out[:, column] = torch.einsum("gptd,gptd->g", delta, gradient).double()
    return (out * ports.graph.allowed[list(row)].to(out.device)).cpu()
