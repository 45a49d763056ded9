"""What the fuzz tests share: how many examples, a command in this process, and proof that nothing else was touched."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from conftest import Outcome
from hypothesis import HealthCheck, Phase, seed, settings

FULL = os.environ.get("PISSA_FUZZ") == "1"
SEED = int(os.environ.get("PISSA_FUZZ_SEED", "0"))
PATIENCE = 120
"""Seconds after which a command hangs."""
_WRITES = {"os.mkdir": (0,), "os.rename": (0, 1), "os.remove": (0,), "os.rmdir": (0,), "os.truncate": (0,)}
_WRITES |= {"os.chmod": (0,), "os.link": (1,), "os.symlink": (1,)}
_FOLDERS = {"os.mkdir": 2, "os.remove": 1, "os.rmdir": 1}
"""Where an event says which open folder a relative path is in."""
_written: list[str] | None = None


def examples(full: int, quick: int) -> Callable[[Any], Any]:
    """A test of `full` examples by PISSA_FUZZ_SEED if PISSA_FUZZ is 1, else of `quick` ones, always the same."""

    def decorate(test: Any) -> Any:
        profile = settings(
            max_examples=full if FULL else quick,
            derandomize=False,
            database=None,
            deadline=None,
            phases=[Phase.generate, Phase.shrink] if FULL else [Phase.generate],
            suppress_health_check=list(HealthCheck),
            print_blob=False,
        )
        return seed(SEED)(profile(test))

    return decorate


class Hangs(BaseException):
    """A command that does not end."""


def run(*arguments: Any) -> Outcome:
    """`pissa ARGUMENTS` in this process, as its entry point would; Hangs after PATIENCE seconds."""
    from pissa_cli.cli import app
    from pissa_cli.cli.edge import run_guarded

    words = [str(argument) for argument in arguments]
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", errors) for errors in ("strict", "backslashreplace"))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), patience():
        code = run_guarded(lambda: app(words, standalone_mode=False), words)
    texts = []
    for stream in (out, err):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode())  # type: ignore[attr-defined]
    return Outcome(code, *texts)


@contextlib.contextmanager
def patience() -> Iterator[None]:
    def give_up(*_: Any) -> None:
        raise Hangs

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(PATIENCE)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def problem(outcome: Outcome, codes: tuple[int, ...] = (0, 1, 2)) -> str | None:
    """What is wrong with how a command ended: another code, a traceback, or what nobody expected."""
    if outcome.code not in codes:
        return f"exit code {outcome.code}: {outcome.err}"
    if "Traceback" in outcome.err or "unexpected " in outcome.err.partition("error:")[2][:12]:
        return outcome.err
    if outcome.code and outcome.err.count("error:") < 1:
        return f"exit code {outcome.code} without a word: {outcome.err}"
    return None


def tree(folder: Path, without: Path | None = None) -> dict[str, str]:
    """Every path under `folder`, but `without` and what is in it, with what it is or holds."""
    found = {}
    for parent, folders, files in os.walk(folder):
        here = Path(parent)
        folders[:] = [name for name in folders if here / name != without]
        for name in [*folders, *files]:
            path = here / name
            if path == without:
                continue
            if path.is_symlink():
                found[str(path)] = f"-> {path.readlink()}"
            elif path.is_file():
                found[str(path)] = hashlib.md5(path.read_bytes()).hexdigest()
            else:
                found[str(path)] = oct(path.lstat().st_mode)
    return found


@contextlib.contextmanager
def writes() -> Iterator[list[str]]:
    """The paths that Python code opens for writing, makes, moves or removes in the block, wherever they are."""
    global _written
    if not _installed:
        sys.addaudithook(_audit)
        _installed.append(True)
    _written = found = []
    try:
        yield found
    finally:
        _written = None


_installed: list[bool] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _written is None:
        return
    if event == "open":
        path, mode, flags = arguments
        writing = any(letter in mode for letter in "wax+") if isinstance(mode, str) else False
        if not writing and not (isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            return
        paths = [path]
    elif event == "os.mkdir" and Path(arguments[0]).is_dir():  # as with exist_ok
        return
    elif event in _WRITES:
        paths = [arguments[number] for number in _WRITES[event]]
        inside = arguments[_FOLDERS[event]] if event in _FOLDERS else -1
        if inside >= 0:
            paths = [str(Path(f"/proc/self/fd/{inside}").readlink() / os.fsdecode(path)) for path in paths]
    else:
        return
    for path in paths:
        if isinstance(path, bytes | str):
            whole = Path(os.fsdecode(path))
            _written.append(
                str(Path(os.path.realpath(whole.parent)) / whole.name) if event != "open" else os.path.realpath(whole)
            )


def outside(paths: list[str], output: Path | None) -> list[str]:
    """Those of the written paths that are not the output folder, in it, on the way to it, or staged beside it as a
    temporary folder that takes its name in the end; the cache of tokens is nobody's loss either."""
    import pissa_cli.data.sets

    roots = [os.devnull, pissa_cli.data.sets.HF_HOME]
    if output is not None:
        whole = output.resolve()
        roots += [str(whole), f"{whole.parent}/.{whole.name}.aside", f"{whole.parent}/.{whole.name}.lock"]
        temporary = f"{whole.parent}/.{whole.name}.tmp-"
        paths = [path for path in paths if not path.startswith(temporary) and not whole.is_relative_to(path)]
    return [path for path in paths if not any(path == root or path.startswith(f"{root}/") for root in roots)]
