"""What commands print: progress on stderr (a bar on a terminal, plain lines elsewhere), results on stdout."""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from pissa_cli.cli.edge import print_document
from pissa_cli.heap import for_good

stderr = Console(stderr=True, highlight=False, emoji=False)  # a name may hold ":train:"


def load_libraries(debug: bool) -> None:
    """Import torch, transformers and what of ours stands on them, and keep their chatter off the terminal unless asked
    for."""
    with for_good():
        import transformers

        import pissa_cli.outputs.trained  # noqa: F401
    if debug:
        return

    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name in ("bitsandbytes", "accelerate", "huggingface_hub", "liger_kernel", "matplotlib"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def say(text: str) -> None:
    """A line for the person watching."""
    stderr.print(text, markup=False, soft_wrap=True)


def print_result(result: dict[str, Any], as_json: bool, lines: list[str], table: Table | None = None) -> None:
    """The outcome: one JSON document, or a table and lines."""
    if as_json:
        print_document(result)
        return
    if table is not None:
        print_table(table)
    console = _Stdout(highlight=False, emoji=False)
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)


def print_table(table: Table) -> None:
    """A table on stdout, as wide as it is: rich would cut figures off to fit a narrow terminal, or a file."""
    _Stdout(highlight=False, emoji=False, width=1000, height=25).print(table)  # a dumb terminal needs both


class _Stdout(Console):
    """Where a reader that has seen enough is no failure."""

    def on_broken_pipe(self) -> None:
        """Called by rich."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _draws() -> bool:
    """Whether there is a terminal that can draw a bar; the environment may say so of a file (FORCE_COLOR)."""
    return sys.stderr.isatty() and not stderr.is_dumb_terminal


class _Bar:
    """A bar that is there from its first figure until all is done; a second one cannot be drawn beside it."""

    def __init__(self, title: str, *columns: ProgressColumn) -> None:
        self._title, self._columns = title, columns
        self._drawn: Progress | None = None

    def update(self, done: int, total: int, status: str = "") -> None:
        if self._drawn is None:
            self._drawn = Progress(*self._columns, console=stderr, transient=True)
            self._drawn.add_task(self._title, status=status)
            self._drawn.start()
        self._drawn.update(TaskID(0), completed=done, total=total, status=status)
        if done == total:
            self.close()

    def close(self) -> None:
        if self._drawn is not None:
            self._drawn.stop()
            self._drawn = None


@contextmanager
def counting(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """A bar over `update(done, total, name)`; without a terminal a line at most every ten seconds."""
    if not _draws():
        last = time.monotonic()

        def line(done: int, total: int, name: str = "") -> None:
            nonlocal last
            if time.monotonic() - last > 10 or done == total:
                last = time.monotonic()
                say(f"{title}: {done}/{total} {name}".rstrip())

        yield line
        return
    bar = _Bar(title, TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())

    def update(done: int, total: int, _name: str = "") -> None:
        bar.update(done, total)

    with closing(bar):
        yield update


@contextmanager
def training() -> Iterator[Callable[[dict[str, Any]], None]]:
    """A bar with loss, tokens a second, memory and time left, fed with the events of `pissa_cli.train`."""
    if not _draws():
        yield _training_lines()
        return
    status = TextColumn("{task.fields[status]}")
    bar = _Bar("train", TextColumn("train"), BarColumn(), MofNCompleteColumn(), status, TimeRemainingColumn())

    def update(event: dict[str, Any]) -> None:
        if "note" in event:
            say(event["note"])
            return
        if "eval_loss" in event:
            say(f"step {event['step']}: held-out loss {event['eval_loss']:.4f}")
        bar.update(event["step"], event["steps"], _status(event))

    with closing(bar):
        yield update


def _training_lines() -> Callable[[dict[str, Any]], None]:
    """A line for the first and last step, every twentieth part between them, and each held-out loss."""
    began, first = 0.0, 0

    def line(event: dict[str, Any]) -> None:
        nonlocal began, first
        if "note" in event:
            say(event["note"])
            return
        step, steps = event["step"], event["steps"]
        if not first:
            began, first = time.monotonic() - event["seconds"], step
        if step in (first, steps) or "eval_loss" in event or step % max(1, steps // 20) == 0:
            held_out = f", held-out loss {event['eval_loss']:.4f}" if "eval_loss" in event else ""
            left = timedelta(seconds=round((time.monotonic() - began) / (step - first + 1) * (steps - step)))
            say(f"step {step}/{steps}: {_status(event)}{held_out}{f', {left} left' if step < steps else ''}")

    return line


def _status(event: dict[str, Any]) -> str:
    rate = event["tokens"] / max(event["seconds"], 1e-9)
    loss = "left out" if event["loss"] is None else f"loss {event['loss']:.4f}"
    return f"{loss}, lr {event['lr']:.1e}, {rate:,.0f} tokens/s, {event['memory_bytes'] / 2**30:.1f} GiB"
