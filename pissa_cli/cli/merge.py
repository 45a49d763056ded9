"""`pissa merge`."""

from pathlib import Path
from typing import Annotated

import typer

from pissa_cli.cli import options
from pissa_cli.errors import UsageError


def merge_command(
    target: options.Target = None,
    push: Annotated[bool, typer.Option("--push", help="Upload the merged model to the Hub.")] = False,
    repo: Annotated[
        str | None, typer.Option("--repo", help="user/name; default <user>/<base>-<method>-r<rank>.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="With --push: replace what another base or tool has put there.")
    ] = False,
    output: options.Output = None,
    set_: options.Set = None,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Write one dense model, checked against the adapter; with --push, upload it in one commit, retried for 15 min."""
    loaded = options.load_recipe(target, set_, output=output, repo=repo)
    options.require_one_run(target, loaded)
    from pissa_cli.cli import dryrun, show
    from pissa_cli.run import reached
    from pissa_cli.run.rundir import run_of

    if not push and (force or repo is not None):
        raise UsageError("--repo and --force are about an upload, and there is none", "add --push, or leave them out")
    if not dry_run or run_of(loaded.recipe).exists():
        reached.require_trained(loaded.recipe)
    show.load_libraries(debug)
    if dry_run:
        dryrun.dry_run(loaded, as_json)
        return
    from pissa_cli.merge import merge
    from pissa_cli.outputs import hub

    recipe = loaded.recipe
    if push:
        hub.require_pushable(recipe, force)
    with show.counting("merge") as progress:
        result = merge(recipe, progress)
    lines = [f"{result['path']}: {result['bytes'] / 2**20:,.1f} MiB"]
    if result["max_logit_difference"] is None:
        lines.append("full fine-tuning: this is the trained model, there was nothing to merge")
    else:
        lines.append(
            f"largest logit difference to the adapter: {result['max_logit_difference']:.2e} "
            f"({result['relative_logit_difference']:.1e} relative)"
        )
    if push:
        show.say("uploading ...")
        result["url"] = hub.push(recipe, Path(result["path"]), force, show.say)
        lines.append(result["url"])
    show.print_result(result, as_json, lines)
