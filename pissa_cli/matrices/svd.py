"""Truncated SVD, W ~ U diag(S) Vh: exact, or by a seeded block Krylov method to a wanted accuracy; and norms."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from pissa_cli.matrices.graphs import as_graph
from pissa_cli.matrices.krylov import Krylov, doubted, first_blocks, grown, sketch, sketched_blocks, steps_at_once
from pissa_cli.matrices.orthogonal import beside, eigenvalues, factored, qr
from pissa_cli.matrices.panels import row_norms, times, transposed_times
from pissa_cli.matrices.products import has_fast_bf16

OVERSAMPLING = 16
POWER_STEPS = 3
ROUNDED_STEPS = 4  # of them where they are in bf16, but for the last
KRYLOV_BLOCKS = 2  # at least, but from a start close by
PROBES = 16  # random combinations of the residuals, from which what is missing is estimated
SURE = 0.05  # share of what is allowed, up to which the estimate counts as it is
LEVEL = 0.025  # fall of eigenvalues from the last that is wanted to the last of a block, where the estimate is doubled
SIZES = 1e-4, 1e6  # norms between which the fourth powers of singular values neither vanish nor overflow
RESOLVED = 1e-5  # share of the energy below which a difference of energies is rounding
KRYLOV_BELOW = 0.2  # width of a block over the smaller dimension, above which the whole Gram matrix is cheaper
KRYLOV_ABOVE = 192  # the smaller dimension up to which it always is on a CPU, where many small steps cost more
GRAM_BELOW = 0.7  # share of the smaller dimension that a Krylov basis may take before that matrix is
ROUNDED_FROM = 512  # rows and columns from which on bf16 products are worth it
SQUARES_ACCURATE_ABOVE = 3e-2  # singular values this far below the largest are wrong by 1e-4 after squaring in fp32
SQUARES_TELL_ABOVE = 3e-3  # ... by 1 %: they still tell what the first ones span, but not each
FAST = 1e-3
UNCHECKED = "unchecked"  # an accuracy for passes to begin with: one block, of which nothing is estimated
EXACT_NUCLEAR_BELOW = 256
LANCZOS_PROBES, LANCZOS_STEPS = 16, 12
DOUBTED_FIRST_BLOCKS, DOUBTED_SKETCH = doubted(first_blocks), doubted(sketch)
DOUBTED_SKETCHED_BLOCKS = doubted(sketched_blocks)


class SVD(NamedTuple):
    """The r largest singular triplets: U (out, r), S (r,) descending, Vh (r, in).

    If not `exact`, the columns of U are orthogonal up to rounding times (S[0] / S[-1])^2, at most a few 1e-4.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor


def generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator that depends on the seed and the tensor's name alone, not on order, device or global state."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def tolerance(accuracy: str) -> float | None:
    """By how much the residual norm may exceed the best possible: `fast` is 0.1 %, `1%` is 1 %; None for `exact`. The
    recipe allows nothing else."""
    if accuracy == "exact":
        return None
    return FAST if accuracy == "fast" else float(accuracy.removesuffix("%")) / 100


def truncated_svd(
    weight: Tensor, rank: int, accuracy: str = "fast", seed: int = 0, name: str = "", near: Tensor | None = None
) -> SVD:
    """The top `rank` singular triplets of `weight` (out, in), in fp32 and on its device.

    accuracy: see `tolerance`, or UNCHECKED. Up to it: the block Krylov method of Musco & Musco (2015) after a few power
    steps (in bf16 but for the last, where that is fast) on Gaussian numbers drawn for (seed, name); blocks of width
    rank + 16 are added until the estimate of what is missing is small enough. Where such a basis fills most of the
    space, the eigenvectors of the Gram matrix take its place. near: V (in, rank), the right singular vectors of a
    matrix close by, with which the basis begins; errors of passes add up, so a tenth of `accuracy` is left to each. The
    result does not depend on the number of threads. Raises ValueError for a rank outside 1..min(out, in).
    """
    if not 1 <= rank <= min(weight.shape):
        raise ValueError(f"rank {rank} outside 1..{min(weight.shape)}")
    weight, allowed = weight.float(), math.inf if accuracy == UNCHECKED else tolerance(accuracy)
    norm = frobenius_norm(weight)
    if not SIZES[0] < norm < SIZES[1] and 0 < (largest := float(weight.abs().max())) < math.inf:
        scale = 2.0 ** math.floor(math.log2(largest))
        U, S, Vh = truncated_svd(weight / scale, rank, accuracy, seed, name, near)
        return SVD(U, S * scale, Vh)
    with _one_thread():
        if allowed is None:
            return _exact(weight, rank)
        allowed = allowed if near is None else allowed / 10
        if weight.shape[0] >= weight.shape[1]:
            return _fast(weight, norm**2, rank, allowed, generator(seed, name), near)
        near = None if near is None else times(weight, near)
        U, S, Vh = _fast(weight.T, norm**2, rank, allowed, generator(seed, name), near)
        return SVD(Vh.T, S, U.T)


