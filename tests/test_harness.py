"""Tasks of lm-evaluation-harness: by a stand-in, and where it is installed (extra `lm-eval`) by itself."""

from __future__ import annotations

import importlib.util
import inspect
import json
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from pissa_cli.errors import PissaError, UsageError
from pissa_cli.evals import harness
from pissa_cli.train import train

TASK = """
task: own_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""

FILTERS = """
task: own_two
tag: own_tag
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["."], max_gen_toks: 4, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
filter_list:
  - {{name: first, filter: [{{function: regex, regex_pattern: "(.*)"}}, {{function: take_first}}]}}
  - {{name: second, filter: [{{function: regex, regex_pattern: "(zzz)"}}, {{function: take_first}}]}}
"""


class Manager:
    """What is used of the harness's TaskManager."""

    def __init__(self, include_path: str | None = None) -> None:
        self.include_path = include_path
        self.all_subtasks = ["own_choice", *(f"part_{number}" for number in range(9))]
        self.all_groups, self.all_tags = ["own_group"], ["own_tag"]


class Wrapped:
    """What is used of its HFLM."""

    def __init__(self, pretrained: Any, tokenizer: Any = None, batch_size: int | str = 1) -> None:
        self.given = pretrained, tokenizer, batch_size


def simple_evaluate(
    model: Any,
    tasks: Any = None,
    limit: Any = None,
    bootstrap_iters: int = 100000,
    apply_chat_template: bool | str = False,
    task_manager: Any = None,
) -> Any:
    """What is used of its function of this name."""


Found = Callable[..., list[inspect.BoundArguments]]


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Found:
    """Has a stand-in for the harness find this (or raise it). Returns what it is asked then, call by call."""

    def put(outcome: Any) -> list[inspect.BoundArguments]:
        names = ("lm_eval", "lm_eval.tasks", "lm_eval.models", "lm_eval.models.huggingface")
        made: dict[str, Any] = {name: ModuleType(name) for name in names}
        asked: list[inspect.BoundArguments] = []

        def answer(*args: Any, **options: Any) -> Any:
            asked.append(inspect.signature(simple_evaluate).bind(*args, **options))
            print("a table")
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        made["lm_eval"].__version__, made["lm_eval"].simple_evaluate = "0.4.13", answer
        made["lm_eval.tasks"].TaskManager, made["lm_eval.models.huggingface"].HFLM = Manager, Wrapped
        for name, module in made.items():
            module.__spec__ = ModuleSpec(name, None)
            monkeypatch.setitem(sys.modules, name, module)
        return asked

    return put


CHOICE = {
    "results": {
        "own_choice": {
            "alias": "own_choice",
            "sample_len": 6,
            "acc,none": 0.5,
            "acc_stderr,none": 0.2236,
            "acc_norm,none": 0.75,
            "acc_norm_stderr,none": 0.125,
        }
    },
    "n-samples": {"own_choice": {"original": 8, "effective": 6}},
    "samples": {"own_choice": [{"doc_id": 0, "acc": 1.0, "kind": torch.float32}, {"doc_id": 1, "acc": 0.0}]},
}


