"""What a name given by the user stands for on the disk."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pissa_cli.errors import UsageError

Kind = Literal["file", "folder", "other"]
RUN_RECIPE = "recipe.yaml"
RUN_MANIFEST = "manifest.json"
PARTS = ("init/adapter_model.safetensors", "adapter/pissa.json", "checkpoints/step-*")
"""Of a run, any of which tells one."""


def kind_of(name: str | Path, source: str = "") -> Kind | None:
    """What is there under a name, links followed; None for nothing.

    source: where the name was written, for the message. Raises UsageError for a name that no file can have, for one
    that may not be looked up, and for a text with `~`, which shells leave as it is in `--output=~/x` and `--set`.
    """
    before = f"{source}: " if source else ""
    if isinstance(name, str) and (written_out := os.path.expanduser(name)) != name:  # noqa: PTH111  ~nobody is a name
        raise UsageError(f"{before}{name}: ~ stands for a folder in a shell alone", f"write it out: {written_out}")
    if not str(name).isprintable():
        raise UsageError(f"{before}{str(name)!r}: a name with a character that cannot be printed", "rename it")
    try:
        mode = Path(name).stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        text = str(name) if len(str(name)) <= 300 else f"{str(name)[:300]} ..."
        raise UsageError(f"{before}{text}: {reason}", "check the name, and the rights to what it names") from None
    return "folder" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else "other"


def located(name: str, roots: Sequence[Path], source: str) -> str:
    """The absolute path of a name under the first of the roots that has it, else the name. Raises as `kind_of`."""
    found = next((root / name for root in roots if name and kind_of(root / name, source)), None)
    if found is None:
        return name
    # a file keeps the name that it has here, which tells its kind, also where that is a link
    return str(found.resolve() if found.is_dir() else found.parent.resolve() / found.name)


def holds_run(folder: Path) -> bool:
    """Whether `pissa init` or `pissa train` has made this folder."""
    return kind_of(folder / RUN_RECIPE) == kind_of(folder / RUN_MANIFEST) == "file"


def run_with(recipe: Path) -> Path | None:
    """The run whose recipe a file is. UsageError where that has lost its manifest: the recipe names the folder that the
    run was made in, which is another one where it was copied."""
    folder = recipe.parent
    if recipe.name != RUN_RECIPE:
        return None
    if (folder / RUN_MANIFEST).is_file():
        return folder
    if any(next(folder.glob(part), None) for part in PARTS):
        raise UsageError(
            f"{folder}: a run without its {RUN_MANIFEST}",
            "copy that there, too; for a new run by the same recipe put a copy of it elsewhere",
        )
    return None


def run_around(folder: Path) -> Path | None:
    """The run that a folder is a part of, as its adapter/ and its checkpoints/step-N are."""
    return next((outer for outer in folder.absolute().parents[:2] if holds_run(outer)), None)


def as_recipe(file: Path) -> Path:
    """The file. UsageError for rows of data, and for a file of a run that is none of YAML."""
    if file.suffix in (".jsonl", ".csv", ".tsv", ".parquet"):
        raise UsageError(f"{file}: rows of data, no recipe", f"they go with one: --set data.train={file}")
    if file.suffix in (".json", ".safetensors") and (run := run_around(file)) is not None:
        raise UsageError(f"{file}: a file of a run, no recipe", f"name the run: {run}")
    return file


def is_lfs_pointer(file: Path) -> bool:
    """Whether a file is what `git clone` leaves of a large one where Git LFS is not installed."""
    try:
        with file.open("rb") as stream:
            return stream.read(40).startswith(b"version https://git-lfs")
    except OSError:  # whoever reads it says so
        return False
