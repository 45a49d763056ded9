"""Merge, quantize and push: against weights computed by hand, stock readers, and the Hub's HTTP."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
import yaml
from conftest import CONFIGS, Outcome, exact_scales, make_model, save_model
from huggingface_hub.utils import filter_repo_objects
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    BertConfig,
    Gemma3TextConfig,
    RwkvConfig,
)

from pissa_cli.adapters.start import Adapter
from pissa_cli.base.attach import lowrank_layers
from pissa_cli.base.loading import load_model
from pissa_cli.base.model import linear_layers, read_weight, resolve_base, skeleton
from pissa_cli.base.side_files import copy_side_files, copy_tokenizer
from pissa_cli.base.weights import open_weights
from pissa_cli.errors import PissaError, UsageError
from pissa_cli.evals.run import evaluate
from pissa_cli.matrices import quant
from pissa_cli.merge import TOLERANCE, _compare, merge
from pissa_cli.outputs.card import _prompt, _without_folders, model_card
from pissa_cli.outputs.dense import dense_tensors, rounded
from pissa_cli.outputs.probes import logit_difference, perplexity, probe_logits
from pissa_cli.outputs.trained import load_plain_base, load_result, load_with, merged_folder, read_result
from pissa_cli.quantize import quantize
from pissa_cli.run.rundir import Run
from pissa_cli.schema.data_options import DataSection
from pissa_cli.train import train

Make = Callable[..., Any]
IDS = torch.randint(2, 512, (2, 24), generator=torch.Generator().manual_seed(0))


def trained(recipe: Make, folder: Path, rows: Path, *sets: str) -> Any:
    made = recipe(
        folder,
        "adapter.rank=4",
        "adapter.alpha=6",
        f"data.train={rows}",
        f"data.eval={rows}",
        "train.steps=3",
        "train.batch_size=4",
        "train.lr=0.01",
        "train.warmup=0",
        *sets,
    )
    train(made)
    return made


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return exact_scales(model).cpu().eval()(input_ids=IDS).logits.float()


@pytest.mark.parametrize(("bits", "method"), [(16, "pissa"), (4, "pissa"), (16, "vera"), (32, "pissa")])
def test_factors_are_rounded_once_where_every_product_would(
    bits: int, method: str, models: Callable[[str], Path], recipe: Make, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alpha = [] if method == "pissa" else ["adapter.alpha=null"]
    made = trained(recipe, models("llama"), rows, f"model.bits={bits}", f"adapter.method={method}", *alpha)
    exact = read_result(made)[1].factors
    monkeypatch.setattr("pissa_cli.matrices.products._has_avx512_bf16", lambda: False)
    for fast in (False, True):
        monkeypatch.setattr("pissa_cli.matrices.products.has_amx", partial(bool, fast))
        model = load_result(made, torch.device("cpu"))
        layers = lowrank_layers(model)
        wanted = torch.bfloat16 if fast and bits != 32 else torch.float32
        assert {factor.dtype for layer in layers.values() for factor in layer.factors().values()} == {wanted}
        found = logits(model)
        for name, layer in layers.items():
            for key, factor in layer.factors().items():
                factor.data = exact[name][key]
        assert torch.equal(found, logits(model))


def test_factors_of_a_layer_in_fp32_are_not_rounded(
    models: Callable[[str], Path], recipe: Make, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, wide = trained(recipe, models("llama"), rows, "model.bits=16"), "model.layers.0.mlp.up_proj"

    def load(*given: Any) -> Any:
        model = load_model(*given)
        model.get_submodule(wide).float()
        return model

    monkeypatch.setattr("pissa_cli.outputs.trained.load_model", load)
    monkeypatch.setattr("pissa_cli.matrices.products.has_amx", lambda: True)
    for name, layer in lowrank_layers(load_result(made, torch.device("cpu"))).items():
        assert layer.A.dtype == layer.B.dtype == (torch.float32 if name == wide else torch.bfloat16)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_what_is_scored_reads_its_4_bits_once(
    precision: str, models: Callable[[str], Path], recipe: Make, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trained(recipe, models("qwen2"), rows, "model.bits=4", f"train.precision={precision}")
    cpu = torch.device("cpu")
    for load in (load_plain_base, load_result):
        read = load(made, cpu)
        monkeypatch.setattr("pissa_cli.outputs.trained.UNPACKED_ON_CPU", 0)
        stored = load(made, cpu)
        monkeypatch.undo()
        pairs = list(zip(lowrank_layers(read).values(), lowrank_layers(stored).values(), strict=True))
        assert pairs and all(not quant.is_packed(a.base) and quant.is_packed(b.base) for a, b in pairs)
        assert torch.equal(logits(read), logits(stored))


def test_what_is_read_once_is_not_kept_in_4_bits_beside(
    models: Callable[[str], Path], recipe: Make, rows: Path
) -> None:
    """A layer of bitsandbytes and its weight hold one another, and Python may look for such pairs late."""
    made = trained(recipe, models("llama"), rows, "model.bits=4")
    for load in (load_plain_base, load_result):
        gc.collect()
        gc.disable()
        try:
            model = load(made, torch.device("cpu"))
            found = [other for other in gc.get_objects() if type(other) is bitsandbytes.nn.Linear4bit]
        finally:
            gc.enable()
        assert model is not None and not found


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2", "gemma"])
@pytest.mark.parametrize("bits", [32, 4])
def test_merged_is_the_trained_model(
    architecture: str, bits: int, models: Callable[[str], Path], recipe: Make, rows: Path
) -> None:
    made = trained(recipe, models(architecture), rows, f"model.bits={bits}", "train.precision=fp32")
    result = merge(made)
    merged = AutoModelForCausalLM.from_pretrained(result["path"], dtype=torch.float32)
    wanted = logits(load_result(made, torch.device("cpu")))
    assert float((logits(merged) - wanted).norm() / wanted.norm()) < 1e-5
    assert result["relative_logit_difference"] < 1e-5
    original = load_file(models(architecture) / "model.safetensors")
    found = load_file(Path(result["path"]) / "model.safetensors")
    assert {n: (t.shape, t.dtype) for n, t in found.items()} == {n: (t.shape, t.dtype) for n, t in original.items()}
    assert result["bytes"] == sum(tensor.nbytes for tensor in original.values())
    assert (Path(result["path"]) / "tokenizer.json").is_file() and "pissa" in (
        Path(result["path"]) / "README.md"
    ).read_text()
    assert "quantization_config" not in json.loads((Path(result["path"]) / "config.json").read_text())


def test_merged_weight_by_hand(models: Callable[[str], Path], recipe: Make, rows: Path) -> None:
    made = trained(recipe, models("llama"), rows, "model.bits=32")
    merge(made.model_copy(update={"train": made.train.model_copy(update={"lr": 7.0})}))
    assert "lr: 0.01" in (Run(Path(made.output)).merged / "README.md").read_text()
    run, name = Run(Path(made.output)), "model.layers.1.mlp.up_proj"
    W = load_file(models("llama") / "model.safetensors")[f"{name}.weight"]
    factors = load_file(run.adapter / "adapter_model.safetensors")
    A, B = (factors[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
    found = load_file(run.merged / "model.safetensors")[f"{name}.weight"]
    torch.testing.assert_close(found, W + 6 / 4 * B @ A)
    with pytest.raises(UsageError, match="exists already"):
        merge(made, output=rows.parent)
    assert rows.is_file()


def test_a_sharded_bf16_base_merges_into_bf16(recipe: Make, rows: Path, tmp_path: Path) -> None:
    folder = save_model(make_model("llama").bfloat16(), tmp_path / "model", max_shard_size="60KB")
    made = trained(recipe, folder, rows, "model.bits=16")
    result = merge(made)
    merged = AutoModelForCausalLM.from_pretrained(result["path"])
    assert merged.dtype == torch.bfloat16 and 0 < result["relative_logit_difference"] < 5e-2


def test_weights_in_bf16_explain_what_products_in_fp32_do_not(recipe: Make, rows: Path, tmp_path: Path) -> None:
    folder = save_model(make_model("llama").bfloat16(), tmp_path / "model")
    result = merge(trained(recipe, folder, rows, "model.bits=32"))
    assert TOLERANCE[torch.float32] < result["relative_logit_difference"] < TOLERANCE[torch.bfloat16]


def test_the_last_checkpoint_merged_is_the_result_merged(
    models: Callable[[str], Path], recipe: Make, rows: Path
) -> None:
    made = trained(recipe, models("llama"), rows, "model.bits=32", "train.save_every=1", "train.keep=3")
    merge(made, step=3)
    assert merged_folder(made) == Run(Path(made.output)).merged
    shutil.rmtree(merged_folder(made))
    merge(made, step=2)
    with pytest.raises(UsageError, match="is of step 2, the result of step 3"):
        merged_folder(made)


@pytest.mark.parametrize(("dtype", "lr"), [(torch.bfloat16, 4e-6), (torch.float16, 5e-7)])
def test_a_change_below_the_last_bit_is_merged(
    dtype: torch.dtype, lr: float, recipe: Make, rows: Path, tmp_path: Path
) -> None:
    """What the merged weights have of it, D . (merged - W) / |D|^2: rounded to the nearest next to nothing."""
    folder = save_model(make_model("llama").to(dtype), tmp_path / "model")
    made = trained(recipe, folder, rows, "model.bits=16", f"train.lr={lr}")
    merge(made)
    run, name = Run(Path(made.output)), "model.layers.1.mlp.up_proj"
    W = load_file(folder / "model.safetensors")[f"{name}.weight"].double()
    factors = load_file(run.adapter / "adapter_model.safetensors")
    A, B = (factors[f"base_model.model.{name}.lora_{x}.weight"].double() for x in "AB")
    D = json.loads((run.adapter / "adapter_config.json").read_text())["lora_alpha"] / len(A) * B @ A
    found = load_file(run.merged / "model.safetensors")[f"{name}.weight"].double()

    def share(merged: torch.Tensor) -> float:
        return float((D * (merged - W)).sum() / D.square().sum())

    assert share((W + D).to(dtype).double()) < 0.2
    assert 0.7 < share(found) < 1.3 and float((found - W - D).norm() / W.norm()) < 2e-3


def test_a_change_below_the_last_bit_is_merged_over_nf4(recipe: Make, rows: Path, tmp_path: Path) -> None:
    """NF4 reads back numbers of bf16, too; to the nearest a tenth was left."""
    folder = save_model(make_model("llama").bfloat16(), tmp_path / "model")
    made = trained(recipe, folder, rows, "model.bits=4", "adapter.method=lora", "train.lr=2e-5")
    merged = open_weights(Path(merge(made)["path"]))
    base, adapter = read_result(made, None)
    weights, among, whole = open_weights(base), 0.0, 0.0
    for layer in linear_layers(skeleton(base, made.model), weights):
        if layer.name in adapter.factors:
            W, _ = read_weight(weights, layer, torch.device("cpu"))
            A, B = adapter.pair(layer.name, W.shape, W.device)
            D = (B @ A).double()
            among += float((D * (merged.read(layer.tensor).double() - W.double())).sum())
            whole += float(D.square().sum())
    assert 0.8 < among / whole < 1.2


def test_what_nf4_holds_beside_the_targets_is_merged_in_the_dtype_of_the_base(
    recipe: Make, rows: Path, tmp_path: Path
) -> None:
    folder = save_model(make_model("llama").bfloat16(), tmp_path / "model")
    made = trained(recipe, folder, rows, "model.bits=4", "adapter.targets=[q_proj]")
    assert set(open_weights(Path(merge(made)["path"])).dtypes.values()) == {torch.bfloat16}


def test_merge_holds_one_model_at_a_time(
    models: Callable[[str], Path], recipe: Make, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, loaded = trained(recipe, models("llama"), rows, "model.bits=32"), []
    with_adapter, merged = load_with, load_model

    def first(*args: Any) -> Any:
        model = with_adapter(*args)
        loaded.append(weakref.ref(model))
        return model

    def second(*args: Any) -> Any:
        assert len(loaded) == 1 and loaded[0]() is None
        loaded.clear()
        return merged(*args)

    monkeypatch.setattr("pissa_cli.merge.load_with", first)
    monkeypatch.setattr("pissa_cli.merge.load_model", second)
    merge(made)
    assert not loaded


def test_quantize_stores_as_the_recipe_says(models: Callable[[str], Path], recipe: Make, rows: Path) -> None:
    sets = ("model.bits=4", "model.double_quant=true", "model.absmax=largest")
    made = trained(recipe, models("llama"), rows, *sets)
    folder, name = Path(made.output) / "quantized", "model.layers.0.mlp.up_proj.weight"
    quantize(made, None, folder)
    assert f"{name}.nested_absmax" in load_file(folder / "model.safetensors")
    shutil.rmtree(folder)
    quantize(made, None, folder, double_quant=False)
    found = load_file(folder / "model.safetensors")
    W = load_file(Path(merge(made)["path"]) / "model.safetensors")[name]
    assert torch.equal(found[f"{name}.absmax"], W.abs().view(-1, quant.BLOCK_SIZE).amax(1))


def test_tied_weights_stay_tied(recipe: Make, rows: Path, tmp_path: Path) -> None:
    """Also where the files of the base hold them under both names."""
    folder = save_model(make_model("qwen2").bfloat16(), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, folder / "model.safetensors")
    made = trained(recipe, folder, rows, "model.bits=16", "adapter.modules_to_save=[embed_tokens]")
    found = load_file(Path(merge(made)["path"]) / "model.safetensors")
    assert torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])


def test_a_weight_is_rounded_by_its_name_and_the_seed(recipe: Callable[..., Any], tmp_path: Path) -> None:
    W = torch.full((64, 64), 1.001)

    def by(name: str, seed: int) -> torch.Tensor:
        return rounded(recipe(tmp_path, f"seed={seed}"), name, W, torch.bfloat16)

    assert torch.equal(by("a", 0), by("a", 0)) and set(by("a", 0).unique().tolist()) == {1.0, 1.0078125}
    assert not torch.equal(by("a", 0), by("b", 0)) and not torch.equal(by("a", 0), by("a", 1))
    assert torch.equal(rounded(recipe(tmp_path), "a", W, torch.float32), W)


def test_an_adapter_of_another_base_is_no_change_of_this_one(
    models: Callable[[str], Path], recipe: Callable[..., Any]
) -> None:
    folder, name = models("llama"), "model.layers.9.mlp.up_proj"
    made = recipe(folder, "model.bits=32")
    adapter = Adapter({name: {"A": torch.zeros(2, 64), "B": torch.zeros(128, 2)}}, {name: 1.0})
    tensors = dense_tensors(made, skeleton(folder, made.model), open_weights(folder), adapter, lambda *_: None)
    with pytest.raises(UsageError, match=f"the adapter has a layer {name} that {folder} lacks"):
        next(tensors)


def test_a_wrong_merge_is_refused(
    models: Callable[[str], Path], recipe: Make, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trained(recipe, models("llama"), rows, "model.bits=32")
    original = dense_tensors

    def doubled(recipe: Any, model: Any, weights: Any, adapter: Adapter, then: Any) -> Any:
        return original(recipe, model, weights, Adapter(adapter.factors, dict.fromkeys(adapter.scales, 2.0)), then)

    monkeypatch.setattr("pissa_cli.merge.dense_tensors", doubled)
    with pytest.raises(PissaError, match="logits differ"):
        merge(made)
    assert not Run(Path(made.output)).merged.exists()


@pytest.mark.parametrize("kind", ["mixtral", "llama"])
def test_one_token_may_go_to_another_expert(
    kind: str, models: Callable[[str], Path], recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its logits are others then, those of most tokens the same; without experts such a merge is wrong."""
    apart = torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(0))
    merged = apart.clone()
    merged[0, 4] *= -1
    monkeypatch.setattr("pissa_cli.merge.load_model", lambda *_: make_model(kind))
    monkeypatch.setattr("pissa_cli.merge.probe_logits", lambda *_: [merged])
    made: Any = recipe(models("llama"), "model.bits=32"), [apart], None, models("llama"), torch.float32
    if kind == "mixtral":
        assert _compare(*made)["relative_logit_difference"] > 0.1
    else:
        with pytest.raises(PissaError, match="the merged model's logits differ"):
            _compare(*made)


