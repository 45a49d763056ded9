"""What a classifier scores, and by which metrics."""

from __future__ import annotations

import json
import math
import statistics
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pissa_cli.data.examples import Examples
from pissa_cli.evals import classify
from pissa_cli.train import train


def test_eval_scores_what_was_trained(
    encoders: Callable[[str], Path], classifier: Callable[..., Any], pissa: Callable[..., Any], texts: Path
) -> None:
    made = classifier(encoders("bert"), "model.bits=32", "train.steps=60", "train.head_lr=0.01")
    train(made)
    outcome = pissa("eval", made.output, "--bench", "glue/mrpc,loss", "--data", f"glue/mrpc={texts}", "--json")
    assert outcome.code == 2 and "data.eval" in outcome.err
    files = ["--data", f"glue/mrpc={texts}", "--data", f"loss={texts}"]
    outcome = pissa("eval", made.output, "--bench", "glue/mrpc,loss", *files, "--compare-base", "--json")
    assert outcome.code == 0, outcome.err
    result = outcome.json["results"]["glue/mrpc"]
    lines = (Path(made.output) / "eval" / "glue" / "mrpc" / "samples.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    right = sum(sample["answer"] == sample["reference"] for sample in samples)
    assert len(samples) == result["n"] == 60
    assert result["score"] == result["accuracy"] == pytest.approx(100 * right / 60)
    assert result["score"] > 90 > outcome.json["base"]["glue/mrpc"]["score"]
    assert result["rows"].startswith("not a published set")
    mean = sum(sample["loss"] for sample in samples) / 60
    assert outcome.json["results"]["loss"]["score"] == pytest.approx(mean)
    batched = pissa("eval", made.output, "--bench", "glue/mrpc", *files[:2], "--set", "eval.batch_size=1", "--json")
    again = [json.loads(line) for line in (Path(made.output) / "eval/glue/mrpc/samples.jsonl").read_text().splitlines()]
    assert batched.json["results"]["glue/mrpc"]["score"] == result["score"]
    assert np.allclose([s["logits"] for s in again], [s["logits"] for s in samples], atol=1e-4)


def test_held_out_rows_are_scored_where_no_bench_is_named(
    encoders: Callable[[str], Path], classifier: Callable[..., Any], pissa: Callable[..., Any], texts: Path
) -> None:
    made = classifier(encoders("bert"), "model.bits=32", f"data.eval={texts}", "train.steps=1")
    train(made)
    outcome = pissa("eval", made.output, "--json")
    assert outcome.code == 0, outcome.err
    assert list(outcome.json["results"]) == ["loss"] and "accuracy" in outcome.json["results"]["loss"]
    outcome = pissa("eval", made.output, "--set", "data.eval=null")
    assert outcome.code == 2 and "no benchmark given, nor held-out rows" in outcome.err and "loss" not in outcome.err


def test_metrics_by_hand() -> None:
    predicted = np.array([1, 1, 0, 1, 0, 0, 1, 1.0])
    wanted = np.array([1, 0, 0, 1, 1, 0, 1, 0.0])
    tp, tn, fp, fn = 3, 2, 2, 1
    assert classify.accuracy(predicted, wanted) == 5 / 8
    assert classify.f1(predicted, wanted) == pytest.approx(2 * tp / (2 * tp + fp + fn))
    assert classify.f1(np.zeros(4), np.zeros(4)) == 0
    assert [classify.kinds_of(number)[-1] for number in (1, 2, 3)] == ["spearman", "f1", "accuracy"]
    matthews = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert classify.METRICS["matthews"](predicted, wanted) == pytest.approx(matthews)
    x, y = np.array([1.0, 2.0, 2.0, 5.0]), np.array([2.0, 1.0, 4.0, 9.0])
    assert classify.METRICS["pearson"](x, y) == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert classify.ranks(x).tolist() == [0, 1.5, 1.5, 3]
    assert classify.METRICS["spearman"](x, y) == pytest.approx(np.corrcoef([0, 1.5, 1.5, 3], [1, 0, 2, 3])[0, 1])
    assert classify.METRICS["matthews"](np.ones(4), wanted[:4]) == 0


class Sums:
    """A classifier that holds two texts at most and says the sum of a text's tokens, less 4; of classes the second."""

    device = torch.device("cpu")

    def __init__(self, classes: int) -> None:
        self.classes = classes

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        if len(input_ids) > 2:
            activations = torch.ones(len(input_ids))
            self.held = weakref.ref(activations)
            raise torch.OutOfMemoryError
        sums = (input_ids * attention_mask).sum(1, keepdim=True) - 4.0
        return SimpleNamespace(logits=torch.cat([torch.zeros_like(sums)] * (self.classes - 1) + [sums], 1))


def scored(classes: list[str], labels: list[float], metric: str | None, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Texts of 1, 2, ... tokens 1, in batches of 5."""
    monkeypatch.setattr(classify, "padding", lambda *_: 9)
    lengths = torch.arange(len(labels) + 1)
    ids, offsets = torch.ones(int(lengths.sum()), dtype=torch.int32), lengths.cumsum(0)
    examples = Examples(ids, torch.zeros_like(ids, dtype=torch.bool), offsets, labels=torch.tensor(labels))
    told: list[int] = []
    model: Any = Sums(len(classes))
    freed: list[bool] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(model.held() is None))
    recipe: Any = SimpleNamespace(model=SimpleNamespace(labels=classes), eval=SimpleNamespace(batch_size=5))
    tokenizer: Any = None
    found = classify.score(model, tokenizer, examples, recipe, metric, lambda done, _: told.append(done))
    assert told[-1] == len(labels) and told == sorted(set(told))
    assert all(freed) and bool(freed) == (len(labels) > 2)
    return found


def test_quantities_are_scored_text_by_text(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [-3.0, 0.0, -1.0, 1.0, 1.0]
    losses = [0.0, 4.0, 0.0, 1.0, 0.0]
    result, samples = scored(["score"], wanted, None, monkeypatch)
    assert [(s["id"], s["answer"], s["reference"], s["loss"]) for s in samples] == [
        *zip(range(5), [-3.0, -2.0, -1.0, 0.0, 1.0], wanted, losses, strict=True)
    ]
    assert (result["score"], result["loss"], result["n"], result["metric"]) == (1, 1, 5, "loss, squared error a text")
    assert result["stderr"] == pytest.approx(statistics.stdev(losses) / math.sqrt(5))
    assert scored(["score"], [0.0], None, monkeypatch)[0]["stderr"] == 0


def test_classes_are_scored_text_by_text(monkeypatch: pytest.MonkeyPatch) -> None:
    result, samples = scored(["no", "yes"], [0.0, 1.0, 0.0, 1.0, 1.0], "accuracy", monkeypatch)
    assert [s["answer"] for s in samples] == ["no", "no", "no", "no", "yes"]
    assert [s["reference"] for s in samples] == ["no", "yes", "no", "yes", "yes"]
    assert samples[4]["loss"] == pytest.approx(math.log(1 + math.exp(-1)))
    assert (result["score"], result["metric"]) == (pytest.approx(60), "accuracy, %")
    assert result["stderr"] == pytest.approx(100 * math.sqrt(0.6 * 0.4 / 5))
    assert scored(["no", "yes"], [0.0], None, monkeypatch)[0]["metric"] == "loss, nats a text"


def test_bootstrap_agrees_with_theory() -> None:
    random = np.random.default_rng(1)
    x = random.standard_normal(2000)
    y = 0.6 * x + 0.8 * random.standard_normal(2000)
    assert classify.standard_error("pearson", x, y) == pytest.approx((1 - 0.36) / math.sqrt(2000), rel=0.15)


def test_benches_of_the_other_task(
    encoders: Callable[[str], Path],
    classifier: Callable[..., Any],
    models: Callable[[str], Path],
    pissa: Callable[..., Any],
    tmp_path: Path,
) -> None:
    made = classifier(encoders("bert"), "model.bits=32")
    train(made)
    for bench, said in (("gsm8k", "answers that a model writes"), ("glue/cola", "unacceptable")):
        outcome = pissa("eval", made.output, "--bench", bench)
        assert outcome.code == 2 and said in outcome.err
    outcome = pissa("eval", "--set", f"model.name={models('llama')}", "--bench", "glue/cola", "--output", tmp_path)
    assert outcome.code == 2 and "texts with labels" in outcome.err
