"""VeRA's projections: shared, seeded as PEFT seeds them, stored only if asked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from test_start import logits, relative, started
from transformers import AutoModelForCausalLM

from pissa_cli.adapters.start import Adapter, Projections
from pissa_cli.base.attach import lowrank_layers
from pissa_cli.base.peft_files import peft_config, read_peft, write_peft
from pissa_cli.outputs.trained import load_result
from pissa_cli.run.rundir import Run
from pissa_cli.train import train

Make = Callable[..., Any]


def test_vera_shares_its_projections_and_stores_none_of_them(
    models: Callable[[str], Path], recipe: Make, tmp_path: Path
) -> None:
    made = recipe(models("llama"), "model.bits=32", "adapter.method=vera", "adapter.rank=4096")
    model = started(made)
    x = torch.zeros(1, 64)
    layers = list(lowrank_layers(model).values())
    for _ in range(2):
        pairs = [layer.pair(x if layer.base.in_features == 64 else torch.zeros(1, 128)) for layer in layers]  # type: ignore[operator]
        assert len({A.data_ptr() for A, _ in pairs}) == 1 and len({B.data_ptr() for _, B in pairs}) == 1
        model.to(torch.bfloat16).to(torch.float32)
    assert not [name for name in model.state_dict() if name.endswith((".A", ".B"))]
    file = Run(Path(made.output)).init / "adapter_model.safetensors"
    vectors = sum(tensor.numel() * 4 for tensor in load_file(file).values())
    assert vectors < file.stat().st_size <= 1.03 * vectors


@pytest.mark.parametrize(("architecture", "targets"), [("gpt2", "all-linear"), ("llama", ["gate_proj"])])
def test_vera_draws_its_projections_as_peft_does(
    architecture: str, targets: Any, models: Callable[[str], Path], recipe: Make
) -> None:
    """Those of the gate alone are wider on one side."""
    sets = ["model.bits=32", "adapter.method=vera", "adapter.rank=7", "seed=3", f"adapter.targets={targets}"]
    layer = next(iter(lowrank_layers(started(recipe(models(architecture), *sets))).values()))
    base = AutoModelForCausalLM.from_pretrained(models(architecture))
    config = peft.VeraConfig(r=7, target_modules=targets, projection_prng_key=3, save_projection=False)
    theirs = peft.get_peft_model(base, config).base_model
    assert layer.projections is not None
    A, B = layer.projections.whole()
    assert torch.equal(A, theirs.vera_A["default"]) and torch.equal(B, theirs.vera_B["default"])


def test_vera_stores_its_projections_if_asked(models: Callable[[str], Path], recipe: Make, rows: Path) -> None:
    sets = ["model.bits=32", "adapter.method=vera", "adapter.rank=8", "train.lr=0.1", "train.steps=2"]
    made = recipe(models("llama"), *sets, f"data.train={rows}", "adapter.save_projection=true")
    train(made)
    run = Run(Path(made.output))
    tensors = load_file(run.adapter / "adapter_model.safetensors")
    assert tensors["base_model.vera_A"].shape == (8, 128) and tensors["base_model.vera_B"].shape == (128, 8)
    base = AutoModelForCausalLM.from_pretrained(models("llama"), dtype=torch.float32)
    theirs = logits(peft.PeftModel.from_pretrained(base, run.adapter))
    assert relative(theirs, logits(load_result(made, torch.device("cpu")))) < 1e-6


def test_projections_that_are_stored_are_those_that_are_read(tmp_path: Path) -> None:
    """Whatever the seed gives by another version of torch."""
    config = peft_config("VERA", "x", None, {"a": 2}, {"a": 1.0}, {"target_modules": ["a"]}, False, 0, (), (), True)
    made = Projections(torch.randn(2, 5), torch.randn(4, 2))
    vectors = Adapter({"a": {"d": torch.ones(2), "b": torch.ones(4)}}, {"a": 1.0}, made)
    write_peft(tmp_path, vectors, config)
    found = read_peft(tmp_path, (4, 5))[1]
    assert found.projections is not None and set(found.factors["a"]) == {"d", "b"}
    assert all(torch.equal(one, other) for one, other in zip(found.projections.whole(), made.whole(), strict=True))
    write_peft(tmp_path, vectors, config | {"save_projection": False})
    assert not [name for name in load_file(tmp_path / "adapter_model.safetensors") if name.endswith(("_A", "_B"))]


def test_one_copy_of_the_projections_a_dtype() -> None:
    A, B = torch.randn(2, 5), torch.randn(4, 2)
    made, cpu = Projections(A, B), torch.device("cpu")
    for dtype in (torch.bfloat16, torch.float32):
        found = made.pair((3, 4), cpu, dtype)
        assert torch.equal(found[0], A[:, :4].to(dtype)) and torch.equal(found[1], B[:3].to(dtype))
        again = made.pair((4, 5), cpu, dtype)
        assert [one.data_ptr() for one in found] == [other.data_ptr() for other in again]
    assert made.whole() == (A, B)
