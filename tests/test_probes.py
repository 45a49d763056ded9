"""What is said of two forms of a model, their logits and their perplexity: against NumPy and stock transformers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_model
from transformers import PreTrainedTokenizerBase

from pissa_cli.errors import PissaError
from pissa_cli.outputs.probes import PROBES, logit_difference, perplexity, probe_logits, typical_difference

Make = Callable[..., Any]


def test_differences_are_those_of_all_probes() -> None:
    source = np.random.default_rng(0)
    shapes = [(1, 3, 7), (1, 6, 7), (1, 2, 7)]
    before = [source.normal(size=shape).astype(np.float32) for shape in shapes]
    noise = [
        source.normal(size=shape).astype(np.float32) * size for shape, size in zip(shapes, (0.1, 0.7, 0.3), strict=True)
    ]
    pair = [torch.from_numpy(a) for a in before], [torch.from_numpy(a + e) for a, e in zip(before, noise, strict=True)]
    apart, all_before = (np.concatenate(part, axis=1)[0].astype(np.float64) for part in (noise, before))
    found = logit_difference(*pair)
    assert found["max_logit_difference"] == pytest.approx(np.abs(apart).max(), rel=1e-5)
    wanted = np.linalg.norm(apart) / np.linalg.norm(all_before)
    assert found["relative_logit_difference"] == pytest.approx(wanted, rel=1e-5)
    by_token = sorted(np.linalg.norm(apart, axis=1) / np.linalg.norm(all_before, axis=1))
    assert typical_difference(*pair) == pytest.approx(by_token[len(by_token) // 2], rel=1e-5)
    zero = [torch.zeros(1, 2, 3)]
    assert typical_difference(zero, zero) == logit_difference(zero, zero)["relative_logit_difference"] == 0


@pytest.mark.parametrize("num_rows", [0, 9, 202])
def test_perplexity_is_that_of_transformers(
    num_rows: int, tokenizer: PreTrainedTokenizerBase, recipe: Make, tmp_path: Path
) -> None:
    """Over target tokens: of prompts all but the first, of rows the answers, of which the first 200 count."""
    model, file = make_model("llama").eval(), tmp_path / "rows.jsonl"
    rows = [{"prompt": f"{n} and " * (1 + n % 4), "completion": f"{n * n} " * (1 + n % 3)} for n in range(num_rows)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sets = [f"data.eval={file}", "data.format=prompt"] if rows else []
    made = recipe(tmp_path, "model.bits=32", "train.micro_batch_size=4", *sets)
    total = count = 0.0
    for one in rows[:200] or PROBES:
        ids = tokenizer(one["prompt"] if rows else one)["input_ids"]
        labels = [-100] * len(ids) if rows else list(ids)
        if rows:
            answer = [*tokenizer(one["completion"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            ids, labels = ids + answer, labels + answer
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss
        total += float(loss) * sum(label >= 0 for label in labels[1:])
        count += sum(label >= 0 for label in labels[1:])
    found, data = perplexity(model, tokenizer, made)
    assert found == pytest.approx(math.exp(total / count), rel=1e-4)
    assert data == (f"{file} ({min(num_rows, 200)} examples)" if rows else "4 built-in prompts")


def test_logits_that_are_not_numbers_are_refused(
    tokenizer: PreTrainedTokenizerBase, recipe: Make, tmp_path: Path
) -> None:
    model = make_model("llama").eval()
    model.model.norm.weight.data[3] = math.inf
    with pytest.raises(PissaError, match="NaN or infinite"):
        probe_logits(model, tokenizer, recipe(tmp_path, "model.bits=32"))


def test_logits_are_taken_without_a_cache(
    tokenizer: PreTrainedTokenizerBase, recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """BLT's does not work in transformers 5.24: a trained adapter of one could not be merged."""
    model = make_model("llama").eval()
    first = torch.tensor([tokenizer(PROBES[0])["input_ids"]])
    with torch.no_grad():
        wanted = model(input_ids=first).logits
    monkeypatch.delattr("transformers.models.llama.modeling_llama.DynamicCache")
    found = probe_logits(model, tokenizer, recipe(tmp_path, "model.bits=32"))
    assert torch.equal(found[0], wanted)
