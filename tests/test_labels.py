"""Texts to classify and their labels: from rows to tokens and the numbers of classes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pissa_cli.data import tokenize as data
from pissa_cli.data.classification import label_number
from pissa_cli.data.rows import read_rows
from pissa_cli.data.tokenize import load_examples
from pissa_cli.errors import UsageError
from pissa_cli.files import read_json, write_json
from pissa_cli.schema.data_options import DataSection
from pissa_cli.train import train


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
        (1, ["True", "False"], "not one of"),
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


def test_texts_are_tokenized_together_to_what_each_is_by_itself(
    encoders: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = AutoTokenizer.from_pretrained(encoders("bert")).backend_tokenizer.to_str()
    names = ["input_ids", "token_type_ids"]
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(plain), model_input_names=names)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", pair="$A $B:1", special_tokens=[])
    pairs = [("a " * (7 * n % 40 + 1), "b " * (11 * n % 30) if n % 3 else "") for n in range(200)]
    wanted = [tokenizer(*filter(None, pair), truncation=True, max_length=32) for pair in pairs]
    rows = [{"text": one, "text_pair": other, "label": n % 2} for n, (one, other) in enumerate(pairs)]
    rows[50:50] = [{"text": " ", "text_pair": "b", "label": 0}, {"text": "a", "text_pair": "b", "label": "x"}]
    path, calls = tmp_path / "rows.jsonl", list[Any]()
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    call = type(tokenizer).__call__
    monkeypatch.setattr(type(tokenizer), "__call__", lambda *a, **k: calls.append(a) or call(*a, **k))
    section = DataSection(format="classification", max_length=32)
    examples = load_examples(str(path), section, tokenizer, None, ["no", "yes"])
    assert len(calls) < 10 and list(examples.unusable.values()) == [[51], [52]]
    assert examples.ids.tolist() == [token for one in wanted for token in one["input_ids"]]
    assert examples.targets.tolist() == [kind == 1 for one in wanted for kind in one["token_type_ids"]]
    assert examples.labels is not None and examples.labels.tolist() == [n % 2 for n in range(200)]
    assert examples.num_cut == sum(len(tokenizer(*filter(None, pair))["input_ids"]) > 32 for pair in pairs) > 20


@pytest.mark.parametrize(
    ("found", "labels", "refused"),
    [
        ([1, 2, 3, 3], ["a", "b", "c"], True),
        ([1.0, "3"], ["a", "b", "c"], True),
        ([2, 3], ["a", "b", "c"], True),
        ([1, 2, 3, 0], ["a", "b", "c"], False),
        ([1, 2], ["a", "b", "c"], False),
        (["a", "b", "c", 3], ["a", "b", "c"], False),
        ([1, 3, " b", "c", "a"], ["a", "b", "c"], False),
        ([1, 2, 3, 3, "b"], ["a", "b", "c"], True),
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


def test_a_file_without_the_columns(
    encoders: Callable[[str], Path], classifier: Callable[..., Any], tmp_path: Path
) -> None:
    path = tmp_path / "wrong.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(UsageError, match="no column 'sentence1'"):
        train(classifier(encoders("bert"), f"data.train={path}"))
