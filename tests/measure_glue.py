"""GLUE with a small encoder: every method at its best learning rate, beside the majority class.

    python tests/measure_glue.py PAGE.md ENCODER MRPC_TRAIN MRPC_TEST [COLA_TRAIN COLA_DEV] [--seeds 0,1,2] [--jobs N]

A fifth of the training rows is held out. Rates a factor 2 apart are tried with the first seed, until the best by loss
on these rows has a worse one on either side; the other seeds are trained at that rate, and all are scored on the test
rows. A run that is there is not trained again (--runs FOLDER). Writes the page and PAGE.json.
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

import numpy as np
import torch
import transformers

import pissa_cli

METHODS = {
    "lora": {"adapter.rank": 8, "train.head_lr": 1e-3},
    "pissa": {"adapter.rank": 8, "train.head_lr": 1e-3},
    "vera": {"adapter.rank": 256, "train.head_lr": 4e-3},
    "svfit": {"adapter.rank": 256, "train.head_lr": 4e-3},
}
STARTS = {"lora": 2e-3, "pissa": 2e-3, "vera": 2e-2, "svfit": 4e-2}
"""The rates with which the searches begin."""
EPOCHS = {"mrpc": 2, "cola": 6}
NAMES = {"mrpc": "MRPC", "cola": "CoLA"}
METRICS = {"mrpc": ("accuracy", "f1", "loss"), "cola": ("matthews", "accuracy", "loss")}


def pissa(*words: str) -> dict[str, Any]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pissa_cli", *words, "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def folder_of(one: dict[str, Any], args: argparse.Namespace) -> Path:
    folder: Path = args.runs / f"{one['task']}-{one['method']}-{one['rate']:g}-{one['seed']}"
    return folder


def samples_of(one: dict[str, Any], args: argparse.Namespace) -> Path:
    return folder_of(one, args) / "eval" / "glue" / one["task"] / "samples.jsonl"


def trained(task: str, method: str, rate: float, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train one; what identifies it, its held-out loss, seconds and numbers that train."""
    found: dict[str, Any] = {"task": task, "method": method, "rate": rate, "seed": seed}
    folder = folder_of(found, args)
    sets: dict[str, Any] = {
        "model.name": args.encoder,
        "model.task": "sequence-classification",
        "model.bits": 16,
        "adapter.method": method,
        **METHODS[method],
        "data.train": args.data[task][0],
        "data.eval": "20%",
        "data.format": f"glue/{task}",
        "data.max_length": 128,
        "train.lr": rate,
        "train.epochs": EPOCHS[task],
        "train.batch_size": 32,
        "train.micro_batch_size": 16,
        "train.schedule": "linear",
        "train.warmup": 0.06,
        "seed": seed,
        "output": folder,
    } | ({"data.limit": args.limit} if args.limit else {})
    printed = folder.with_name(f"{folder.name}.json")
    if not printed.exists():
        words = ["train", *(word for key, value in sets.items() for word in ("--set", f"{key}={value}"))]
        printed.write_text(json.dumps(pissa(*words)))
    figures = json.loads(printed.read_text())
    manifest = json.loads((folder / "manifest.json").read_text())
    found["held_out_loss"] = figures["eval_loss"]
    print(*found.values(), file=sys.stderr, flush=True)
    return found | {"seconds": figures["seconds"], "trainable": manifest["trainable"]}


