"""Outputs graded and results written: the half of `eval` that needs no model."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pissa_cli import __version__
from pissa_cli.data.rows import Row
from pissa_cli.errors import UsageError
from pissa_cli.evals.bench import Count, Grade, pass_at, published_set
from pissa_cli.evals.benches import GENERATED, read_bench, source_of
from pissa_cli.evals.outputs import read_samples
from pissa_cli.evals.sandbox import protection
from pissa_cli.files import whole_folder, write_json
from pissa_cli.run.rundir import run_of
from pissa_cli.schema.recipe import Recipe

PASS_AT = (1, 10, 100)
Progress = Callable[[int, int, str], None]
"""Called with (done, in all, benchmark)."""


def score_samples(
    recipe: Recipe, source: str, allow_code: bool = False, progress: Progress = lambda *_: None
) -> dict[str, dict[str, Any]]:
    """Results of the one benchmark of a recipe for outputs made elsewhere, without any model; see `read_samples`.

    Writes eval/samples/<bench>/ in the run folder, which need not be a run.
    """
    if len(recipe.eval.bench) != 1 or recipe.eval.bench[0] not in GENERATED:
        raise UsageError("--samples: needs exactly one benchmark with questions", f"--bench {', '.join(GENERATED)}")
    (bench,) = recipe.eval.bench
    if GENERATED[bench].runs_code and not allow_code:
        raise UsageError(
            f"{bench}: scoring runs programs that a model wrote",
            "allow it with --allow-code-execution; docs/evaluation.md says how they are kept apart",
        )
    began, rows = time.monotonic(), read_bench(bench, recipe)
    outputs = read_samples(source, GENERATED[bench], rows)
    result, samples = grade_outputs(bench, rows, outputs, lambda done, total: progress(done, total, bench))
    result |= {"model": "samples", "samples": source}
    folder = run_of(recipe).scores / "samples" / bench
    return {bench: write_scores(folder, result, bench, recipe, samples, began)}


def grade_outputs(
    name: str, rows: list[Row], outputs: list[str], count: Count, each: int = 1
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(result, samples) for outputs of which `each` in a row answer the same question."""
    bench = GENERATED[name]
    grades: list[Grade] = bench.grade(rows, outputs, count)
    samples = [
        {"id": number // each, "output": output, "answer": grade.answer, "reference": bench.reference(row)}
        | {"correct": grade.correct, "detail": grade.detail}
        for number, (row, output, grade) in enumerate(zip(rows, outputs, grades, strict=True))
    ]
    right = [sum(grade.correct for grade in grades[i : i + each]) for i in range(0, len(grades), each)]
    n, mean = len(right), sum(right) / len(grades)
    spread = sum((hits / each - mean) ** 2 for hits in right) / n
    result = {
        "score": 100 * mean,
        "metric": bench.metric,
        "stderr": 100 * math.sqrt(spread / n),
        "n": n,
        "rows": published_set(bench.published, n),
        "protocol": bench.protocol,
    }
    if each > 1:
        ks = [k for k in PASS_AT if k <= each]
        result["pass_at"] = {str(k): 100 * sum(pass_at(k, each, hits) for hits in right) / n for k in ks}
    result |= bench.beside(rows, outputs)
    if (note := bench.note(outputs)) is not None:
        result["note"] = note
    return result | ({"protection": protection().text()} if bench.runs_code else {}), samples


def write_scores(
    folder: Path, result: dict[str, Any], bench: str, recipe: Recipe, samples: list[dict[str, Any]], began: float
) -> dict[str, Any]:
    """Write result.json and samples.jsonl; returns the result with what every benchmark says."""
    result |= {"bench": bench, "data": source_of(bench, recipe), "seconds": round(time.monotonic() - began, 3)}
    result |= {"pissa": __version__}
    with whole_folder(folder) as made:
        lines = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
        (made / "samples.jsonl").write_text(lines, encoding="utf-8", errors="backslashreplace")
        write_json(made / "result.json", result)
    return result
