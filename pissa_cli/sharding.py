"""A model whose parameters are spread over the processes: torch's fully_shard (FSDP2), and whole tensors in and out."""

from __future__ import annotations

import os
from typing import cast

import torch
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule as FSDPModule
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from pissa_cli import quant
from pissa_cli.adapters.lowrank import LowRank
from pissa_cli.errors import UsageError

_UNUSED = {
    "FSDP_OFFLOAD_PARAMS": "offloading parameters to the CPU",
    "FSDP_ACTIVATION_CHECKPOINTING": "FSDP's activation checkpointing (use train.gradient_checkpointing)",
}


def asked_by_accelerate() -> bool:
    """Whether `accelerate launch` was configured for FSDP2; takes the request out of its hands.

    Accelerate would shard the model itself, without our layers' stored weights. Raises UsageError for FSDP1, DeepSpeed,
    and settings that have no effect here.
    """
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        raise UsageError("accelerate: DeepSpeed is not supported", "use FSDP2: configs/accelerate/fsdp2.yaml")
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return False
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UsageError("accelerate: FSDP version 1 is not supported", "set fsdp_version: 2 in its configuration")
    for name, meaning in _UNUSED.items():
        if parse_flag_from_env(name):
            raise UsageError(f"accelerate: {meaning} is not supported", f"turn {name.lower()} off")
    os.environ.pop("ACCELERATE_USE_FSDP")
    return True


def shard(model: PreTrainedModel, device: torch.device, processes: int) -> None:
    """Spread every parameter of `model`, which lies on `device`, over the processes, block by block.

    A block's parameters are whole while it computes. NF4 weights are spread as bytes, their scales stay whole; NF4
    layers without an adapter stay whole, since bitsandbytes' own forward needs them so.
    """
    mesh = init_device_mesh(device.type, (processes,))
    adapted = {layer.base for layer in model.modules() if isinstance(layer, LowRank)}
    ignored = {module.weight for module in model.modules() if quant.keeps_own_state(module) and module not in adapted}
    kinds = set(model._no_split_modules or ())
    blocks = [module for module in model.modules() if type(module).__name__ in kinds]
    for module in [*blocks, model]:
        fully_shard(module, mesh=mesh, ignored_params=ignored)


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be spread over the processes, in whole; all of them must ask."""
    if not isinstance(tensor, DTensor):
        return tensor
    full: Tensor = tensor.full_tensor()
    return full


def spread_as(parameter: nn.Parameter, tensor: Tensor) -> Tensor:
    """`tensor`, which every process has, on the device of `parameter` and spread as it is."""
    tensor = tensor.to(parameter.device)
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor
    return cast(Tensor, distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None))
