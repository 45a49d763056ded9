"""Training and held-out examples: several sources, a share that is held out, long texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from pissa_cli.data.examples import Examples
from pissa_cli.data.sets import load_held_out, load_sets
from pissa_cli.data.tokenize import load_examples
from pissa_cli.errors import UsageError
from pissa_cli.schema.data_options import DataSection
from pissa_cli.schema.recipe import Recipe


def recipe(labels: int = 0, **data: Any) -> Recipe:
    task = {"task": "sequence-classification", "labels": [str(i) for i in range(labels)]} if labels else {}
    model = {"name": "m", **task}
    return Recipe.model_validate({"model": model, "adapter": {"method": "pissa"}, "data": data})


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(path)


def row(number: int) -> dict[str, str]:
    return {"prompt": f"Q {number}:", "completion": f" {number * 7} is it"}


def parts(examples: Examples) -> list[tuple[list[int], list[bool]]]:
    spans = zip(examples.offsets.tolist(), examples.offsets[1:].tolist(), strict=False)
    return [(examples.ids[a:b].tolist(), examples.targets[a:b].tolist()) for a, b in spans]


def test_sources_follow_each_other(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    one = write(tmp_path / "a.jsonl", [row(1), {"prompt": "x"}, row(2), row(3)])
    two = write(tmp_path / "b.jsonl", [row(4) | {"other": "x"}])
    made = recipe(format="prompt", train=[one, two, one], eval=[two, one], limit=3)
    train, held_out = load_sets(made, tokenizer)
    each = [
        parts(load_examples(source, made.data.model_copy(update={"limit": limit}), tokenizer, None))
        for source, limit in ((one, 3), (two, None), (one, None))
    ]
    assert held_out is not None
    assert parts(train) == each[0] + each[1] + each[0] and parts(held_out) == each[1] + each[2]
    assert train.unusable == {f"{one}: 'completion' is missing": [2]} and train.unused == ["other"]
    assert held_out.facts()["not_used"] == {f"{one}: 'completion' is missing": 1}
    assert parts(load_held_out(made, tokenizer, 2)) == each[1] + each[2][:1]
    with pytest.raises(UsageError, match=r"c\.jsonl: no column 'prompt'.*it has: text") as caught:
        load_sets(recipe(format="prompt", train=[one, write(tmp_path / "c.jsonl", [{"text": "a"}])]), tokenizer)
    assert caught.value.hint == "all files of a list have the same columns: rename them in this one"


def test_held_out_examples_that_are_trained_on_are_counted(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    train = write(tmp_path / "a.jsonl", [row(number) for number in range(6)])
    other = write(tmp_path / "b.jsonl", [row(9) | {"source": "same tokens"}, row(5), row(7), row(5)])
    for held_out, limit, said in ((other, 6, ["2 of 4"]), (train, 4, ["4 of 6"]), (other, 5, []), ("30%", 6, [])):
        lines: list[str] = []
        load_sets(recipe(format="prompt", train=train, eval=held_out, limit=limit), tokenizer, lines.append)
        assert [line for line in lines if "data.eval" in line] == [
            f"data.eval: {share} examples are trained on, too" for share in said
        ]


def test_a_share_is_held_out(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [row(number) for number in range(200)]
    source = write(tmp_path / "rows.jsonl", [*rows, *rows[:50]])
    made = recipe(format="prompt", train=source, eval="10%")
    train, held_out = load_sets(made, tokenizer)
    whole = parts(load_examples(source, made.data, tokenizer, None))
    assert held_out is not None and abs(len(held_out) - 25) <= 1  # of equal ones both
    kept, out = parts(train), parts(held_out)
    assert sorted(kept + out) == sorted(whole) and not [part for part in out if part in kept]
    assert [part for part in whole if part in kept] == kept and [part for part in whole if part in out] == out
    assert parts(load_held_out(made, tokenizer, None)) == out and parts(load_held_out(made, tokenizer, 5)) == out[:5]
    bad = write(tmp_path / "bad.jsonl", [{"prompt": "x"}, *rows[:20]])
    train, held_out = load_sets(recipe(format="prompt", train=bad, eval="10%"), tokenizer)
    assert held_out is not None and list(train.unusable.values()) == [[1]] and not held_out.unusable
    # ten rows more, elsewhere: nearly all stay where they were
    more = write(tmp_path / "more.jsonl", [row(number) for number in range(1000, 1010)] + [*rows, *rows[:50]])
    train, _ = load_sets(recipe(format="prompt", train=more, eval="10%"), tokenizer)
    assert sum(part in parts(train) for part in out) <= 4
    # a share of what is left by the limit, of several sources
    train, held_out = load_sets(recipe(format="prompt", train=[source, source], eval="50%", limit=4), tokenizer)
    assert held_out is not None and len(train) == len(held_out) == 4
    # no more is held out than was asked for, be the row with the lowest hash there many times
    for often in range(8):
        source = write(tmp_path / "often.jsonl", [*(row(number) for number in range(8)), *[row(often)] * 32])
        train, held_out = load_sets(recipe(format="prompt", train=source, eval="10%"), tokenizer)
        assert held_out is not None and len(held_out) == 4 and len(train) == 36
    same = write(tmp_path / "same.jsonl", [row(1)] * 5)
    with pytest.raises(UsageError, match=r"20\.00% of 5 examples leaves none"):
        load_sets(recipe(format="prompt", train=same, eval="20%"), tokenizer)


def test_a_share_is_what_the_run_held_out(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    source = write(tmp_path / "rows.jsonl", [row(number) for number in range(100)])
    made = recipe(format="prompt", train=source, eval="10%")
    train, held_out = load_sets(made, tokenizer)
    assert held_out is not None
    assert parts(load_held_out(made, tokenizer, 5, train.digest())) == parts(held_out)[:5]
    shorter = recipe(format="prompt", train=source, eval="10%", max_length=8)
    write(tmp_path / "rows.jsonl", [row(number) for number in range(120)])
    for other in (made, shorter):
        with pytest.raises(UsageError, match=r"10% of .*rows\.jsonl is not what this run held out"):
            load_held_out(other, tokenizer, 5, train.digest())
    with pytest.raises(UsageError, match=r"10% of data\.train, which names nothing"):
        load_held_out(recipe(format="prompt", eval="10%"), tokenizer, None)


def test_labels_go_with_their_texts(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    source = write(tmp_path / "rows.jsonl", [{"text": f"number {i}", "label": i} for i in range(20)])
    made = recipe(20, format="classification", train=[source, source], eval="30%")
    for examples in load_sets(made, tokenizer):
        assert examples is not None and examples.labels is not None and len(examples.labels) == len(examples)
        for (ids, _), label in zip(parts(examples), examples.labels.tolist(), strict=True):
            assert f"number {int(label)}" in str(tokenizer.decode(ids))


def test_a_long_text_becomes_several_examples(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    texts = ["Anna has 3 apples. " * 20, "short"]
    source = write(tmp_path / "rows.jsonl", [{"text": text} for text in texts])
    section = DataSection(format="text", max_length=16)
    whole = load_examples(source, section.model_copy(update={"max_length": 10_000}), tokenizer, None)
    cut = load_examples(source, section, tokenizer, None)
    for bos in (False, True):
        if bos:  # as of tokenizers that begin every text with it
            tokenizer.bos_token = tokenizer.convert_ids_to_tokens(int(whole.ids[0]))
            cut = load_examples(source, section, tokenizer, None)
        pieces, length = [ids for ids, _ in parts(cut)][:-1], whole.length(0)
        assert all(len(piece) == 16 for piece in pieces[:-1]) and 2 <= len(pieces[-1]) <= 16
        assert sum((piece[1:] for piece in pieces), [int(whole.ids[0])]) == whole.tokens(0).tolist()
        ends = [pieces[0][0], *([pieces[0][0]] * (len(pieces) - 1) if bos else [piece[-1] for piece in pieces[:-1]])]
        assert [piece[0] for piece in pieces] == ends
        assert sum(cut.num_targets(i) for i in range(len(pieces))) == length - 1
        assert cut.num_cut == cut.num_lost == 0 and torch.equal(cut.tokens(len(cut) - 1), whole.tokens(1))


@pytest.mark.parametrize("wanted", [[], [0], [6], [1, 2, 5], [0, 1, 2, 3, 4, 5, 6]])
def test_examples_are_selected_with_all_that_is_theirs(wanted: list[int]) -> None:
    lengths = [3, 1, 4, 1, 5, 9, 2]
    ids, offsets = torch.arange(25, dtype=torch.int32), torch.tensor([0, *lengths]).cumsum(0)
    examples = Examples(ids, ids % 3 == 0, offsets, labels=torch.arange(7.0))
    found = examples.select(torch.tensor([number in wanted for number in range(7)]))
    assert [found.tokens(i).tolist() for i in range(len(found))] == [examples.tokens(i).tolist() for i in wanted]
    assert torch.equal(found.targets, found.ids % 3 == 0) and found.ids.dtype == torch.int32
    assert found.labels is not None and found.labels.tolist() == wanted
