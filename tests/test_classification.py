"""Sequence classification: rows, heads, training, exports, GLUE's metrics."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Outcome, exact_scales, save_model
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    DebertaConfig,
    DebertaV2Config,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    T5Config,
    XLNetConfig,
    pipeline,
)

from pissa_cli import data
from pissa_cli.batches import collate
from pissa_cli.classification import label_number
from pissa_cli.configuration import read_config
from pissa_cli.data import load_examples
from pissa_cli.data_options import DataSection
from pissa_cli.errors import UsageError
from pissa_cli.evals import classify
from pissa_cli.examples import Examples
from pissa_cli.exported import load_result
from pissa_cli.guards import require_padding_unseen
from pissa_cli.initialize import initialize
from pissa_cli.loading import load_model
from pissa_cli.loss import summed_loss
from pissa_cli.plan import make_plan
from pissa_cli.rows import read_rows
from pissa_cli.rundir import read_json, write_json
from pissa_cli.side_files import copy_side_files, copy_tokenizer
from pissa_cli.train import train

_SHAPE = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 130,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "bert": lambda: BertConfig(**_SHAPE),
    "roberta": lambda: RobertaConfig(**_SHAPE, pad_token_id=1),
    "deberta": lambda: DebertaV2Config(
        **_SHAPE, type_vocab_size=0, relative_attention=True, pos_att_type=["p2c", "c2p"], pooler_hidden_size=64
    ),
    "llama": lambda: LlamaConfig(**_SHAPE, bos_token_id=None, eos_token_id=1),
    "gpt2": lambda: GPT2Config(
        vocab_size=512, n_embd=64, n_layer=2, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=1
    ),
}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny backbone without a head, made once."""
    made: dict[str, Path] = {}

    def folder(architecture: str) -> Path:
        if architecture not in made:
            torch.manual_seed(0)
            model = AutoModel.from_config(CONFIGS[architecture]())
            made[architecture] = save_model(model, tmp_path_factory.mktemp("encoders") / architecture)
        return made[architecture]

    return folder


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Sixty pairs of texts in MRPC's columns; the label is whether Anna has the apples."""
    path = tmp_path / "pairs.tsv"
    names = ["Anna", "Tom", "Mia"]
    lines = ["sentence1\tsentence2\tlabel"]
    for number in range(60):
        one, other = names[number % 3], names[(number // 3) % 3]
        lines.append(f'{one} has "{number} apples.\t{other} had some fruit.\t{int(number % 3 == 0)}')
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def classifier(recipe: Callable[..., Any], texts: Path) -> Callable[..., Any]:
    def make(folder: Path, *sets: str) -> Any:
        return recipe(
            folder,
            "model.task=sequence-classification",
            f"data.train={texts}",
            "data.format=glue/mrpc",
            *(() if "adapter.method=full" in sets else ("adapter.rank=4",)),
            "train.steps=4",
            "train.batch_size=8",
            "train.lr=0.01",
            *sets,
        )

    return make


@torch.no_grad()
def logits(model: Any, folder: Path) -> Tensor:
    """Of two pairs of texts of different length, padded as transformers pads them."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token_id = model.config.pad_token_id
    pairs = ["Anna has 7 apples.", "Tom ate."], ["Tom had some fruit, and more.", "Tom."]
    batch = tokenizer(*pairs, padding=True, return_tensors="pt", return_token_type_ids=False)
    return model.cpu().eval()(**batch).logits.float()


def close(found: Tensor, wanted: Tensor) -> None:
    assert float((found - wanted).norm() / wanted.norm()) < 1e-4


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
    before = load_model(folder, made.model, "fp32", made.seed)
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


def test_a_classifier_with_other_classes_gets_a_new_head(
    encoders: Callable[[str], Path], classifier: Callable[..., Any], pissa: Callable[..., Any], tmp_path: Path
) -> None:
    three = classifier(encoders("roberta"), "model.bits=32", "model.labels=[a, b, c]", "data.format=glue/mnli")
    model = load_model(encoders("roberta"), three.model, "fp32", 0)
    folder = save_model(model, tmp_path / "three")
    made = classifier(folder, "model.bits=32")
    train(made)
    assert pissa("merge", made.output).code == 0
    merged = AutoModelForSequenceClassification.from_pretrained(Path(made.output) / "merged")
    assert merged.config.num_labels == 2
    close(logits(merged, folder), logits(load_result(made, torch.device("cpu")), folder))
    again = load_model(folder, three.model, "fp32", 1)
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


@pytest.mark.parametrize("problem", ["multi_label_classification", None])
def test_a_quantized_classifier_stays_what_it_was(
    problem: str | None, encoders: Callable[[str], Path], pissa: Callable[..., Any], tmp_path: Path
) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(encoders("bert"), num_labels=1, problem_type=problem)
    folder = save_model(model, tmp_path / "theirs")
    outcome = pissa("quantize", folder, "--output", tmp_path / "four")
    assert outcome.code == 0, outcome.err
    assert read_json(tmp_path / "four" / "config.json").get("problem_type") == problem


@pytest.mark.parametrize(
    ("theirs", "ours", "said"),
    [
        (["positive", "negative"], "[negative, positive]", "write its order: model.labels: [positive, negative]"),
        (["POSITIVE", "NEGATIVE"], "[negative, positive]", "write its order: model.labels: [positive, negative]"),
        (["NEGATIVE", "POSITIVE"], "[negative, positive]", "the head is the base's, whose classes are NEGATIVE"),
        (
            ["bad", "good"],
            "[negative, positive]",
            "the head is the base's, whose classes are bad, good; these ",
        ),
        (["LABEL_1", "LABEL_0"], "[negative, positive]", "the head is the base's"),
        (["negative", "positive"], "[negative, positive]", "the head is the base's"),
        (["c", "b", "a"], "[a, b]", "the head is new, from the seed"),
        ([], "[a, b]", "the head is new, from the seed"),
    ],
)
def test_where_the_head_comes_from_is_said(
    theirs: list[str],
    ours: str,
    said: str,
    encoders: Callable[[str], Path],
    classifier: Callable[..., Any],
    tmp_path: Path,
) -> None:
    folder = encoders("bert")
    if theirs:
        names = {"id2label": dict(enumerate(theirs)), "label2id": {name: n for n, name in enumerate(theirs)}}
        folder = save_model(AutoModelForSequenceClassification.from_pretrained(folder, **names), tmp_path / "theirs")
    data = tmp_path / "rows.csv"
    data.write_text("text,label\na b,0\nc d,1\n")
    sets = ("model.bits=32", f"model.labels={ours}", "data.format=classification", f"data.train={data}")
    made = classifier(folder, *sets, "train.steps=1")
    notes: list[str] = []
    try:
        train(made, watch=lambda event: notes.append(event.get("note", "")))
        notes = [note for note in notes if note.startswith("the head is")]
    except UsageError as error:
        notes = [str(error.hint)]
    assert len(notes) == 1 and notes[0].startswith(said)


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny T5, which pools the end-of-text that its tokenizer appends."""
    shape = {"vocab_size": 512, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
    ends = {"eos_token_id": 1, "pad_token_id": 0, "decoder_start_token_id": 0}
    folder = save_model(AutoModel.from_config(T5Config(**shape, **ends)), tmp_path_factory.mktemp("t5") / "t5")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <eos>", pair="$A <eos> $B <eos>", special_tokens=[("<eos>", 1)]
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("bits", [4, 32])
def test_t5_classifies(bits: int, t5: Path, classifier: Callable[..., Any], pissa: Callable[..., Outcome]) -> None:
    """Its embeddings are on disk under one name of two."""
    made = classifier(t5, f"model.bits={bits}", "train.precision=fp32")
    train(made)
    outcome = pissa("merge", made.output, "--json")
    assert outcome.code == 0, outcome.err
    merged = AutoModelForSequenceClassification.from_pretrained(outcome.json["path"], dtype=torch.float32)
    close(logits(merged, t5), logits(load_result(made, torch.device("cpu")), t5))


@pytest.mark.parametrize("method", ["pissa", "full"])
def test_a_missing_pooler_is_named_with_what_to_do(method: str, classifier: Callable[..., Any], tmp_path: Path) -> None:
    folder = save_model(AutoModelForMaskedLM.from_config(CONFIGS["bert"]()), tmp_path / "gaps")
    sets = ("model.bits=32", f"adapter.method={method}", "train.steps=1")
    with pytest.raises(UsageError, match="no pooler in its files") as raised:
        initialize(classifier(folder, *sets))
    assert "AutoModel.from_pretrained(FOLDER).save_pretrained(NEW)" in str(raised.value.hint)
    assert train(classifier(save_model(AutoModel.from_pretrained(folder), tmp_path / "new"), *sets))["steps"] == 1


def test_what_pools_the_end_of_a_text_sees_one(t5: Path, classifier: Callable[..., Any], tmp_path: Path) -> None:
    path, rows = tmp_path / "rows.jsonl", [{"text": text, "label": 0} for text in ("Anna", "To<eos>m", "Mia had it.")]
    sets = ("model.labels=[no, yes]", "data.format=classification", f"data.train={path}", "model.bits=32")

    def write(*more: Any) -> None:
        path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *more]))

    write()
    facts = train(classifier(t5, *sets, "train.steps=1"))["data"]["train"]
    assert facts["used"] == 2
    assert facts["not_used"] == {"a text holds <eos>, at which this model looks for its end": 1}
    write(rows[0] | {"text_pair": "Tom"})
    with pytest.raises(UsageError, match="some rows are pairs"):
        train(classifier(t5, *sets, f"output={tmp_path / 'mixed'}"))
    plain = save_model(AutoModel.from_pretrained(t5), tmp_path / "plain")
    with pytest.raises(UsageError, match="ends no text with end-of-text"):
        train(classifier(plain, *sets, f"output={tmp_path / 'none'}", "data.limit=1"))


