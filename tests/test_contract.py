"""The contract that every method keeps, over every store and kind of model."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import bitsandbytes
import peft
import pytest
import torch
from conftest import MOE_CONFIGS, TOKENIZER_FILES, exact_scales, make_model, save_model
from safetensors.torch import load_file, save_file
from test_start import logits, relative, started
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    DbrxConfig,
    Gemma3Config,
    GraniteMoeConfig,
    MambaConfig,
    PhimoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    RwkvConfig,
    SqueezeBertConfig,
    SqueezeBertForSequenceClassification,
    Zamba2Config,
)
from transformers.pytorch_utils import Conv1D

from pissa_cli.adapters.methods import METHODS
from pissa_cli.base.attach import lowrank_layers
from pissa_cli.base.experts import expert_layers, expert_weight, part_of
from pissa_cli.base.model import linear_layers, match_targets, skeleton
from pissa_cli.base.plan import _without_adapter, make_plan
from pissa_cli.errors import UsageError
from pissa_cli.export import export_lora
from pissa_cli.merge import merge
from pissa_cli.outputs.trained import load_result
from pissa_cli.run.rundir import Run
from pissa_cli.train import train

Make = Callable[..., Any]
STORES = {
    "fp32": ("model.bits=32",),
    "bf16": ("model.bits=16",),
    "nf4": ("model.bits=4", "train.precision=fp32"),
    "nf4-bf16": ("model.bits=4",),
    "nf4-dq": ("model.bits=4", "train.precision=fp32", "model.double_quant=true"),
}
VARIANTS = {
    "lora": ("adapter.alpha=6",),
    "lora-B": ("adapter.init=B", "adapter.distribution=gaussian", "adapter.lr_ratio=4"),
    "pissa": ("adapter.alpha=6", "adapter.rank_pattern={q_proj|q_b_proj|c_attn: 6}"),
    "loftq": ("adapter.alpha=6",),
    "vera": (),
    "svfit": (),
}
RATES = {"vera": 0.1, "svfit": 0.02}
ARCHITECTURES = ["llama", "qwen2", "gpt2", "uneven", *MOE_CONFIGS]
SOME = ("llama", "gpt2", "uneven", "mixtral")  # a plain layer, one stored the other way round, one left dense, experts
CASES = [
    (variant, store, architecture)
    for variant in VARIANTS
    for store in STORES
    for architecture in ARCHITECTURES
    if not (variant == "loftq" and store in ("fp32", "bf16"))
    if architecture in SOME or not (variant == "lora-B" or store == "nf4-dq")  # differ from lora, nf4 in one function
]


def dequantized(base: Path, folder: Path) -> Path:
    """A dense model folder with the weights of an NF4 one as stock bitsandbytes reads them."""
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: t for file in base.glob("*.safetensors") for name, t in load_file(file).items()}
    dense = {}
    for name, tensor in tensors.items():
        if tensor.dtype == torch.uint8 and name.endswith(".weight"):
            parts = {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}
            state = bitsandbytes.functional.QuantState.from_dict(parts, device=torch.device("cpu"))
            dense[name] = bitsandbytes.functional.dequantize_4bit(tensor, state)
        elif not any(name.startswith(f"{owner}.") for owner in tensors):
            dense[name] = tensor
    save_file(dense, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def settings(variant: str, store: str) -> list[str]:
    method = variant.partition("-")[0]
    rank = {"vera": 12, "svfit": 200}.get(method, 4)
    return [*STORES[store], f"adapter.method={method}", f"adapter.rank={rank}", *VARIANTS[variant]]


def test_every_method_is_in_the_contract() -> None:
    assert {variant.partition("-")[0] for variant in VARIANTS} == set(METHODS)


def stored_base(folder: Path, model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The base with every adapted weight replaced by what is stored plus the change of the factors, in fp64."""
    oracle = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    modules = dict(oracle.named_modules())
    experts = {name: expert for name, expert, _ in expert_layers(oracle)}
    with torch.no_grad():
        for expert in experts.values():
            part = part_of(model, expert)
            if isinstance(part, bitsandbytes.nn.Linear4bit):  # packed, not adapted
                W = bitsandbytes.functional.dequantize_4bit(part.weight.data, part.weight.quant_state)
                expert_weight(modules[expert.module], expert.number, expert.part).copy_(W)
    for name, layer in lowrank_layers(model).items():
        W = layer.base_weight(torch.float32).double()
        if layer.projections is None:
            d = layer.d if layer.d is not None else torch.ones(layer.A.shape[0])
            W = W + layer.scale * (layer.B * d).double() @ layer.A.double()
        if name in experts:
            with torch.no_grad():
                expert_weight(modules[experts[name].module], experts[name].number, experts[name].part).copy_(W)
            continue
        W = W.T if isinstance(modules[name], Conv1D | nn.Embedding) else W
        modules[name].weight.data = W.to(dtype).contiguous()
    return oracle


