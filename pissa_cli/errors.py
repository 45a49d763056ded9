"""The exceptions meant for users. Raised in the leaves, rendered once, at the edge in `pissa_cli.cli`."""

from __future__ import annotations

LAUNCHED = "PISSA_LAUNCHED"
"""In the processes that `pissa train --processes` starts, the file that tells it of their first failure."""


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
    """The run was stopped by a signal after a checkpoint was written (exit code 130)."""

    exit_code = 130
