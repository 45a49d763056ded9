"""How a frozen weight is stored: dense in some dtype, or NF4. `read(pack(W))` is what the layer computes with.

The only file that imports bitsandbytes. NF4 as in QLoRA (arXiv 2305.14314): blocks of 64, absmax scales.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

BLOCK_SIZE = 64
QUANT_STATE_SUFFIX = "quant_state.bitsandbytes__nf4"


@dataclass(frozen=True)
class Store:
    """`bits` 4 (NF4, with or without double quantization) or 16/32 (dense); `dtype` is that of the weight read back."""

    bits: int
    dtype: torch.dtype
    double_quant: bool = False


@dataclass(frozen=True)
class Packed:
    """An NF4 weight: `data` (ceil(out * in / 2), 1) uint8 and bitsandbytes' quantization state."""

    data: Tensor
    state: Any

    def tensors(self, name: str) -> dict[str, Tensor]:
        """As bitsandbytes and transformers write them: `name`, `name.absmax`, `name.quant_map`, ..."""
        parts = {f"{name}.{key}": value for key, value in self.state.as_dict(packed=True).items()}
        return {name: self.data, **parts}


def pack(store: Store, weight: Tensor) -> Packed | Tensor:
    """Store `weight` (out, in) fp32: NF4 blocks run along rows of the (out, in) matrix."""
    if store.bits != 4:
        return weight.to(store.dtype)
    from bitsandbytes import functional

    data, state = functional.quantize_4bit(
        weight.contiguous(), blocksize=BLOCK_SIZE, quant_type="nf4", compress_statistics=store.double_quant
    )
    state.dtype = store.dtype
    return Packed(data, state)


def read(stored: Packed | Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight (out, in) that a layer sees: what `pack` kept, in `dtype`."""
    if isinstance(stored, Tensor):
        return stored.to(dtype)
    from bitsandbytes import functional

    weight: Tensor = functional.dequantize_4bit(stored.data, stored.state)
    return weight.to(dtype)


def unpack(name: str, tensors: dict[str, Tensor]) -> Packed:
    """The inverse of `Packed.tensors`."""
    from bitsandbytes import functional

    data = tensors[name]
    parts = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key != name}
    return Packed(data, functional.QuantState.from_dict(parts, device=data.device))


def packed_weight(module: nn.Module) -> Packed | None:
    """The NF4 weight of a bitsandbytes layer; None for any other layer."""
    import bitsandbytes

    if not isinstance(module, bitsandbytes.nn.Linear4bit):
        return None
    return Packed(module.weight.data, module.weight.quant_state)


def set_compute_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """Make every bitsandbytes layer compute in `dtype` with the scales it was given.

    On CPUs with AVX512-BF16 bitsandbytes repacks a layer in place at its first inference, rounds its scales to bf16,
    and fails on shapes that are no multiples of 32 x 64; that is turned off.
    """
    import bitsandbytes

    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.compute_dtype = dtype
            module.compute_type_is_set = True
            module.support_avx512bf16_for_cpu = False


def config(double_quant: bool, compute_dtype: str, dense_modules: list[str]) -> dict[str, Any]:
    """`quantization_config` of a transformers checkpoint whose linear layers, but `dense_modules`, are NF4."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double_quant,
        "bnb_4bit_compute_dtype": compute_dtype,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": dense_modules,
    }
