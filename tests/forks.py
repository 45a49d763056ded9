"""Processes that need not import: forked from that of the tests, with all that it has read."""

from __future__ import annotations

import atexit
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from pissa_cli.__main__ import main
from pissa_cli.data import sets
from pissa_cli.process import process_state
from pissa_cli.run.rundir import Run
from pissa_cli.train import train


def forked(work: Callable[[], Any], log: Path, environment: Mapping[str, str] | None = None) -> int:
    """Start `work` in a process of its own, without a GPU, which ends with the code that it returns; its id. It prints
    into `log`. Where training does not go on in a fork, an `entry` is imported anew, and what else there is skipped."""
    log.touch()
    environment = {"CUDA_VISIBLE_DEVICES": "", "HF_HOME": sets.HF_HOME} | dict(environment or {})
    if not _trains_in_forks():
        if not isinstance(work, partial):
            pytest.skip("training does not go on in a process that is forked here")
        command = [sys.executable, "-m", "pissa_cli", *work.args]
        into_log = [(os.POSIX_SPAWN_OPEN, 1, log, os.O_WRONLY | os.O_APPEND, 0), (os.POSIX_SPAWN_DUP2, 1, 2)]
        return os.posix_spawn(sys.executable, command, os.environ | environment, file_actions=into_log)
    process = os.fork()
    if process:
        return process
    code: Any = 70
    atexit._clear()  # what is registered there is the other process's
    try:
        with log.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        os.environ.update(environment)
        torch.cuda.is_available, torch.cuda.device_count = (lambda: False), (lambda: 0)  # no fork has CUDA's state
        torch.set_num_threads(1)  # those of the process before are not here
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for state in (AcceleratorState, GradientState, PartialState):
            state._shared_state.clear()
        code = work()
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code if isinstance(code, int) else bool(code))


def _trains_in_forks() -> bool:
    """Not where CUDA is in use, or a backward pass has begun threads for devices, as it does where there are any."""
    if torch.cuda.is_initialized():
        return False
    process = os.fork()
    if not process:
        try:
            torch.ones(1, requires_grad=True).sum().backward()
        except RuntimeError:
            os._exit(1)
        os._exit(0)
    return not os.waitpid(process, 0)[1]


def entry(*words: Any) -> partial[None]:
    """`pissa WORDS`, as its entry point runs it."""
    return partial(_entry, *map(str, words))


def _entry(*words: str) -> None:
    sys.argv = ["pissa", *words]
    main()


def exit_code(process: int) -> int:
    """Wait for a process that was forked; minus the signal that ended it. AssertionError if it goes on and on."""
    ended: list[int] = []

    def over() -> bool:
        number, status = os.waitpid(process, os.WNOHANG)
        ended.extend([status] if number else [])
        return bool(number)

    try:
        await_that(over)
    finally:
        if not ended:
            os.kill(process, signal.SIGKILL)
    return os.waitstatus_to_exitcode(ended[0])


def await_that(holds: Callable[[], Any], seconds: float = 300) -> None:
    """Wait until something holds: on a machine that has much else to do that takes its time. AssertionError at last."""
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, f"not within {seconds} s"
        time.sleep(0.02)


def train_together(
    recipes: Sequence[Any], count: int, folder: Path, environment: Mapping[str, str] | None = None
) -> None:
    """Train by each of the recipes, or go on, in `count` processes that speak gloo, as torchrun would start them."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)} | dict(environment or {})
    common |= {"LOCAL_WORLD_SIZE": str(count), "ACCELERATE_USE_CPU": "true"}

    def work() -> None:
        for recipe in recipes:
            os.environ.update(common)  # `train` takes out what was asked of Accelerate
            train(recipe, resume=Run(Path(recipe.output)).exists())
        process_state().destroy_process_group()

    logs = [folder / f"process-{rank}.txt" for rank in range(count)]
    left = {forked(work, log, common | {"RANK": str(n), "LOCAL_RANK": str(n)}): log for n, log in enumerate(logs)}
    try:
        while left:
            for process, log in list(left.items()):
                ended, status = os.waitpid(process, os.WNOHANG)
                if ended:
                    del left[process]
                    assert not status, log.read_text()
            time.sleep(0.02)
    finally:  # the others wait for it
        for process in left:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
