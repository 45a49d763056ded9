"""The exceptions meant for users, raised in the leaves, rendered once, at the edge in `pissa_cli.cli`; and what their
messages quote, in one line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

LAUNCHED = "PISSA_LAUNCHED"
"""In the processes that `pissa train --processes` starts, the file that tells it of their first failure."""
MOST_NAMES, FEW_NAMES = 10, 5


class PissaError(Exception):
    """Something failed while running (exit code 1). `hint` says what to do next; None where the message does."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(PissaError):
    """The user's input is wrong: recipe, flags, files or data (exit code 2)."""

    exit_code = 2


class Unreachable(UsageError):
    """Data on the Hub that it does not give, for whatever reason."""


class Interrupted(PissaError):
    """The run was stopped by a signal, in training after a checkpoint was written (exit code 130)."""

    exit_code = 130


def cannot_write(place: Path | str, error: Exception) -> PissaError:
    """For a file or folder of which the disk takes no more, or which may not be written."""
    return PissaError(
        f"{place}: cannot write: {getattr(error, 'strerror', None) or error}",
        "check the space and the right to write; what was saved before is intact",
    )


def first_line(error: BaseException, said: str | None = None) -> str:
    """Of what an error says, or of what a server `said` beside it; its kind where that is nothing."""
    return next(iter((said or str(error)).strip().splitlines()), type(error).__name__)


def in_one_line(error: BaseException) -> str:
    """The first 300 characters of what an error says, white space as spaces; its kind where that is nothing."""
    return re.sub(r"\s+", " ", str(error)).strip()[:300] or type(error).__name__


def listed(names: Sequence[str]) -> str:
    """The names with commas; of many the first few, and how many there are."""
    if len(names) <= MOST_NAMES:
        return ", ".join(map(escaped, names))
    return f"{', '.join(map(escaped, names[:FEW_NAMES]))}, ... ({len(names)})"


def escaped(text: str) -> str:
    """A text in one line, with what cannot be printed as Python escapes it."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
