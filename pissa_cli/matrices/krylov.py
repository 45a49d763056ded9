"""The block Krylov space of W^T W (Musco & Musco 2015): how it begins, and how it grows by a block."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pissa_cli.matrices.orthogonal import Doubts, cholesky_qr, identity_of, inverse, next_block, qr
from pissa_cli.matrices.panels import converted, times, transposed_times

APART = 300.0  # how far apart the singular values of columns may be for Cholesky QR in fp32, with a margin
WITHIN = 60.0  # logarithm of what numbers of bf16 may grow by
STEPS_AT_ONCE = 1, 2, 6  # few numbers: each is a graph of its own
SQUARINGS = 2  # of an inverse, until its norm tells the least singular value well enough to shift by half of it
SHIFT_ABOVE = 1e-2  # singular values this far below the largest are rounding, of bf16 or of a Gram matrix


class Krylov(NamedTuple):
    """G = W^T W on span{X, GX, G^2 X, ...} for W (m, n).

    basis (n, k): orthonormal, block after block. images (m, k): W basis. T (k, k): basis^T G basis, which is block
    tridiagonal in exact arithmetic, and known from making the basis orthonormal.
    """

    basis: Tensor
    images: Tensor
    T: Tensor


class Halves(NamedTuple):
    """W = high + low, both in bf16: three products of such numbers are off by 4e-6, one in fp32 by 3e-7 and slower on a
    GPU."""

    high: Tensor
    low: Tensor


def first_blocks(
    weight: Tensor, drawn: Tensor, near: Tensor, steps: int, rounded: bool, blocks: int, doubts: Doubts = None
) -> Krylov:
    """The space of `blocks` blocks that begins after `steps` power steps on near (n, k), vectors close to those wanted,
    and W^T drawn, with Gaussian numbers drawn (m, width - k).

    rounded: the steps begin with drawn (n, width) itself, and run in bf16 but for the last. That one takes the rounding
    away, which further blocks would find in place of what is missing.
    """
    if rounded:
        weights, begin = [converted(weight, torch.bfloat16)] * (steps - 1) + [weight], drawn
    else:
        weights, begin = [weight] * steps, torch.cat([near, transposed_times(weight, drawn)], dim=1)
    return _of_blocks(weight, qr(_powers(weights, begin, doubts), doubts)[0], blocks, doubts)


def sketch(weight: Tensor, drawn: Tensor, doubts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Q (n, width) after two power steps in bf16 on Gaussian numbers `drawn` (n, width); and how much the second one
    enlarged its columns, descending as far as they are sorted by now: about the first eigenvalues of W^T W."""
    W = weight.to(torch.bfloat16)
    Q = cholesky_qr(_power(W, drawn), doubts=doubts)[0]
    Q, R = cholesky_qr(_power(W, Q), doubts=doubts)
    return Q, R.diagonal().abs()


def steps_at_once(most: float, least: float) -> int:
    """How many power steps may go by until columns must be made orthonormal again, if one enlarges them by `most` to
    `least`: their numbers stay apart and within their range."""
    apart = math.log(APART) / max(math.log(most / least), 1e-3)
    within = WITHIN / max(abs(math.log(most)), 1e-3)
    return max((steps for steps in STEPS_AT_ONCE if steps <= min(apart, within)), default=1)


def sketched_blocks(
    weight: Tensor, Q: Tensor, enlarged: Tensor, at_once: int, blocks: int, doubts: list[Tensor]
) -> Krylov:
    """Of `blocks` blocks, after 2 `at_once` power steps in bf16 on the Q of a `sketch`, and one that takes the rounding
    away."""
    high = weight.to(torch.bfloat16)
    W = Halves(high, (weight - high).to(torch.bfloat16))
    for _ in range(2):
        found = Q / enlarged.max() ** at_once
        for _ in range(at_once):
            found = _power(high, found)
        Q = cholesky_qr(found, doubts=doubts)[0]
    return _of_blocks(W, qr(_power(W, Q), doubts)[0], blocks, doubts)


