"""This process: which of several it is, asked to stop, how much memory it took, what it does with freed memory; and
those that it starts."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from pissa_cli.errors import LAUNCHED, Interrupted, PissaError, UsageError, first_line

LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
"""Loaded here: between fork and exec it might wait for a lock for ever."""
PR_SET_PDEATHSIG = 1  # of prctl(2)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
KEPT_BYTES = 2**30
MEET_SECONDS, WAIT_SECONDS = 1800, 6 * 3600
NOHUP = (signal.SIGHUP, signal.SIG_IGN)


def process_state() -> PartialState:
    """Which process of how many this is; they wait long for the first, which does what all of them need.

    Of accelerators only those count that torch calls CUDA, as in `model.best_device`: Accelerate would take Apple's.
    """
    deepspeed = os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)  # which would start the processes' group itself
    try:
        cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available()
        _place = None if torch.distributed.is_initialized() else _meet()  # kept until torch has its own
        return PartialState(cpu=cpu, timeout=timedelta(seconds=WAIT_SECONDS))
    except ValueError as error:
        raise UsageError(
            f"what the environment says of several processes cannot be: {first_line(error)}",
            "start them by --processes, torchrun or accelerate launch; alone: unset WORLD_SIZE, RANK and LOCAL_RANK",
        ) from None
    except torch.distributed.DistNetworkError as error:
        raise PissaError(
            f"the processes cannot meet: {first_line(error)}",
            "MASTER_ADDR and MASTER_PORT say where: a port of the first one's machine that nobody else has",
        ) from None
    finally:
        if deepspeed is not None:
            os.environ["ACCELERATE_USE_DEEPSPEED"] = deepspeed


def _meet() -> TCPStore | None:
    """Wait until all processes are there, where none but the environment brings them together (torchrun has them by
    then). torch itself would wait as long as for a step, without a word, and hear no signal meanwhile.

    Returns what the first process holds open for the others, if anything.
    """
    names = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")
    host, port, rank, size = (os.environ.get(name, "") for name in names)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" or not (host and port and rank and int(size or 1) > 1):
        return None
    if not (0 < int(port) < 2**16 and 0 <= int(rank) < int(size)):
        raise ValueError(f"MASTER_PORT={port}, RANK={rank}, WORLD_SIZE={size}")
    began, told, store = time.monotonic(), False, None
    while True:
        if store is None and (_is_known(host) if rank == "0" else _answers(host, int(port))):
            store = TCPStore(host, int(port), is_master=rank == "0", wait_for_workers=False, multi_tenant=True)
            store.set(rank, "")
        others = [str(other) for other in range(int(size)) if str(other) != rank]
        missing = [other for other in others if store is None or not store.check([other])]
        if not missing:
            return store
        waited = time.monotonic() - began
        if waited > MEET_SECONDS:
            raise PissaError(
                f"{host}:{port}: of {size} processes these have not come: {', '.join(missing)}",
                "WORLD_SIZE, RANK and MASTER_ADDR say so; one process alone: unset them",
            )
        if waited > 10 and not told:
            unknown = "" if _is_known(host) else "; no machine is known by that name (MASTER_ADDR)"
            print(f"waiting at {host}:{port} for {size} processes (WORLD_SIZE){unknown}", file=sys.stderr, flush=True)
            told = True
        time.sleep(0.2)


def _is_known(host: str) -> bool:
    with contextlib.suppress(OSError):
        return bool(socket.getaddrinfo(host, None))
    return False


def _answers(host: str, port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=2):
        return True
    return False


@contextlib.contextmanager
def one_of_several() -> Iterator[PartialState]:
    """process_state(), and the end of its group: threads of gloo that live on at exit may abort the interpreter.

    After an error the group is left as it is: NCCL would wait for processes that are elsewhere.
    """
    state = process_state()
    try:
        yield state
    except Interrupted:  # all of them
        state.destroy_process_group()
        raise
    state.destroy_process_group()


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """SIGINT, SIGTERM and SIGHUP ask for a stop after the current step; a second SIGINT stops at once.

    SIGHUP (the terminal is gone) does not where the process was started to outlive that (nohup). One of several that
    a launcher started has SIGINT when that is killed, from Linux and maybe more than once (as its threads end one by
    one): it stops at once only where another signal came before.
    """
    received: list[int] = []

    def handle(number: int, _frame: Any) -> None:
        before = [n for n in received if n != signal.SIGINT] if LAUNCHED in os.environ else received
        if before and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)
        if os.environ.get("RANK", "0") == "0":
            with contextlib.suppress(OSError):
                os.write(2, b"stopping after this step, with a checkpoint; once more stops at once, without\n")

    with handling_stops(handle):
        yield lambda: bool(received)


@contextlib.contextmanager
def handling_stops(handle: Callable[[int, Any], None]) -> Iterator[None]:
    """Have `handle` called for the signals that ask for a stop."""
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    before = {n: signal.signal(n, handle) for n in numbers if (n, signal.getsignal(n)) != NOHUP}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def start_beside(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
    """Start a program in another session, which SIGTERM asks to stop when this process is killed, be it by SIGKILL.

    Signals wait meanwhile: what a handler raises while Python forks, Python forgets.
    """
    asked: list[int] = []
    with handling_stops(lambda number, _: asked.append(number)):
        process = subprocess.Popen(command, start_new_session=True, preexec_fn=end_with_parent, **options)
    try:
        for number in asked:
            signal.raise_signal(number)
    except KeyboardInterrupt:
        process.terminate()
        raise
    return process


def end_with_parent(number: int = signal.SIGTERM) -> None:
    """Have this process asked to stop, by a signal, when the one that started it is killed, be it by SIGKILL."""
    if LIBC is not None:
        LIBC.prctl(PR_SET_PDEATHSIG, number)


def peak_memory() -> int:
    """Bytes: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")  # getrusage counts what the parent held when it forked this process
    lines = status.read_text().splitlines() if status.is_file() else []
    for line in lines:
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def keep_freed_memory() -> None:
    """Let glibc keep large blocks that are freed, up to 1 GiB each, instead of having the kernel clear them anew.

    Most tensors on a CPU live for one operation, and clearing their pages takes as long as computing them.
    """
    if not torch.cuda.is_available():
        mallopt = getattr(LIBC, "mallopt", None)
        if mallopt is not None:
            mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)
            mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


def release_freed_memory() -> None:
    """Hand all that is freed back to the system, and to the GPU, whose peak counts anew: after work that is over."""
    torch.cuda.empty_cache()
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    trim = getattr(LIBC, "malloc_trim", None)
    if trim is not None:
        trim(0)
