"""Truncated SVD, W ~ U diag(S) Vh: exact, or by a seeded block Krylov method; and norms of error matrices."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from torch import Tensor

KRYLOV_BLOCKS = 5
OVERSAMPLING = 8
GRAM_ACCURATE_ABOVE = 3e-3  # singular values this far below the largest are wrong by 1 % after squaring in fp32
EXACT_NUCLEAR_BELOW = 1024


class SVD(NamedTuple):
    """The r largest singular triplets: U (out, r), S (r,) descending, Vh (r, in)."""

    U: Tensor
    S: Tensor
    Vh: Tensor


def generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator that depends on the seed and the tensor's name alone, not on order, device or global state."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def truncated_svd(
    weight: Tensor, rank: int, method: Literal["fast", "exact"] = "fast", seed: int = 0, name: str = ""
) -> SVD:
    """The top `rank` singular triplets of `weight` (out, in), computed in fp32 on its device.

    `fast` is the block Krylov method of Musco & Musco (2015) with 5 blocks of width rank + 8, from Gaussian numbers
    drawn for (seed, name). Its residual norm is within 0.1 % of the best possible on the weights of language models,
    and its result does not depend on the number of threads. Raises ValueError for a rank outside 1..min(out, in).
    """
    if not 1 <= rank <= min(weight.shape):
        raise ValueError(f"rank {rank} outside 1..{min(weight.shape)}")
    weight = weight.float()
    width = rank + OVERSAMPLING
    if method == "exact":
        return _exact(weight, rank)
    with _one_thread():
        if KRYLOV_BLOCKS * width >= min(weight.shape):
            return _exact(weight, rank)
        if weight.shape[0] >= weight.shape[1]:
            return _block_krylov(weight, rank, width, generator(seed, name))
        U, S, Vh = _block_krylov(weight.T, rank, width, generator(seed, name))
        return SVD(Vh.T, S, U.T)


def energies(weight: Tensor) -> Tensor:
    """All squared singular values of `weight`, descending: eigenvalues of the smaller Gram matrix, fp32."""
    wide = weight.float() if weight.shape[0] <= weight.shape[1] else weight.float().T
    squares: Tensor = torch.linalg.eigvalsh(wide @ wide.T)
    return squares.flip(0).clamp_min(0)


def frobenius_norm(weight: Tensor) -> float:
    """The square root of the sum of squares, accumulated in fp64."""
    return float(torch.linalg.vector_norm(weight, dtype=torch.float64))


def nuclear_norm(weight: Tensor, seed: int = 0) -> float:
    """The sum of the singular values: exact up to a smaller dimension of 1024, beyond it estimated to about 1 %.

    The estimate is stochastic Lanczos quadrature of tr((E^T E)^(1/2)) with 16 seeded probes and 12 steps.
    """
    if min(weight.shape) <= EXACT_NUCLEAR_BELOW:
        return float(torch.linalg.svdvals(weight.float()).sum(dtype=torch.float64))
    tall = weight.float() if weight.shape[0] >= weight.shape[1] else weight.float().T
    return _lanczos_nuclear_norm(tall, probes=16, steps=12, source=generator(seed, "nuclear_norm"))


def _exact(weight: Tensor, rank: int) -> SVD:
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    return SVD(U[:, :rank].contiguous(), S[:rank].contiguous(), Vh[:rank].contiguous())


def _block_krylov(weight: Tensor, rank: int, width: int, source: torch.Generator) -> SVD:
    """Rayleigh-Ritz on span{X, GX, G^2 X, ...} with G = W^T W and X = W^T Omega, for weight (m, n), m >= n."""
    omega = torch.randn(weight.shape[0], width, generator=source).to(weight.device)
    block = _orthonormal(weight.T @ omega)
    basis, images = block, weight @ block
    for _ in range(KRYLOV_BLOCKS - 1):
        block = _orthonormal_to(basis, weight.T @ images[:, -width:])
        basis = torch.cat([basis, block], dim=1)
        images = torch.cat([images, weight @ block], dim=1)
    _, vectors = torch.linalg.eigh(images.T @ images)
    vectors = vectors[:, -rank:].flip(1)
    U = images @ vectors
    S = U.norm(dim=0)
    if S[-1] > GRAM_ACCURATE_ABOVE * S[0]:
        return SVD(U / S, S, (basis @ vectors).T.contiguous())
    U, S, Vh = torch.linalg.svd(images, full_matrices=False)  # squaring has cost the small singular values
    return SVD(U[:, :rank].contiguous(), S[:rank].contiguous(), Vh[:rank] @ basis.T)


def _orthonormal_to(basis: Tensor, block: Tensor) -> Tensor:
    """An orthonormal block orthogonal to `basis`. Once is enough, unless `block` lies nearly inside the basis."""
    overlap = basis.T @ block
    for _ in range(4):
        block = _orthonormal(block - basis @ overlap)
        overlap = basis.T @ block
        if float(overlap.abs().max()) < 1e-5:
            break
    return block


def _orthonormal(block: Tensor) -> Tensor:
    """An orthonormal basis of the columns: Cholesky QR twice, Householder QR where that loses orthogonality."""
    result = block
    for _ in range(2):
        factor, info = torch.linalg.cholesky_ex(result.T @ result)
        if info.item():
            return _householder(block)
        result = torch.linalg.solve_triangular(factor.T, result, upper=True, left=False)
    error = result.T @ result
    error.diagonal().sub_(1)
    return result if float(error.abs().max()) < 1e-4 else _householder(block)


def _householder(block: Tensor) -> Tensor:
    Q: Tensor = torch.linalg.qr(block).Q
    return Q


def _lanczos_nuclear_norm(weight: Tensor, probes: int, steps: int, source: torch.Generator) -> float:
    """tr((W^T W)^(1/2)) ~ n * mean over unit probes v of e1^T sqrt(T_v) e1, T_v from `steps` Lanczos steps on v."""
    n = weight.shape[1]
    v = torch.randn(n, probes, generator=source).to(weight.device)
    v = v / v.norm(dim=0)
    basis = v.T[:, None, :]  # (probes, steps so far, n)
    alphas, betas = [], []
    for _ in range(steps):
        w = weight.T @ (weight @ basis[:, -1].T)
        alphas.append((w * basis[:, -1].T).sum(dim=0))
        for _ in range(2):
            w = w - torch.einsum("pkn,pk->np", basis, torch.einsum("pkn,np->pk", basis, w))
        betas.append(w.norm(dim=0))
        basis = torch.cat([basis, (w / betas[-1].clamp_min(torch.finfo(w.dtype).tiny)).T[:, None, :]], dim=1)
    T = torch.diag_embed(torch.stack(alphas, 1).double())
    off = torch.stack(betas[:-1], 1).double()
    T = T + torch.diag_embed(off, offset=1) + torch.diag_embed(off, offset=-1)
    values, vectors = torch.linalg.eigh(T)
    return float(n * (vectors[:, 0].square() * values.clamp_min(0).sqrt()).sum(1).mean())


@contextmanager
def _one_thread() -> Iterator[None]:
    """Products and factorizations on one thread: on more, their last bits depend on how the work was shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
