"""PiSSA and LoRA on a model and GSM8K-like files of yours, through all five commands; writes a page with a picture.

    python tests/compare_methods.py MODEL TRAIN.jsonl HELD_OUT.jsonl PAGE.md [STEPS]

Rows are GSM8K's (question, answer). Each method is trained at its learning rates and kept at the lowest held-out loss.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pissa_cli.run.report import draw_losses

RATES = {"pissa": ("2e-3", "4e-3", "8e-3"), "lora": ("4e-3", "8e-3", "1.6e-2")}


def pissa(*arguments: str) -> dict[str, Any]:
    """Run one command with --json; any exit code but 0 ends the script."""
    shown = ["pissa", *arguments, "--json"]
    print("$", *shown, flush=True)
    done = subprocess.run([sys.executable, "-m", "pissa_cli", *shown[1:]], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"exit code {done.returncode}: {done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def run(
    method: str, rate: str, bits: int, model: str, train: str, held_out: str, output: Path, steps: str
) -> dict[str, Any]:
    """init and train; returns the figures of training."""
    start = ["--model", model, "--method", method, "--rank", "16", "--bits", str(bits), "--output", str(output)]
    began = pissa("init", *start)
    keys = {
        "train.precision": "fp32",
        "data.train": train,
        "data.eval": held_out,
        "data.columns": "{instruction: question, output: answer}",
        "train.steps": steps,
        "train.batch_size": "16",
        "train.lr": rate,
        "train.eval_every": str(max(1, int(steps) // 4)),
    }
    sets = [part for key, value in keys.items() for part in ("--set", f"{key}={value}")]
    return {**pissa("train", str(output), *sets), "lr": rate, "run": output, "init_seconds": began["seconds"]}


def main() -> None:
    model, train, held_out, page = sys.argv[1:5]
    steps = sys.argv[5] if len(sys.argv) > 5 else "120"
    rows, curves = [], {}
    with tempfile.TemporaryDirectory() as scratch:
        for label, method, bits in (("PiSSA", "pissa", 32), ("LoRA", "lora", 32), ("QPiSSA", "pissa", 4)):
            rates = RATES[method] if bits == 32 else (rows[0][1],)
            tried = [
                run(method, rate, bits, model, train, held_out, Path(scratch) / f"{label}-{rate}", steps)
                for rate in rates
            ]
            best = min(tried, key=lambda one: float(one["eval_loss"]))
            folder = str(best["run"])
            scores = pissa(
                "eval",
                folder,
                "--bench",
                "loss,gsm8k",
                "--data",
                f"gsm8k={held_out}",
                "--limit",
                "100",
                "--compare-base",
            )
            merged, nf4 = pissa("merge", folder), pissa("quantize", folder)
            curves[f"{label}, lr {best['lr']}"] = best["run"] / "metrics.jsonl"
            rows.append(
                [
                    label,
                    best["lr"],
                    f"{best['init_seconds']:.1f}",
                    f"{best['seconds']:.0f}",
                    f"{scores['base']['loss']['score']:.3f}",
                    f"{scores['results']['loss']['score']:.3f} ± {scores['results']['loss']['stderr']:.3f}",
                    f"{best['eval_loss']:.3f}",
                    f"{scores['results']['gsm8k']['score']:.1f} %",
                    f"{merged['relative_logit_difference']:.1e}",
                    f"{nf4['perplexity_before']:.2f} -> {nf4['perplexity_after']:.2f}",
                ]
            )
        picture = Path(page).with_suffix(".png")
        draw_losses(curves, picture)
    titles = [
        "method",
        "lr",
        "init, s",
        "train, s",
        "loss before (100)",
        "after (100)",
        "after (all)",
        "exact match (100)",
    ]
    titles += ["merge, logits", "perplexity, dense -> NF4"]
    lines = [" | ".join(row) for row in (titles, ["---"] * len(titles), *rows)]
    packages = ", ".join(f"{name} {version(name)}" for name in ("pissa", "torch", "transformers", "bitsandbytes"))
    text = [
        f"# {Path(model).name} on {Path(train).parent.name}",
        "",
        f"Made by `tests/compare_methods.py` on {time.strftime('%Y-%m-%d')}: rank 16, {steps} steps",
        "of 16 examples, fp32 products, the best of these learning rates by held-out loss: "
        + "; ".join(f"{method} {', '.join(rates)}" for method, rates in RATES.items()),
        "(QPiSSA: NF4 base, T = 5, at PiSSA's rate).",
        f"{packages}; {platform.machine()}, {platform.system()}, no GPU.",
        "",
        *(f"| {line} |" for line in lines),
        "",
        f"![loss]({picture.name})",
        "",
    ]
    Path(page).write_text("\n".join(text))


if __name__ == "__main__":
    main()
