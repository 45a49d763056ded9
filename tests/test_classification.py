"""Training classifiers: heads, losses, padding, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from classifiers import CONFIGS, SHAPE, close, logits
from conftest import Outcome, save_model
from tokenizers.processors import TemplateProcessing
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    CanineConfig,
    CanineForSequenceClassification,
    CanineTokenizer,
    DebertaConfig,
    DebertaV2Config,
    RobertaConfig,
    T5Config,
    T5GemmaConfig,
    T5GemmaModuleConfig,
    XLNetConfig,
)

from pissa_cli.base.heads import require_order
from pissa_cli.base.loading import load_model
from pissa_cli.base.plan import make_plan
from pissa_cli.data.examples import Examples
from pissa_cli.data.tokenize import load_examples
from pissa_cli.errors import UsageError
from pissa_cli.files import read_json, write_json
from pissa_cli.initialize import initialize
from pissa_cli.outputs.trained import load_result
from pissa_cli.train import train
from pissa_cli.training.batches import collate
from pissa_cli.training.guards import require_padding_unseen, runs_in_bf16
from pissa_cli.training.loss import summed_loss


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
    assert len(notes) == 1 and notes[0].startswith(said) and ("whose" in notes[0]) == ("whose" in said)


def test_the_numbers_of_glues_rows_have_its_order_and_others_that_of_the_base(tmp_path: Path) -> None:
    names = {"0": "Neutral", "1": "negative", "2": "positive"}
    config = {"architectures": ["BertForSequenceClassification"], "id2label": names}
    write_json(tmp_path / "config.json", config)
    labels = ["negative", "positive", "neutral"]
    made: Any = SimpleNamespace(data=SimpleNamespace(glue="mnli"), model=SimpleNamespace(labels=labels))
    require_order(tmp_path, made)
    made.data.glue = None
    with pytest.raises(UsageError, match="in another order") as refused:
        require_order(tmp_path, made)
    assert str(refused.value.hint).startswith("write its order: model.labels: [neutral, negative, positive];")
    made.model.labels = labels[:2]
    require_order(tmp_path, made)


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


@pytest.mark.parametrize(("method", "kind"), [("pissa", "bert"), ("full", "bert"), ("pissa", "gte")])
def test_a_missing_pooler_is_named_with_what_to_do(
    method: str, kind: str, classifier: Callable[..., Any], tmp_path: Path
) -> None:
    """What the message says is done. AutoModel gives BERT a pooler, and Gte none."""
    if kind not in CONFIG_MAPPING:
        pytest.skip("this transformers does not know the model")
    config = CONFIGS[kind]() if kind in CONFIGS else CONFIG_MAPPING[kind](**SHAPE)
    folder = save_model(AutoModelForMaskedLM.from_config(config), tmp_path / "gaps")
    sets = ("model.bits=32", f"adapter.method={method}", "train.steps=1")
    with pytest.raises(UsageError, match="no pooler in its files") as raised:
        initialize(classifier(folder, *sets))
    told = str(raised.value.hint)
    name = re.search(r"transformers\.(\w+)\.from_pretrained\(FOLDER\)\.save_pretrained\(NEW", told)
    assert name is not None
    model, new = getattr(transformers, name[1]).from_pretrained(folder), tmp_path / "new"
    save_model(model, new)
    model.save_pretrained(new, save_original_format="save_original_format=False" not in told)
    assert train(classifier(new, *sets))["steps"] == 1


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
    config = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    with pytest.raises(UsageError, match=r"no eos_token_id in its config\.json"):
        train(classifier(plain, *sets, f"output={tmp_path / 'none'}", "data.limit=1"))


def test_t5gemma_trains_as_an_encoder_alone(classifier: Callable[..., Any], tmp_path: Path) -> None:
    """What the message says is done. Padding moves the token that its decoder looks at, and no end-of-text does."""
    half = T5GemmaModuleConfig(**SHAPE, num_key_value_heads=4, head_dim=16, bos_token_id=2, eos_token_id=1)
    config = T5GemmaConfig(encoder=half.to_dict(), decoder=half.to_dict(), vocab_size=512, pad_token_id=0)
    torch.manual_seed(0)
    folder = save_model(AutoModel.from_config(config), tmp_path / "t5gemma")
    ids = torch.arange(3, 9)[None]
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        alone, padded = (model(nn.functional.pad(ids, (0, more))).logits for more in (0, 1))
    assert float((alone - padded).norm() / alone.norm()) > 0.01
    made = classifier(folder, "model.bits=32", "train.steps=1")
    with pytest.raises(UsageError, match="changes with the padding") as raised:
        train(made)
    assert '"is_encoder_decoder": false in its config.json' in str(raised.value.hint)
    write_json(folder / "config.json", read_json(folder / "config.json") | {"is_encoder_decoder": False})
    assert train(classifier(folder, "model.bits=32", "train.steps=1", f"output={tmp_path / 'new'}"))["steps"] == 1


def test_token_types_that_the_model_does_not_know_are_left_out(
    classifier: Callable[..., Any], pissa: Callable[..., Outcome], tmp_path: Path
) -> None:
    model = AutoModel.from_config(RobertaConfig(**SHAPE, pad_token_id=1, type_vocab_size=1))
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
    folder = save_model(AutoModel.from_config(DebertaConfig(**SHAPE, type_vocab_size=0)), tmp_path / "deberta-v1")
    made = classifier(folder, "model.bits=32", "adapter.targets=[in_proj]")
    assert train(made)["steps"] == 4


@pytest.mark.parametrize(("change", "refused"), [(5e-4, False), (1e-2, True)])
def test_the_rounding_of_a_new_head_is_no_padding(change: float, refused: bool, classifier: Callable[..., Any]) -> None:
    """Its logits are near zero, and sums of much larger numbers."""

    class Rounded(nn.Module):
        device = torch.device("cpu")

        def forward(self, input_ids: torch.Tensor, **_: Any) -> SimpleNamespace:
            return SimpleNamespace(logits=torch.full((len(input_ids), 2), 0.01 + change * (len(input_ids) > 1)))

    ids, offsets = torch.ones(7, dtype=torch.int32), torch.tensor([0, 2, 7])
    examples = Examples(ids, torch.ones(7, dtype=torch.bool), offsets, labels=torch.tensor([0.0, 1.0]))
    made = classifier(Path("none"), "model.bits=16", "train.precision=bf16")
    with pytest.raises(UsageError, match="changes with the padding") if refused else nullcontext():
        require_padding_unseen(made, Rounded(), examples, 0)  # type: ignore[arg-type]


@pytest.mark.parametrize(("bits", "told"), [(32, "changes with the padding"), (16, "does not run in bf16")])
def test_what_sees_its_padding_is_refused(bits: int, told: str, classifier: Callable[..., Any], tmp_path: Path) -> None:
    shape = {"vocab_size": 512, "d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 128}
    folder = save_model(AutoModel.from_config(XLNetConfig(**shape)), tmp_path / "xlnet")
    with pytest.raises(UsageError, match=told):
        train(classifier(folder, f"model.bits={bits}", "adapter.targets=[layer_1]"))


def test_what_says_nothing_of_bf16_is_no_matter_of_it() -> None:
    """Nor is a number of another type where the precision is fp32."""
    other, mixed = "expected scalar type Long but found Int", "expected scalar type Float but found BFloat16"
    for said, precision, kind in (
        (mixed, "bf16", UsageError),
        (mixed, "fp32", RuntimeError),
        (other, "bf16", RuntimeError),
    ):
        with pytest.raises(kind), runs_in_bf16(torch.nn.Linear(1, 1), precision):  # type: ignore[arg-type]
            raise RuntimeError(said)


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
    (folder / "config.json").write_text(json.dumps(config | {"is_decoder": True}))
    assert make_plan(recipe(folder, "adapter.rank=4"), folder).targets, "it sees what came before alone"
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
    assert model.config.id2label == {0: "not_equivalent", 1: "equivalent"}
    close(logits(model, folder), logits(load_result(made, torch.device("cpu")), folder))


def test_the_head_starts_from_seed_and_name(encoders: Callable[[str], Path], classifier: Callable[..., Any]) -> None:
    made = classifier(encoders("deberta"), "model.bits=32")
    torch.manual_seed(1)
    one = load_model(encoders("deberta"), made)
    torch.manual_seed(2)
    two, other = (load_model(encoders("deberta"), made.model_copy(update={"seed": seed})) for seed in (made.seed, 7))
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
    model = load_model(encoders("bert"), made).eval()
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
    merged = load_model(Path(made.output) / "merged", made.dense)
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
    before = load_model(encoders("bert"), made)
    train(made)
    after = load_result(made, torch.device("cpu"))
    moved = after.get_parameter("classifier.weight") - before.get_parameter("classifier.weight")
    assert float(moved.abs().max()) > 0.02
    kept = after.get_submodule("bert.encoder.layer.0.attention.self.query")
    assert float(torch.as_tensor(kept.factors()["B"] @ kept.factors()["A"]).abs().max()) < 1e-5


def test_rank_8_of_the_paper_counts_1_33_million(recipe: Callable[..., Any], tmp_path: Path) -> None:
    """arXiv 2404.02948 v4, table 3: 1.33 M train in DeBERTa-v3-base; that is rank 8 of all six linear layers."""
    shape = {"type_vocab_size": 0, "relative_attention": True, "share_att_key": True, "pos_att_type": ["p2c", "c2p"]}
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    DebertaV2Config(vocab_size=128100, **shape, **sizes).save_pretrained(tmp_path)
    made = recipe(tmp_path, "use.adapter=pissa-r8", "model.task=sequence-classification", "data.format=glue/cola")
    plan = make_plan(made, tmp_path)
    assert plan.num_lora(8) == 1_327_104
    assert plan.num_trainable(made) == 1_327_104 + 768 * 768 + 768 + 2 * 768 + 2


def test_a_model_of_characters_has_no_vocabulary(classifier: Callable[..., Any], tmp_path: Path) -> None:
    """CANINE takes every character, and four by four: of a text whose length is no multiple it sees the padding."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = CanineConfig(**sizes, num_hash_buckets=64, local_transformer_stride=32)
    CanineForSequenceClassification(config).save_pretrained(tmp_path / "canine")
    CanineTokenizer().save_pretrained(tmp_path / "canine")
    for lengths, said in (
        ([14] * 4, nullcontext()),
        ([14, 17, 40], pytest.raises(UsageError, match="with the padding")),
    ):
        data = tmp_path / f"{len(lengths)}.csv"
        data.write_text("text,label\n" + "".join(f"{'a' * length},{n % 2}\n" for n, length in enumerate(lengths)))
        sets = ("model.labels=[a, b]", "data.format=classification", f"data.train={data}", f"output={data}.out")
        with said:
            assert train(classifier(tmp_path / "canine", "model.bits=32", *sets))["steps_taken"] == 4


def test_labels_reach_a_gpu_without_waiting_for_it() -> None:
    """They are asked for when the forward pass is under way: a plain copy would wait until that is over."""
    waits: list[bool] = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten._to_copy.default and "device" in kwargs:
                waits.append(not kwargs.get("non_blocking"))
            return func(*args, **(kwargs or {}))

    with FakeTensorMode(), Copies():
        model: Any = lambda **_: SimpleNamespace(logits=torch.empty(2, 3, device="cuda"))  # noqa: E731
        ids = torch.empty(2, 5, dtype=torch.long, device="cuda")
        summed_loss(model, {"input_ids": ids, "labels": torch.empty(2)})
    assert waits == [False]
