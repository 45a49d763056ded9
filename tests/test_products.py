"""Which dtype products of 16-bit numbers run in, by what the processor can do; and that the layer gives the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.pytorch_utils import Conv1D

from pissa_cli.adapters.lowrank import LowRank, multiply_in_fp32
from pissa_cli.base.experts import adapted_forward
from pissa_cli.base.loading import load_model
from pissa_cli.matrices import products, quant
from pissa_cli.schema.recipe import ModelSection, Recipe
from pissa_cli.training import loss

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
    many, few = torch.zeros(1, 8, 16), torch.zeros(1, 7, 16)
    assert {dtype: products.product_dtype(many.to(dtype)) for dtype in wanted} == wanted
    assert all(products.product_dtype(few.to(dtype)) == dtype for dtype in wanted)
    short, long = torch.zeros(1, 3, 511, 64), torch.zeros(1, 3, 512, 64)
    assert products.attention_dtype(long.bfloat16()) == long_attention
    assert products.attention_dtype(short.bfloat16()) == products.attention_dtype(long) == FP32
    assert products.attention_dtype(long.double()) == products.product_dtype(many.double()) == torch.float64
    gpu = torch.empty(8, 16, dtype=BF16, device="meta")
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


class Products(TorchDispatchMode):
    """What dtypes matrices are multiplied in, meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "mm" in func.name():
            self.dtypes |= {x.dtype for x in args if isinstance(x, Tensor) and x.is_floating_point()}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["linear", "conv1d", "falcon", "nf4"])
def test_frozen_layers_give_the_same_either_way(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    processor(monkeypatch, False, False)
    monkeypatch.setattr(products, "CAST", 1000)  # numbers, of 8192
    torch.manual_seed(0)
    W, bias = torch.randn(128, 64), torch.randn(128).to(BF16)
    if kind == "nf4":
        packed = quant.pack(quant.Store(4, BF16), W)
        assert isinstance(packed, quant.Packed)
        layer, W = quant.linear(packed), quant.read(packed)
        layer.register_parameter("bias", nn.Parameter(bias))
    else:
        layer = Conv1D(128, 64) if kind == "conv1d" else {"linear": nn.Linear, "falcon": FalconLinear}[kind](64, 128)
        W = W.to(BF16).float()
        layer.bfloat16().load_state_dict({"weight": W.T if kind == "conv1d" else W, "bias": bias})
    layer.requires_grad_(False)
    quant.set_compute_dtype(layer, BF16)
    multiply_in_fp32(layer, BF16)
    for rows in (7, 40):  # the few are computed as they were
        x = torch.randn(1, rows, 64).to(BF16).requires_grad_()
        with Products() as seen:
            y = layer(x)
            y.float().square().sum().backward()
        exact = x.detach().double() @ W.double().T + bias.double()
        grad = 2 * y.detach().double() @ W.double()
        assert y.dtype == x.grad.dtype == BF16  # type: ignore[union-attr]
        assert rows < 8 or seen.dtypes == {FP32}
        rounding = 2.0**-9 if rows == 40 else 2.0**-7
        for given, wanted in ((y, exact), (x.grad, grad)):
            assert float((given.double() - wanted).norm() / wanted.norm()) < rounding  # type: ignore[union-attr]


def test_layers_can_be_offloaded_and_keep_a_way_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both is what compressed-tensors does to those that it reads."""
    processor(monkeypatch, False, False)
    plain, own = nn.Linear(4, 4), nn.Linear(4, 4)
    own.forward = way = own.forward  # type: ignore[method-assign]
    multiply_in_fp32(nn.ModuleList([plain, own]), BF16)
    assert plain.forward.__func__ is not nn.Linear.forward and own.forward is way


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_layers_that_train_multiply_in_fp32_too(kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    processor(monkeypatch, False, False)
    torch.manual_seed(0)
    layer = nn.Linear(64, 128) if kind is nn.Linear else Conv1D(128, 64)
    plain = copy.deepcopy(layer)
    multiply_in_fp32(layer, BF16)
    x, g = torch.randn(2, 20, 64).to(BF16), torch.randn(2, 20, 128).to(BF16)
    given, exact = x.clone().requires_grad_(), x.float().requires_grad_()
    with Products() as seen:
        with torch.autocast("cpu", BF16):
            y = layer(given)
        y.backward(g)
    plain(exact).backward(g.float())
    assert y.dtype == given.grad.dtype == BF16 and seen.dtypes == {FP32}  # type: ignore[union-attr]
    assert torch.equal(given.grad, exact.grad.to(BF16))  # type: ignore[arg-type, union-attr]
    for ours, theirs in zip(layer.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
@pytest.mark.parametrize("slow", [True, False])
def test_a_model_multiplies_in_fp32_where_bf16_is_the_slower(
    slow: bool, architecture: str, models: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    processor(monkeypatch, not slow, False)
    monkeypatch.setattr("pissa_cli.base.loading.best_device", lambda: torch.device("cpu"))
    model = load_model(models(architecture), Recipe(model=ModelSection(name=architecture)))
    if architecture == "mixtral":
        for module in model.modules():  # a router's product is small
            if isinstance(module, MixtralTopKRouter):
                module.register_forward_pre_hook(lambda module, given: (module.float(), (given[0].float(),))[1])
    with torch.no_grad(), Products() as seen:
        assert model(input_ids=torch.arange(80)[None]).logits.dtype == BF16
    assert seen.dtypes == ({FP32} if slow else {BF16, FP32} if architecture == "mixtral" else {BF16})


def test_experts_multiply_in_fp32_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    processor(monkeypatch, False, False)
    torch.manual_seed(0)
    experts = make_model("mixtral").model.layers[0].mlp.experts
    x, chosen, weights = torch.randn(60, 64), torch.randint(0, 4, (60, 2)), torch.rand(60, 2)
    with torch.no_grad():
        wanted = adapted_forward(experts, x, chosen, weights)
        with torch.autocast("cpu", BF16), Products() as seen:
            found = adapted_forward(experts, x, chosen, weights)
    assert seen.dtypes == {FP32}
    assert float((found - wanted).norm() / wanted.norm()) < 2**-6


def test_the_loss_of_a_large_head_casts_it_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    processor(monkeypatch, False, False)
    for module in (products, loss):
        monkeypatch.setattr(module, "CAST", 1000)  # numbers, of 1600
    torch.manual_seed(0)
    x, targets = torch.randn(171, 32).to(BF16), torch.randint(0, 50, (171,))
    W, bias = torch.randn(50, 32).to(BF16), torch.randn(50).to(BF16)
    given, exact = x.clone().requires_grad_(), x.float().requires_grad_()
    with torch.autocast("cpu", BF16), Products() as seen:
        found = loss.HeadCrossEntropy.apply(given, W, bias, targets)
        found.backward()
    wanted = functional.cross_entropy(functional.linear(exact, W.float(), bias.float()), targets, reduction="sum")
    wanted.backward()
    assert seen.dtypes == {FP32} and abs(float(found - wanted)) < 1e-5 * float(wanted)
    assert float((given.grad - exact.grad).norm() / exact.grad.norm()) < 2.0**-9  # type: ignore[operator, union-attr]
