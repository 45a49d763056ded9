"""Trainings that are killed, or whose disk fails, and what a resume makes of them.

    python tests/break_training.py kills 200 [SEED]   # kill -9 at random times; as many kills in all
    python tests/break_training.py points [EVERY]     # kill -9 before each change of files, or every so many
    python tests/break_training.py disk [EVERY]       # from each change of files on, or every so many, all fail

Every training must end, resumed, with the bits of one that was left alone, and leave no temporary file.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bitsandbytes  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import torch._dynamo  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401  all of them here, not in each of many processes
from forks import forked

import pissa_cli.train
from pissa_cli.base.weights import load_tensors
from pissa_cli.cli.edge import run_guarded
from pissa_cli.run.rundir import Run
from pissa_cli.schema.recipe import Recipe
from pissa_cli.schema.recipe_file import load

DEMO = Path(pissa_cli.train.__file__).parent / "demo"
SETS = (
    *("model.bits=32", "adapter.rank=4", "data.columns={instruction: question, output: answer}"),
    *("train.steps=8", "train.batch_size=4", "train.save_every=1", "train.eval_every=4"),
)
CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "os.truncate", "os.link", "os.symlink"}


def recipe(folder: Path) -> Recipe:
    """A training of eight steps, each saved, into folder/out."""
    data = (f"data.train={folder.parent / 'rows.jsonl'}", f"data.eval={folder.parent / 'rows.jsonl'}")
    flags = {("model", "name"): ("--model", str(DEMO / "base"))}
    return load(None, flags, [*SETS, *data, f"output={folder / 'out'}"]).recipe


def changes(event: str, arguments: tuple[Any, ...], folder: Path) -> bool:
    """Whether an audit event is about to change something in a folder."""
    if event == "open":
        path, mode, flags = arguments
        writes = any(letter in (mode or "") for letter in "wax+") or flags & (os.O_WRONLY | os.O_RDWR)
    else:
        path, writes = arguments[0] if arguments else None, event in CHANGES
    return bool(writes) and isinstance(path, str | os.PathLike) and str(path).startswith(str(folder))


def child(made: Recipe, folder: Path, hook: Callable[[int], None] | None = None) -> int:
    """Start a process that trains, resuming what is there; its id. hook: given the number of each change of files."""

    def work() -> int:
        count = 0

        def audit(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal count
            if hook is not None and changes(event, arguments, folder):
                count += 1
                hook(count - 1)

        sys.addaudithook(audit)
        run = Run(Path(made.output))
        goes_on = run.exists() and any(run.checkpoints.glob("step-*"))
        code = run_guarded(lambda: pissa_cli.train.train(made, resume=goes_on), [])
        with contextlib.suppress(OSError):  # of `disk`
            (folder / "count.txt").write_text(str(count))
        return code

    return forked(work, folder / "log.txt")


def wait(process: int) -> int:
    """Its exit code; minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def resume(made: Recipe, folder: Path, reference: dict[str, Any]) -> None:
    """Train to the end; AssertionError unless that gives the reference, bit for bit, and leaves nothing behind."""
    code = wait(child(made, folder))
    assert code == 0, (folder / "log.txt").read_text()
    require_reference(made, folder, reference)


def require_reference(made: Recipe, folder: Path, reference: dict[str, Any]) -> None:
    found = result(made)
    assert set(found) == set(reference)
    assert all(found[name].equal(reference[name]) for name in reference), f"{folder}: other numbers"
    left = [str(path) for path in folder.rglob("*") if path.name.startswith(".") or "damaged" in path.name]
    assert not left, left
    assert sorted(p.name for p in (folder / "out" / "checkpoints").iterdir()) == ["step-7", "step-8"]
    assert len((folder / "out" / "metrics.jsonl").read_text().splitlines()) == 8


def result(made: Recipe) -> dict[str, Any]:
    return load_tensors(Run(Path(made.output)).adapter / "adapter_model.safetensors")