def test_of_a_deep_model_rounding_explains_more(recipe: Make, rows: Path, tmp_path: Path) -> None:
    """So many layers make of roundings in bf16 a tenth of the logits and more."""
    torch.manual_seed(0)
    config = CONFIGS["llama"]()
    config.num_hidden_layers, config.initializer_range = 48, 0.3
    folder = save_model(AutoModelForCausalLM.from_config(config).bfloat16(), tmp_path / "deep")
    made = trained(recipe, folder, rows, "train.lr=1e-6", "train.steps=1")
    assert 0.1 < merge(made)["relative_logit_difference"] < 0.5


@pytest.mark.parametrize("bits", [32, 4])
def test_quantized_run_is_read_by_stock_transformers(
    bits: int, models: Callable[[str], Path], recipe: Make, rows: Path, tmp_path: Path
) -> None:
    made = trained(recipe, models("llama"), rows, f"model.bits={bits}", "train.precision=fp32")
    merge(made)
    result = quantize(made, None, tmp_path / "nf4")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "nf4", dtype=torch.float32)
    dense = load_file(Run(Path(made.output)).merged / "model.safetensors")
    error = norm = 0.0
    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            W = dense[f"{name}.weight"]
            stored = quant.read(quant.pack(quant.Store(4, torch.float32, absmax="fitted"), W))
            packed = quant.packed_weight(module)
            assert packed is not None and torch.equal(quant.read(packed), stored)
            error += float((stored - W).double().square().sum())
            norm += float(W.double().square().sum())
    assert result["relative_error"] == pytest.approx((error / norm) ** 0.5, rel=1e-6)
    assert result["bytes"] < result["dense_bytes"] == sum(tensor.nbytes for tensor in dense.values())
    plain = AutoModelForCausalLM.from_pretrained(Run(Path(made.output)).merged, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "nf4")
    before, after = (perplexity(one, tokenizer, made)[0] for one in (plain, exact_scales(model)))
    assert before is not None and after is not None and before != pytest.approx(after, rel=5e-6)
    assert result["perplexity_before"] == pytest.approx(before, rel=2e-6)
    assert result["perplexity_after"] == pytest.approx(after, rel=2e-6)
    apart = logit_difference(probe_logits(plain, tokenizer, made), probe_logits(model, tokenizer, made))
    assert {name: result[name] for name in apart} == pytest.approx(apart, rel=1e-2)