def search(task: str, method: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs at rates a factor 2 apart, in their order, the best between two others."""
    tried = [trained(task, method, STARTS[method] * factor, args.seeds[0], args) for factor in (0.5, 1)]
    while (best := best_of(tried)) in (tried[0], tried[-1]):
        rate = best["rate"] * (0.5 if best is tried[0] else 2)
        tried.append(trained(task, method, rate, args.seeds[0], args))
        tried.sort(key=lambda one: float(one["rate"]))
    return tried


def best_of(tried: list[dict[str, Any]]) -> dict[str, Any]:
    return min(tried, key=lambda one: float(one["held_out_loss"]))


def scored(one: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """A run with the result of `glue/<task>` on the test rows."""
    bench, printed = f"glue/{one['task']}", samples_of(one, args).with_name("result.json")
    if not printed.exists():
        test = args.data[one["task"]][1]
        pissa("eval", str(folder_of(one, args)), "--bench", bench, "--data", f"{bench}={test}")
    result: dict[str, Any] = json.loads(printed.read_text())
    return result | one


def right(one: dict[str, Any], args: argparse.Namespace) -> Any:
    """100 for every test row that was answered rightly, 0 for the others."""
    lines = samples_of(one, args).read_text().splitlines()
    return np.array([100.0 * (row["answer"] == row["reference"]) for row in map(json.loads, lines)])


def difference(
    runs: list[dict[str, Any]], others: list[dict[str, Any]], args: argparse.Namespace
) -> tuple[float, float]:
    """(mean accuracy less that of the others, its standard error: of the seeds and of the test rows together)."""
    rows = np.mean([right(one, args) for one in runs], 0) - np.mean([right(one, args) for one in others], 0)
    seeds = [statistics.variance(one["accuracy"] for one in group) / len(group) for group in (runs, others)]
    return float(rows.mean()), float((sum(seeds) + rows.var() / len(rows)) ** 0.5)


def page(
    tried: list[dict[str, Any]],
    runs: list[dict[str, Any]],
    majority: dict[str, dict[str, float]],
    args: argparse.Namespace,
) -> str:
    epochs = " and ".join(f"{EPOCHS[task]} epochs of {NAMES[task]}" for task in args.data)
    lines = [
        "# GLUE with a small encoder",
        "",
        f"`{Path(args.encoder).name}`, {epochs} less a fifth of the training rows, 32 examples a step, linear "
        "schedule, bf16, scale 1, no dropout in the adapters, no weight decay. The head trains whole, at a rate that "
        "was not searched. Learning rates a factor 2 apart were tried with one seed, until the best by loss on that "
        "fifth had a worse one on either side; other seeds were trained at that rate, and all were scored after the "
        "last step, on rows that chose nothing. Means over seeds (each seed's figure).",
    ]
    for task in args.data:
        first, second, _ = METRICS[task]
        own = [r for r in runs if r["task"] == task]
        lora = [r for r in own if r["method"] == "lora"]
        lines += ["", f"## {NAMES[task]} ({own[0]['n']} test rows)", ""]
        lines += [
            f"| method | numbers that train | rate, of the head | {first} | {second} | loss | accuracy, less LoRA's |"
        ]
        lines += ["|---|---|---|---|---|---|---|"]
        lines.append(f"| majority class | 0 | | {majority[task][first]:.2f} | {majority[task][second]:.2f} | | |")
        for method in args.methods:
            options = METHODS[method]
            found = [r for r in own if r["method"] == method]
            cells = [f"{method} r {options['adapter.rank']}", f"{found[0]['trainable']:,}"]
            cells.append(f"{found[0]['rate']:g}, {options['train.head_lr']:g}")
            for metric in METRICS[task]:
                values = [r[metric] for r in found]
                places = 3 if metric == "loss" else 2
                each = ", ".join(f"{value:.{places}f}" for value in values)
                cells.append(f"{statistics.mean(values):.{places}f} ({each})")
            alone = method == "lora" or not lora or len(args.seeds) == 1
            less = "" if alone else "{:+.2f} ± {:.2f}".format(*difference(found, lora, args))
            lines.append(f"| {' | '.join([*cells, less])} |")
        lines += ["", "| method | loss on the held-out training rows, by rate |", "|---|---|"]
        for method in args.methods:
            losses = [r for r in tried if (r["task"], r["method"]) == (task, method)]
            shown = ", ".join(f"{r['rate']:g}: {r['held_out_loss']:.4f}" for r in losses)
            lines.append(f"| {method} | {shown} |")
    versions = f"pissa {pissa_cli.__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    lines += [
        "",
        f"Seeds {', '.join(map(str, args.seeds))}. ±: the standard error, of the seeds and of the test rows together. "
        "A difference below two of them ranks nothing, and of so few seeds the error itself is only roughly known. "
        "Longer training and larger models may differ.",
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
    for name in ("page", "encoder", "mrpc_train", "mrpc_test"):
        parser.add_argument(name)
    for name in ("cola_train", "cola_dev"):
        parser.add_argument(name, nargs="?")
    parser.add_argument("--seeds", default="0,1,2", type=lambda text: [int(seed) for seed in text.split(",")])
    parser.add_argument("--methods", default=list(METHODS), type=lambda text: text.split(","))
    parser.add_argument("--limit", type=int)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--runs", type=Path, default=Path("glue-runs"))
    args = parser.parse_args()
    args.data = {"mrpc": (args.mrpc_train, args.mrpc_test)}
    if args.cola_dev:
        args.data["cola"] = (args.cola_train, args.cola_dev)
    args.runs.mkdir(parents=True, exist_ok=True)
    todo = [(task, method) for task in args.data for method in args.methods]
    with ThreadPoolExecutor(args.jobs) as pool:
        tried = list(pool.map(lambda one: search(*one, args), todo))
        best = [one | {"seed": seed} for one in map(best_of, tried) for seed in args.seeds]
        runs = list(
            pool.map(
                lambda one: scored(trained(one["task"], one["method"], one["rate"], one["seed"], args), args), best
            )
        )
    majority = {task: majority_of(samples_of(next(r for r in runs if r["task"] == task), args)) for task in args.data}
    flat = [one for group in tried for one in group]
    Path(args.page).write_text(page(flat, runs, majority, args))
    Path(args.page).with_suffix(".json").write_text(
        json.dumps({"majority": majority, "search": flat, "runs": runs}, indent=2) + "\n"
    )


if __name__ == "__main__":
    main()
