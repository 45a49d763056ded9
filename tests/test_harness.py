"""Tasks of lm-evaluation-harness, where it is installed (extra `lm-eval`); what is said where it is not."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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