def test_quantize_a_dense_folder(pissa: Callable[..., Outcome], models: Callable[[str], Path], tmp_path: Path) -> None:
    outcome = pissa("quantize", models("gpt2"), "--output", tmp_path / "nf4", "--set", "model.bits=32", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["perplexity_data"].endswith("built-in prompts")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "nf4", dtype=torch.float32)
    plain = logits(AutoModelForCausalLM.from_pretrained(models("gpt2"), dtype=torch.float32))
    assert 0 < float((logits(model) - plain).norm() / plain.norm()) < 0.5
    again = pissa("quantize", tmp_path / "nf4", "--output", tmp_path / "twice")
    assert again.code == 2 and "quantized already" in again.err


def test_a_model_without_a_plain_embedding_is_quantized(pissa: Callable[..., Outcome], tmp_path: Path) -> None:
    """Gemma 3 scales what its embedding gives, by a class of its own, which is no layer to adapt."""
    config = Gemma3TextConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    folder = save_model(AutoModelForCausalLM.from_config(config), tmp_path / "dense")
    outcome = pissa("quantize", folder, "--output", tmp_path / "nf4")
    assert outcome.code == 0, outcome.err


@pytest.mark.parametrize("bits", [32, 4])
def test_weights_that_a_model_divides_outside_training(bits: int, recipe: Make, rows: Path, tmp_path: Path) -> None:
    """RWKV halves two weights of every block here, and with them what goes on from it."""
    sizes = {"vocab_size": 512, "hidden_size": 64, "attention_hidden_size": 64, "intermediate_size": 128}
    config = RwkvConfig(
        **sizes, num_hidden_layers=2, context_length=64, rescale_every=1, bos_token_id=1, eos_token_id=1
    )
    folder = save_model(AutoModelForCausalLM.from_config(config), tmp_path / "rwkv")
    short = ("data.format=text", "data.columns={text: instruction}", "data.max_length=16", "data.limit=2")
    made = trained(recipe, folder, rows, f"model.bits={bits}", "train.precision=fp32", "data.eval=null", *short)
    merged = logits(AutoModelForCausalLM.from_pretrained(merge(made)["path"], dtype=torch.float32))
    if bits == 32:
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        adapted = logits(PeftModel.from_pretrained(base, Run(Path(made.output)).adapter))
        assert float((adapted - merged).norm() / merged.norm()) < 1e-5


