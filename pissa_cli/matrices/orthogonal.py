"""Columns made orthonormal, and factorizations of small matrices."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

SMALL = 1024  # rows of a matrix that a CPU factors sooner than a GPU does
Doubts = list[Tensor] | None
"""Where a list is given, what would be decided here is added to it instead, so that nothing waits for a GPU: the result
is worth nothing unless all of them are 0."""


def next_block(basis: Tensor, image: Tensor, doubts: Doubts = None) -> tuple[Tensor, Tensor]:
    """Q, R with image = basis C + Q R, the basis and Q orthonormal: projected and factored twice, and once more where
    columns were hardly more than rounding. If that does not help, they lie in the basis: Q is any complement of it."""
    block, R = cholesky_qr(beside(basis, image), doubts=doubts)
    for _ in range(2):
        block, step = cholesky_qr(beside(basis, block), exact=True, doubts=doubts)
        R = step @ R
        off = ~((step.diagonal() - 1).abs().max() < 0.5)  # NaN, too
        if doubts is not None:
            doubts.append(off.int())
            break
        if not off:
            break
    else:
        block = torch.linalg.qr(torch.cat([basis, block], dim=1))[0][:, basis.shape[1] :]
        R = block.T @ image
    return block, R


def beside(basis: Tensor, block: Tensor) -> Tensor:
    """What of `block` lies outside of an orthonormal basis."""
    return torch.addmm(block, basis, basis.T @ block, alpha=-1)


def qr(block: Tensor, doubts: Doubts = None) -> tuple[Tensor, Tensor]:
    """Q, R of the columns, twice Cholesky QR."""
    block, first = cholesky_qr(block, doubts=doubts)
    block, second = cholesky_qr(block, exact=True, doubts=doubts)
    return block, second @ first


def inverse(R: Tensor, identity: Tensor) -> Tensor:
    """Of an upper triangular matrix, given the identity of its size. A product with it takes half as long as solving,
    but X R^-1 R is off from X by the condition number of R times rounding."""
    found: Tensor = torch.linalg.solve_triangular(R, identity, upper=True)
    return found


def cholesky_qr(block: Tensor, exact: bool = False, doubts: Doubts = None) -> tuple[Tensor, Tensor]:
    """Q, R of the columns; Q is off from orthonormal by the square of the condition number times rounding.

    Householder QR where the Gram matrix is singular, and, with `exact`, where the columns were far from orthonormal.
    """
    gram = block.T @ block
    R, info = torch.linalg.cholesky_ex(gram, upper=True)
    if exact:
        identity = identity_of(block)
        info = info + ~(torch.dist(gram, identity, p=torch.inf) <= 0.5)
    if doubts is not None:
        doubts.append(info)
    elif int(info):
        Q, R = torch.linalg.qr(block)
        return Q, R
    if exact:  # R is near 1, and its inverse as good as solving
        return block @ inverse(R, identity), R
    return torch.linalg.solve_triangular(R, block, upper=True, left=False), R


def factored(factorize: Callable[[Tensor], Sequence[Tensor]], T: Tensor) -> list[Tensor]:
    """factorize(T), on the CPU if T is small: a GPU takes ten milliseconds and more for the steps one by one.

    In fp64 where LAPACK fails in fp32, as it does for eigenvectors where most of T is zero.
    """
    where = T.cpu() if T.shape[-1] <= SMALL else T
    try:
        parts = factorize(where)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        parts = factorize(where.double())
    return [part.to(T) for part in parts]


def eigenvalues(T: Tensor) -> Tensor:
    """Of a symmetric matrix, ascending."""
    return factored(lambda T: (torch.linalg.eigvalsh(T),), T)[0]


def identity_of(block: Tensor) -> Tensor:
    """The identity that leaves the columns of `block` as they are."""
    return torch.eye(block.shape[1], dtype=block.dtype, device=block.device)
