"""Reading one block: its writers, its attention, its MLP, and the stream between them.

Steps, in the order of the code: find the blocks (a list of modules, each fed by the one before); solve each for its
writers (residual.py); tell attention's writes from the MLP's; find what is inside each.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import pairwise

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tomoscope.model import families
from tomoscope.model.probe import Call, Recording, record_upcast
from tomoscope.model.residual import Term, close, gap, is_norm, solve_block, solve_renormalised
from tomoscope.model.structure import Block, Tap


def find_blocks(model: nn.Module, recording: Recording) -> list[str]:
    """Paths of the blocks: the longest list of modules in which each is fed the stream that the one before returned."""
    best: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential):
            continue
        paths = [f"{name}.{child}".strip(".") for child, _ in module.named_children()]
        calls = [recording.calls.get(path) for path in paths]
        chain = [c for c in calls if c is not None and c.times == 1 and _maps_stream(c)]
        fed = all(close(b.input, a.output) for a, b in pairwise(chain))
        deep = chain and any(next(call.module.children(), None) is not None for call in chain)
        # a stack of blocks, not the layers of one MLP: blocks have children, and none is part of a block already found
        if len(chain) == len(paths) and fed and deep and len(chain) > len(best):
            best = paths
    return best


def _maps_stream(call: Call) -> bool:
    if call.input is None or call.output is None or call.input.dim() != 3:
        return False
    return call.input.is_floating_point() and call.input.shape == call.output.shape


def find_attention(path: str, recording: Recording) -> tuple[str, str]:
    """The attention module of a block and its route: dispatched ones were seen, others are known by their name."""
    seen = [name for name in recording.attention if name.startswith(path + ".")]
    if seen:
        return seen[0], "dispatch"
    named = []
    for call in recording.inside(path):
        leaf = call.path.rsplit(".", 1)[-1].lower()
        text = leaf + " " + type(call.module).__name__.lower()
        has_children = next(call.module.children(), None) is not None
        if has_children and "att" in text and not any(bad in leaf for bad in families.NOT_ATTENTION):
            named.append(call.path)
    return (min(named, key=lambda name: (name.count("."), name)), "") if named else ("", "")


def is_linear(call: Call) -> bool:
    """Whether a call is to a matrix product with weights."""
    weight = getattr(call.module, "weight", None)
    named = isinstance(call.module, nn.Linear | Conv1D) or "linear" in type(call.module).__name__.lower()
    return named and isinstance(weight, Tensor) and weight.dim() == 2


class BlockReader:
    """Reads one block from its recording; a value used once, to keep the steps' shared facts in one place."""

    def __init__(
        self, path: str, recording: Recording, *, attention: str, route: str, upcast: Recording | None
    ) -> None:
        self.recording = upcast or recording
        self.native = recording
        self.call = self.recording.calls[path]
        self.calls = list(self.recording.inside(path))
        self.by_path = {call.path: call for call in self.calls}
        raw = recording.calls[path].raw_output
        self.block = Block(path, len(raw) if isinstance(raw, tuple | list) else 0, attention=attention, route=route)

    def read(self) -> Block:
        """Fill the block in, step by step."""
        block = self.block
        block.taps["resid_pre"], block.taps["resid_post"] = Tap(block.path, "in"), Tap(block.path, "out")
        self._writers()
        self._attention()
        self._mlp()
        self._mid()
        return block

    # ---- the stream

    def _writers(self) -> None:
        found = solve_block(self.call, self.calls)
        if found is not None:
            self.block.kind, self.block.identity_error = "sum", found.error
            self._assign(found.terms)
            return
        last = solve_renormalised(self.call.output, self.calls, self.call.input)  # ty: ignore[invalid-argument-type]
        if last is None:
            reason = "the block's output is not its input plus a sum of its modules' outputs"
            self.block.missing.update(dict.fromkeys(("attn.out", "mlp.out", "resid_mid"), reason))
            return
        steps, error = [last], last.writes.error
        if last.base:
            middle = self.by_path[last.base].output
            first = solve_renormalised(middle, self.calls, self.call.input)  # ty: ignore[invalid-argument-type]
            if first is not None and not first.base:
                steps.insert(0, first)
                error = max(error, first.writes.error)
                self.block.taps["resid_mid"] = Tap(last.base, "out")
        self.block.kind, self.block.identity_error = "renormalised", error
        self.block.renormalised = tuple(steps)
        self._assign(tuple(term for step in steps for term in step.writes.terms))

    def _assign(self, terms: Iterable[Term]) -> None:
        """Tell attention's writes from the MLP's: inside the attention module, around it, or fed by what it
        returned.
        """
        attention = self.block.attention
        owned = {attention} if attention else set()
        for term in sorted(terms, key=lambda t: self.by_path[t.path].finish):
            part = "attn" if self._belongs(term.path, attention) else "mlp"
            if part == "attn":
                owned.add(term.path)
            elif "mlp" in self.block.writes:
                part = "other"
            self.block.writes[part] = (*self.block.writes.get(part, ()), term)
        for part in ("attn", "mlp"):
            mine = self.block.writes.get(part, ())
            if len(mine) == 1:
                self.block.taps[f"{part}.out"] = Tap(mine[0].path, "out", mine[0].factor)
            else:
                reason = f"the block has {len(mine) or 'no'} writers of this kind" + (
                    ": " + ", ".join(t.path for t in mine) if mine else ""
                )
                self.block.missing[f"{part}.out"] = reason

    def _belongs(self, path: str, attention: str) -> bool:
        if not attention:
            return False
        if path == attention or path.startswith(attention + ".") or attention.startswith(path + "."):
            return True
        call, source = self.by_path[path], self.by_path.get(attention)
        if self._reads_z(call) or (source is not None and close(call.input, source.output)):
            return True
        # a norm or dropout at the branch's end passes on what an earlier module returned; a product starts a new branch
        passing = not is_linear(call) and next(call.module.children(), None) is None
        feeders = [c for c in self.calls if passing and c.finish <= call.start and close(c.output, call.input)]
        return any(self._belongs(c.path, attention) for c in feeders)

    def _reads_z(self, call: Call) -> bool:
        z = self.recording.attention.get(self.block.attention, {}).get("z")
        return z is not None and close(call.input, z)

    # ---- attention

    def _attention(self) -> None:
        block = self.block
        parts = ("attn.q", "attn.k", "attn.v", "attn.scores", "attn.pattern", "attn.z", "attn.result")
        if not block.attention:
            block.missing.update(dict.fromkeys(parts, "the block has no attention that was recognised"))
            return
        roles = self.recording.attention.get(block.attention, {})
        if "z" not in roles or roles["z"].dim() != 4:
            reason = "this family computes attention in a way that could not be watched"
            block.missing.update(dict.fromkeys(parts, reason))
            return
        z = roles["z"]
        block.shapes.update(n_heads=z.shape[2], head_dim=z.shape[3])
        if "v" in roles:
            block.shapes.update(n_kv_heads=roles["v"].shape[1])
        for part in parts[:-1]:
            role = part.removeprefix("attn.")
            if role in ("scores", "pattern") or role in roles:
                block.taps[part] = Tap(block.attention, role)
            else:
                block.missing[part] = f"attention was not seen to receive its {role}"
        projections = [c for c in self.calls if is_linear(c) and close(c.input, z)]
        if projections:
            block.projection = min(projections, key=lambda c: c.start).path
            block.taps["attn.result"] = Tap(block.attention, "derived")
        else:
            block.missing["attn.result"] = "no output projection was seen to read z"

    # ---- MLP

    def _mlp(self) -> None:
        block = self.block
        inside = [c for c in self.calls if not self._in_attention(c.path)]
        linears = [c for c in inside if is_linear(c)]
        writer = block.writes.get("mlp", ())
        self._router(inside)
        if len(writer) != 1:
            reason = "no single MLP writer was found"
            block.missing.update(dict.fromkeys(("mlp.in", "mlp.pre", "mlp.post"), reason))
            return
        last = self.by_path[writer[0].path]
        down = self._down(last, linears)
        # where no single projection writes (a mixture of experts), the module is the one around the writer's source
        anchor = down or self._source(last)
        container = self._container(anchor.path)
        mine = [
            c for c in linears if c is not down and (c.path.startswith(container + ".") or container == anchor.path)
        ]
        whole = container == anchor.path or self._holds(container, mine)
        if next(self.by_path[container].module.children(), None) is not None and whole:
            block.taps["mlp.in"] = Tap(container, "in")
        else:
            ups = [c for c in linears if c is not down and c.finish <= anchor.start]
            if len(ups) == 1:
                block.taps["mlp.in"] = Tap(ups[0].path, "in")
                mine = ups
            else:
                block.missing["mlp.in"] = "several modules read the MLP's input and none contains them all"
        if down is None:
            reason = "a mixture of experts has no one hidden layer; read layer.N.router and mlp.out"
            reason = reason if "router" in block.taps else "no projection was seen to write the MLP's output"
            block.missing.update({"mlp.pre": reason, "mlp.post": reason})
            return
        block.down = down.path
        block.taps["mlp.post"] = Tap(down.path, "in")
        block.shapes["d_mlp"] = int(down.input.shape[-1])  # ty: ignore[missing-union-attribute]
        self._pre(down, inside, mine)

    def _in_attention(self, path: str) -> bool:
        attention = self.block.attention
        return bool(attention) and (
            path == attention or path.startswith(attention + ".") or path == self.block.projection
        )

    def _down(self, writer: Call, linears: list[Call]) -> Call | None:
        for target in (writer.output, writer.input if is_norm(writer) else None):
            same = [c for c in linears if close(c.output, target)]
            if same:
                return max(same, key=lambda c: c.finish)
        return None

    def _source(self, writer: Call) -> Call:
        """The module whose output a norm at the branch's end reads, or the writer itself."""
        if not is_norm(writer):
            return writer
        feeders = [c for c in self.calls if c.finish <= writer.start and close(c.output, writer.input)]
        return min(feeders, key=lambda c: c.path.count(".")) if feeders else writer

    def _container(self, path: str) -> str:
        """The outermost module of the block around a path that does not hold the attention too."""
        depth = self.block.path.count(".") + 1
        pieces = path.split(".")
        for end in range(depth + 1, len(pieces) + 1):
            outer = ".".join(pieces[:end])
            if outer in self.by_path and not self.block.attention.startswith(outer + "."):
                return outer
        return path

    def _holds(self, container: str, linears: list[Call]) -> bool:
        """Whether a module's input is what its first products read: all of the MLP is inside it."""
        return bool(linears) and any(close(c.input, self.by_path[container].input) for c in linears)

    def _pre(self, down: Call, inside: list[Call], ups: list[Call]) -> None:
        width = self.block.shapes["d_mlp"]
        activations = [
            c
            for c in inside
            if c.finish <= down.start
            and next(c.module.parameters(), None) is None
            and next(c.module.children(), None) is None
            and not isinstance(c.module, nn.Dropout | nn.Identity)
            and c.input is not None
            and c.input.shape[-1] == width
        ]
        if activations:
            self.block.taps["mlp.pre"] = Tap(activations[0].path, "in")
            return
        wide = [c for c in ups if c.output is not None and c.output.shape[-1] == width and c.finish <= down.start]
        gates = [c for c in wide if c.path.rsplit(".", 1)[-1] in families.GATE_NAMES]
        if len(wide) == 1 or len(gates) == 1:
            self.block.taps["mlp.pre"] = Tap((gates or wide)[0].path, "out")
        else:
            self.block.missing["mlp.pre"] = "no activation module was found between the MLP's projections"

    def _router(self, inside: list[Call]) -> None:
        routers = [
            c
            for c in inside
            if re.search(r"(router|gate)$", c.path.rsplit(".", 1)[-1]) and c.output is not None and c.output.dim() <= 3
        ]
        experts = any(re.search(r"(^|\.)experts?(\.|$)", c.path) for c in inside)
        if routers and experts:
            self.block.taps["router"] = Tap(min(routers, key=lambda c: c.path.count(".")).path, "out")
            return
        self.block.missing["router"] = "the block has no mixture of experts"

    # ---- between attention and MLP

    def _mid(self) -> None:
        block = self.block
        if "resid_mid" in block.taps or block.kind == "unsolved":
            return
        attn, mlp = block.writes.get("attn", ()), block.writes.get("mlp", ())
        if len(attn) != 1 or len(mlp) != 1 or block.kind != "sum":
            block.missing["resid_mid"] = "the block does not write once by attention and once by an MLP"
            return
        like = self.call.output
        write = self.by_path[attn[0].path].output
        assert like is not None
        assert self.call.input is not None
        assert write is not None
        middle = self.call.input.reshape(like.shape) + attn[0].factor * write.reshape(like.shape)
        # a stream with a few very large dimensions is close to itself with a write or without: what reads the middle is
        # called after the write, and nearer to the middle than to the block's input
        near, written = gap(self.call.input, middle) / 2, self.by_path[attn[0].path].finish
        readers = [
            c
            for c in self.calls
            if c.input is not None
            and c.start > written
            and close(c.input, middle)
            and gap(c.input, middle) <= near
            and c.path not in self._after_mlp(mlp)
        ]
        if not readers:
            block.parallel = True
            block.missing["resid_mid"] = "attention and MLP are parallel: there is no stream between them"
            return
        block.taps["resid_mid"] = Tap(min(readers, key=lambda c: c.start).path, "derived")

    def _after_mlp(self, mlp: tuple[Term, ...]) -> set[str]:
        end = self.by_path[mlp[0].path].finish
        return {c.path for c in self.calls if c.start >= end}


def read_blocks(recording: Recording, paths: list[str], *, n_heads: int, inline: list[str]) -> list[Block]:
    """Read every block; a model in half precision is recorded again block by block in float32.

    Args:
        recording: of the whole model.
        paths: of the blocks.
        n_heads: query heads by the config.
        inline: attention modules that compute attention without the dispatch.
    """
    blocks = []
    for path in paths:
        attention, _ = find_attention(path, recording)
        call = recording.calls[path]
        coarse = call.output is not None and call.output.dtype in (torch.float16, torch.bfloat16)
        traced = [name for name in inline if name == attention]
        upcast = record_upcast(call, n_heads=n_heads, traced=traced) if coarse else None
        route = "trace" if traced else ("dispatch" if attention else "")
        blocks.append(BlockReader(path, recording, attention=attention, route=route, upcast=upcast).read())
    return blocks
