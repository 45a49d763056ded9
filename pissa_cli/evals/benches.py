"""The benchmarks there are, what a recipe says of them, and their rows. Knows no torch."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path

from pissa_cli.data.columns import check_columns
from pissa_cli.data.rows import Row, is_local, read_rows, text_of
from pissa_cli.errors import UsageError
from pissa_cli.evals import competition_math, gsm8k, harness, humaneval, mbpp, mt_bench
from pissa_cli.evals.bench import Bench
from pissa_cli.schema.data_options import held_out_name, held_out_sources
from pissa_cli.schema.glue import GLUE, SETS
from pissa_cli.schema.recipe import Recipe
from pissa_cli.schema.yamlfile import KeyPath

GENERATED: dict[str, Bench] = {
    "gsm8k": gsm8k.BENCH,
    "math": competition_math.BENCH,
    "humaneval": humaneval.BENCH,
    "mbpp": mbpp.BENCH,
}
ANSWERED = (*GENERATED, "mt_bench")
"""Those of which the model writes answers."""
BENCHES = (*ANSWERED, *SETS, "loss", f"{harness.PREFIX}<task>")
ON_HUB = {name: bench.data for name, bench in GENERATED.items()} | {name: glue.data for name, glue in SETS.items()}
ON_HUB["mt_bench"] = mt_bench.DATA


def runs_code(recipe: Recipe) -> bool:
    """Whether a benchmark of the recipe runs what the model writes."""
    return any(GENERATED[bench].runs_code for bench in recipe.eval.bench if bench in GENERATED)


def with_bench(recipe: Recipe) -> Recipe:
    """The recipe, in which a model with held-out rows and no benchmark is scored on these."""
    section = recipe.eval
    if section.bench or not (recipe.data.eval or "loss" in section.data):
        return recipe
    return recipe.model_copy(update={"eval": section.model_copy(update={"bench": ["loss"]})})


def check_benches(recipe: Recipe, base: bool = False, sources: Mapping[KeyPath, str] | None = None) -> None:
    """Refuse an unknown or missing benchmark, before anything is loaded. base: the model before training, too.

    sources: where each value of the recipe was written.
    """
    written = sources or {}
    if base and recipe.eval.engine != "transformers" and recipe.model.bits == 4:
        raise UsageError("eval.engine: vllm cannot serve a 4-bit base with its start", "score it without the engine")
    if not recipe.eval.bench:
        others = ", ".join(bench for bench in BENCHES if bench != "loss")
        raise UsageError("eval.bench: no benchmark given, nor held-out rows", f"name some with --bench: {others}")
    check_names(recipe, written)
    for bench in recipe.eval.bench:
        if bench.startswith(harness.PREFIX):
            harness.require_harness(bench)
        _check_engine(bench, recipe)
    _require_use(recipe, written)
    if "mt_bench" in recipe.eval.bench and not (recipe.eval.judge_url and recipe.eval.judge_model):
        raise UsageError(
            "mt_bench: a judge has to grade the answers",
            "name one: --judge-url https://api.openai.com/v1 --judge-model gpt-4, its key in PISSA_JUDGE_KEY",
        )


def check_names(recipe: Recipe, sources: Mapping[KeyPath, str]) -> None:
    """Refuse benchmarks that there are not, or that the model's task excludes: before it is trained, too."""
    for bench in recipe.eval.bench:
        if bench not in BENCHES and not bench.startswith(harness.PREFIX):
            raise _unknown(bench, sources.get(("eval", "bench")), "eval.bench")
        _check_task(bench, recipe)
    unknown = {bench for bench in recipe.eval.data if not bench.startswith(harness.PREFIX)} - set(BENCHES)
    if unknown:
        raise _unknown(min(unknown), sources.get(("eval", "data", min(unknown))), "eval.data")


def _require_use(recipe: Recipe, written: Mapping[KeyPath, str]) -> None:
    """UsageError for what `--set` says of answers where no benchmark has the model write any."""
    answered = set(recipe.eval.bench) & set(ANSWERED)
    used = {"samples": answered - {"mt_bench"}} | dict.fromkeys(("temperature", "stop", "max_new_tokens"), answered)
    for key, benches in used.items():
        if not benches and written.get(("eval", key), "").startswith("--set "):
            unused = f"--set eval.{key}: {', '.join(recipe.eval.bench)} does not use it"
            raise UsageError(unused, "leave it out, or name another --bench")


