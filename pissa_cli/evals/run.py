"""`eval`: score what a run exported, one benchmark after the other."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HOME
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pissa_cli import __version__
from pissa_cli.data import batch_losses, load_examples, question_prompt
from pissa_cli.errors import UsageError
from pissa_cli.evals import gsm8k
from pissa_cli.evals.generate import generate
from pissa_cli.exported import load_plain_base, load_result, trained_steps
from pissa_cli.initialize import open_run, require_base
from pissa_cli.loading import load_tokenizer
from pissa_cli.loss import autocast
from pissa_cli.model import best_device
from pissa_cli.recipe import Recipe
from pissa_cli.rows import read_rows
from pissa_cli.rundir import whole_folder, write_json

BENCHES = ("gsm8k", "loss")
PLANNED = ("math", "humaneval", "mbpp", "mt_bench", "glue")
Progress = Callable[[str, int, int], None]


def evaluate(recipe: Recipe, base: bool = False, progress: Progress = lambda *_: None) -> dict[str, dict[str, Any]]:
    """Results by benchmark: score, stderr, n (and more). `base` scores the model before training instead.

    Writes eval/<bench>/{result.json, samples.jsonl} (eval/base/<bench>/ for the base).
    Raises UsageError for an unknown bench, missing data, or a run that is not trained.
    """
    check_benches(recipe)
    run, manifest = open_run(recipe)
    tokenizer = load_tokenizer(require_base(run, manifest, recipe), recipe.model)
    data = {bench: _load_bench(bench, recipe, tokenizer) for bench in recipe.eval.bench}
    device = best_device()
    model = (load_plain_base if base else load_result)(recipe, device)
    results = {}
    for bench, loaded in data.items():
        began = time.time()
        score = _score_loss if bench == "loss" else _score_gsm8k
        with autocast(recipe.model.bits, recipe.precision, device):
            result, samples = score(
                model, tokenizer, loaded, recipe, lambda done, total, b=bench: progress(b, done, total)
            )
        result |= {
            "bench": bench,
            "model": "base" if base else "trained",
            "step": 0 if base else trained_steps(recipe),
            "data": _source(bench, recipe),
            "seconds": round(time.time() - began, 3),
            "base_fingerprint": manifest["base"]["fingerprint"],
            "pissa": __version__,
        }
        with whole_folder(run.folder / "eval" / ("base" if base else "") / bench) as folder:
            lines = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
            (folder / "samples.jsonl").write_text(lines, encoding="utf-8")
            write_json(folder / "result.json", result)
        results[bench] = result
    return results


def check_benches(recipe: Recipe) -> None:
    """Refuse an unknown or missing benchmark, before anything is loaded."""
    if not recipe.eval.bench:
        raise UsageError("eval.bench: no benchmark given", f"name some with --bench: {', '.join(BENCHES)}")
    for bench in recipe.eval.bench:
        if bench.partition("/")[0] in PLANNED:
            raise UsageError(f"eval.bench: {bench} comes in a later version", f"today: {', '.join(BENCHES)}")
        if bench not in BENCHES:
            raise UsageError(f"eval.bench: unknown benchmark '{bench}'", f"known: {', '.join(BENCHES)}")
    unknown = set(recipe.eval.data) - set(BENCHES)
    if unknown:
        raise UsageError(f"eval.data: unknown benchmark '{min(unknown)}'", f"known: {', '.join(BENCHES)}")


def _source(bench: str, recipe: Recipe) -> str:
    if bench in recipe.eval.data:
        return recipe.eval.data[bench]
    if bench == "gsm8k":
        return gsm8k.HUB_DATA
    if recipe.data.eval is None:
        raise UsageError("eval loss: no held-out data", "set data.eval, or --data loss=file.jsonl")
    return recipe.data.eval


def _load_bench(bench: str, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Any:
    source = _source(bench, recipe)
    if bench == "loss":
        section = recipe.data.model_copy(update={"limit": recipe.eval.limit})
        return load_examples(source, section, tokenizer, Path(HF_HOME) / "pissa" / "tokens")
    rows = []
    for number, row in read_rows(source, recipe.eval.limit):
        if isinstance(row, str) or not {"question", "answer"} <= set(row):
            columns = row if isinstance(row, str) else f"its columns: {', '.join(row)}"
            raise UsageError(f"{source}: row {number} is not a GSM8K row with question and answer ({columns})")
        if not gsm8k.is_number(gsm8k.gold(row)):
            raise UsageError(f"{source}: the answer of row {number} does not end in '#### number'")
        rows.append(row)
    if not rows:
        raise UsageError(f"{source}: no rows")
    return rows


def _score_gsm8k(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, Any]],
    recipe: Recipe,
    progress: Any,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    prompts = [question_prompt(gsm8k.question(row), recipe.data, tokenizer) for row in rows]
    section = recipe.eval
    samples: list[dict[str, Any]] = [{} for _ in rows]
    for index, output in generate(
        model, tokenizer, [ids for _, ids in prompts], section.batch_size, section.max_new_tokens, progress
    ):
        reference = gsm8k.gold(rows[index])
        samples[index] = {
            "id": index,
            "prompt": prompts[index][0],
            "output": output,
            "answer": gsm8k.extract(output),
            "reference": reference,
            "correct": gsm8k.score(output, reference),
        }
    n = len(samples)
    share = sum(sample["correct"] for sample in samples) / n
    stderr = 100 * math.sqrt(share * (1 - share) / n)
    return {
        "score": 100 * share,
        "metric": "exact match, %",
        "stderr": stderr,
        "n": n,
        "engine": "transformers",
    }, samples


def _score_loss(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Any, recipe: Recipe, progress: Any
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Loss per target token over the whole set; stderr over examples, by the ratio's linearization."""
    samples: list[dict[str, Any]] = []
    for chunk, loss in batch_losses(model, examples, tokenizer.pad_token_id or 0, 1):
        samples.append({"id": chunk[0], "loss": loss, "targets": examples.num_targets(chunk[0])})
        progress(len(samples), len(examples))
    targets = sum(sample["targets"] for sample in samples)
    mean, n = sum(sample["loss"] for sample in samples) / targets, len(samples)
    spread = sum((sample["loss"] - mean * sample["targets"]) ** 2 for sample in samples)
    stderr = math.sqrt(spread * n / max(1, n - 1)) / targets
    samples.sort(key=lambda sample: sample["id"])
    perplexity = math.exp(min(mean, 700))
    return {"score": mean, "metric": "loss, nats a token", "perplexity": perplexity, "stderr": stderr, "n": n}, samples
