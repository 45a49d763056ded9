"""The scale of a block of numbers that are rounded to a few levels, and the nearest of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SCALE_GRID = (0.8, 0.88, 0.94, 1.0)
STEPS = 1024  # cells of the lookup tables in [0, 1]; each holds one midpoint of levels at most
WHOLE = 2**23  # from here on fp32 has whole numbers alone, by ones: the last bits of WHOLE + k are those of k
TINY = torch.finfo(torch.float32).tiny


def fit_scales(
    blocks: Tensor, nearest: Callable[[Tensor, float, Tensor], Tensor], shares: Sequence[float] = SCALE_GRID
) -> tuple[Tensor, Tensor]:
    """A scale a (n,) and codes q (n, size) for each of the blocks w (n, size), so that a q is near w.

    A few candidates are tried, and that with the least squared error is taken. Each divides w by one of `shares` of its
    largest magnitude and rounds to levels, q. For this q the best scale is a = <q, w> / <q, q>, and the error
    ||w||^2 - <q, w>^2 / <q, q>. nearest: (w / largest, share, where to write q) -> q.
    """
    largest = blocks.abs().amax(1).clamp_min_(TINY)
    unit = blocks / largest[:, None]
    codes, room = torch.empty_like(unit), torch.empty_like(unit)
    best = scale = torch.zeros_like(largest)
    for share in shares:
        q = nearest(unit, share, codes if share == shares[0] else room)
        along = (q * unit).sum(1)
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


@dataclass(frozen=True)
class Levels:
    """Levels from -1 to 1, and tables by which the one nearest to a number is looked up.

    The cell k are the numbers around k / STEPS, beyond 1 as well. Of each cell, near: the level nearest to its middle;
    first: the code (place among the levels) of its start; midpoint: of all midpoints of two levels, the first above its
    start. zero: the cell of 0, plus WHOLE.
    """

    values: Tensor
    near: Tensor
    first: Tensor
    midpoint: Tensor
    zero: Tensor

    @classmethod
    def of(cls, values: Tensor) -> Levels:
        """values (n,): fp32, ascending, up to 256."""
        middles = (values[1:] + values[:-1]) / 2
        beyond = math.ceil(STEPS / min(SCALE_GRID))
        cells = torch.arange(-beyond, beyond + 1, device=values.device)
        near = values[torch.bucketize(cells / STEPS, middles)]
        first = torch.bucketize((cells - 0.5) / STEPS, middles)
        midpoint = torch.cat([middles, middles.new_full((1,), torch.inf)])[first]
        return cls(values, near, first.to(torch.uint8), midpoint, values.new_tensor(beyond + WHOLE))

    def nearest(self, unit: Tensor, share: float, out: Tensor) -> Tensor:
        """The nearest levels of unit / share; within half a cell of a midpoint it may be the next one."""
        torch.index_select(self.near, 0, self._cells(unit, share), out=out.view(-1))
        return out

    def codes(self, blocks: Tensor, absmax: Tensor) -> Tensor:
        """The codes (n, size) uint8 of the nearest levels of blocks under their scales (n,)."""
        scaled = (blocks / torch.where(absmax > 0, absmax, 1.0)[:, None]).clamp_(-1, 1)
        cells = self._cells(scaled)
        above = scaled.view(-1) > torch.index_select(self.midpoint, 0, cells)
        return torch.index_select(self.first, 0, cells).add_(above).view_as(blocks)

    def _cells(self, unit: Tensor, share: float = 1.0) -> Tensor:
        """The cells (numel,) int32 of unit / share: added to WHOLE they are rounded, and stand in the last bits."""
        return torch.add(self.zero, unit, alpha=STEPS / share).view(torch.int32).bitwise_and_(WHOLE - 1).view(-1)
