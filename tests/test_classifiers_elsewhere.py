"""Classifiers in stock transformers and PEFT: adapters, merged and quantized ones."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from classifiers import CONFIGS, SHAPE, close, logits
from conftest import MOE_CONFIGS, Outcome, exact_scales, save_model
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, Gemma3TextConfig, pipeline

from pissa_cli.base.configuration import read_config
from pissa_cli.base.loading import load_model
from pissa_cli.base.side_files import copy_side_files, copy_tokenizer
from pissa_cli.errors import UsageError
from pissa_cli.files import read_json
from pissa_cli.outputs.trained import load_result
from pissa_cli.train import train


@pytest.mark.parametrize("architecture", sorted(CONFIGS))
@pytest.mark.parametrize("method", ["pissa", "vera"])
def test_adapter_and_head_load_in_peft(
    architecture: str, method: str, encoders: Callable[[str], Path], classifier: Callable[..., Any]
) -> None:
    peft = pytest.importorskip("peft")
    folder = encoders(architecture)
    made = classifier(folder, "model.bits=32", f"adapter.method={method}")
    if method == "vera" and architecture == "gpt2":
        pytest.skip("PEFT's VeRA takes no Conv1D with fan_in_fan_out here")
    before = load_model(folder, made)
    train(made)
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, dtype=torch.float32)
    base.config.pad_token_id = before.config.pad_token_id
    theirs = peft.PeftModel.from_pretrained(base, Path(made.output) / "adapter")
    ours = load_result(made, torch.device("cpu"))
    close(logits(ours, folder), logits(theirs, folder))
    assert float((logits(ours, folder) - logits(before, folder)).norm()) > 1e-2
    assert read_json(Path(made.output) / "adapter" / "adapter_config.json")["task_type"] == "SEQ_CLS"


@pytest.mark.parametrize("architecture", sorted(CONFIGS))
def test_merged_classifier_needs_nothing_said(
    architecture: str, encoders: Callable[[str], Path], classifier: Callable[..., Any], pissa: Callable[..., Outcome]
) -> None:
    made = classifier(encoders(architecture), "model.bits=32")
    train(made)
    outcome = pissa("merge", made.output, "--json")
    assert outcome.code == 0, outcome.err
    model, report = AutoModelForSequenceClassification.from_pretrained(outcome.json["path"], output_loading_info=True)
    assert not report["missing_keys"]
    assert model.config.id2label == {0: "not_equivalent", 1: "equivalent"}
    folder = Path(outcome.json["path"])
    close(logits(model, folder), logits(load_result(made, torch.device("cpu")), folder))


@pytest.mark.parametrize(
    ("config", "settings", "wanted"),
    [
        ({"pad_token_id": None}, {}, 0),  # the tokenizer's
        ({"pad_token_id": 600}, {}, 0),
        ({"pad_token_id": None}, {"pad_token": None}, 1),  # end-of-text of the model
        ({"pad_token_id": None, "eos_token_id": None}, {"pad_token": None}, 1),  # and of the tokenizer
        ({"pad_token_id": 1}, {}, 1),  # the model's own, whatever the tokenizer has
        ({"pad_token_id": 5}, {}, 0),  # which texts have
    ],
)
def test_merged_classifiers_pad_as_they_pool(
    config: dict[str, Any],
    settings: dict[str, Any],
    wanted: int,
    encoders: Callable[[str], Path],
    classifier: Callable[..., Any],
    pissa: Callable[..., Outcome],
    tmp_path: Path,
) -> None:
    folder = tmp_path / "llama"
    shutil.copytree(encoders("llama"), folder)
    for name, changes in (("config.json", config), ("tokenizer_config.json", settings)):
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | changes))
    made = classifier(folder, "model.bits=4", "train.precision=fp32", "train.steps=1")
    train(made)
    out = Path(made.output)
    for command in (["merge"], ["quantize"], ["export", "--as", "lora", "--output", tmp_path / "lora"]):
        outcome = pissa(*command[:1], made.output, *command[1:])
        assert outcome.code == 0, outcome.err
    for written in (out / "merged", out / "quantized", out / "adapter", tmp_path / "lora"):
        assert AutoTokenizer.from_pretrained(written).pad_token_id == wanted, written
    model = AutoModelForSequenceClassification.from_pretrained(out / "merged", dtype=torch.float32)
    classify_texts = pipeline("text-classification", model, tokenizer=AutoTokenizer.from_pretrained(out / "merged"))
    given = ["Anna has 7 apples.", "Tom ate.", "Mia had some fruit, and more of it."]
    one_by_one, together = (classify_texts(given, batch_size=size) for size in (1, 3))
    for alone, beside in zip(one_by_one, together, strict=True):
        assert beside["label"] == alone["label"] and beside["score"] == pytest.approx(alone["score"], abs=1e-5)


def test_texts_are_split_as_they_were(
    encoders: Callable[[str], Path], classifier: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where config.json has a token of texts for padding. And a tokenizer is read once, its own words or none."""
    folder = shutil.copytree(encoders("llama"), tmp_path / "llama")
    settings, tokenizer = read_json(folder / "config.json"), AutoTokenizer.from_pretrained(folder)
    ordinary = tokenizer("Anna has")["input_ids"][-1]
    (folder / "config.json").write_text(json.dumps(settings | {"pad_token_id": ordinary}))
    copy_tokenizer(folder, tmp_path / "copied", classifier(folder))
    assert AutoTokenizer.from_pretrained(tmp_path / "copied")("Anna has") == tokenizer("Anna has")
    (folder / "config.json").write_text(json.dumps(settings | {"pad_token_id": None}))
    asked: list[object] = []
    own = AutoTokenizer.from_pretrained
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *a, **k: asked.append(a) or own(*a, **k))
    found = {read_config(folder, classifier(folder).model).pad_token_id for _ in range(3)}
    assert found == {tokenizer.pad_token_id} and not asked  # again
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "config.json").write_text(json.dumps(settings))
    copy_side_files(tmp_path / "none", tmp_path / "still none", classifier(folder))
    assert [path.name for path in (tmp_path / "still none").iterdir()] == ["config.json"]


