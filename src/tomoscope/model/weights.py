"""Weights of a model by what they do: per-head W_Q, W_K, W_V, W_O, MLP in and out, embedding and unembedding, and the
circuits they make, whatever the family stores (fused or not, transposed or not, keys and values shared between heads).

    w = Weights(subject)
    w.W_Q[layer]          [head, d_model, head_dim]   (x @ W_Q is the query, before rotary and any norm of queries)
    w.W_Q.stack()         [layer, head, d_model, head_dim], a copy
    w.OV(layer)           [head, d_model, d_model] as factors; w.composition("Q") the scores of Elhage et al. 2021
    with w.edited(("layer.3.mlp.W_out", change)): ...      a weight edit that is undone at the end

One layer's weights are views of the model's own parameters where the layout allows, so nothing is copied for a model
of any size; only shared keys and values are repeated, and only `stack()` copies.

How it can mislead: norms are not folded in (the field's other tools may fold them); a branch's own norm or scale
(Gemma 2, Granite) stands between W_O and the stream; composition scores ignore norms and positions.

Source: Elhage et al. 2021, A Mathematical Framework for Transformer Circuits.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tomoscope.errors import EditError, SiteError, UnavailableSiteError
from tomoscope.model import families
from tomoscope.model.structure import Block
from tomoscope.model.subject import Subject


class Factored(NamedTuple):
    """A product left @ right that is never formed: [.., rows, inner] and [.., inner, columns]."""

    left: Tensor
    right: Tensor

    def product(self) -> Tensor:
        """The whole matrix."""
        return self.left @ self.right

    def eigenvalues(self) -> Tensor:
        """The non-zero eigenvalues of the (square) product, from the small inner side: exact and cheap."""
        return torch.linalg.eigvals((self.right @ self.left).float())

    def norm(self) -> Tensor:
        """Frobenius norm of the product, from Gram matrices of the inner side."""
        left = self.left.transpose(-1, -2) @ self.left
        right = self.right @ self.right.transpose(-1, -2)
        return (left * right.transpose(-1, -2)).sum((-1, -2)).clamp(min=0).sqrt()


class Layered(Sequence[Tensor]):
    """One kind of weights of every layer: `weights[layer]` is a view, `stack()` a copy of all with a leading layer
    axis.
    """

    def __init__(self, get: Callable[[int], Tensor], n_layers: int) -> None:
        self._get, self._n_layers = get, n_layers

    def __getitem__(self, layer: int) -> Tensor:  # ty: ignore[incompatible-method-override]
        return self._get(layer + self._n_layers if layer < 0 else layer)

    def __len__(self) -> int:
        return self._n_layers

    def stack(self) -> Tensor:
        """All layers as one tensor; raises UnavailableSiteError where a layer lacks these weights."""
        return torch.stack([self._get(layer) for layer in range(self._n_layers)])


class Weights:
    """A subject's weights by role; see the module's docstring.

    Attributes:
        W_Q, W_K, W_V: per layer [head, d_model, head_dim]; keys and values repeated for the heads that share them.
        W_O: per layer [head, head_dim, d_model]; z[head] @ W_O[head] is the head's result.
        W_in: per layer [d_model, d_mlp], the gate's where the MLP is gated: what decides whether a neuron fires.
        W_out: per layer [d_mlp, d_model]; a neuron's row is what it writes.
    """

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self._layouts: dict[int, str] | None = None
        n_layers = subject.facts.n_layers
        self.W_Q, self.W_K = Layered(self._W_Q, n_layers), Layered(self._W_K, n_layers)
        self.W_V, self.W_O = Layered(self._W_V, n_layers), Layered(self._W_O, n_layers)
        self.W_in, self.W_out = Layered(self._W_in, n_layers), Layered(self._W_out, n_layers)

    # ---- attention

    def _block(self, layer: int) -> Block:
        blocks = self.subject.structure.blocks
        if not 0 <= layer < len(blocks):
            raise SiteError(f"There is no layer {layer}; the model has {len(blocks)}.")
        return blocks[layer]

    def _W_Q(self, layer: int) -> Float[Tensor, "head d_model head_dim"]:
        """Query weights."""
        return self._split(layer, "q")

    def _W_K(self, layer: int) -> Float[Tensor, "head d_model head_dim"]:
        """Key weights, repeated for each query head that shares them."""
        return self._repeated(self._split(layer, "k"))

    def _W_V(self, layer: int) -> Float[Tensor, "head d_model head_dim"]:
        """Value weights, repeated for each query head that shares them."""
        return self._repeated(self._split(layer, "v"))

    def _W_O(self, layer: int) -> Float[Tensor, "head head_dim d_model"]:
        """Output weights: z[head] @ W_O[head] is the head's result."""
        block = self._block(layer)
        if not block.projection:
            raise UnavailableSiteError(f"layer.{layer} has no output projection that was recognised.")
        matrix = _matrix(self.subject.model.get_submodule(block.projection))
        return matrix.reshape(block.shapes["n_heads"], -1, matrix.shape[1])

    def _repeated(self, weights: Tensor) -> Tensor:
        repeats = self.subject.facts.n_heads // len(weights)
        return weights.repeat_interleave(repeats, dim=0) if repeats > 1 else weights

    def _split(self, layer: int, which: str) -> Tensor:
        block = self._block(layer)
        if not block.attention:
            raise UnavailableSiteError(f"layer.{layer} has no attention that was recognised.")
        module = self.subject.model.get_submodule(block.attention)
        names = {"q": families.QUERY_NAMES, "k": families.KEY_NAMES, "v": families.VALUE_NAMES}[which]
        found = _named_linear(module, names)
        facts = self.subject.facts
        heads = facts.n_heads if which == "q" else block.shapes.get("n_kv_heads", facts.n_kv_heads)
        if found is not None:
            matrix = _matrix(found)
            if matrix.shape[0] != facts.d_model:
                raise UnavailableSiteError(
                    f"layer.{layer}'s {which} projection reads a compressed latent, not the stream."
                )
            heads = heads if matrix.shape[1] % heads == 0 else facts.n_kv_heads
            return matrix.reshape(matrix.shape[0], heads, -1).transpose(0, 1)
        fused = _named_linear(module, families.FUSED_NAMES)
        if fused is None:
            raise UnavailableSiteError(
                f"layer.{layer} has no {which} projection from the stream (it may compress keys and values first)."
            )
        return self._unfused(layer, _matrix(fused), which)

    def _unfused(self, layer: int, matrix: Tensor, which: str) -> Tensor:
        facts = self.subject.facts
        parts = _cut(matrix, self._layout(layer), facts.n_heads, facts.head_dim or 1)
        assert parts is not None  # the layout was found on it
        return parts[which]

    def _layout(self, layer: int) -> str:
        """How a fused projection is laid out: so that it gives back the values that attention was seen to receive."""
        if self._layouts is None:
            self._layouts = self._find_layouts()
        if layer not in self._layouts:
            raise UnavailableSiteError(f"layer.{layer}'s fused projection has a layout that was not recognised.")
        return self._layouts[layer]

    def _find_layouts(self) -> dict[int, str]:
        """Layer -> layout, for all fused layers from one forward."""
        facts, model = self.subject.facts, self.subject.model
        names = {module: name for name, module in model.named_modules()}
        fused: dict[int, nn.Module] = {}
        known = self.subject.sites()
        for layer, block in enumerate(self.subject.structure.blocks):
            module = (
                _named_linear(model.get_submodule(block.attention), families.FUSED_NAMES) if block.attention else None
            )
            if module is not None and known[f"layer.{layer}.attn.v"].available:
                fused[layer] = module
        if not fused:
            return {}
        sites = [f"{names[module]}.input" for module in fused.values()] + [f"layer.{i}.attn.v" for i in fused]
        acts = self.subject.read(torch.arange(4)[None] % 4, *sites)
        out = {}
        for layer, module in fused.items():
            given, value = acts[f"{names[module]}.input"].float(), acts[f"layer.{layer}.attn.v"].float()
            for layout in families.FUSED_LAYOUTS:
                parts = _cut(_matrix(module), layout, facts.n_heads, facts.head_dim or 1)
                if parts is not None and _gives_values(parts["v"], given, value):
                    out[layer] = layout
                    break
        return out

    # ---- MLP and ends

    def _W_in(self, layer: int) -> Float[Tensor, "d_model d_mlp"]:
        """MLP input weights (the gate's, where the MLP is gated: what decides whether a neuron fires)."""
        block = self._block(layer)
        if "mlp.pre" not in block.taps or not block.down:
            raise UnavailableSiteError(
                f"layer.{layer} has no MLP with one hidden layer: {block.missing.get('mlp.pre', '')}."
            )
        module = self.subject.model.get_submodule(block.down.rsplit(".", 1)[0])
        d_mlp, d_model = block.shapes["d_mlp"], self.subject.facts.d_model
        whole = self.subject.model.get_submodule(block.path)
        for holder in (module, whole):
            named = [(n.rsplit(".", 1)[-1], m) for n, m in holder.named_modules() if _is_linear(m)]
            fits = [(n, m) for n, m in named if _matrix(m).shape == (d_model, d_mlp)]
            gates = [m for n, m in fits if n in families.GATE_NAMES]
            if gates or fits:
                return _matrix((gates or [m for _, m in fits])[0])
        raise UnavailableSiteError(f"layer.{layer}'s MLP input weights were not recognised (they may be fused).")

    def _W_out(self, layer: int) -> Float[Tensor, "d_mlp d_model"]:
        """MLP output weights: a neuron's row is what it writes."""
        block = self._block(layer)
        if not block.down:
            raise UnavailableSiteError(f"layer.{layer} has no MLP with one hidden layer.")
        return _matrix(self.subject.model.get_submodule(block.down))

    @property
    def W_E(self) -> Float[Tensor, "vocab d_model"]:
        """Token embedding, without any scale that the family applies after it."""
        module = self.subject.model.get_input_embeddings()  # ty: ignore[not-callable]
        return module.weight.detach()

    @property
    def W_U(self) -> Float[Tensor, "d_model vocab"]:
        """Unembedding."""
        getter = getattr(self.subject.model, "get_output_embeddings", None)
        module = getter() if getter is not None else None
        if module is None or not hasattr(module, "weight"):
            raise UnavailableSiteError("The model has no unembedding (it is no language model).")
        return module.weight.T.detach()

    # ---- circuits

    def OV(self, layer: int) -> Factored:
        """What a head moves: [head, d_model, d_model] = W_V W_O, as factors."""
        return Factored(self._W_V(layer), self._W_O(layer))

    def QK(self, layer: int) -> Factored:
        """What a head looks for: [head, d_model, d_model] = W_Q W_K^T, as factors; rotary positions are left out."""
        return Factored(self._W_Q(layer), self._W_K(layer).transpose(-1, -2))

    @torch.no_grad()
    def composition(self, kind: str) -> Float[Tensor, "layer head layer_to head_to"]:
        """How far later heads read what earlier heads write: |W_OV W| / (|W_OV| |W|) in Frobenius norms.

        Args:
            kind: "Q", "K" or "V": which input of the later head.

        Returns:
            Zero where the second head is not in a later layer. Compare with `random_composition`.
        """
        if kind not in ("Q", "K", "V"):
            raise EditError(f"composition kind {kind!r} is unknown.", remedy="It is Q, K or V.")
        n_layers, heads = self.subject.facts.n_layers, self.subject.facts.n_heads
        out = torch.zeros(n_layers, heads, n_layers, heads)
        writes = [self.OV(layer) for layer in range(n_layers)]
        norms = [write.norm().float().cpu() for write in writes]
        for to in range(n_layers):
            if kind == "V":
                reads = self.OV(to)
            else:
                qk = self.QK(to)
                reads = qk if kind == "Q" else Factored(qk.right.transpose(-1, -2), qk.left.transpose(-1, -2))
            norm = reads.norm().float().cpu()
            for layer in range(to):
                inner = torch.einsum("hid,gdj->hgij", writes[layer].right, reads.left)
                left = writes[layer].left.transpose(-1, -2) @ writes[layer].left
                right = reads.right @ reads.right.transpose(-1, -2)
                squared = torch.einsum("hij,hgik,hgjl,gkl->hg", left, inner, inner, right)
                out[layer, :, to] = squared.clamp(min=0).sqrt().float().cpu() / (norms[layer][:, None] * norm[None])
        return out

    # ---- edits that are undone

    @contextmanager
    def edited(self, *changes: tuple[str, Tensor]) -> Generator[None]:
        """Add to parameters for the time of a context; the exact bits come back at its end.

        Args:
            changes: (parameter name of the model, what to add to it).

        Raises:
            EditError: no such parameter, or another shape.
        """
        parameters = dict(self.subject.model.named_parameters())
        for name, change in changes:
            if name not in parameters:
                raise EditError(f"The model has no parameter {name!r}.", remedy="See model.named_parameters().")
            if parameters[name].shape != change.shape:
                raise EditError(f"{name} has shape {tuple(parameters[name].shape)}, the change {tuple(change.shape)}.")
        kept = {name: parameters[name].detach().clone() for name, _ in changes}
        try:
            with torch.no_grad():
                for name, change in changes:
                    parameters[name].add_(change.to(parameters[name]))
            yield
        finally:
            with torch.no_grad():
                for name, value in kept.items():
                    parameters[name].copy_(value)


