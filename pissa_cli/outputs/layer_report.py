"""`init --report`: spectra of the weights, and over NF4 the error of every way to start, layer by layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pissa_cli.adapters.methods import METHODS
from pissa_cli.adapters.start import Layer
from pissa_cli.base.model import Linear, best_device, linear_layers, read_weight, skeleton
from pissa_cli.base.weights import open_weights
from pissa_cli.files import write_json
from pissa_cli.initialize import Progress
from pissa_cli.matrices import quant
from pissa_cli.matrices.svd import energies, nuclear_norm
from pissa_cli.run.report import drawing, save_picture
from pissa_cli.run.started import open_run, require_plain_base
from pissa_cli.schema.recipe import Recipe

RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
PASSES = 5
STARTS: dict[str, tuple[str, quant.Absmax, dict[str, Any]]] = {
    "loftq": ("loftq", "largest", {}),
    "qpissa_paper": ("pissa", "largest", {"refit": False}),
    "qpissa": ("pissa", "fitted", {"refit": True}),
}
"""Name in the report: method, block scales, options. Plain NF4 stands beside them."""


def layer_report(recipe: Recipe, progress: Progress = lambda *_: None) -> dict[str, Any]:
    """Write report.json and report.png into the run folder and return the report.

    A row a layer: name, kind, shape, rank, `energy` (share of ||W||^2 in the top r singular values, by r), and over NF4
    the nuclear norms of the errors of plain NF4 and of STARTS at that rank with T = 5, whatever the run's own method.
    """
    run, manifest = open_run(recipe)
    folder = require_plain_base(manifest, recipe)
    weights = open_weights(folder)
    layers = {layer.name: layer for layer in linear_layers(skeleton(folder, recipe.model), weights)}
    rows = []
    for number, figures in enumerate(manifest["layers"]):
        layer, rank = layers[figures["name"]], figures["rank"]
        W, dtype = read_weight(weights, layer, best_device())
        row = {"name": layer.name, "kind": layer.kind, "shape": figures["shape"], "rank": rank}
        row["energy"] = energy_by_rank(W)
        if recipe.model.bits == 4 and layer.packable and rank <= min(W.shape) and bool(W.any()):
            row["errors"] = _errors(recipe, layer, rank, W, dtype)
        rows.append(row)
        progress(number + 1, len(manifest["layers"]), layer.name)
    report = {"passes": PASSES, "layers": rows}
    write_json(run.folder / "report.json", report)
    picture(rows, run.folder / "report.png")
    return report


def energy_by_rank(W: torch.Tensor) -> dict[str, float]:
    """Share of the squared Frobenius norm in the top r singular values, by r, in fp64."""
    squares = energies(W).double().cpu()
    shares = squares.cumsum(0) / squares.sum().clamp_min(1e-300)
    return {str(r): float(shares[r - 1]) for r in RANKS if r <= len(shares)}


def by_kind(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means by kind of layer: energy by rank, and errors as shares of plain NF4's in percent."""
    found = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        members = [row for row in rows if row["kind"] == kind]
        mean: dict[str, Any] = {"kind": kind, "layers": len(members)}
        shared = [r for r in members[0]["energy"] if all(r in member["energy"] for member in members)]
        mean["energy"] = {r: sum(member["energy"][r] for member in members) / len(members) for r in shared}
        measured = [member["errors"] for member in members if "errors" in member]
        if measured:
            mean["errors"] = {
                name: 100 * sum(errors[name] / errors["nf4"] for errors in measured) / len(measured) for name in STARTS
            }
        found.append(mean)
    return found


def _errors(recipe: Recipe, layer: Linear, rank: int, W: torch.Tensor, dtype: torch.dtype) -> dict[str, float]:
    errors = {}
    plain = quant.Store(4, dtype, recipe.model.double_quant)
    errors["nf4"] = nuclear_norm(W - quant.read(quant.pack(plain, W)))
    for name, (method, absmax, options) in STARTS.items():
        store = quant.Store(4, dtype, recipe.model.double_quant, absmax)
        described = Layer(layer.name, rank, 1.0, recipe.seed, store)
        start = METHODS[method].start(W, described, {"svd": "fast", "passes": PASSES, **options})
        left = W - quant.read(start.frozen)
        errors[name] = nuclear_norm(left.addmm_(start.factors["B"], start.factors["A"], alpha=-1))
    return errors


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    """Energy over rank by kind of layer, and errors layer by layer."""
    measured = [row for row in rows if "errors" in row]
    figure, panels = drawing().subplots(
        1, 2 if measured else 1, figsize=(12 if measured else 6, 4), dpi=120, squeeze=False
    )
    for mean in by_kind(rows):
        panels[0, 0].plot(
            [int(r) for r in mean["energy"]], list(mean["energy"].values()), marker=".", label=mean["kind"]
        )
    panels[0, 0].set(xscale="log", xlabel="rank", ylabel="share of energy kept")
    if measured:
        for name in STARTS:
            shares = [100 * row["errors"][name] / row["errors"]["nf4"] for row in measured]
            panels[0, 1].plot(shares, marker=".", linewidth=0.8, label=name)
        panels[0, 1].set(xlabel="layer", ylabel="nuclear-norm error, plain NF4 = 100")
    for axes in panels[0]:
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    save_picture(figure, path)
