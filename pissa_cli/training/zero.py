"""DeepSpeed's ZeRO: the optimizer (stage 2) or all of the model (stage 3) spread over the processes by its engine."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pissa_cli.adapters.lowrank import LowRank
from pissa_cli.errors import UsageError

_MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW


def initialize(
    model: nn.Module, optimizer: torch.optim.Optimizer, stage: int, max_grad_norm: float, device: torch.device
) -> Any:
    """DeepSpeed's engine over a model on `device` and its AdamW; gradients are clipped in the optimizer's step.

    Dtypes stay as they are. Raises UsageError where DeepSpeed is not installed.
    """
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    config = {
        "train_micro_batch_size_per_gpu": 1,  # counts nothing here: batches are formed by the recipe
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": max_grad_norm,
    }
    with contextlib.redirect_stdout(sys.stderr):  # which is for results
        try:
            import deepspeed
        except ImportError as error:
            raise UsageError("accelerate: DeepSpeed is not installed", "pip install 'pissa[deepspeed]'") from error
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        if device.type == "cpu":  # where it compiles, for a minute, what only inference would call
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    if stage == 3:
        for layer in (module for module in model.modules() if isinstance(module, LowRank)):
            for parameter in layer.base.parameters(recurse=False):  # which the layer reads itself
                deepspeed.zero.register_external_parameter(layer, parameter)
    return engine


def spreads(what: object) -> bool:
    """Whether this is an engine or optimizer of DeepSpeed, or a parameter that it has taken over."""
    return type(what).__module__.startswith("deepspeed.") or hasattr(what, "ds_id") or hasattr(what, "_hp_mapping")


def backward(engine: Any, loss: Tensor, last: bool) -> None:
    """Add the gradients of a micro-batch, averaged over the processes. last: of the step."""
    engine.set_gradient_accumulation_boundary(last)
    engine.backward(loss)


def gradient_norm(parameters: Iterable[nn.Parameter]) -> float:
    """The norm of a step's gradients; all processes must ask."""
    from deepspeed.utils import safe_get_full_grad

    gradients = (safe_get_full_grad(parameter) for parameter in parameters)
    return float(torch.stack([gradient.float().norm() for gradient in gradients if gradient is not None]).norm())


@contextlib.contextmanager
def gathered(parameters: Iterable[nn.Parameter], changed: bool = False) -> Iterator[None]:
    """Those of the parameters that are spread in whole, outside of a forward pass; all processes must ask.

    changed: inside, the first process gives them new values.
    """
    spread = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not spread:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(spread, modifier_rank=0 if changed else None):
        yield


def value(parameter: nn.Parameter) -> Tensor:
    """A parameter in whole; all processes must ask."""
    with gathered([parameter]):
        return parameter.detach().clone()


def put(parameter: nn.Parameter, tensor: Tensor) -> None:
    """Give a parameter the values of `tensor`, which every process has."""
    from deepspeed.utils import safe_set_full_fp32_param

    with gathered([parameter], changed=True):
        parameter.data.copy_(tensor)
    safe_set_full_fp32_param(parameter, tensor.to(parameter.device))


def states(optimizer: Any, parameter: nn.Parameter) -> dict[str, Tensor]:
    """AdamW's state of a parameter in whole, empty before the first step; all processes must ask."""
    from deepspeed.utils import safe_get_full_optimizer_state

    steps = [state["step"] for state in optimizer.optimizer.state.values()]
    if not steps:
        return {}
    return {"step": steps[0]} | {key: safe_get_full_optimizer_state(parameter, key) for key in _MOMENTS}


def put_states(optimizer: Any, wanted: dict[nn.Parameter, dict[str, Any]]) -> None:
    """Give AdamW the states that `states` took, of all parameters that train."""
    from deepspeed.utils import safe_set_full_optimizer_state

    if not wanted:
        return
    step = next(iter(wanted.values()))["step"]
    own = "single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"  # of stage 2 and of stage 3
    for flat in next(getattr(optimizer, name) for name in own if hasattr(optimizer, name)):
        moments = {key: torch.zeros_like(flat, requires_grad=False) for key in _MOMENTS}
        optimizer.optimizer.state[flat] = {"step": step.clone(), **moments}
    link = getattr(optimizer, "_lazy_init_hp_params_optimizer_state", None)
    if link is not None:  # stage 2 does that in its first step
        link()
    for parameter, state in wanted.items():
        for key in _MOMENTS:
            safe_set_full_optimizer_state(parameter, state[key], key)
