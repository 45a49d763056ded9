"""HumanEval (Chen et al. 2021, arXiv 2107.03374): complete a Python function; its tests run."""

from __future__ import annotations

from pissa_cli.evals.bench import Bench
from pissa_cli.evals.code import PROTOCOL, ask, fenced, graded
from pissa_cli.rows import Row


def program(row: Row, output: str) -> str:
    """The output's code, after the prompt where it does not define the function itself, and the tests."""
    prompt, name = str(row["prompt"]), str(row["entry_point"])
    code = fenced(output)
    code = output if code is None else code
    if f"def {name}(" not in code:
        code = f"{prompt}{code}"
    return f"{code}\n{row['test']}\ncheck({name})\n"


BENCH = Bench(
    data="openai/openai_humaneval::test",
    published={164: "the set"},
    fields=("prompt", "test", "entry_point"),
    question=lambda row: ask(str(row["prompt"])),
    reference=lambda row: str(row.get("canonical_solution", "")),
    identity=lambda row: str(row["task_id"]) if "task_id" in row else None,
    grade=graded(program),
    metric="pass@1, %",
    protocol=PROTOCOL,
    runs_code=True,
)
