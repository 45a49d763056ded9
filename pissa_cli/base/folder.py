"""The folder of a base model, and what may not be in it. Knows no torch."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from pissa_cli.errors import UsageError
from pissa_cli.paths import holds_run, kind_of, run_around
from pissa_cli.schema.recipe import ModelSection


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
