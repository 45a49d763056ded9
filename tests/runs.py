"""What the tests of training share: a short run, and what it left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from pissa_cli.base.weights import load_tensors
from pissa_cli.run.rundir import Run

BASE = ("model.bits=32", "adapter.rank=4", "train.lr=0.005", "train.batch_size=8", "train.micro_batch_size=4")


def events(recipe: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Run(Path(recipe.output)).metrics.read_text().splitlines()]


def adapter(recipe: Any) -> dict[str, torch.Tensor]:
    return load_tensors(Run(Path(recipe.output)).adapter / "adapter_model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


def state_of(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(folder.rglob("*")) if p.is_file()}