def _unknown(bench: str, source: str | None, key: str) -> UsageError:
    """For a benchmark that is not there, with the nearest one; of those in a group the second part is enough."""
    names = {name.rpartition("/")[2]: name for name in BENCHES} | {name: name for name in BENCHES}
    near = difflib.get_close_matches(bench.lower(), names, n=1)
    task = bench.lower().rpartition("/")[2].removeprefix("lm-eval:")
    hint = f"did you mean '{names[near[0]]}'? " if near else f"a task of EleutherAI's harness is lm_eval:{task}; "
    place = f"{source}: {key}" if source else key
    return UsageError(f"{place}: unknown benchmark '{bench}'", f"{hint}known: {', '.join(BENCHES)}")


def _check_task(bench: str, recipe: Recipe) -> None:
    """UsageError if a model of this task cannot be scored by it."""
    classifies = recipe.model.task == "sequence-classification"
    if bench != "loss" and classifies != (bench in SETS):
        kind = "texts with labels" if bench in SETS else "answers that a model writes"
        known = [name for name in BENCHES if name == "loss" or (name in SETS) == classifies]
        raise UsageError(
            f"eval.bench: {bench} scores {kind}, the model's task is {recipe.model.task}",
            f"for this task: {', '.join(known)}",
        )
    if bench in SETS and GLUE[SETS[bench].task].labels != tuple(recipe.model.labels):
        raise UsageError(
            f"eval.bench: {bench} has the classes {', '.join(GLUE[SETS[bench].task].labels)}, this model "
            f"{', '.join(recipe.model.labels)}",
            f"train one with data.format glue/{SETS[bench].task}",
        )


def _check_engine(bench: str, recipe: Recipe) -> None:
    """UsageError if the engine only writes answers, and the benchmark wants more."""
    if recipe.eval.engine != "transformers" and bench not in ANSWERED:
        raise UsageError(
            f"eval.engine: {recipe.eval.engine} writes answers, which {bench} does not score",
            "score it on its own, without the engine",
        )


def source_of(bench: str, recipe: Recipe) -> str:
    """The file or data set of a benchmark; what the recipe holds out may be several, or a share."""
    if (known := recipe.eval.data.get(bench, ON_HUB.get(bench))) is not None:
        return known
    if bench.startswith(harness.PREFIX):
        return "the harness's own"
    if recipe.data.eval is None:
        raise UsageError("eval loss: no held-out data", "set data.eval, or --data loss=file.jsonl")
    return held_out_name(recipe.data)


def check_files(recipe: Recipe) -> None:
    """Raise UsageError for a local file of a benchmark that is not there or is no such file."""
    for bench in recipe.eval.bench:
        if bench.startswith(harness.PREFIX):
            continue
        source = source_of(bench, recipe)
        if bench == "mt_bench":
            if Path(source).is_dir():
                mt_bench.load(source, recipe.eval.limit)
        elif bench in GENERATED:
            if is_local(source):
                read_bench(bench, recipe)
        else:
            for one in held_out_sources(recipe.data) if is_held_out(bench, recipe) else [source]:
                check_columns(one, recipe)


def is_held_out(bench: str, recipe: Recipe) -> bool:
    """Whether it is the loss on what training held out."""
    return bench == "loss" and bench not in recipe.eval.data


def read_bench(name: str, recipe: Recipe) -> list[Row]:
    """The rows of a benchmark with questions. Raises UsageError for one that lacks a field, naming it."""
    bench, source, rows = GENERATED[name], source_of(name, recipe), []
    for number, row in read_rows(source, recipe.eval.limit):
        if isinstance(row, str):
            raise UsageError(f"{source}: row {number} cannot be used ({row})", "mend or remove that row")
        missing = [field for field in bench.fields if field not in row]
        if missing:
            raise UsageError(
                f"{source}: row {number} is no row of {name}: it has no {', '.join(missing)}",
                f"its columns: {', '.join(row)}; docs/evaluation.md says what rows are scored",
            )
        problem = _no_text(row, bench.fields) or bench.problem(row)
        if problem is not None:
            raise UsageError(
                f"{source}: row {number} is no row of {name}: {problem}",
                "mend or remove that row; docs/evaluation.md says what rows are scored",
            )
        rows.append(row)
    if not rows:
        raise UsageError(f"{source}: no rows", "give a file with rows")
    return rows


def _no_text(row: Row, fields: Sequence[str]) -> str | None:
    """What is wrong with the first of the fields that is no text."""
    try:
        for field in fields:
            text_of(row, field)
    except ValueError as error:
        return str(error)
    return None
