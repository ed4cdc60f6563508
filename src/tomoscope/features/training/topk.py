"""The k largest positive numbers of each row, in two steps: of groups by their maxima, then of the members of k groups.

The k largest numbers of a row lie in k groups at most, and the k groups with the largest maxima hold k numbers at least
as large as any outside them; so the answer is exact, and the selection looks at k x 16 numbers instead of all.

Positive bfloat16 numbers are in the order of their bits. On a CPU they are compared as integers, with the column in the
low bits (so that no two are equal), and numpy's partition, which is vectorised, selects: a quarter of the time of
torch's. Negative numbers come after all positive ones, in whatever order: they are no codes.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import torch
from jaxtyping import Float, Int, Int16
from torch import Tensor

GROUP = 16
LOW = 0xFFFF


def top_k(rows: Float[Tensor, "sample latent"], k: int) -> tuple[Float[Tensor, "sample k"], Int[Tensor, "sample k"]]:
    """Values and columns of each row's k largest numbers, in no order; among equal ones, and negative ones, any."""
    n, width = rows.shape
    if rows.device.type != "cpu" or width % GROUP or width // GROUP < 4 * k:
        return rows.topk(min(k, width), dim=1, sorted=False)
    step = width // GROUP
    bits = rows.dtype == torch.bfloat16 and max(step, GROUP * k) <= LOW
    held = rows.view(torch.int16) if bits else rows
    select = _largest if bits else _by_torch
    # member i of group g is column i * step + g, so that the maxima are taken over long contiguous runs
    best = select(held.view(n, GROUP, step).amax(1), k)
    members = (best[:, None, :] + (torch.arange(GROUP) * step)[None, :, None]).view(n, -1)
    which = select(held.gather(1, members), k)
    columns = members.gather(1, which)
    return rows.gather(1, columns), columns


def _by_torch(values: Tensor, k: int) -> Int[Tensor, "sample k"]:
    return values.topk(k, dim=1, sorted=False)[1]


def _largest(values: Int16[Tensor, "sample place"], k: int) -> Int[Tensor, "sample k"]:
    """Places of each row's k largest integers; numpy selects in one thread, so rows are shared out among ours."""
    held, threads = values.numpy(), torch.get_num_threads()
    out = np.empty((len(held), k), dtype=np.int64)
    cuts = [len(held) * i // threads for i in range(threads + 1)]

    def select(i: int) -> None:
        mine = slice(cuts[i], cuts[i + 1])
        keys = held[mine].astype(np.int32)
        keys <<= 16
        keys |= np.arange(keys.shape[1], dtype=np.int32)
        keys.partition(keys.shape[1] - k, axis=1)
        np.bitwise_and(keys[:, -k:], LOW, out=out[mine], casting="unsafe")

    if threads == 1:
        select(0)
    else:
        list(_pool(threads).map(select, range(threads)))
    return torch.from_numpy(out)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="top_k")