def uninterrupted(root: Path) -> tuple[dict[str, Any], int, float]:
    """The result of a training that is left alone, how often it changes files, and the seconds it takes."""
    lines = (DEMO / "train.jsonl").read_text().splitlines(keepends=True)
    (root / "rows.jsonl").write_text("".join(lines[:20]))
    folder = root / "whole"
    folder.mkdir()
    began = time.monotonic()
    code = wait(child(recipe(folder), folder, lambda _: None))
    assert code == 0, (folder / "log.txt").read_text()
    reference = result(recipe(folder))
    require_reference(recipe(folder), folder, reference)
    return reference, int((folder / "count.txt").read_text()), time.monotonic() - began


def kills(root: Path, number: int, seed: int) -> Iterator[str]:
    """Kill within a random time after 0 to 2 steps, again and again, until it ends before; then the next training."""
    reference, _, seconds = uninterrupted(root)
    numbers, done, trainings = random.Random(seed), 0, 0
    while done < number:
        trainings += 1
        folder = root / f"run-{trainings}"
        folder.mkdir()
        made, ended = recipe(folder), False
        while done < number and not ended:
            process = child(made, folder)
            left = await_steps(Run(Path(made.output)).metrics, numbers.randrange(3), 10 * seconds)
            time.sleep(numbers.uniform(0, seconds / 8 if left else seconds))
            os.kill(process, signal.SIGKILL)
            code = wait(process)
            ended = code == 0
            assert code in (0, -signal.SIGKILL), (folder / "log.txt").read_text()
            done += not ended
        resume(made, folder, reference)
        shutil.rmtree(folder)
        yield f"{done} kills (seed {seed}), {trainings} trainings: all ended with the same bits"


def await_steps(metrics: Path, number: int, seconds: float) -> bool:
    """Wait until so many more steps are written down, or for so long. Returns whether more are to come."""
    until, wanted, steps = time.monotonic() + seconds, None, 0
    while time.monotonic() < until:
        steps = metrics.read_bytes().count(b"\n") if metrics.is_file() else 0
        wanted = min(8, steps + number) if wanted is None else wanted
        if steps >= wanted:
            break
        time.sleep(0.001)
    return steps < 8


def points(root: Path, every: int) -> Iterator[str]:
    """Kill before a change of files."""
    reference, total, _ = uninterrupted(root)
    for point in range(every // 2, total, every):
        folder = root / f"run-{point}"
        folder.mkdir()

        def kill(count: int, point: int = point) -> None:
            if count == point:
                os.kill(os.getpid(), signal.SIGKILL)

        assert wait(child(recipe(folder), folder, kill)) == -signal.SIGKILL, (folder / "log.txt").read_text()
        resume(recipe(folder), folder, reference)
        shutil.rmtree(folder)
        yield f"killed before change {point + 1} of {total}: the same bits"


def disk(root: Path, every: int) -> Iterator[str]:
    """Let a change of files and all after it fail for want of space."""
    reference, total, _ = uninterrupted(root)
    for point in range(every // 2, total, every):
        folder = root / f"run-{point}"
        folder.mkdir()

        def fail(count: int, point: int = point) -> None:
            if count >= point:
                raise OSError(errno.ENOSPC, "No space left on device")

        code = wait(child(recipe(folder), folder, fail))
        log = (folder / "log.txt").read_text()
        assert code == 0 or (code == 1 and "cannot write" in log and "unexpected" not in log), log
        resume(recipe(folder), folder, reference)
        shutil.rmtree(folder)
        yield f"disk full from change {point + 1} of {total} on (exit code {code}): the same bits"


if __name__ == "__main__":
    way, *rest = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        root, every = Path(folder), int(rest[0]) if rest else 1
        lines = {
            "kills": lambda: kills(root, every, int(rest[1]) if len(rest) > 1 else 0),
            "points": lambda: points(root, every),
            "disk": lambda: disk(root, every),
        }[way]()
        for line in lines:
            print(line, flush=True)
