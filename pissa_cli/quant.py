"""How a frozen weight is stored: dense in some dtype, or NF4. `read(pack(W))` is what the layer computes with.

The only file that imports bitsandbytes. NF4 as in QLoRA (arXiv 2305.14314): blocks of 64, each with its absmax.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

Absmax = Literal["fitted", "largest"]
BLOCK_SIZE = 64
NESTED_BLOCK_SIZE = 256
SCALE_GRID = tuple(0.7 + 0.05 * step for step in range(7))
TABLE_STEPS = 1024  # of the lookup table from [-1, 1] to NF4's levels, for the search only
CHUNK = {"cpu": 2**17, "cuda": 2**24}  # numbers that the search looks at together
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state.bitsandbytes__nf4")


@dataclass(frozen=True)
class Store:
    """`bits` 4 (NF4, with or without double quantization) or 16/32 (dense); `dtype` is that of the weight read back.

    `absmax`: the scale of an NF4 block is its largest magnitude (bitsandbytes, QLoRA), or fitted for the least error.
    """

    bits: int
    dtype: torch.dtype
    double_quant: bool = False
    absmax: Absmax = "largest"

    def plain(self) -> Store:
        """The same with bitsandbytes' own scales: what QLoRA would store."""
        return replace(self, absmax="largest")


@dataclass(frozen=True)
class Packed:
    """An NF4 weight: `data` (ceil(out * in / 2), 1) uint8 and bitsandbytes' quantization state."""

    data: Tensor
    state: Any

    def tensors(self, name: str) -> dict[str, Tensor]:
        """As bitsandbytes and transformers write them: `name`, `name.absmax`, `name.quant_map`, ..."""
        parts = {f"{name}.{key}": value for key, value in self.state.as_dict(packed=True).items()}
        return {name: self.data, **parts}


def member_names(name: str) -> list[str]:
    """The tensors that a weight on disk may consist of."""
    return [name, *(f"{name}.{part}" for part in PARTS)]


def packable(num_in: int) -> bool:
    """Whether rows of this length are whole blocks.

    Others stay dense: on CPUs with AVX512 bitsandbytes 0.50 reads them with the scales of other blocks.
    """
    return num_in % BLOCK_SIZE == 0


def pack(store: Store, weight: Tensor) -> Packed | Tensor:
    """Store `weight` (out, in) fp32: NF4 blocks run along rows of the (out, in) matrix."""
    if store.bits != 4:
        return weight.to(store.dtype)
    if store.absmax == "fitted":
        return _pack_fitted(store, weight)
    from bitsandbytes import functional

    data, state = functional.quantize_4bit(
        weight.contiguous(), blocksize=BLOCK_SIZE, quant_type="nf4", compress_statistics=store.double_quant
    )
    state.dtype = store.dtype
    return Packed(data, state)


def _pack_fitted(store: Store, weight: Tensor) -> Packed:
    """NF4 with the absmax of each block chosen, from a grid below the largest magnitude, for the least squared error.

    For codes q (from a candidate of the grid) and block w the best scale is a = <q, w> / <q, q>, and leaves the error
    ||w||^2 - <q, w>^2 / <q, q>. The codes are then the nearest levels for the scale as it is stored.
    """
    from bitsandbytes import functional

    levels = functional.get_4bit_type("nf4", device=weight.device)
    flat = weight.reshape(-1).float()
    blocks = nn.functional.pad(flat, (0, -flat.numel() % BLOCK_SIZE)).view(-1, BLOCK_SIZE)
    size = CHUNK[weight.device.type] // BLOCK_SIZE
    chunks = blocks.split(size)
    absmax, nested = torch.cat([_fit_absmax(chunk, levels) for chunk in chunks]), {}
    kept = absmax
    if store.double_quant:
        offset = absmax.mean()
        kept, state2 = functional.quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK_SIZE)
        absmax = functional.dequantize_blockwise(kept, state2) + offset
        nested = {"offset": offset, "state2": state2}
    pairs = [_codes(c, a, levels) for c, a in zip(chunks, absmax.split(size), strict=True)]
    codes = torch.cat(pairs).view(-1)[: flat.numel() + flat.numel() % 2]
    data = ((codes[0::2] << 4) | codes[1::2]).unsqueeze(1)
    state = functional.QuantState(
        absmax=kept,
        shape=weight.shape,
        code=levels,
        blocksize=BLOCK_SIZE,
        quant_type="nf4",
        dtype=store.dtype,
        **nested,
    )
    return Packed(data, state)


