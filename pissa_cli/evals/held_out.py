"""`loss`: the loss on the recipe's held-out data."""

from __future__ import annotations

import math
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pissa_cli.data.examples import Examples
from pissa_cli.evals.bench import Count
from pissa_cli.training.batches import batch_losses, padding


def score(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Examples, progress: Count
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Loss per target token over the whole set; stderr over examples, by the ratio's linearization."""
    samples: list[dict[str, Any]] = []
    for chunk, loss in batch_losses(model, examples, padding(model, tokenizer), 1):
        samples.append({"id": chunk[0], "loss": loss, "targets": examples.num_targets(chunk[0])})
        progress(len(samples), len(examples))
    targets = sum(sample["targets"] for sample in samples)
    mean, n = sum(sample["loss"] for sample in samples) / targets, len(samples)
    spread = sum((sample["loss"] - mean * sample["targets"]) ** 2 for sample in samples)
    stderr = math.sqrt(spread * n / max(1, n - 1)) / targets
    samples.sort(key=lambda sample: sample["id"])
    perplexity = math.exp(min(mean, 700))
    return {"score": mean, "metric": "loss, nats a token", "perplexity": perplexity, "stderr": stderr, "n": n}, samples
