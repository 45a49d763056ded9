"""Truncated SVD against NumPy, its determinism, and the norms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from pissa_cli.matrices import krylov, svd
from pissa_cli.matrices.orthogonal import inverse, next_block, qr
from pissa_cli.matrices.svd import energies, frobenius_norm, nuclear_norm, project, project_svd, truncated_svd


def decaying(out: int, inn: int, rate: float = 0.98, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    k = min(out, inn)
    U, V = torch.linalg.qr(torch.randn(out, k)).Q, torch.linalg.qr(torch.randn(inn, k)).Q
    return (U * rate ** torch.arange(k)) @ V.T


def residual(weight: Tensor, found: svd.SVD) -> float:
    return float((weight.double() - (found.U * found.S).double() @ found.Vh.double()).norm())


def best_residual(weight: Tensor, rank: int) -> float:
    return float(np.linalg.norm(np.linalg.svd(weight.double().numpy(), compute_uv=False)[rank:]))


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (64, 64)])
def test_exact_against_numpy(shape: tuple[int, int]) -> None:
    weight = decaying(*shape, rate=0.9)
    U, S, Vh = truncated_svd(weight, 5, "exact")
    u, s, vh = np.linalg.svd(weight.double().numpy(), full_matrices=False)
    np.testing.assert_allclose(S, s[:5], rtol=1e-5)
    np.testing.assert_allclose((U * S) @ Vh, (u[:, :5] * s[:5]) @ vh[:5], atol=1e-5)


@pytest.mark.parametrize("rank", [16, 64])
def test_fast_residual_on_trained_matrices(real_matrices: dict[str, Tensor], rank: int) -> None:
    for name, weight in real_matrices.items():
        if rank < min(weight.shape):
            assert residual(weight, truncated_svd(weight, rank, name=name)) <= 1.001 * best_residual(weight, rank), name


@pytest.mark.parametrize(("shape", "rank"), [((400, 300), 16), ((300, 500), 8), ((900, 700), 64)])
def test_fast_residual_where_krylov_runs(shape: tuple[int, int], rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(svd, "_exact", None)
    for weight in (decaying(*shape, rate=0.995), torch.randn(shape, generator=torch.Generator().manual_seed(1))):
        found = truncated_svd(weight, rank)
        assert residual(weight, found) <= 1.001 * best_residual(weight, rank)
        assert bool((found.S[:-1] >= found.S[1:]).all())
        torch.testing.assert_close(found.U.T @ found.U, torch.eye(rank), atol=1e-3, rtol=0)
        torch.testing.assert_close(found.Vh @ found.Vh.T, torch.eye(rank), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("accuracy", "share"), [("fast", 1e-3), ("1%", 1e-2), ("0.01%", 1e-4)])
@pytest.mark.parametrize("shape", [(600, 500), (500, 1200), (1500, 1000)])
def test_residual_keeps_the_accuracy_asked_for(accuracy: str, share: float, shape: tuple[int, int]) -> None:
    flat = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    for weight in (decaying(*shape, rate=0.995), flat, flat**3):
        for rank in (8, 40):
            found = truncated_svd(weight, rank, accuracy)
            assert residual(weight, found) <= (1 + share) * best_residual(weight, rank)


@pytest.mark.parametrize("shape", [(600, 500), (500, 600), (400, 300)])
def test_a_start_from_a_matrix_close_by(shape: tuple[int, int]) -> None:
    weight = decaying(*shape, rate=0.995)
    moved = weight + 0.003 * torch.randn(shape, generator=torch.Generator().manual_seed(2))
    found = truncated_svd(moved, 24, near=truncated_svd(weight, 24).Vh.T)
    assert residual(moved, found) <= 1.001 * best_residual(moved, 24)
    unlike = truncated_svd(torch.randn(shape, generator=torch.Generator().manual_seed(3)), 24)
    assert residual(moved, truncated_svd(moved, 24, near=unlike.Vh.T)) <= 1.001 * best_residual(moved, 24)
    zero = truncated_svd(torch.zeros(shape), 24)
    assert residual(moved, truncated_svd(moved, 24, near=zero.Vh.T)) <= 1.001 * best_residual(moved, 24)


@pytest.mark.parametrize("shape", [(120, 90), (90, 120)])
def test_projected_on_what_rows_close_by_reach(shape: tuple[int, int]) -> None:
    weight, A = decaying(*shape), torch.randn(6, shape[1], generator=torch.Generator().manual_seed(1))
    Q = np.linalg.qr(weight.double().numpy() @ A.double().numpy().T)[0]
    U, projected = project(weight, A)
    np.testing.assert_allclose(U.T @ U, np.eye(6), atol=1e-5)
    np.testing.assert_allclose(U @ projected, Q @ Q.T @ weight.double().numpy(), atol=1e-5)
    U, projected = project(weight, torch.zeros_like(A))  # Householder QR's turn
    np.testing.assert_allclose(U.T @ U, np.eye(6), atol=1e-5)
    assert torch.isfinite(projected).all()


def test_projected_twice_where_singular_values_lie_far_apart() -> None:
    weight = torch.linalg.qr(torch.randn(128, 4, generator=torch.Generator().manual_seed(1))).Q @ torch.eye(4, 96)
    weight = weight + 1e-5 * torch.randn(128, 96, generator=torch.Generator().manual_seed(2))
    A = truncated_svd(weight, 16).Vh
    for _ in range(4):
        U, A = project(weight, A)
        np.testing.assert_allclose(U.T @ U, np.eye(16), atol=1e-5)


def test_the_svd_of_a_matrix_whose_row_space_is_nearly_known() -> None:
    weight = decaying(120, 90, rate=0.8)
    weight = weight + 1e-4 * torch.randn(120, 90, generator=torch.Generator().manual_seed(1))
    known = torch.linalg.svd(weight).Vh[:8] + 0.01 * torch.randn(8, 90, generator=torch.Generator().manual_seed(2))
    found = project_svd(weight, torch.randn(8, 8, generator=torch.Generator().manual_seed(3)) @ known)
    assert residual(weight, found) <= 1.001 * best_residual(weight, 8)
    np.testing.assert_allclose(found.S, np.linalg.svd(weight.double().numpy(), compute_uv=False)[:8], rtol=1e-3)
    torch.testing.assert_close(found.U.T @ found.U, torch.eye(8), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.Vh @ found.Vh.T, torch.eye(8), atol=1e-5, rtol=0)


@pytest.mark.parametrize("rate", [1.0, 0.99, 0.95])
def test_the_least_singular_value_that_shifts_go_by(rate: float) -> None:
    mixed = torch.randn(60, 60, generator=torch.Generator().manual_seed(1))
    block = decaying(200, 60, rate) @ torch.linalg.qr(mixed).Q
    R = torch.linalg.cholesky(block.T @ block, upper=True)
    least = np.linalg.svd(block.double().numpy(), compute_uv=False)[-1]
    found = krylov._least_singular_value(block.T @ block, inverse(R, torch.eye(60)))
    assert least / 60 ** (1 / 16) < found * 1.001 and found <= least * 1.001


@pytest.mark.parametrize("least", [1e-3, 1e-20, 0.0])
def test_no_shift_is_known_where_the_least_singular_value_is_rounding(least: float) -> None:
    R = torch.diag(torch.tensor([1.0, 0.5, least]))
    assert krylov._least_singular_value(R.T @ R, inverse(R, torch.eye(3))) == 0


def test_two_singular_values_that_have_crossed() -> None:
    """The vectors of before are singular vectors still, but not the largest."""
    before = 0.7 ** torch.arange(500.0)
    after = before.clone()
    after[23], after[24] = before[24], before[23]
    U, V = decaying(600, 500, rate=1.0), torch.eye(500)
    weight = (U * after) @ V
    near = truncated_svd((U * before) @ V, 24, "exact").Vh.T
    assert residual(weight, truncated_svd(weight, 24, near=near)) <= 1.001 * best_residual(weight, 24)


@pytest.mark.parametrize(
    ("last", "width", "floor", "rank"),
    [
        (0.9, 120, 0.02, 30),
        (0.97, 300, 0.26, 100),
        (0.98, 350, 0.1, 100),
        (0.989, 306, 0.2, 98),
        (0.99, 200, 0.3, 88),
    ],
)
def test_a_plateau_wider_than_the_rank(last: float, width: int, floor: float, rank: int) -> None:
    """What the basis has not yet found is small there beside what rounds to bf16, and second order is too little."""
    U, V = decaying(640, 640, rate=1.0), decaying(640, 640, rate=1.0, seed=1)
    weight = (U * torch.cat([torch.linspace(1, last, width), torch.full((640 - width,), floor)])) @ V
    assert residual(weight, truncated_svd(weight, rank)) <= 1.001 * best_residual(weight, rank)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The way that a GPU takes, on a CPU, where torch has no products of bf16 numbers that give fp32. Gives the number
    of power steps at once of each factorization; 0 where it turned back."""
    taken: list[int] = []

    def begin(W: Tensor, width: int, allowed: float, near: None, blocks: int, source: torch.Generator) -> krylov.Krylov:
        taken.append(0)
        space = svd._sketched(W, width, blocks, source)
        return begin_on_cpu(W, width, allowed, near, blocks, source) if space is None else space

    def steps(most: float, least: float) -> int:
        taken[-1] = krylov.steps_at_once(most, least)
        return taken[-1]

    begin_on_cpu = svd._begin
    monkeypatch.setattr(svd, "_begin", begin)
    monkeypatch.setattr(svd, "steps_at_once", steps)
    monkeypatch.setattr(krylov, "_product", lambda A, B: A.float() @ B.float())
    return taken