def _fit_absmax(blocks: Tensor, levels: Tensor) -> Tensor:
    """The best absmax (n,) of each block (n, 64)."""
    steps = torch.arange(2 * TABLE_STEPS + 1, device=blocks.device) / TABLE_STEPS - 1
    table = levels[_nearest(steps, levels)]

    def nearest(scaled: Tensor) -> Tensor:
        return table[scaled.clamp_(-1, 1).add_(1).mul_(TABLE_STEPS).round_().to(torch.int32)]

    return fit_scales(blocks, 1.0, nearest)


def fit_scales(blocks: Tensor, top: float, nearest: Callable[[Tensor], Tensor]) -> Tensor:
    """The scale (n,) of each block (n, size) that leaves the least squared error, of SCALE_GRID's candidates.

    nearest: scaled numbers -> codes q, in place; top: the code that the largest magnitude of a block gets at share 1.
    """
    tiny = torch.finfo(torch.float32).tiny
    largest = blocks.abs().amax(1, keepdim=True).clamp_min(tiny)
    best, scale = torch.zeros_like(largest), torch.zeros_like(largest)
    for share in SCALE_GRID:
        q = nearest(blocks / (share * largest / top))
        along, length = (q * blocks).sum(1, keepdim=True), q.square().sum(1, keepdim=True).clamp_min(tiny)
        gain = along.square() / length
        better = gain > best
        best, scale = torch.where(better, gain, best), torch.where(better, along / length, scale)
    return scale.squeeze(1)


def _codes(blocks: Tensor, absmax: Tensor, levels: Tensor) -> Tensor:
    """The nearest levels (n, 64) uint8 of blocks under their scales (n,)."""
    safe = torch.where(absmax > 0, absmax, 1.0)
    return _nearest(blocks / safe[:, None], levels).to(torch.uint8)


def _nearest(values: Tensor, levels: Tensor) -> Tensor:
    return torch.bucketize(values, (levels[1:] + levels[:-1]) / 2)


def read(stored: Packed | Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight (out, in) that a layer sees: what `pack` kept, in `dtype`."""
    if isinstance(stored, Tensor):
        return stored.to(dtype)
    from bitsandbytes import functional

    weight: Tensor = functional.dequantize_4bit(stored.data, stored.state)
    return weight.to(dtype)


def pack_tensors(name: str, store: Store, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """(the tensors of an NF4 weight as files hold them, the weight as it reads back)."""
    packed = pack(store, weight)
    assert isinstance(packed, Packed)
    return packed.tensors(name), read(packed)


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


def linear(packed: Packed) -> nn.Module:
    """bitsandbytes' layer, without bias, of a weight (out, in)."""
    import bitsandbytes

    num_out, num_in = packed.state.shape
    with torch.device("meta"):
        layer: nn.Module = bitsandbytes.nn.Linear4bit(num_in, num_out, bias=False, quant_type="nf4")
    layer.quant_state = packed.state
    layer.weight = bitsandbytes.nn.Params4bit(
        packed.data,
        requires_grad=False,
        quant_state=packed.state,
        blocksize=packed.state.blocksize,
        compress_statistics=packed.state.nested,
        quant_type="nf4",
        bnb_quantized=True,
        module=layer,
    )
    return layer


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
