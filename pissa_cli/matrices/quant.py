"""How a frozen weight is stored: dense in some dtype, or NF4. `read(pack(W))` is what the layer computes with.

bitsandbytes is imported here alone, but for its optimizer. NF4 as in QLoRA (arXiv 2305.14314): blocks of 64, each with
its absmax.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pissa_cli.matrices.block_scales import Levels, fit_scales
from pissa_cli.matrices.panels import converted, in_parallel

Absmax = Literal["fitted", "largest"]
BLOCK_SIZE = 64
NESTED_BLOCK_SIZE = 256
COARSE_GRID = (0.88, 0.97)
CHUNK = {"cpu": 2**18, "cuda": 2**24}  # numbers that the search looks at together
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
    """Store `weight` (out, in) fp32: NF4 blocks run along its rows, which are whole ones (`packable`)."""
    if store.bits != 4:
        return converted(weight, store.dtype)
    if store.absmax == "fitted":
        return _pack_fitted(store, weight)
    from bitsandbytes import functional

    weight = weight.contiguous()
    with _in_turn(weight.device):
        data, state = functional.quantize_4bit(weight, blocksize=BLOCK_SIZE, quant_type="nf4")
    return Packed(data, _state(store, weight, state.code, *_kept(store, state.absmax)[1:]))


def _pack_fitted(store: Store, weight: Tensor) -> Packed:
    """NF4 with the absmax of each block chosen, from a grid below the largest magnitude, for the least squared error.

    See `block_scales.fit_scales`; the codes are then the nearest levels for the scale as it is stored.
    """
    levels = _levels(weight.device)
    chunks = weight.contiguous().view(-1, BLOCK_SIZE).split(CHUNK[weight.device.type] // BLOCK_SIZE)
    fitted = in_parallel(lambda chunk: fit_scales(chunk, levels.nearest)[0], chunks)
    absmax, kept, nested = _kept(store, torch.cat(fitted))
    pairs = zip(chunks, absmax.split(len(chunks[0])), strict=True)
    codes = torch.cat(in_parallel(lambda pair: levels.codes(*pair), pairs)).view(-1)
    data = ((codes[0::2] << 4) | codes[1::2]).unsqueeze(1)
    return Packed(data, _state(store, weight, levels.values.clone(), kept, nested))


def _kept(store: Store, absmax: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """(the scales as they are read back, as they are kept, what else is kept of them), after double quantization where
    the store has it."""
    if not store.double_quant:
        return absmax, absmax, {}
    from bitsandbytes import functional

    offset = absmax.mean()
    centred = absmax - offset
    with _in_turn(absmax.device):
        kept, state2 = functional.quantize_blockwise(centred, blocksize=NESTED_BLOCK_SIZE)
    return functional.dequantize_blockwise(kept, state2) + offset, kept, {"offset": offset, "state2": state2}


def _state(store: Store, weight: Tensor, code: Tensor, kept: Tensor, nested: dict[str, Any]) -> Any:
    from bitsandbytes import functional

    return functional.QuantState(
        absmax=kept, shape=weight.shape, code=code, blocksize=BLOCK_SIZE, quant_type="nf4", dtype=store.dtype, **nested
    )


@contextmanager
def _in_turn(device: torch.device) -> Iterator[None]:
    """For bitsandbytes' quantization, which runs on the GPU's default stream, whichever is the current one: before the
    block the default stream waits for the current one, after it the other way round. Nothing on a CPU."""
    if device.type != "cuda":
        yield
        return
    current, default = torch.cuda.current_stream(), torch.cuda.default_stream()
    default.wait_stream(current)
    yield
    current.wait_stream(default)


def lost(weight: Tensor, absmax: Absmax, B: Tensor | None = None, A: Tensor | None = None) -> Tensor:
    """W - NF4(W - B A) of a weight (out, in) fp32 whose rows are whole blocks; B (out, k), A (k, in).

    Nothing is stored in between; fitted scales come from a coarser search.
    """
    levels, difference = _levels(weight.device), torch.empty(weight.shape, device=weight.device)
    rows = max(1, CHUNK[weight.device.type] // weight.shape[1])

    def one(start: int) -> None:
        part = slice(start, start + rows)
        rest = weight[part] if B is None or A is None else torch.addmm(weight[part], B[part], A, alpha=-1)
        blocks = rest.contiguous().view(-1, BLOCK_SIZE)
        if absmax == "largest":
            scale = blocks.abs().amax(1)
            q = torch.index_select(levels.values, 0, levels.codes(blocks, scale).int().view(-1)).view_as(blocks)
        else:
            scale, q = fit_scales(blocks, levels.nearest, COARSE_GRID)
        torch.sub(weight[part], q.mul_(scale[:, None]).view_as(rest), out=difference[part])

    in_parallel(one, range(0, len(weight), rows))
    return difference


@functools.cache
def _levels(device: torch.device) -> Levels:
    from bitsandbytes import functional

    levels = Levels.of(functional.get_4bit_type("nf4", device=device))
    if device.type == "cuda":  # other threads, on other streams, use them
        torch.cuda.current_stream().synchronize()
    return levels


def read(stored: Packed | Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight (out, in) that a layer sees: what `pack` kept, in `dtype`."""
    if isinstance(stored, Tensor):
        return converted(stored, dtype)
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
    if not is_packed(module):
        return None
    weight: Any = module.weight
    state = getattr(weight, "quant_state", None) or module.quant_state  # where it is sharded, the layer's own
    return Packed(weight.data, state)


def keep_own_state(module: nn.Module) -> None:
    """Keep the scales of a bitsandbytes layer at the layer as well, where sharding leaves them."""
    weight: Any = module.weight
    module.quant_state = weight.quant_state


def is_packed(module: nn.Module) -> bool:
    """Whether it is a bitsandbytes layer. To import that takes seconds; where nobody has, there is none."""
    bitsandbytes = sys.modules.get("bitsandbytes")
    return bitsandbytes is not None and isinstance(module, bitsandbytes.nn.Linear4bit)


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


def unpacked_linear(packed: Packed, bias: Tensor | None) -> nn.Module:
    """A dense layer of the weight (out, in) that `packed` reads back as, in the dtype that it names."""
    num_out, num_in = packed.state.shape
    layer = nn.Linear(num_in, num_out, bias=False, device="meta")
    layer.weight = nn.Parameter(read(packed, packed.state.dtype), requires_grad=False)
    layer.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
    return layer


def set_compute_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """Make every bitsandbytes layer compute in `dtype` with the scales it was given.

    On CPUs with AVX512-BF16 bitsandbytes repacks a layer in place at its first inference, rounds its scales to bf16,
    and fails on shapes that are no multiples of 32 x 64; that is turned off.
    """
    for module in model.modules():
        if is_packed(module):
            module.compute_dtype = dtype  # type: ignore[assignment]
            module.compute_type_is_set = True  # type: ignore[assignment]
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


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
