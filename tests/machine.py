"""The machine that figures were measured on."""

from __future__ import annotations

import platform
from pathlib import Path

import torch


def machine() -> str:
    """The processor, what it has for 16-bit products, and the threads in use."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    parts = {"AMX": torch.cpu._is_amx_tile_supported(), "AVX512-BF16": torch.cpu._is_avx512_bf16_supported()}
    has = [part for part, there in parts.items() if there] or ["no bf16 products"]
    return f"{name} ({', '.join(has)}), {torch.get_num_threads()} threads"
