"""Faster ways through what lies between the adapter layers: torch.compile, and Liger's kernels."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from pissa_cli.base.attach import lowrank_layers
from pissa_cli.base.experts import holders_of_3d_weights
from pissa_cli.errors import UsageError, in_one_line
from pissa_cli.matrices.products import has_fast_bf16
from pissa_cli.schema.recipe import TrainSection
from pissa_cli.training.packing import BY_SEQUENCE
from pissa_cli.training.sharding import blocks_of

GRAPHS = 8  # of a block: for training and evaluation, one row and several
NO_LIGER = "set it to false"
OTHER_LIGER = "pip install -U liger-kernel, or set it to false"
LIGER = {"cross_entropy": False, "fused_linear_cross_entropy": False}  # the loss has a way of its own


def require_kernels(section: TrainSection) -> None:
    """Raise UsageError, before any work, for kernels that cannot run here."""
    if section.use_liger_kernel is True and not torch.cuda.is_available():
        raise UsageError("train.use_liger_kernel: Liger's kernels need a GPU", NO_LIGER)
    if section.use_liger_kernel is True and not _has_liger():
        raise UsageError("train.use_liger_kernel: liger-kernel is not installed", "pip install 'pissa[liger]'")


def wants_liger(section: TrainSection) -> bool:
    """Whether the recipe asks for Liger's kernels, or takes them where they are and can serve."""
    return _may_take_liger(section) and _has_liger() if section.use_liger_kernel == "auto" else section.use_liger_kernel


def misses_liger(section: TrainSection) -> bool:
    """Whether the recipe would take Liger's kernels, and they are not installed."""
    return section.use_liger_kernel == "auto" and _may_take_liger(section) and not _has_liger()


def _may_take_liger(section: TrainSection) -> bool:
    """Unasked: not where torch compiles its own, nor on a GPU without bf16, for which Liger's are compiled."""
    return not section.torch_compile and torch.cuda.is_available() and has_fast_bf16(torch.device("cuda"))


def _has_liger() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None


def use_liger(model: PreTrainedModel, section: TrainSection, loss: Callable[[], float], tolerance: float) -> bool:
    """Norms, rotary embeddings and the MLP's products by Liger's kernels. Whether it has any for this model.

    Not in mixtures of experts' own products: they would leave the adapters of the experts out. Raises UsageError, with
    the model as it was, where they fail or change the loss by more than this share of it, and where a recipe asks for
    kernels that are not there.
    """
    before, modules = loss(), list(model.modules())
    files = [vars(sys.modules[name]) for name in {type(module).__module__ for module in modules}]
    # functions of the model's file may be replaced, too, and activations
    parts: list[Any] = [*files, ACT2FN, *(part for module in modules for part in (vars(module), module._modules))]
    kept = [dict(part.items()) for part in parts]
    try:
        used, after = _with_liger(model, loss)
        if not used and section.use_liger_kernel is True:
            raise UsageError(f"train.use_liger_kernel: Liger has no kernels for {model.config.model_type}", NO_LIGER)
        if math.isfinite(before) and not abs(after - before) <= tolerance * max(1.0, abs(before)):
            raise UsageError(
                f"train.use_liger_kernel: with Liger's kernels the loss is {after:.4f}, without {before:.4f}", NO_LIGER
            )
        return used
    except UsageError:
        for part, names in zip(parts, kept, strict=True):
            for added in part.keys() - names.keys():
                del part[added]
            part.update(names)
        raise


def _with_liger(model: PreTrainedModel, loss: Callable[[], float]) -> tuple[bool, float]:
    """(whether Liger has kernels for this model, the loss with them). UsageError where they fail."""
    from transformers.integrations.liger import apply_liger_kernel

    own = {module: (vars(module).get("forward"), list(module.children())) for module in model.modules()}
    try:
        apply_liger_kernel(model, LIGER)
        for name in holders_of_3d_weights(model):
            model.get_submodule(name).__dict__.pop("forward", None)
        used = any((vars(module).get("forward"), list(module.children())) != had for module, had in own.items())
        return used, loss()
    except Exception as error:  # of other versions, of Triton without a compiler, or of memory that ran out
        raise UsageError(f"train.use_liger_kernel: Liger's kernels fail: {in_one_line(error)}", OTHER_LIGER) from None


def compile_blocks(model: PreTrainedModel, device: torch.device) -> None:
    """Compile each block of the model when it first runs: with its adapter layers, each of them by itself, and in
    pieces around experts and attention by sequence.

    Blocks are the modules that the model names as whole, or else those that it can recompute. Raises UsageError where
    torch cannot compile, and for a model without such blocks.
    """
    try:
        torch.compile(lambda x: x + 1)(torch.ones(2, device=device))
    except Exception as error:  # of the compiler, which may be any
        raise UsageError(
            f"train.torch_compile: torch cannot compile here: {in_one_line(error)}", "set it to false"
        ) from None
    blocks = blocks_of(model) or [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not blocks:
        raise UsageError(
            f"train.torch_compile: {model.config.model_type} does not say which its blocks are", "set it to false"
        )
    for layer in lowrank_layers(model).values():
        layer.siblings = None  # what they keep between their calls the compiler cannot see
    for name in holders_of_3d_weights(model):
        experts = model.get_submodule(name)
        experts.forward = torch.compiler.disable(experts.forward)
    if model.config._attn_implementation == BY_SEQUENCE:
        AttentionInterface.register(BY_SEQUENCE, torch.compiler.disable(AttentionInterface()[BY_SEQUENCE]))
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, GRAPHS * len(blocks))  # where each has ranks of its own
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, limits.recompile_limit)
    for block in blocks:
        block.compile(dynamic=True)
