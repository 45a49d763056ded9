"""Mixture-of-experts layers that transformers keeps as 3-D weights: each expert's matrices as layers of their own.

They go by the names that their tensors have on disk, as in `model.layers.0.block_sparse_moe.experts.0.w1`. PEFT files
name them so, too; PEFT turns that into its form for 3-D weights when it loads them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

IMPLEMENTATION = "pissa"
DISK_NAMES = {"mixtral": ("w1", "w3", "w2"), "qwen2_moe": ("gate_proj", "up_proj", "down_proj")}
"""Names of gate, up and down on disk, by transformers' conversion pattern."""
PARTS = ("gate", "up", "down")


@dataclass(frozen=True)
class Expert:
    """One matrix of one expert: the module that holds it, its number, and which part it is."""

    module: str
    number: int
    part: str


class ExpertWeight(nn.Module):
    """A view of one expert's matrix (out, in), as the base of a low-rank layer."""

    bias = None

    def __init__(self, experts: nn.Module, expert: Expert) -> None:
        super().__init__()
        self._experts, self._expert = (experts,), expert  # in a tuple: not a submodule

    @property
    def weight(self) -> Tensor:
        return expert_weight(self._experts[0], self._expert.number, self._expert.part)


def expert_weight(experts: nn.Module, number: int, part: str) -> Tensor:
    """W (out, in), a view."""
    if part == "down":
        down: Tensor = experts.down_proj[number]  # type: ignore[index]
        return down
    both: Tensor = experts.gate_up_proj[number]  # type: ignore[index]
    return both.chunk(2)[0 if part == "gate" else 1]


def expert_layers(model: PreTrainedModel) -> Iterator[tuple[str, Expert, torch.Size]]:
    """(name on disk without `.weight`, expert, shape (out, in)) of every matrix of every expert that can be adapted."""
    pattern = _MODEL_TO_CONVERSION_PATTERN.get(model.config.model_type, model.config.model_type)
    if pattern not in DISK_NAMES:
        return
    for name, module in model.named_modules():
        gated = getattr(module, "has_gate", False) and getattr(module, "is_concatenated", False)
        if not gated or module.has_bias or module.is_transposed:
            continue
        place = name.replace(".mlp.", ".block_sparse_moe.") if pattern == "mixtral" else name
        for number in range(len(module.down_proj)):
            for part, on_disk in zip(PARTS, DISK_NAMES[pattern], strict=True):
                shape = expert_weight(module, number, part).shape
                yield f"{place}.{number}.{on_disk}", Expert(name, number, part), shape


def adapted_forward(experts: nn.Module, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts of x (tokens, in) one after the other, through their low-rank layers; transformers calls it."""
    y = torch.zeros_like(x)
    for number in top_k_index.unique().tolist():
        if number >= len(experts.down_proj):  # type: ignore[arg-type]
            continue
        tokens, place = torch.where(top_k_index == number)
        chosen = x[tokens]
        gate_up = torch.cat([_linear(experts, number, part, chosen) for part in ("gate", "up")], dim=-1)
        out = _linear(experts, number, "down", experts._apply_gate(gate_up))  # type: ignore[operator]
        y.index_add_(0, tokens, (out * top_k_weights[tokens, place, None]).to(y.dtype))
    return y


def _linear(experts: nn.Module, number: int, part: str, x: Tensor) -> Tensor:
    adapters = getattr(experts, "adapters", {})
    if f"{part}_{number}" in adapters:
        y: Tensor = adapters[f"{part}_{number}"](x)
        return y
    return nn.functional.linear(x, expert_weight(experts, number, part))


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, adapted_forward)
