"""How many rows of a batch fit: an estimate from the model's widths and what is asked for, against the memory that is
free.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import torch

from tomoscope import axes
from tomoscope.model.sites import Site

SHARE = 0.3  # of the free memory, for what one call computes and keeps
MOST_TOKENS = 16_384  # beyond this a larger batch is no faster


def free_bytes(device: torch.device) -> int:
    """Bytes free on a device, by the operating system's or driver's own account."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2)


def row_bytes(widths: dict[str, int], width: int, sites: Iterable[Site], *, itemsize: int, gradients: bool) -> int:
    """Bytes that one row of `width` tokens needs: logits, working memory, and the sites kept.

    Args:
        widths: size of each named axis of the model.
        width: tokens of a row.
        sites: what is read.
        itemsize: bytes of a number.
        gradients: whether everything is kept for a backward pass.
    """
    stream, vocab, hidden = widths.get(axes.D_MODEL, 1), widths.get(axes.VOCAB, 0), widths.get(axes.D_MLP, 0)
    working = width * (2 * vocab + 8 * stream + 2 * hidden) * itemsize
    if gradients:
        working += width * widths.get(axes.LAYER, 1) * (12 * stream + 4 * hidden) * itemsize
    sizes = {**widths, axes.POSITION: width, axes.QUERY: width, axes.KEY: width, axes.BATCH: 1}
    kept = 0
    for site in sites:
        count = 1
        for axis in site.axes:
            count *= sizes.get(axis, 1)
        kept += count * itemsize
        if site.part in ("attn.scores", "attn.pattern"):
            working = max(working, 4 * count * itemsize)
    return max(1, working + 2 * kept)


def rows_that_fit(device: torch.device, per_row: int, width: int) -> int:
    """Rows for one call, at least one."""
    by_memory = int(free_bytes(device) * SHARE) // per_row
    return max(1, min(by_memory, MOST_TOKENS // max(width, 1)))
