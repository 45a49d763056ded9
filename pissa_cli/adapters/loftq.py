"""LoftQ (arXiv 2310.08659): factors that make up for what 4-bit storage loses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pissa_cli.adapters import lora
from pissa_cli.adapters.start import Layer, Method, Start, balanced
from pissa_cli.matrices import quant
from pissa_cli.matrices.panels import minus, minus_product
from pissa_cli.matrices.svd import truncated_svd


def start(weight: Tensor, layer: Layer, options: Mapping[str, Any]) -> Start:
    """options: `svd` (fast, 1%, exact) and `passes` (T). Starts on quantize, ends on SVD (Algorithm 1):

    L = 0;  T times: Q <- store(W - L);  L = s B A <- SVD_r(W - Q).

    A layer that loses nothing, as a dense one, would have two zero factors that never train; it starts as LoRA does.
    """
    if layer.store.bits != 4:
        return lora.start(weight, layer, lora.DEFAULT)
    rest, near = weight, None
    for step in range(options["passes"]):
        frozen = quant.pack(layer.store, rest)
        lost = minus(weight, quant.read(frozen))
        svd = truncated_svd(lost, layer.rank, options["svd"], layer.seed, layer.name, near)
        near = svd.Vh.T
        A, B = balanced(svd, layer.scale)
        if step + 1 < options["passes"]:
            rest = minus_product(weight, B, A, layer.scale)
    if not A.any():  # storage lost nothing
        return lora.start(weight, layer, lora.DEFAULT)
    return Start({"A": A, "B": B}, frozen)


LOFTQ = Method(start=start, trains=frozenset({"A", "B"}), moves_base=True)
