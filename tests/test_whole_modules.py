"""`adapter.modules_to_save`: modules that train whole, through checkpoints, PEFT files, merge and export."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import Outcome, exact_scales
from safetensors.torch import load_file, save_file
from test_start import logits, relative
from transformers import AutoModelForCausalLM

from pissa_cli.base.plan import make_plan
from pissa_cli.errors import UsageError
from pissa_cli.export import export_lora
from pissa_cli.files import read_json
from pissa_cli.merge import merge
from pissa_cli.outputs.trained import load_result
from pissa_cli.quantize import quantize
from pissa_cli.run.rundir import Run
from pissa_cli.train import train

Make = Callable[..., Any]
CASES = [
    ("llama", "[embed_tokens, lm_head, norm]", {"model.embed_tokens", "lm_head", "model.norm"}),
    ("qwen2", "[embed_tokens]", {"model.embed_tokens", "lm_head"}),  # tied: one trains, both are saved
    ("gpt2", "[lm_head]", {"transformer.wte", "lm_head"}),
]


@pytest.mark.parametrize("store", [("model.bits=32",), ("model.bits=4", "train.precision=fp32"), ("model.bits=16",)])
@pytest.mark.parametrize(("architecture", "names", "modules"), CASES)
def test_whole_modules_go_everywhere(
    architecture: str,
    names: str,
    modules: set[str],
    store: tuple[str, ...],
    models: Callable[[str], Path],
    recipe: Make,
    rows: Path,
    tmp_path: Path,
) -> None:
    folder, loose = models(architecture), store == ("model.bits=16",)
    sets = (*store, f"adapter.modules_to_save={names}", "adapter.rank=4", "train.lr=0.01", "train.batch_size=4")
    sets = (*sets, "train.warmup=0", "train.schedule=constant", f"data.train={rows}", "train.save_every=1")
    made = recipe(folder, *sets, "train.steps=3")
    train(made)
    halves = recipe(folder, *sets, "train.steps=2", f"output={tmp_path / 'halves'}")
    train(halves)
    train(recipe(folder, *sets, "train.steps=3", f"output={tmp_path / 'halves'}"), resume=True)

    run = Run(Path(made.output))
    assert set(read_json(run.adapter / "adapter_config.json")["modules_to_save"]) == modules
    one, other = (load_file(r.adapter / "adapter_model.safetensors") for r in (run, Run(tmp_path / "halves")))
    assert set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)
    original = load_file(folder / "model.safetensors")
    module = "lm_head" if architecture == "gpt2" else "model.embed_tokens"
    saved = one[f"base_model.model.{module}.weight"]
    before = original["transformer.wte.weight" if architecture == "gpt2" else "model.embed_tokens.weight"]
    assert saved.dtype == torch.float32 and 0.001 < float((saved - before).abs().max()) < 0.05

    dtype = torch.bfloat16 if loose else torch.float32
    result = logits(load_result(made, torch.device("cpu")))
    plain = exact_scales(AutoModelForCausalLM.from_pretrained(run.base if run.base.is_dir() else folder, dtype=dtype))
    assert relative(logits(peft.PeftModel.from_pretrained(plain, run.adapter)), result) < (3e-2 if loose else 1e-4)
    merged = AutoModelForCausalLM.from_pretrained(merge(made)["path"], dtype=dtype)
    assert relative(logits(merged), result) < (3e-2 if loose else 1e-4)
    if made.model.bits == 32:
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        exported = export_lora(made, run.folder / "exported", step=3)["path"]
        assert relative(logits(peft.PeftModel.from_pretrained(base, exported)), result) < 1e-5


def test_servers_and_impossible_modules_are_refused(
    models: Callable[[str], Path], recipe: Make, rows: Path, pissa: Callable[..., Outcome]
) -> None:
    folder = models("llama")
    made = recipe(folder, "adapter.modules_to_save=[lm_head]", "adapter.rank=4", f"data.train={rows}", "train.steps=1")
    assert (
        make_plan(made, folder).num_trainable(made)
        == 4 * sum(layer.num_in + layer.num_out for layer in make_plan(made, folder).targets) + 64 * 512
    )
    tied = make_plan(recipe(models("qwen2"), "adapter.modules_to_save=[embed_tokens]", "output=x"), models("qwen2"))
    assert tied.num_whole == 64 * 512, "once, under both names"
    train(made)
    refused = pissa("export", made.output, "--for", "vllm")
    assert refused.code == 2 and "takes no modules_to_save (lm_head)" in refused.err and "--as merged" in refused.err
    stored = recipe(folder, "model.bits=4", "adapter.targets=[v_proj]", "adapter.modules_to_save=[q_proj]", "output=x")
    with pytest.raises(UsageError, match="stored in 4 bits and cannot train"):
        make_plan(stored, folder)
    dense = recipe(folder, "adapter.targets=[v_proj]", "adapter.modules_to_save=[q_proj]", "output=x")
    assert make_plan(dense, folder).num_whole == 2 * 64 * 64
    for names, message in (("[lm_hed]", "matches no module"), ("[q_proj]", "has an adapter as well")):
        with pytest.raises(UsageError, match=message):
            make_plan(recipe(folder, f"adapter.modules_to_save={names}"), folder)


@pytest.mark.parametrize("bits", [32, 4])
def test_a_tied_head_that_is_in_the_files_as_well(
    bits: int, models: Callable[[str], Path], recipe: Make, rows: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "tied"
    shutil.copytree(models("qwen2"), folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    sets = (f"model.bits={bits}", "train.precision=fp32", "adapter.rank=4", "adapter.modules_to_save=[embed_tokens]")
    made = recipe(folder, *sets, f"data.train={rows}", "train.steps=2", "train.lr=0.01", "train.warmup=0")
    train(made)
    assert merge(made)["relative_logit_difference"] < 1e-4
    merged = load_file(Run(Path(made.output)).merged / "model.safetensors")
    assert torch.equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"])
    assert quantize(made, None, Run(Path(made.output)).quantized)["relative_logit_difference"] < 0.5
