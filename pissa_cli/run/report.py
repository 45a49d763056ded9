"""What metrics.jsonl and the manifest of a run say, as figures, lines and pictures."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LARGEST = 1e30
"""Numbers that can be drawn."""
PACKED_EXPERTS = (
    "experts in 4 bits are packed one by one: pissa reads that, transformers 5 does not; it reads what "
    "`pissa export --as compressed-tensors` or `--as merged` writes"
)


def mean_losses(metrics: Path) -> tuple[float, float, int]:
    """(loss at the begin, at the end, n): means over n steps each, up to 10 and no more than half of the run's."""
    losses = [event["loss"] for event in read_metrics(metrics) if event["loss"] is not None]
    few = max(1, min(10, len(losses) // 2))
    return sum(losses[:few]) / few, sum(losses[-few:]) / few, few


def read_metrics(metrics: Path) -> Iterator[dict[str, Any]]:
    """The lines of metrics.jsonl with a step and a loss (None for a step that was left out), one by one. Damaged ones
    are no loss to the model, and are left out."""
    with metrics.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                event = json.loads(line)
                numbers = [event["step"], event["loss"] or 0.0, event.get("eval_loss", 0.0)]
            except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
                continue
            if all(isinstance(number, int | float) and abs(number) < LARGEST for number in numbers):
                yield event


def draw_losses(runs: dict[str, Path], picture: Path) -> None:
    """A picture of the losses of one run or several, over steps: lines for training, dots for data.eval."""
    figure, axes = drawing().subplots(figsize=(7, 4), dpi=120)
    for number, (name, metrics) in enumerate(runs.items()):
        label = name.replace("$", r"\$")  # between two of them would be a formula
        events = list(read_metrics(metrics))
        steps = [event["step"] for event in events]
        losses = [math.nan if event["loss"] is None else event["loss"] for event in events]
        axes.plot(steps, losses, color=f"C{number}", linewidth=1, label=f"{label}: training")
        held_out = [(event["step"], event["eval_loss"]) for event in events if "eval_loss" in event]
        if held_out:
            xs, ys = zip(*held_out, strict=True)
            axes.plot(xs, ys, color=f"C{number}", marker="o", linestyle="--", label=f"{label}: held out")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per target token)")
    axes.grid(alpha=0.3)
    axes.legend()
    save_picture(figure, picture)


def drawing() -> Any:
    """matplotlib's pyplot, for files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save_picture(figure: Any, picture: Path) -> None:
    """Write a figure under a temporary name, then rename it into place; it is gone then."""
    figure.tight_layout()
    temporary = picture.with_name(f".{picture.name}.tmp.png")
    figure.savefig(temporary)
    drawing().close(figure)
    temporary.replace(picture)


def notes_of(record: dict[str, Any]) -> list[str]:
    """For the person watching, what a manifest, or another record with some of its keys, says of: tensors of the base
    that are not used, what gets no adapter, the layers that stay dense, those that stock PEFT does not find, and
    experts that stock transformers does not read."""
    notes = {
        "unused": _not_used,
        "left_out": _left_without_adapter,
        "kept_dense": _left_dense,
        "lost_in_peft": left_by_peft,
        "packed_experts": lambda _: PACKED_EXPERTS,
    }
    return [note(names) for key, note in notes.items() if (names := record.get(key))]


def _not_used(names: list[str]) -> str:
    """A line about tensors of the base that the model has no place for."""
    what = names[0] if len(names) == 1 else f"{names[0]}, ... ({len(names)} in all)"
    return f"the model that config.json describes has no place for some of the base's tensors: {what}"


def _left_without_adapter(names: list[str]) -> str:
    """A line about parts of a model that can get no adapter."""
    what = names[0] if len(names) == 1 else f"{names[0]}, ... ({len(names)} in all)"
    why = "stacked, shared, reached by no text, or multiplied by no plain linear layer"
    return f"no adapter for weights that are {why}: {what}"


def _left_dense(reasons: dict[str, str] | list[str]) -> str:
    """A line for each reason about the linear layers that 4 bits leave as they are."""
    if isinstance(reasons, list):  # of an earlier init
        reasons = dict.fromkeys(reasons, "the run does not say why")
    lines = []
    for why in dict.fromkeys(reasons.values()):
        names = [name for name, reason in reasons.items() if reason == why]
        what = "1 linear layer stays" if len(names) == 1 else f"{len(names)} linear layers stay"
        lines.append(f"{what} dense ({why}): {names[0]}{', ...' if len(names) > 1 else ''}")
    return "\n".join(lines)


def lost_in_4_bits(result: dict[str, Any]) -> list[str]:
    """Of what `quantize` has returned: its notes, and the error of the layers in 4 bits."""
    error = f"error of the quantized weights: {result['relative_error']:.2%} (Frobenius, relative)"
    return [*notes_of(result), error]


def left_by_peft(names: list[str]) -> str:
    """A line about adapted layers that stock PEFT does not find in an adapter's files."""
    what = f"the adapter of {names[0]}" if len(names) == 1 else f"the adapters of {names[0]}, ... ({len(names)} in all)"
    why = "renames their tensors as those of a base"
    return f"stock PEFT leaves out {what}, as it {why}; `pissa merge` has everything"


def summarize(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The layers of a manifest by kind, and all of them: counts, means, and NF4 error reductions in percent."""
    layers = manifest.get("layers", [])
    kinds = list(dict.fromkeys(layer["kind"] for layer in layers))
    groups = [(kind, [layer for layer in layers if layer["kind"] == kind]) for kind in kinds]
    rows = []
    for kind, members in [*groups, ("all", layers)] if layers else []:
        rank = statistics.mean(member["rank"] for member in members)  # a whole number stays one
        row: dict[str, Any] = {"kind": kind, "layers": len(members), "rank": rank}
        for key in ("energy", "start_error", "nuclear", "frobenius", "plain_nuclear", "plain_frobenius"):
            found = [member[key] for member in members if key in member]
            if found:
                row[key] = sum(found) / len(found)
        for norm in ("nuclear", "frobenius"):
            if row.get(f"plain_{norm}", 0) > 0:
                row[f"{norm}_reduction"] = 100 * (1 - row[norm] / row[f"plain_{norm}"])
        rows.append(row)
    return rows
