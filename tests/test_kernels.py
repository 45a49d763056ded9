"""torch.compile gives the same loss and gradients; what cannot run is refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from test_packing import gradients, started
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    NemotronConfig,
    NemotronForCausalLM,
)
from transformers.activations import ACT2FN
from transformers.models.llama import modeling_llama

from pissa_cli.base.attach import share_inputs
from pissa_cli.errors import UsageError
from pissa_cli.schema.recipe import TrainSection
from pissa_cli.training.kernels import compile_blocks, misses_liger, require_kernels, use_liger, wants_liger
from pissa_cli.training.loss import summed_loss
from pissa_cli.training.packing import attend_by_sequence

CPU = torch.device("cpu")


def test_compiled_blocks_are_the_plain_ones(models: Callable[[str], Path], recipe: Callable[..., Any]) -> None:
    model = started(recipe(models("llama"), "adapter.rank=2", "model.bits=32"))
    del model.model.layers[1:]  # a second one only takes as long again to compile
    attend_by_sequence(model)
    share_inputs(model, lambda: model(input_ids=torch.tensor([[3, 4]])))

    def step() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.zero_grad()
        ids = torch.arange(3, 23)[None]
        positions = torch.cat([torch.arange(8), torch.arange(12)])[None]
        loss = summed_loss(model, {"input_ids": ids, "position_ids": positions, "labels": ids.clone()}, chunked=True)
        loss.backward()
        return loss.detach(), gradients(model)

    wanted = step()
    torch._dynamo.utils.counters.clear()
    compile_blocks(model, CPU)
    torch.testing.assert_close(step(), wanted, rtol=1e-5, atol=1e-6)
    found = torch._dynamo.utils.counters
    assert found["stats"]["unique_graphs"] > 1
    assert sum("torch.compiler.disable" in reason for reason in found["graph_break"]) == len(found["graph_break"]) == 1


def test_a_compiler_that_does_not_work_is_named(
    models: Callable[[str], Path], recipe: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: Any) -> Any:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(UsageError, match=r"torch cannot compile here: no C\+\+ compiler"):
        compile_blocks(started(recipe(models("llama"), "adapter.rank=2")), CPU)


def test_a_model_without_blocks_is_named() -> None:
    config = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    model = LlamaForCausalLM(config)
    model._no_split_modules = set()
    compile_blocks(model, CPU)  # those that it can recompute
    assert model.model.layers[0]._compiled_call_impl is not None
    model.model.layers = torch.nn.ModuleList()
    with pytest.raises(UsageError, match="llama does not say which its blocks are"):
        compile_blocks(model, CPU)


WANTED, AUTO = TrainSection(use_liger_kernel=True), TrainSection()


def patched(monkeypatch: pytest.MonkeyPatch, *modules: torch.nn.Module) -> None:
    """Liger binds a forward to the instances it knows; its kernels themselves need a GPU."""

    def patch(model: Any, _: Any) -> None:
        for module in modules:
            module.forward = lambda x: x

    monkeypatch.setattr("transformers.integrations.liger.apply_liger_kernel", patch)


def test_liger_leaves_experts_to_their_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    config = MixtralConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    experts, norm = model.model.layers[0].mlp.experts, model.model.norm
    patched(monkeypatch, experts, norm)
    assert use_liger(model, WANTED, lambda: 1.0, 1e-4)
    assert "forward" not in experts.__dict__ and "forward" in norm.__dict__
    del norm.forward
    patched(monkeypatch)
    with pytest.raises(UsageError, match="no kernels for mixtral"):
        use_liger(model, WANTED, lambda: 1.0, 1e-4)
    assert not use_liger(model, AUTO, lambda: 1.0, 1e-4)


def test_a_forward_of_our_own_is_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the head of a regression has one, which computes in fp32."""
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    head = model.lm_head
    head.forward = own = partial(type(head).forward, head)
    patched(monkeypatch)
    assert not use_liger(model, AUTO, lambda: 1.0, 1e-4)
    with pytest.raises(UsageError, match="no kernels for llama"):
        use_liger(model, WANTED, lambda: 1.0, 1e-4)
    assert head.forward is own
    patched(monkeypatch, model.model.norm)
    assert use_liger(model, WANTED, lambda: 1.0, 1e-4)


