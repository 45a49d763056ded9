"""The optimizer, its learning rate by step, and its state as plain tensors."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from pissa_cli.adapters.lowrank import FACTOR_NAMES
from pissa_cli.errors import UsageError
from pissa_cli.schema.adapter_options import LoraOptions
from pissa_cli.schema.recipe import Recipe, TrainSection
from pissa_cli.training import zero
from pissa_cli.training.sharding import spread_as, whole

Names = dict[nn.Parameter, str]
"""The parameters that train, and how checkpoints call them."""


def make_optimizer(names: Names, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW with betas (0.9, 0.999), or bitsandbytes' paged 8-bit AdamW. names: the parameters that train.

    Each group's `ratio` multiplies the learning rate: that of B over that of A for LoRA+ (arXiv 2402.12354), and that
    of modules that train whole beside an adapter.
    """
    ratios = dict.fromkeys(FACTOR_NAMES, 1.0)
    if isinstance(recipe.adapter, LoraOptions):
        ratios["B"] = recipe.adapter.lr_ratio
    others = (recipe.train.head_lr or recipe.lr) / recipe.lr
    members: dict[float, list[nn.Parameter]] = {}
    for parameter, name in names.items():
        members.setdefault(ratios.get(name.rpartition(".")[2], others), []).append(parameter)
    groups: list[dict[str, Any]] = [{"params": parameters, "ratio": ratio} for ratio, parameters in members.items()]
    section = recipe.train
    if section.optimizer == "paged-adamw-8bit":
        from bitsandbytes.optim import PagedAdamW8bit

        paged: torch.optim.Optimizer = PagedAdamW8bit(groups, lr=recipe.lr, weight_decay=section.weight_decay)
        return paged
    return torch.optim.AdamW(groups, lr=recipe.lr, weight_decay=section.weight_decay)


def learning_rate(step: int, total: int, section: TrainSection, peak: float) -> float:
    """The rate of optimizer step `step` (from 0) of `total`.

    As transformers' schedules of the same names have it, but that the warm-up starts above zero: no step is wasted.
    """
    warmup = math.ceil(section.warmup * total) if section.warmup < 1 else int(section.warmup)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = (step - warmup) / (total - warmup)
    if section.schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (1 - progress) if section.schedule == "linear" else peak


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Names, first: bool) -> dict[str, Tensor]:
    """The state as `{"parameter|key": tensor}`, in whole; Python numbers become 0-dimensional fp64 tensors.

    All processes must ask, the `first` gets it.
    """
    tensors, spread = {}, zero.spreads(optimizer)
    for parameter, name in names.items():
        state = zero.states(optimizer, parameter) if spread else optimizer.state.get(parameter, {})
        for key, value in state.items():
            kept = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
            kept = whole(kept.detach())
            if first:
                tensors[f"{name}|{key}"] = kept.cpu().clone()
    return tensors


def restore_optimizer(optimizer: torch.optim.Optimizer, names: Names, tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` took. UsageError if it is the state of other parameters."""
    parameters = {name: parameter for parameter, name in names.items()}
    states: dict[nn.Parameter, dict[str, Any]] = {}
    for full, tensor in tensors.items():
        name, _, key = full.rpartition("|")
        if name not in parameters:
            raise UsageError(
                f"the checkpoint's optimizer has a state for {name}, which does not train here",
                "resume with the recipe that the run was begun with, or start a new run with another --output",
            )
        parameter = parameters[name]
        if tensor.dtype == torch.float64 and tensor.ndim == 0:
            value: Any = int(tensor) if float(tensor).is_integer() else float(tensor)
        else:  # AdamW keeps its step count on the CPU
            value = tensor if tensor.ndim == 0 else _placed(optimizer, parameter, key, spread_as(parameter, tensor))
        states.setdefault(parameter, {})[key] = value
    if zero.spreads(optimizer):
        zero.put_states(optimizer, states)
        return
    optimizer.state.clear()  # what a checkpoint does not hold was not there when it was written
    for parameter, state in states.items():
        optimizer.state[parameter] = state


def _placed(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, key: str, value: Tensor) -> Tensor:
    """`value`, a part of a parameter's state, copied into the buffer that is there if it fits. For bitsandbytes on a
    GPU one is made first, by its own function: it pages such buffers alone, and does not free them."""
    there = optimizer.state.get(parameter, {}).get(key)
    make = getattr(optimizer, "get_state_buffer", None)
    if there is None and make is not None and parameter.is_cuda and key in ("state1", "state2"):
        there = make(parameter, dtype=value.dtype)
    fits = isinstance(there, Tensor) and (there.shape, there.dtype) == (value.shape, value.dtype)
    return there.copy_(value) if fits else value
