"""PiSSA (arXiv 2404.02948, section 3) and QPiSSA (section 4, appendix E): train the principal part of W.

With W = U diag(S) Vh:  A = sqrt(S/s) Vh, B = U sqrt(S/s) over the top r,  W_res = store(W - s B A).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pissa_cli.adapters import lora
from pissa_cli.adapters.start import Factors, Layer, Method, Start, balanced, energy
from pissa_cli.matrices import quant
from pissa_cli.matrices.panels import minus, minus_product
from pissa_cli.matrices.quant import Packed
from pissa_cli.matrices.svd import SVD, UNCHECKED, project, project_svd, truncated_svd

OVER_RELAXATION = 0.8


def start(weight: Tensor, layer: Layer, options: Mapping[str, Any]) -> Start:
    """options: `svd` (fast, 1%, exact), `passes` (T) and `refit`. The residual is that of the factors as they are kept.

    A zero matrix has no principal part and starts as LoRA does.
    """
    refit = options["refit"] and layer.store.bits == 4
    rough = refit and options["passes"] > 1 and options["svd"] != "exact"  # the passes do the rest
    svd = truncated_svd(weight, layer.rank, UNCHECKED if rough else options["svd"], layer.seed, layer.name)
    if not float(svd.S[0]) > 0:  # both factors would be zero and never train
        return lora.start(weight, layer, lora.DEFAULT)
    figures = {"energy": energy(svd.S, weight)}
    svd, frozen = (_refit if refit else _alternate)(weight, svd, layer, options)
    A, B = balanced(svd, layer.scale)
    return Start({"A": A, "B": B}, frozen, figures)


def _alternate(weight: Tensor, svd: SVD, layer: Layer, options: Mapping[str, Any]) -> tuple[SVD, Packed | Tensor]:
    """As the authors' code has it, L = U diag(S) Vh <- SVD_r(W):  T - 1 times Q <- store(W - L), L <- SVD_r(W - Q);
    and Q <- store(W - L). It starts on SVD and ends on quantize."""
    A, B = balanced(svd, 1.0)
    for _ in range(options["passes"] - 1):
        lost = minus(weight, quant.read(quant.pack(layer.store, minus_product(weight, B, A))))
        svd = truncated_svd(lost, layer.rank, options["svd"], layer.seed, layer.name, svd.Vh.T)
        A, B = balanced(svd, 1.0)
    return svd, quant.pack(layer.store, minus_product(weight, B, A))


def _refit(weight: Tensor, svd: SVD, layer: Layer, options: Mapping[str, Any]) -> tuple[SVD, Packed | Tensor]:
    """Passes that look ahead, and end on the best L for what is stored; L = B A has rank r, T is `passes`:

    T - 1 times  Q <- NF4(W - L - 0.8 (L - L_before)),    L <- U U^T (W - Q) with U = orth((W - Q) A^T);
    and then     Q <- store(W - L - 0.8 (L - L_before)),  L <- SVD_r(W - Q).

    The last L is the best for that Q in every unitarily invariant norm (Eckart-Young). One power step finds it, as all
    that W - Q has beside L is the rounding of Q.
    """
    B, A = ahead = svd.U * svd.S, svd.Vh
    for _ in range(options["passes"] - 1):
        before = B, A
        B, A = project(quant.lost(weight, layer.store.absmax, *ahead), A)
        both = torch.cat([(1 + OVER_RELAXATION) * B, -OVER_RELAXATION * before[0]], dim=1)
        ahead = both, torch.cat([A, before[1]])
    frozen = quant.pack(layer.store, minus_product(weight, *ahead))
    lost = minus(weight, quant.read(frozen))
    if options["svd"] == "exact":
        return truncated_svd(lost, layer.rank, "exact"), frozen
    return project_svd(lost, A), frozen


def on_plain_base(now: Factors, start: Factors) -> Factors:
    """B'A' - B A = [B'-B  B] [A'; A'-A]: rank 2r, no SVD.

    The paper (appendix C) has [B' -B] [A'; A], whose two large terms cancel: in bf16 products what is left of the
    change is lost in their rounding. Here each term is as small as the change.
    """
    return {
        "A": torch.cat([now["A"], now["A"] - start["A"]]),
        "B": torch.cat([now["B"] - start["B"], start["B"]], dim=1),
    }


PISSA = Method(start=start, trains=frozenset({"A", "B"}), moves_base=True, on_plain_base=on_plain_base)
