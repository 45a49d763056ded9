"""`adapter.rank: auto`: ranks by layer from the spectra of the weights, under a budget."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from pissa_cli.base.integrity import require_finite
from pissa_cli.base.model import best_device, read_weight
from pissa_cli.base.plan import Plan
from pissa_cli.base.weights import Weights
from pissa_cli.matrices.svd import energies
from pissa_cli.schema.adapter_options import ScaledBase


def with_auto_ranks(adapter: ScaledBase, plan: Plan, weights: Weights, progress: Callable[..., None]) -> Plan:
    """The plan with ranks by layer that keep the most energy (sum of squared singular values) for the numbers trained.

    They grow until `adapter.max_parameters` are spent, or, over NF4, until the predicted error is the share
    `adapter.max_error` of plain NF4's. The prediction: storage loses a constant share of the Frobenius norm of what it
    stores. So where factors keep the energy e of E, the error is sqrt(1 - e / E) of that of storing W itself.
    """
    costs = {layer.name: layer.num_out + layer.num_in for layer in plan.targets}
    spectra: dict[str, Tensor] = {}
    for number, layer in enumerate(plan.targets):
        W, _ = read_weight(weights, layer, best_device())
        require_finite(layer.tensor, W, weights)
        spectra[layer.name] = energies(W).cpu()
        progress(number + 1, len(plan.targets), layer.name)
    ranks = allot(spectra, costs, adapter.max_parameters, adapter.max_error)
    return replace(plan, ranks=ranks, scales={name: adapter.layer_scale(name, rank) for name, rank in ranks.items()})


def allot(
    spectra: dict[str, Tensor], costs: dict[str, int], max_parameters: int | None, max_error: float | None
) -> dict[str, int]:
    """Ranks by layer: rank 1 everywhere, then one singular triplet at a time, the most energy for its cost first.

    spectra: squared singular values, descending; costs: numbers that one more rank trains.
    """
    ranks = dict.fromkeys(spectra, 1)
    spent = sum(costs.values())
    kept = sum(float(squares[0]) for squares in spectra.values())
    whole = sum(float(squares.sum(dtype=torch.float64)) for squares in spectra.values())
    enough = float("inf") if max_error is None else (1 - max_error**2) * whole
    waiting = [(-float(squares[1]) / costs[name], name) for name, squares in spectra.items() if len(squares) > 1]
    heapq.heapify(waiting)
    while waiting and kept < enough:
        _, name = heapq.heappop(waiting)
        if max_parameters is not None and spent + costs[name] > max_parameters:
            continue
        kept, spent = kept + float(spectra[name][ranks[name]]), spent + costs[name]
        ranks[name] += 1
        if ranks[name] < len(spectra[name]):
            heapq.heappush(waiting, (-float(spectra[name][ranks[name]]) / costs[name], name))
    return ranks
