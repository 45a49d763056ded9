"""The whole main job on the small model inside the package: PiSSA and LoRA at their best learning rates."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import Any

from pissa_cli.cli import show
from pissa_cli.cli.edge import run_guarded
from pissa_cli.errors import Interrupted

OUT = Path("demo-out")
RATES = {"pissa": (1.5e-3, 3e-3, 5e-3), "lora": (2.5e-3, 5e-3, 1e-2)}


def main() -> None:
    """Train, score, merge and quantize; end with a table and a picture in demo-out/."""
    show.load_libraries(debug=False)
    from rich.table import Table

    from pissa_cli.run.report import draw_losses

    began = time.monotonic()
    results = {method: best_of(method) for method in RATES}
    table = Table(title="PiSSA and LoRA: equal rank, equal steps, each at its best learning rate of three")
    for column in ("method", "lr", "loss", "held-out loss", "exact match before", "after", "training s"):
        table.add_column(column, justify="right")
    for method, r in results.items():
        table.add_row(
            method,
            f"{r['lr']:g}",
            f"{r['loss_first']:.3f} -> {r['loss_last']:.3f}",
            f"{r['eval_loss']:.3f}",
            f"{r['before']['score']:.1f} %",
            f"{r['after']['score']:.1f} % (n {r['after']['n']})",
            f"{r['seconds']:.1f}",
        )
    picture = OUT / "loss.png"
    draw_losses(
        {f"{method} (lr {r['lr']:g})": Path(r["run"]) / "metrics.jsonl" for method, r in results.items()}, picture
    )
    lines = []
    for method, r in results.items():
        lines.append(
            f"{method}: merged {r['merged']['bytes'] / 2**20:.1f} MiB, largest logit difference "
            f"{r['merged']['max_logit_difference']:.1e}; NF4 {r['nf4']['bytes'] / 2**20:.1f} MiB, perplexity "
            f"{r['nf4']['perplexity_before']:.3f} -> {r['nf4']['perplexity_after']:.3f}"
        )
    lines += [f"loss curves: {picture}", f"everything took {time.monotonic() - began:.0f} s; runs are in {OUT}/"]
    show.print_result({}, False, lines, table)


def best_of(method: str) -> dict[str, Any]:
    """Train `method` at each of its rates; score, merge and quantize the one with the lowest held-out loss."""
    from pissa_cli.evals.run import evaluate
    from pissa_cli.merge import merge
    from pissa_cli.quantize import quantize
    from pissa_cli.schema.recipe_file import load
    from pissa_cli.train import train

    tried = []
    for rate in RATES[method]:
        output = OUT / f"{method}-lr{rate:g}"
        shutil.rmtree(output, ignore_errors=True)
        show.say(f"training {method} at learning rate {rate:g} ...")
        recipe = load(f"demo/{method}", {}, [f"train.lr={rate}", f"output={output}"]).recipe
        try:
            figures = train(recipe)
        except Interrupted:
            raise Interrupted("stopped", "the demo begins anew") from None
        show.say(f"  held-out loss {figures['eval_loss']:.4f} after {figures['seconds']:.1f} s")
        tried.append({**figures, "recipe": recipe, "run": str(output)})
    best = min(tried, key=lambda one: one["eval_loss"])
    recipe = best["recipe"]
    best["before"] = evaluate(recipe, base=True)["gsm8k"]
    best["after"] = evaluate(recipe)["gsm8k"]
    best["merged"] = merge(recipe)
    best["nf4"] = quantize(recipe)
    return best


if __name__ == "__main__":
    sys.exit(run_guarded(main, sys.argv[1:]))
