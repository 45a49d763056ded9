"""PiSSA (arXiv 2404.02948, section 3) and QPiSSA (section 4, appendix E): train the principal part of W.

With W = U diag(S) Vh:  A = sqrt(S/s) Vh, B = U sqrt(S/s) over the top r,  W_res = store(W - s B A).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pissa_cli import quant
from pissa_cli.adapters.start import Factors, Layer, Method, Start
from pissa_cli.svd import truncated_svd


def start(weight: Tensor, layer: Layer, options: Mapping[str, Any]) -> Start:
    """options: `svd` (fast, exact) and `passes` (T). The residual is that of the factors as they are kept.

    With T passes, as the authors' code does it (starts on SVD, ends on quantize):
    E_0 = W;  (A, B) <- SVD_r(E);  Q <- store(W - s B A);  E <- W - read(Q).
    """
    target = weight
    energy = 0.0
    for step in range(options["passes"]):
        U, S, Vh = truncated_svd(target, layer.rank, options["svd"], layer.seed, layer.name)
        if step == 0:
            energy = float(S.double().square().sum() / weight.double().square().sum().clamp_min(1e-300))
        root = (S / layer.scale).sqrt()
        A, B = root[:, None] * Vh, U * root
        frozen = quant.pack(layer.store, torch.addmm(weight, B, A, alpha=-layer.scale))
        if step + 1 < options["passes"]:
            target = weight - quant.read(frozen)
    return Start({"A": A, "B": B}, frozen, {"energy": energy})


def on_plain_base(now: Factors, start: Factors) -> tuple[Tensor, Tensor]:
    """B'A' - B A = [B' -B] [A'; A] (paper, appendix C): rank 2r, no SVD."""
    return torch.cat([now["A"], start["A"]]), torch.cat([now["B"], -start["B"]], dim=1)


PISSA = Method(start=start, trains=frozenset({"A", "B"}), moves_base=True, on_plain_base=on_plain_base)
