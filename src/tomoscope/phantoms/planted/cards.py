"""What the cards of planted phantoms share: statements of abilities and of circuits, their denials, scrambled twins."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from tomoscope.data.tasks import TASKS
from tomoscope.phantoms.phantom import Known

Edge = tuple[str, str]


def abilities(*can: str) -> tuple[Known, ...]:
    """The tasks that a model can do, and that it can do no other."""
    return tuple(Known("ability", {"task": name}, name in can) for name in TASKS)


def denied(known: Iterable[Known]) -> tuple[Known, ...]:
    """The same statements, none of which holds."""
    return tuple(dataclasses.replace(one, holds=False) for one in known)


def circuit(
    edges: Sequence[Edge], *, constant: Sequence[Edge] = (), faint: Sequence[Edge] = (), **more: Any
) -> dict[str, Any]:
    """The value of a circuit's statement; nodes are those that the edges name.

    Args:
        edges: (source, destination) all that is wired.
        constant: of these, what carries the same for every prompt: no patch between prompts can show it.
        faint: of these, what matters on few prompts (an exam that misses it is not wrong).
        more: further entries, JSON.
    """
    nodes = list(dict.fromkeys(end.split("<")[0] for edge in edges for end in edge))
    lists = {"edges": edges, "constant": constant, "faint": faint}
    return {"nodes": nodes, **{name: [list(edge) for edge in some] for name, some in lists.items()}, **more}


def node(head: tuple[int, int], port: str = "") -> str:
    """A head's name as a circuit's node; `port` is "q", "k" or "v"."""
    return f"a{head[0]}.h{head[1]}" + (f"<{port}>" if port else "")


def z_site(head: tuple[int, int]) -> str:
    """The site of a head's output."""
    return f"layer.{head[0]}.attn.z[head={head[1]}]"


def scramble(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """Put the entries of every weight in random order, in place: the same numbers, so the same scale, and no design."""
    with torch.no_grad():
        for parameter in model.parameters():
            order = torch.randperm(parameter.numel(), generator=generator)
            parameter.copy_(parameter.flatten()[order].reshape(parameter.shape))
    return model