def doubted(function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """What `function` gives for a list of doubts, and last their sum."""

    def with_doubts(*given: Any) -> tuple[Tensor, ...]:
        doubts: list[Tensor] = []
        return *function(*given, doubts), torch.stack(doubts).sum()

    return with_doubts


def grown(weight: Tensor | Halves, space: Krylov, width: int, doubts: Doubts = None) -> Krylov:
    """By one block more of the width of those that it has."""
    basis, images, T = space
    block, R = next_block(basis, _transposed_times(weight, images[:, -width:]), doubts)
    image = _times(weight, block)
    T = torch.block_diag(T, image.T @ image)
    T[-2 * width : -width, -width:] = R.T
    T[-width:, -2 * width : -width] = R
    return Krylov(torch.cat([basis, block], dim=1), torch.cat([images, image], dim=1), T)


def _of_blocks(weight: Tensor | Halves, block: Tensor, blocks: int, doubts: Doubts) -> Krylov:
    image = _times(weight, block)
    space = Krylov(block, image, image.T @ image)
    for _ in range(blocks - 1):
        space = grown(weight, space, block.shape[1], doubts)
    return space


def _power(W: Tensor | Halves, X: Tensor) -> Tensor:
    """W^T W X, fp32."""
    return _transposed_times(W, _times(W, X)).float()


def _times(W: Tensor | Halves, X: Tensor) -> Tensor:
    """W X."""
    return times(W, X) if isinstance(W, Tensor) else _sum_of_products(W.high, W.low, X)


def _transposed_times(W: Tensor | Halves, Y: Tensor) -> Tensor:
    """W^T Y."""
    return transposed_times(W, Y) if isinstance(W, Tensor) else _sum_of_products(W.high.T, W.low.T, Y)


def _sum_of_products(high: Tensor, low: Tensor, X: Tensor) -> Tensor:
    """(high + low) X for X (n, k), fp32, but for the product of both low halves."""
    X_high = X.to(torch.bfloat16)
    X_low = (X - X_high).to(torch.bfloat16)
    both, k = _product(high, torch.cat([X_high, X_low], dim=1)), X.shape[1]
    return both[:, :k] + both[:, k:] + _product(low, X_high)


def _product(A: Tensor, B: Tensor) -> Tensor:
    """A B of bf16 numbers in fp32, which torch has on a GPU alone."""
    return torch.mm(A, B, out_dtype=torch.float32)


def _powers(weights: list[Tensor], block: Tensor, doubts: Doubts) -> Tensor:
    """A power step block <- (W^T W - a) orth(block) for each W of `weights`, which are one matrix in several dtypes.

    a is about half of W^T W's eigenvalue of the block's width, as far as that is known: of what is not wanted it leaves
    the less (dashSVD: Feng, Yu, Xie and Tang 2024). On a GPU, which would have to be waited for, a is 0.
    """
    found, shift, identity = block, 0.0, identity_of(block)
    for step, W in enumerate(weights):
        gram = found.T @ found
        R, info = torch.linalg.cholesky_ex(gram, upper=True)
        inverted = inverse(R, identity)
        if doubts is not None:
            doubts.append(info)
        elif int(info):
            break
        elif step and W.device.type == "cpu":
            shift = max(shift, (shift + _least_singular_value(gram, inverted)) / 2)
        Q = found @ inverted
        found = _power(W, Q)
        if shift:
            found.sub_(Q, alpha=shift)
    else:
        return found
    for W in weights:
        block = _power(W, cholesky_qr(block)[0])
    return block


def _least_singular_value(gram: Tensor, inverted: Tensor) -> float:
    """Of X (n, k), from X^T X = R^T R and R^-1, by the norm of a power of the Gram matrix's inverse: too small by at
    most k^(1/16); 0 where that does not tell."""
    found = inverted @ inverted.T
    trace = found.trace()
    powers = found / trace
    for _ in range(SQUARINGS):
        powers = powers @ powers
    length = float(trace) * float(torch.linalg.vector_norm(powers)) ** 0.5**SQUARINGS
    return length**-0.5 if 0 < length * SHIFT_ABOVE**2 * float(gram.diagonal().max()) < 1 else 0.0