@functools.cache
def plain_logits(folder: Path, dtype: torch.dtype) -> Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype))


@pytest.mark.parametrize(("variant", "store", "architecture"), CASES)
def test_contract(
    variant: str, store: str, architecture: str, models: Callable[[str], Path], recipe: Make, rows: Path, tmp_path: Path
) -> None:
    folder, method = models(architecture), METHODS[variant.partition("-")[0]]
    rate = RATES.get(variant, 0.01)
    sets = [f"data.train={rows}", "train.steps=3", "train.batch_size=4", f"train.lr={rate}", "train.warmup=0"]
    made = recipe(folder, *settings(variant, store), *sets)
    loose = store.endswith("bf16")

    model = started(made)  # step 0 is the base
    dtype = torch.bfloat16 if loose else torch.float32
    base = plain_logits(folder, dtype)
    moe = architecture in MOE_CONFIGS  # rounding may send a token to another expert
    rounding = (15 if moe else 5) * relative(base, plain_logits(folder, torch.float32))
    assert rounding < 0.2
    oracle = base if made.model.bits != 4 else logits(stored_base(folder, model, dtype))
    assert relative(logits(model), oracle) < (rounding if loose else 1e-5)

    with torch.autocast("cpu", torch.bfloat16, enabled=loose):  # what trains gets gradients, and nothing else
        model(input_ids=torch.arange(2, 250)[None]).logits.float().square().mean().backward()
    layers = lowrank_layers(model)
    expected = {getattr(layer, key) for layer in layers.values() for key in method.trains}
    assert {p for p in model.parameters() if p.requires_grad} == expected
    assert {p for p in model.parameters() if p.grad is not None} == expected
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)

    train(made)  # the result loads bit for bit whatever the global seed
    torch.manual_seed(1)
    result = logits(load_result(made, torch.device("cpu")))
    torch.manual_seed(2)
    assert torch.equal(result, logits(load_result(made, torch.device("cpu"))))
    assert relative(result, oracle) > 1e-3

    run = Run(Path(made.output))  # stock PEFT computes the same
    stored = run.base if run.base.is_dir() else folder
    if run.base.is_dir():
        told = json.loads((run.base / "config.json").read_text())["quantization_config"]
        assert told["bnb_4bit_use_double_quant"] == (store == "nf4-dq")
    if run.base.is_dir() and moe:
        stored = dequantized(run.base, tmp_path / "dense")  # transformers 5 reads no packed experts
    plain = AutoModelForCausalLM.from_pretrained(stored, dtype="auto" if run.base.is_dir() else dtype)
    theirs = peft.PeftModel.from_pretrained(exact_scales(plain), run.adapter)
    assert relative(logits(theirs), result) < (rounding if loose else 1e-4)

    merged = merge(made)  # and so does the merged model
    dense = AutoModelForCausalLM.from_pretrained(merged["path"], dtype=dtype)
    assert relative(logits(dense), result) < (rounding if loose else 1e-4)
    with pytest.raises(UsageError, match="not the model this run was made on"):
        merge(recipe(Path(merged["path"]), *settings(variant, store), *sets))


@pytest.mark.parametrize("init", ["A", "B"])
@pytest.mark.parametrize("bits", [32, 4])
def test_lora_on_embeddings(bits: int, init: str, models: Callable[[str], Path], recipe: Make, rows: Path) -> None:
    sets = [f"model.bits={bits}", "train.precision=fp32", "adapter.method=lora", f"adapter.init={init}"]
    sets += ["adapter.rank=4", "adapter.alpha=2"]
    sets += ["adapter.targets=[embed_tokens, q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]"]
    steps = [f"data.train={rows}", "train.steps=3", "train.batch_size=4", "train.lr=0.02", "train.warmup=0"]
    folder, made = models("llama"), recipe(models("llama"), *sets, *steps)
    model = started(made)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert relative(logits(model), logits(base if bits == 32 else stored_base(folder, model, torch.float32))) < 1e-5
    train(made)
    run = Run(Path(made.output))
    assert load_file(run.adapter / "adapter_model.safetensors")[
        "base_model.model.model.embed_tokens.lora_embedding_A"
    ].shape == (4, 512)
    result = logits(load_result(made, torch.device("cpu")))
    plain = AutoModelForCausalLM.from_pretrained(run.base if bits == 4 else folder, dtype=torch.float32)
    assert relative(logits(peft.PeftModel.from_pretrained(exact_scales(plain), run.adapter)), result) < 1e-4
    merged = merge(made)["path"]
    assert relative(logits(AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)), result) < 1e-4
    changed = load_file(Path(merged) / "model.safetensors")["model.embed_tokens.weight"]
    before = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    assert float((changed - before).abs().max()) > 1e-3
    with pytest.raises(UsageError, match=r"does not know the tensor .*lora_embedding"):
        export_lora(made, run.folder / "exported", server="vllm")