@pytest.mark.skipif("qwen4_exp_text" not in CONFIG_MAPPING, reason="this transformers does not know the model")
def test_layers_named_weight_stay_dense(pissa: Callable[..., Outcome], tmp_path: Path) -> None:
    """transformers takes the scales of Qwen4's block_inject_weight for those of another tensor, 5.17 also those of
    input_mix_weight_up."""
    config = CONFIG_MAPPING["qwen4_exp_text"](
        vocab_size=512,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        indexer_n_heads=2,
        indexer_kv_heads=1,
        indexer_head_dim=32,
        indexer_budget=16,
        indexer_compress_ratio=4,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        hc_lowrank=64,
        ple_embed_dim=64,
    )
    folder = save_model(AutoModelForCausalLM.from_config(config), tmp_path / "dense")
    outcome = pissa("quantize", folder, "--output", tmp_path / "nf4", "--set", "model.bits=32", "--json")
    assert outcome.code == 0, outcome.err
    for name in ("block_inject_weight", "input_mix_weight_up"):
        assert f"model.layers.0.attn_hyper_connection.{name}" in outcome.json["kept_dense"]
    plain, packed = (
        logits(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)) for path in (folder, tmp_path / "nf4")
    )
    assert 0 < float((packed - plain).norm() / plain.norm()) < 0.5


