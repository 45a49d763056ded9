"""Linear layers whose weight a model takes past the layer, and past an adapter in its place."""

from __future__ import annotations

import functools
import inspect
import re

from torch import nn

KERNELS_READ = ("x_proj", "dt_proj", "out_proj")
"""Of state-space models (Mamba, Jamba), whose kernels take the weights alone."""
CLAMPED = ("correction_coefs", "prediction_coefs")
"""Of Gemma 3n, which clamps the weights while it trains."""


def is_bypassed(holder: nn.Module, kind: str) -> bool:
    """Whether the layer `kind` of a module is one of these, or the module's code reads its weight and never calls it
    (LongCat's router)."""
    if kind in CLAMPED or (kind in KERNELS_READ and hasattr(holder, "A_log")):
        return True
    code = _code(type(holder))  # type: ignore[arg-type]
    return re.search(rf"\bself\.{re.escape(kind)}\.weight\b", code) is not None and f"self.{kind}(" not in code


@functools.cache
def _code(kind: type) -> str:
    """The source of a class, empty where there is none."""
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        return ""
