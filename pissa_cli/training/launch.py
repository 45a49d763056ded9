"""Training in several processes on this machine: torch's elastic launcher over `pissa train`."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from pissa_cli.errors import LAUNCHED, Interrupted, PissaError, UsageError
from pissa_cli.files import locked
from pissa_cli.initialize import Progress
from pissa_cli.process import handling_stops, start_beside
from pissa_cli.run.reached import resume_hint
from pissa_cli.run.rundir import run_of
from pissa_cli.schema.recipe import Recipe
from pissa_cli.schema.recipe_file import dump
from pissa_cli.training.prepare import prepare

LAUNCHER = """
import sys
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main
try:
    main()
except SignalException:
    sys.exit(130)
except ChildFailedError as error:
    print(error, file=sys.stderr)
    code = error.get_first_failure()[1].exitcode
    sys.exit(code if code > 0 else 128 - code)
"""
"""torchrun, without its traceback, and with the exit code of the process that failed first."""
HERE = "--standalone", "--local-addr=127.0.0.1"
"""Torchrun alone goes by the machine's name, and waits on and on where no address is known for that."""
STOPPED = 130
SHUTDOWN_SECONDS = "600"
"""What torchrun grants a process that was asked to stop: the step it is in and a checkpoint."""


def launch(
    recipe: Recipe, resume: bool, processes: int, flags: list[str], stdout: int | None, init_progress: Progress
) -> None:
    """Prepare the run here, where errors are plain, and train it in `processes` processes; the first one says the rest.

    flags: of `pissa train`, handed on; stdout: the descriptor for what they print, if not this process's. On GPUs each
    process has one, on CPUs they speak gloo. Raises UsageError for bad input, PissaError if a process failed,
    Interrupted after the checkpoint that follows SIGINT, SIGTERM or SIGHUP, to this process or to one of them.
    """
    if processes > recipe.train.batch_size:
        raise UsageError(
            f"--processes {processes}: a step has {recipe.train.batch_size} examples (train.batch_size)",
            "more processes would have nothing to do",
        )
    if 0 < torch.cuda.device_count() < processes:
        raise UsageError(
            f"--processes {processes}: this machine has {torch.cuda.device_count()} GPUs", "each process needs its own"
        )
    prepare(recipe, resume, init_progress=init_progress)
    with locked(run_of(recipe).checkpoints):
        pass  # a run that another process is training: said here, not by one of many
    gc.collect()
    torch.cuda.empty_cache()  # what init took of the first GPU
    environment = dict(os.environ)
    environment.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", SHUTDOWN_SECONDS)
    if not torch.cuda.is_available():
        environment |= {"ACCELERATE_USE_CPU": "true"}
        environment.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // processes)))
    if Path.cwd() != Path(__file__).parents[2]:  # a checkout has to be there for them
        environment["PYTHONSAFEPATH"] = "1"
    with tempfile.TemporaryDirectory() as scratch:  # torchrun would leave its own behind
        folder = Path(scratch) / "ours"
        folder.mkdir()
        command = [sys.executable, "-c", LAUNCHER, *HERE, f"--log-dir={folder}", f"--nproc-per-node={processes}"]
        file, failure = folder / "recipe.yaml", folder / "failure.json"
        file.write_text(dump(recipe), encoding="utf-8")
        command += ["-m", "pissa_cli", "train", str(file), *(["--resume"] if resume else []), *flags]
        environment |= {LAUNCHED: str(failure)}
        code, stopped = _wait(start_beside(command, stdout=stdout, env=environment))
        told = json.loads(failure.read_text(encoding="utf-8")) if failure.is_file() else {}
        folder.rename(folder.with_name("over"))  # after a second SIGINT processes live on, which would write into it
    told_of_failure = told.get("exit_code", STOPPED) != STOPPED
    if code and (not told_of_failure if stopped else code == STOPPED):
        raise Interrupted("stopped", resume_hint(recipe.output))
    if code:
        reason = told["error"] if told_of_failure else f"one ended with exit code {code}"
        hint = told.get("hint") or f"{resume_hint(recipe.output)} if a checkpoint was saved"
        failed = f"training in {processes} processes failed: {reason}"
        if told_of_failure and told["exit_code"] == UsageError.exit_code:
            raise UsageError(failed, hint)
        raise PissaError(failed, hint)


def _wait(process: subprocess.Popen[bytes]) -> tuple[int, bool]:
    """(exit code, whether a signal asked for a stop). `process` is in another session, and hears of signals from here:
    of one, as after several torchrun does not wait for those that it started.

    When it is killed, as by a second SIGINT, those get SIGINT (from Linux).
    """
    asked: list[int] = []

    def handle(number: int, _frame: Any) -> None:
        at_once = asked and number == signal.SIGINT
        if at_once and sys.platform == "linux":
            process.kill()
        elif at_once or not asked:
            process.send_signal(signal.SIGTERM)
        asked.append(number)

    with handling_stops(handle):
        return process.wait(), bool(asked)