def test_a_dense_folder_has_nothing_of_the_run_beside_it(
    pissa: Callable[..., Outcome], models: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(models("llama"), tmp_path / "base #1")
    assert pissa("init", "--model", folder, "--rank", 4, "--output", f"{folder}-run").code == 0
    outcome = pissa("quantize", folder, "--output", tmp_path / "nf4")
    assert outcome.code == 0 and "the run there" not in outcome.err, outcome.err
    assert "fine-tuned" not in (tmp_path / "nf4" / "README.md").read_text()


def test_full_fine_tuning_needs_no_merge_and_quantizes(models: Callable[[str], Path], recipe: Make, rows: Path) -> None:
    made = recipe(models("llama"), "model.bits=32", "adapter.method=full", f"data.train={rows}", "train.steps=1")
    train(made)
    result = merge(made)
    assert result["max_logit_difference"] is None and (Path(result["path"]) / "README.md").is_file()
    assert result["bytes"] == (Path(result["path"]) / "model.safetensors").stat().st_size
    for _ in range(2):
        assert quantize(made, None, Run(Path(made.output)).quantized)["relative_error"] > 0
    with pytest.raises(UsageError, match="no checkpoints to load"):
        quantize(made, None, Run(Path(made.output)).quantized, step=1)
    with pytest.raises(UsageError, match="exists already"):
        quantize(made, None, Run(Path(made.output)).merged)


def test_a_full_fine_tuning_keeps_the_configuration_of_its_base(
    models: Callable[[str], Path], recipe: Make, rows: Path, tmp_path: Path
) -> None:
    """Other versions of transformers, and servers, know other keys than those that this version writes."""
    folder = shutil.copytree(models("llama"), tmp_path / "base")
    settings = json.loads((folder / "config.json").read_text())
    del settings["rope_parameters"], settings["dtype"]
    old = settings | {"rope_theta": 500000.0, "torch_dtype": "bfloat16", "transformers_version": "4.43.0", "ours": [1]}
    (folder / "config.json").write_text(json.dumps(old))
    made = recipe(folder, "model.bits=32", "adapter.method=full", f"data.train={rows}", "train.steps=1")
    train(made)
    merged = Run(Path(made.output)).merged
    assert json.loads((merged / "config.json").read_text()) == old | {"torch_dtype": "float32"}
    model = AutoModelForCausalLM.from_pretrained(merged)
    assert model.dtype == torch.float32 and model.config.rope_parameters["rope_theta"] == 500000.0
    assert torch.equal(logits(model), logits(load_result(made, torch.device("cpu"))))


def test_a_full_fine_tuning_of_the_language_model_alone_says_so(recipe: Make, rows: Path, tmp_path: Path) -> None:
    """Of a base that sees, too, its part for images does not train, and is not written."""
    kind = pytest.importorskip("transformers.models.qwen3_5").Qwen3_5Config
    heads = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "num_attention_heads": 4, "head_dim": 16}
    heads |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16, "num_key_value_heads": 2}
    shape = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "eos_token_id": 1}
    text = shape | heads | {"layer_types": ["full_attention"], "bos_token_id": None, "pad_token_id": 0}
    sight = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
    model = AutoModelForImageTextToText.from_config(kind(text_config=text, vision_config=sight))
    made = recipe(
        save_model(model, tmp_path / "base"),
        "model.bits=32",
        "adapter.method=full",
        f"data.train={rows}",
        "train.steps=1",
    )
    train(made)
    merged = Run(Path(made.output)).merged
    settings = json.loads((merged / "config.json").read_text())
    assert (settings["model_type"], settings["architectures"]) == ("qwen3_5_text", ["Qwen3_5ForCausalLM"])
    assert not any("visual" in name for name in open_weights(merged).files)
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(merged)), logits(load_result(made, torch.device("cpu")))
    )


