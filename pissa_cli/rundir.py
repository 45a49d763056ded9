"""The run folder: what lies where, how it is written whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pissa_cli.errors import PissaError, UsageError

PROVENANCE = "pissa.json"


@dataclass(frozen=True)
class Run:
    """The paths of a run folder."""

    folder: Path

    @property
    def recipe(self) -> Path:
        return self.folder / "recipe.yaml"

    @property
    def manifest(self) -> Path:
        return self.folder / "manifest.json"

    @property
    def init(self) -> Path:
        return self.folder / "init"

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    @property
    def merged(self) -> Path:
        return self.folder / "merged"

    @property
    def quantized(self) -> Path:
        return self.folder / "quantized"

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    def exists(self) -> bool:
        """Whether init finished here."""
        return self.manifest.is_file() and self.recipe.is_file()

    def read_manifest(self) -> dict[str, Any]:
        """The manifest; UsageError if there is none, or it is not one of ours."""
        if not self.exists():
            raise UsageError(f"{self.folder}: not a run folder", "run `pissa init` or `pissa train` first")
        return read_json(self.manifest)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; UsageError names a file that is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{path}: missing or damaged ({error})", "bring the file back, or make the folder that holds it again"
        ) from None
    if not isinstance(content, dict):
        raise UsageError(
            f"{path}: expected a JSON object", "the file is not one that pissa wrote; make the folder again"
        )
    return content


def write_text(path: Path, text: str) -> None:
    """Write a small file under a temporary name, then rename it into place."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _disk_error(path, error) from None


def write_json(path: Path, content: Any) -> None:
    """`write_text` of indented JSON."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def require_free(output: Path, own: Path) -> None:
    """UsageError for an output folder with something in it, unless it is `own`, the run's place for this."""
    if output.absolute() != own.absolute() and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(f"{output}: exists already", "remove it, or name another with --output")


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """A temporary folder that becomes `final` when the block ends well, and vanishes otherwise.

    `final` is replaced if it is there. What a killed process left is cleared first: half-made folders are removed, and
    a `final` that was set aside but not yet replaced is put back.
    """
    aside = final.parent / f".{final.name}.aside"
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        if aside.is_dir() and not final.exists():
            aside.rename(final)
        for leftover in (aside, *final.parent.glob(f".{final.name}.tmp-*")):
            shutil.rmtree(leftover, ignore_errors=True)
        temporary = final.parent / f".{final.name}.tmp-{secrets.token_hex(4)}"
        temporary.mkdir()
    except OSError as error:
        raise _disk_error(final, error) from None
    try:
        yield temporary
        _put_in_place(temporary, final, aside)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _put_in_place(temporary: Path, final: Path, aside: Path) -> None:
    try:
        _sync(temporary)
        if final.is_dir() and any(final.iterdir()):
            final.rename(aside)
        temporary.rename(final)
        shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise _disk_error(final, error) from None


def _sync(folder: Path) -> None:
    """Bring a folder's files to the disk, so that the rename never outruns their content."""
    for path in [*(p for p in folder.rglob("*") if p.is_file()), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _disk_error(path: Path, error: OSError) -> PissaError:
    return PissaError(
        f"{path}: cannot write: {error.strerror or error}",
        "check the space and the right to write; what was saved before is intact",
    )