def test_kernels_that_fail_or_change_the_loss_leave_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Liger has kernels for Gemma 3, and raises TypeError for its classifier. It replaces functions of a file."""
    config = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    model = LlamaForCausalLM(config)
    model.lm_head.forward = own = partial(type(model.lm_head).forward, model.lm_head)
    rotated = modeling_llama.apply_rotary_pos_emb

    def patch(*_: Any) -> None:
        modeling_llama.apply_rotary_pos_emb = None
        model.lm_head.forward = model.model.norm.forward = lambda x: x

    def refuse(*_: Any) -> None:
        patch()
        raise TypeError("The model must be Gemma3ForCausalLM.")

    fails = Mock(side_effect=[2.0, RuntimeError("another signature")])
    fills = Mock(side_effect=[2.0, torch.OutOfMemoryError("out of memory")])
    changes = iter([2.0, 2.11]).__next__
    for patched_by, loss, says, hint in (
        (refuse, lambda: 1.0, "Liger's kernels fail: The model must be Gemma3ForCausalLM.", "pip install -U"),
        (patch, fails, "Liger's kernels fail: another signature", "pip install -U liger-kernel, or set it to false"),
        (patch, fills, "Liger's kernels fail: out of memory", "set it to false"),
        (patch, changes, "with Liger's kernels the loss is 2.1100, without 2.0000", "set it to false"),
    ):
        monkeypatch.setattr("transformers.integrations.liger.apply_liger_kernel", patched_by)
        with pytest.raises(UsageError) as raised:
            use_liger(model, AUTO, loss, 5e-2)
        assert says in str(raised.value) and hint in str(raised.value.hint)
        assert modeling_llama.apply_rotary_pos_emb is rotated
        assert model.lm_head.forward is own and "forward" not in vars(model.model.norm)
    patched(monkeypatch, model.model.norm)
    assert use_liger(model, AUTO, iter([2.0, 2.09]).__next__, 5e-2)


def test_activations_and_settings_are_undone_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """For Nemotron Liger replaces activations, in the model and among transformers' own; it writes to norms."""
    shape = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    model = NemotronForCausalLM(NemotronConfig(**shape, num_attention_heads=1, num_key_value_heads=1, head_dim=8))
    mlp, norm = model.model.layers[0].mlp, model.model.norm
    activation, relu2, settings = mlp.act_fn, type(ACT2FN["relu2"]), dict(vars(norm))

    def patch(*_: Any) -> None:
        mlp.act_fn, ACT2FN["relu2"] = torch.nn.ReLU(), torch.nn.ReLU
        norm.eps, norm.offset = None, 1.0

    monkeypatch.setattr("transformers.integrations.liger.apply_liger_kernel", patch)
    for section in (AUTO, WANTED):
        with pytest.raises(UsageError, match=r"the loss is 3\.0000, without 2\.0000"):
            use_liger(model, section, iter([2.0, 3.0]).__next__, 5e-2)
        assert mlp.act_fn is activation and type(ACT2FN["relu2"]) is relu2 and vars(norm) == settings
    monkeypatch.setitem(ACT2FN, "relu2", relu2)
    assert use_liger(model, WANTED, lambda: 2.0, 5e-2)


def test_unasked_kernels_that_fail_are_gone_without(
    models: Callable[[str], Path],
    rows: Path,
    pissa: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """As where there is no C compiler, which Triton needs."""

    def refuse(*_: Any) -> None:
        raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr("transformers.integrations.liger.apply_liger_kernel", refuse)
    monkeypatch.setattr("pissa_cli.training.assembly.wants_liger", lambda section: True)
    monkeypatch.setattr("pissa_cli.training.kernels.require_kernels", lambda section: None)
    monkeypatch.setattr("pissa_cli.training.prepare.require_kernels", lambda section: None)
    sets = (f"data.train={rows}", "adapter.rank=2", "train.steps=1")
    words = ["train", "--model", models("llama"), *(word for one in sets for word in ("--set", one))]
    said = "Liger's kernels fail: Failed to find C compiler."
    outcome = pissa(*words, "--output", tmp_path / "out")
    assert outcome.code == 0 and f"going on without Liger's kernels: train.use_liger_kernel: {said} (pip" in outcome.err
    outcome = pissa(*words, "--output", tmp_path / "asked", "--set", "train.use_liger_kernel=true")
    assert outcome.code == 2 and f"error: train.use_liger_kernel: {said}" in outcome.err


@pytest.mark.skipif(not wants_liger(AUTO), reason="needs a GPU and liger-kernel")
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "mixtral"])
def test_liger_gives_the_same_loss_and_gradients(
    architecture: str, models: Callable[[str], Path], recipe: Callable[..., Any]
) -> None:
    wanted_by = recipe(models(architecture), "adapter.rank=2", "model.bits=32")
    model = started(wanted_by).train().cuda()
    ids = torch.arange(3, 83, device="cuda")[None]

    def step() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.zero_grad()
        loss = summed_loss(model, {"input_ids": ids, "labels": ids.clone()}, chunked=False)
        loss.backward()
        return loss.detach(), gradients(model)

    wanted = step()
    assert use_liger(model, wanted_by.train, lambda: float(step()[0]), 1e-5)
    torch.testing.assert_close(step(), wanted, rtol=1e-3, atol=1e-4)


def test_what_torch_recomputes_it_does_not_compile(models: Callable[[str], Path], recipe: Callable[..., Any]) -> None:
    with pytest.raises(UsageError, match="torch_compile"):
        recipe(models("llama"), "train.torch_compile=true", "train.gradient_checkpointing=true")


def test_liger_needs_a_gpu_and_its_package(
    models: Callable[[str], Path], recipe: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    section = recipe(models("llama"), "train.use_liger_kernel=true").train
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="need a GPU"):
        require_kernels(section)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UsageError, match="not installed") as raised:
        require_kernels(section)
    assert "pissa[liger]" in str(raised.value.hint)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    require_kernels(section)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: not including_emulation)
    assert wants_liger(section) and wants_liger(AUTO) and not misses_liger(AUTO)
    with monkeypatch.context() as without:
        without.setattr("importlib.util.find_spec", lambda name: None)
        assert misses_liger(AUTO) and not misses_liger(section) and not wants_liger(AUTO)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    assert wants_liger(section) and not wants_liger(AUTO)  # a GPU that has bf16 by emulation alone
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    require_kernels(AUTO)
    assert not wants_liger(AUTO)
