"""What the model holds while it reads each item: one vector an item and site, for probes.

    states = collect(subject, texts, ["embed", "layer.*.resid_post"], at="last")
    states["layer.3.resid_post"]          [item, width]

`at` is a position as everywhere ("last", an index, a span's label), or "mean": the mean over the item's tokens. How it
can mislead: the last token of a statement is often its full stop, whose state sums the sentence up in models that were
trained on such text, and does not in others; compare "last" with "mean" before saying that a concept is not there.

Items are read in batches; what is kept is items x sites x width numbers, which is checked against the free memory
before the first forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tomoscope.errors import DataError, ResourceError, UnknownSiteError, nearest
from tomoscope.model import Site, Subject
from tomoscope.model.memory import free_bytes

MEAN = "mean"
_SHARE = 0.5  # of the free memory, for the states kept
_BATCH = 64


@dataclass(frozen=True, eq=False)
class States(Mapping[str, Tensor]):
    """Vectors by site name.

    Attributes:
        by_site: site -> [item, width], float32 on the CPU.
        at: where they were read.
    """

    by_site: Mapping[str, Tensor]
    at: Any = "last"

    def __getitem__(self, site: str) -> Tensor:
        if site not in self.by_site:
            raise UnknownSiteError(f"{site!r} was not read.", remedy=nearest(site, self.by_site))
        return self.by_site[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self.by_site)

    def __len__(self) -> int:
        return len(self.by_site)

    @property
    def n(self) -> int:
        """Number of items."""
        return len(next(iter(self.by_site.values())))

    def take(self, rows: Any) -> States:
        """Some items."""
        index = torch.as_tensor(rows)
        return States({site: value[index] for site, value in self.items()}, self.at)

    def map(self, change: Callable[[Tensor], Tensor]) -> States:
        """The same sites with each value changed."""
        return States({site: change(value) for site, value in self.items()}, self.at)


def collect(
    subject: Subject,
    prompts: Sequence[Any],
    sites: str | Sequence[str] = "layer.*.resid_post",
    *,
    at: Any = "last",
    edits: Sequence[Any] = (),
    progress: Callable[[int, int], None] | None = None,
) -> States:
    """Read the states of items.

    Args:
        subject: the model.
        prompts: one an item: texts, prompts with spans, or token ids.
        sites: names or patterns; a site of several axes (heads) is flattened to one width.
        at: a position, a span's label, or "mean".
        edits: written in the same forwards.
        progress: called with (items done, items).

    Raises:
        DataError: no items, or a site without one vector an item.
        ResourceError: more than the memory holds.
    """
    items = list(prompts)
    if not items:
        raise DataError("There are no items to read.", remedy="Give at least one.")
    wanted = subject.resolve([sites] if isinstance(sites, str) else list(sites))
    _check_memory(subject, wanted, len(items))
    # items of like length together: no forward is spent on padding
    encoded = list(subject.tokens(items).prompts) if subject.input_name == "input_ids" else items
    order = sorted(range(len(items)), key=lambda i: len(getattr(encoded[i], "ids", ())))
    kept: dict[str, Tensor] = {}
    for start in range(0, len(order), _BATCH):
        rows = order[start : start + _BATCH]
        batch: Any = [encoded[i] for i in rows]
        batch = batch if subject.input_name == "input_ids" else torch.stack([torch.as_tensor(one) for one in batch])
        acts = subject.read(batch, *wanted, at=None if at == MEAN else at, edits=edits)
        for site in wanted:
            value = acts[site.name].float()
            if at == MEAN:
                weight = acts.mask.to(value)
                weight = weight.reshape(*weight.shape, *[1] * (value.dim() - 2))
                value = (value * weight).sum(1) / weight.sum(1)
            value = value.reshape(len(rows), -1)
            if site.name not in kept:
                kept[site.name] = torch.empty(len(items), value.shape[1])
            kept[site.name][torch.tensor(rows)] = value
        if progress is not None:
            progress(min(start + _BATCH, len(items)), len(items))
    return States(kept, at)


def _check_memory(subject: Subject, sites: Sequence[Site], n: int) -> None:
    widths = subject.widths
    numbers = 0
    for site in sites:
        width = 1
        for axis in site.axes[2:]:
            width *= widths.get(axis, 1)
        numbers += width
    needed, free = 4 * n * numbers, int(free_bytes(torch.device("cpu")) * _SHARE)
    if needed > free:
        raise ResourceError(
            f"The states of {n} items at {len(sites)} sites are {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB "
            "may be used.", remedy="Read fewer sites at a time, or fewer items.",
        )  # fmt: skip


def token_states(
    subject: Subject, prompts: Sequence[Any], site: str
) -> tuple[Float[Tensor, "item position width"], Float[Tensor, "item position"]]:
    """Every token's vector at one site, padded on the right, and 1 where there is a token: for attention pooling."""
    acts = subject.read(list(prompts), site)
    (name,) = list(acts)
    value, mask = acts[name].float(), acts.mask.cpu()
    order = torch.argsort(~mask, dim=1, stable=True)  # tokens first, in their order
    value = value.gather(1, order[..., None].expand_as(value))
    mask = mask.gather(1, order).to(value)
    return value * mask[..., None], mask
