"""Checkpoints: what training needs to go on bit for bit, written whole or not at all."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import nn

from pissa_cli.errors import UsageError
from pissa_cli.optim import optimizer_tensors, restore_optimizer
from pissa_cli.rundir import Run, read_json, whole_folder, write_json
from pissa_cli.weights import load_tensors, save_tensors

Names = dict[nn.Parameter, str]
"""The parameters that train, by name."""


def save_checkpoint(run: Run, step: int, names: Names, optimizer: torch.optim.Optimizer, data: str, keep: int) -> Path:
    """Write checkpoints/step-N: trained values, optimizer state, and `data`, the hash of the examples.

    Only the newest `keep` remain.

    Raises PissaError for a disk that fails; older checkpoints are intact then.
    """
    final = run.checkpoints / f"step-{step}"
    with whole_folder(final) as folder:
        save_tensors(folder / "trained.safetensors", {name: p.detach().cpu() for p, name in names.items()})
        save_tensors(folder / "optimizer.safetensors", optimizer_tensors(optimizer, names))
        write_json(folder / "state.json", {"step": step, "data": data})
    for old in _folders(run)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


@torch.no_grad()
def restore_checkpoint(folder: Path, names: Names, optimizer: torch.optim.Optimizer, data: str) -> int:
    """Put a checkpoint back and return its step. UsageError if it is one of other parameters or examples."""
    state = read_json(folder / "state.json")
    if state["data"] != data:
        raise UsageError(
            f"{folder}: trained on other data than data.train holds now", "bring the old rows back to resume"
        )
    trained = load_tensors(folder / "trained.safetensors")
    if set(trained) != set(names.values()):
        raise UsageError(
            f"{folder}: holds other parameters than this recipe trains",
            "resume with the recipe that the run was begun with, or start a new run with another --output",
        )
    for parameter, name in names.items():
        parameter.copy_(trained[name])
    restore_optimizer(optimizer, names, load_tensors(folder / "optimizer.safetensors"))
    return int(state["step"])


def latest_checkpoint(run: Run) -> Path | None:
    """The newest checkpoint; what lies under its final name is whole."""
    folders = _folders(run)
    return folders[-1] if folders else None


def step_of(folder: Path) -> int:
    """N of checkpoints/step-N."""
    return int(folder.name.removeprefix("step-"))


def _folders(run: Run) -> list[Path]:
    numbered = [(path.name.removeprefix("step-"), path) for path in run.checkpoints.glob("step-*")]
    return [path for _, path in sorted((int(number), path) for number, path in numbered if number.isdigit())]