def test_embeddings_that_cannot_be_adapted(models: Callable[[str], Path], recipe: Make) -> None:
    for architecture, method, message in (
        ("llama", "pissa", "does not adapt"),
        ("qwen2", "lora", "tied to the output"),
    ):
        made = recipe(models(architecture), f"adapter.method={method}", "adapter.targets=[embed_tokens]")
        with pytest.raises(UsageError, match=message):
            make_plan(made, models(architecture))


@pytest.mark.parametrize("architecture", MOE_CONFIGS)
def test_experts_resume_export_and_count(
    architecture: str, models: Callable[[str], Path], recipe: Make, rows: Path, tmp_path: Path
) -> None:
    folder = models(architecture)
    sets = ["model.bits=32", "adapter.rank=4", "train.lr=0.02", "train.warmup=0", "train.schedule=constant"]
    sets += [f"data.train={rows}", "train.batch_size=4", "train.save_every=2"]
    whole = recipe(folder, *sets, "train.steps=4")
    train(whole)
    halves = [recipe(folder, *sets, f"train.steps={n}", f"output={tmp_path / 'halves'}") for n in (2, 4)]
    train(halves[0])
    train(halves[1], resume=True)
    one, other = (load_file(Run(Path(r.output)).adapter / "adapter_model.safetensors") for r in (whole, halves[1]))
    assert set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)
    name = "block_sparse_moe.experts.3.w2" if architecture == "mixtral" else "mlp.experts.3.down_proj"
    assert f"base_model.model.model.layers.1.{name}.lora_B.weight" in one
    exported = export_lora(whole, Path(whole.output) / "exported", step=4)["path"]
    cards = [(folder / "README.md").read_text() for folder in (Path(exported), Run(Path(whole.output)).adapter)]
    assert all("PEFT 0.20 or later" in card for card in cards)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    result = logits(load_result(whole, torch.device("cpu")))
    assert relative(logits(peft.PeftModel.from_pretrained(base, exported)), result) < 1e-5
    plan = make_plan(whole, folder)
    sparse = 1 if architecture in ("qwen2_moe", "deepseek_v3") else 2
    assert sum(layer.expert is not None for layer in plan.targets) == sparse * 4 * 3 and plan.left_out == []
    vera = make_plan(recipe(folder, "adapter.method=vera", f"output={tmp_path / 'vera'}"), folder)
    assert not any(layer.expert for layer in vera.targets) and len(vera.left_out) == sparse


