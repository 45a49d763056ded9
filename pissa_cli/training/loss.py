"""The training loss: cross entropy over target tokens, and the precision it is computed in."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pissa_cli.matrices.products import CAST, linear, product_dtype, times
from pissa_cli.schema.recipe import Recipe
from pissa_cli.training.zero import gathered

IGNORED = -100
LOGITS = {"cpu": 2**20, "cuda": 2**27}  # numbers of a chunk of logits; on a CPU what its caches hold
ROWS = 128  # of a chunk at least: the head is read for each


def summed_loss(model: nn.Module, batch: dict[str, Tensor], chunked: bool = False) -> Tensor:
    """Cross entropy summed over the target tokens of a micro-batch, in fp32; of texts with labels (n,), over the texts,
    or where there is a single logit the squared error (transformers' regression).

    Where the model can, it computes logits only at positions that are a target in some row. With `chunked` the logits
    come in chunks and never exist in whole: for models whose output head is the last thing they compute, but for a
    factor (`guards.chunks_loss` tells). Labels may stay on the CPU: which positions are targets is known there at once.
    """
    labels, device = batch.pop("labels"), batch["input_ids"].device
    if labels.ndim == 1:
        logits, labels = model(**batch).logits.float(), labels.to(device, non_blocking=True)
        if logits.shape[1] == 1:
            return functional.mse_loss(logits[:, 0], labels, reduction="sum")
        return functional.cross_entropy(logits, labels.long(), reduction="sum")
    labels = labels[:, 1:]
    wanted = labels != IGNORED
    keep = wanted.any(0).nonzero().flatten()
    found = keep, *wanted[:, keep].nonzero(as_tuple=True), labels[wanted]
    keep, rows, columns, targets = (numbers.to(device, non_blocking=True) for numbers in found)
    return loss_at(model, batch, keep, (rows, columns), targets, chunked)


def loss_at(
    model: nn.Module, batch: dict[str, Tensor], keep: Tensor, places: tuple[Tensor, ...], targets: Tensor, chunked: bool
) -> Tensor:
    """The cross entropy of `summed_loss`, at known places: columns `keep` (k,) of the input, of these the rows and
    columns in `places` (n,), (n,), where the next tokens are `targets` (n,)."""
    inner: Any = getattr(model, "module", model)
    head = inner.get_output_embeddings() if chunked else None
    with _without_head(head):
        if "logits_to_keep" in inspect.signature(inner.forward).parameters:
            outputs = model(**batch, use_cache=False, logits_to_keep=keep).logits[places]
        else:
            rows, columns = places
            outputs = model(**batch, use_cache=False).logits[rows, keep[columns]]
    if head is None:
        return functional.cross_entropy(outputs.float(), targets, reduction="sum")
    if torch.is_autocast_enabled(outputs.device.type):
        outputs = outputs.to(torch.get_autocast_dtype(outputs.device.type))
    with gathered(head.parameters(recurse=False)):
        weight, bias = head.weight, getattr(head, "bias", None)
        if not torch.is_grad_enabled():  # it would form gradients of what requires them all the same
            weight, bias = weight.detach(), None if bias is None else bias.detach()
        total: Tensor = HeadCrossEntropy.apply(outputs, weight, bias, targets)
    return total


class HeadCrossEntropy(torch.autograd.Function):
    """Cross entropy of softmax(x W^T + bias), summed: x (n, in), W (vocabulary, in), targets (n,).

    The gradients are formed with the logits, chunk by chunk, in the forward pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        dtype = product_dtype(x)
        in_parts = dtype != x.dtype and weight.numel() > CAST
        W, b = weight if in_parts else weight.to(dtype), None if bias is None else bias.to(dtype)
        needs_x, needs_W, needs_b, _ = ctx.needs_input_grad
        total = torch.zeros((), device=x.device)
        grad_x = torch.empty_like(x) if needs_x else None
        grad_W = torch.zeros_like(weight, dtype=torch.float32) if needs_W else None
        grad_b = torch.zeros_like(bias, dtype=torch.float32) if needs_b and bias is not None else None
        rows = max(ROWS, LOGITS[x.device.type] // len(weight))
        with torch.autocast(x.device.type, enabled=False):
            for begin in range(0, len(x), rows):
                part, wanted = x[begin : begin + rows].to(dtype), targets[begin : begin + rows, None]
                log_p = torch.log_softmax(linear(part, W, b), 1, dtype=torch.float32)
                total -= log_p.gather(1, wanted).sum()
                if not (needs_x or needs_W or needs_b):
                    continue
                grad = log_p.exp_().scatter_add_(1, wanted, -torch.ones_like(wanted, dtype=torch.float32))
                if grad_b is not None:
                    grad_b += grad.sum(0)
                grad = grad.to(dtype)
                if grad_x is not None:
                    grad_x[begin : begin + rows] = times(grad, W)
                if grad_W is not None:
                    grad_W += grad.T @ part
        ctx.save_for_backward(grad_x, grad_W, grad_b)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        """In fp32; autograd rounds each to the dtype of its input."""
        return *(None if grad is None else grad.float() * grads[0] for grad in ctx.saved_tensors), None


@contextlib.contextmanager
def _without_head(head: nn.Module | None) -> Iterator[None]:
    """Let the output head hand on what it is given."""
    if head is None:
        yield
        return
    own = head.__dict__.get("forward")
    head.forward = lambda x: x
    try:
        yield
    finally:
        del head.forward
        if own is not None:
            head.forward = own


def autocast(recipe: Recipe, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """bf16 products over fp32 weights; where weights have the dtype of the products there is nothing to cast."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if recipe.autocasts else contextlib.nullcontext()


def autocast_inside(model: nn.Module, recipe: Recipe, device: torch.device) -> None:
    """Have the model enter autocast in its forward pass: DeepSpeed's engine ends that of its caller."""
    forward = model.forward

    @wraps(forward)
    def inside(*args: Any, **kwargs: Any) -> Any:
        with autocast(recipe, device):
            return forward(*args, **kwargs)

    model.forward = inside
