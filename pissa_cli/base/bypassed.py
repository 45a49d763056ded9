"""Linear layers whose weight a model takes past the layer, and past an adapter or NF4 in its place."""

from __future__ import annotations

import functools
import inspect
import re

from torch import nn

CLAMPED = ("correction_coefs", "prediction_coefs")
"""Of Gemma 3n, which clamps their weights while it trains."""
LOOKED_UP = ("rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias")
"""Of LayoutLM 2 and 3, which look numbers up in their weights, 3 in a helper that it hands the layers."""
RESCALED = {("RwkvSelfAttention", "output"), ("RwkvFeedForward", "value")}
"""Of RWKV, which divides their weights in place where it does not train."""


def is_bypassed(holder: nn.Module, kind: str) -> bool:
    """Whether the code of a module reads the weight of its layer `kind` and never calls that (LongCat's router), or
    hands it to a kernel where there is one (state-space models: Mamba, Jamba, Falcon-H1)."""
    if kind in (*CLAMPED, *LOOKED_UP) or (type(holder).__name__, kind) in RESCALED:
        return True
    code = _code(type(holder))  # type: ignore[arg-type]
    reads = re.search(rf"\bself\.{re.escape(kind)}\.weight\b(?!\.(dtype|device|shape))", code) is not None
    return reads and (hasattr(holder, "A_log") or f"self.{kind}(" not in code)


def casts_to(holder: nn.Module, kind: str) -> bool:
    """Whether the code of a module casts to the dtype of the weight of its layer `kind`, which in NF4 is that of bytes
    (what HY-V4 and dots3 choose tokens by, gates of Inkling 2)."""
    code = _code(type(holder))  # type: ignore[arg-type]
    return re.search(rf"\.to\((dtype=)?self\.{re.escape(kind)}\.weight\.dtype\)", code) is not None


@functools.cache
def _code(kind: type) -> str:
    """The source of a class, empty where there is none."""
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        return ""