@pytest.mark.parametrize(
    ("architecture", "sets"),
    [
        ("qwen2_moe", ("adapter.rank_pattern={shared_expert.up_proj: 6, o_proj: 2}",)),
        ("qwen2_moe", ("adapter.rank_pattern={down_proj: 6}",)),
        ("qwen2_moe", ("adapter.targets=[gate_proj, up_proj]",)),
        ("deepseek_v3", ("adapter.rank_pattern={down_proj: 6}",)),
        (
            "deepseek_v3",
            ("adapter.rank_pattern={gate_proj|up_proj: 6}", "adapter.alpha_pattern={o_proj|gate_proj|up_proj: 3}"),
        ),
        ("deepseek_v3", ("adapter.targets=[shared_experts.down_proj, q_b_proj]",)),
        ("deepseek_v3", ("adapter.targets=[layers.0.mlp.down_proj, o_proj]",)),
        ("deepseek_v3", ("adapter.method=vera",)),
        ("qwen3_moe", ("adapter.targets=[gate_proj, up_proj]",)),
        ("mixtral", ("adapter.targets=[w2, q_proj]",)),
    ],
)
def test_peft_loads_any_targets_of_a_mixture(
    architecture: str, sets: tuple[str, ...], models: Callable[[str], Path], recipe: Make, rows: Path
) -> None:
    folder = models(architecture)
    vera = "adapter.method=vera" in sets
    alpha = [] if vera else ["adapter.alpha=8"]
    made = recipe(folder, "model.bits=32", "adapter.rank=4", *alpha, f"data.train={rows}", "train.steps=2", *sets)
    train(made.model_copy(update={"train": made.train.model_copy(update={"lr": 0.1 if vera else 0.01})}))
    result = logits(load_result(made, torch.device("cpu")))
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    before = relative(logits(base), result)
    run = Run(Path(made.output))
    assert relative(logits(peft.PeftModel.from_pretrained(base, run.adapter)), result) < 1e-4 * before + 1e-5
    exported = export_lora(made, run.folder / "exported", uniform=True, server="vllm", rank=8 if vera else None)["path"]
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert relative(logits(peft.PeftModel.from_pretrained(base, exported)), result) < (before if vera else 1e-5)


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ("adapter.targets=[gate_proj]", "gate_proj is adapted and its twin is not"),
        ("adapter.targets=[up_proj]", "up_proj is adapted and its twin is not"),
        ("adapter.alpha_pattern={up_proj: 3}", "gives the experts' gate and up more than one alpha"),
        ("adapter.alpha_pattern={experts.0.down_proj: 3}", "gives the experts' down more than one alpha"),
        (
            "adapter={rank: auto, max_parameters: 7000, alpha_pattern: {experts.0.down_proj: 3}}",
            "the experts' down more",
        ),
        ("adapter.modules_to_save=[experts]", "model.layers.0.mlp.experts has an adapter as well"),
        ("adapter={modules_to_save: [experts], targets: [q_proj]}", "mlp.experts holds experts, which train with ad"),
    ],
)
def test_what_peft_cannot_hold_is_refused(sets: str, message: str, models: Callable[[str], Path], recipe: Make) -> None:
    with pytest.raises(UsageError, match=message):
        make_plan(recipe(models("qwen3_moe"), sets), models("qwen3_moe"))


@pytest.mark.parametrize(
    "sets",
    [
        "adapter={rank: 4, alpha: 8, rank_pattern: {experts.0.down_proj: 6}}",  # for `export --uniform`
        "adapter={rank: 8, alpha_pattern: {experts.0.down_proj: 8}}",  # which it has anyway
    ],
)
def test_experts_of_one_scale_or_several_ranks_train(sets: str, models: Callable[[str], Path], recipe: Make) -> None:
    assert make_plan(recipe(models("qwen3_moe"), sets), models("qwen3_moe")).targets


@pytest.mark.parametrize(
    ("config", "left_out"),
    [
        (  # its experts lie one below the other in 2-D
            DbrxConfig(
                vocab_size=512,
                d_model=64,
                n_heads=4,
                n_layers=1,
                attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
                ffn_config={"hidden_size": 64, "ffn_hidden_size": 64},
            ),
            ["transformer.blocks.0.ffn.experts.mlp"],
        ),
        (
            MambaConfig(vocab_size=512, hidden_size=64, num_hidden_layers=1),
            [f"backbone.layers.0.mixer.{kind}" for kind in ("dt_proj", "out_proj", "x_proj")],
        ),
        (  # vectors (1, 1, width) are no matrices
            RwkvConfig(vocab_size=512, hidden_size=64, attention_hidden_size=64, num_hidden_layers=1),
            ["rwkv.blocks.0.attention.output", "rwkv.blocks.0.feed_forward.value"],
        ),
        (  # whose router is a linear layer of another class, and gets no adapter as no router does
            PhimoeConfig(
                vocab_size=512,
                hidden_size=64,
                intermediate_size=64,
                num_hidden_layers=1,
                num_attention_heads=4,
                num_key_value_heads=2,
                num_local_experts=2,
            ),
            ["model.layers.0.mlp.experts"],
        ),
    ],
)
def test_no_matrix_is_left_out_without_a_word(
    config: PreTrainedConfig, left_out: list[str], recipe: Make, tmp_path: Path
) -> None:
    config.save_pretrained(tmp_path / "base")
    assert make_plan(recipe(tmp_path / "base", "adapter.rank=4"), tmp_path / "base").left_out == left_out


