"""Rows to tokens: templates, masks, truncation, unusable rows, the cache, and layouts."""

from __future__ import annotations

import csv
import itertools
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import EsmTokenizer, PreTrainedTokenizerBase

from pissa_cli.data import tokenize as module
from pissa_cli.data.examples import Examples, first_example
from pissa_cli.data.rows import read_rows
from pissa_cli.data.tokenize import TEMPLATE, load_examples, question_prompt
from pissa_cli.errors import UsageError
from pissa_cli.schema.data_options import DataSection


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def split(examples: Examples, index: int, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """(what is masked, what is a target) as text."""
    part = slice(int(examples.offsets[index]), int(examples.offsets[index + 1]))
    ids, targets = examples.ids[part], examples.targets[part]
    return tokenizer.decode(ids[~targets]), tokenizer.decode(ids[targets])


def load_one(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, row: Any, **section: Any) -> tuple[str, str]:
    source = write(tmp_path / "one.jsonl", [row])
    return split(load_examples(source, DataSection(**section), tokenizer, None), 0, tokenizer)


def test_the_default_template_is_pissas(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    prompt, answer = load_one(tmp_path, tokenizer, {"instruction": "Add 1 and 2.", "output": "3"})
    intro = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    assert prompt == f"{intro}\n\n### Instruction:\nAdd 1 and 2.\n\n### Response:"
    assert answer == "3\n<eos>"
    text, ids = question_prompt("Add 1 and 2.", DataSection(), tokenizer)
    assert text == prompt and ids == tokenizer(prompt)["input_ids"]
    assert TEMPLATE.count("{") == 2


def test_an_input_is_shown(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    prompt, _ = load_one(tmp_path, tokenizer, {"instruction": "Sum.", "input": "1 {output} 2", "output": "3"})
    assert "paired with an input" in prompt and "### Input:\n1 {output} 2\n\n### Response:" in prompt


def test_what_people_did_not_like_is_not_imitated(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """KTO's rows; a label that is 0, or what is learned, is none of theirs."""
    rows = [{"prompt": f"{n} + 1 =", "completion": str(n + 1), "label": n != 1} for n in range(3)]
    roles = {"prompt": "user", "completion": "assistant"}
    chats = [row | {key: [{"role": role, "content": row[key]}] for key, role in roles.items()} for row in rows]
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    table = tmp_path / "rows.csv"
    table.write_text("prompt,completion,label\n" + "".join(f"{','.join(map(str, row.values()))}\n" for row in rows))
    for source, section in (
        (write(tmp_path / "rows.jsonl", rows), DataSection(format="prompt")),
        (str(table), DataSection(format="prompt")),
        (write(tmp_path / "chats.jsonl", chats), DataSection(format="chat", columns={"messages": "prompt"})),
    ):
        examples = load_examples(source, section, tokenizer, None)
        answers = [split(examples, index, tokenizer)[1].removesuffix("<eos>") for index in range(len(examples))]
        assert answers == ["1", "3"] and not examples.unused
        assert examples.unusable == {"'label' is false: not to be imitated": [2]}
    learned = DataSection(format="prompt", columns={"completion": "label"})
    source = write(tmp_path / "learned.jsonl", [{**row, "label": str(row["label"])} for row in rows])
    assert len(load_examples(source, learned, tokenizer, None)) == 3
    numbers = write(tmp_path / "numbers.jsonl", [{**row, "label": 0} for row in rows])
    examples = load_examples(numbers, DataSection(format="prompt"), tokenizer, None)
    assert len(examples) == 3 and examples.unused == ["label"]


def test_other_formats(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    row = {"prompt": "Q: 1 + 2\nA:", "completion": " 3"}
    assert load_one(tmp_path, tokenizer, row, format="prompt") == ("Q: 1 + 2\nA:", " 3<eos>")
    assert load_one(tmp_path, tokenizer, {"text": "Anna has 3."}, format="text") == ("", "Anna has 3.<eos>")
    mapped = {"instruction": "query", "output": "response"}
    row = {"query": "Q {output} {input}", "response": "A"}
    assert load_one(tmp_path, tokenizer, row, columns=mapped, template="<{instruction}|{output}>") == (
        "<Q {output} {input}|",
        "A><eos>",
    )


def test_no_token_spans_prompt_and_answer(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """' has' is one token; if the prompt ends in ' ' it must not be merged over the boundary."""
    assert len(tokenizer(" has")["input_ids"]) == 1
    row = {"prompt": "Anna ", "completion": "has 3"}
    assert load_one(tmp_path, tokenizer, row, format="prompt") == ("Anna ", "has 3<eos>")


def test_bad_rows_are_named(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    good = {"instruction": "a", "output": "b"}
    rows = [
        good,
        "{broken",
        {**good, "output": None},
        {"instruction": "a"},
        [1],
        {**good, "output": ["x"]},
        {**good, "output": 7},
        {**good, "output": " \n"},
        {**good, "instruction": ""},
        {**good, "instruction": "", "input": "x"},
    ]
    examples = load_examples(write(tmp_path / "r.jsonl", rows), DataSection(), tokenizer, None)
    assert len(examples) == 3
    assert examples.unusable == {
        "not JSON in UTF-8": [2],
        "'output' is missing": [3, 4],
        "not a JSON object": [5],
        "'output' is not text": [6],
        "'output' is empty": [8],
        "'instruction' is empty": [9],
    }
    assert examples.notes("data.train")[0].startswith("data.train: 3 examples, ")
    assert examples.notes("data.train")[3] == "data.train: rows not used: 2, 'output' is missing (row 3, 4)"
    assert examples.notes("data.train")[-1] == "data.train: most rows are not used (7 of 10): is that meant?"
    even = load_examples(write(tmp_path / "even.jsonl", [good, {"instruction": "a"}]), DataSection(), tokenizer, None)
    assert "most rows" not in "".join(even.notes("data.train"))


def test_utf16_is_refused_as_such(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Of its lines every second one would be read."""
    path = tmp_path / "r.jsonl"
    text = "".join(json.dumps({"instruction": "a", "output": str(number)}) + "\n" for number in range(4))
    for encoding in ("utf-8", "utf-8-sig"):
        path.write_text(text, encoding=encoding)
        assert len(load_examples(str(path), DataSection(), tokenizer, None)) == 4
    path.write_text(text, encoding="utf-16")
    with pytest.raises(UsageError, match="UTF-16"):
        load_examples(str(path), DataSection(), tokenizer, None)


@pytest.mark.parametrize("text", ['\ufeff[{"instruction": "a", "output": "b"}]', '\n  [\n{"instruction": "a"},\n'])
def test_a_list_is_no_lines(text: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(text)
    with pytest.raises(UsageError, match="a JSON list") as refused:
        load_examples(str(path), DataSection(), tokenizer, None)
    assert refused.value.hint == "name it .json"


def test_a_folder_and_other_separators_are_named(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UsageError, match="a folder"):
        load_examples(str(tmp_path), DataSection(), tokenizer, None)
    path = tmp_path / "r.csv"
    path.write_text("instruction;output\na;b\n")
    with pytest.raises(UsageError) as raised:
        load_examples(str(path), DataSection(), tokenizer, None)
    assert "separated by commas" in str(raised.value.hint)


def test_the_first_example_is_shown(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{"prompt": "Anna\n", "completion": "x" * 200}, {"prompt": "b", "completion": "c"}]
    examples = load_examples(write(tmp_path / "r.jsonl", rows), DataSection(format="prompt"), tokenizer, None)
    assert first_example(examples, tokenizer) == f'read "Anna\\n", learned "{"x" * 60} ... {"x" * 55}<eos>"'


def test_inputs_are_never_dropped(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    row = {"instruction": "{input}", "input": 5, "output": "x"}
    assert "### Input:\n5\n" in load_one(tmp_path, tokenizer, row)[0]
    with pytest.raises(UsageError, match=r"has text, data\.template no"):
        load_one(tmp_path, tokenizer, row, template="{instruction}{output}")
    for section in ({"columns": {"imput": "x"}}, {"format": "text", "template": "{instruction}{output}"}):
        with pytest.raises(ValueError, match="format"):
            DataSection(**section)
    with pytest.raises(UsageError, match="lone surrogate"):
        load_one(tmp_path, tokenizer, {"instruction": "\ud800", "output": "x"})


def test_a_mapped_column_is_no_input_as_well(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    row = {"input": "What is 2+2?", "output": "4"}
    prompt, _ = load_one(tmp_path, tokenizer, row, columns={"instruction": "input"})
    assert prompt == TEMPLATE.partition("{output}")[0].replace("{instruction}", "What is 2+2?")


def test_how_many_are_tokenized_at_once_changes_nothing(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a column that need not be there comes late."""
    rows: list[Any] = [{"instruction": f"Count to {n}.", "output": "1, 2" * n} for n in range(1, 8)]
    source = write(tmp_path / "rows.jsonl", [*rows, "{broken", {**rows[0], "context": "Anna"}])
    section = DataSection(columns={"input": "context"}, template="{instruction}{input}={output}", max_length=24)
    together = load_examples(source, section, tokenizer, None)
    monkeypatch.setattr(module, "CHARACTERS", 40)
    apart = load_examples(source, section, tokenizer, None)
    assert len(together) == 8 and together.num_cut > 0
    assert apart.digest() == together.digest() and apart.notes("") == together.notes("")


def test_long_chats_are_tokenized_a_few_at_a_time(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    said = [{"role": "user", "content": "a" * 50}, {"role": "assistant", "content": "b"}]
    source, sizes = write(tmp_path / "rows.jsonl", [{"messages": said}] * 4), []
    encode = module._encode
    monkeypatch.setattr(module, "_encode", lambda rows, *words: sizes.append(len(rows)) or encode(rows, *words))
    monkeypatch.setattr(module, "CHARACTERS", 200)
    assert len(load_examples(source, DataSection(format="chat"), tokenizer, None)) == 4
    assert max(sizes) == 2


def test_how_far_it_is_is_said(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "rows.jsonl", [{"instruction": "a", "output": "b"}] * 25)
    monkeypatch.setattr(module, "BATCH", 10)
    clock, said = itertools.count(0, 11), list[str]()
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    load_examples(source, DataSection(), tokenizer, None, say=said.append)
    assert said == [f"{source}: {rows} rows tokenized so far" for rows in (10, 20)]


def test_nan_is_nothing(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """pandas writes it for an empty cell."""
    rows = [{"instruction": "a", "input": math.nan, "output": "b"}, {"instruction": "a", "output": math.nan}]
    examples = load_examples(write(tmp_path / "r.jsonl", rows), DataSection(), tokenizer, None)
    assert examples.unusable == {"'output' is missing": [2]} and len(examples) == 1
    assert "nan" not in tokenizer.decode(examples.ids)


def test_a_long_cell_is_cut_like_any_text(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = tmp_path / "r.csv"
    path.write_text(f"instruction,output\na,b\nc,{'1' * 140_000}\n")
    examples = load_examples(str(path), DataSection(), tokenizer, None)
    assert len(examples) == 2 and examples.num_cut == 1


def test_truncation(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{"prompt": "1" * p, "completion": "2" * c} for p, c in ((5, 4), (9, 9), (10, 3), (12, 1))]
    section = DataSection(format="prompt", max_length=10)
    source = write(tmp_path / "r.jsonl", rows)
    for _ in range(2):  # tokenized, and from the cache
        examples = load_examples(source, section, tokenizer, tmp_path)
        assert "1 of them cut at data.max_length (9 tokens left out)" in examples.notes("x")[0]
    assert [examples.length(i) for i in range(len(examples))] == [10, 10]
    assert [examples.num_targets(i) for i in range(len(examples))] == [5, 1]
    assert examples.num_cut == 1 and examples.unusable == {module.CUT: [3, 4]}


@pytest.mark.parametrize("suffix", ["json", "csv", "parquet"])
def test_other_files_hold_the_same(suffix: str, tmp_path: Path, rows: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    content = [json.loads(line) for line in rows.read_text().splitlines()]
    path = tmp_path / f"data.{suffix}"
    if suffix == "json":
        path.write_text(json.dumps(content))
    elif suffix == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["instruction", "output"])
            writer.writeheader()
            writer.writerows(content)
    else:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(content), path)
    section = DataSection(limit=30)
    one, other = (load_examples(str(p), section, tokenizer, None) for p in (rows, path))
    assert len(one) == 30 and torch.equal(one.ids, other.ids) and torch.equal(one.targets, other.targets)


@pytest.mark.parametrize("several", [False, True])
def test_what_datasets_has_saved_is_written_anew_as_the_hint_says(
    several: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = [{"instruction": f"say {number}", "output": str(number)} for number in range(3)]
    saved = datasets.Dataset.from_list(content)
    (datasets.DatasetDict({"train": saved}) if several else saved).save_to_disk(tmp_path / "saved")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="saved: a folder") as error:
        list(read_rows("saved"))
    assert error.value.hint is not None and "write it anew" in error.value.hint
    eval(error.value.hint.partition(": ")[2], {"load_from_disk": datasets.load_from_disk})
    assert [row for _, row in read_rows("saved.jsonl")] == content


def test_a_link_to_nothing_is_no_file_to_name(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").symlink_to("moved.jsonl")
    with pytest.raises(UsageError, match="no such data file") as error:
        list(read_rows(str(tmp_path / "rows.jsonl")))
    assert error.value.hint is not None and "name one file" not in error.value.hint


def test_the_cache_is_by_content(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load_examples(str(rows), DataSection(), tokenizer, tmp_path)
    copied = tmp_path / "copy.jsonl"
    copied.write_bytes(rows.read_bytes())
    calls: list[str] = []
    original = module._tokenize
    monkeypatch.setattr(module, "_tokenize", lambda source, *rest: calls.append(source) or original(source, *rest))
    again = load_examples(str(copied), DataSection(), tokenizer, tmp_path)
    assert not calls and torch.equal(first.ids, again.ids) and torch.equal(first.targets, again.targets)
    load_examples(str(rows), DataSection(max_length=300), tokenizer, tmp_path)
    copied.write_bytes(rows.read_bytes() + b'{"instruction": "x", "output": "y"}\n')
    assert len(load_examples(str(copied), DataSection(), tokenizer, tmp_path)) == len(first) + 1
    assert len(calls) == 2
    for file in tmp_path.glob("*.safetensors"):
        file.write_bytes(b"damaged")
    assert torch.equal(load_examples(str(rows), DataSection(), tokenizer, tmp_path).ids, first.ids)
    assert torch.equal(load_examples(str(rows), DataSection(), tokenizer, copied / "cache").ids, first.ids)  # a file


def test_the_cache_forgets_what_nobody_asks_for(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, rows: Path) -> None:
    cache, month = tmp_path / "cache", 31 * 24 * 3600
    sections = [DataSection(max_length=length) for length in (300, 400, 500, 600)]
    for section in sections[:3]:
        load_examples(str(rows), section, tokenizer, cache)
    asked, old, recent = sorted(cache.iterdir(), key=lambda path: path.stat().st_mtime)
    for path in (asked, old):
        os.utime(path, (time.time() - month, time.time() - month))
    load_examples(str(rows), sections[0], tokenizer, cache)
    load_examples(str(rows), sections[3], tokenizer, cache)
    assert asked.exists() and recent.exists() and not old.exists() and len(list(cache.iterdir())) == 3


def test_the_cache_forgets_nothing_that_is_not_its_own(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, rows: Path
) -> None:
    cache, month = tmp_path / "cache", 31 * 24 * 3600
    (cache / "v1-folder").mkdir(parents=True)
    load_examples(str(rows), DataSection(max_length=300), tokenizer, cache)
    [tokens] = cache.glob("*.safetensors")
    half = tokens.with_suffix(".0123abcd.tmp")  # of a run that was killed
    for path in (note := cache / "note.txt", half):
        path.write_text("mine")
    for path in cache.iterdir():
        os.utime(path, (time.time() - month, time.time() - month))
    load_examples(str(rows), DataSection(max_length=400), tokenizer, cache)
    assert note.exists() and not tokens.exists() and not half.exists()


def test_the_cache_knows_what_the_tokenizer_is_told(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    text = "Anna has 3 apples, Tom has four."
    said = [{"role": role, "content": text} for role in ("user", "assistant")]
    source = write(tmp_path / "rows.jsonl", [{"messages": said, "text": text, "label": "a"}])
    sections = DataSection(format="chat"), DataSection(format="classification", max_length=8)
    tokenizer.chat_template = "{{ bos_token }}{% for message in messages %}{{ message.content }}{% endfor %}"
    found = []
    for key, value in (("bos_token", "<eos>"), ("bos_token", "<pad>"), ("truncation_side", "left")):
        setattr(tokenizer, key, value)
        found.append([load_examples(source, one, tokenizer, tmp_path / "cache", ["a", "b"]).ids for one in sections])
        for ids, section in zip(found[-1], sections, strict=True):
            assert torch.equal(ids, load_examples(source, section, tokenizer, None, ["a", "b"]).ids)
    assert found[0][0][0] != found[1][0][0] and not torch.equal(found[1][1], found[2][1])


def test_the_cache_knows_the_words_of_a_tokenizer_in_python(tmp_path: Path, rows: Path) -> None:
    found = []
    for words in ("one two", "two one"):
        (tmp_path / "vocab.txt").write_text("\n".join(["<cls>", "<pad>", "<eos>", "<unk>", "<mask>", *words.split()]))
        EsmTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "made")
        tokenizer = EsmTokenizer.from_pretrained(tmp_path / "made")
        (tmp_path / "text.jsonl").write_text('{"text": "one"}\n')
        section = DataSection(format="text")
        found.append(load_examples(str(tmp_path / "text.jsonl"), section, tokenizer, tmp_path / "cache").ids)
    assert found[0].tolist() != found[1].tolist()


def test_data_of_the_hub_are_read_and_cached(
    tmp_path: Path, rows: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    content = datasets.Dataset.from_list([json.loads(line) for line in rows.read_text().splitlines()])
    asked: list[Any] = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or content)
    found = load_examples("some/data:main:test", DataSection(), tokenizer, tmp_path / "cache")
    assert asked[0] == (("some/data", "main"), {"split": "test"})
    assert torch.equal(found.ids, load_examples(str(rows), DataSection(), tokenizer, None).ids)
    monkeypatch.setattr(module, "_tokenize", None)
    again = load_examples("some/data:main:test", DataSection(), tokenizer, tmp_path / "cache")
    assert torch.equal(found.ids, again.ids)
