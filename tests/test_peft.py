"""Stock PEFT as the oracle: what we write loads there and computes the same; what we start is what it starts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import exact_scales, make_model, save_model
from runs import events
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from pissa_cli.base.peft_files import peft_config, read_peft
from pissa_cli.base.weights import StreamWriter
from pissa_cli.data.tokenize import load_examples
from pissa_cli.files import read_json, write_json
from pissa_cli.initialize import initialize
from pissa_cli.outputs.trained import load_result
from pissa_cli.run.rundir import Run
from pissa_cli.train import train
from pissa_cli.training.batches import collate

peft = pytest.importorskip("peft")

IDS = torch.randint(2, 512, (2, 24), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return exact_scales(model).cpu().eval()(input_ids=IDS).logits.float()


def close(found: Tensor, wanted: Tensor) -> None:
    assert float((found - wanted).norm() / wanted.norm()) < 1e-4


def trained(recipe: Callable[..., Any], folder: Path, rows: Path, *sets: str) -> Any:
    made = recipe(
        folder, f"data.train={rows}", "train.steps=4", "train.batch_size=4", "train.lr=0.01", "train.warmup=0", *sets
    )
    train(made)
    return made


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("method", ["pissa", "lora"])
def test_adapter_of_a_dense_run_loads_on_the_plain_base(
    architecture: str, method: str, models: Callable[[str], Path], recipe: Callable[..., Any], rows: Path
) -> None:
    folder = models(architecture)
    made = trained(
        recipe, folder, rows, "model.bits=32", f"adapter.method={method}", "adapter.rank=4", "adapter.alpha=6"
    )
    run = Run(Path(made.output))
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    plain = logits(base)
    theirs = logits(peft.PeftModel.from_pretrained(base, run.adapter))
    close(logits(load_result(made, torch.device("cpu"))), theirs)
    assert float((theirs - plain).norm() / plain.norm()) > 1e-2
    config = read_json(run.adapter / "adapter_config.json")
    assert config["init_lora_weights"] is True
    assert (config["r"], config["lora_alpha"]) == ((8, 12) if method == "pissa" else (4, 6))
    assert read_json(run.adapter / "pissa.json")["trained_rank"] == 4


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["pissa", "lora"])
def test_adapter_of_an_nf4_run_loads_on_its_base(
    architecture: str, method: str, models: Callable[[str], Path], recipe: Callable[..., Any], rows: Path
) -> None:
    sets = ["model.bits=4", "train.precision=fp32", f"adapter.method={method}", "adapter.rank=4"]
    made = trained(recipe, models(architecture), rows, *sets)
    run = Run(Path(made.output))
    base = AutoModelForCausalLM.from_pretrained(run.base, dtype=torch.float32)
    close(logits(load_result(made, torch.device("cpu"))), logits(peft.PeftModel.from_pretrained(base, run.adapter)))


def laguna(folder: Path) -> Path:
    config = pytest.importorskip("transformers.models.laguna.configuration_laguna").LagunaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
    )
    return save_model(AutoModelForCausalLM.from_config(config), folder)


@pytest.mark.parametrize("architecture", ["laguna", "mixtral", "qwen2_moe"])
def test_what_peft_leaves_out_is_named(
    architecture: str, models: Callable[[str], Path], pissa: Callable[..., Any], rows: Path, tmp_path: Path
) -> None:
    """PEFT renames tensors of Laguna's shared experts that have its names already."""
    folder = laguna(tmp_path / "laguna") if architecture == "laguna" else models(architecture)
    sets = ("--set", f"data.train={rows}", "--set", "train.steps=1", "--set", "train.batch_size=2")
    out = tmp_path / "out"
    said = pissa("train", "--model", folder, "--rank", 4, *sets, "--output", out).err
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder), peft.LoraConfig.from_pretrained(out / "adapter")
    )
    result = peft.set_peft_model_state_dict(model, load_file(out / "adapter" / "adapter_model.safetensors"))
    missing = {
        key.removeprefix("base_model.model.").split(".lora_")[0] for key in result.missing_keys if ".lora_" in key
    }
    assert set(read_json(out / "manifest.json")["lost_in_peft"]) == missing
    card = (out / "adapter" / "README.md").read_text()
    assert ("tock PEFT leaves out" in said) == ("tock PEFT leaves out" in card) == bool(missing)
    assert bool(missing) == (architecture == "laguna")


