"""The dtype that products are computed in.

On a CPU that has no instructions for products of 16-bit numbers fp32 is the faster and the better one.
"""

from __future__ import annotations

import torch
from torch import Tensor

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
