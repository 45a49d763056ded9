"""SVFit (arXiv 2409.05926): W = W_e + U diag(d) Vh over the top r; only the singular values d train."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pissa_cli.adapters.start import Factors, Layer, Method, Start, energy
from pissa_cli.matrices import quant
from pissa_cli.matrices.panels import minus_product
from pissa_cli.matrices.svd import truncated_svd


def start(weight: Tensor, layer: Layer, options: Mapping[str, Any]) -> Start:
    """options: `svd` (fast, 1%, exact). A = Vh, B = U, d = S; W_e = store(W - U diag(d) Vh); s = 1."""
    U, S, Vh = truncated_svd(weight, layer.rank, options["svd"], layer.seed, layer.name)
    frozen = quant.pack(layer.store, minus_product(weight, U * S, Vh))
    return Start({"A": Vh, "B": U, "d": S}, frozen, {"energy": energy(S, weight)})


def on_plain_base(now: Factors, start: Factors) -> Factors:
    """U diag(d' - d) Vh."""
    return {"A": now["A"], "B": now["B"] * (now["d"] - start["d"])}


SVFIT = Method(
    start=start,
    trains=frozenset({"d"}),
    moves_base=True,
    on_plain_base=on_plain_base,
    rank_limit="lowered",
    peft_type="SVFIT",
)