def test_three_products_of_bf16_numbers(as_on_a_gpu: list[int]) -> None:
    W, X = decaying(500, 400), decaying(400, 30, seed=1)
    halves = krylov.Halves(W.bfloat16(), (W - W.bfloat16()).bfloat16())
    for found, wanted in (
        (krylov._times(halves, X), W.double() @ X.double()),
        (krylov._power(halves, X), W.double().T @ (W.double() @ X.double())),
    ):
        assert float((found - wanted).norm() / wanted.norm()) < 1e-5


@pytest.mark.parametrize("scale", [3e-6, 1.0, 3e4])
@pytest.mark.parametrize(
    ("spectrum", "at_once"),
    [
        (torch.ones(640) + 0.1 * torch.linspace(1, 0, 640), 6),
        (torch.cat([torch.linspace(1, 0.9, 120), torch.full((520,), 0.3)]), 6),
        (torch.arange(1.0, 641) ** -0.3, 2),
        (torch.arange(1.0, 641) ** -1.2, 1),
        (torch.cat([torch.tensor([100.0, 30.0]), torch.linspace(1, 0.2, 638)]), 1),
        (torch.logspace(0, -12, 640), 1),
    ],
    ids=["flat", "plateau", "slow", "fast", "outliers", "steep"],
)
def test_the_way_of_a_gpu(spectrum: Tensor, at_once: int, scale: float, as_on_a_gpu: list[int]) -> None:
    U, V = decaying(640, 640, rate=1.0), decaying(640, 640, rate=1.0, seed=1)
    weight = scale * (U * spectrum) @ V
    found = truncated_svd(weight, 30)
    assert residual(weight, found) <= 1.001 * best_residual(weight, 30) + 1e-6 * float(weight.norm())
    assert as_on_a_gpu[-1] == at_once or (scale != 1 and 0 < as_on_a_gpu[-1] <= at_once)


