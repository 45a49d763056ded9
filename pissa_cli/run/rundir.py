"""The run folder: what lies where in it, what may not, and what a killed training leaves there."""

from __future__ import annotations

import os
import shutil
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

from pissa_cli.errors import PissaError, UsageError
from pissa_cli.files import is_vacant, lock_of, locked, read_json
from pissa_cli.paths import RUN_MANIFEST, RUN_RECIPE, holds_run, kind_of
from pissa_cli.schema.recipe import Recipe

PROVENANCE = "pissa.json"
PICTURE = "loss.png"


class Run:
    """The paths of a run folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.recipe = folder / RUN_RECIPE
        self.manifest = folder / RUN_MANIFEST
        self.init = folder / "init"
        self.base = folder / "base"
        self.checkpoints = folder / "checkpoints"
        self.adapter = folder / "adapter"
        self.merged = folder / "merged"
        self.quantized = folder / "quantized"
        self.int4 = folder / "int4"
        self.exported = folder / "exported"
        self.scores = folder / "eval"
        self.metrics = folder / "metrics.jsonl"
        self.made_from_result = [self.merged, self.quantized, self.int4, self.exported, self.scores]

    def exists(self) -> bool:
        """Whether init finished here."""
        return holds_run(self.folder)

    def read_manifest(self) -> dict[str, Any]:
        """The manifest as it is; UsageError if there is none, or no JSON object. `started.open_run` checks it."""
        if not self.exists():
            raise UsageError(f"{self.folder}: not a run folder", "run `pissa init` or `pissa train` first")
        return read_json(self.manifest)


def run_of(recipe: Recipe) -> Run:
    """The run folder of a recipe, be it there or not."""
    return Run(Path(recipe.output))


def require_free(output: Path, own: Path) -> None:
    """UsageError for an output folder with something in it, or as `kind_of`, unless it is `own`, the run's place for
    this."""
    if output.absolute() != own.absolute() and kind_of(str(output), "--output") and not is_vacant(output):
        raise UsageError(f"{output}: exists already", "name another with --output")


def require_closed(run: Run) -> None:
    """UsageError for a link that leads out of a run folder, which would be written through, for a pipe or device, which
    would be waited for, and for a file in the place of a folder or the other way round."""
    root = run.folder.resolve()
    for parent, folders, files in os.walk(run.folder):
        for path in (Path(parent, name) for name in (*folders, *files)):
            try:
                mode = path.lstat().st_mode
            except FileNotFoundError:  # a training removes its old checkpoints
                continue
            if stat.S_ISLNK(mode):
                if not Path(os.path.realpath(path)).is_relative_to(root):
                    raise UsageError(f"{path}: a link that leads out of the run folder", "put what it stands for here")
            elif not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                raise UsageError(f"{path}: neither a file nor a folder", "remove it")
    files_of_run = [run.metrics, *(run.folder / name for name in (PICTURE, "report.json", "report.png"))]
    folders_of_run = [run.init, run.base, run.checkpoints, run.adapter, *run.made_from_result]
    for paths, is_kind, kind in ((files_of_run, Path.is_file, "file"), (folders_of_run, Path.is_dir, "folder")):
        for path in paths:
            if os.path.lexists(path) and not is_kind(path):
                raise UsageError(f"{path}: not a {kind}", "remove it")


def clear_leftovers(run: Run) -> None:
    """Remove what a killed training left half-written. Only for the process that has the run's lock."""
    small = (run.recipe.name, run.metrics.name, PICTURE)
    hidden = (*run.checkpoints.glob(".*"), *run.base.glob(".generation_config.json.*"))
    for path in [*hidden, *(p for name in small for p in run.folder.glob(f".{name}.*"))]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink()
    for folder in (run.folder.absolute(), run.adapter, *run.made_from_result[:-1]):
        if lock_of(folder).exists():
            with suppress(PissaError), locked(folder):
                pass  # nobody has it, and its release removes it
