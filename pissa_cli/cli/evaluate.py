"""`pissa eval`."""

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pissa_cli.cli import options
from pissa_cli.errors import UsageError

if TYPE_CHECKING:
    from pissa_cli.schema.recipe import Recipe


def evaluate_command(
    target: options.Target = None,
    bench: Annotated[
        list[str] | None,
        typer.Option(
            "--bench",
            help="Benchmarks, with commas: gsm8k, math, humaneval, mbpp, mt_bench, glue/<task>, loss, lm_eval:<task>.",
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", metavar="BENCH=FILE", help="A local data file for a benchmark. Repeatable."),
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Score the first N questions.")] = None,
    compare_base: Annotated[
        bool, typer.Option("--compare-base", help="Score the model before training, too; alone, if nothing is trained.")
    ] = False,
    samples: Annotated[
        str | None,
        typer.Option("--samples", metavar="FILE", help="Score these outputs (jsonl: id or task_id, output), no model."),
    ] = None,
    checkpoint: options.Checkpoint = None,
    allow_code_execution: Annotated[
        bool,
        typer.Option("--allow-code-execution", help="Run the programs that the model writes, apart from all else."),
    ] = False,
    judge_url: Annotated[
        str | None, typer.Option("--judge-url", help="mt_bench: a server of OpenAI's chat completions, up to /v1.")
    ] = None,
    judge_model: Annotated[str | None, typer.Option("--judge-model", help="mt_bench: the model that judges.")] = None,
    output: options.Output = None,
    set_: options.Set = None,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Score what a run exported."""
    names = [name.strip() for text in bench for name in text.split(",") if name.strip()] if bench else None
    loaded = options.load_recipe(
        target,
        set_,
        _files(data or [], names),
        bench=names,
        limit=limit,
        judge_url=judge_url,
        judge_model=judge_model,
        output=output,
    )
    from pissa_cli.cli import dryrun, show
    from pissa_cli.evals.benches import check_benches, check_files, runs_code, with_bench
    from pissa_cli.evals.results import score_samples
    from pissa_cli.evals.sandbox import protection
    from pissa_cli.run import inputs, reached
    from pissa_cli.run.rundir import run_of

    if samples is not None and (compare_base or checkpoint is not None):
        raise UsageError("--samples: there is no model", "leave --compare-base and --checkpoint out")
    if samples is None:
        options.require_one_run(target, loaded)
    recipe = with_bench(loaded.recipe)
    check_benches(recipe, compare_base, loaded.sources)
    check_files(recipe)
    if samples is None and (not dry_run or run_of(recipe).exists()):
        inputs.require_scored(recipe)
        if checkpoint is not None or not compare_base:
            reached.require_trained(recipe, checkpoint)
    if dry_run:
        show.load_libraries(debug)
        dryrun.dry_run(replace(loaded, recipe=recipe), as_json)
        return
    if allow_code_execution and runs_code(recipe):
        show.say(f"programs that the model writes run in {protection().text()}")
    if samples is None:
        show.load_libraries(debug)
        result = _scored(recipe, compare_base, checkpoint, allow_code_execution)
    else:
        with show.counting("eval") as progress:
            result = {"results": score_samples(recipe, samples, allow_code_execution, progress)}
    for results in result.values():
        for name, r in results.items():
            for line in _notes(name, r):
                show.say(line)
    show.print_result(result, as_json, [], _table(result))


def _scored(
    recipe: "Recipe", compare_base: bool, checkpoint: int | None, allow_code: bool
) -> dict[str, dict[str, Any]]:
    """Results by benchmark, of what was trained and of the base."""
    from pissa_cli.cli import show
    from pissa_cli.evals.run import evaluate
    from pissa_cli.outputs.trained import is_trained

    result: dict[str, dict[str, Any]] = {"results": {}}
    with show.counting("eval") as progress:
        if compare_base and checkpoint is None and not is_trained(recipe):
            show.say(f"{recipe.output}: nothing is trained yet; the base alone is scored")
        else:
            result["results"] = evaluate(recipe, allow_code=allow_code, progress=progress, step=checkpoint)
        if compare_base:
            result["base"] = evaluate(recipe, base=True, allow_code=allow_code, progress=progress)
    return result


def _table(result: dict[str, dict[str, dict[str, Any]]]) -> Any:
    """Scores by model and benchmark."""
    from rich.table import Table

    table = Table()
    for title in ("benchmark", "model", "score", "stderr", "n", "metric", "published"):
        table.add_column(title)
    for results in result.values():
        for name, r in results.items():
            figures = ["" if r[key] is None else f"{r[key]:.3f}" for key in ("score", "stderr")]
            table.add_row(name, r["model"], *figures, str(r["n"]), r["metric"], str(r.get("published", "")))
    return table


def _notes(name: str, r: dict[str, Any]) -> Iterator[str]:
    """What the person watching should know of the result of a benchmark."""
    if "prompts_without_room" in r:
        yield f"{name}: {r['prompts_without_room']} prompts fill the model's context; their answers are empty"
    if "answers_without_end" in r:
        length = r["max_new_tokens"]
        yield f"{name}: {r['answers_without_end']} answers go on up to eval.max_new_tokens ({length})"
    if r["metric"].endswith("a text"):  # of a classifier
        from pissa_cli.evals.classify import METRICS

        beside = ", ".join(f"{kind} {r[kind]:.2f} %" for kind in METRICS if kind in r)
        yield f"{r['model']}, {name}: {beside}"
    if "note" in r:
        yield f"{name}: {r['note']}"
    if r.get("unrated"):
        yield f"{name}: {r['unrated']} judgments have no rating, and do not count"
    yield from r.get("notes", [])


def _files(data: list[str], names: list[str] | None) -> dict[str, str]:
    """The file of each benchmark from BENCH=FILE; a plain FILE belongs to the only benchmark."""
    files = {}
    for text in data:
        bench, equals, file = text.partition("=")
        if not equals:
            if names is None or len(names) != 1:
                raise UsageError(f"--data {text}: which benchmark is this for?", f"write --data BENCH={text}")
            bench, file = names[0], text
        files[bench] = file
    return files