def test_the_way_of_a_gpu_turns_back_where_columns_vanish(as_on_a_gpu: list[int]) -> None:
    assert not truncated_svd(torch.zeros(700, 600), 16).S.any()
    assert as_on_a_gpu == [0]


def test_what_a_gpu_launches_as_one_waits_for_nothing() -> None:
    """A number that is asked for cannot be captured in a graph; meta tensors have none to give."""
    weight, drawn, near = (torch.empty(700, width, device="meta") for width in (600, 20, 12))
    Q, enlarged, doubt = svd.DOUBTED_SKETCH(weight, torch.empty(600, 32, device="meta"))
    basis, *_, doubts = svd.DOUBTED_SKETCHED_BLOCKS(weight, Q, enlarged, 2, 3)
    assert basis.shape == (600, 96) and doubt.shape == doubts.shape == ()
    for begin, known, steps, rounded in ((drawn, near[:600], 1, False), (torch.empty_like(Q), near[:600, :0], 4, True)):
        basis, *_, doubt = svd.DOUBTED_FIRST_BLOCKS(weight, begin, known, steps, rounded, 2)
        assert basis.shape == (600, 64) and doubt.shape == ()


@pytest.mark.parametrize(
    ("most", "least", "steps"),
    [
        (2.0, 1.9, 6),
        (300.0, 299.0, 6),
        (1e5, 1e5 - 1, 2),
        (17.0, 1.0, 2),
        (18.0, 1.0, 1),
        (1e9, 1.0, 1),
        (1e-9, 1e-9, 2),
    ],
)
def test_steps_that_may_go_by(most: float, least: float, steps: int) -> None:
    """At most 300 from the largest to the smallest column, and numbers within e^60."""
    assert krylov.steps_at_once(most, least) == steps


