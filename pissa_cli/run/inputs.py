"""What commands begin with, looked at before torch is there: a wrong path is answered at once."""

from __future__ import annotations

from pissa_cli.base.folder import local_base
from pissa_cli.errors import UsageError
from pissa_cli.files import is_vacant, require_writable
from pissa_cli.run.rundir import Run, run_of
from pissa_cli.schema.recipe import Recipe


def require_start(recipe: Recipe, resume: bool = False) -> None:
    """UsageError for an output folder with something else in it or without what is to be resumed, and for a local base
    that is none."""
    run = run_of(recipe)
    if not run.exists():
        if resume:
            raise UsageError(f"{run.folder}: nothing to resume", "start it without --resume")
        require_place(run)
        local_base(recipe.model)


def require_scored(recipe: Recipe) -> None:
    """UsageError where no run was made yet, by which a model without training can be scored, too."""
    run = run_of(recipe)
    if not run.exists():
        raise UsageError(
            f"{run.folder}: not a run folder",
            "run `pissa train` first; to score a model as it is: `pissa init` with the same recipe or --set, "
            "then eval --compare-base",
        )
    run.read_manifest()


def require_place(run: Run) -> None:
    """UsageError for a folder with something else in it, PissaError for one that cannot be written."""
    if not is_vacant(run.folder):
        raise UsageError(f"{run.folder}: exists and is not a run folder", "name another with --output")
    require_writable(run.folder)
