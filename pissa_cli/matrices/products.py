"""The dtype that products are computed in, and those of layers without an adapter.

On a CPU that has no instructions for products of 16-bit numbers fp32 is the faster and the better one.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

CAST = 2**26  # numbers of a weight that are cast to the dtype of the products together
FEW_ROWS = 8  # from which on it pays to convert a weight: AVX2 and AVX512 without BF16, widths of 288 to 2048
LARGE_HEAD = 2**15  # numbers of a query's head: 256 tokens by 128, 512 by 64


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype for the product of x (..., in) with a weight: that of x, or fp32 on a CPU that is the faster in it.

    Not for rows so few that converting the weight would cost more than the product.
    """
    many = x.numel() >= FEW_ROWS * x.shape[-1]
    native = x.device.type != "cpu" or has_amx() or (x.dtype == torch.bfloat16 and _has_avx512_bf16())
    return torch.float32 if _is_half(x) and many and not native else x.dtype


def widens(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products of more than a few numbers of `dtype` run in another dtype there."""
    return product_dtype(torch.empty(FEW_ROWS, 1, dtype=dtype, device=device)) != dtype


class LinearFunction(torch.autograd.Function):
    """x W^T + bias of a layer without an adapter, by products in `product_dtype`, rounded once.

    read_weight gives W (out, in) for products of a dtype, in that or as it is stored, and again for the backward pass.
    weight: W where it trains, for its gradient; then x is saved, too.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, read_weight: Callable[[torch.dtype], Tensor], weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        dtype = ctx.dtype = product_dtype(x)
        ctx.read_weight = read_weight
        ctx.dtypes = x.dtype, None if weight is None else weight.dtype, None if bias is None else bias.dtype
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None)
        with without_autocast(x):
            return linear(x.to(dtype), read_weight(dtype), bias).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (x,), g = ctx.saved_tensors, grads[0].to(ctx.dtype)
        needs_x, _, needs_weight, needs_bias = ctx.needs_input_grad
        dtype_x, dtype_weight, dtype_bias = ctx.dtypes
        grad_x = grad_weight = grad_bias = None
        with without_autocast(g):
            if needs_x:
                grad_x = times(g, ctx.read_weight(ctx.dtype)).to(dtype_x)
            if needs_weight:
                grad_weight = (g.flatten(0, -2).T @ x.to(ctx.dtype).flatten(0, -2)).to(dtype_weight)
            if needs_bias:
                grad_bias = g.flatten(0, -2).sum(0).to(dtype_bias)
        return grad_x, None, grad_weight, grad_bias


def linear(x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + bias in the dtype of x; W (out, in) of another is cast to it in parts."""
    rows = _cast_together(x, W)
    parts = W.split(rows)
    biases = [None] * len(parts) if bias is None else bias.to(x.dtype).split(rows)
    ys = [functional.linear(x, part.to(x.dtype), b) for part, b in zip(parts, biases, strict=True)]
    return ys[0] if len(ys) == 1 else torch.cat(ys, -1)


def times(g: Tensor, W: Tensor) -> Tensor:
    """g W, likewise."""
    rows = _cast_together(g, W)
    first, *rest = zip(g.split(rows, -1), W.split(rows), strict=True)
    total: Tensor = first[0] @ first[1].to(g.dtype)
    for share, part in rest:
        total += share @ part.to(g.dtype)
    return total


def _cast_together(x: Tensor, W: Tensor) -> int:
    """Rows of W that are cast to the dtype of x together."""
    return len(W) if W.dtype == x.dtype else max(1, CAST // W.shape[1])


def in_autocast_dtype(x: Tensor) -> Tensor:
    """As a product would have x."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Where autocast is on, no more."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def has_fast_bf16(device: torch.device) -> bool:
    """Whether products of bf16 numbers are faster than those of fp32 there."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and (has_amx() or _has_avx512_bf16())


def attention_dtype(query: Tensor) -> torch.dtype:
    """The dtype for attention of query (n, heads, tokens, dim): its own, or fp32 on a CPU without AMX, and on one
    with it where the kernels that oneDNN makes for each length take more time than they save."""
    native = query.device.type != "cpu" or (has_amx() and query.shape[-2] * query.shape[-1] >= LARGE_HEAD)
    return torch.float32 if _is_half(query) and not native else query.dtype


def _is_half(x: Tensor) -> bool:
    return x.dtype in (torch.bfloat16, torch.float16)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def has_amx() -> bool:
    return bool(torch.cpu._is_amx_tile_supported())


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _has_avx512_bf16() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported())
