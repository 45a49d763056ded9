"""A run as `init` made it, read back and checked, for all that goes on from it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from pissa_cli.adapters.start import Adapter
from pissa_cli.base.integrity import require_files, require_model, require_sealed
from pissa_cli.base.model import resolve_base
from pissa_cli.base.peft_files import read_peft
from pissa_cli.errors import UsageError
from pissa_cli.run.reached import start_of
from pissa_cli.run.rundir import Run, require_closed, run_of
from pissa_cli.schema.recipe import Recipe

FORMAT = 2  # of the manifest


def open_run(recipe: Recipe) -> tuple[Run, dict[str, Any]]:
    """The run folder of a recipe and its manifest, after checking that the recipe asks for what was made there.

    Raises UsageError for a folder that is no run, and for one whose start was made from another model, adapter or
    seed. A base that was moved is fine: its fingerprint counts, not its name.
    """
    run = run_of(recipe)
    manifest = run.read_manifest()
    require_closed(run)
    require_sealed(manifest, run.manifest)
    if manifest["format"] != FORMAT:
        raise UsageError(
            f"{run.manifest}: of format {manifest['format']}, this version of pissa reads {FORMAT}",
            f"use that which made the run ({manifest['versions']['pissa']}), or start a new one",
        )
    wanted = start_of(recipe)
    for key, value in manifest["start"].items():
        if wanted.get(key) != value:
            raise UsageError(
                f"{run.folder}: this run was made with {key} = {value!r}, the recipe says {wanted.get(key)!r}",
                "set it as it was; for a new run name another --output, and to begin from the weights of this one: "
                f"pissa merge {shlex.quote(str(run.folder))}, then --model {shlex.quote(str(run.merged))}",
            )
    if [recipe.model.name, recipe.model.revision] != [manifest["base"]["name"], manifest["base"]["revision"]]:
        require_plain_base(manifest, recipe)
    return run, manifest


def require_plain_base(manifest: dict[str, Any], recipe: Recipe) -> Path:
    """The folder of the dense base that a run was made on, checked by fingerprint."""
    return require_model(resolve_base(recipe.model), manifest["base"])


def require_base(manifest: dict[str, Any], recipe: Recipe) -> Path:
    """The folder of the weights that a run computes with: `base/`, checked likewise, or the dense base."""
    if "stored_fingerprint" not in manifest["base"]:
        return require_plain_base(manifest, recipe)
    run = run_of(recipe)
    try:
        return require_model(run.base, manifest["base"], "stored_")
    except UsageError as error:
        error.hint = _again(run.base)
        raise


def frozen_base(recipe: Recipe) -> str:
    """What an adapter is valid on, as PEFT has it: the plain base, or `base/` where the run is now."""
    return str(run_of(recipe).base.absolute()) if recipe.model.bits == 4 else recipe.model.name


def read_start(run: Run, manifest: dict[str, Any]) -> tuple[dict[str, Any], Adapter]:
    """The configuration and adapter of `init/`, refused if they are not those that init wrote."""
    require_init(run, manifest)
    return read_peft(run.init, manifest["widest"])


def require_init(run: Run, manifest: dict[str, Any]) -> None:
    """UsageError for files of `init/` that are not those that init wrote."""
    require_files(run.init, manifest.get("init_hashes", {}), _again(run.init))


def _again(part: Path) -> str:
    """How to come by a folder of a run that init wrote: the same recipe gives the same bits."""
    made = f"pissa init {shlex.quote(str(part.parent))} --output NEW, and copy it from NEW/{part.name}"
    return f"bring the file back, or make it again: {made}"
