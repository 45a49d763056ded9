"""`--dry-run`: the resolved recipe with the source of every value, what would train, and the memory it would take."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pissa_cli.cli.show import print_result
from pissa_cli.schema.recipe_file import Loaded, listing

if TYPE_CHECKING:
    from pissa_cli.training.memory import Forecast


def dry_run(loaded: Loaded, as_json: bool, processes: int = 1, steps: tuple[int, int] | None = None) -> None:
    """Print the plan; reads the configuration of the base, writes nothing. processes: how many train; steps: (steps,
    rows) as `prepare.steps_to_take` gives them."""
    from pissa_cli.base.model import SMALL_FILES, context_length, resolve_base
    from pissa_cli.base.plan import make_plan
    from pissa_cli.run.reached import is_started
    from pissa_cli.run.report import notes_of
    from pissa_cli.run.started import open_run
    from pissa_cli.training.memory import forecast

    recipe, rows, size = loaded.recipe, listing(loaded), loaded.recipe.train.batch_size
    planned = make_plan(recipe, resolve_base(recipe.model, SMALL_FILES))
    auto = getattr(recipe.adapter, "rank", None) == "auto"
    if auto and is_started(recipe):
        chosen = {layer["name"]: layer["rank"] for layer in open_run(recipe)[1]["layers"]}
        if chosen.keys() == planned.ranks.keys():
            planned, auto = replace(planned, ranks=chosen), False
    memory, context = forecast(recipe, planned, processes), context_length(planned.folder, recipe.model)
    counted = "all of adapter.max_parameters" if getattr(recipe.adapter, "max_parameters", None) else "rank 1"
    result: dict[str, Any] = {
        "recipe": recipe.model_dump(mode="json"),
        "sources": {key: source for key, _, source in rows},
        "base": str(planned.folder),
        "layers": len(planned.targets),
        "left_out": planned.left_out,
        "trainable": planned.num_trainable(recipe),
        "ranks": f"chosen at init; counted here: {counted}" if auto else "final",
        "parameters": planned.num_total,
        "memory_bytes": memory.bytes,
        **({} if steps is None else dict(zip(("steps", "rows"), steps, strict=True))),
        "memory": {"rough": memory.rough, "device": memory.device, "processes": processes},
    }
    share = result["trainable"] / result["parameters"]
    keys, values = max(len(key) for key, _, _ in rows), min(40, max(len(value) for _, value, _ in rows))
    lines = [
        *(
            f"{key:{keys}}  {'-' if value == 'null' else value:{values}}  # {_short(source)}"
            for key, value, source in rows
        ),
        "",
        f"{result['trainable']:,} parameters train, the base has {result['parameters']:,} ({share:.2%}); adapters in "
        f"{result['layers']} layers of {planned.folder}",
        *notes_of(result),
        *([f"ranks are chosen at init from the spectra; counted here: {counted}"] if auto else []),
        *([f"{steps[0]:,} steps of {size} examples, if all {steps[1]:,} rows can be used"] if steps else []),
        _memory_line(memory, processes, recipe.data.max_length, context),
        "dry run: nothing was written",
    ]
    print_result(result, as_json, lines)


def _memory_line(memory: Forecast, processes: int, max_length: int, context: int | None) -> str:
    parts = {key: _size(value) for key, value in memory.bytes.items() if value >= 2**16}
    total = parts.pop("total")
    whose = "the GPU" if memory.device == "cuda" else "the process (no GPU here)"
    if processes > 1:
        whose = (
            f"each of {processes} GPUs" if memory.device == "cuda" else f"each of {processes} processes (no GPU here)"
        )
    longest = f"data.max_length ({max_length:,} tokens)"
    if context is not None and context < max_length:
        longest = f"the model's context ({context:,} tokens)"
    about = f"roughly ({memory.rough}) " if memory.rough else ""
    return (
        f"memory of training, the most that {whose} holds at once if rows are as long as {longest}: {about}{total} "
        f"({', '.join(f'{key} {size}' for key, size in parts.items())})"
    )


def _short(source: str) -> str:
    """A file of the working directory without the path to it."""
    return source.removeprefix(f"{Path.cwd()}/")


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"
