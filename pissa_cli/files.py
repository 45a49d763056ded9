"""Files and folders written whole or not at all, by one process at a time."""

from __future__ import annotations

import errno
import glob
import json
import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pissa_cli.errors import UsageError, cannot_write
from pissa_cli.paths import RUN_MANIFEST

LAST = (RUN_MANIFEST, "config.json", "adapter_config.json")  # by which others know a folder
LEFTOVER = re.compile(r"\.(\.?lock|tmp-[0-9a-f]{8})")  # within a folder that is filled where it is
UNLOCKABLE = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)


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
    """Write a small file under a temporary name, sync it, then rename it into place. Half a character (a lone
    surrogate) is escaped, as JSON has it."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
        _sync(temporary)
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise cannot_write(path, error) from None


def write_json(path: Path, content: Any) -> None:
    """`write_text` of indented JSON."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def require_writable(folder: Path) -> None:
    """PissaError for a folder that cannot be written, or made: before the work whose result is for it."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise cannot_write(there, NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)))
    if not os.access(there, os.W_OK):
        raise cannot_write(folder, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))


def is_vacant(folder: Path) -> bool:
    """Whether there is nothing, or an empty folder, but for what a killed process left in it."""
    if not folder.is_dir():
        return not folder.exists()
    return all(LEFTOVER.fullmatch(path.name) for path in folder.iterdir())


def lock_of(folder: Path) -> Path:
    """The file that is locked: beside the folder, or in it where its parent cannot be written."""
    if folder.is_dir() and not os.access(folder.parent, os.W_OK):
        return folder / ".lock"
    return folder.parent / f".{folder.name}.lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from writing `folder` in this block; the system lifts the lock of one that was killed.

    On a file system without locks it keeps nobody out. Raises UsageError, naming the process, if another has it.
    """
    path = lock_of(folder)
    lock = FileLock(path, fallback_to_soft=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()  # where no file can be made filelock says that another process has it
        lock.acquire(blocking=False)
    except Timeout:
        holder = ""
        with suppress(OSError):
            holder = path.read_text(encoding="utf-8").strip()
        raise UsageError(
            f"{folder}: {holder or 'another process'} is writing here", "wait for it, or use another --output"
        ) from None
    except OSError as error:
        if error.errno not in UNLOCKABLE:
            raise cannot_write(folder, error) from None
        yield
        return
    try:
        with suppress(OSError):
            path.write_text(f"process {os.getpid()} on {platform.node()} (since {time.ctime()})", encoding="utf-8")
        yield
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)  # whoever waits for this very file sees that it has no name any more
        lock.release()


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """A temporary folder that becomes `final` when the block ends well, and vanishes otherwise.

    `final` is replaced if it is there. What a killed process left is cleared first: half-made folders are removed, and
    a `final` that was set aside but not yet replaced is put back. UsageError if another process is at it.
    """
    final = final.resolve() if final.is_symlink() else final
    with locked(final):
        yield from _whole_folder(final)


def _whole_folder(final: Path) -> Iterator[Path]:
    inside = final.is_dir() and is_vacant(final)  # it may be a mount, a working directory, or all that one may write
    aside, beside = final.parent / f".{final.name}.aside", f".{final.name}.tmp-"
    try:
        if aside.is_dir() and not final.exists():
            aside.rename(final)
        found = [aside, *final.parent.glob(f"{glob.escape(beside)}*"), *(final.glob(".tmp-*") if inside else ())]
        for leftover in found:
            shutil.rmtree(leftover, ignore_errors=True)
        number = secrets.token_hex(4)
        temporary = final / f".tmp-{number}" if inside else final.parent / f"{beside}{number}"
        temporary.mkdir()
    except OSError as error:
        raise cannot_write(final, error) from None
    try:
        yield temporary
        _put_in_place(temporary, final, aside)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _put_in_place(temporary: Path, final: Path, aside: Path) -> None:
    try:
        _sync(temporary)
        if temporary.parent == final:
            for path in sorted(temporary.iterdir(), key=lambda path: path.name in LAST):
                path.rename(final / path.name)
            return
        if final.is_dir():
            final.rename(aside)
        temporary.rename(final)
        shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise cannot_write(final, error) from None


def remove_folder(folder: Path) -> None:
    """Remove a folder so that no part of it is ever seen under its name."""
    doomed = folder.parent / f".{folder.name}.tmp-{secrets.token_hex(4)}"
    with suppress(OSError):
        folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def set_aside(path: Path) -> Path:
    """Rename what is damaged to `damaged-<name>`, in place of an older one, and return that."""
    aside = path.with_name(f"damaged-{path.name}")
    remove_folder(aside)
    try:
        return path.rename(aside)
    except OSError as error:
        raise cannot_write(aside, error) from None


def _sync(made: Path) -> None:
    """Bring a file, or a folder with all that is in it, to the disk, so that the rename never outruns it."""
    for path in [*(p for p in made.rglob("*") if p.is_file() or p.is_dir()), made]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