def test_token_types_that_the_model_does_not_know_are_left_out(
    classifier: Callable[..., Any], pissa: Callable[..., Outcome], tmp_path: Path
) -> None:
    model = AutoModel.from_config(RobertaConfig(**_SHAPE, pad_token_id=1, type_vocab_size=1))
    folder = save_model(model, tmp_path / "mixed")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <eos>", pair="$A <eos> $B:1 <eos>:1", special_tokens=[("<eos>", 1)]
    )
    tokenizer.save_pretrained(folder)
    settings = read_json(folder / "tokenizer_config.json")
    names = {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}
    write_json(folder / "tokenizer_config.json", settings | names)
    made = classifier(folder, "model.bits=32")
    assert any(AutoTokenizer.from_pretrained(folder)("a", "b")["token_type_ids"])
    assert train(made)["steps"] == 4
    outcome = pissa("eval", made.output, "--bench", "loss", "--data", f"loss={made.data.train}")
    assert outcome.code == 0, outcome.err


def test_what_divides_in_place_trains(classifier: Callable[..., Any], tmp_path: Path) -> None:
    folder = save_model(AutoModel.from_config(DebertaConfig(**_SHAPE, type_vocab_size=0)), tmp_path / "deberta-v1")
    made = classifier(folder, "model.bits=32", "adapter.targets=[in_proj]")
    assert train(made)["steps"] == 4


