"""Faster ways through what lies between the adapter layers: torch.compile, and Liger's kernels."""

from __future__ import annotations

import importlib.util

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from pissa_cli.attach import lowrank_layers
from pissa_cli.configuration import first_line
from pissa_cli.errors import UsageError
from pissa_cli.packing import BY_SEQUENCE
from pissa_cli.recipe import TrainSection

LIGER = {"cross_entropy": False, "fused_linear_cross_entropy": False}  # the loss has a way of its own


def require_kernels(section: TrainSection) -> None:
    """Raise UsageError, before any work, for kernels that cannot run here."""
    if section.use_liger_kernel and not torch.cuda.is_available():
        raise UsageError("train.use_liger_kernel: Liger's kernels need a GPU", "set it to false")
    if section.use_liger_kernel and importlib.util.find_spec("liger_kernel") is None:
        raise UsageError("train.use_liger_kernel: liger-kernel is not installed", "pip install 'pissa[liger]'")


def use_liger(model: PreTrainedModel) -> None:
    """Norms, rotary embeddings and the MLP's products by Liger's kernels, for the architectures that it knows."""
    from transformers.integrations.liger import apply_liger_kernel

    apply_liger_kernel(model, LIGER)


def compile_blocks(model: PreTrainedModel, device: torch.device) -> None:
    """Compile each block of the model when it first runs, in pieces between the adapter layers and attention.

    Raises UsageError where torch cannot compile.
    """
    try:
        torch.compile(lambda x: x + 1)(torch.ones(2, device=device))
    except Exception as error:  # of the compiler, which may be any
        raise UsageError(
            f"train.torch_compile: torch cannot compile here: {first_line(error)}", "set it to false"
        ) from None
    for layer in lowrank_layers(model).values():
        layer.forward = torch.compiler.disable(layer.forward)  # type: ignore[method-assign]
    if model.config._attn_implementation == BY_SEQUENCE:
        AttentionInterface.register(BY_SEQUENCE, torch.compiler.disable(AttentionInterface()[BY_SEQUENCE]))
    blocks = set(model._no_split_modules or ())
    for block in model.modules():
        if type(block).__name__ in blocks and not isinstance(block, nn.Embedding):
            block.compile(dynamic=True)
