"""PiSSA (arXiv 2404.02948, section 3) and QPiSSA (section 4, appendix E): train the principal part of W.

With W = U diag(S) Vh:  A = sqrt(S/s) Vh, B = U sqrt(S/s) over the top r,  W_res = store(W - s B A).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pissa_cli import quant
from pissa_cli.adapters import lora
from pissa_cli.adapters.start import Factors, Layer, Method, Start, balanced
from pissa_cli.svd import SVD, frobenius_norm, truncated_svd

OVER_RELAXATION = 0.8


def start(weight: Tensor, layer: Layer, options: Mapping[str, Any]) -> Start:
    """options: `svd` (fast, exact), `passes` (T) and `refit`. The residual is that of the factors as they are kept.

    Without `refit` as the authors' code has it (starts on SVD, ends on quantize), L = s B A:
    E = W;  T times: L <- SVD_r(E);  Q <- store(W - L);  E <- W - Q.
    With it, over NF4, Q <- store(W - L - 0.8 (L - L_before)) and at the end L <- SVD_r(E) again, the best L for that
    Q in any unitarily invariant norm (Eckart-Young); `ends_on` in the figures says which L left less.
    A zero matrix has no principal part and starts as LoRA does.
    """
    refit = options["refit"] and layer.store.bits == 4
    target, before, energy = weight, None, 0.0
    svd: SVD | None = None
    for step in range(options["passes"]):
        svd = truncated_svd(target, layer.rank, options["svd"], layer.seed, layer.name, near=svd)
        if step == 0 and not float(svd.S[0]) > 0:  # both factors would be zero and never train
            return lora.start(weight, layer, {"init": "A", "distribution": "kaiming"})
        if step == 0:
            energy = float(svd.S.double().square().sum()) / max(frobenius_norm(weight) ** 2, 1e-300)
        A, B = balanced(svd, layer.scale)
        ahead = OVER_RELAXATION if refit and before is not None else 0.0
        rest = torch.addmm(weight, B, A, alpha=-layer.scale * (1 + ahead))
        if ahead and before is not None:
            rest.addmm_(before[1], before[0], alpha=layer.scale * ahead)
        before = A, B
        if step + 1 < options["passes"] and layer.store.absmax == "fitted":
            target = weight - quant.round_trip(rest, "fitted")
            continue
        frozen = quant.pack(layer.store, rest)
        if refit or step + 1 < options["passes"]:
            target = weight - quant.read(frozen)
    figures: dict[str, Any] = {"energy": energy}
    if refit:
        last = balanced(truncated_svd(target, layer.rank, options["svd"], layer.seed, layer.name, svd), layer.scale)
        errors = [frobenius_norm(torch.addmm(target, b, a, alpha=-layer.scale)) for a, b in ((A, B), last)]
        if errors[1] < errors[0]:
            A, B = last
        figures["ends_on"] = "svd" if errors[1] < errors[0] else "quantize"
    return Start({"A": A, "B": B}, frozen, figures)


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
