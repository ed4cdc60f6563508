"""Gradients of a metric at any sites: one forward with the sites kept in the graph, one backward.

Parameters are frozen for the call, so no weight gradient is computed and a backward costs about one forward. A pattern
or its scores have a gradient only where the kernel uses them, so those layers run as pattern @ value for this call:
their logits may then differ from the fused kernel's in the last bits.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tomoscope.errors import ModelError
from tomoscope.model.batch import Batch
from tomoscope.model.edits import Edit
from tomoscope.model.probe import unwrap
from tomoscope.model.regions import Bound
from tomoscope.model.results import Activations, Gradients, join
from tomoscope.model.sites import Site
from tomoscope.model.taps import Session

if TYPE_CHECKING:
    from tomoscope.model.subject import Metric, Subject


@contextmanager
def frozen(model: nn.Module) -> Generator[None]:
    """Parameters need no gradient inside, and are as they were after: a backward then costs one forward, not two."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


def gradients(
    subject: Subject, prompts: Any, metric: Metric, sites: Sequence[Site], *, edits: Sequence[Edit] = ()
) -> Gradients:
    """See `Subject.gradients`."""
    batch = subject.tokens(prompts)
    step = subject.rows_per_call(max(batch.width, 1), sites, gradients=True)
    grads, values, numbers = [], [], []
    for start in range(0, len(batch), step):
        piece = batch.take(slice(start, start + step))
        bound = subject._bind_piece(edits, batch, piece, start)
        grad, value, number = _one_call(subject, piece, metric, sites, bound)
        grads.append(grad)
        values.append(value)
        numbers.append(number)
    return Gradients(join(grads, batch), join(values, batch), torch.cat(numbers))


def _one_call(
    subject: Subject, batch: Batch, metric: Metric, sites: Sequence[Site], bound: Sequence[Bound]
) -> tuple[Activations, Activations, Tensor]:
    whole = list(dict.fromkeys(site.whole for site in sites))
    session = Session(subject.model, subject.structure, reads=whole, edits=bound, batch_size=len(batch), graph=True)
    arguments = subject.forward_arguments(batch)
    with torch.enable_grad(), frozen(subject.model), ExitStack() as stack:
        arguments = {name: _leaf(value) for name, value in arguments.items()}
        for module in _entries(subject):
            stack.callback(module.register_forward_hook(_start_graph).remove)
        stack.enter_context(session)
        logits = unwrap(subject.model(**arguments))[0]
        if logits is None:
            raise ModelError("The model gave no logits to take a metric of.")
        numbers = metric(logits, batch)
        tensors = [session.values[site] for site in whole]
        found = torch.autograd.grad(numbers.sum(), tensors, allow_unused=True)
    grads, values, names = {}, {}, {}
    for site, value, grad in zip(whole, tensors, found, strict=True):
        grad = torch.zeros_like(value) if grad is None else grad
        factor = session.tap(site).factor
        grads[site], values[site] = _finish(session, site, grad / factor, value.detach() * factor)
    out_grads, out_values = {}, {}
    for site in sites:
        out_grads[site.name] = _heads(grads[site.whole], site).cpu()
        out_values[site.name] = _heads(values[site.whole], site).cpu()
        axes = [a for i, a in enumerate(site.axes) if not (len(site.heads) == 1 and i == site.head_axis)]
        names[site.name] = (*axes, *(f"axis{i}" for i in range(len(axes), out_values[site.name].dim())))
    return Activations(out_grads, names, batch), Activations(out_values, names, batch), numbers.detach().cpu()


def _finish(session: Session, site: Site, grad: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Bring a recorded tensor and its gradient to the site's axes."""
    if site.part == "attn.result" and site.layer is not None:
        # what was kept is the projection's output, to which every head's result is added: they share its gradient
        heads = session.structure.blocks[site.layer].shapes["n_heads"]
        grad = session._shaped(Site("attn.out", site.layer), grad)
        return grad[:, :, None].expand(-1, -1, heads, -1), session.results[site]
    return session._shaped(site, grad), session._shaped(site, value)


def _heads(value: Tensor, site: Site) -> Tensor:
    if not site.heads or site.head_axis is None:
        return value
    picked = value.index_select(site.head_axis, torch.tensor(site.heads, device=value.device))
    return picked.squeeze(site.head_axis) if len(site.heads) == 1 else picked


def _leaf(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().clone().requires_grad_(True)
    return value


def _entries(subject: Subject) -> list[nn.Module]:
    """Modules whose output starts the graph: with frozen parameters nothing else would need a gradient."""
    return [module for module in subject.model.modules() if isinstance(module, nn.Embedding)]


def _start_graph(module: nn.Module, args: tuple, output: Any) -> Any:
    return output if output.requires_grad else output.requires_grad_(True)
