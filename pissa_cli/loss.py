"""The training loss: cross entropy over target tokens, and the precision it is computed in."""

from __future__ import annotations

import contextlib
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

IGNORED = -100


def summed_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Cross entropy summed over the target tokens of a micro-batch, in fp32.

    Where the model can, it computes logits only at positions that are a target in some row.
    """
    labels = batch.pop("labels")[:, 1:]
    wanted = labels != IGNORED
    if "logits_to_keep" in inspect.signature(getattr(model, "module", model).forward).parameters:
        keep = wanted.any(0).nonzero().flatten()
        logits = model(**batch, use_cache=False, logits_to_keep=keep).logits[wanted[:, keep]]
    else:
        logits = model(**batch, use_cache=False).logits[:, :-1][wanted]
    return cross_entropy(logits.float(), labels[wanted], reduction="sum")


def autocast(bits: int, precision: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """bf16 products over fp32 weights; where weights have the dtype of the products there is nothing to cast."""
    if bits == 32 and precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()
