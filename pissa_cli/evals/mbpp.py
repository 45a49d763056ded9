"""MBPP (Austin et al. 2021, arXiv 2108.07732), whole or sanitized: write a Python function; its three tests run."""

from __future__ import annotations

from typing import Any

from pissa_cli.data.rows import Row, value_of
from pissa_cli.evals.bench import Bench
from pissa_cli.evals.code import PROTOCOL, ask, graded, task_id, written


def text(row: Row) -> Any:
    """What is asked: `text` in the whole set, `prompt` in the sanitized one."""
    found = value_of(row, "text")
    return value_of(row, "prompt") if found is None else found


def program(row: Row, output: str) -> str:
    """The output's code and the tests, with what they import or set up."""
    before = [*(row.get("test_imports") or []), row.get("test_setup_code") or ""]
    return "\n".join([written(output), *before, *row["test_list"], ""])


def _problem(row: Row) -> str | None:
    if not isinstance(text(row), str):
        return "it has neither text nor prompt"
    lines = [row.get("test_list"), row.get("test_imports") or [], [row.get("test_setup_code") or ""]]
    known = all(isinstance(part, list) and all(isinstance(line, str) for line in part) for part in lines)
    if not known or not lines[0]:
        return "its test_list or test_imports is no list of lines, or its test_setup_code no text"
    return None


BENCH = Bench(
    data="google-research-datasets/mbpp:full:test",
    published={
        399: "EvalPlus's",
        500: "the test set",
        974: "all of it",
        427: "all of the sanitized set",
        257: "the sanitized test set",
    },
    fields=(),
    question=lambda row: ask(f'"""\n{text(row)}\n{row["test_list"][0]}\n"""'),
    reference=lambda row: str(row.get("code", "")),
    identity=task_id,
    problem=_problem,
    grade=graded(program),
    metric="pass@1, %",
    protocol=PROTOCOL,
    runs_code=True,
)