def test_four_bits(encoders: Callable[[str], Path], classifier: Callable[..., Any], pissa: Callable[..., Any]) -> None:
    peft = pytest.importorskip("peft")
    folder = encoders("bert")
    made = classifier(folder, "model.bits=4", "train.precision=fp32")
    train(made)
    stored = Path(made.output) / "base"
    base = AutoModelForSequenceClassification.from_pretrained(stored, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(exact_scales(base), Path(made.output) / "adapter")
    close(logits(load_result(made, torch.device("cpu")), folder), logits(theirs, folder))
    for command in ("merge", "quantize"):
        outcome = pissa(command, made.output, "--json")
        assert outcome.code == 0, outcome.err
    assert outcome.json["perplexity_before"] is None
    model = AutoModelForSequenceClassification.from_pretrained(outcome.json["path"], dtype=torch.float32)
    assert model.config.id2label[1] == "equivalent"


@pytest.mark.parametrize("bits", [4, 32])
@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
def test_experts_of_a_backbone_alone(
    architecture: str, bits: int, classifier: Callable[..., Any], pissa: Callable[..., Outcome], tmp_path: Path
) -> None:
    """Its files name them without `model.`"""
    peft = pytest.importorskip("peft")
    model = AutoModel.from_config(MOE_CONFIGS[architecture]())
    folder = save_model(model, tmp_path / "backbone")
    made = classifier(folder, f"model.bits={bits}", "train.precision=fp32")
    train(made)
    factors = load_file(Path(made.output) / "adapter" / "adapter_model.safetensors")
    assert sum(".experts." in name and name.endswith("lora_A.weight") for name in factors) == 2 * 4 * 3
    outcome = pissa("merge", made.output, "--json")
    assert outcome.code == 0, outcome.err
    merged = AutoModelForSequenceClassification.from_pretrained(outcome.json["path"], dtype=torch.float32)
    ours = logits(load_result(made, torch.device("cpu")), folder)
    close(logits(merged, folder), ours)
    if bits == 4:
        stored = load_file(Path(made.output) / "base" / "model.safetensors")
        assert sum(".experts." in name and name.endswith(".absmax") for name in stored) == 2 * 4 * 3
        return
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, dtype=torch.float32)
    close(logits(peft.PeftModel.from_pretrained(base, Path(made.output) / "adapter"), folder), ours)