def test_convolutions_of_one_token_are_named() -> None:
    """They are matrices; those of several, as Mamba's, are not."""
    shape = {"hidden_size": 32, "embedding_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    model = SqueezeBertForSequenceClassification(SqueezeBertConfig(vocab_size=64, num_hidden_layers=1, **shape))
    names = ("attention.key", "attention.query", "attention.value", "intermediate.conv1d")
    names = (*names, "output.conv1d", "post_attention.conv1d")
    found = sorted(_without_adapter(model, linear_layers(model)))
    assert [name.removeprefix("transformer.encoder.layers.0.") for name in found] == list(names)


def test_a_head_of_another_class_is_not_left_out() -> None:
    class Head(nn.Linear):
        pass

    model = make_model("llama")
    model.lm_head = Head(64, 512, bias=False)
    assert _without_adapter(model, linear_layers(model)) == set()
    model.model.layers[0].self_attn.q_proj = Head(64, 64, bias=False)
    assert _without_adapter(model, linear_layers(model)) == {"model.layers.0.self_attn.q_proj"}


def test_experts_do_not_train_whole(models: Callable[[str], Path], recipe: Make) -> None:
    for bits in (4, 16):
        made = recipe(models("qwen3_moe"), "adapter.modules_to_save=[experts]", f"model.bits={bits}")
        with pytest.raises(UsageError, match="adapter"):
            make_plan(made, models("qwen3_moe"))


def test_weights_that_get_no_adapter_are_named(
    models: Callable[[str], Path], pissa: Any, rows: Path, tmp_path: Path
) -> None:
    """Experts of this model are 3-D on disk; a gate of one row has no lower rank."""
    torch.manual_seed(0)
    config = GraniteMoeConfig(vocab_size=512, hidden_size=64, intermediate_size=64, num_hidden_layers=1, eos_token_id=1)
    folder = save_model(AutoModelForCausalLM.from_config(config), tmp_path / "granite")
    outcome = pissa("init", "--model", folder, "--bits", 4, "--rank", 4, "--output", tmp_path / "run")
    assert outcome.code == 0
    told = (
        "no adapter for weights that are stacked, shared, reached by no text, or multiplied by no plain linear layer: "
        "model.layers.0.block"
    )
    assert told in outcome.err
    outcome = pissa("train", "--model", folder, "--rank", 4, "-o", tmp_path / "trained", "--set", f"data.train={rows}")
    assert outcome.code == 0 and told in outcome.err
    gate = "model.layers.1.mlp.shared_expert_gate"
    outcome = pissa("init", "--model", models("qwen2_moe"), "--bits", 4, "--rank", 4, "--json", "-o", tmp_path / "moe")
    assert outcome.json["kept_dense"] == {gate: "one output, as of gates"}
    assert not any("shared_expert_gate" in layer["name"] for layer in outcome.json["layers"])
    outcome = pissa("quantize", models("qwen2_moe"), "--output", tmp_path / "nf4")
    told = f"1 linear layer stays dense (one output, as of gates): {gate}"
    assert told in outcome.out + outcome.err
    sets = ("--set", f"data.train={rows}", "--set", "train.steps=1")
    assert told in pissa("train", tmp_path / "moe", *sets).err


@pytest.mark.parametrize(("architecture", "bits"), [("qwen3_moe", 4), ("qwen3_moe", 32), ("llama", 4)])
def test_a_base_that_transformers_does_not_read_is_named(
    architecture: str, bits: int, models: Callable[[str], Path], pissa: Any, rows: Path, tmp_path: Path
) -> None:
    """As the run begins, and where the adapter says what it is for."""
    sets = ("--set", f"data.train={rows}", "--set", "train.steps=1", "--rank", 4, "--bits", bits)
    outcome = pissa("train", "--model", models(architecture), "--output", tmp_path / "out", *sets)
    assert outcome.code == 0
    told = "experts in 4 bits are packed one by one: pissa reads that, transformers 5 does not"
    packed = (architecture, bits) == ("qwen3_moe", 4)
    assert (told in outcome.err) == (told in (tmp_path / "out" / "adapter" / "README.md").read_text()) == packed
    read = nullcontext() if not packed else pytest.raises(RuntimeError)
    with read:
        AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "base" if bits == 4 else models(architecture))