def project(weight: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """(U, U^T W) for U = orth(W A^T): of all U X the nearest to W. A: (r, in)."""
    with _one_thread():
        U = qr(times(weight, A.T))[0]
        return U, transposed_times(weight, U).T


def project_svd(weight: Tensor, A: Tensor) -> SVD:
    """The SVD of what `project` finds: that of W to rank r, where the rows of A span nearly what its first right
    singular vectors do, and its next singular values are small."""
    with _one_thread():
        Q = qr(times(weight, A.T))[0]
        P, R = qr(transposed_times(weight, Q))
        V, S, Uh = factored(torch.linalg.svd, R)
        return SVD(Q @ Uh.T, S, (P @ V).T)


def energies(weight: Tensor) -> Tensor:
    """All squared singular values of `weight`, descending: eigenvalues of the smaller Gram matrix, fp32."""
    wide = weight.float() if weight.shape[0] <= weight.shape[1] else weight.float().T
    return eigenvalues(wide @ wide.T).flip(0).clamp_min(0)


def frobenius_norm(weight: Tensor) -> float:
    """The square root of the sum of squares: rows in fp32, their sum in fp64."""
    rows = weight if weight.stride(-1) == 1 else weight.T
    return float(torch.linalg.vector_norm(row_norms(rows), dtype=torch.float64))


def nuclear_norm(weight: Tensor) -> float:
    """The sum of the singular values: exact up to a smaller dimension of 256, beyond it estimated.

    Of what quantization loses, whose spectrum is flat, to about 1 %; at low rank it is up to 25 % too small. It is
    stochastic Lanczos quadrature of tr((E^T E)^(1/2)) with 16 seeded probes and 12 steps.
    """
    if min(weight.shape) <= EXACT_NUCLEAR_BELOW:
        return float(torch.linalg.svdvals(weight.float()).sum(dtype=torch.float64))
    tall = weight.float() if weight.shape[0] >= weight.shape[1] else weight.float().T
    return _lanczos_nuclear_norm(tall, generator(0, "nuclear_norm"))


def _exact(weight: Tensor, rank: int) -> SVD:
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    return SVD(U[:, :rank].contiguous(), S[:rank].contiguous(), Vh[:rank].contiguous())


def _fast(
    weight: Tensor, energy: float, rank: int, allowed: float, source: torch.Generator, near: Tensor | None
) -> SVD:
    """For weight (m, n), m >= n, the sum of its squares in `energy`; near (n, rank)."""
    n, width = weight.shape[1], rank + OVERSAMPLING
    share = KRYLOV_BELOW if n > KRYLOV_ABOVE or weight.is_cuda else 0.0
    if math.isinf(allowed):
        share = GRAM_BELOW
    found = None
    if width <= share * n:
        found = _block_krylov(weight, energy, rank, allowed, near, source)
    if found is None:
        vectors = factored(torch.linalg.eigh, transposed_times(weight, weight))[1][:, -width:]
        found = times(weight, vectors[:, -rank:]), vectors
    U, V = found
    S, order = U.norm(dim=0).sort(descending=True)
    if S[-1] > SQUARES_ACCURATE_ABOVE * S[0]:
        return SVD(U[:, order] / S, S, V[:, -rank:].T[order])
    if S[-1] > SQUARES_TELL_ABOVE * S[0]:
        U, S, Vh = project_svd(weight, V.T)
        return SVD(U[:, :rank], S[:rank], Vh[:rank])
    return _exact(weight, rank)  # squaring has cost the small singular values


def _block_krylov(
    weight: Tensor, energy: float, rank: int, allowed: float, near: Tensor | None, source: torch.Generator
) -> tuple[Tensor, Tensor] | None:
    """(W V, V) of the top Ritz vectors V (n, rank) of G = W^T W on a Krylov space, for weight (m, n), m >= n.
    `allowed` inf: nothing is estimated.

    What is missing is raised where it may be said too low. None if the basis would have to grow beyond GRAM_BELOW.
    """
    width, unchecked = rank + OVERSAMPLING, math.isinf(allowed)
    space = _begin(weight, width, allowed, near, 1 if near is not None or unchecked else KRYLOV_BLOCKS, source)
    said = 0.0
    while True:
        values, vectors = (part[..., -width:] for part in factored(torch.linalg.eigh, space.T))
        U, V, beyond, values = space.images @ vectors[:, -rank:], space.basis @ vectors, values[0], values[-rank:]
        if unchecked:
            return U, V
        captured = float(values.sum(dtype=torch.float64))
        most = allowed * max(energy - captured, RESOLVED * energy)
        missing, before = _missing(weight, U, V[:, -rank:], values, source), len(space.T) - width
        raised = missing
        if before and SURE * most < missing <= most:
            gain = captured - float(eigenvalues(space.T[:before, :before])[-rank:].sum(dtype=torch.float64))
            raised = _raised(missing, gain, said, fall=1 - float(beyond / values[0]))
        if raised <= most:
            return U, V
        said = missing
        if len(space.T) + width > GRAM_BELOW * weight.shape[1]:
            return None
        space = grown(weight, space, width)


def _begin(
    weight: Tensor, width: int, allowed: float, near: Tensor | None, blocks: int, source: torch.Generator
) -> Krylov:
    """After power steps on Gaussian numbers, or one on `near` and such: in bf16, where that is fast and enough."""
    m, n = weight.shape
    on_gpu = weight.device.type == "cuda"
    rounded = near is None and allowed >= FAST and min(m, n) >= ROUNDED_FROM and has_fast_bf16(weight.device)
    if rounded and on_gpu:
        if (found := _sketched(weight, width, blocks, source)) is not None:
            return found
        rounded = False
    steps = 1 if near is not None else ROUNDED_STEPS if rounded else POWER_STEPS
    known = weight.new_empty(n, 0) if near is None else near
    drawn = torch.randn(n if rounded else m, width - known.shape[1], generator=source).to(weight.device)
    if on_gpu:
        *space, doubt = as_graph(DOUBTED_FIRST_BLOCKS, weight, drawn, known, options=(steps, rounded, blocks))
        if not int(doubt):
            return Krylov(*space)
    return first_blocks(weight, drawn, known, steps, rounded, blocks)


def _sketched(weight: Tensor, width: int, blocks: int, source: torch.Generator) -> Krylov | None:
    """Columns are made orthonormal as seldom as their sizes allow: on a GPU that takes longer than bf16 products."""
    drawn = torch.randn(weight.shape[1], width, generator=source).to(weight.device)
    Q, enlarged, doubt = as_graph(DOUBTED_SKETCH, weight, drawn)
    sizes = enlarged.tolist()
    if int(doubt) or not all(size > 0 for size in sizes):
        return None
    options = steps_at_once(max(sizes), min(sizes)), blocks
    *space, doubt = as_graph(DOUBTED_SKETCHED_BLOCKS, weight, Q, enlarged, options=options)
    return None if int(doubt) else Krylov(*space)


def _missing(weight: Tensor, U: Tensor, V: Tensor, values: Tensor, source: torch.Generator) -> float:
    """An estimate of the energy that the Ritz pairs of G = W^T W lack: values (r,) ascending, V (n, r), U = W V.

    To second order a pair (value, v) lacks the sum of c^2 / (value - lambda) over the eigenvectors of G, where c is the
    part of its residual G v - value v along one of them, and lambda the eigenvalue. All residuals are seen together, as
    random signed sums r. For lambda stand two points: 0, and that which gives r^T G r and r^T G^2 r; for `value` stands
    the least of them. What of r lies along V is rounding, and taken out.
    """
    signs = torch.randint(0, 2, (len(values), PROBES), generator=source).to(V) * 2 - 1
    r = beside(V, torch.addmm(transposed_times(weight, U @ signs), V, values[:, None] * signs, alpha=-1))
    image = beside(V, transposed_times(weight, times(weight, r)))
    both = torch.stack([r, image]).flatten(1).double()
    (zeroth, first), (_, second) = (both @ both.T).tolist()
    value = float(values[0])
    if not first * second > 0:
        return 0.0
    point, share = second / first, first**2 / second
    return ((zeroth - share) / value + share / (value - point)) / PROBES if point < value else math.inf


def _raised(missing: float, gain: float, said: float, fall: float) -> float:
    """`missing`, raised where there are signs that it is too low, each by a square. The last block's `gain` is small
    beside it; the gain was more than had been `said` to be missing before; or, where nothing was said yet, eigenvalues
    hardly `fall` (a share) from the last that is wanted to the last of a block. inf where nothing can be told."""
    if gain <= 0 or fall <= 0:
        return math.inf
    more = max(1.0, gain / said) ** 2 if said else 1 + (LEVEL / fall) ** 2
    return missing * (1 + missing / gain) ** 2 * more


def _lanczos_nuclear_norm(weight: Tensor, source: torch.Generator) -> float:
    """tr((W^T W)^(1/2)) ~ n * mean over unit probes v of e1^T sqrt(T_v) e1, T_v from Lanczos steps on v; W (m, n)."""
    n = weight.shape[1]
    v = torch.randn(n, LANCZOS_PROBES, generator=source).to(weight.device)
    v = v / v.norm(dim=0)
    basis = v.T[:, None, :]  # (probes, steps so far, n)
    alphas, betas = [], []
    for _ in range(LANCZOS_STEPS):
        w = transposed_times(weight, times(weight, basis[:, -1].T))
        alphas.append((w * basis[:, -1].T).sum(dim=0))
        for _ in range(2):
            w = w - torch.einsum("pkn,pk->np", basis, torch.einsum("pkn,np->pk", basis, w))
        betas.append(w.norm(dim=0))
        basis = torch.cat([basis, (w / betas[-1].clamp_min(torch.finfo(w.dtype).tiny)).T[:, None, :]], dim=1)
    T = torch.diag_embed(torch.stack(alphas, 1).double())
    off = torch.stack(betas[:-1], 1).double()
    T = T + torch.diag_embed(off, offset=1) + torch.diag_embed(off, offset=-1)
    values, vectors = factored(torch.linalg.eigh, T)
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
