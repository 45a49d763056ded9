"""Parts of one large tensor, computed by threads that are free.

How it is cut depends on its shape alone, and each part is computed on one thread: the bits do not depend on how many
there are.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

PANEL = 2**21  # numbers of a panel of rows
PIECE = 2**18  # numbers that stay in a cache while they are rounded
DROPPED = {torch.bfloat16: 16, torch.float16: 13}
"""Bits of fp32 that a dtype has not."""
T = TypeVar("T")
R = TypeVar("R")
_here = threading.local()


@contextmanager
def helpers(threads: int) -> Iterator[Callable[[], None]]:
    """What a thread calls to have `in_parallel` use so many helpers. With one there are none."""
    if threads == 1:
        yield lambda: None
        return
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield lambda: setattr(_here, "pool", pool)


def in_parallel(work: Callable[[T], R], parts: Iterable[T]) -> list[R]:
    """work(part) of every part, in their order."""
    pool: ThreadPoolExecutor | None = getattr(_here, "pool", None)
    return list(map(work, parts) if pool is None else pool.map(work, parts))


def times(W: Tensor, X: Tensor) -> Tensor:
    """W X in the dtype of W; W (m, n), X (n, k)."""
    X = X.to(W.dtype)
    if not _is_large(W):
        return _product(W, X)
    return _by_rows(W, X) if W.is_contiguous() else _by_shares(W.T, X)


def transposed_times(W: Tensor, Y: Tensor) -> Tensor:
    """W^T Y in the dtype of W; W (m, n), Y (m, k)."""
    Y = Y.to(W.dtype)
    if not _is_large(W):
        return _product(W.T, Y)
    return _by_shares(W, Y) if W.is_contiguous() else _by_rows(W.T, Y)


def minus_product(W: Tensor, B: Tensor, A: Tensor, share: float = 1.0, into: Tensor | None = None) -> Tensor:
    """W - share B A, written to `into` if that is given; W (m, n), B (m, k), A (k, n)."""
    into = torch.empty_like(W) if into is None else into
    panels = _rows(W)
    parts = zip(panels, B.split(len(panels[0])), into.split(len(panels[0])), strict=True)
    in_parallel(lambda part: torch.addmm(part[0], part[1], A, alpha=-share, out=part[2]), parts)
    return into


def converted(W: Tensor, dtype: torch.dtype) -> Tensor:
    """W (m, n) in `dtype`; W itself where it has that already."""
    if W.dtype == dtype or not _is_large(W):
        return W.to(dtype)
    out = torch.empty_like(W, dtype=dtype)
    in_parallel(lambda pair: pair[1].copy_(pair[0]), zip(_rows(W), _rows(out), strict=True))
    return out


def rounded_at_random(W: Tensor, dtype: torch.dtype, draws: torch.Generator) -> Tensor:
    """W fp32 in 16 bits, each number rounded to one of its two neighbours at random, the nearer one the likelier, so
    that the mean is W.

    What lies below the last bit is kept on average so. Rounded to the nearest, a number that `dtype` has, changed by
    less than half of its last bit, would come out as it was. Numbers of fp16 below 2^-14 do go to the nearest.
    """
    mask = 2 ** DROPPED[dtype] - 1
    flat = W.reshape(-1)
    piece = PIECE if W.device.type == "cpu" else max(1, len(flat))
    words = torch.empty((W.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None, generator=draws)
    noise, out = words.view(torch.int16)[: len(flat)].to(W.device), torch.empty_like(flat, dtype=dtype)

    def work(part: tuple[Tensor, Tensor, Tensor]) -> None:
        W, noise, out = part
        bits = noise.int().bitwise_and_(mask).add_(W.view(torch.int32)).bitwise_and_(~mask)
        out.copy_(bits.view(torch.float32))

    in_parallel(work, zip(flat.split(piece), noise.split(piece), out.split(piece), strict=True))
    return out.view(W.shape)


def minus(W: Tensor, other: Tensor) -> Tensor:
    """W - other."""
    out = torch.empty_like(W)
    in_parallel(
        lambda part: torch.sub(part[0], part[1], out=part[2]), zip(_rows(W), _rows(other), _rows(out), strict=True)
    )
    return out


def row_norms(W: Tensor) -> Tensor:
    """The Euclidean norms (m,) of the rows of W (m, n), fp32."""
    return torch.cat(in_parallel(lambda panel: torch.linalg.vector_norm(panel, dim=-1), _rows(W)))


def _is_large(W: Tensor) -> bool:
    return W.numel() > PANEL and W.device.type == "cpu"


def _rows(W: Tensor) -> tuple[Tensor, ...]:
    panels: tuple[Tensor, ...] = W.split(max(1, PANEL // W.shape[1]) if _is_large(W) else len(W))
    return panels


def _product(W: Tensor, X: Tensor) -> Tensor:
    """W X. A CPU reads a W that lies transposed faster from the right, by a fifth for an X of 32 columns."""
    from_right = W.device.type == "cpu" and W.dtype == torch.float32 and W.T.is_contiguous()
    return (X.T @ W.T).T if from_right else W @ X


def _by_rows(W: Tensor, X: Tensor) -> Tensor:
    return torch.cat(in_parallel(lambda panel: panel @ X, _rows(W)))


def _by_shares(W: Tensor, Y: Tensor) -> Tensor:
    """W^T Y, the shares of W's panels added in their order."""
    panels = _rows(W)
    pairs = zip(panels, Y.split(len(panels[0])), strict=True)
    total: Tensor
    total, *shares = in_parallel(lambda pair: _product(pair[0].T, pair[1]).float(), pairs)
    for share in shares:
        total += share
    return total.to(W.dtype)
