"""`glue/*`, and `loss` of a classifier: its metrics over a set of texts with labels."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pissa_cli.data.examples import Examples
from pissa_cli.evals.bench import Count
from pissa_cli.schema.recipe import Recipe
from pissa_cli.training.batches import collate, micro_batches, on_device, padding

RESAMPLED = 1000
TOGETHER = 32  # texts at once, where the recipe does not say how many
Array = np.ndarray[Any, np.dtype[Any]]


def correlation(x: Array, y: Array) -> float:
    """Pearson's r over the last axis; of two classes numbered 0 and 1 it is Matthews' coefficient. 0 for a constant."""
    x, y = x - x.mean(), y - y.mean()
    scale = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / scale if scale > 1e-12 * len(x) else 0.0


def ranks(values: Array) -> Array:
    """Ranks from 0, equal values sharing the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[inverse]


def f1(predicted: Array, wanted: Array) -> float:
    """F1 of class 1."""
    hits = int(((predicted == 1) & (wanted == 1)).sum())
    found = int((predicted == 1).sum() + (wanted == 1).sum())
    return 2 * hits / found if found else 0.0


def accuracy(predicted: Array, wanted: Array) -> float:
    """The share that is right."""
    return float((predicted == wanted).mean())


METRICS: dict[str, Callable[[Array, Array], float]] = {
    "accuracy": accuracy,
    "matthews": correlation,
    "f1": f1,
    "pearson": correlation,
    "spearman": lambda predicted, wanted: correlation(ranks(predicted), ranks(wanted)),
}


def kinds_of(num_labels: int) -> list[str]:
    """The metrics that make sense for so many classes."""
    if num_labels == 1:
        return ["pearson", "spearman"]
    return ["accuracy", "matthews", "f1"] if num_labels == 2 else ["accuracy"]


def standard_error(metric: str, predicted: Array, wanted: Array) -> float:
    """Of accuracy sqrt(p (1 - p) / n), of the others by the bootstrap: the spread over 1,000 sets drawn from this."""
    n = len(wanted)
    if metric == "accuracy":
        share = accuracy(predicted, wanted)
        return math.sqrt(share * (1 - share) / n)
    random = np.random.default_rng(0)
    drawn = [random.integers(0, n, n) for _ in range(RESAMPLED)]
    return float(np.std([METRICS[metric](predicted[rows], wanted[rows]) for rows in drawn]))


@torch.no_grad()
def logits_of(model: PreTrainedModel, examples: Examples, pad_id: int, size: int, progress: Count) -> Tensor:
    """Logits (n, labels) of all texts, fp32 on the CPU; the longest first, in batches halved until they fit."""
    logits: dict[int, Tensor] = {}
    todo = micro_batches(examples, list(range(len(examples))), size, packed=False)
    while todo:
        chunk = todo.pop()
        batch = collate(examples, chunk, pad_id, packing=False)
        del batch["labels"]
        try:
            found = model(**on_device(batch, model.device)).logits.float().cpu()
        except torch.OutOfMemoryError:
            if len(chunk) == 1:
                raise
        else:
            logits |= dict(zip(chunk, found, strict=True))
            progress(len(logits), len(examples))
            continue
        torch.cuda.empty_cache()  # after the exception, which held on to what is to be freed
        middle = len(chunk) // 2
        todo += [chunk[:middle], chunk[middle:]]
    return torch.stack([logits[number] for number in range(len(examples))])


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Examples,
    recipe: Recipe,
    metric: str | None,
    progress: Count,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(result, samples). score: 100 times `metric`, as GLUE has it; without one the loss, nats or squared error a text.

    Beside it every metric that makes sense for these labels.
    """
    assert examples.labels is not None
    labels, wanted, size = recipe.model.labels, examples.labels, recipe.eval.batch_size or TOGETHER
    logits = logits_of(model, examples, padding(model, tokenizer), size, progress)
    if len(labels) == 1:
        losses, predicted = functional.mse_loss(logits[:, 0], wanted, reduction="none"), logits[:, 0]
    else:
        losses = functional.cross_entropy(logits, wanted.long(), reduction="none")
        predicted = logits.argmax(1).float()
    pair = predicted.double().numpy(), wanted.double().numpy()
    n = len(examples)
    figures: dict[str, Any] = {kind: 100 * METRICS[kind](*pair) for kind in kinds_of(len(labels))}
    figures |= {"loss": float(losses.double().mean()), "n": n}
    if metric is None:
        name = "loss, nats a text" if len(labels) > 1 else "loss, squared error a text"
        stderr = float(losses.double().std()) / math.sqrt(n) if n > 1 else 0.0
        figures |= {"score": figures["loss"], "metric": name, "stderr": stderr}
    else:
        figures |= {"score": figures[metric], "metric": f"{metric}, %", "stderr": 100 * standard_error(metric, *pair)}

    def name_of(value: float) -> str | float:
        return labels[int(value)] if len(labels) > 1 else value

    samples = [
        {"id": number, "logits": row, "answer": name_of(answer), "reference": name_of(reference), "loss": loss}
        for number, (row, answer, reference, loss) in enumerate(
            zip(logits.tolist(), predicted.tolist(), wanted.tolist(), losses.tolist(), strict=True)
        )
    ]
    return figures, samples