@pytest.mark.parametrize("said", ["generation_config.json", "config.json alone"])
def test_a_chat_over_nf4_ends_in_stock_peft(said: str, recipe: Callable[..., Any], tmp_path: Path) -> None:
    """Its turns end by a token at which the base goes on."""
    folder, data = save_model(make_model("llama"), tmp_path / "model"), tmp_path / "chat.json"
    if said == "config.json alone":
        (folder / "generation_config.json").unlink()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}:{{ m.content }}<|im_end|>{% endfor %}" + (
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    asked = [{"role": "user", "content": "2"}]
    write_json(data, 8 * [{"messages": [*asked, {"role": "assistant", "content": "four"}]}])
    sets = ["model.bits=4", "train.precision=fp32", "adapter.rank=8", "data.format=chat", "train.schedule=constant"]
    made = trained(recipe, folder, data, *sets, "adapter.modules_to_save=[lm_head]", "train.steps=25", "train.lr=0.01")
    run = Run(Path(made.output))
    base = AutoModelForCausalLM.from_pretrained(run.base, dtype=torch.float32)
    model = exact_scales(peft.PeftModel.from_pretrained(base, run.adapter))
    tokenizer = AutoTokenizer.from_pretrained(run.adapter)
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "four<|im_end|>"
    assert read_json(run.base / "generation_config.json")["pad_token_id"] == 0


