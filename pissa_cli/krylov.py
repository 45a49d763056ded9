"""The block Krylov space of W^T W (Musco & Musco 2015): how it begins, and how it grows by a block."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pissa_cli.orthogonal import Doubts, cholesky_qr, eigenvalues, next_block, qr
from pissa_cli.panels import converted, times, transposed_times

SHIFT_ABOVE = 1e-2  # singular values this far below the largest are rounding, of bf16 or of a Gram matrix


class Krylov(NamedTuple):
    """G = W^T W on span{X, GX, G^2 X, ...} for W (m, n).

    basis (n, k): orthonormal, block after block. images (m, k): W basis. T (k, k): basis^T G basis, which is block
    tridiagonal in exact arithmetic, and known from making the basis orthonormal.
    """

    basis: Tensor
    images: Tensor
    T: Tensor


def first_blocks(
    weight: Tensor, drawn: Tensor, near: Tensor, steps: int, rounded: bool, blocks: int, doubts: Doubts
) -> Krylov:
    """Of `blocks` blocks, after so many power steps on `near` (n, k) and W^T `drawn`, Gaussian numbers (m, width - k).

    rounded: on `drawn` (n, width) itself, and in bf16 but for the last step. It takes the rounding away, which the
    blocks would find instead of what is missing.
    """
    if rounded:
        weights, begin = [converted(weight, torch.bfloat16)] * (steps - 1) + [weight], drawn
    else:
        weights, begin = [weight] * steps, torch.cat([near, transposed_times(weight, drawn)], dim=1)
    block = qr(_powers(weights, begin, doubts), doubts)[0]
    image = times(weight, block)
    space = Krylov(block, image, image.T @ image)
    for _ in range(blocks - 1):
        space = grown(weight, space, block.shape[1], doubts)
    return space


def grown(weight: Tensor, space: Krylov, width: int, doubts: Doubts = None) -> Krylov:
    """By one block more of the width of those that it has."""
    basis, images, T = space
    block, R = next_block(basis, transposed_times(weight, images[:, -width:]), doubts)
    image = times(weight, block)
    coupling = torch.cat([R.new_zeros(len(T) - width, width), R.T])
    T = torch.cat([torch.cat([T, coupling], dim=1), torch.cat([coupling.T, image.T @ image], dim=1)])
    return Krylov(torch.cat([basis, block], dim=1), torch.cat([images, image], dim=1), T)


def _powers(weights: list[Tensor], block: Tensor, doubts: Doubts) -> Tensor:
    """A power step block <- (W^T W - a) orth(block) for each W of `weights`, which are one matrix in several dtypes.

    a is half of what W^T W's eigenvalue of the block's width is known to exceed: of all that is not wanted it leaves
    the less (dashSVD: Feng, Yu, Xie and Tang 2024). On a GPU, which would have to be waited for, a is 0.
    """
    found, infos, shift = block, [], 0.0
    for step, W in enumerate(weights):
        gram = found.T @ found
        R, info = torch.linalg.cholesky_ex(gram, upper=True)
        infos.append(info)
        if step and W.device.type == "cpu" and not int(info):
            shift = max(shift, (shift + _least_singular_value(gram)) / 2)
        Q = torch.linalg.solve_triangular(R, found, upper=True, left=False)
        found = transposed_times(W, times(W, Q)).float()
        if shift:
            found.sub_(Q, alpha=shift)
    if doubts is not None:
        doubts += infos
        return found
    if not int(torch.stack(infos).sum()):
        return found
    for W in weights:
        block = transposed_times(W, times(W, cholesky_qr(block)[0])).float()
    return block


def _least_singular_value(gram: Tensor) -> float:
    """Of X, from X^T X; 0 where that does not tell."""
    squares = eigenvalues(gram)
    return float(squares[0]) ** 0.5 if squares[0] > SHIFT_ABOVE**2 * squares[-1] else 0.0
