"""HumanEval (Chen et al. 2021, arXiv 2107.03374): complete a Python function; its tests run."""

from __future__ import annotations

from pissa_cli.data.rows import Row
from pissa_cli.evals.bench import Bench
from pissa_cli.evals.code import PROTOCOL, ask, graded, task_id, written


def program(row: Row, output: str) -> str:
    """The prompt, the output's code and the tests, as EvalPlus puts them together."""
    return f"{row['prompt']}{written(output)}\n{row['test']}\ncheck({row['entry_point']})\n"


BENCH = Bench(
    data="openai/openai_humaneval::test",
    published={164: "the set"},
    fields=("prompt", "test", "entry_point"),
    question=lambda row: ask(str(row["prompt"])),
    reference=lambda row: str(row.get("canonical_solution", "")),
    identity=task_id,
    grade=graded(program),
    metric="pass@1, %",
    protocol=PROTOCOL,
    runs_code=True,
)