def test_exact_start_is_pefts_up_to_sign(models: Callable[[str], Path], recipe: Callable[..., Any]) -> None:
    made = recipe(models("llama"), "model.bits=32", "adapter.rank=4", "adapter.alpha=8", "adapter.svd=exact")
    initialize(made)
    ours = read_peft(Run(Path(made.output)).init)[1].factors
    base = AutoModelForCausalLM.from_pretrained(models("llama"), dtype=torch.float32)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, init_lora_weights="pissa", target_modules="all-linear", task_type="CAUSAL_LM"
    )
    theirs = peft.get_peft_model(base, config)
    for name, factors in ours.items():
        layer = theirs.get_submodule(f"base_model.model.{name}")
        A, B = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
        sign = (A * factors["A"]).sum(1).sign()
        torch.testing.assert_close(factors["A"], sign[:, None] * A, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(factors["B"], sign * B, atol=1e-4, rtol=1e-3)


def test_training_is_that_of_pefts_pissa(
    models: Callable[[str], Path],
    recipe: Callable[..., Any],
    rows: Path,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Step by step, each over all rows: its start and its layers, torch's AdamW, the loss that transformers forms."""
    count = len(rows.read_text().splitlines())
    sets = ("adapter.rank=4", "adapter.alpha=8", "adapter.svd=exact", f"data.train={rows}", f"train.batch_size={count}")
    steps = ("train.steps=6", "train.lr=0.01", "train.schedule=constant", "train.warmup=0", "train.max_grad_norm=1")
    made = recipe(models("llama"), "model.bits=32", *sets, *steps)
    train(made)
    ours = [event["loss"] for event in events(made) if "loss" in event]

    batch = collate(load_examples(str(rows), made.data, tokenizer, None), range(count), 0, packing=False)
    base = AutoModelForCausalLM.from_pretrained(models("llama"), dtype=torch.float32)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, init_lora_weights="pissa", target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model, theirs = peft.get_peft_model(base, config), []
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0)
    for _ in ours:
        loss = model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        theirs.append(float(loss))
    assert ours == pytest.approx(theirs, rel=1e-4) and min(ours) < 0.95 * ours[0]


def test_peft_never_decomposes_again(
    models: Callable[[str], Path], recipe: Callable[..., Any], rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trained(recipe, models("llama"), rows, "model.bits=32", "adapter.rank=4")
    run = Run(Path(made.output))
    monkeypatch.setattr(peft.tuners.lora.layer.LoraLayer, "pissa_init", None)
    for folder in (run.init, run.adapter):
        base = AutoModelForCausalLM.from_pretrained(models("llama"), dtype=torch.float32)
        weights = copy.deepcopy(base.state_dict())
        model = peft.PeftModel.from_pretrained(base, folder)
        for name, tensor in weights.items():
            stem, _, last = name.rpartition(".")
            target = f"base_model.model.{stem}.base_layer.{last}" if "proj" in name else f"base_model.model.{name}"
            assert torch.equal(model.state_dict()[target], tensor)


def test_an_adapter_written_as_it_comes_is_a_safetensors_file(tmp_path: Path) -> None:
    shapes: dict[str, tuple[int, ...]] = {"a": (3, 5), "b": (7,), "c": (0, 4), "d": (2, 2, 2)}
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    writer = StreamWriter(tmp_path / "x.safetensors", shapes)
    for name in ("d", "a", "c", "b"):
        writer.add(name, tensors[name])
    with pytest.raises(ValueError, match="another shape"):
        StreamWriter(tmp_path / "y.safetensors", shapes).add("a", torch.zeros(5, 3))
    writer.close()
    found = load_file(tmp_path / "x.safetensors")
    assert set(found) == set(tensors) and all(torch.equal(found[name], tensors[name]) for name in tensors)
    with pytest.raises(ValueError, match="never written: a"):
        StreamWriter(tmp_path / "z.safetensors", {"a": (1,)}).close()


@pytest.mark.parametrize(
    ("base", "revision", "said"),
    [("user/name", "refs/pr/1", "refs/pr/1"), ("user/name", None, None), ("/a/folder", "refs/pr/1", None)],
)
def test_the_revision_of_a_base_on_the_hub_is_said(base: str, revision: str | None, said: str | None) -> None:
    config = peft_config("LORA", base, revision, {"a": 4}, {"a": 1.0}, {"target_modules": ["a"]}, False, 0)
    assert config.get("revision") == said
    assert pytest.importorskip("peft").LoraConfig(**config).revision == said


def test_one_alpha_is_one_whatever_the_rank() -> None:
    """As numbers with a point 16 / 49 * 49 is below 16."""
    ranks = {str(rank): rank for rank in range(1, 513)}
    for alpha in (1, 8, 16, 29, 0.1, 32.5):
        scales = {name: alpha / rank for name, rank in ranks.items()}
        config = peft_config("LORA", "user/name", None, ranks, scales, {"target_modules": ["a"]}, False, 0)
        assert (config["lora_alpha"], config["alpha_pattern"]) == (alpha, {})
        assert type(config["lora_alpha"]) is type(alpha)


def test_most_layers_say_the_rank_and_the_others_are_patterns() -> None:
    ranks, scales = {"a": 6, "b": 4, "c": 4}, {"a": 1.0, "b": 1.0, "c": 0.5}
    config = peft_config("LORA", "user/name", None, ranks, scales, {"target_modules": ["a"]}, False, 0)
    assert (config["r"], config["rank_pattern"]) == (4, {"a": 6})
    ranks["d"], scales["d"] = 4, 1.0
    config = peft_config("LORA", "user/name", None, ranks, scales, {"target_modules": ["a"]}, False, 0)
    assert (config["lora_alpha"], config["alpha_pattern"]) == (4, {"a": 6, "c": 2})


def test_experts_that_lie_in_one_parameter_have_twice_the_rank_there() -> None:
    """PEFT knows it by itself where it changes the names of a model's experts."""

    def patterns(alpha: float, *named: str) -> tuple[Any, Any]:
        experts = {f"m.experts.0.{kind}_proj": 4 for kind in ("gate", "up", "down")}
        scales = {name: alpha / 4 if "down" in name else 1.0 for name in experts} | {"q": 1.0, "k": 1.0}
        targets = {"target_modules": ["q", "k"], **({"target_parameters": list(named)} if named else {})}
        config = peft_config("LORA", "x", None, experts | {"q": 4, "k": 4}, scales, targets, False, 0)
        return config["rank_pattern"], config["alpha_pattern"]

    both = {"gate_up_proj": 8}
    assert patterns(4) == ({}, {})
    assert patterns(4, "down_proj", "gate_up_proj") == (both, both)
    assert patterns(3) == ({"down_proj": 4}, {"down_proj": 3, "m.experts.0.down_proj": 3})
    assert patterns(3, "down_proj", "gate_up_proj") == (
        both | {"down_proj": 4},
        both | {"down_proj": 3, "m.experts.0.down_proj": 3},
    )
