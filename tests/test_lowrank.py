"""The low-rank layer: its autograd function against finite differences and against plain autograd."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_gpu
import bench_vera
import pytest
import torch
from test_start import started
from torch import Tensor, nn
from transformers import BartConfig, BartForSequenceClassification
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.pytorch_utils import Conv1D

from pissa_cli.adapters import lowrank
from pissa_cli.adapters.function import LowRankFunction, Part
from pissa_cli.adapters.lowrank import LowRank, Siblings
from pissa_cli.base.attach import forget_shared, join_gates, lowrank_layers, share_inputs

TOKENS, IN, OUT, R = (2, 3), 5, 4, 2
IDS = torch.tensor([[3, 4]])
WAYS = {
    "two paths": ((1, 2), R),
    "two paths, but for the gradient of x": (TOKENS, 1),
    "merged": (TOKENS, R),
    "merged, by the gradient of the weight": (TOKENS, 7),
}
"""Tokens and rank with which a layer goes each way."""


def factors(dtype: torch.dtype, with_d: bool, with_b: bool, rank: int = R) -> dict[str, Tensor]:
    made = {"A": torch.randn(rank, IN), "B": torch.randn(OUT, rank)}
    made |= {"d": torch.randn(rank)} if with_d else {}
    made |= {"b": torch.randn(OUT)} if with_b else {}
    return {name: factor.to(dtype) for name, factor in made.items()}


def plain(x: Tensor, W: Tensor, bias: Tensor | None, f: dict[str, Tensor], scale: float) -> Tensor:
    """The equation, term by term."""
    h = x @ f["A"].T
    h = h * f["d"] if "d" in f else h
    u = h @ f["B"].T
    u = u * f["b"] if "b" in f else u
    y = x @ W.T + scale * u
    return y if bias is None else y + bias


@pytest.mark.parametrize(("tokens", "rank"), WAYS.values(), ids=WAYS)
@pytest.mark.parametrize(("with_d", "with_b"), itertools.product((False, True), repeat=2))
def test_gradients_against_finite_differences(with_d: bool, with_b: bool, tokens: tuple[int, int], rank: int) -> None:
    torch.manual_seed(0)
    made = factors(torch.float64, with_d, with_b, rank)
    W, bias = torch.randn(OUT, IN).double(), torch.randn(OUT).double()
    read: Callable[[torch.dtype], Tensor] = lambda dtype: W.to(dtype)  # noqa: E731
    names = list(made)
    for trained in itertools.product((False, True), repeat=len(names)):
        x = torch.randn(*tokens, IN).double().requires_grad_()
        inputs = [made[name].clone().requires_grad_(flag) for name, flag in zip(names, trained, strict=True)]

        def run(x: Tensor, *given: Tensor) -> Tensor:
            f = dict(zip(names, given, strict=True))
            return LowRankFunction.apply(
                x, None, None, None, [Part(read, bias, 0.7)], f["A"], f["B"], f.get("d"), f.get("b")
            )[0]

        assert torch.autograd.gradcheck(run, (x, *inputs))


def test_dropout_path_has_its_own_gradient() -> None:
    torch.manual_seed(0)
    made, W = factors(torch.float64, True, True), torch.randn(OUT, IN).double()
    x, dropped = (torch.randn(*TOKENS, IN).double().requires_grad_() for _ in range(2))

    def run(x: Tensor, dropped: Tensor, A: Tensor) -> Tensor:
        return LowRankFunction.apply(
            x, dropped, None, None, [Part(W.to, None, 1.5)], A, made["B"], made["d"], made["b"]
        )[0]

    assert torch.autograd.gradcheck(run, (x, dropped, made["A"].requires_grad_()))


@pytest.mark.parametrize("base", ["linear", "linear without bias", "conv1d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [(2, 2), (2, 3), (8, 9)])
def test_forward_is_the_equation(base: str, dtype: torch.dtype, tokens: tuple[int, int]) -> None:
    torch.manual_seed(1)
    module: nn.Module = Conv1D(OUT, IN) if base == "conv1d" else nn.Linear(IN, OUT, bias=base == "linear")
    nn.init.normal_(module.weight)  # type: ignore[arg-type]
    W = (module.weight.T if base == "conv1d" else module.weight).detach().clone().to(dtype)  # type: ignore[operator]
    made = factors(torch.float32, True, True)
    layer = LowRank(module.to(dtype), made, frozenset({"A", "B"}), scale=0.5, dropout=0.0)
    x = torch.randn(*tokens, IN).to(dtype)
    bias = None if module.bias is None else module.bias.float()
    wanted = plain(x.float(), W.float(), bias, {k: v.to(dtype).float() for k, v in made.items()}, 0.5)
    assert layer(x).dtype == dtype
    torch.testing.assert_close(layer(x).float(), wanted, rtol=0.05 if dtype == torch.bfloat16 else 1e-6, atol=0.05)


def test_only_named_factors_train_and_stay_fp32() -> None:
    layer = LowRank(nn.Linear(IN, OUT).bfloat16(), factors(torch.float32, True, False), frozenset({"d"}), 1.0, 0.0)
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["d"]
    assert set(layer.factors()) == {"A", "B", "d"}
    layer(torch.randn(3, IN).bfloat16()).sum().backward()
    assert layer.d.dtype == torch.float32 and layer.d.grad is not None
    assert layer.base.weight.grad is None  # type: ignore[union-attr]


def test_dropout_acts_on_the_low_rank_path_alone_and_only_in_training() -> None:
    torch.manual_seed(0)
    made = {"A": torch.ones(1, 400), "B": torch.ones(1, 1)}
    base = nn.Linear(400, 1)
    layer = LowRank(base, made, frozenset({"A", "B"}), 1.0, dropout=0.5)
    x = torch.ones(50, 400)
    low_rank = layer.train()(x) - base(x)
    assert low_rank.std() > 1 and abs(float(low_rank.mean()) - 400) < 10
    torch.testing.assert_close(layer.eval()(x) - base(x), torch.full((50, 1), 400.0))


@pytest.mark.parametrize("merged", [False, True])
def test_saves_x_once_and_reads_the_weight_again(merged: bool) -> None:
    W, reads = torch.randn(OUT, IN), []

    def read(dtype: torch.dtype) -> Tensor:
        reads.append(dtype)
        return W.to(dtype)

    x = torch.randn(2, 3 if merged else 2, IN, requires_grad=True)
    A, B = torch.randn(R, IN, requires_grad=True), torch.randn(OUT, R, requires_grad=True)
    y = LowRankFunction.apply(x, None, None, None, [Part(read)], A, B, None, None)[0]
    kept = [t.shape for t in y.grad_fn.saved_tensors if t is not None]
    assert sorted(kept) == sorted([x.shape, A.shape, B.shape] + [torch.Size((4, R))] * (not merged))
    y.sum().backward()
    assert len(reads) == 2


def test_under_checkpointing_the_weight_is_read_once_more_and_nothing_is_saved_before() -> None:
    torch.manual_seed(0)
    layer = LowRank(nn.Linear(IN, OUT), factors(torch.float32, True, True), frozenset({"A", "B", "d", "b"}), 0.5)
    x, reads = torch.randn(*TOKENS, IN, requires_grad=True), []
    layer(x).square().sum().backward()
    wanted = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    layer.zero_grad()
    layer.keeps_weight = True
    original = layer.base_weight
    layer.base_weight = lambda dtype: (reads.append(dtype), original(dtype))[1]  # type: ignore[method-assign]
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.shape), t)[1], lambda t: t):
        y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    assert len(reads) == 1 and torch.Size((OUT, IN)) not in kept
    y.square().sum().backward()
    assert len(reads) == 2
    for name, gradient in wanted.items():
        torch.testing.assert_close(layer.get_parameter(name).grad, gradient)


@pytest.mark.parametrize("tokens", [(2, 2), (8, 9)], ids=["two paths", "merged"])
@pytest.mark.parametrize("shared", [False, True])
def test_gradients_of_layers_of_one_x(shared: bool, tokens: tuple[int, int]) -> None:
    """Of different widths and ranks; with VeRA's A for all of them, which does not train."""
    torch.manual_seed(0)
    given: list[Tensor | None] = []
    parts, numbers = [], []
    A = torch.randn(R, IN).double()
    for out, rank in ((4, R), (7, R if shared else 3), (1, R)):
        W, bias = torch.randn(out, IN).double(), torch.randn(out).double()
        parts.append(Part(W.to, bias, 0.7, False, shared))
        given += [A if shared else torch.randn(rank, IN).double(), torch.randn(out, rank).double()]
        given += [torch.randn(rank).double(), torch.randn(out).double() if shared else None]
    for trained in ([2, 3, 6, 7, 10, 11], [2, 7]) if shared else ([0, 1, 4, 5, 8, 9], [1, 4], [2, 6, 10]):
        numbers = [number for number in trained if given[number] is not None]

        def run(x: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
            f = dict(enumerate(given)) | dict(zip(numbers, inputs, strict=True))  # noqa: B023
            return LowRankFunction.apply(x, None, None, None, parts, *f.values())

        x = torch.randn(*tokens, IN).double().requires_grad_()
        assert torch.autograd.gradcheck(run, (x, *(given[n].clone().requires_grad_() for n in numbers)))  # type: ignore[union-attr]


def test_layers_of_one_x_give_what_each_gives_alone() -> None:
    """Also when asked out of turn, again, in part, or after x was changed in place; an output nobody uses is fine."""
    torch.manual_seed(0)
    layers = [LowRank(nn.Linear(IN, out), factors_of(out), frozenset({"A", "B"}), 0.5) for out in (4, 6, 5)]
    together = Siblings(layers)

    def outputs(x: Tensor, order: tuple[int, ...]) -> list[Tensor]:
        return [layers[number](x) for number in order]

    for order in ((0, 1, 2), (2, 0, 1), (1,), (0, 0, 2)):
        x = torch.randn(*TOKENS, IN)
        for layer in layers:
            layer.siblings = None
        wanted = outputs(x, order)
        sum(y.square().sum() for y in wanted).backward()  # type: ignore[union-attr]
        gradients = [p.grad.clone() for n in order for p in layers[n].parameters() if p.grad is not None]
        for layer in layers:
            layer.zero_grad()
            layer.siblings = together
        found = outputs(x, order)
        sum(y.square().sum() for y in found).backward()  # type: ignore[union-attr]
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(
            [p.grad for n in order for p in layers[n].parameters() if p.grad is not None], gradients
        )
        for layer in layers:
            layer.zero_grad()
    first = layers[0](x)
    x.mul_(2)
    assert not torch.allclose(layers[1](x), layers[1].base(x / 2), atol=0.1) and first.shape[-1] == 4
    layers[1].siblings = None
    alone = layers[1](x)
    layers[1].siblings = together
    layers[0](x / 2)
    torch.testing.assert_close(layers[1](x), alone)


def factors_of(out: int) -> dict[str, Tensor]:
    return {"A": torch.randn(R, IN), "B": torch.randn(out, R)}


def test_layers_of_one_x_keep_nothing_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """What pins the graph of a pass that ran out of memory would fail the pass with smaller micro-batches, too."""
    layers = [LowRank(nn.Linear(IN, 4), factors_of(4), frozenset({"A", "B"}), 1.0) for _ in range(2)]
    for layer in layers:
        layer.siblings = Siblings(layers)
    x = torch.randn(3, IN)
    layers[0](x)
    forget_shared(nn.ModuleList(layers))
    assert vars(layers[0].siblings) == {"layers": layers, "_x": None, "_state": (0, False), "_outputs": {}}

    def fails(*_: Any) -> Any:
        raise torch.OutOfMemoryError

    layers[0](x)
    with monkeypatch.context() as patch:
        patch.setattr(lowrank, "compute", fails)
        with pytest.raises(torch.OutOfMemoryError):
            layers[0](torch.randn(3, IN))
    assert vars(layers[0].siblings)["_x"] is None and not vars(layers[0].siblings)["_outputs"]
    with torch.no_grad():
        layers[0](x)
    assert layers[1](x).requires_grad
    with torch.inference_mode():
        torch.testing.assert_close(layers[0](x.clone()), layers[0](x))


def test_only_layers_of_one_module_called_once_are_computed_together() -> None:
    """BART's decoder gives k and v of all its layers the encoder's output; DeBERTa's layers have a second x."""
    config = BartConfig(
        vocab_size=64, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=32, eos_token_id=2,
    )  # fmt: skip
    model = BartForSequenceClassification(config).requires_grad_(False)
    for name, module in list(model.named_modules()):
        parent, _, kind = name.rpartition(".")
        if kind in ("k_proj", "v_proj") and "encoder_attn" in name:
            factors = {"A": torch.randn(2, 16), "B": torch.zeros(16, 2)}
            layer = LowRank(module, factors, frozenset(factors), 1.0)  # type: ignore[arg-type]
            layer.name = name
            setattr(model.get_submodule(parent), kind, layer)
    share_inputs(model, lambda: model(input_ids=torch.tensor([[5, 6, 2]])))  # with the end that it classifies by
    groups = {id(m.siblings): m.siblings.layers for m in model.modules() if isinstance(m, LowRank) and m.siblings}
    names = [[layer.name.replace(".encoder_attn", "") for layer in group] for group in groups.values()]
    assert names == [[f"model.decoder.layers.{n}.{kind}_proj" for kind in "kv"] for n in range(2)]

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for kind in "qkv":
                setattr(self, kind, LowRank(nn.Linear(IN, 4), factors_of(4), frozenset({"A", "B"}), 1.0))

        def forward(self, x: Tensor) -> Tensor:
            second = x + 1
            return self.q(x) + self.k(x) + self.v(x) + self.q(second) + self.k(second)  # type: ignore[no-any-return]

    twice = Twice()
    share_inputs(twice, lambda: twice(torch.randn(2, IN)))
    assert twice.q.siblings is None and twice.v.siblings is None


@pytest.mark.parametrize(
    ("architecture", "kinds"),
    [
        ("llama", {"q_proj k_proj v_proj", "gate_proj up_proj"}),
        ("qwen2", {"q_proj k_proj v_proj", "gate_proj up_proj"}),
        ("gpt2", set()),
    ],
)
def test_layers_that_share_their_input_are_found(
    architecture: str, kinds: set[str], models: Callable[[str], Path], recipe: Callable[..., Any]
) -> None:
    model = started(recipe(models(architecture), "adapter.rank=2"))
    share_inputs(model, lambda: model(input_ids=IDS))
    layers = list(lowrank_layers(model).values())
    groups = {id(layer.siblings): layer.siblings.layers for layer in layers if layer.siblings is not None}
    assert {" ".join(layer.name.rpartition(".")[2] for layer in group) for group in groups.values()} == kinds
    for group in groups.values():
        assert len({layer.name.rpartition(".")[0] for layer in group}) == 1
    for layer in layers:
        layer.siblings, layer.dropout = None, 0.1
    share_inputs(model, lambda: model(input_ids=IDS))
    assert all(layer.siblings is None for layer in layers)


@pytest.mark.parametrize("rank", [1, 64])
def test_an_update_below_the_weights_own_precision_is_not_lost(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 has no number between 1 and 1 + 2^-7; a merged weight would have to round the update away. At the larger
    rank that would be the cheaper way."""
    monkeypatch.setattr("pissa_cli.adapters.function.product_dtype", lambda x: x.dtype)
    torch.manual_seed(0)
    base = nn.Linear(64, 64, bias=False).bfloat16()
    nn.init.ones_(base.weight)
    made = {"A": torch.full((rank, 64), 2.0**-5), "B": torch.full((64, rank), 2.0**-5 / rank)}
    layer = LowRank(base, made, frozenset({"A", "B"}), 1.0)
    x = torch.zeros(256, 64, dtype=torch.bfloat16)
    x[:, 0], x[:, 1] = 1.0, -1.0
    x[:, 2] = 2.0**-3
    assert float(layer(x)[0, 0]) == float(torch.tensor(2.0**-3 * (1 + 2.0**-10)).bfloat16())
    x[:, 2] = 0.0
    made["A"][:, 0] = 2.0**-4
    layer = LowRank(base, made, frozenset({"A", "B"}), 1.0)
    assert float(layer(x)[0, 0]) == 2.0**-10


@pytest.mark.parametrize("together", [False, True])
def test_an_update_below_the_outputs_own_precision_is_not_lost(together: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its share in outputs and in gradients of x, to which it adds less than rounding to 16 bits does."""
    monkeypatch.setattr("pissa_cli.adapters.function.product_dtype", lambda x: x.dtype)
    torch.manual_seed(0)
    layers = []
    for _ in range(2):
        made = {"A": torch.randn(8, 128).bfloat16().float() / 8, "B": torch.randn(96, 8).bfloat16().float() / 2**12}
        base = nn.Linear(128, 96, bias=not together).bfloat16()
        nn.init.normal_(base.weight, std=0.1)
        layers.append(LowRank(base, made, frozenset({"A", "B"}), 0.5))
    if together:
        layers[0].siblings = layers[1].siblings = Siblings(layers)
    x = torch.randn(2048, 128).bfloat16().requires_grad_()
    ys = [layer(x) for layer in layers]
    g = torch.randn(2048, 96).bfloat16()
    sum((y * g).sum() for y in ys).backward()  # type: ignore[union-attr]

    def share(found: Tensor, of_base: Tensor, update: Tensor) -> float:
        return float(((found.double() - of_base) * update).sum() / update.square().sum())

    exact = [(layer.base.weight.double(), 0.5 * layer.B.double() @ layer.A.double()) for layer in layers]
    with torch.no_grad():
        for y, layer, (W, change) in zip(ys, layers, exact, strict=True):
            bias = 0 if layer.bias is None else layer.bias.double()
            assert share(y, x.double() @ W.T + bias, x.double() @ change.T) == pytest.approx(1, abs=0.1)
        base = sum(g.double() @ W for W, _ in exact)
        assert share(x.grad, base, sum(g.double() @ change for _, change in exact)) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("architecture", ["llama", "gemma", "qwen2"])
@pytest.mark.parametrize("method", ["pissa", "vera"])
def test_a_joined_gate_gives_the_same_and_keeps_less(
    architecture: str, method: str, models: Callable[[str], Path], recipe: Callable[..., Any]
) -> None:
    model = started(recipe(models(architecture), f"adapter.method={method}", "adapter.rank=4", "model.bits=32"))
    ids = torch.arange(3, 43).view(2, 20)
    with torch.no_grad():
        for layer in lowrank_layers(model).values():  # at VeRA's start no gradient comes through b
            layer.b = None if layer.b is None else nn.Parameter(torch.randn_like(layer.b) / 100)

    def step() -> tuple[Tensor, dict[str, Tensor], int]:
        kept: dict[int, int] = {}
        model.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: (kept.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}), t)[1], lambda t: t
        ):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return loss.detach(), grads, sum(kept.values())

    loss, grads, kept = step()
    join_gates(model)
    joined, joined_grads, joined_kept = step()
    torch.testing.assert_close(joined, loss, rtol=0, atol=0)
    torch.testing.assert_close(joined_grads, grads, rtol=1e-6, atol=1e-7)
    size = ids.numel() * model.config.intermediate_size * 4
    assert kept - joined_kept == 2 * size * model.config.num_hidden_layers