def test_names_that_transformers_changes_as_it_loads(recipe: Make, rows: Path, tmp_path: Path) -> None:
    """Gemma 3's files begin with language_model., its parameters with model.language_model. Its tower for pictures,
    which no text reaches, gets no adapter, and a q_proj is not that of the tower."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = sizes | {"vocab_size": 512, "num_key_value_heads": 1, "head_dim": 32}
    vision = sizes | {"image_size": 56, "patch_size": 14}
    model = AutoModelForCausalLM.from_config(Gemma3Config(text_config=text, vision_config=vision))
    folder = save_model(model, tmp_path / "gemma3")
    assert "language_model.model.layers.0.mlp.up_proj.weight" in load_file(folder / "model.safetensors")
    sets = ("model.bits=32", "adapter.rank=4", "train.lr=0.01", f"data.train={rows}", "train.steps=2")
    made = recipe(folder, *sets, "adapter.modules_to_save=[embed_tokens]")
    train(made)
    assert not any("tower" in name for name in load_file(Path(made.output) / "adapter" / "adapter_model.safetensors"))
    chosen = match_targets(linear_layers(skeleton(folder, made.model)), ["q_proj"])
    assert [layer.name for layer in chosen] == ["model.language_model.layers.0.self_attn.q_proj"]
    path = merge(made)["path"]
    merged, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(info.values()) and set(load_file(Path(path) / "model.safetensors")) == set(
        load_file(folder / "model.safetensors")
    )
    base = AutoModelForCausalLM.from_pretrained(folder)
    assert relative(logits(base), logits(merged)) > 1e-3
    adapted = peft.PeftModel.from_pretrained(base, Path(made.output) / "adapter")
    assert relative(logits(adapted), logits(merged)) < 1e-5


@pytest.mark.skipif("hrm_text" not in CONFIG_MAPPING, reason="this transformers does not know the model")
def test_tensors_that_transformers_splits_as_it_loads(pissa: Any, recipe: Make, rows: Path, tmp_path: Path) -> None:
    """q, k, v and a gate of HRM are one tensor on disk, and save_pretrained makes one of them again unless told."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "head_dim": 16}
    config = CONFIG_MAPPING["hrm_text"](**sizes, num_hidden_layers=2, bos_token_id=1, eos_token_id=1, pad_token_id=0)
    folder = save_model(AutoModelForCausalLM.from_config(config), tmp_path / "hrm")
    outcome = pissa("init", "--model", folder, "--rank", 4, "--output", tmp_path / "run")
    assert outcome.code == 2 and "save_pretrained(NEW, save_original_format=False)" in " ".join(outcome.err.split())
    new = tmp_path / "new"
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new, save_original_format=False)
    for name in TOKENIZER_FILES:
        shutil.copy(folder / name, new / name)
    made = recipe(new, "model.bits=32", "adapter.rank=4", "train.lr=0.01", f"data.train={rows}", "train.steps=2")
    train(made)
    merged = logits(AutoModelForCausalLM.from_pretrained(merge(made)["path"]))
    base = AutoModelForCausalLM.from_pretrained(folder)
    assert relative(logits(base), merged) > 1e-3
    assert relative(logits(peft.PeftModel.from_pretrained(base, Path(made.output) / "adapter")), merged) < 1e-5


@pytest.mark.parametrize("sets", [["model.bits=32"], ["model.bits=4", "train.precision=fp32"], ["adapter.method=full"]])
def test_blocks_that_share_their_weights(sets: list[str], recipe: Make, rows: Path, tmp_path: Path) -> None:
    """Zamba 2 has one attention and one MLP in several places; its files hold their tensors once."""
    torch.manual_seed(0)
    config = Zamba2Config(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        layers_block_type=["linear_attention", "hybrid"] * 2,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_mamba_heads=8,
        mamba_headdim=16,
        mamba_d_state=16,
        chunk_size=16,
        eos_token_id=1,
    )
    folder = save_model(AutoModelForCausalLM.from_config(config), tmp_path / "zamba2")
    full = "adapter.method=full" in sets
    size = ["model.bits=32"] if full else ["adapter.rank=4"]
    made = recipe(folder, *sets, *size, f"data.train={rows}", "data.limit=4", "train.steps=1", "train.lr=0.01")
    train(made)
    merged, info = AutoModelForCausalLM.from_pretrained(merge(made)["path"], output_loading_info=True)
    one, other = (merged.get_submodule(f"model.layers.{n}.shared_transformer").state_dict() for n in (1, 3))
    assert not any(info.values()) and all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    if not full:
        left_out = json.loads((Path(made.output) / "manifest.json").read_text())["left_out"]
        assert "model.layers.3.shared_transformer.self_attn.q_proj" in left_out
    if sets == ["model.bits=32"]:
        base = AutoModelForCausalLM.from_pretrained(folder)
        adapted = logits(peft.PeftModel.from_pretrained(base, Path(made.output) / "adapter"))
        assert relative(adapted, logits(merged)) < 1e-5
