"""What a method gives a layer at step 0, and what a set of layers is called together: an adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from pissa_cli.matrices.quant import Packed, Store
from pissa_cli.matrices.svd import SVD, frobenius_norm

Factors = dict[str, Tensor]
"""Named fp32 factors of one layer: A (r, in), B (out, r), and where a method has them d (r,), b (out,)."""


@dataclass(frozen=True)
class Start:
    """The factors, the frozen weight as stored, and figures for the report (e.g. `energy`, the share kept)."""

    factors: Factors
    frozen: Packed | Tensor
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Layer:
    """What a method may know about the layer it starts."""

    name: str
    rank: int
    scale: float
    seed: int
    store: Store
    embedding: bool = False


class Projections:
    """VeRA's frozen A (r, widest in) and B (widest out, r): one copy a device for all layers, never in a state dict."""

    def __init__(self, A: Tensor, B: Tensor) -> None:
        self._copies = {(A.device, A.dtype): (A, B)}

    def whole(self) -> tuple[Tensor, Tensor]:
        """A and B as they were drawn."""
        return next(iter(self._copies.values()))

    def pair(self, shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A[:, :in] and B[:out] for a shape (out, in): views of the copy on `device`, made at the first call."""
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        if (device, dtype) not in self._copies:
            A, B = self.whole()
            self._copies.setdefault((device, dtype), (A.to(device, dtype), B.to(device, dtype)))  # one for all threads
        A, B = self._copies[(device, dtype)]
        return A[:, : shape[1]], B[: shape[0]]


@dataclass(frozen=True)
class Adapter:
    """The factors of every adapted layer by name, with the scale s of each, and the projections they share.

    saved: parameters of `modules_to_save` that trained whole, by their names in the model; embeddings: names of those
    layers that are embeddings.
    """

    factors: dict[str, Factors]
    scales: dict[str, float]
    projections: Projections | None = None
    saved: dict[str, Tensor] = field(default_factory=dict)
    embeddings: frozenset[str] = frozenset()

    def pair(self, name: str, shape: torch.Size, device: torch.device) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r) for a W (out, in) of this shape: its change is B A, with s, d and b inside B."""
        factors = {key: factor.to(device) for key, factor in self.factors[name].items()}
        if self.projections is not None:
            factors["A"], factors["B"] = self.projections.pair(shape, device, torch.float32)
        A, B = factors["A"], self.scales[name] * factors["B"]
        if "d" in factors:
            B = B * factors["d"]
        if "b" in factors:
            B = B * factors["b"][:, None]
        return A, B


@dataclass(frozen=True)
class Method:
    """One row of METHODS.

    start: (weight (out, in) fp32, layer, options) -> Start; options are the method's own, e.g. {"svd": "fast"}.
    trains: names of the factors that get gradients.
    moves_base: whether the frozen weight differs from the base's (then a plain base needs `on_plain_base`).
    on_plain_base: (factors now, factors at step 0) -> LoRA {A, B} with s B A = W_frozen + s (B * d * b) A - W.
    peft_type: the kind of PEFT files the factors at step 0 make; see `pissa_cli.base.peft_files`.
    embeddings, experts: whether it adapts embeddings, and experts stored as 3-D weights, as well.
    rank_limit: what a rank above the smaller dimension of a layer is: an "error", "lowered" to it, or "none".
    """

    start: Callable[[Tensor, Layer, Mapping[str, Any]], Start]
    trains: frozenset[str]
    moves_base: bool = False
    on_plain_base: Callable[[Factors, Factors], Factors] = lambda now, _start: now
    rank_limit: Literal["error", "lowered", "none"] = "error"
    peft_type: Literal["LORA", "VERA", "SVFIT"] = "LORA"
    embeddings: bool = False
    experts: bool = True


def as_lora(factors: Factors) -> Factors:
    """The same layer without d: {A, B d}. Factors that have no A of their own (VeRA's) are returned as they are."""
    if "A" in factors and "d" in factors:
        return {"A": factors["A"], "B": factors["B"] * factors["d"]}
    return factors


def energy(S: Tensor, weight: Tensor) -> float:
    """The share of ||W||^2 in these singular values (r,) of W (out, in)."""
    return float(S.square().sum()) / (frobenius_norm(weight) ** 2 or 1.0)


def balanced(svd: SVD, scale: float) -> tuple[Tensor, Tensor]:
    """A = sqrt(S/s) Vh, B = U sqrt(S/s): the split of U diag(S) Vh = s B A that gives both factors equal norms."""
    root = (svd.S / scale).sqrt()
    return root[:, None] * svd.Vh, svd.U * root
