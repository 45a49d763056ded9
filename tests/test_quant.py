"""NF4: what init measured is what every reader of base/ sees, and QPiSSA's passes lower the error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from pissa_cli.adapters.pissa import start
from pissa_cli.adapters.start import Layer
from pissa_cli.initialize import initialize
from pissa_cli.matrices import quant
from pissa_cli.matrices.block_scales import Levels
from pissa_cli.matrices.quant import Packed, Store, pack, packed_weight, read, unpack
from pissa_cli.run.rundir import Run


def nf4(weight: Tensor, double_quant: bool = False) -> Tensor:
    """bitsandbytes' own round trip."""
    data, state = functional.quantize_4bit(
        weight.contiguous(), blocksize=64, quant_type="nf4", compress_statistics=double_quant
    )
    return functional.dequantize_4bit(data, state)


def nuclear(error: Tensor) -> float:
    return float(torch.linalg.svdvals(error.double()).sum())


def top(weight: Tensor, rank: int) -> Tensor:
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


def loftq(weight: Tensor, rank: int, passes: int) -> Tensor:
    """W's approximation by LoftQ, algorithm 1 of arXiv 2310.08659."""
    low_rank = torch.zeros_like(weight)
    for _ in range(passes):
        stored = nf4(weight - low_rank)
        low_rank = top(weight - stored, rank)
    return stored + low_rank


def qpissa(weight: Tensor, rank: int, passes: int, svd: str = "fast") -> Tensor:
    layer = Layer("layer", rank, 1.0, 0, Store(4, torch.float32))
    made = start(weight, layer, {"svd": svd, "passes": passes, "refit": False})
    return read(made.frozen) + made.factors["B"] @ made.factors["A"]


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_bitsandbytes(double_quant: bool, dtype: torch.dtype) -> None:
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(0))
    stored = pack(Store(4, dtype, double_quant), weight)
    assert isinstance(stored, Packed)
    assert torch.equal(read(stored), nf4(weight, double_quant).to(dtype).float())
    again = unpack("w", stored.tensors("w"))
    assert torch.equal(read(again), read(stored)) and again.state.dtype == dtype


@pytest.mark.parametrize("transposed", [False, True])
def test_what_is_lost_is_what_bitsandbytes_loses(transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In several chunks, each a whole number of rows and the last a shorter one."""
    monkeypatch.setitem(quant.CHUNK, "cpu", 7 * 192)
    source = torch.Generator().manual_seed(0)
    shape = (192, 100) if transposed else (100, 192)
    weight, B, A = (torch.randn(size, generator=source) for size in (shape, (100, 8), (8, 192)))
    weight = weight.T if transposed else weight
    assert torch.equal(quant.lost(weight, "largest"), weight - nf4(weight))
    assert torch.equal(quant.lost(weight[:, :64], "largest"), weight[:, :64] - nf4(weight[:, :64]))
    torch.testing.assert_close(quant.lost(weight, "largest", B, A), weight - nf4(weight - B @ A))
    rest, fitted = weight - B @ A, quant.lost(weight, "fitted", B, A) - B @ A
    assert float(fitted.norm() / (rest - nf4(rest)).norm()) == pytest.approx(0.95, abs=0.03)


@pytest.mark.parametrize("absmax", ["fitted", "largest"])
def test_a_transposed_weight_is_packed_as_its_copy(absmax: Any) -> None:
    """As GPT-2's are; with rows of one block it can be looked at as blocks without a copy."""
    store = Store(4, torch.float32, absmax=absmax)
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)).T
    assert torch.equal(read(pack(store, weight)), read(pack(store, weight.contiguous())))


def test_codes_are_the_nearest_levels_at_and_around_every_midpoint() -> None:
    levels = functional.get_4bit_type("nf4", device="cpu")
    middles = ((levels[1:] + levels[:-1]) / 2).double()
    near = torch.cat([middles + off for off in (-1e-3, -1e-6, 1e-6, 1e-3)] + [torch.linspace(-1, 1, 4097).double()])
    numbers = torch.nn.functional.pad(near, (0, -len(near) % 64)).float().view(-1, 64)
    codes = Levels.of(levels).codes(numbers * 3, torch.full((len(numbers),), 3.0))
    nearest = (numbers.double()[..., None] - levels.double()).abs().argmin(-1)
    assert torch.equal(codes.long(), nearest)


@pytest.mark.parametrize("double_quant", [False, True])
def test_base_read_back_is_what_init_measured(
    double_quant: bool, models: Callable[[str], Path], recipe: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pissa_cli import initialize as module

    measured: dict[str, Tensor] = {}
    original = module._errors
    monkeypatch.setattr(
        module,
        "_errors",
        lambda W, start, layer: measured.update({layer.name: read(start.frozen)}) or original(W, start, layer),
    )
    made = recipe(models("llama"), "model.bits=4", f"model.double_quant={str(double_quant).lower()}", "adapter.rank=4")
    initialize(made)
    model = AutoModelForCausalLM.from_pretrained(Run(Path(made.output)).base, dtype=torch.bfloat16)
    assert measured
    for name, weight in measured.items():
        module_ = model.get_submodule(name)
        packed = packed_weight(module_)
        assert packed is not None and packed.state.nested == double_quant
        assert torch.equal(functional.dequantize_4bit(module_.weight.data, module_.weight.quant_state).float(), weight)


def test_base_is_small_and_keeps_the_rest(models: Callable[[str], Path], recipe: Callable[..., Any]) -> None:
    made = recipe(models("llama"), "model.bits=4", "adapter.rank=4")
    initialize(made)
    original = load_file(models("llama") / "model.safetensors")
    stored = load_file(Run(Path(made.output)).base / "model.safetensors")
    for name, tensor in original.items():
        if "proj" in name:
            assert stored[name].dtype == torch.uint8 and stored[name].numel() == tensor.numel() // 2
        else:
            assert torch.equal(stored[name], tensor)


@pytest.mark.parametrize("rank", [16, 64])
def test_five_passes_beat_plain_nf4_everywhere_and_loftq_on_average(
    real_matrices: dict[str, Tensor], rank: int
) -> None:
    ours, theirs = [], []
    for name, weight in real_matrices.items():
        if rank >= min(weight.shape):
            continue
        plain = nuclear(weight - nf4(weight))
        ours.append(nuclear(weight - qpissa(weight, rank, 5)) / plain)
        theirs.append(nuclear(weight - loftq(weight, rank, 5)) / plain)
        assert ours[-1] < 1, name
    assert sum(ours) < sum(theirs)


def test_passes_follow_the_authors_loop() -> None:
    """Start on SVD, end on quantize, with a full SVD, step by step as facts of the paper's code have it."""
    torch.manual_seed(0)
    weight = torch.randn(96, 128) @ torch.diag(0.95 ** torch.arange(128.0))
    for passes in (1, 5):
        res = weight
        for _ in range(passes):
            low_rank = top(res, 8)
            stored = nf4(weight - low_rank)
            res = weight - stored
        wanted = nuclear(weight - stored - low_rank)
        assert nuclear(weight - qpissa(weight, 8, passes, "exact")) == pytest.approx(wanted, rel=1e-4)
