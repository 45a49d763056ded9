"""A model that is spread over the processes: by torch's fully_shard (FSDP2) or DeepSpeed; whole tensors in and out."""

from __future__ import annotations

import os
from typing import Literal, cast

import torch
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from pissa_cli.adapters.lowrank import LowRank
from pissa_cli.errors import UsageError
from pissa_cli.matrices import quant
from pissa_cli.training import zero

Layout = Literal["copies", "fsdp2", "zero-2", "zero-3"]
"""What each of several processes has of the model: all of it, or a share."""

_FSDP_UNUSED = {
    "FSDP_OFFLOAD_PARAMS": "offloading parameters to the CPU",
    "FSDP_ACTIVATION_CHECKPOINTING": "FSDP's activation checkpointing (use train.gradient_checkpointing)",
}
_DEEPSPEED_UNUSED = {
    "ACCELERATE_DEEPSPEED_CONFIG_FILE": ("none", "set zero_stage in Accelerate's own configuration"),
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": ("none", "set offload_optimizer_device to none"),
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": ("none", "set offload_param_device to none"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("1", "the recipe says it: train.batch_size, train.micro_batch_size"),
    "ACCELERATE_GRADIENT_CLIPPING": ("none", "the recipe says it: train.max_grad_norm"),
}


def asked_by_accelerate() -> Layout | None:
    """The layout that `accelerate launch` was configured for, if it was; takes the request out of its hands.

    Accelerate would shard the model itself, without our layers' stored weights. Raises UsageError for FSDP1, other
    stages of DeepSpeed than 2 and 3, and settings that have no effect here.
    """
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        if stage not in ("2", "3"):
            raise UsageError(f"accelerate: DeepSpeed's ZeRO stage {stage} is not supported", "set zero_stage to 2 or 3")
        for name, (unset, hint) in _DEEPSPEED_UNUSED.items():
            given = os.environ.get(name, unset)
            if given != unset:
                setting = name.removeprefix("ACCELERATE_").removeprefix("DEEPSPEED_").lower()
                raise UsageError(f"accelerate: DeepSpeed's {setting} = {given} is not supported", hint)
        os.environ.pop("ACCELERATE_USE_DEEPSPEED")
        return "zero-2" if stage == "2" else "zero-3"
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return None
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UsageError("accelerate: FSDP version 1 is not supported", "set fsdp_version: 2 in its configuration")
    for name, meaning in _FSDP_UNUSED.items():
        if parse_flag_from_env(name):
            raise UsageError(f"accelerate: {meaning} is not supported", f"turn {name.lower()} off")
    os.environ.pop("ACCELERATE_USE_FSDP")
    return "fsdp2"


def shard(model: PreTrainedModel, device: torch.device, processes: int) -> None:
    """Spread every parameter of `model`, which lies on `device`, over the processes, block by block.

    A block's parameters are whole while it computes. NF4 weights are spread as bytes, their scales stay whole; NF4
    layers without an adapter stay whole, since bitsandbytes' own forward needs them so. Raises UsageError where torch
    spreads no bytes.
    """
    mesh = init_device_mesh(device.type, (processes,))
    adapted = {layer.base for layer in model.modules() if isinstance(layer, LowRank)}
    packed = [module for module in model.modules() if quant.is_packed(module)]
    for module in packed:
        quant.keep_own_state(module)
    ignored = {module.weight for module in packed if module not in adapted}
    for module in [*reversed(blocks_of(model)), model]:  # inner before outer
        try:
            fully_shard(module, mesh=mesh, ignored_params=ignored)
        except RuntimeError as error:
            if "floating point dtype" not in str(error):
                raise
            raise UsageError(
                f"train.shard: FSDP2 of torch {torch.__version__} cannot spread 4-bit weights",
                "install a later torch (2.13 can), or set train.shard to false: each process then has the whole model",
            ) from None


def blocks_of(model: PreTrainedModel) -> list[nn.Module]:
    """The modules that a model names as whole, outer before inner; none where it names none."""
    kinds = set(model._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in kinds]


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be spread over the processes, in whole; all of them must ask."""
    if isinstance(tensor, DTensor):
        full: Tensor = tensor.full_tensor()
        return full
    return zero.value(tensor) if isinstance(tensor, nn.Parameter) and zero.spreads(tensor) else tensor


def put(parameter: nn.Parameter, tensor: Tensor) -> None:
    """Give a parameter, be it spread, the values of `tensor`, which every process has."""
    if zero.spreads(parameter):
        zero.put(parameter, tensor)
    else:
        parameter.copy_(spread_as(parameter, tensor))


def spread_as(parameter: nn.Parameter, tensor: Tensor) -> Tensor:
    """`tensor`, which every process has, on the device of `parameter` and spread by FSDP2 as it is."""
    tensor = tensor.to(parameter.device)
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor
    return cast(Tensor, distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None))
