"""What a method gives a layer at step 0."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from pissa_cli.quant import Packed, Store

Factors = dict[str, Tensor]
"""Named fp32 factors of one layer: A (r, in), B (out, r), and where a method has them d (r,), b (out,)."""


@dataclass(frozen=True)
class Start:
    """The factors, the frozen weight as stored, and figures for the report (e.g. `energy`, the share kept)."""

    factors: Factors
    frozen: Packed | Tensor
    figures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Layer:
    """What a method may know about the layer it starts."""

    name: str
    rank: int
    scale: float
    seed: int
    store: Store


@dataclass(frozen=True)
class Method:
    """One row of METHODS.

    start: (weight (out, in) fp32, layer, options) -> Start; options are the method's own, e.g. {"svd": "fast"}.
    trains: names of the factors that get gradients.
    moves_base: whether the frozen weight differs from the base's (then a plain base needs `on_plain_base`).
    on_plain_base: (factors now, factors at step 0) -> LoRA (A, B) with s B A = W_frozen + s B A - W.
    """

    start: Callable[[Tensor, Layer, Mapping[str, Any]], Start]
    trains: frozenset[str]
    moves_base: bool
    on_plain_base: Callable[[Factors, Factors], tuple[Tensor, Tensor]]
