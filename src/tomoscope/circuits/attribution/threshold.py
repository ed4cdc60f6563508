"""The threshold above which values hold a share of their sum, without sorting them.

Sorting all edges of a large graph needs several times their memory. Positive floats are ordered as their bits are, so
the threshold is found digit by digit: a histogram of the leading bits with each bin's sum, the bin in which the share
is reached, then the next bits of the values in that bin alone. The result is the value that sorting would give.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

DIGIT = 16
PIECE = 2**24


def holding(values: Float[Tensor, " value"], share: float) -> float:
    """The largest threshold such that the values from it on hold at least `share` of the sum of all.

    For a share of 1 it is the smallest value that is not 0.

    Args:
        values: none negative.
        share: between 0 and 1.
    """
    total = float(values.double().sum())
    if not len(values) or total <= 0:
        return 0.0
    if share >= 1:
        return float(values[values > 0].min())
    bits, kind = (64, torch.int64) if values.dtype == torch.float64 else (32, torch.int32)
    exact = values if values.dtype in (torch.float32, torch.float64) else values.float()
    wanted, above, prefix = share * total, 0.0, 0
    for shift in range(bits - DIGIT, -1, -DIGIT):
        sums = torch.zeros(2**DIGIT, dtype=torch.float64)
        for piece in exact.split(PIECE):
            code = piece.view(kind).long()
            # of the digits before, only those of the bin in which the share is reached
            mine = (
                code >> (shift + DIGIT) == prefix if shift + DIGIT < bits else torch.ones_like(code, dtype=torch.bool)
            )
            sums.index_add_(0, (code[mine] >> shift) & (2**DIGIT - 1), piece[mine].double())
        down = sums.flip(0).cumsum(0)
        reached = int((above + down < wanted * (1 - 1e-15)).sum())
        filled = torch.nonzero(sums.flip(0) > 0)[:, 0]
        # rounding may leave the whole sum just below the wanted share
        reached = min(max(reached, int(filled[0])), int(filled[-1]))
        above += float(down[reached - 1]) if reached else 0.0
        prefix = (prefix << DIGIT) | (2**DIGIT - 1 - reached)
    found = torch.tensor(prefix, dtype=torch.int64)
    return float(found.to(kind).view(exact.dtype))