@pytest.mark.parametrize("rank", [4, 16, 64])
@pytest.mark.parametrize("true", [1, 16, 70])
def test_weights_of_low_rank(true: int, rank: int) -> None:
    """The Krylov space of a weight whose rank is below the width of a block ends with the first."""
    source = torch.Generator().manual_seed(true)
    weight = torch.randn(600, true, generator=source) @ torch.randn(true, 512, generator=source)
    weight[:, :400] = 0
    found = truncated_svd(weight, rank)
    assert residual(weight, found) <= 1.001 * best_residual(weight, rank) + 1e-5 * float(weight.norm())


@pytest.mark.parametrize(("dead", "rank"), [(400, 64), (450, 60), (450, 62), (448, 64), (256, 128)])
def test_dead_inputs(dead: int, rank: int) -> None:
    """LAPACK's fp32 eigenvectors of a Gram matrix fail where many of its rows are zero."""
    weight = torch.randn(600, 512, generator=torch.Generator().manual_seed(1))
    weight[:, torch.randperm(512, generator=torch.Generator().manual_seed(2))[:dead]] = 0
    best = best_residual(weight, rank)
    assert residual(weight, truncated_svd(weight, rank)) <= 1.001 * best + 3e-6 * float(weight.norm())
    spectrum = np.linalg.svd(weight.double().numpy(), compute_uv=False) ** 2
    np.testing.assert_allclose(energies(weight).numpy(), spectrum, rtol=1e-4, atol=1e-5 * spectrum[0])
    assert bool((energies(weight) >= 0).all())


@pytest.mark.parametrize("scale", [2.0**-60, 2.0**-30, 2.0**30, 2.0**60])
def test_scale_has_no_part_in_it(scale: float) -> None:
    weight = decaying(600, 512, rate=0.995)
    found, scaled = truncated_svd(weight, 16), truncated_svd(weight * scale, 16)
    torch.testing.assert_close(scaled.S / scale, found.S, rtol=1e-4, atol=0)
    assert residual(weight, svd.SVD(scaled.U, scaled.S / scale, scaled.Vh)) <= 1.001 * best_residual(weight, 16)


@pytest.mark.parametrize(
    "weight",
    [
        decaying(700, 600, rate=0.995) + 100 * decaying(700, 1) @ decaying(1, 600, seed=1),
        decaying(700, 16) @ decaying(16, 600, seed=1) + 1e-5 * decaying(700, 600),
    ],
    ids=["outlier", "low rank and noise"],
)
def test_rounding_is_not_taken_for_what_is_missing(weight: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks: list[int] = []
    monkeypatch.setattr(krylov, "next_block", lambda *parts: blocks.append(0) or next_block(*parts))
    found = truncated_svd(weight, 16)
    assert len(blocks) <= svd.KRYLOV_BLOCKS
    assert residual(weight, found) <= 1.001 * best_residual(weight, 16) + 1e-6 * float(weight.norm())
    blocks.clear()
    again = truncated_svd(weight, 16, near=found.Vh.T)
    assert len(blocks) < svd.KRYLOV_BLOCKS and residual(weight, again) <= 1.001 * residual(weight, found)


@pytest.mark.parametrize("noise", [0.0, 1e-6, 1e-3])
def test_a_basis_stays_orthonormal_where_nothing_is_left_to_find(noise: float) -> None:
    weight = decaying(700, 16, rate=1.0) @ decaying(16, 600, rate=1.0, seed=1) + noise * decaying(700, 600, rate=1.0)
    block = qr(weight.T @ torch.randn(700, 32, generator=torch.Generator().manual_seed(0)))[0]
    basis = block
    for _ in range(8):
        block, R = next_block(basis, image := weight.T @ (weight @ block))
        torch.testing.assert_close(basis @ (basis.T @ image) + block @ R, image, atol=1e-6, rtol=0)
        basis = torch.cat([basis, block], dim=1)
        torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1]), atol=1e-5, rtol=0)


