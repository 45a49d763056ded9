"""Work on panels of a large tensor: what torch gives in one go, and the same bits for any number of helpers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pissa_cli.matrices import panels
from pissa_cli.matrices.panels import rounded_at_random
from pissa_cli.matrices.pipeline import in_order
from pissa_cli.matrices.quant import Packed, Store, pack
from pissa_cli.matrices.svd import generator, truncated_svd

OPERATIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "times": (lambda W, X, Y: panels.times(W, X), lambda W, X, Y: W @ X),
    "times of a transposed one": (lambda W, X, Y: panels.times(W.T, Y), lambda W, X, Y: W.T @ Y),
    "transposed times": (lambda W, X, Y: panels.transposed_times(W, Y), lambda W, X, Y: W.T @ Y),
    "transposed times of a transposed one": (lambda W, X, Y: panels.transposed_times(W.T, X), lambda W, X, Y: W @ X),
    "transposed times in bf16": (
        lambda W, X, Y: panels.transposed_times(W.bfloat16(), Y),
        lambda W, X, Y: W.bfloat16().double().T @ Y.bfloat16().double(),
    ),
    "minus a product": (lambda W, X, Y: panels.minus_product(W, Y, X.T, 0.5), lambda W, X, Y: W - 0.5 * Y @ X.T),
    "minus": (lambda W, X, Y: panels.minus(W, 2 * W), lambda W, X, Y: W - 2 * W),
    "converted": (lambda W, X, Y: panels.converted(W, torch.bfloat16), lambda W, X, Y: W.bfloat16()),
    "norms of rows": (lambda W, X, Y: panels.row_norms(W), lambda W, X, Y: W.norm(dim=1)),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_panels_give_what_the_whole_gives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, plain = OPERATIONS[name]
    torch.manual_seed(0)
    W, X, Y = torch.randn(70, 50), torch.randn(50, 6), torch.randn(70, 6)
    wanted = plain(W.double(), X.double(), Y.double())
    for panel in (60, 700, 2**21):  # a row of its own, fourteen, and one panel
        monkeypatch.setattr(panels, "PANEL", panel)
        found = {helpers: next(in_order(lambda _: ours(W, X, Y), [0], 1, 1, helpers)) for helpers in (1, 2, 3)}
        assert torch.equal(found[1], found[2]) and torch.equal(found[1], found[3])
        tolerance = 2**-8 if found[1].dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(found[1].double(), wanted.double(), rtol=tolerance, atol=tolerance * 10)


@pytest.mark.parametrize(("dtype", "step"), [(torch.bfloat16, 2.0**-7), (torch.float16, 2.0**-10)])
def test_rounding_at_random_keeps_the_mean(dtype: torch.dtype, step: float) -> None:
    """Against the two neighbours in fp64: 1 to 2 has steps of one size, from which the odds follow."""
    torch.manual_seed(0)
    parts, many = torch.rand(7, 1), 4000
    W = (1 + 5 * step + parts * step).expand(7, many).contiguous()
    found = (rounded_at_random(W, dtype, generator(0, "x")).double() - 1) / step - 5
    assert bool(((found == 0) | (found == 1)).all())
    torch.testing.assert_close(found.mean(1, keepdim=True), parts.double(), rtol=0, atol=4 / (2 * many**0.5))
    alone = rounded_at_random(W[0, 0], dtype, generator(0, "x"))
    row = rounded_at_random(W.view(-1), dtype, generator(0, "x"))
    assert alone.shape == () and torch.equal(row.view(7, -1).double(), 1 + (5 + found) * step)
    assert torch.equal(rounded_at_random(-W, dtype, generator(0, "x")).double(), -1 - (5 + found) * step)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_at_random_leaves_what_the_dtype_has(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    W = torch.cat([torch.randn(600, 500) * 0.02, torch.tensor([[0.0, 1.0, -2.0, 2.0**-14, 6e-5]]).repeat(1, 100)])
    kept = W.to(dtype)
    assert torch.equal(rounded_at_random(kept.float(), dtype, generator(0, "x")), kept)
    wanted = rounded_at_random(W, dtype, generator(3, "x"))
    assert torch.equal(wanted, rounded_at_random(W, dtype, generator(3, "x")))
    assert not torch.equal(wanted, rounded_at_random(W, dtype, generator(3, "y")))
    for helpers in (2, 3):
        found = next(in_order(lambda _: rounded_at_random(W, dtype, generator(3, "x")), [0], 1, 1, helpers))
        assert torch.equal(found, wanted)


def test_starts_have_the_same_bits_for_any_number_of_helpers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(panels, "PANEL", 2**10)
    torch.manual_seed(0)
    W = torch.randn(192, 128)

    def start(_: int) -> list[Tensor]:
        packed = pack(Store(4, torch.float32, absmax="fitted"), W)
        assert isinstance(packed, Packed)
        return [*truncated_svd(W, 16), *truncated_svd(W.T.contiguous(), 16), packed.data, packed.state.absmax]

    found = [next(in_order(start, [0], 1, 1, helpers)) for helpers in (1, 2, 3)]
    for others in zip(*found, strict=True):
        assert torch.equal(others[0], others[1]) and torch.equal(others[0], others[2])


def test_a_panel_that_fails_fails_the_whole() -> None:
    def fails(part: int) -> int:
        if part == 2:
            raise ValueError("two")
        return part

    with pytest.raises(ValueError, match="two"):
        next(in_order(lambda _: panels.in_parallel(fails, range(4)), [0], 1, 1, 2))
