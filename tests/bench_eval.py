"""Generation with trained adapters: our engine against PEFT's model and transformers' `generate`, on the same prompts.

    python tests/bench_eval.py PAGE.md QUESTIONS.jsonl RUN... [--prompts 32] [--tokens 32]

QUESTIONS are GSM8K's rows; a RUN is a folder that `pissa train` has filled. Greedy, in the precision of the run;
alternating, median of three.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import AutoPeftModelForCausalLM

import pissa_cli
from pissa_cli.base.loading import load_tokenizer
from pissa_cli.base.model import DTYPES, best_device
from pissa_cli.data.rows import read_rows
from pissa_cli.data.tokenize import question_prompt
from pissa_cli.evals.generate import generate
from pissa_cli.outputs.trained import load_result
from pissa_cli.run.rundir import run_of
from pissa_cli.schema.recipe_file import load

REPEATS = 3
BATCH = 32


@torch.no_grad()
def measure(run: str, rows: list[Any], tokens: int) -> tuple[str, dict[str, dict[str, float]]]:
    """(what was measured, by way: seconds, tokens written, answers that are as ours)."""
    recipe, device = load(run, {}).recipe, best_device()
    adapter = run_of(recipe).adapter
    tokenizer = load_tokenizer(adapter, recipe)
    prompts = [question_prompt(row["question"], recipe.data, tokenizer)[1] for row in rows]
    model = load_result(recipe, device)
    peer = AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=DTYPES[recipe.precision]).to(device).eval()
    pad = tokenizer.pad_token_id or tokenizer.eos_token_id

    def ours() -> list[str]:
        found = dict(generate(model, tokenizer, prompts, None, tokens))
        return [found[number] for number in range(len(prompts))]

    def in_batches(size: int) -> list[str]:
        texts = []
        for begin in range(0, len(prompts), size):
            batch = prompts[begin : begin + size]
            longest = max(map(len, batch))
            ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in batch], device=device)
            mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in batch], device=device)
            output = peer.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, pad_token_id=pad
            )
            texts += tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)
        return texts

    works: dict[str, Callable[[], list[str]]] = {
        "ours": ours,
        f"PEFT, batches of {BATCH}": partial(in_batches, BATCH),
        "PEFT, one by one": partial(in_batches, 1),
    }
    seconds: dict[str, list[float]] = {name: [] for name in works}
    answers: dict[str, list[str]] = {}
    for _ in range(REPEATS):
        for name, work in works.items():
            began = time.perf_counter()
            answers[name] = work()
            seconds[name].append(time.perf_counter() - began)
    what = (
        f"{Path(recipe.model.name).name} in {recipe.model.bits} bits, {recipe.adapter.method}'s adapter, products in "
        f"{recipe.precision}"
    )
    return what, {
        name: {
            "seconds": statistics.median(seconds[name]),
            "tokens": sum(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"])),
            "same": sum(map(str.__eq__, answers["ours"], texts)),
        }
        for name, texts in answers.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("page", type=Path)
    parser.add_argument("questions")
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=32)
    args = parser.parse_args()
    rows = [row for _, row in read_rows(args.questions, args.prompts)]
    found = dict(measure(run, rows, args.tokens) for run in args.runs)
    gpu = torch.cuda.is_available()
    where = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    lines = [
        "# Generation",
        "",
        f"Greedy, {len(rows)} questions of GSM8K, at most {args.tokens} new tokens; median of {REPEATS}, alternating.",
        "",
        "| run | by | seconds | over ours | tokens/s | answers as ours |",
        "|---|---|---|---|---|---|",
    ]
    for what, ways in found.items():
        for name, way in ways.items():
            ratio = way["seconds"] / ways["ours"]["seconds"]
            speed = way["tokens"] / way["seconds"]
            lines.append(f"| {what} | {name} | {way['seconds']:.2f} | {ratio:.2f} | {speed:,.0f} | {way['same']} |")
    lines += [
        "",
        f"pissa {pissa_cli.__version__}, torch {torch.__version__}, transformers {transformers.__version__}, peft "
        f"{peft.__version__}; {where}, {platform.machine()}; {datetime.date.today()}; `tests/bench_eval.py`.",
        "",
    ]
    args.page.write_text("\n".join(lines))
    args.page.with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