def test_fast_is_deterministic_whatever_surrounds_it() -> None:
    weight = decaying(700, 500)
    first = truncated_svd(weight, 16, seed=3, name="layer")
    exact = truncated_svd(weight, 16, "exact")
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            torch.manual_seed(threads)
            truncated_svd(weight, 8, seed=threads, name="another")
            again = truncated_svd(weight, 16, seed=3, name="layer")
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
            assert torch.equal(exact.U, truncated_svd(weight, 16, "exact").U)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    state = torch.get_rng_state()
    assert not torch.equal(first.U, truncated_svd(weight, 16, seed=4, name="layer").U)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("true_rank", [0, 1, 7, 20])
def test_fast_survives_low_rank_and_zero_matrices(true_rank: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(300, true_rank) @ torch.randn(true_rank, 260)
    found = truncated_svd(weight, 10)
    assert all(bool(torch.isfinite(part).all()) for part in found)
    assert residual(weight, found) <= 1.001 * best_residual(weight, 10) + 1e-3 * float(weight.norm())


@pytest.mark.parametrize("rate", [0.8, 0.5])
def test_fast_survives_extreme_condition_numbers(rate: float) -> None:
    weight = decaying(400, 400, rate=rate)
    rounding = 32 * torch.finfo(torch.float32).eps * float(weight.norm())  # of LAPACK's own, which takes over at 0.5
    found = truncated_svd(weight, 16)
    assert residual(weight, found) <= math.hypot(1.001 * best_residual(weight, 16), rounding)


@pytest.mark.parametrize("shape", [(1000, 300), (700, 2000), (20000, 128)], ids=["gram", "krylov", "narrow"])
@pytest.mark.parametrize("last", [4e-3, 1e-2, 2e-2])
def test_small_singular_values_beside_an_outlier(shape: tuple[int, int], last: float) -> None:
    """In fp32 the square of one leaves few digits to those of the others."""
    rank, source = 32, torch.Generator().manual_seed(0)
    spectrum = torch.full((min(shape),), 0.1 * last, dtype=torch.float64)
    spectrum[:rank] = last * torch.linspace(1.2, 1, rank, dtype=torch.float64)
    spectrum[0] = 1
    U, V = (torch.linalg.qr(torch.randn(n, min(shape), generator=source, dtype=torch.float64))[0] for n in shape)
    weight = ((U * spectrum) @ V.T).float()
    found = truncated_svd(weight, rank)
    assert residual(weight, found) <= 1.001 * float(spectrum[rank:].norm())
    torch.testing.assert_close(found.U.T @ found.U, torch.eye(rank), atol=1e-3, rtol=0)


@pytest.mark.parametrize("rank", [0, 31])
def test_impossible_rank(rank: int) -> None:
    with pytest.raises(ValueError, match="outside"):
        truncated_svd(torch.randn(30, 40), rank)


@pytest.mark.parametrize("shape", [(120, 90), (1200, 1100)])
def test_nuclear_norm(shape: tuple[int, int]) -> None:
    for weight in (decaying(*shape, rate=0.999), torch.randn(shape, generator=torch.Generator().manual_seed(0))):
        exact = np.linalg.svd(weight.double().numpy(), compute_uv=False).sum()
        assert nuclear_norm(weight) == pytest.approx(exact, rel=1e-5 if shape[0] < 1000 else 2e-2)
        assert frobenius_norm(weight) == pytest.approx(np.linalg.norm(weight.double().numpy()), rel=1e-7)
