"""The scale of a block of numbers that are rounded to a few levels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

SCALE_GRID = (0.8, 0.88, 0.94, 1.0)
TINY = torch.finfo(torch.float32).tiny


def fit_scales(
    blocks: Tensor, nearest: Callable[[Tensor, float, Tensor], Tensor], shares: Sequence[float] = SCALE_GRID
) -> tuple[Tensor, Tensor]:
    """Scales a (n,) and codes q (n, size) of blocks w (n, size), w ~ a q, with the least squared error of some.

    For codes q, those of w / c, the best scale is a = <q, w> / <q, q>, which leaves ||w||^2 - <q, w>^2 / <q, q>. The
    candidates c are `shares` of the largest magnitude. nearest: (w / largest, share, where to write q) -> q.
    """
    largest = blocks.abs().amax(1).clamp_min_(TINY)
    unit = blocks / largest[:, None]
    codes, room = torch.empty_like(unit), torch.empty_like(unit)
    best = scale = torch.zeros_like(largest)
    for share in shares:
        q = nearest(unit, share, codes if share == shares[0] else room)
        along = (q * unit).sum(1) if q.is_cuda else torch.bmm(q[:, None], unit[:, :, None]).view(-1)
        length = torch.linalg.vector_norm(q, dim=1).square_().clamp_min_(TINY)
        gain = along.square() / length
        better = gain > best
        best, scale = torch.where(better, gain, best), torch.where(better, along / length, scale)
        if q is room and q.is_cuda:
            torch.where(better[:, None], q, codes, out=codes)
        elif q is room:  # a third of the rows, at half the cost
            rows = better.nonzero().view(-1)
            codes.index_copy_(0, rows, q.index_select(0, rows))
    return scale * largest, codes
