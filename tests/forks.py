"""Processes that need not import: forked from that of the tests, with all that it has read."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from pissa_cli.__main__ import main
from pissa_cli.process import process_state
from pissa_cli.rundir import Run
from pissa_cli.train import train


def forked(work: Callable[[], Any], log: Path, environment: Mapping[str, str] | None = None) -> int:
    """Start `work` in a process of its own, without a GPU, which ends with the code that it returns; its id. It prints
    into `log`."""
    if torch.cuda.is_initialized():
        pytest.skip("CUDA does not go on in a process that is forked")
    log.touch()
    process = os.fork()
    if process:
        return process
    code: Any = 70
    try:
        with log.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        os.environ.update({"CUDA_VISIBLE_DEVICES": ""} | dict(environment or {}))
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


def entry(*words: Any) -> Callable[[], None]:
    """`pissa WORDS`, as its entry point runs it."""

    def work() -> None:
        sys.argv = ["pissa", *map(str, words)]
        main()

    return work


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