def test_a_joined_gate_above_which_nothing_trains(models: Callable[[str], Path], recipe: Callable[..., Any]) -> None:
    model = started(recipe(models("llama"), "adapter.targets=[down_proj]", "adapter.rank=4", "model.bits=32"))
    first, x = model.model.layers[0].mlp, torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))
    gradients = []
    for _ in range(2):
        first(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in first.parameters() if p.grad is not None])
        first.zero_grad()
        join_gates(model)
    assert "forward" in vars(first) and len(gradients[0]) == 2
    torch.testing.assert_close(*gradients)


def doubled(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return functools.wraps(forward)(lambda *given: 2 * forward(*given))


def test_only_the_plain_gate_is_joined(models: Callable[[str], Path], recipe: Callable[..., Any]) -> None:
    class More(LlamaMLP):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    class Wrapped(LlamaMLP):
        @doubled
        def forward(self, x: Tensor) -> Tensor:
            down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
            return down_proj  # type: ignore[no-any-return]

    class Named(LlamaMLP):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))  # type: ignore[no-any-return]

    model = started(recipe(models("llama"), "adapter.rank=4", "model.bits=32"))
    first, second = (layer.mlp for layer in model.model.layers)
    second.down_proj.dropout = 0.1
    for kind in (More, Wrapped):
        first.__class__ = kind
        join_gates(model)
        assert "forward" not in vars(first) and "forward" not in vars(second)
    first.__class__ = Named
    x = torch.randn(2, 3, 64)
    wanted = first(hidden_states=x)
    join_gates(model)
    assert "forward" in vars(first)
    torch.testing.assert_close(first(hidden_states=x), wanted, rtol=0, atol=0)
    assert first(x.requires_grad_()).grad_fn.name().startswith("LowRank")
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(first(x).sum(), x, create_graph=True)


def test_the_benches_on_a_gpu_join_the_gates_that_training_joins(monkeypatch: pytest.MonkeyPatch) -> None:
    """They make their models themselves, and have to keep up with `assembly.assemble`."""
    plain, steps = bench_gpu.Taker(bench_gpu.Shape("tiny", 64, 64, 128, 1, 100), 16, "pissa"), []
    monkeypatch.setattr(bench_gpu, "LENGTHS", (8,))
    monkeypatch.setattr(bench_gpu, "compile_blocks", lambda *_: None)
    monkeypatch.setattr(bench_gpu, "step_seconds", lambda model, *_: steps.append(model) or 1.0)
    for uses in ((), (bench_gpu.CHECKPOINTED,), (bench_gpu.COMPILED,)):
        bench_gpu.training_rows(dataclasses.replace(plain, uses=uses), 1.0)
    assert ["forward" in vars(model.model.layers[0].mlp) for model in steps] == [True, False, False]
    setting = bench_vera.Setting("", 64, 128, 1, torch.float32, bench_vera.LINEAR, 1, 8, 50, 4, (4,))
    assert "forward" in vars(bench_vera.adapted(setting.base(), setting, "vera", 4).model.layers[0].mlp)
