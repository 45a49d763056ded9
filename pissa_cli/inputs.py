"""What commands begin with, looked at before torch is there: a wrong path is answered at once."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

from pissa_cli.columns import require_columns
from pissa_cli.data_options import held_out_sources, sources_of
from pissa_cli.errors import UsageError
from pissa_cli.paths import holds_run, kind_of, run_around
from pissa_cli.recipe import ModelSection, Recipe
from pissa_cli.rows import is_local, read_rows
from pissa_cli.rundir import Run, is_vacant, require_writable, run_of

FIRST_ROWS = 1000
"""Of a file, in which every column has to come; training asks the same of so many."""


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


def require_data(recipe: Recipe) -> None:
    """UsageError where there is nothing to train on."""
    if recipe.data.train is None:
        raise UsageError("data.train: no training data given", "name a file or a Hub id: --set data.train=file.jsonl")


def require_rows(recipe: Recipe) -> None:
    """UsageError for local files of data that are not there or lack a column in their first rows. Data on the Hub is
    not looked at."""
    for source in dict.fromkeys(sources_of(recipe.data.train) + held_out_sources(recipe.data)):
        check_columns(source, recipe)


def check_columns(source: str, recipe: Recipe) -> None:
    """UsageError for a local file that is not there or lacks a column in its first rows."""
    if not is_local(source):
        return
    columns: dict[str, Any] = {}
    count, reason = 0, "it is empty"
    for count, (_, row) in enumerate(read_rows(source, FIRST_ROWS), start=1):
        if isinstance(row, dict):
            columns |= {name: value for name, value in row.items() if name not in columns}
        if count == 1:
            reason = row if isinstance(row, str) else "its rows are empty"
    whole = count < FIRST_ROWS
    require_columns(source, recipe.data, columns, whole)
    if whole and not columns:
        raise UsageError(f"{source}: no usable row ({reason})", "is this the file?")


def local_base(section: ModelSection) -> Path | None:
    """The folder of the base model; None for one on the Hub. UsageError as `require_model_folder`, and for a path to
    nothing."""
    path = Path(section.name)
    if path.is_dir():
        return require_model_folder(path)
    if path.is_file():
        raise UsageError(
            f"{section.name}: a file, not a model folder", "give the folder with config.json, safetensors and tokenizer"
        )
    if path.is_absolute() or section.name.startswith(".") or section.name.count("/") > 1 or section.name.endswith("/"):
        raise UsageError(
            f"{section.name}: no such folder",
            "check the path; one that has moved: --set model.name=FOLDER; on the Hub a model is user/name",
        )
    return None


def require_model_folder(path: Path) -> Path:
    """The folder; UsageError for one without config.json, for one that has more in it than a model, and for files that
    may not be read."""
    if not (path / "config.json").is_file():
        run = path if holds_run(path) else run_around(path)
        if run is not None:
            merge = f"pissa merge {shlex.quote(str(run))}"
            raise UsageError(f"{path}: a run, not a model", f"{merge}, and start from {run}/merged")
        if kind_of(path / "adapter_config.json"):
            hint = "merge it into its base (PEFT: merge_and_unload, then save_pretrained), and start from that"
            raise UsageError(f"{path}: an adapter, not a model", hint)
        raise UsageError(f"{path}: not a model folder (no config.json)", "give the folder that holds it")
    if (path / "adapter_config.json").is_file():
        raise UsageError(
            f"{path}: a model and an adapter in one folder; transformers would add that to the model unasked",
            "remove adapter_config.json and adapter_model.safetensors, or merge them into the model first",
        )
    odd = next((inside for inside in sorted(path.iterdir()) if kind_of(inside) == "other"), None)
    if odd is not None:
        raise UsageError(f"{odd}: neither a file nor a folder, and would be waited for", "remove it")
    files = (inside for end in ("json", "safetensors") for inside in sorted(path.glob(f"*.{end}")) if inside.is_file())
    closed = next((file for file in files if not os.access(file, os.R_OK)), None)
    if closed is not None:  # safetensors says that it is not there
        raise UsageError(f"{closed}: cannot be read", "check the rights to read it")
    return path