def test_a_classifier_with_other_classes_gets_a_new_head(
    encoders: Callable[[str], Path], classifier: Callable[..., Any], pissa: Callable[..., Any], tmp_path: Path
) -> None:
    three = classifier(encoders("roberta"), "model.bits=32", "model.labels=[a, b, c]", "data.format=glue/mnli")
    model = load_model(encoders("roberta"), three)
    folder = save_model(model, tmp_path / "three")
    made = classifier(folder, "model.bits=32")
    train(made)
    assert pissa("merge", made.output).code == 0
    merged = AutoModelForSequenceClassification.from_pretrained(Path(made.output) / "merged")
    assert merged.config.num_labels == 2
    close(logits(merged, folder), logits(load_result(made, torch.device("cpu")), folder))
    again = load_model(folder, three.model_copy(update={"seed": 1}))
    assert torch.equal(
        again.get_parameter("classifier.out_proj.weight"), model.get_parameter("classifier.out_proj.weight")
    )
    outcome = pissa("quantize", Path(made.output) / "merged", "--output", tmp_path / "four", "--json")
    assert outcome.code == 0 and outcome.json["perplexity_before"] is None, outcome.err
    assert (
        "classifier.out_proj"
        in read_json(tmp_path / "four" / "config.json")["quantization_config"]["llm_int8_skip_modules"]
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_quantized_runs_in_stock_transformers(
    dtype: torch.dtype,
    encoders: Callable[[str], Path],
    classifier: Callable[..., Any],
    pissa: Callable[..., Any],
    tmp_path: Path,
) -> None:
    """It takes what is dense beside NF4 as it is on disk: the head, too, has the dtype of the base there."""
    folder = save_model(AutoModel.from_pretrained(encoders("bert"), dtype=dtype), tmp_path / "base")
    copy_tokenizer(encoders("bert"), folder, classifier(folder))
    made = classifier(folder)
    train(made)
    for target in (made.output, pissa("merge", made.output, "--json").json["path"]):
        outcome = pissa("quantize", target, "--output", tmp_path / f"four-{Path(target).name}", "--json")
        assert outcome.code == 0, outcome.err
        model = AutoModelForSequenceClassification.from_pretrained(outcome.json["path"])
        ours, theirs = logits(load_result(made, torch.device("cpu")), folder), logits(model, folder)
        assert float((ours - theirs).norm() / ours.norm()) < 0.5


def test_a_quantized_head_without_a_plain_embedding(
    classifier: Callable[..., Any], pissa: Callable[..., Any], tmp_path: Path
) -> None:
    """Gemma 3 scales what its embedding gives, by a class of its own, which is no layer to adapt."""
    shape = SHAPE | {"num_key_value_heads": 4, "head_dim": 16, "pad_token_id": 0}
    model = AutoModel.from_config(Gemma3TextConfig(**shape), dtype=torch.bfloat16)
    made = classifier(save_model(model, tmp_path / "base"))
    train(made)
    outcome = pissa("quantize", made.output, "--json")
    assert outcome.code == 0, outcome.err
    stored = load_file(Path(outcome.json["path"]) / "model.safetensors")
    assert stored["score.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("problem", ["multi_label_classification", None])
def test_a_quantized_classifier_stays_what_it_was(
    problem: str | None, encoders: Callable[[str], Path], pissa: Callable[..., Any], tmp_path: Path
) -> None:
    kind = {"num_labels": 1, "problem_type": problem, "dtype": torch.bfloat16}
    model = AutoModelForSequenceClassification.from_pretrained(encoders("bert"), **kind)
    folder = save_model(model, tmp_path / "theirs")
    outcome = pissa("quantize", folder, "--output", tmp_path / "four")
    assert outcome.code == 0, outcome.err
    assert read_json(tmp_path / "four" / "config.json").get("problem_type") == problem
    assert torch.equal(load_file(tmp_path / "four" / "model.safetensors")["classifier.weight"], model.classifier.weight)


def test_full_fine_tuning_names_the_class_as_it_was_before_sharding(
    encoders: Callable[[str], Path], classifier: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def renamed(*given: Any) -> Any:
        model = load_model(*given)
        model.__class__ = type(f"FSDP{type(model).__name__}", (type(model),), {})  # as fully_shard does it
        return model

    monkeypatch.setattr("pissa_cli.train.load_model", renamed)
    figures = train(classifier(encoders("llama"), "model.bits=32", "adapter.method=full"))
    settings = json.loads((Path(figures["result"]) / "config.json").read_text())
    assert settings["architectures"] == ["LlamaForSequenceClassification"]


def test_a_tokenizer_of_sentencepiece_alone_is_named(encoders: Callable[[str], Path], tmp_path: Path) -> None:
    from pissa_cli.base.loading import load_tokenizer
    from pissa_cli.schema.recipe import ModelSection, Recipe

    if importlib.util.find_spec("sentencepiece") is not None:
        pytest.skip("sentencepiece is installed")
    (tmp_path / "config.json").write_bytes((encoders("deberta") / "config.json").read_bytes())
    (tmp_path / "spm.model").write_bytes(b"not read")
    with pytest.raises(UsageError) as raised:
        load_tokenizer(tmp_path, Recipe(model=ModelSection(name=str(tmp_path))))
    assert "pissa[sentencepiece]" in str(raised.value.hint)
