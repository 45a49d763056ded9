"""Checkpoints: the trained values and the optimizer's state, whole or not there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pissa_cli.base.integrity import hashes
from pissa_cli.base.weights import hash_file, load_tensors, save_tensors
from pissa_cli.errors import UsageError
from pissa_cli.files import read_json, remove_folder, set_aside, whole_folder, write_json
from pissa_cli.run.reached import checkpoints, step_of
from pissa_cli.run.report import read_metrics
from pissa_cli.run.rundir import Run
from pissa_cli.training.optim import Names, optimizer_tensors, restore_optimizer
from pissa_cli.training.sharding import put, whole

_TENSORS = ("trained.safetensors", "optimizer.safetensors")


def trained_values(names: Names, first: bool) -> dict[str, Tensor]:
    """What trains, by name, on the CPU and in whole; all processes must ask, the `first` gets it."""
    values = ((name, whole(parameter).detach()) for parameter, name in names.items())
    return {name: value.cpu() for name, value in values if first}


def save_checkpoint(
    run: Run, step: int, names: Names, optimizer: torch.optim.Optimizer, facts: dict[str, Any], first: bool
) -> None:
    """Write checkpoints/step-N: trained values, optimizer state, and `facts`: `data`, the hash of the examples,
    `sections` of the recipe by which it was trained, and `missed`, by how many examples its steps were short.

    All processes take part, the `first` writes.

    Raises PissaError for a disk that fails; older checkpoints are intact then.
    """
    tensors = trained_values(names, first), optimizer_tensors(optimizer, names, first)
    if not first:
        return
    with whole_folder(run.checkpoints / f"step-{step}") as folder:
        for name, content in zip(_TENSORS, tensors, strict=True):
            save_tensors(folder / name, content)
        write_json(folder / "state.json", {"step": step, "hashes": hashes(folder, _TENSORS)} | facts)


def remove_old(run: Run, keep: int, best_as_well: bool) -> None:
    """Remove all checkpoints but the newest `keep`, and the one with the lowest held-out loss if that is asked for."""
    folders = checkpoints(run)
    best = lowest_held_out(run, [step_of(folder) for folder in folders]) if best_as_well else None
    for old in folders[:-keep]:
        if best is None or step_of(old) != best[0]:
            remove_folder(old)


def lowest_held_out(run: Run, steps: Sequence[int] | None = None) -> tuple[int, float] | None:
    """(step, loss) of the lowest loss on the held-out data of now, of these steps (default: all); None where none was
    taken."""
    events = [event for event in read_metrics(run.metrics) if "eval_loss" in event] if run.metrics.is_file() else []
    taken = {e["step"]: e["eval_loss"] for e in events if e.get("eval_set") == events[-1].get("eval_set")}
    return min(
        ((step, loss) for step, loss in taken.items() if steps is None or step in steps),
        key=lambda found: found[1],
        default=None,
    )


@torch.no_grad()
def restore_checkpoint(folder: Path, names: Names, optimizer: torch.optim.Optimizer, data: str) -> int:
    """Put a checkpoint back and return its step. UsageError if it is one of other parameters or examples."""
    state = read_json(folder / "state.json")
    if state["data"] != data:
        raise UsageError(
            f"{folder}: trained on other tokens than data.train makes now",
            "bring the old rows, and the version of pissa, back to resume; to go on with others, `pissa merge` it and "
            "start a new run with --model RUN/merged",
        )
    trained, moments = (load_tensors(folder / name) for name in _TENSORS)
    if set(trained) != set(names.values()):
        raise UsageError(
            f"{folder}: holds other parameters than this recipe trains",
            "resume with the recipe that the run was begun with, or start a new run with another --output",
        )
    for parameter, name in names.items():
        put(parameter, trained[name])
    restore_optimizer(optimizer, names, moments)
    return int(state["step"])


def whole_checkpoint(run: Run) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is as it was written, and a line for each newer one, which is set aside."""
    lines: list[str] = []
    for folder in reversed(checkpoints(run)):
        fault = damage(folder)
        if fault is None:
            return folder, lines
        lines.append(f"{folder} is damaged ({fault}); it is kept as {set_aside(folder).name}")
    return None, lines


def damage(folder: Path) -> str | None:
    """What is wrong with the files of a checkpoint; None if they are as they were written.

    UsageError for files that are there and cannot be read now: that is no damage.
    """
    unreadable = [name for name in ("state.json", *_TENSORS) if (folder / name).is_file() and not _opens(folder / name)]
    if unreadable:
        raise UsageError(f"{folder / unreadable[0]}: cannot be read", "check the rights to read it, and the disk")
    try:
        known = read_json(folder / "state.json")["hashes"]
        return next((f"{name} has changed" for name in _TENSORS if hash_file(folder / name) != known[name]), None)
    except UsageError as error:
        return error.message
    except (KeyError, TypeError):
        return "state.json is not what was written"


def _opens(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            file.read(1)
    except OSError:
        return False
    return True


def checkpoint_tensors(folder: Path) -> dict[str, Tensor]:
    """The trained values in a checkpoint. UsageError if it is damaged."""
    fault = damage(folder)
    if fault is not None:
        raise UsageError(f"{folder}: damaged ({fault})", "use another checkpoint, or train again with --resume")
    return load_tensors(folder / _TENSORS[0])
