"""The options that commands share, each defined once, and the recipe they make."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pissa_cli.errors import UsageError
from pissa_cli.paths import RUN_RECIPE, holds_run

if TYPE_CHECKING:
    from pissa_cli.schema.recipe_file import Loaded

Target = Annotated[
    str | None,
    typer.Argument(
        metavar="RECIPE|RUN", help="A recipe (file or name) or a run folder. Default: the run in out/, else flags only."
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any key of the recipe, e.g. train.lr=2e-5. Repeatable."),
]
Output = Annotated[str | None, typer.Option("--output", "-o", help="The run folder.")]
Model = Annotated[str | None, typer.Option("--model", "-m", help="Alias, Hub id or folder of the base model.")]
Method = Annotated[str | None, typer.Option("--method", help="pissa, lora, loftq, vera, svfit or full.")]
Rank = Annotated[str | None, typer.Option("--rank", "-r", metavar="N|auto", help="Rank of the trained part.")]
Svd = Annotated[str | None, typer.Option("--svd", help="exact, or accuracy of the residual: fast (0.1%) or e.g. 1%.")]
Bits = Annotated[int | None, typer.Option("--bits", help="Storage of frozen weights: 4 (NF4), 16 or 32.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Of everything random.")]
DoubleQuant = Annotated[
    bool | None,
    typer.Option(
        "--double-quant/--no-double-quant", help="NF4: quantize the block scales as well; default: the recipe's."
    ),
]
Absmax = Annotated[
    Literal["fitted", "largest"] | None,
    typer.Option(
        "--absmax",
        help="NF4 block scales: fitted for the least error, or largest, bitsandbytes' own; default: the recipe's.",
    ),
]
Checkpoint = Annotated[int | None, typer.Option("--checkpoint", help="Step of the checkpoint; default: the result.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved recipe and the plan; touch nothing.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout; everything else on stderr.")]
Debug = Annotated[bool, typer.Option("-v", "--debug", help="Show the libraries' messages, and tracebacks.")]


def load_recipe(
    target: str | None, sets: list[str] | None, eval_data: dict[str, str] | None = None, **flags: Any
) -> "Loaded":
    """The recipe from a target, named flags, `--data` of eval and --set. flags: model, rank, ...; None is not given."""
    from pissa_cli.schema.recipe_file import load
    from pissa_cli.schema.yamlfile import parse_scalar

    if flags.get("rank") is not None:
        flags["rank"] = parse_scalar(flags["rank"], "--rank")
    places = {
        "model": ("model", "name"),
        "method": ("adapter", "method"),
        "rank": ("adapter", "rank"),
        "svd": ("adapter", "svd"),
        "bits": ("model", "bits"),
        "seed": ("seed",),
        "output": ("output",),
        "bench": ("eval", "bench"),
        "limit": ("eval", "limit"),
        "judge_url": ("eval", "judge_url"),
        "judge_model": ("eval", "judge_model"),
        "repo": ("hub", "repo"),
    }
    given: dict[tuple[str, ...], tuple[str, Any]] = {
        ("eval", "data", bench): ("--data", file) for bench, file in (eval_data or {}).items()
    }
    given |= {
        places[name]: (f"--{name.replace('_', '-')}", value) for name, value in flags.items() if value is not None
    }
    loaded = load(target, given, sets or [])
    run = str(Path(loaded.recipe.output) / RUN_RECIPE)
    if target is None and any(source.startswith(f"{run}:") for source in loaded.sources.values()):
        from pissa_cli.cli.show import say

        why = "as none was named" if flags.get("output") is None else "which --output names"
        say(f"{loaded.recipe.output}: the run there, {why}")
        if flags.get("model") is not None and (own := _own_values(loaded, f"{run}:")):  # given as for a new run
            say(f"by the recipe there: {', '.join(own)}; for a new run name another --output")
    return loaded


def require_one_run(target: str | None, loaded: "Loaded") -> None:
    """UsageError where a run is named and --output, or --set output, names another, which would be taken instead."""
    output, named = loaded.recipe.output, Path(target or "")
    run = named.parent if named.name == RUN_RECIPE else named
    if target is not None and holds_run(run) and run.resolve() != Path(output).resolve():
        flag = loaded.sources[("output",)]
        merged = f"pissa export {shlex.quote(target)} --as merged --output {shlex.quote(output)}"
        raise UsageError(
            f"{target} is the run, {flag} names another, {output}",
            f"leave {flag} out; its merged model in a folder elsewhere: {merged}",
        )


def _own_values(loaded: "Loaded", place: str) -> list[str]:
    """The method, and what else was written at a place and is no default of it."""
    from pissa_cli.schema.recipe import ModelSection, Recipe
    from pissa_cli.schema.recipe_file import Loaded, listing

    adapter = loaded.recipe.adapter
    plain = Recipe.model_construct(model=ModelSection(name=loaded.recipe.model.name), adapter=type(adapter)())
    defaults = {(key, value) for key, value, _ in listing(Loaded(plain, {})) if key != "adapter.method"}
    return [
        f"{key} {value}"
        for key, value, source in listing(loaded)
        if source.startswith(place) and value != "null" and (key, value) not in defaults
    ]
