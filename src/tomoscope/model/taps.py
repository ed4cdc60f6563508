"""One call of the model with sites read and written.

Hooks are attached for the call and removed after it, whatever happens. Each place in the model (a module's input or
output, attention's roles, the projection that makes per-head results) has one hook, which turns the model's tensor
into the site's value, applies the edits in their order, records what is asked for, and hands the tensor back - the
very same object where nothing was edited, so that reading leaves the logits bit-identical.

`resid_mid` of a sequential block is no module's output: it is read where the next norm takes it in, and written by
changing what attention adds. `attn.result` is computed from z and the output projection, and written by changing the
projection's output by the difference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from tomoscope.errors import UnavailableSiteError
from tomoscope.model.attention import ROLES, Routing, intercepting
from tomoscope.model.probe import main_input, tracing, unwrap
from tomoscope.model.regions import Bound, write_all
from tomoscope.model.sites import Site
from tomoscope.model.structure import Structure, Tap


class Stop(Exception):  # noqa: N818 - no error: the model has computed all that was asked for
    """Raised from a hook to leave the model's forward once every asked site has been read."""


class Session:
    """What one call of the model reads and writes; a context manager around the call.

    Args:
        model: the torch module.
        structure: where its sites live.
        reads: sites to record, whole (a selection of heads or positions is made by the caller of `values`).
        edits: resolved edits.
        batch_size: rows of the batch, to unflatten values that a family flattens.
        graph: keep the recorded tensors in the autograd graph, for gradients.
        stop: leave the forward (by `Stop`) when every read has been made.
        keep: applied to each value when it is recorded (a selection of columns, a move to the CPU).
    """

    def __init__(
        self,
        model: nn.Module,
        structure: Structure,
        *,
        reads: Sequence[Site] = (),
        edits: Sequence[Bound] = (),
        batch_size: int,
        graph: bool = False,
        stop: bool = False,
        keep: Callable[[Site, Tensor], Tensor] | None = None,
    ) -> None:
        self.model, self.structure, self.graph, self.stop = model, structure, graph, stop
        self.batch_size, self.keep = batch_size, keep
        self.values: dict[Site, Tensor] = {}
        self.results: dict[Site, Tensor] = {}  # with a graph, the values of attn.result: `values` has what carries it
        self.past, self.phase = 0, "prefill"
        self.reads = set(reads)
        self.edits: dict[Site, list[Bound]] = {}
        self.set_edits(edits)
        self.points: dict[tuple[str, str], list[Site]] = {}
        self.attention: dict[nn.Module, dict[str, Site]] = {}
        self.streams: dict[int, Tensor] = {}
        for site in dict.fromkeys([*self.edits, *self.reads]):
            self._place(site)

    def set_edits(self, edits: Sequence[Bound]) -> None:
        """Replace the edits by others at the same sites (or fewer of them)."""
        self.edits.clear()
        for bound in edits:
            self.edits.setdefault(bound.site.whole, []).append(bound)

    # ---- where everything lives

    def tap(self, site: Site) -> Tap:
        """Where a site lives; raises with the reason if the model can't give it."""
        return find_tap(self.structure, site)

    def _place(self, site: Site) -> None:
        tap = self.tap(site)
        if tap.side in ROLES:
            self.attention.setdefault(self.model.get_submodule(tap.path), {})[tap.side] = site
        elif site.part == "attn.result":
            self.points.setdefault((self._block(site).projection, "result"), []).append(site)
        elif site.part == "router":
            self.points.setdefault((tap.path, "router"), []).append(site)
        elif site.part == "resid_mid" and tap.side == "derived":
            self.points.setdefault((tap.path, "in"), []).append(site)
            if site in self.edits:
                block = self._block(site)
                self.points.setdefault((block.path, "in"), [])
                self.points.setdefault((block.taps["attn.out"].path, "out"), [])
        else:
            self.points.setdefault((tap.path, tap.side), []).append(site)

    def _block(self, site: Site) -> Any:
        assert site.layer is not None
        return self.structure.blocks[site.layer]

    # ---- the context

    def __enter__(self) -> Session:
        self.stack = ExitStack()
        try:
            for (path, side), sites in self.points.items():
                self._hook(self.model.get_submodule(path), path, side, sites)
            if self.attention:
                self.stack.enter_context(intercepting(self))
                traced = {b.attention: b.shapes.get("n_heads", 0) for b in self.structure.blocks if b.route == "trace"}
                for module in self.attention:
                    path = next((p for p in traced if self.model.get_submodule(p) is module), None)
                    if path is not None:
                        self.stack.enter_context(tracing(module, self, traced[path]))
        except BaseException:
            self.stack.close()
            raise
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
        self.stack.close()
        return kind is Stop

    def _hook(self, module: nn.Module, path: str, side: str, sites: list[Site]) -> None:
        if side == "router":
            self._hook_router(module, sites[0])
            return
        if side == "in":

            def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
                value, put = main_input(args, kwargs)
                new = value if value is None else self._pass(value, path, side, sites)
                return None if new is value or new is None else put(new)

            self.stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            return

        def after(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
            value, put = unwrap(output)
            if value is None:
                return None
            if side == "result":
                new = self._result(module, main_input(args, kwargs)[0], value, sites[0])
            else:
                new = self._pass(value, path, side, sites)
            return None if new is value else put(new)

        self.stack.callback(module.register_forward_hook(after, with_kwargs=True).remove)

    def _hook_router(self, module: nn.Module, site: Site) -> None:
        """A router has chosen its experts by the time it returns, so its product is watched from inside."""
        modes: list[Routing] = []

        def enter(module: nn.Module, args: tuple) -> None:
            modes.append(Routing(lambda value: self._routed(site, value)))
            modes[-1].__enter__()

        def leave(module: nn.Module | None = None, args: tuple = (), output: Any = None) -> None:
            if modes:
                modes.pop().__exit__(None, None, None)

        self.stack.callback(leave)
        self.stack.callback(module.register_forward_pre_hook(enter).remove)
        self.stack.callback(module.register_forward_hook(leave).remove)

    def _routed(self, site: Site, value: Tensor) -> Tensor:
        new = self._visit(site, value)
        return new.clone() if self.graph and site in self.values else new

    # ---- one value

    def _pass(self, value: Tensor, path: str, side: str, sites: list[Site]) -> Tensor:
        for site in sites:
            if site.part == "resid_mid" and self.tap(site).side == "derived":
                self._record(site, value)
            else:
                value = self._visit(site, value, self.tap(site).factor)
        if side == "in" and self._mid_edits(path):
            self.streams[self._layer(path)] = value
        if side == "out" and self.streams:
            value = self._write_mid(value, path)
        # a clone goes on through the model, so that an in-place operation further on can't change what was recorded
        recorded = any(site in self.reads for site in sites)
        return value.clone() if self.graph and recorded and value.requires_grad else value

    def _visit(self, site: Site, value: Tensor, factor: float = 1.0) -> Tensor:
        edits = self._due(site)
        if edits:
            shaped = self._shaped(site, value)
            scaled = shaped * factor if factor != 1.0 else shaped
            past = 0 if site.part in ("attn.k", "attn.v") else self.past
            new = write_all(scaled, edits, site, past=past)
            if new is not scaled:
                value = (new / factor if factor != 1.0 else new).reshape(
                    value.shape if new.numel() == value.numel() else new.shape
                )
        self._record(site, value, factor)
        return value

    def _due(self, site: Site) -> list[Bound]:
        return [b for b in self.edits.get(site, ()) if b.edit.during in ("all", self.phase)]

    def _shaped(self, site: Site, value: Tensor) -> Tensor:
        """The value with the site's axes: families flatten batch and position, or leave the batch of positions at
        one.
        """
        if site.part == "module":
            return value
        want = len(site.axes)
        if value.dim() == want - 1 and want == 3:
            flat = value.shape[0] % self.batch_size == 0 and site.part != "pos_embed"
            value = value.reshape(self.batch_size, -1, value.shape[-1]) if flat else value[None]
        if site.part == "pos_embed" and value.shape[0] == 1 != self.batch_size:
            value = value.expand(self.batch_size, *value.shape[1:])
        return value

    def _record(self, site: Site, value: Tensor, factor: float = 1.0) -> None:
        if site not in self.reads:
            return
        if self.graph:
            # a value that was written whole has no graph behind it: the gradient starts at it
            self.values[site] = value if value.requires_grad else value.requires_grad_(True)
        else:
            shaped = self._shaped(site, value.detach())
            shaped = shaped * factor if factor != 1.0 else shaped
            kept = shaped if self.keep is None else self.keep(site, shaped)
            self.values[site] = kept.clone() if kept.data_ptr() == value.data_ptr() else kept
        if self.stop and len(self.values) == len(self.reads):
            raise Stop

    # ---- derived sites

    def _layer(self, path: str) -> int:
        return next(i for i, block in enumerate(self.structure.blocks) if block.path == path)

    def _mid_edits(self, path: str) -> bool:
        return any(
            s.part == "resid_mid" and self._block(s).path == path and self.tap(s).side == "derived" for s in self.edits
        )

    def _write_mid(self, value: Tensor, path: str) -> Tensor:
        for layer, stream in list(self.streams.items()):
            tap = self.structure.blocks[layer].taps["attn.out"]
            site = Site("resid_mid", layer)
            if tap.path != path or site not in self.edits:
                continue
            middle = stream + tap.factor * value.reshape(stream.shape)
            new = write_all(middle, self._due(site), site, past=self.past)
            if new is not middle:
                value = value + ((new - middle) / tap.factor).reshape(value.shape)
            del self.streams[layer]
        return value

    def _result(self, module: nn.Module, z: Tensor | None, value: Tensor, site: Site) -> Tensor:
        assert z is not None
        shapes = self._block(site).shapes
        result = head_results(module, z.reshape(*value.shape[:-1], shapes["n_heads"], -1))
        result = result.reshape(self.batch_size, -1, *result.shape[-2:])
        new = write_all(result, self._due(site), site, past=self.past)
        value = value if new is result else value + (new - result).sum(-2).reshape(value.shape)
        if not self.graph:
            self._record(site, new)
            return value
        # every head's result is added to the projection's output, so its gradient is theirs
        self.results[site] = new.detach()
        self._record(site, value)
        return value.clone()

    # ---- attention's side (see attention.Watcher)

    def watches(self, module: nn.Module) -> frozenset[str]:
        """Roles asked for in an attention module."""
        return frozenset(self.attention.get(module, ()))

    def writes(self, module: nn.Module) -> frozenset[str]:
        """Roles that an edit or a gradient needs the kernel to use."""
        sites = self.attention.get(module, {})
        return frozenset(r for r, s in sites.items() if self.graph or self._due(s))

    def visit(self, module: nn.Module, role: str, value: Tensor) -> Tensor:
        """Pass a role's value through its site's edits and record it."""
        site = self.attention[module].get(role)
        if site is None:
            return value
        if role in ("q", "k", "v"):
            turned = value.transpose(1, 2)
            new = self._visit(site, turned)
            if self.graph and site in self.values:
                return new.clone().transpose(1, 2)
            return value if new is turned else new.transpose(1, 2)
        new = self._visit(site, value)
        return new.clone() if self.graph and site in self.values else new


def head_results(projection: nn.Module, z: Tensor) -> Tensor:
    """[.., head, head_dim] through each head's own slice of an output projection, without its bias: [.., head,
    d_model].
    """
    weight = projection.weight
    assert isinstance(weight, Tensor)
    # transformers' Conv1D stores [in, out], a linear layer [out, in]
    matrix = weight if type(projection).__name__ == "Conv1D" else weight.T
    per_head = matrix.reshape(z.shape[-2], z.shape[-1], -1)
    return torch.einsum("...hi,hio->...ho", z, per_head.to(z.dtype))


def find_tap(structure: Structure, site: Site) -> Tap:
    """Where a site lives in a model.

    Raises:
        UnavailableSiteError: the grammar has the site but this model can't give it; the message says why.
    """
    if site.part == "module":
        path, side = (site.path.removesuffix(".input"), "in") if site.path.endswith(".input") else (site.path, "out")
        return Tap(path, side)
    holder = structure if site.layer is None else structure.blocks[site.layer]
    if site.whole.part in holder.taps:
        return holder.taps[site.part]
    reason = holder.missing.get(site.part, "this model has no such place")
    raise UnavailableSiteError(
        f"{site.whole.name} can't be given: {reason}.", remedy="`tomoscope sites MODEL` says what this model can give."
    )
