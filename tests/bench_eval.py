"""Generation: our engine against transformers' `generate`, one prompt at a time, on the same prompts.

    python tests/bench_eval.py PAGE.md MODEL QUESTIONS.jsonl [--prompts 64] [--tokens 64]

QUESTIONS are GSM8K's rows. Greedy, fp32; alternating, median of three; the answers must be the same.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import time
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import pissa_cli
from pissa_cli.data import question_prompt
from pissa_cli.data_options import DataSection
from pissa_cli.evals.generate import generate
from pissa_cli.rows import read_rows

REPEATS = 3


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("page", "model", "questions"):
        parser.add_argument(name)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = [row for _, row in read_rows(args.questions, args.prompts)]
    prompts = [question_prompt(row["question"], DataSection(), tokenizer)[1] for row in rows if isinstance(row, dict)]

    def ours() -> list[str]:
        found = dict(generate(model, tokenizer, prompts, None, args.tokens))
        return [found[number] for number in range(len(prompts))]

    def one_by_one() -> list[str]:
        texts = []
        for prompt in prompts:
            ids = torch.tensor([prompt], device=device)
            mask = torch.ones_like(ids)
            output = model.generate(ids, attention_mask=mask, max_new_tokens=args.tokens, do_sample=False)
            texts.append(tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True))
        return texts

    seconds: dict[str, list[float]] = {"ours": [], "transformers, batch 1": []}
    answers: dict[str, list[str]] = {}
    for _ in range(REPEATS):
        for name, work in (("ours", ours), ("transformers, batch 1", one_by_one)):
            began = time.perf_counter()
            answers[name] = work()
            seconds[name].append(time.perf_counter() - began)
    same = sum(one == other for one, other in zip(*answers.values(), strict=True))
    tokens = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in answers["ours"])
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    ratio = medians["transformers, batch 1"] / medians["ours"]
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    lines = [
        "# Generation",
        "",
        f"`{Path(args.model).name}`, fp32, greedy, {len(prompts)} questions, at most {args.tokens} new tokens; "
        f"median of {REPEATS}, alternating. Answers that are the same text: {same} of {len(prompts)}.",
        "",
        "| | seconds | tokens/s |",
        "|---|---|---|",
        *(f"| {name} | {value:.2f} | {tokens / value:,.0f} |" for name, value in medians.items()),
        f"| ratio | **{ratio:.1f}** | |",
        "",
        f"pissa {pissa_cli.__version__}, torch {torch.__version__}, transformers {transformers.__version__}; "
        f"{where}, {platform.machine()}; {datetime.date.today()}; `tests/bench_eval.py`.",
        "",
    ]
    Path(args.page).write_text("\n".join(lines))
    figures = {"seconds": seconds, "ratio": ratio, "same": same, "prompts": len(prompts), "tokens": tokens}
    Path(args.page).with_suffix(".json").write_text(json.dumps(figures, indent=2) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
