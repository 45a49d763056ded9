"""GLUE with a small encoder: every method on MRPC and CoLA, beside the majority class.

    python tests/measure_glue.py PAGE.md ENCODER MRPC_TRAIN MRPC_TEST COLA_TRAIN COLA_DEV [--seeds 0,1] [--limit N]

One process to a core. A run that is there is not trained again (--runs FOLDER). Writes the page and PAGE.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers

import pissa_cli

METHODS = {
    "lora": {"adapter.rank": 8, "train.lr": 1e-3, "train.head_lr": 1e-3},
    "pissa": {"adapter.rank": 8, "train.lr": 5e-4, "train.head_lr": 1e-3},
    "vera": {"adapter.rank": 256, "train.lr": 2e-2, "train.head_lr": 4e-3},
    "svfit": {"adapter.rank": 256, "train.lr": 3e-2, "train.head_lr": 4e-3},
}
EPOCHS = {"mrpc": 3, "cola": 6}
METRICS = {"mrpc": ("accuracy", "f1"), "cola": ("matthews", "accuracy")}


def run(method: str, task: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train and score one; the result of `glue/<task>`, with seconds and numbers that train."""
    train, held_out = args.data[task]
    folder = args.runs / f"{task}-{method}-{seed}"
    sets: dict[str, Any] = {
        "model.name": args.encoder,
        "model.task": "sequence-classification",
        "model.bits": 32,
        "adapter.method": method,
        **METHODS[method],
        "data.train": train,
        "data.format": f"glue/{task}",
        "data.max_length": 128,
        "train.epochs": EPOCHS[task],
        "train.batch_size": 32,
        "train.micro_batch_size": 16,
        "train.schedule": "linear",
        "train.warmup": 0.06,
        "seed": seed,
        "output": folder,
    } | ({"data.limit": args.limit} if args.limit else {})
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def pissa(*words: str) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, "-m", "pissa_cli", *words, "--json"], env=environment, capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(done.stderr)
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    if not (folder / "adapter").is_dir():
        words = ["train", *(word for key, value in sets.items() for word in ("--set", f"{key}={value}"))]
        (args.runs / f"{folder.name}.json").write_text(json.dumps(pissa(*words)))
    bench = f"glue/{task}"
    result = pissa("eval", str(folder), "--bench", bench, "--data", f"{bench}={held_out}")["results"][bench]
    manifest = json.loads((folder / "manifest.json").read_text())
    result |= {"method": method, "task": task, "seed": seed, "trainable": manifest["trainable"]}
    result["seconds"] = json.loads((args.runs / f"{folder.name}.json").read_text())["seconds"]
    print(f"{task} {method} seed {seed}: {result['score']:.2f}", file=sys.stderr, flush=True)
    return result


def page(results: list[dict[str, Any]], majority: dict[str, dict[str, float]], args: argparse.Namespace) -> str:
    lines = ["# GLUE with a small encoder", ""]
    epochs = f"{EPOCHS['mrpc']} epochs of MRPC and {EPOCHS['cola']} of CoLA"
    lines.append(
        f"`{Path(args.encoder).name}`, {epochs}, 32 examples a step, linear schedule, fp32, scored once after the last "
        "step. Mean over seeds (each seed's figure). The head trains whole, at its own rate."
    )
    for task, metrics in METRICS.items():
        n = next(r["n"] for r in results if r["task"] == task)
        lines += ["", f"## {task.upper() if task == 'mrpc' else 'CoLA'} ({n} held-out rows)", ""]
        lines += [f"| method | numbers that train | rate, of the head | {metrics[0]} | {metrics[1]} |"]
        lines += ["|---|---|---|---|---|"]
        shown = [f"{majority[task][metric]:.2f}" for metric in metrics]
        lines.append(f"| majority class | 0 | | {' | '.join(shown)} |")
        for method, options in METHODS.items():
            found = [r for r in results if (r["task"], r["method"]) == (task, method)]
            cells = []
            for metric in metrics:
                values = [r[metric] for r in found]
                cells.append(f"{statistics.mean(values):.2f} ({', '.join(f'{value:.2f}' for value in values)})")
            rates = f"{options['train.lr']:g}, {options['train.head_lr']:g}"
            lines.append(
                f"| {method} r {options['adapter.rank']} | {found[0]['trainable']:,} | {rates} | {' | '.join(cells)} |"
            )
    seeds = ", ".join(map(str, args.seeds))
    lines += [
        "",
        f"Seeds {seeds}. Rates were not searched (SVFit's is the second that was tried): this page ranks no methods.",
    ]
    versions = f"pissa {pissa_cli.__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    lines += [
        "",
        f"{versions}; {platform.machine()}, one core a run; {datetime.date.today()}; `tests/measure_glue.py`.",
        "",
    ]
    return "\n".join(lines)


def majority_of(samples: Path) -> dict[str, float]:
    """What always answering the commoner class scores."""
    wanted = [json.loads(line)["reference"] for line in samples.read_text().splitlines()]
    most = max(wanted.count(label) for label in set(wanted)) / len(wanted)
    return {"accuracy": 100 * most, "f1": 100 * 2 * most / (1 + most), "matthews": 0.0}


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("page", "encoder", "mrpc_train", "mrpc_test", "cola_train", "cola_dev"):
        parser.add_argument(name)
    parser.add_argument("--seeds", default="0,1", type=lambda text: [int(seed) for seed in text.split(",")])
    parser.add_argument("--limit", type=int)
    parser.add_argument("--runs", type=Path, default=Path("glue-runs"))
    args = parser.parse_args()
    args.data = {"mrpc": (args.mrpc_train, args.mrpc_test), "cola": (args.cola_train, args.cola_dev)}
    args.runs.mkdir(parents=True, exist_ok=True)
    todo = [(method, task, seed) for seed in args.seeds for task in METRICS for method in METHODS]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(lambda one: run(*one, args), todo))
    majority = {
        task: majority_of(args.runs / f"{task}-lora-{args.seeds[0]}" / "eval" / "glue" / task / "samples.jsonl")
        for task in METRICS
    }
    Path(args.page).write_text(page(results, majority, args))
    Path(args.page).with_suffix(".json").write_text(
        json.dumps({"majority": majority, "runs": results}, indent=2) + "\n"
    )


if __name__ == "__main__":
    main()
