"""The dtype that products are computed in."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

FEW_ROWS = 32


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype for the product of x (..., in) with a weight: that of x, with one exception.

    On a CPU without AMX fp32 is the faster and the better one for 16-bit numbers, unless the rows are so few that
    converting the weight would cost more than the product.
    """
    halves = x.dtype in (torch.bfloat16, torch.float16)
    many = x.numel() >= FEW_ROWS * x.shape[-1]
    return torch.float32 if halves and many and x.device.type == "cpu" and not _has_amx() else x.dtype


@functools.cache
def _has_amx() -> bool:
    probe = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(probe()) if probe is not None else False
