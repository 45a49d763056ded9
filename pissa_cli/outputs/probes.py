"""Are two forms of a model the same? Their logits on a few prompts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from pissa_cli.base.configuration import require_tokens
from pissa_cli.base.integrity import not_finite
from pissa_cli.base.model import head_names
from pissa_cli.data.sets import load_held_out
from pissa_cli.errors import PissaError
from pissa_cli.matrices.svd import frobenius_norm
from pissa_cli.schema.data_options import held_out_name
from pissa_cli.schema.recipe import Recipe
from pissa_cli.training.batches import batch_losses, padding
from pissa_cli.training.loss import autocast, summed_loss

TINY = 1e-30
PERPLEXITY_ROWS = 200
PROBES = (
    "The capital of the country lies on a river, and most of its people work",
    "Below is an instruction that describes a task.",
    "def add(a, b):\n    return",
    "Anna has 12 apples and gives 5 of them to her brother. She has",
)


@torch.no_grad()
def probe_logits(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> list[Tensor]:
    """Logits (1, tokens, vocabulary) fp32 on the CPU, for each of PROBES."""
    logits, options = [], {} if head_names(model) else {"use_cache": False}
    with autocast(recipe, model.device):
        for probe in PROBES:
            tokens = tokenizer(probe)["input_ids"]
            require_tokens("the tokenizer", tokens, model.config)
            ids = torch.tensor([tokens], device=model.device)
            logits.append(model(input_ids=ids, **options).logits.float().cpu())
            if not_finite(logits[-1]):
                raise PissaError(
                    "the model's logits are NaN or infinite",
                    "its weights are damaged, or too large for the products' dtype (train.precision)",
                )
    return logits


def logit_difference(before: list[Tensor], after: list[Tensor]) -> dict[str, float]:
    """The largest difference, and `relative_difference`."""
    return {
        "max_logit_difference": max(float((a - b).abs().max()) for a, b in zip(before, after, strict=True)),
        "relative_logit_difference": relative_difference(before, after),
    }


def relative_difference(before: list[Tensor], after: list[Tensor]) -> float:
    """||difference|| / ||before|| over all probes."""
    squares = sum(frobenius_norm(a - b) ** 2 for a, b in zip(before, after, strict=True))
    return math.sqrt(squares / max(TINY, sum(frobenius_norm(a) ** 2 for a in before)))


def typical_difference(before: list[Tensor], after: list[Tensor]) -> float:
    """||difference|| / ||before|| of the median token."""
    pairs = [(a.flatten(0, -2), b.flatten(0, -2)) for a, b in zip(before, after, strict=True)]
    return float(torch.cat([(a - b).norm(dim=1) / a.norm(dim=1).clamp_min(TINY) for a, b in pairs]).median())


@contextmanager
def outputs_rounded(model: PreTrainedModel, dtype: torch.dtype) -> Iterator[None]:
    """In the block the output of each linear layer is changed at random, by a last bit of `dtype` at most: as rounding
    of its weights or its products changes it, of which a deep model makes much more."""
    draws = torch.Generator(model.device).manual_seed(0)

    def change(_module: nn.Module, _given: Any, output: Tensor) -> Tensor:
        noise = torch.rand(output.shape, generator=draws, device=output.device) * 2 - 1
        return output + (output * noise * torch.finfo(dtype).eps).to(output.dtype)

    layers = [module for module in model.modules() if isinstance(module, nn.Linear | Conv1D)]
    hooks = [layer.register_forward_hook(change) for layer in layers]
    yield
    for hook in hooks:
        hook.remove()


def perplexity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> tuple[float | None, str]:
    """(perplexity, on what); a classifier has none."""
    if head_names(model):
        return None, ""
    with autocast(recipe, model.device), torch.no_grad():
        if recipe.data.eval is None:
            rows = [torch.tensor([tokenizer(probe)["input_ids"]], device=model.device) for probe in PROBES]
            total = sum(float(summed_loss(model, {"input_ids": ids, "labels": ids})) for ids in rows)
            count, data = sum(ids.shape[1] - 1 for ids in rows), f"{len(PROBES)} built-in prompts"
        else:
            examples = load_held_out(recipe, tokenizer, PERPLEXITY_ROWS)
            require_tokens("data.eval", [int(examples.ids.max())], model.config)
            losses = batch_losses(model, examples, padding(model, tokenizer), recipe.train.micro_batch_size)
            total = sum(loss for _, loss in losses)
            count = sum(examples.num_targets(i) for i in range(len(examples)))
            data = f"{held_out_name(recipe.data)} ({len(examples)} examples)"
    return math.exp(min(total / count, 700)), data
