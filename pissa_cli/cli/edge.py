"""The edge: the one place where exceptions become messages and exit codes."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO, cast

import typer
from rich.console import Console
from rich.markup import escape

from pissa_cli.errors import LAUNCHED, Interrupted, PissaError, UsageError, cannot_write, in_one_line

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
NO_MEMORY = r"(can't|[Cc]annot) allocate memory|out of memory|CUBLAS_STATUS_ALLOC_FAILED"
LESS_MEMORY = {
    "train": "lower train.micro_batch_size or set train.gradient_checkpointing",
    "eval": "lower eval.batch_size, or eval.max_new_tokens",
    "others": "free memory that other programs hold",
}
LOST = ("gloo", "NCCL", "Connection closed by peer")
"""Words of torch's when another process is gone."""
MODELS_CODE = re.compile(r"[/\\](transformers[/\\](models|generation)|transformers_modules)[/\\]")
"""In the paths of files that define models, and how they write."""
CALLED_BY_MODELS = re.compile(
    r"[/\\](torch|transformers(?![/\\](models|generation))|lib[/\\]python3\.\d+(?![/\\]\w+-packages))[/\\]|^<frozen "
)
"""torch, the rest of transformers, and Python's own library."""
ClickException = typer.BadParameter.__mro__[2]
"""The root of the parser's errors, wherever typer keeps its click."""
document: int | None = None
"""The descriptor that was stdout, where that is left to one JSON document."""


def keep_stdout_for_document() -> None:
    """Send what libraries, and programs that are started, write to stdout to stderr instead."""
    global document
    document = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())


def of_several() -> bool:
    """Whether a launcher started this process as one of several."""
    return os.environ.get("WORLD_SIZE", "1") not in ("", "1")


def leave_at_once(code: int) -> NoReturn:
    """End the process without what the interpreter does at its end. Threads of gloo or DeepSpeed may abort that, after
    an interrupt `python -m` may end by SIGINT there, and Triton prints what the collector passes over (`for_good`)."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, AttributeError):  # a reader that is gone
            stream.flush()
    os._exit(code)


class _Lasting:
    """A stream whose reader may go: what is written then is lost, and nothing else."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def settle_streams() -> None:
    """Go on working where a stream is closed or knows no such letters, or nobody reads the progress any more."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # the next file that is opened would take its descriptor
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    sys.stderr = cast(TextIO, _Lasting(sys.stderr))


def print_document(content: dict[str, Any]) -> None:
    """The one JSON document, on stdout."""
    text = json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n"
    if document is None:
        sys.stdout.write(text)
        return
    with (
        contextlib.suppress(BrokenPipeError),  # the reader has seen enough
        os.fdopen(os.dup(document), "w", encoding="utf-8", errors="backslashreplace") as stream,
    ):
        stream.write(text)


def run_guarded(run: Callable[[], Any], arguments: Sequence[str]) -> int:
    """Run a command and return its exit code. With --debug among the arguments, exceptions show their traceback."""
    debug = any(argument in ("-v", "--debug") for argument in arguments)
    later = "train" in arguments[:1] and of_several() and os.environ.get("RANK", "0") != "0"
    as_json = "--json" in arguments and not later
    try:
        code = run()
        if code == 130:  # what newer versions of typer make of it
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        failure: PissaError = Interrupted("interrupted", None)
    except Exception as error:
        if isinstance(error, ClickException):
            return _show_usage(error, next(iter(arguments), ""), as_json)
        if debug:
            Console(stderr=True).print_exception()
        failure = _explained(error, next(iter(arguments), ""))
    _show(failure, as_json)
    return failure.exit_code


def _explained(error: Exception, command: str) -> PissaError:
    """The error itself if it is meant for users, else what can be said of it."""
    text = str(error)
    if isinstance(error, PissaError):
        return error
    if isinstance(error, OSError) and error.errno in DISK:
        return cannot_write(error.filename or "the disk", error)
    file = getattr(error, "filename", None)
    if isinstance(error, OSError) and error.errno == errno.EIO:  # of reading as of writing
        place = f"{file}: " if file else ""
        return PissaError(f"{place}the disk fails: {error.strerror}", "check it; what was saved before is as it was")
    if isinstance(error, PermissionError) and file:
        return UsageError(f"{file}: no access ({error.strerror})", "check the rights to it and to the folders above")
    if isinstance(error, ModuleNotFoundError) and error.name and "." not in error.name:
        package = "pyyaml" if error.name == "yaml" else error.name
        return UsageError(f"the package {package} is not installed", f"pip install {package}")
    if type(error).__name__ in ("OutOfMemoryError", "MemoryError") or re.search(NO_MEMORY, text):
        return PissaError("out of memory", LESS_MEMORY[command if command in LESS_MEMORY else "others"])
    if "No usable temporary directory" in text:
        return PissaError("there is no folder for temporary files", "set TMPDIR to one that can be written")
    if of_several() and any(word in text for word in LOST):
        return PissaError(
            "another process is gone: killed, or out of memory (the launcher says which)",
            "pissa train RUN --resume goes on; where memory ran out, with a lower train.micro_batch_size",
        )
    raised = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    raised = [file for file in raised if not CALLED_BY_MODELS.search(file)]
    if raised and MODELS_CODE.search(raised[-1]):
        return PissaError(
            f"the model's own code fails ({Path(raised[-1]).name}, {type(error).__name__}: {in_one_line(error)})",
            "it may need more than a text, or another config.json; where transformers alone runs it over a text, "
            "please report this with what --debug shows",
        )
    return PissaError(
        f"unexpected {type(error).__name__}: {error}", "run again with --debug for the traceback, and please report it"
    )


def _show_usage(error: Any, command: str, as_json: bool) -> int:
    """What the parser says of flags and arguments; returns the exit code."""
    from pissa_cli.schema.recipe_errors import advice_on_flag

    found = re.search(r" argument.*\(([\w.]+=)", error.format_message())
    advice = advice_on_flag(getattr(error, "option_name", None) or (found[1] if found else ""), command)
    error.show()
    if advice:
        _console().print(f"[bold]next:[/]  {escape(advice)}")
    if as_json:
        _print_failure(error.format_message(), advice, 2)
    return 2


def _console() -> Console:
    return Console(stderr=True, soft_wrap=True, highlight=False, emoji=False)  # a name may hold ":train:"


def _show(failure: PissaError, as_json: bool) -> None:
    console = _console()
    console.print(f"[bold red]error:[/] {escape(failure.message)}")
    if failure.hint:
        console.print(f"[bold]next:[/]  {escape(failure.hint)}")
    if LAUNCHED in os.environ:
        _tell_launcher(Path(os.environ[LAUNCHED]), failure)
    elif as_json:
        _print_failure(failure.message, failure.hint, failure.exit_code)


def _tell_launcher(file: Path, failure: PissaError) -> None:
    """Leave the failure there, whole or not at all (this process may be killed any moment), unless another one has."""
    own = file.with_name(f"{os.getpid()}.json")
    with contextlib.suppress(OSError):
        own.write_text(json.dumps(_document(failure.message, failure.hint, failure.exit_code)), encoding="utf-8")
        os.link(own, file)


def _print_failure(message: str, hint: str | None, code: int) -> None:
    with contextlib.suppress(OSError):  # the exit code says it, too
        print_document(_document(message, hint, code))


def _document(message: str, hint: str | None, code: int) -> dict[str, Any]:
    return {"error": message, "hint": hint, "exit_code": code}
