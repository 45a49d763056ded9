"""Mixture-of-experts layers that transformers keeps as 3-D weights: each expert's matrices as layers of their own.

They go by the names that their tensors have on disk, as in `model.layers.0.block_sparse_moe.experts.0.w1`. PEFT files
name them so, too; PEFT turns that into its form for 3-D weights when it loads them. A matrix that is adapted, or packed
in NF4, is a module of `experts.parts`; the others are views of the 3-D weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from pissa_cli.matrices.products import LinearFunction, in_autocast_dtype, product_dtype

IMPLEMENTATION = "pissa"
DISK_NAMES = {"mixtral": ("w1", "w3", "w2"), "qwen2_moe": ("gate_proj", "up_proj", "down_proj")}
"""Names of gate, up and down on disk, by transformers' conversion pattern."""
PARTS = ("gate", "up", "down")
EXPERT_PARAMETERS = ("gate_up_proj", "down_proj")


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


def peft_remaps(model: PreTrainedModel) -> set[str]:
    """Kinds of layer (gate, w1) that PEFT, where they are targets, takes for those of experts and router and turns into
    3-D parameters. Empty for a model where it does not do so; qwen2_moe itself it forgets."""
    kind = model.config.model_type
    pattern = kind if kind == "mixtral" else _MODEL_TO_CONVERSION_PATTERN.get(kind)
    return {"gate", *DISK_NAMES[pattern]} if pattern in DISK_NAMES else set()


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
        shapes = _shapes(module)
        for number in range(module.num_experts):
            for part, on_disk in zip(PARTS, DISK_NAMES[pattern], strict=True):
                yield f"{place}.{number}.{on_disk}", Expert(name, number, part), shapes[part]


def holders_of_3d_weights(model: PreTrainedModel) -> set[str]:
    """The names of modules with 3-D weights, convolutions and vectors (1, 1, width) aside."""
    return {
        name
        for name, module in model.named_modules()
        if not isinstance(module, nn.Conv1d)
        and any(p.ndim == 3 and p.shape[:2] != (1, 1) for p in module.parameters(recurse=False))
    }


def has_experts(model: PreTrainedModel) -> bool:
    """Whether a module holds the weights of several experts, of which one may get no token."""
    holders = (model.get_submodule(name) for name in holders_of_3d_weights(model))
    return any(hasattr(module, "num_experts") or hasattr(module, EXPERT_PARAMETERS[0]) for module in holders)


def without_expert_weights(kind: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """A subclass of a model class whose experts have no weights of their own, so that loading makes none.

    transformers 5 reads no packed experts; each of their matrices becomes a module of its own: see `set_part`.
    """

    def __init__(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        kind.__init__(self, *args, **kwargs)
        for name in {expert.module for _, expert, _ in expert_layers(self)}:
            experts = self.get_submodule(name)
            experts.part_shapes = _shapes(experts)
            for parameter in EXPERT_PARAMETERS:
                delattr(experts, parameter)
                setattr(experts, parameter, torch.empty(0))  # transformers' initialization asks for it

    ignored = [*(kind._keys_to_ignore_on_load_unexpected or []), r"\.experts\."]
    body = {"__init__": __init__, "_keys_to_ignore_on_load_unexpected": ignored, "__module__": kind.__module__}
    return type(kind.__name__, (kind,), body)


def set_part(model: PreTrainedModel, expert: Expert, module: nn.Module) -> None:
    """Let `module` compute the product with this expert's matrix."""
    experts = model.get_submodule(expert.module)
    if not hasattr(experts, "parts"):
        experts.parts = nn.ModuleDict()
    experts.parts[_key(expert.number, expert.part)] = module
    model.config._experts_implementation = IMPLEMENTATION


def one_by_one(model: PreTrainedModel) -> None:
    """Have the experts compute one after the other, as adapted ones do, where they can."""
    if any(True for _ in expert_layers(model)):
        model.config._experts_implementation = IMPLEMENTATION


def part_of(model: PreTrainedModel, expert: Expert) -> nn.Module:
    """What computes the product with this expert's matrix."""
    experts = model.get_submodule(expert.module)
    parts: Any = getattr(experts, "parts", {})
    key = _key(expert.number, expert.part)
    return parts[key] if key in parts else ExpertWeight(experts, expert)


def _key(number: int, part: str) -> str:
    return f"{part}_{number}"


def _shapes(experts: nn.Module) -> dict[str, torch.Size]:
    """(out, in) of each part."""
    if hasattr(experts, "part_shapes"):
        known: Any = experts.part_shapes
        return dict(known)
    return {part: expert_weight(experts, 0, part).shape for part in PARTS}


def adapted_forward(experts: nn.Module, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts of x (tokens, in) one after the other, through their low-rank layers; transformers calls it.

    Which tokens each has is asked of a GPU once for all of them: asked one by one, it would stand idle between them.
    """
    y, numbers, each = torch.zeros_like(x), top_k_index.flatten(), top_k_index.shape[1]
    order = numbers.argsort(stable=True)
    known = torch.arange(experts.num_experts + 1, device=x.device)  # type: ignore[operator, arg-type]
    begins = torch.searchsorted(numbers[order], known).tolist()
    for number, (begin, end) in enumerate(pairwise(begins)):
        if begin == end:
            continue
        tokens, place = order[begin:end] // each, order[begin:end] % each
        chosen = x[tokens]
        gate_up = torch.cat([_linear(experts, number, part, chosen) for part in ("gate", "up")], dim=-1)
        out = _linear(experts, number, "down", experts._apply_gate(gate_up))  # type: ignore[operator]
        y.index_add_(0, tokens, (out * top_k_weights[tokens, place, None]).to(y.dtype))
    return y


def _linear(experts: nn.Module, number: int, part: str, x: Tensor) -> Tensor:
    parts: Any = getattr(experts, "parts", {})
    key, x = _key(number, part), in_autocast_dtype(x)
    y: Tensor
    if key in parts:
        y = parts[key](x)
    else:
        W = expert_weight(experts, number, part)
        widens = product_dtype(x) != x.dtype
        y = LinearFunction.apply(x, lambda _: W, W, None) if widens else nn.functional.linear(x, W)
    return y


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, adapted_forward)