def _is_linear(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 2 and not isinstance(module, nn.Embedding)


def _matrix(module: nn.Module) -> Tensor:
    """A projection's weight as [in, out]; transformers' Conv1D stores it so, a linear layer the other way round."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return (weight if type(module).__name__ == "Conv1D" else weight.T).detach()


def _named_linear(module: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    for name in names:
        for path, child in module.named_modules():
            if path.rsplit(".", 1)[-1] == name and _is_linear(child):
                return child
    return None


def _gives_values(weights: Tensor, given: Tensor, value: Tensor) -> bool:
    """Whether value weights [head, d_model, head_dim] turn what a projection was given into what attention received."""
    change = given[:, 1:] - given[:, :-1]  # differences, so that biases drop out
    mine = torch.einsum("btd,hdi->bthi", change, weights.detach().float().cpu())
    seen = value[:, 1:] - value[:, :-1]
    if mine.shape[2] != seen.shape[2]:  # shared keys and values that arrive repeated
        mine = mine.repeat_interleave(max(1, seen.shape[2] // mine.shape[2]), dim=2)
    scale = seen.abs().max().clamp(min=1e-6)
    return mine.shape == seen.shape and bool((mine - seen).abs().max() < 2e-2 * scale)


def _cut(matrix: Tensor, layout: str, heads: int, width: int) -> dict[str, Tensor] | None:
    """Cut [d_model, q + k + v] into per-head q, k, v by a layout, or None where the widths don't fit it."""
    d_model, total = matrix.shape
    shared = (total - heads * width) // (2 * width)
    if shared <= 0 or (heads + 2 * shared) * width != total:
        return None
    if layout == "blocks":
        q, k, v = matrix.split([heads * width, shared * width, shared * width], dim=1)
        pieces = {
            "q": q.reshape(d_model, heads, width),
            "k": k.reshape(d_model, shared, width),
            "v": v.reshape(d_model, shared, width),
        }
    elif layout == "heads":
        if shared != heads:
            return None
        split = matrix.reshape(d_model, heads, 3, width)
        pieces = {"q": split[:, :, 0], "k": split[:, :, 1], "v": split[:, :, 2]}
    else:
        group = heads // shared
        split = matrix.reshape(d_model, shared, group + 2, width)
        pieces = {
            "q": split[:, :, :group].reshape(d_model, heads, width),
            "k": split[:, :, group],
            "v": split[:, :, group + 1],
        }
    return {name: piece.transpose(0, 1) for name, piece in pieces.items()}
