"""Plain Python for every program, and a forward pass of our own in which single edges can be cut."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tomoscope.phantoms.compiled import Compiled, SOp, compile_program, programs


def reverse(words):
    return list(words)[::-1]


def histogram(words):
    return [list(words).count(word) for word in words]


def histogram_so_far(words):
    return [words[: i + 1].count(word) for i, word in enumerate(words)]


def fraction_of_x(words):
    return [Fraction(words[: i + 1].count("x"), i + 1) for i in range(len(words))]


def sort(words):
    return sorted(words)


def sort_unique(words):
    return sorted(words) if len(set(words)) == len(words) else None


def most_frequent(words):
    counts = Counter(words)
    return [max(counts, key=lambda word: (counts[word], -words.index(word)))] * len(words)


def balanced(words):
    out = []
    for i in range(len(words)):
        held = []
        fine = True
        for kind in {"(": "()", ")": "()", "[": "[]", "]": "[]"}.values():
            depth = 0
            for word in words[: i + 1]:
                depth += (word == kind[0]) - (word == kind[1])
                fine &= depth >= 0
            held.append(depth)
        out.append("yes" if fine and not any(held) else "no")
    return out


def previous_token(words):
    return [None, *words[:-1]]


def induction(words):
    out = []
    for i, word in enumerate(words):
        earlier = [j for j in range(i) if words[j] == word]
        out.append(words[earlier[-1] + 1] if earlier else None)
    return out


@dataclass(frozen=True)
class Case:
    """One program, how it is compiled, and what it should answer (None: nothing is promised for this input)."""

    program: Callable[[], SOp]
    vocabulary: Sequence[Any]
    max_length: int
    causal: bool
    oracle: Callable[[tuple], list | None]
    larger: int

    def compile(self, **options: Any) -> Compiled:
        return compile_program(
            self.program(),
            **{"vocabulary": self.vocabulary, "max_length": self.max_length, "causal": self.causal, **options},
        )


CASES = {
    "reverse": Case(programs.reverse, "abc", 5, False, reverse, 7),
    "histogram": Case(programs.histogram, "abc", 5, False, histogram, 7),
    "histogram_causal": Case(programs.histogram, "abc", 5, True, histogram_so_far, 7),
    "fraction": Case(lambda: programs.fraction_so_far("x"), "xyz", 5, True, fraction_of_x, 7),
    "fraction_bidirectional": Case(lambda: programs.fraction_so_far("x"), "xyz", 5, False, fraction_of_x, 7),
    "sort_unique": Case(programs.sort_unique, (3, 5, 8, 9), 4, False, sort_unique, 5),
    "sort": Case(programs.sort, (3, 5, 8), 5, False, sort, 7),
    "most_frequent": Case(programs.most_frequent, "abc", 5, False, most_frequent, 7),
    "balanced": Case(lambda: programs.balanced("()"), "()", 7, True, balanced, 10),
    "shuffle_dyck": Case(lambda: programs.balanced("()", "[]"), "()[]", 4, True, balanced, 5),
    "previous_token": Case(programs.previous_token, "abc", 5, True, previous_token, 7),
    "induction": Case(programs.induction, "abc", 5, True, induction, 7),
}

Edge = tuple[str, str]


def unit(rows: Tensor) -> Tensor:
    """Rows of length 1; those that are nothing stay so."""
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-6)


class Weights:
    """GPT-2's forward from its weights alone, by nodes: what each writes, and what each destination reads."""

    def __init__(self, model: Any) -> None:
        self.w = {name: value.detach() for name, value in model.state_dict().items()}
        c = model.config
        self.n_layers, self.n_heads, self.width = c.n_layer, c.n_head, c.n_embd
        self.size, self.epsilon, self.causal = c.n_embd // c.n_head, c.layer_norm_epsilon, c.is_causal
        self.pad = c.pad_token_id

    @cached_property
    def constant(self) -> Tensor:
        """What every token's embedding has: PAD is nothing else."""
        return self.w["transformer.wte.weight"][self.pad]

    @cached_property
    def hum(self) -> Tensor:
        """What every position's embedding has: BOS's is nothing else."""
        return self.w["transformer.wpe.weight"][0]

    def head(self, layer: int, index: int) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """[(matrix, bias) of q, k, v] and W_O of one head."""
        path = f"transformer.h.{layer}.attn"
        joint, bias, out = (self.w[f"{path}.{n}"] for n in ("c_attn.weight", "c_attn.bias", "c_proj.weight"))
        starts = [part * self.width + index * self.size for part in range(3)]
        reads = [(joint[:, s : s + self.size], bias[s : s + self.size]) for s in starts]
        return reads, out[index * self.size : (index + 1) * self.size]

    def destinations(self) -> list[str]:
        places = []
        for layer in range(self.n_layers):
            places += [f"a{layer}.h{h}<{part}>" for h in range(self.n_heads) for part in "qkv"] + [f"m{layer}"]
        return [*places, "logits"]

    def sources(self, destination: str) -> list[str]:
        """Every node before a destination."""
        out = ["embed", "position"]
        for layer in range(self.n_layers):
            if destination.startswith(f"a{layer}."):
                return out
            out += [f"a{layer}.h{h}" for h in range(self.n_heads)]
            if destination == f"m{layer}":
                return out
            out.append(f"m{layer}")
        return out

    def edges(self) -> list[Edge]:
        return [(source, place) for place in self.destinations() for source in self.sources(place)]

    def written(self, node: str) -> Tensor:
        """Rows that span what a node writes, the constant aside: [row, d_model]."""
        if node == "embed":
            return self.w["transformer.wte.weight"] - self.constant
        if node == "position":
            return self.w["transformer.wpe.weight"] - self.hum
        if node[0] == "m":
            path = f"transformer.h.{node[1:]}.mlp.c_proj"
            return torch.cat([self.w[f"{path}.weight"], self.w[f"{path}.bias"][None]])
        layer, _, index = node[1:].partition(".h")
        return self.head(int(layer), int(index))[1]

    def read(self, place: str) -> Tensor:
        """Columns that a destination reads off the centred stream: [d_model, column]."""
        if place == "logits":
            matrix, norm = self.w["lm_head.weight"].T, "transformer.ln_f"
        elif place[0] == "m":
            path = f"transformer.h.{place[1:]}"
            matrix, norm = self.w[f"{path}.mlp.c_fc.weight"], f"{path}.ln_2"
        else:
            layer, _, rest = place[1:].partition(".h")
            index, part = int(rest.partition("<")[0]), "qkv".index(place[-2])
            matrix, norm = self.head(int(layer), index)[0][part][0], f"transformer.h.{layer}.ln_1"
        scaled = self.w[f"{norm}.weight"][:, None] * matrix
        return scaled - scaled.mean(0)

    def circuit(self) -> tuple[set[Edge], list[float]]:
        """Edges by what is written and read, from the logits back; and every overlap that was looked at.

        A head counts if what it writes is read by a part that counts; of an MLP those neurons do of which that is so.
        """
        edges, overlaps = set(), []
        live = {"logits": unit(self.read("logits").T).T}
        for place in reversed(self.destinations()):
            if place.startswith("m"):
                rows = unit(self.written(place))
                touched = torch.stack([(rows @ columns).abs().amax(1) for columns in live.values()]).amax(0)
                useful = touched[:-1] > 1e-6  # the last row is the bias
                live[place] = unit(self.read(place)[:, useful].T).T if bool((touched > 1e-6).any()) else None
            elif place != "logits":
                rows = unit(self.written(node := place.partition("<")[0]))
                later = [live[other] for other in live if node in self.sources(other)]
                counts = any(float((rows @ columns).abs().max()) > 1e-6 for columns in later)
                live[place] = unit(self.read(place).T).T if counts else None
            if live[place] is None or not live[place].shape[1]:
                del live[place]
        for place, columns in live.items():
            for source in self.sources(place):
                overlaps.append(float((unit(self.written(source)) @ columns).abs().max()))
                if overlaps[-1] > 1e-6:
                    edges.add((source, place))
        return edges, overlaps

    def forward(
        self, ids: Tensor, cut: set[Edge] = frozenset(), other: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits [batch, position, vocab] and every node's output; cut edges carry `other[source]` instead."""
        w, other = self.w, other or {}
        n = ids.shape[1]
        out = {
            "embed": w["transformer.wte.weight"][ids],
            "position": w["transformer.wpe.weight"][:n].expand(len(ids), -1, -1),
        }
        whole = out["embed"] + out["position"]
        changed: dict[str, list[str]] = {}
        for source, place in cut:
            changed.setdefault(place, []).append(source)

        def norm(total: Tensor, name: str) -> Tensor:
            return torch.nn.functional.layer_norm(
                total, (self.width,), w[f"{name}.weight"], w[f"{name}.bias"], self.epsilon
            )

        def stream(place: str, name: str, plain: Tensor) -> Tensor:
            if place not in changed:
                return plain
            return norm(whole + sum(other[source] - out[source] for source in changed[place]), name)

        mask = torch.zeros(n, n, dtype=torch.float64)
        if self.causal:
            mask.masked_fill_(torch.ones(n, n, dtype=torch.bool).triu(1), float("-inf"))
        for layer in range(self.n_layers):
            path = f"transformer.h.{layer}"
            plain = norm(whole, f"{path}.ln_1")
            for index in range(self.n_heads):
                reads, back = self.head(layer, index)
                q, k, v = (
                    stream(f"a{layer}.h{index}<{part}>", f"{path}.ln_1", plain) @ matrix + bias
                    for part, (matrix, bias) in zip("qkv", reads, strict=True)
                )
                pattern = (q @ k.transpose(-1, -2) / self.size**0.5 + mask).softmax(-1)
                out[f"a{layer}.h{index}"] = pattern @ v @ back
            whole = whole + sum(out[f"a{layer}.h{index}"] for index in range(self.n_heads))
            whole = whole + w[f"{path}.attn.c_proj.bias"]
            inner = stream(f"m{layer}", f"{path}.ln_2", norm(whole, f"{path}.ln_2")) @ w[f"{path}.mlp.c_fc.weight"]
            inner = (inner + w[f"{path}.mlp.c_fc.bias"]).relu()
            out[f"m{layer}"] = inner @ w[f"{path}.mlp.c_proj.weight"] + w[f"{path}.mlp.c_proj.bias"]
            whole = whole + out[f"m{layer}"]
        last = stream("logits", "transformer.ln_f", norm(whole, "transformer.ln_f"))
        return last @ w["lm_head.weight"].T, out