@pytest.mark.parametrize("chat", [False, True])
def test_what_the_harness_is_asked(
    chat: bool, found: Found, recipe: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    asked = found(CHOICE)
    harness.require_harness("lm_eval:own_choice")
    manager = harness.load_task("lm_eval:own_choice", "folder")
    assert manager.include_path == "folder"
    sets = ["data.format=chat", "eval.limit=6", "eval.batch_size=3"] if chat else []
    model: Any = object()
    tokenizer: Any = object()
    result, samples = harness.score(model, tokenizer, manager, "lm_eval:own_choice", recipe(Path("x"), *sets))
    assert asked[0].arguments["model"].given == (model, tokenizer, 3 if chat else "auto")
    assert asked[0].arguments["tasks"] == ["own_choice"] and asked[0].arguments["task_manager"] is manager
    assert asked[0].arguments["apply_chat_template"] is chat and asked[0].arguments["limit"] == (6 if chat else None)
    printed = capsys.readouterr()
    assert printed.out == "" and "a table" in printed.err
    assert result == {
        "score": 0.75,
        "metric": "acc_norm (lm_eval 0.4.13)",
        "stderr": 0.125,
        "n": 6,
        "figures": {key: value for key, value in CHOICE["results"]["own_choice"].items() if key != "alias"},
        "engine": "lm_eval",
    }
    assert samples == [{"doc_id": 0, "acc": 1.0, "kind": "torch.float32"}, {"doc_id": 1, "acc": 0.0}]


def test_the_score_of_a_group_and_of_metrics_of_its_own(found: Found, recipe: Callable[..., Any]) -> None:
    """The first of several filters; a standard error that is none; tasks added up."""
    group = {"alias": "own_group", "ours_stderr,b": 0.5, "ours,b": 0.25, "ours_stderr,a": "N/A", "ours,a": 1.0}
    parts = {"own_choice": {"acc,none": 1.0}, "part_0": {"acc,none": 0.0}}
    counts = {"own_choice": {"original": 9, "effective": 2}, "part_0": {"original": 9, "effective": 3}}
    for stderr in (0.5, "N/A"):
        whole = {"own_group": group | {"ours_stderr,b": stderr}}
        samples = {name: [{"task": name}] for name in parts}
        found({"results": parts, "groups": whole, "n-samples": counts, "samples": samples})
        bench, none = "lm_eval:own_group", object()
        result, rows = harness.score(none, none, harness.load_task(bench, None), bench, recipe(Path("x")))  # type: ignore[arg-type]
        assert (result["score"], result["metric"], result["n"]) == (0.25, "ours,b (lm_eval 0.4.13)", 5)
        assert result["stderr"] == (0.5 if stderr == 0.5 else None)
        assert [row["task"] for row in rows] == ["own_choice", "part_0"]


def test_what_the_harness_cannot_do(found: Found, recipe: Callable[..., Any]) -> None:
    bench, none = "lm_eval:own_choice", object()

    def score(outcome: Any) -> None:
        found(outcome)
        harness.score(none, none, Manager(), bench, recipe(Path("x")))  # type: ignore[arg-type]

    with pytest.raises(PissaError, match=r"^lm_eval:own_choice: the harness failed \(ValueError: no data\)$"):
        score(ValueError("no data"))
    with pytest.raises(torch.OutOfMemoryError):
        score(torch.OutOfMemoryError())
    with pytest.raises(PissaError, match=r"gave no figure \(alias, sample_len\)"):
        score({"results": {"own_choice": {"alias": "own_choice", "sample_len": 6}}, "n-samples": {}})
    for name, hint in (
        ("part", f"near it: {', '.join(f'part_{number}' for number in range(8))}"),
        ("own_tag", "`lm_eval ls tasks` lists them"),
    ):
        with pytest.raises(UsageError, match=f"the harness has no task '{name}'") as caught:
            harness.load_task(f"lm_eval:{name}", None)
        assert caught.value.hint == hint


def test_the_stand_in_is_called_as_the_harness_is() -> None:
    pytest.importorskip("lm_eval")
    from lm_eval import simple_evaluate as own
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    for ours, theirs in ((simple_evaluate, own), (Manager, TaskManager), (Wrapped, HFLM)):
        assert inspect.signature(ours).parameters.keys() <= inspect.signature(theirs).parameters.keys()
    assert all(isinstance(getattr(TaskManager, name), property) for name in ("all_subtasks", "all_groups"))


@pytest.fixture
def run(recipe: Callable[..., Any], models: Callable[[str], Path], rows: Path) -> str:
    made = recipe(models("llama"), "model.bits=32", "adapter.rank=4", f"data.train={rows}", "train.steps=1")
    train(made)
    return str(made.output)


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="it is installed")
def test_the_extra_is_named(run: str, pissa: Callable[..., Any]) -> None:
    outcome = pissa("eval", run, "--bench", "lm_eval:hellaswag")
    assert outcome.code == 2 and "pissa[lm-eval]" in outcome.err


def test_a_task_of_ones_own(run: str, pissa: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    questions = [{"question": f"{n} + 1 =", "choices": [f" {n + 1}", f" {n}"], "answer": 0} for n in range(8)]
    file = tmp_path / "own.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in questions))
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "own.yaml").write_text(TASK.format(file=file))
    bench = "lm_eval:own_choice"
    outcome = pissa("eval", run, "--bench", bench, "--data", f"{bench}={folder}", "--limit", "6", "--json")
    assert outcome.code == 0, outcome.err
    result = outcome.json["results"][bench]
    kept = Path(run) / "eval" / "lm_eval" / "own_choice"
    samples = [json.loads(line) for line in (kept / "samples.jsonl").read_text().splitlines()]
    assert result["n"] == len(samples) == 6 and result["metric"].startswith("acc ")
    assert result["score"] == pytest.approx(sum(sample["acc"] for sample in samples) / 6)
    assert (
        result["stderr"]
        == result["figures"]["acc_stderr,none"]
        == pytest.approx((result["score"] * (1 - result["score"]) / 5) ** 0.5)
    )
    assert pissa("merge", run).code == 0 and "own_choice" in (Path(run) / "merged" / "README.md").read_text()
    (folder / "two.yaml").write_text(FILTERS.format(file=file))
    outcome = pissa("eval", run, "--bench", "lm_eval:own_two", "--data", f"lm_eval:own_two={folder}", "--json")
    two = outcome.json["results"]["lm_eval:own_two"]
    assert two["metric"].startswith("exact_match,first ") and two["score"] == two["figures"]["exact_match,first"]
    outcome = pissa("eval", run, "--bench", "lm_eval:own_tag", "--data", f"lm_eval:own_tag={folder}")
    assert outcome.code == 2 and "no task" in outcome.err
    outcome = pissa("eval", run, "--bench", "lm_eval:own_choise", "--data", f"lm_eval:own_choise={folder}")
    assert outcome.code == 2 and "no task" in outcome.err
