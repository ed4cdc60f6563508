"""Looking inside attention without changing it: queries, keys, values, scores, pattern, z.

Two routes, chosen by how a family computes attention:

*Dispatch.* Most families call what `AttentionInterface.get_interface` returns. That method is wrapped once; the
wrapper is inert until a call of ours is under way, and then hands the model's chosen kernel the very tensors it was
given. The configured implementation is never changed (masks and sparse branches depend on its name), so logits stay
bit-identical under eager, sdpa and flash. A pattern is computed *beside* the kernel: the family's own eager function
is given a value tensor of zero width, so sinks, soft-caps, windows and biases are its own. Only writing scores or a
pattern, or asking for their gradient, replaces that layer's kernel by pattern @ value.

*Trace.* Families that compute attention inline (BLOOM, GPT-J, GPT-Neo, Falcon, CodeGen) are watched by a torch function
mode while their attention module runs: the last product of two activations before the softmax is q k^T, the softmax's
input and output are scores and pattern, the product after it is pattern @ v, and a fused kernel gives q, k, v directly.

How it can mislead: scores include the mask (padding and future keys are very negative) and the soft-cap; with sinks the
pattern's rows sum to less than 1.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.modeling_utils import AttentionInterface

ROLES = ("q", "k", "v", "scores", "pattern", "z")


@runtime_checkable
class Watcher(Protocol):
    """What an interception reports to: one object per call of the model."""

    def watches(self, module: nn.Module) -> frozenset[str]:
        """Roles that are read or written in this attention module; empty leaves it alone."""
        ...

    def writes(self, module: nn.Module) -> frozenset[str]:
        """Roles whose value may change, or whose gradient is wanted."""
        ...

    def visit(self, module: nn.Module, role: str, value: Tensor) -> Tensor:
        """Report a value ([batch, head, query|key, ...]; z as [batch, query, head, width]) and take back what to
        use.
        """
        ...


_active = threading.local()


class intercepting:  # noqa: N801 - used as a verb: `with intercepting(watcher)`
    """While active, attention modules dispatched in this thread report to the watcher."""

    def __init__(self, watcher: Watcher) -> None:
        self.watcher = watcher

    def __enter__(self) -> None:
        install()
        self.previous = getattr(_active, "watcher", None)
        _active.watcher = self.watcher

    def __exit__(self, *exc: object) -> None:
        _active.watcher = self.previous


def install() -> None:
    """Wrap `AttentionInterface.get_interface` once in this process; inert while nobody watches."""
    original = AttentionInterface.get_interface
    if getattr(original, "_tomoscope", False):
        return

    def get_interface(self: AttentionInterface, attn_implementation: str, default: Callable) -> Callable:
        chosen = original(self, attn_implementation, default)
        watcher = getattr(_active, "watcher", None)
        return chosen if watcher is None else _watched(watcher, chosen, default)

    get_interface._tomoscope = True  # ty: ignore[missing-attribute]
    AttentionInterface.get_interface = get_interface  # type: ignore[method-assign]


def _watched(watcher: Watcher, chosen: Callable, eager: Callable) -> Callable:
    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        roles = watcher.watches(module)
        if not roles:
            return chosen(module, query, key, value, attention_mask, *args, **kwargs)
        query = watcher.visit(module, "q", query) if "q" in roles else query
        key = watcher.visit(module, "k", key) if "k" in roles else key
        value = watcher.visit(module, "v", value) if "v" in roles else value
        inner = roles & {"scores", "pattern"}
        weights = None
        if inner:
            mask = _additive(attention_mask, module, query, key, kwargs)
            weights = _side_pattern(watcher, module, eager, (query, key, value, mask), args, kwargs)
        if weights is not None and inner & watcher.writes(module):
            repeats = query.shape[1] // value.shape[1]
            wide = value.repeat_interleave(repeats, dim=1) if repeats > 1 else value
            output = torch.matmul(weights.to(wide.dtype), wide).transpose(1, 2).contiguous()
            result: Any = (output, weights)
        else:
            result = chosen(module, query, key, value, attention_mask, *args, **kwargs)
        if "z" in roles:
            result = (watcher.visit(module, "z", result[0]), *result[1:])
        return result

    return attention


def _additive(
    mask: Tensor | None, module: nn.Module, query: Tensor, key: Tensor, kwargs: dict[str, Any]
) -> Tensor | None:
    """The mask as eager attention wants it: added to the scores. sdpa may leave it out and say only "causal"."""
    lowest = torch.finfo(query.dtype).min
    if mask is None:
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        if not causal or query.shape[2] == 1:
            return None
        ones = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
        mask = ones.tril(key.shape[2] - query.shape[2])[None, None]
    if mask.dtype == torch.bool:
        mask = torch.zeros((), dtype=query.dtype, device=query.device).where(mask, lowest)
    return mask[..., : key.shape[2]]


def _side_pattern(
    watcher: Watcher, module: nn.Module, eager: Callable, tensors: tuple[Any, ...], args: tuple, kwargs: dict[str, Any]
) -> Tensor:
    query, key, value, mask = tensors
    roles = watcher.watches(module)
    with _Softmax(watcher, module) if "scores" in roles else _Nothing():
        _, weights = eager(module, query, key, value[..., :0], mask, *args, **kwargs)
    return watcher.visit(module, "pattern", weights) if "pattern" in roles else weights


class _Nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *exc: object) -> None: ...


_SOFTMAX = frozenset({F.softmax, torch.softmax, Tensor.softmax})
_PRODUCT = frozenset({
    torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm, torch.baddbmm, Tensor.baddbmm,
})  # fmt: skip


class _Softmax(TorchFunctionMode):
    """Reports the first softmax's input as the scores; a sink's extra column is put back after a visit."""

    def __init__(self, watcher: Watcher, module: nn.Module) -> None:
        super().__init__()
        self.watcher, self.module, self.seen = watcher, module, False

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in _SOFTMAX and not self.seen:
            self.seen = True
            scores = args[0]
            keys = scores.shape[-1] - (1 if getattr(self.module, "sinks", None) is not None else 0)
            visited = self.watcher.visit(self.module, "scores", scores[..., :keys])
            args = (torch.cat([visited, scores[..., keys:]], dim=-1), *args[1:])
        return func(*args, **kwargs)


class Routing(TorchFunctionMode):
    """Passes the first product inside a router through `visit`: routers choose experts from it before they return."""

    def __init__(self, visit: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.visit, self.seen = visit, False

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.seen or (func is not F.linear and func not in _PRODUCT):
            return out
        self.seen = True
        return self.visit(out)


class Trace(TorchFunctionMode):
    """Watches one attention module that computes attention inline; entered before its forward and left after it."""

    def __init__(self, watcher: Watcher, module: nn.Module, n_heads: int) -> None:
        super().__init__()
        self.watcher, self.module, self.n_heads = watcher, module, n_heads
        self.roles = watcher.watches(module)
        self.stage = "product"

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention and self.stage == "product":
            self.stage = "done"
            return self._fused(args, kwargs)
        if func in _PRODUCT and self.stage in ("product", "softmax"):
            done = self._product(func, args, kwargs)
            if done is not None:
                return done
        if func in _SOFTMAX and self.stage == "softmax":
            self.stage = "value"
            scores = self._visit("scores", args[0])
            return self._visit("pattern", func(scores, *args[1:], **kwargs))
        if func in _PRODUCT and self.stage == "value":
            self.stage = "done"
            weights, value = self._operands(func, args, kwargs)
            product = func(weights, self._visit("v", value), **kwargs)
            return self._visit_z(product)
        return func(*args, **kwargs)

    def _operands(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        if func in (torch.baddbmm, Tensor.baddbmm):
            rest = [*args[1:], *(kwargs.pop(name) for name in ("batch1", "batch2") if name in kwargs)]
            return rest[0], rest[1]
        rest = [*args, *(kwargs.pop(name) for name in ("mat2", "other") if name in kwargs)]
        return rest[0], rest[1]

    def _product(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Q k^T: the first product whose operands are both activations with heads (three axes or more)."""
        remaining = dict(kwargs)
        query, key = self._operands(func, args, remaining)
        both = isinstance(query, Tensor) and isinstance(key, Tensor) and query.dim() >= 3 and key.dim() >= 3
        if not both or self.stage == "softmax":
            return None
        self.stage = "softmax"
        query = self._visit("q", query)
        key = self._visit("k", key.transpose(-1, -2)).transpose(-1, -2)
        if func in (torch.baddbmm, Tensor.baddbmm):
            return func(args[0], query, key, **remaining)
        return func(query, key, **remaining)

    def _fused(self, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        given["query"], given["key"] = self._visit("q", given["query"]), self._visit("k", given["key"])
        given["value"] = self._visit("v", given["value"])
        inner = self.roles & {"scores", "pattern"}
        weights = None
        if inner:
            weights = self._weights(given)
        if weights is not None and inner & self.watcher.writes(self.module):
            return self._visit_z(torch.matmul(weights, given["value"]))
        return self._visit_z(F.scaled_dot_product_attention(**given))  # ty: ignore[invalid-argument-type]

    def _weights(self, given: dict[str, Any]) -> Tensor:
        query, key = given["query"], given["key"]
        factor = given.get("scale") or query.shape[-1] ** -0.5
        mask = given.get("attn_mask")
        if mask is None and given.get("is_causal"):
            mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros((), dtype=query.dtype, device=query.device).where(mask, torch.finfo(query.dtype).min)
        scores = torch.matmul(query, key.transpose(-1, -2)) * factor
        scores = self._visit("scores", scores if mask is None else scores + mask)
        return self._visit("pattern", scores.softmax(-1))

    def _visit(self, role: str, value: Tensor) -> Tensor:
        if role not in self.roles:
            return value
        if value.dim() == 3:  # heads folded into the batch
            split = value.reshape(-1, self.n_heads, *value.shape[1:])
            return self.watcher.visit(self.module, role, split).reshape(value.shape)
        return self.watcher.visit(self.module, role, value)

    def _visit_z(self, value: Tensor) -> Tensor:
        if "z" not in self.roles:
            return value
        split = value.reshape(-1, self.n_heads, *value.shape[1:]) if value.dim() == 3 else value
        return self.watcher.visit(self.module, "z", split.transpose(1, 2)).transpose(1, 2).reshape(value.shape)
