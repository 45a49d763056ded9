"""Programs that are not trusted, run apart from this one: see `Protection` for what keeps them in."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pissa_cli.errors import UsageError

CHILD = Path(__file__).with_name("sandbox_child.py")
SECONDS, MEGABYTES = 10.0, 1024  # that a program may take
GRACE = 10.0  # seconds beyond that, in which its supervisor has to answer
FIRST_USER = 2_000_000_000  # of the numbers of users that programs run as


@dataclass(frozen=True)
class Protection:
    """namespaces: the program sees no network, no process but its own, and can write nowhere but into memory.

    Without them it has limits alone: time, memory, sizes and numbers of files and processes, no environment, a folder
    of its own; it could still write where this user can, and reach the network.
    """

    namespaces: bool

    def text(self) -> str:
        """In words, for people and for result.json."""
        limits = f"{SECONDS:g} s, 16 processes of {MEGABYTES} MiB, 16 MiB a file, no environment"
        if self.namespaces:
            return f"own namespaces (processes, network, mounts; all files read-only) and limits ({limits})"
        return (
            f"limits only ({limits}): the kernel allows no namespaces; network, files and processes are NOT protected"
        )


@dataclass(frozen=True)
class Verdict:
    """Whether a program ran to its end, and how it failed if not."""

    passed: bool
    detail: str


@functools.cache
def protection() -> Protection:
    """The best that this machine has. Raises UsageError where no program can be run apart at all."""
    if sys.platform != "linux":
        raise UsageError("generated code can be run on Linux only", "score --samples there")
    reasons = []
    for namespaces in (True, False):
        verdict = run_program("import math, json", Protection(namespaces))
        if verdict.passed:
            return Protection(namespaces)
        reasons.append(verdict.detail)
    raise UsageError(
        f"generated code cannot be run apart from this process ({'; '.join(reasons)})",
        "score the answers on another machine: --samples",
    )


def run_programs(programs: Sequence[str], progress: Callable[[int, int], None]) -> list[Verdict]:
    """A verdict for each, one program to a core at a time."""
    guard, verdicts = protection(), []
    with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)))) as pool:
        for verdict in pool.map(lambda program: run_program(program, guard), programs):
            verdicts.append(verdict)
            progress(len(verdicts), len(programs))
    return verdicts


def run_program(program: str, guard: Protection, seconds: float = SECONDS) -> Verdict:
    """Run Python source as a script of its own. It passes if its last statement is done, without an exception."""
    with _folder() as folder:
        job = {
            "program": program,
            "token": secrets.token_hex(16),
            "folder": folder,
            "namespaces": guard.namespaces,
            "seconds": seconds,
            "megabytes": MEGABYTES,
            "number": FIRST_USER + secrets.randbelow(2**20),
        }
        child = subprocess.Popen(
            [sys.executable, "-I", "-B", str(CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={"HOME": folder, "TMPDIR": folder, "PATH": os.defpath, "OMP_NUM_THREADS": "1"},
            cwd=folder,
            start_new_session=True,
        )
        try:
            out, err = child.communicate(json.dumps(job).encode(), timeout=seconds + GRACE)
        except subprocess.TimeoutExpired:
            return Verdict(False, "stopped answering")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.kill()
            child.wait()
    try:
        found = json.loads(out)
        return Verdict(bool(found["passed"]), str(found["detail"]))
    except ValueError:
        last = err.decode(errors="replace").strip().rpartition("\n")[2]
        return Verdict(False, last or "its supervisor was killed")


@contextlib.contextmanager
def _folder() -> Iterator[str]:
    folder = tempfile.mkdtemp(prefix="pissa-")
    Path(folder).chmod(0o777)
    try:
        yield folder
    finally:
        try:
            shutil.rmtree(folder)
        except (OSError, RecursionError):  # a tree that is shut, or too deep
            for command in (["chmod", "-R", "u+rwX"], ["rm", "-rf"]):
                subprocess.run([*command, folder], stderr=subprocess.DEVNULL)
