"""Which dtype products of 16-bit numbers run in, by what the processor can do; and that the layer gives the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pissa_cli import products
from pissa_cli.adapters.lowrank import LowRank

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def processor(monkeypatch: pytest.MonkeyPatch, amx: bool, avx512_bf16: bool) -> None:
    monkeypatch.setattr(products, "has_amx", lambda: amx)
    monkeypatch.setattr(products, "_has_avx512_bf16", lambda: avx512_bf16)


@pytest.mark.parametrize(
    ("amx", "avx512_bf16", "wanted", "long_attention"),
    [
        (False, False, {BF16: FP32, FP16: FP32, FP32: FP32}, FP32),
        (False, True, {BF16: BF16, FP16: FP32, FP32: FP32}, FP32),
        (True, True, {BF16: BF16, FP16: FP16, FP32: FP32}, BF16),
    ],
)
def test_by_processor(
    amx: bool,
    avx512_bf16: bool,
    wanted: dict[torch.dtype, torch.dtype],
    long_attention: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    processor(monkeypatch, amx, avx512_bf16)
    many, few = torch.zeros(1, 32, 8), torch.zeros(1, 31, 8)
    assert {dtype: products.product_dtype(many.to(dtype)) for dtype in wanted} == wanted
    assert all(products.product_dtype(few.to(dtype)) == dtype for dtype in wanted)
    short, long = torch.zeros(1, 3, 511, 64), torch.zeros(1, 3, 512, 64)
    assert products.attention_dtype(long.bfloat16()) == long_attention
    assert products.attention_dtype(short.bfloat16()) == products.attention_dtype(long) == FP32
    gpu = torch.empty(32, 8, dtype=BF16, device="meta")
    assert products.product_dtype(gpu) == products.attention_dtype(gpu) == BF16


def test_the_layer_gives_the_same_either_way(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    base = nn.Linear(48, 32).bfloat16()
    factors = {"A": torch.randn(4, 48) / 7, "B": torch.randn(32, 4) / 2}
    layer = LowRank(base, factors, frozenset(factors), 1.0)
    x = torch.randn(2, 40, 48, dtype=BF16)
    exact = x.double() @ (base.weight.double() + factors["B"].double() @ factors["A"].double()).T + base.bias.double()
    errors = {}
    for native in (False, True):
        processor(monkeypatch, False, native)
        layer.zero_grad()
        y = layer(x)
        y.float().square().sum().backward()
        assert y.dtype == BF16 and layer.A.grad.dtype == FP32  # type: ignore[union-attr]
        errors[native] = float((y.double() - exact).norm() / exact.norm())
        grad_A = (2 * y.double().flatten(0, 1)).T @ x.double().flatten(0, 1)
        wanted = factors["B"].double().T @ grad_A
        assert float((layer.A.grad.double() - wanted).norm() / wanted.norm()) < 2.0**-7  # type: ignore[union-attr]
    assert errors[False] < 2.0**-9 and errors[True] < 2.0**-7 and errors[False] < errors[True]
