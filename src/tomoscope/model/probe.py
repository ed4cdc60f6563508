"""One forward with every module watched: the raw material from which a model's structure is read.

The probe is a few tokens, so that all inputs and outputs of all modules fit in memory whatever the model's size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tomoscope.model.attention import Trace, intercepting


def unwrap(value: Any) -> tuple[Tensor | None, Callable[[Tensor], Any]]:
    """The main tensor of a module's output, and how to put another in its place without changing the type.

    A model output gives its logits (else its last hidden state), a tuple or list its first element.
    """
    if isinstance(value, Tensor):
        return value, lambda new: new
    if isinstance(value, dict):
        keys = [key for key in ("logits", "last_hidden_state") if isinstance(value.get(key), Tensor)]
        keys += [key for key, item in value.items() if isinstance(item, Tensor)]
        if not keys:
            return None, lambda new: value

        def put(new: Tensor) -> Any:
            replaced = copy.copy(value)
            replaced[keys[0]] = new
            return replaced

        return value[keys[0]], put
    if isinstance(value, tuple | list) and value and isinstance(value[0], Tensor):
        return value[0], lambda new: type(value)([new, *value[1:]])  # type: ignore[call-arg]
    return None, lambda new: value


def main_input(args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor | None, Callable[[Tensor], tuple[tuple, dict]]]:
    """The tensor that a module transforms (first argument, or `hidden_states`), and how to put another in its place."""
    if args and isinstance(args[0], Tensor):
        return args[0], lambda new: ((new, *args[1:]), kwargs)
    for name in ("hidden_states", *kwargs):
        if isinstance(kwargs.get(name), Tensor):
            return kwargs[name], lambda new, name=name: (args, {**kwargs, name: new})
    return None, lambda new: (args, kwargs)


@dataclass
class Call:
    """What one module was given and gave, in the probe. `start` and `finish` order the calls."""

    path: str
    module: nn.Module
    input: Tensor | None
    output: Tensor | None
    raw_output: Any
    args: tuple
    kwargs: dict[str, Any]
    start: int
    finish: int
    times: int = 1


@dataclass
class Recording:
    """A probe forward: the calls by module path, and what attention reported by module path and role."""

    calls: dict[str, Call] = field(default_factory=dict)
    attention: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    output: Any = None

    def inside(self, path: str) -> Iterator[Call]:
        """Calls of the modules below a path."""
        return (call for name, call in self.calls.items() if name.startswith(path + "."))


class _AllRoles:
    """Watches q, k, v and z of every attention module that reports."""

    def __init__(self, names: dict[nn.Module, str], recording: Recording) -> None:
        self.names, self.recording = names, recording

    def watches(self, module: nn.Module) -> frozenset[str]:
        return frozenset(("q", "k", "v", "z")) if module in self.names else frozenset()

    def writes(self, module: nn.Module) -> frozenset[str]:
        return frozenset()

    def visit(self, module: nn.Module, role: str, value: Tensor) -> Tensor:
        self.recording.attention.setdefault(self.names[module], {})[role] = value.detach()
        return value


def _clone(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.detach().clone()


@contextmanager
def _watching(root: nn.Module, prefix: str, recording: Recording, n_heads: int, traced: list[str]) -> Generator[None]:
    clock = iter(range(10**9))
    starts: dict[nn.Module, tuple[int, tuple, dict]] = {}
    names = {module: (prefix + "." + name).strip(".") for name, module in root.named_modules()}
    watcher = _AllRoles(names, recording)

    def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
        starts[module] = (next(clock), args, kwargs)

    def after(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        path = names[module]
        start, args, kwargs = starts[module]
        # clones: families add to these tensors in place further on
        given, made = _clone(main_input(args, kwargs)[0]), _clone(unwrap(output)[0])
        times = recording.calls[path].times + 1 if path in recording.calls else 1
        recording.calls[path] = Call(path, module, given, made, output, args, kwargs, start, next(clock), times)

    with ExitStack() as stack:
        for module in names:
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(after, with_kwargs=True).remove)
        for module, name in names.items():
            if name in traced:
                stack.enter_context(tracing(module, watcher, n_heads))
        stack.enter_context(intercepting(watcher))
        yield


@contextmanager
def tracing(module: nn.Module, watcher: Any, n_heads: int) -> Generator[None]:
    """Watch an attention module that computes attention inline, for as long as the context lasts."""
    modes: list[Trace] = []

    def enter(module: nn.Module, args: tuple) -> None:
        modes.append(Trace(watcher, module, n_heads))
        modes[-1].__enter__()

    def leave(module: nn.Module, args: tuple, output: Any) -> None:
        if modes:
            modes.pop().__exit__(None, None, None)

    handles = [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        while modes:  # an exception inside the module skips its forward hook
            modes.pop().__exit__(None, None, None)


@torch.no_grad()
def record(
    root: nn.Module,
    args: tuple,
    kwargs: dict[str, Any],
    *,
    prefix: str = "",
    n_heads: int = 0,
    traced: list[str] | None = None,
) -> Recording:
    """Run a module once with everything in it watched.

    Args:
        root: the model, or one block of it with its path as `prefix`.
        args: positional inputs.
        kwargs: keyword inputs.
        prefix: path of `root` in the model.
        n_heads: query heads, needed to split attention that folds heads into the batch.
        traced: paths of attention modules to watch from inside.
    """
    recording = Recording()
    with _watching(root, prefix, recording, n_heads, traced or []):
        recording.output = root(*args, **kwargs)
    return recording


def cast(value: Any, dtype: torch.dtype) -> Any:
    """The same nested arguments with floating tensors in another dtype, and without caches, which a second run would
    extend.
    """
    if "cache" in type(value).__name__.lower():
        return None
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, tuple | list):
        return type(value)(cast(item, dtype) for item in value)
    if isinstance(value, dict):
        return {key: cast(item, dtype) for key, item in value.items()}
    return value


def record_upcast(call: Call, *, n_heads: int, traced: list[str]) -> Recording:
    """Record one block again in float32, for models whose own precision is too coarse to solve for what adds to
    what.
    """
    block = copy.deepcopy(call.module).float()
    recording = record(
        block,
        cast(call.args, torch.float32),
        cast(call.kwargs, torch.float32),
        prefix=call.path,
        n_heads=n_heads,
        traced=traced,
    )
    block_call = recording.calls.pop(call.path)
    recording.calls[call.path] = block_call
    return recording
