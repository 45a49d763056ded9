"""The dtype that products are computed in."""

from __future__ import annotations

import functools

import torch


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """fp32 for 16-bit numbers on a CPU without AMX, where it is the faster and the better one; else `dtype` itself."""
    halves = dtype in (torch.bfloat16, torch.float16)
    return torch.float32 if halves and device.type == "cpu" and not _has_amx() else dtype


@functools.cache
def _has_amx() -> bool:
    probe = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(probe()) if probe is not None else False