@pytest.mark.parametrize(("change", "refused"), [(5e-4, False), (1e-2, True)])
def test_the_rounding_of_a_new_head_is_no_padding(change: float, refused: bool, classifier: Callable[..., Any]) -> None:
    """Its logits are near zero, and sums of much larger numbers."""

    class Rounded(nn.Module):
        def forward(self, input_ids: torch.Tensor, **_: Any) -> SimpleNamespace:
            return SimpleNamespace(logits=torch.full((len(input_ids), 2), 0.01 + change * (len(input_ids) > 1)))

    ids, offsets = torch.ones(7, dtype=torch.int32), torch.tensor([0, 2, 7])
    examples = Examples(ids, torch.ones(7, dtype=torch.bool), offsets, labels=torch.tensor([0.0, 1.0]))
    made = classifier(Path("none"), "model.bits=16", "train.precision=bf16")
    with pytest.raises(UsageError, match="changes with the padding") if refused else nullcontext():
        require_padding_unseen(made, Rounded(), examples, 0, torch.device("cpu"))  # type: ignore[arg-type]


def test_what_sees_its_padding_is_refused(classifier: Callable[..., Any], tmp_path: Path) -> None:
    shape = {"vocab_size": 512, "d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 128}
    folder = save_model(AutoModel.from_config(XLNetConfig(**shape)), tmp_path / "xlnet")
    with pytest.raises(UsageError, match="changes with the padding"):
        train(classifier(folder, "model.bits=32", "adapter.targets=[layer_1]"))


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("architecture", ["bert", "roberta"])
def test_an_encoder_does_not_write(
    architecture: str, bits: int, recipe: Callable[..., Any], rows: Path, tmp_path: Path
) -> None:
    model = AutoModelForMaskedLM.from_config(CONFIGS[architecture]())
    for name, parameter in model.named_parameters():
        if "attention" in name and parameter.dim() == 2:
            parameter.data *= 20  # which attends to more than itself, as a trained model does
    folder = save_model(model, tmp_path / "model")
    with pytest.raises(UsageError, match="fills gaps, whose tokens see those that follow"):
        initialize(recipe(folder, f"model.bits={bits}", "adapter.rank=4"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": None}))
    sets = (f"model.bits={bits}", "adapter.rank=4", f"data.train={rows}", "data.max_length=128")
    made = recipe(folder, *sets, "data.format=text", "data.columns={text: output}", "train.steps=1")
    with pytest.raises(UsageError, match="its tokens see those that follow"):
        train(made)


def test_full_fine_tuning(encoders: Callable[[str], Path], classifier: Callable[..., Any], texts: Path) -> None:
    folder = encoders("bert")
    made = classifier(folder, "model.bits=32", "adapter.method=full", "train.lr=0.001")
    figures = train(made)
    model = AutoModelForSequenceClassification.from_pretrained(figures["result"])
    close(logits(model, folder), logits(load_result(made, torch.device("cpu")), folder))


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


def test_the_head_starts_from_seed_and_name(encoders: Callable[[str], Path], classifier: Callable[..., Any]) -> None:
    made = classifier(encoders("deberta"), "model.bits=32")
    torch.manual_seed(1)
    one = load_model(encoders("deberta"), made.model, "fp32", 7)
    torch.manual_seed(2)
    two, other = (load_model(encoders("deberta"), made.model, "fp32", seed) for seed in (7, 8))
    for name in ("classifier.weight", "pooler.dense.weight"):
        assert torch.equal(one.get_parameter(name), two.get_parameter(name))
        assert not torch.equal(one.get_parameter(name), other.get_parameter(name))
        assert float(one.get_parameter(name).std()) == pytest.approx(0.02, rel=0.2)
    assert not one.get_parameter("pooler.dense.bias").any()


@pytest.mark.parametrize("labels", [2, 1])
def test_loss_is_transformers_own(labels: int, encoders: Callable[[str], Path], classifier: Callable[..., Any]) -> None:
    sets = ["model.labels=[score]", "data.format=glue/stsb"] if labels == 1 else []
    made = classifier(encoders("bert"), "model.bits=32", *sets)
    tokenizer = AutoTokenizer.from_pretrained(encoders("bert"))
    model = load_model(encoders("bert"), made.model, "fp32", 0).eval()
    examples = load_examples(made.data.train, made.data, tokenizer, None, made.model.labels)
    batch = collate(examples, [3, 1, 5], 0, packing=False)
    given = dict(batch)
    if labels == 2:
        given["labels"] = given["labels"].long()
    with torch.no_grad():
        theirs = model(**given).loss
        ours = summed_loss(model, batch) / 3
    assert float(ours) == pytest.approx(float(theirs), rel=1e-5)


@pytest.mark.parametrize(("bits", "dtype"), [(16, torch.bfloat16), (4, torch.float32), (32, torch.float32)])
@pytest.mark.parametrize("architecture", ["roberta", "llama"])
def test_quantities_are_not_rounded_to_16_bits(
    architecture: str,
    bits: int,
    dtype: torch.dtype,
    encoders: Callable[[str], Path],
    classifier: Callable[..., Any],
    pissa: Callable[..., Any],
    tmp_path: Path,
) -> None:
    """In bf16 the numbers about 2000 are 8 apart; a base that tells them apart still does when it is trained."""
    model = AutoModelForSequenceClassification.from_pretrained(encoders(architecture), num_labels=1, dtype=dtype)
    part = model.get_submodule("score" if architecture == "llama" else "classifier.out_proj")
    part.weight.data.fill_(1.0)[:, 1::2] = 300.0
    if part.bias is not None:
        part.bias.data.fill_(2000.0)
    folder = save_model(model, tmp_path / "years")
    data = tmp_path / "years.csv"
    data.write_text("text,label\n" + "".join(f"Anna has {year} apples.,{year}\n" for year in range(1985, 2015)))
    sets = ("data.format=classification", "model.labels=[year]", f"model.bits={bits}", "train.precision=bf16")
    made = classifier(folder, *sets, f"data.train={data}", f"data.eval={data}", "train.lr=1e-4", "train.steps=2")
    train(made)
    outcome = pissa("merge", made.output)
    assert outcome.code == 0, outcome.err
    outcome = pissa("eval", made.output, "--bench", "loss")
    assert outcome.code == 0, outcome.err
    lines = (Path(made.output) / "eval" / "loss" / "samples.jsonl").read_text().splitlines()
    found = torch.tensor([json.loads(line)["answer"] for line in lines])
    assert any(float(number) != float(number.bfloat16()) for number in found)
    trained = load_result(made, torch.device("cpu"))
    merged = load_model(Path(made.output) / "merged", made.dense_model, "bf16", 0)
    for name in part.state_dict():
        name = f"{'score' if architecture == 'llama' else 'classifier.out_proj'}.{name}"
        assert torch.equal(merged.get_parameter(name), trained.get_parameter(name)), name


def test_resume_is_bit_for_bit(encoders: Callable[[str], Path], classifier: Callable[..., Any]) -> None:
    whole = classifier(encoders("bert"), "model.bits=32", "train.save_every=2")
    train(whole)
    wanted = (Path(whole.output) / "adapter" / "adapter_model.safetensors").read_bytes()
    cut = Path(whole.output)
    for gone in ("checkpoints/step-4", "adapter"):
        for path in (cut / gone).iterdir():
            path.unlink()
        (cut / gone).rmdir()
    train(whole, resume=True)
    assert (cut / "adapter" / "adapter_model.safetensors").read_bytes() == wanted


def test_head_rate_is_the_heads(encoders: Callable[[str], Path], classifier: Callable[..., Any]) -> None:
    made = classifier(encoders("bert"), "model.bits=32", "train.lr=1e-9", "train.head_lr=0.05")
    before = load_model(encoders("bert"), made.model, "fp32", made.seed)
    train(made)
    after = load_result(made, torch.device("cpu"))
    moved = after.get_parameter("classifier.weight") - before.get_parameter("classifier.weight")
    assert float(moved.abs().max()) > 0.02
    kept = after.get_submodule("bert.encoder.layer.0.attention.self.query")
    assert float(torch.as_tensor(kept.factors()["B"] @ kept.factors()["A"]).abs().max()) < 1e-5


def test_eval_scores_what_was_trained(
    encoders: Callable[[str], Path], classifier: Callable[..., Any], pissa: Callable[..., Any], texts: Path
) -> None:
    made = classifier(encoders("bert"), "model.bits=32", "train.steps=60", "train.head_lr=0.01")
    train(made)
    outcome = pissa("eval", made.output, "--bench", "glue/mrpc,loss", "--data", f"glue/mrpc={texts}", "--json")
    assert outcome.code == 2 and "data.eval" in outcome.err
    files = ["--data", f"glue/mrpc={texts}", "--data", f"loss={texts}"]
    outcome = pissa("eval", made.output, "--bench", "glue/mrpc,loss", *files, "--compare-base", "--json")
    assert outcome.code == 0, outcome.err
    result = outcome.json["results"]["glue/mrpc"]
    lines = (Path(made.output) / "eval" / "glue" / "mrpc" / "samples.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    right = sum(sample["answer"] == sample["reference"] for sample in samples)
    assert len(samples) == result["n"] == 60
    assert result["score"] == result["accuracy"] == pytest.approx(100 * right / 60)
    assert result["score"] > 90 > outcome.json["base"]["glue/mrpc"]["score"]
    assert result["rows"].startswith("not a published set")
    mean = sum(sample["loss"] for sample in samples) / 60
    assert outcome.json["results"]["loss"]["score"] == pytest.approx(mean)
    batched = pissa("eval", made.output, "--bench", "glue/mrpc", *files[:2], "--set", "eval.batch_size=1", "--json")
    again = [json.loads(line) for line in (Path(made.output) / "eval/glue/mrpc/samples.jsonl").read_text().splitlines()]
    assert batched.json["results"]["glue/mrpc"]["score"] == result["score"]
    assert np.allclose([s["logits"] for s in again], [s["logits"] for s in samples], atol=1e-4)


def test_held_out_rows_are_scored_where_no_bench_is_named(
    encoders: Callable[[str], Path], classifier: Callable[..., Any], pissa: Callable[..., Any], texts: Path
) -> None:
    made = classifier(encoders("bert"), "model.bits=32", f"data.eval={texts}", "train.steps=1")
    train(made)
    outcome = pissa("eval", made.output, "--json")
    assert outcome.code == 0, outcome.err
    assert list(outcome.json["results"]) == ["loss"] and "accuracy" in outcome.json["results"]["loss"]
    outcome = pissa("eval", made.output, "--set", "data.eval=null")
    assert outcome.code == 2 and "no benchmark given" in outcome.err


@pytest.mark.parametrize(
    ("value", "labels", "wanted"),
    [
        (1, ["no", "yes"], 1),
        ("1", ["no", "yes"], 1),
        ("yes", ["no", "yes"], 1),
        (1.0, ["no", "yes"], 1),
        (1, ["1", "2", "3"], 0),
        (1.0, ["1", "2", "3"], 0),
        ("3.0", ["1", "2", "3"], 2),
        (0, ["1", "2", "3"], r"'label' is '0', not one of model.labels \(1, 2, 3\)"),
        (float("inf"), ["no", "yes"], "not one of"),
        ("3", ["1", "2", "3"], 2),
        ("4.750", ["score"], 4.75),
        (-1, ["no", "yes"], "'-1', not one of"),
        (2, ["no", "yes"], "not one of"),
        (0.5, ["no", "yes"], "not one of"),
        (None, ["no", "yes"], "missing"),
        (True, ["no", "yes"], r"'True', not one of model.labels \(no, yes\)"),
        (True, ["false", "true"], 1),
        (False, ["True", "False"], 1),
        ("TRUE", ["false", "True"], 1),
        (1, ["false", "true"], 1),
        (1, ["true", "false"], r"'1', not one of model.labels \(true, false\)"),  # in tables 1 is true
        ("true", ["true", "True"], 0),
        ("NO", ["no", "yes"], "not one of"),
        (True, ["score"], "not a number"),
        ([1, 0], ["no", "yes"], "a list: one class a text"),
        ({}, ["no", "yes"], "neither"),
        ("x", [f"intent {n}" for n in range(77)], r"\(intent 0, intent 1, .*, intent 4, ... \(77\)\)$"),
        ("nan", ["score"], "not a number"),
        ("high", ["score"], "'label' is 'high', not a number"),
        (" >50K", [" <=50K", " >50K"], 1),
        (" >50K", ["<=50K", ">50K"], 1),
    ],
)
def test_labels(value: Any, labels: list[str], wanted: Any) -> None:
    if isinstance(wanted, str):
        with pytest.raises(ValueError, match=wanted):
            label_number(value, "label", labels)
    else:
        assert label_number(value, "label", labels) == wanted


@pytest.mark.parametrize(
    ("written", "wanted"),
    [
        ("[0, 1]", ["0", "1"]),
        ("[false, true]", ["false", "true"]),
        ("[1.5, 2]", ["1.5", "2"]),
        ("[no, yes]", ["no", "yes"]),
    ],
)
def test_numbers_and_truth_values_name_classes(written: str, wanted: list[str], recipe: Callable[..., Any]) -> None:
    sets = ("model.task=sequence-classification", "data.format=classification", f"model.labels={written}")
    assert recipe(Path("none"), *sets).model.labels == wanted


def test_tokens_are_the_tokenizers(
    encoders: Callable[[str], Path], classifier: Callable[..., Any], tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(encoders("bert"))
    path = tmp_path / "odd.jsonl"
    rows = [
        {"premise": "Anna eats.", "hypothesis": "She ate", "label": "neutral"},
        {"premise": "word " * 200, "hypothesis": "short", "label": 0},
        {"premise": "no label", "hypothesis": "here", "label": -1},
        {"premise": None, "hypothesis": "text", "label": 1},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = classifier(encoders("bert"), f"data.train={path}", "data.format=glue/mnli", "data.max_length=32")
    examples = load_examples(str(path), made.data, tokenizer, tmp_path / "cache", made.model.labels)
    again = load_examples(str(path), made.data, tokenizer, tmp_path / "cache", made.model.labels)
    assert examples.digest() == again.digest() and len(list((tmp_path / "cache").iterdir())) == 1
    assert len(examples) == 2 and examples.num_cut == 1
    assert sum(len(rows) for rows in examples.unusable.values()) == 2
    assert examples.labels is not None and examples.labels.tolist() == [1, 0]
    wanted = tokenizer("Anna eats.", "She ate")["input_ids"]
    assert examples.ids[: examples.length(0)].tolist() == wanted
    short = tokenizer("word " * 200, "short", truncation=True, max_length=32)["input_ids"]
    assert examples.ids[examples.length(0) :].tolist() == short


@pytest.mark.parametrize(
    ("found", "labels", "refused"),
    [
        ([1, 2, 3, 3], ["a", "b", "c"], True),
        ([1.0, "3"], ["a", "b", "c"], True),
        ([1, 2, 3, 0], ["a", "b", "c"], False),
        ([1, 2], ["a", "b", "c"], False),
        (["a", "b", "c", 3], ["a", "b", "c"], False),
        ([1, 3, " b"], ["a", "b", "c"], False),
        ([1, 2, 3], ["1", "2", "3"], False),
        ([1, 2], ["score"], False),
        (["NaN", 1e400, 2, 1], ["a", "b"], True),
    ],
)
def test_labels_that_count_from_one_are_refused(
    found: list[Any], labels: list[str], refused: bool, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "BATCH", 2)  # it shows over the whole set alone
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": "a b", "label": label}) + "\n" for label in found))
    with pytest.raises(UsageError, match="count the classes from 1 to") if refused else nullcontext():
        load_examples(str(path), DataSection(format="classification"), tokenizer, None, labels)


def test_classes_without_a_row_are_named(
    encoders: Callable[[str], Path], classifier: Callable[..., Any], tmp_path: Path
) -> None:
    notes: list[str] = []
    path = tmp_path / "rows.csv"
    path.write_text("text,label\n" + "a b,1\n" * 3 + "c d,0\n" * 2)
    for labels in ("[a, b, c]", "[a, b]"):
        sets = (f"model.labels={labels}", "data.format=classification", f"data.train={path}", "train.steps=1")
        made = classifier(encoders("bert"), "model.bits=32", *sets, f"output={tmp_path / 'runs' / labels[-2]}")
        train(made, watch=lambda event: notes.append(event.get("note", "")))
    found = [note for note in notes if "classes without" in note]
    assert found == ["data.train: classes without a row: 1 of 3; rows of each: c 0, a 2, b 3"]


def test_a_text_without_a_second_one_is_a_single_text(tokenizer: Any, tmp_path: Path) -> None:
    path, row = tmp_path / "rows.jsonl", {"text": "Anna eats.", "label": 0}
    rows = [row, row | {"text_pair": None}, row | {"text_pair": ""}, row | {"text_pair": math.nan}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()))
    pairs.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <eos>", pair="$A <eos> $B <eos>", special_tokens=[("<eos>", 1)]
    )
    for columns in ({}, {"text_pair": "text_pair"}):
        section = DataSection(format="classification", columns=columns)
        examples = load_examples(str(path), section, pairs, None, ["no", "yes"])
        assert [examples.tokens(i).tolist() for i in range(len(examples))] == 4 * [pairs("Anna eats.")["input_ids"]]


def test_labels_that_are_not_there_are_quoted_with_their_rows(tokenizer: Any, tmp_path: Path) -> None:
    section, path = DataSection(format="classification"), tmp_path / "rows.csv"
    path.write_text("text,label\na,postive\nb,no\nc,postive\n")
    with pytest.raises(UsageError, match=r"'label' is 'postive', not one of model.labels \(no, yes\): 1 \(row 1\)"):
        load_examples(str(path), section.model_copy(update={"limit": 1}), tokenizer, None, ["no", "yes"])
    assert load_examples(str(path), section, tokenizer, None, ["no", "yes"]).unusable == {
        "'label' is 'postive', not one of model.labels (no, yes)": [1, 3]
    }
    path.write_text("text,label\n" + "".join(f"a,{number / 100}\n" for number in range(300)) + "b,no\n")
    unusable = load_examples(str(path), section, tokenizer, None, ["no", "yes"]).unusable
    assert len(unusable) == 11 and sum(map(len, unusable.values())) == 298  # 0.0 and 1.0 are classes


def test_labels_that_cannot_be_printed_are_escaped(
    encoders: Callable[[str], Path], classifier: Callable[..., Any], tmp_path: Path
) -> None:
    path = tmp_path / "odd.jsonl"
    odd = {"text": "a b", "label": "a\ud83d\n\x1b[0m"}
    path.write_text("".join(json.dumps(row) + "\n" for row in [odd, *({"text": "a b", "label": n} for n in (0, 1))]))
    made = classifier(
        encoders("bert"), "model.bits=32", "model.labels=[no, yes]", "data.format=classification", f"data.train={path}"
    )
    wanted = "'label' is 'a\\ud83d\\n\\x1b[0m', not one of model.labels (no, yes)"
    assert train(made)["data"]["train"]["not_used"] == {wanted: 1}
    assert read_json(Path(made.output) / "adapter" / "pissa.json")["data"]["train"]["not_used"] == {wanted: 1}


def test_half_a_character_is_written_as_json_has_it(tmp_path: Path) -> None:
    write_json(tmp_path / "file.json", {"a": "\udc80 ü"})
    assert read_json(tmp_path / "file.json") == {"a": "\udc80 ü"}


def test_tab_separated_files_know_no_quotes(texts: Path) -> None:
    rows = [row for _, row in read_rows(str(texts))]
    assert len(rows) == 60
    assert rows[1] == {"sentence1": 'Tom has "1 apples.', "sentence2": "Anna had some fruit.", "label": "0"}


def test_metrics_by_hand() -> None:
    predicted = np.array([1, 1, 0, 1, 0, 0, 1, 1.0])
    wanted = np.array([1, 0, 0, 1, 1, 0, 1, 0.0])
    tp, tn, fp, fn = 3, 2, 2, 1
    assert classify.accuracy(predicted, wanted) == 5 / 8
    assert classify.f1(predicted, wanted) == pytest.approx(2 * tp / (2 * tp + fp + fn))
    matthews = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert classify.METRICS["matthews"](predicted, wanted) == pytest.approx(matthews)
    x, y = np.array([1.0, 2.0, 2.0, 5.0]), np.array([2.0, 1.0, 4.0, 9.0])
    assert classify.METRICS["pearson"](x, y) == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert classify.ranks(x).tolist() == [0, 1.5, 1.5, 3]
    assert classify.METRICS["spearman"](x, y) == pytest.approx(np.corrcoef([0, 1.5, 1.5, 3], [1, 0, 2, 3])[0, 1])
    assert classify.METRICS["matthews"](np.ones(4), wanted[:4]) == 0


def test_bootstrap_agrees_with_theory() -> None:
    random = np.random.default_rng(1)
    x = random.standard_normal(2000)
    y = 0.6 * x + 0.8 * random.standard_normal(2000)
    assert classify.standard_error("pearson", x, y) == pytest.approx((1 - 0.36) / math.sqrt(2000), rel=0.15)


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (["data.format=alpaca"], "needs data.format classification"),
        (["data.format=classification"], "model.labels"),
        (["model.labels=[a, b, c]"], "not_equivalent"),
        (["data.packing=true"], "never packed"),
        (["data.columns={text: sentence1}"], "knows its columns"),
        (["model.task=causal-lm"], "sequence-classification"),
        (["data.format=glue/nope"], "glue/cola"),
    ],
)
def test_recipes_that_cannot_be(
    sets: list[str], said: str, encoders: Callable[[str], Path], pissa: Callable[..., Any], texts: Path
) -> None:
    base = ["model.task=sequence-classification", f"data.train={texts}", "data.format=glue/mrpc", *sets]
    words = [word for one in base for word in ("--set", one)]
    outcome = pissa("train", "--model", encoders("bert"), *words, "--dry-run")
    assert outcome.code == 2 and said in outcome.err, outcome.err


def test_benches_of_the_other_task(
    encoders: Callable[[str], Path],
    classifier: Callable[..., Any],
    models: Callable[[str], Path],
    pissa: Callable[..., Any],
    tmp_path: Path,
) -> None:
    made = classifier(encoders("bert"), "model.bits=32")
    train(made)
    for bench, said in (("gsm8k", "answers that a model writes"), ("glue/cola", "unacceptable")):
        outcome = pissa("eval", made.output, "--bench", bench)
        assert outcome.code == 2 and said in outcome.err
    outcome = pissa("eval", "--set", f"model.name={models('llama')}", "--bench", "glue/cola", "--output", tmp_path)
    assert outcome.code == 2 and "texts with labels" in outcome.err


def test_a_file_without_the_columns(
    encoders: Callable[[str], Path], classifier: Callable[..., Any], tmp_path: Path
) -> None:
    path = tmp_path / "wrong.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(UsageError, match="no column 'sentence1'"):
        train(classifier(encoders("bert"), f"data.train={path}"))


def test_rank_8_of_the_paper_counts_1_33_million(recipe: Callable[..., Any], tmp_path: Path) -> None:
    """arXiv 2404.02948 v4, table 3: 1.33 M train in DeBERTa-v3-base; that is rank 8 of all six linear layers."""
    shape = {"type_vocab_size": 0, "relative_attention": True, "share_att_key": True, "pos_att_type": ["p2c", "c2p"]}
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    DebertaV2Config(vocab_size=128100, **shape, **sizes).save_pretrained(tmp_path)
    made = recipe(tmp_path, "use.adapter=pissa-r8", "model.task=sequence-classification", "data.format=glue/cola")
    plan = make_plan(made, tmp_path)
    assert plan.num_lora(8) == 1_327_104
    assert plan.num_trainable(made) == 1_327_104 + 768 * 768 + 768 + 2 * 768 + 2


def test_a_tokenizer_of_sentencepiece_alone_is_named(encoders: Callable[[str], Path], tmp_path: Path) -> None:
    from pissa_cli.loading import load_tokenizer
    from pissa_cli.recipe import ModelSection, Recipe

    if importlib.util.find_spec("sentencepiece") is not None:
        pytest.skip("sentencepiece is installed")
    (tmp_path / "config.json").write_bytes((encoders("deberta") / "config.json").read_bytes())
    (tmp_path / "spm.model").write_bytes(b"not read")
    with pytest.raises(UsageError) as raised:
        load_tokenizer(tmp_path, Recipe(model=ModelSection(name=str(tmp_path))))
    assert "pissa[sentencepiece]" in str(raised.value.hint)
