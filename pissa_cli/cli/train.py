"""`pissa train`."""

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pissa_cli.cli import options
from pissa_cli.errors import LAUNCHED

if TYPE_CHECKING:
    from pissa_cli.schema.recipe import Recipe


def train_command(
    target: options.Target = None,
    model: options.Model = None,
    method: options.Method = None,
    rank: options.Rank = None,
    svd: options.Svd = None,
    bits: options.Bits = None,
    seed: options.Seed = None,
    output: options.Output = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")] = False,
    processes: Annotated[
        int | None, typer.Option("--processes", min=1, help="Train in N processes on this machine, one to a GPU.")
    ] = None,
    set_: options.Set = None,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Train by a recipe (init included, if it was not done). Ctrl-C saves a checkpoint; --resume goes on."""
    loaded = options.load_recipe(
        target, set_, model=model, method=method, rank=rank, svd=svd, bits=bits, seed=seed, output=output
    )
    from pissa_cli.cli import dryrun, edge, show
    from pissa_cli.data.columns import require_data, require_rows
    from pissa_cli.evals.benches import check_names
    from pissa_cli.run import inputs, reached

    check_names(loaded.recipe, loaded.sources)
    inputs.require_start(loaded.recipe, resume)
    reached.require_step(loaded.recipe, resume)
    if not dry_run:
        require_data(loaded.recipe)
    if LAUNCHED not in os.environ:  # by a process that has looked
        require_rows(loaded.recipe)
    show.load_libraries(debug)
    if dry_run:
        from pissa_cli.training.prepare import check_inputs

        dryrun.dry_run(loaded, as_json, processes or 1, check_inputs(loaded.recipe, resume))
        return
    recipe = loaded.recipe
    if processes is not None and processes > 1:
        from pissa_cli.training.launch import launch

        flags = [*(["--json"] if as_json else []), *(["--debug"] if debug else [])]
        with show.counting("init") as progress:
            launch(recipe, resume, processes, flags, edge.document, progress)
        return
    from pissa_cli.process import end_with_parent, one_of_several
    from pissa_cli.train import train

    if LAUNCHED in os.environ:
        end_with_parent(signal.SIGINT)  # the launcher, which may be killed together with the command
    with one_of_several() as state, show.training() as watch, show.counting("init") as progress:
        first = state.is_main_process
        if first:
            method, base = recipe.adapter.method, f"{recipe.model.name}, {recipe.model.bits} bits"
            show.say(f"train: {method} over {base}, into {recipe.output}")
        figures = train(recipe, resume, watch, progress)
    if first:
        show.print_result(figures, as_json, _summary(recipe, figures))


def _summary(recipe: "Recipe", figures: dict[str, Any]) -> list[str]:
    """What `train` has reached, for the person watching."""
    from pissa_cli.run.report import mean_losses

    held_out = f", held-out loss {figures['eval_loss']:.4f}" if figures["eval_loss"] is not None else ""
    lines = []
    if figures["loss_first"] is not None:
        begin, end, few = mean_losses(Path(recipe.output) / "metrics.jsonl")
        steps = "first and last step" if few == 1 else f"means of the first and last {few} steps"
        lines.append(f"loss {begin:.4f} -> {end:.4f} ({steps}){held_out}")
    taken = f"{figures['steps_taken']} of " if figures["steps_taken"] < figures["steps"] else ""
    cost = f"{figures['tokens']:,} tokens in {figures['seconds']:.1f} s"
    form = " (of twice the trained rank, for the plain base)" if recipe.doubles_rank else ""
    lines.append(f"{taken}{figures['steps']} steps, {cost}; {figures['result']}{form}")
    if (lowest := figures.get("lowest")) is not None:
        kept = f"; `pissa eval` and `pissa export` take it by --checkpoint {lowest['step']}"
        if not lowest["kept"]:
            more = "; not kept: with train.save_every as train.eval_every it is"
            kept = "" if recipe.adapter.method == "full" else more
        lines.append(f"held-out loss was lowest at step {lowest['step']}: {lowest['eval_loss']:.4f}{kept}")
    return lines