def test_what_is_copied_beside_a_model_is_downloaded(
    models: Callable[[str], Path], recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocabulary = {"own.tiktoken", "tokenizer.json", "tokenizer.model", "added_tokens.json", "vocab.txt"}
    wanted = {"LICENSE.txt", "NOTICE", "USE_POLICY.md", *vocabulary}

    def snapshot(_name: str, allow_patterns: list[str], ignore_patterns: list[str], **_: Any) -> str:
        folder = shutil.copytree(models("llama"), tmp_path / "whole")
        for name in wanted - {"tokenizer.json"}:
            (folder / name).write_text("x")
        names = [path.name for path in folder.iterdir()]
        there = set(filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        for name in set(names) - there:
            (folder / name).unlink()
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    made = recipe(models("llama"))
    folder = resolve_base(made.model.model_copy(update={"name": "user/model"}))
    beside = {"modeling_own.py", "chat_template.jinja", "model.safetensors.index.json"}
    for name in beside:
        (folder / name).write_text("x")
    copy_side_files(folder, tmp_path / "copied", made)
    found = {path.name for path in (tmp_path / "copied").iterdir()}
    assert wanted <= found and beside - found == {"model.safetensors.index.json"}
    copy_tokenizer(folder, tmp_path / "adapter", made)
    kept = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert kept == vocabulary | {"chat_template.jinja", "tokenizer_config.json"}


@pytest.mark.parametrize("bits", [16, 4])
def test_a_head_is_written_beside_names_of_its_kind(bits: int, recipe: Make, tmp_path: Path) -> None:
    """The files of a backbone have no prefix; transformers 4 takes a head for a part of it then."""
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    folder = save_model(AutoModel.from_config(BertConfig(vocab_size=512, **shape)), tmp_path / "bert")
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": f"{i} apples", "label": i % 2}) + "\n" for i in range(8)))
    task = ("model.task=sequence-classification", 'model.labels=["no", "yes"]', "data.format=classification")
    made = recipe(folder, f"model.bits={bits}", *task, f"data.train={data}", "adapter.rank=4", "train.steps=1")
    train(made)
    merge(made)
    quantize(made, None, tmp_path / "nf4")
    assert not any(name.startswith("bert.") for name in open_weights(folder).files)
    for written in (Run(Path(made.output)).merged, tmp_path / "nf4"):
        names = set(open_weights(written).files)
        assert names >= {"classifier.weight", "bert.pooler.dense.bias"}
        assert all(name.startswith(("bert.", "classifier.")) for name in names)


def test_without_a_head_names_stay_those_of_the_base(recipe: Make, rows: Path, tmp_path: Path) -> None:
    """GPT-2's own files have no prefix."""
    folder = save_model(make_model("gpt2").base_model, tmp_path / "gpt2")
    result = merge(trained(recipe, folder, rows, "model.bits=32"))
    names = set(load_file(folder / "model.safetensors"))
    assert "h.0.attn.c_attn.weight" in names and set(open_weights(Path(result["path"])).files) == names


def test_an_incomplete_model_is_refused_before_any_of_it_is_quantized(
    models: Callable[[str], Path], recipe: Make, tmp_path: Path
) -> None:
    folder = shutil.copytree(models("llama"), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UsageError, match=r"not in its files \(model\.norm\.weight\)"):
        quantize(recipe(folder), folder, tmp_path / "four", lambda *_: pytest.fail("it had begun"))


@pytest.mark.parametrize("form", ["nf4", "compressed-tensors"])
def test_routers_are_named_as_dense(form: Any, models: Callable[[str], Path], recipe: Make, tmp_path: Path) -> None:
    """transformers 4 and vLLM have linear layers there, which they would take for packed ones."""
    result = quantize(recipe(models("qwen2_moe")), models("qwen2_moe"), tmp_path / "four", form=form)
    assert "model.layers.1.mlp.shared_expert_gate" in result["kept_dense"]
    assert set(result["kept_dense"]) <= {f"model.layers.{i}.mlp.shared_expert_gate" for i in range(2)}
    said = json.loads((tmp_path / "four" / "config.json").read_text())["quantization_config"]
    dense = said["llm_int8_skip_modules" if form == "nf4" else "ignore"]
    tensors = open_weights(tmp_path / "four").files
    for layer in range(2):
        for name in ("gate", "shared_expert_gate"):
            module = f"model.layers.{layer}.mlp.{name}"
            assert f"{module}.weight" not in tensors or module in dense
    assert any(name.endswith("mlp.gate") for name in dense)
    packed = {name.rpartition(".weight")[0] for name in tensors if ".weight." in name or "weight_packed" in name}
    assert packed and not packed & set(dense)


def test_the_adapter_has_its_tokenizer_and_a_card(models: Callable[[str], Path], recipe: Make, rows: Path) -> None:
    made = trained(recipe, models("llama"), rows)
    folder, base = Run(Path(made.output)).adapter, AutoTokenizer.from_pretrained(models("llama"))
    text = "Anna has 12 apples.\n"
    assert AutoTokenizer.from_pretrained(folder)(text)["input_ids"] == base(text)["input_ids"]
    card = (folder / "README.md").read_text()
    long = "{% for m in messages %}" + "a/" * 20 + "b" * 300 + "{% endfor %}"  # a path to no file system
    other = made.model_copy(update={"data": DataSection(format="chat", template=long), "output": "nowhere"})
    said = "\n".join(_prompt(other))
    assert "conversation in the tokenizer" in said and "`eos_token_id`" in said  # an adapter's base may go on
    assert _without_folders({"a": [long]}) == {"a": [long]}
    assert "library_name: peft" in card and "held-out loss" in card and str(folder.parent) not in card


def test_of_paths_that_are_here_a_card_has_the_last_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "mine.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    values = {"data": ["rows/mine.jsonl", "user/name"], "output": "/a/b", "name": "rows"}
    assert _without_folders(values) == {"data": ["mine.jsonl", "user/name"], "output": "b", "name": "rows"}


def test_the_model_card_shows_scores_of_its_own_step_alone(
    models: Callable[[str], Path], recipe: Make, rows: Path
) -> None:
    sets = ("model.bits=32", f"data.train={rows}", f"data.eval={rows}", "eval.bench=[loss]", "train.save_every=1")
    made = recipe(models("llama"), *sets, "train.steps=1")
    train(made)
    evaluate(made)
    assert "| loss, loss, nats a token, n = 40 |" in model_card(made, "merged")
    more = recipe(models("llama"), *sets, "train.steps=2")
    train(more, resume=True)
    assert "n = 40" not in model_card(more, "merged") and "n = 40" in model_card(more, "merged", step=1)
    assert "n = 40" not in (Run(Path(more.output)).adapter / "README.md").read_text()
    (Path(more.output) / "eval" / "loss" / "result.json").write_text('{"score": 1')
    train(recipe(models("llama"), *sets, "train.steps=3"), resume=True)
    assert "| steps | 3 |" in (Run(Path(more.output)).adapter / "README.md").read_text()


@pytest.mark.parametrize(("bits", "doubled"), [(16, True), (4, False)])
def test_a_doubled_rank_is_explained(
    bits: int, doubled: bool, pissa: Callable[..., Any], models: Callable[[str], Path], rows: Path, tmp_path: Path
) -> None:
    words = ["--set", f"data.train={rows}", "--set", "train.steps=1", "--rank", 4, "--bits", bits, "-o", tmp_path / "o"]
    outcome = pissa("train", "--model", models("llama"), *words)
    assert outcome.code == 0 and ("of twice the trained rank" in outcome.out) == doubled
    assert ("of twice the rank: what was trained, less" in (tmp_path / "o/adapter/README.md").read_text()) == doubled
    assert json.loads((tmp_path / "o/adapter/adapter_config.json").read_text())["r"] == (8 if doubled else 4)


def test_the_model_card_keeps_folders_to_itself(models: Callable[[str], Path], recipe: Make, rows: Path) -> None:
    judge = "eval.judge_url=https://me:secret@judge.internal/v1"
    made = recipe(models("llama"), "model.bits=32", f"data.train={rows}", "train.steps=2", judge)
    plain = model_card(made, "quantized")
    assert "llama, quantized with" in plain and "fine-tuned" not in plain and "rank" not in plain
    train(made)
    (models("llama") / "README.md").write_text("---\nlicense: apache-2.0\n---\n# base\n")
    card = model_card(made, "merged")
    assert "\n### Instruction:\n{instruction}\n\n### Response:\n```" in card and "\n  lr: null" not in card
    front = yaml.safe_load(card.split("---")[1])
    assert front == {"library_name": "transformers", "tags": ["pissa"], "license": "apache-2.0"}
    assert "| steps | 2 |" in card and "training loss, first and last step" in card
    assert "train: rows.jsonl" in card and "name: llama" in card and str(rows.parent) not in card
    assert "judge.internal" not in card
