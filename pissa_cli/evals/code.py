"""What the code benchmarks share: the question, the code in an output, and its verdict."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pissa_cli.data.rows import Row, value_of
from pissa_cli.evals.bench import Count, Grade, Grading
from pissa_cli.evals.sandbox import run_programs

INSTRUCTION = (
    "Please provide a self-contained Python script that solves the following problem in a markdown code block:"
)
"""EvalPlus's own words (arXiv 2305.01210)."""
PROTOCOL = "pass@1; the first ```python block, cut at its own main, example usage and asserts; base tests"
FENCE, CUTS = "```python", ('if __name__ == "__main__":', "# Example usage", "assert")


def ask(problem: str) -> str:
    """The instruction for a problem."""
    return f"{INSTRUCTION}\n```python\n{problem.strip()}\n```"


def written(output: str) -> str:
    """The code in an output as the PiSSA repository cuts and strips it: of the first ```python block, else of all."""
    code = output.replace("\r", "")
    if FENCE in code:
        code, closed, _ = code[code.index(FENCE) :].strip().replace(FENCE, "").partition("\n```")
        code = code.strip() if closed else code
    for cut in CUTS:
        code = code.partition(cut)[0].strip() if cut in code else code
    return code


def task_id(row: Row) -> str | None:
    """A row's own id, where it has one."""
    found = value_of(row, "task_id")
    return None if found is None else str(found)


def graded(program: Callable[[Row, str], str]) -> Grading:
    """Grades by running; program: (row, output) -> the source that passes if the output is right."""

    def grade(rows: Sequence[Row], outputs: Sequence[str], progress: Count) -> list[Grade]:
        answered = [index for index, output in enumerate(outputs) if output.strip()]
        verdicts = run_programs([program(rows[i], outputs[i]) for i in answered], progress)
        grades = [Grade(None, False, "empty output")] * len(rows)
        for index, verdict in zip(answered, verdicts, strict=True):
            grades[index] = Grade(written(outputs[index]), verdict.passed, verdict.detail)
        return grades

    return grade
