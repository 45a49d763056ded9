"""The one adapter layer: y = x W^T + bias + s * (((x' A^T) * d) B^T) * b, with x' = dropout(x).

Shapes: x (tokens, in), W (out, in), A (r, in), B (out, r), d (r,), b (out,). W is frozen and may be stored in NF4.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import MethodType

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from pissa_cli.adapters.function import Gate, LowRankFunction, Part
from pissa_cli.adapters.start import Factors, Projections
from pissa_cli.matrices.products import LinearFunction, in_autocast_dtype, product_dtype, widens, without_autocast
from pissa_cli.matrices.quant import packed_weight, read

FACTOR_NAMES = ("A", "B", "d", "b")
LINEAR_SUBCLASSES = ("FalconLinear",)
"""They compute what torch's Linear does, but for the rounding; transformers stores none of them in NF4."""


class LowRank(nn.Module):
    """A linear layer with a frozen base (nn.Linear, transformers' Conv1D or bitsandbytes' Linear4bit) and factors.

    Factors in `trains` are fp32 parameters, the others fp32 buffers; A and B may come from shared projections instead.
    Products run in the dtype of x, or of autocast. name: that of the layer it stands for. siblings: layers that get the
    same x, with which it is computed (`attach.share_inputs`). keeps_weight: W is saved for the backward pass as it was
    read; for gradient checkpointing, which saves nothing before it runs the layer again.
    """

    name = ""
    A: Tensor
    B: Tensor
    d: Tensor
    b: Tensor

    def __init__(
        self,
        base: nn.Module,
        factors: Factors,
        trains: frozenset[str],
        scale: float,
        dropout: float = 0.0,
        projections: Projections | None = None,
    ) -> None:
        super().__init__()
        self.projections = projections
        self.keeps_weight = False
        self.siblings: Siblings | None = None
        self.base = base.requires_grad_(False)
        self.scale = scale
        self.dropout = dropout
        for name in FACTOR_NAMES:
            factor = factors.get(name)
            if name in trains and factor is not None:
                self.register_parameter(name, nn.Parameter(factor))
            else:
                self.register_buffer(name, factor)

    @property
    def weight(self) -> Tensor:
        """As it is stored; some models ask a layer for its dtype."""
        weight: Tensor = self.base.weight  # type: ignore[assignment]
        return weight

    @property
    def bias(self) -> Tensor | None:
        bias: Tensor | None = self.base.bias  # type: ignore[assignment]
        return bias

    def factors(self) -> Factors:
        """The factors that are there, by name."""
        return {name: factor for name in FACTOR_NAMES if (factor := getattr(self, name)) is not None}

    def pair(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """A and B for an input x."""
        if self.projections is None:
            return self.A, self.B
        return self.projections.pair((len(self.b), x.shape[-1]), x.device, product_dtype(x))

    def base_weight(self, dtype: torch.dtype) -> Tensor:
        """W (out, in) in `dtype`, read back from its store."""
        return _stored(self.base, dtype).to(dtype)

    def forward(self, x: Tensor, gate: Gate | None = None) -> Tensor:
        """The output for x, or for x under a gate."""
        alone = self.siblings is None or gate is not None or x.is_inference()
        return compute([self], x, gate)[0] if alone else self.siblings.output(self, x)  # type: ignore[union-attr]


class LowRankEmbedding(LowRank):
    """An nn.Embedding (in, out) with factors: token ids -> W^T[ids] + s A^T[ids] B^T. Dropout has no place here."""

    def base_weight(self, dtype: torch.dtype) -> Tensor:
        weight: Tensor = self.base.weight.to(dtype)  # type: ignore[assignment]
        return weight.T

    def forward(self, ids: Tensor) -> Tensor:  # type: ignore[override]
        y: Tensor = self.base(ids)
        return y + self.scale * functional.embedding(ids, self.A.T).to(y.dtype) @ self.B.T.to(y.dtype)


class Siblings:
    """Low-rank layers that a model gives the same x, one after the other: the first one called computes them all."""

    def __init__(self, layers: Sequence[LowRank]) -> None:
        self.layers = list(layers)
        self.clear()

    def clear(self) -> None:
        """Forget what was computed and not asked for yet: it holds the graph of its forward pass."""
        self._x: Tensor | None = None
        self._state = (0, False)
        self._outputs: dict[LowRank, Tensor] = {}

    def output(self, layer: LowRank, x: Tensor) -> Tensor:
        """What `layer` makes of x."""
        state = x._version, torch.is_grad_enabled()
        if x is not self._x or state != self._state or layer not in self._outputs:
            self.clear()
            outputs = dict(zip(self.layers, compute(self.layers, x), strict=True))
            self._x, self._state, self._outputs = x, state, outputs
        y = self._outputs.pop(layer)
        if not self._outputs:
            self.clear()
        return y


def multiply_in_fp32(model: nn.Module, dtype: torch.dtype) -> None:
    """Have the linear layers of a model whose products are in `dtype` compute as low-rank layers do, on a CPU that
    multiplies such numbers more slowly than fp32: at a seventh of the rate."""
    if widens(dtype, torch.device("cpu")):
        for module in model.modules():
            known = type(module) in (nn.Linear, Conv1D) or type(module).__name__ in LINEAR_SUBCLASSES
            if (known or packed_weight(module) is not None) and "forward" not in vars(module):
                module.forward = MethodType(_multiply, module)  # compressed-tensors asks for its function


def _multiply(module: nn.Module, x: Tensor) -> Tensor:
    x = in_autocast_dtype(x)
    if product_dtype(x) == x.dtype:
        return type(module).forward(module, x)  # type: ignore[no-any-return]
    weight = _stored(module, x.dtype) if packed_weight(module) is None else None
    return LinearFunction.apply(x, partial(_stored, module), weight, module.bias)  # type: ignore[no-any-return]


def _stored(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """W (out, in) of a linear layer: as it is, or in `dtype` where it has to be read back from its store."""
    packed = packed_weight(layer)
    if packed is not None:
        return read(packed, dtype)
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return weight.T if isinstance(layer, Conv1D) else weight


def compute(layers: Sequence[LowRank], x: Tensor, gate: Gate | None = None) -> tuple[Tensor, ...]:
    """The outputs of layers for one x; several have no dropout, nor has one whose x has a gate."""
    x = in_autocast_dtype(x)
    first, parts, factors = layers[0], [], []
    dropped = functional.dropout(x, first.dropout, first.training) if first.dropout else None
    for layer in layers:
        bias: Tensor | None = layer.base.bias  # type: ignore[assignment]
        parts.append(Part(layer.base_weight, bias, layer.scale, layer.keeps_weight, layer.projections is not None))
        factors += [*layer.pair(x), layer.d, layer.b]
    with without_autocast(x):
        outputs: tuple[Tensor, ...] = LowRankFunction.apply(x, dropped, *(gate or (None, None)), parts, *factors)
    return outputs
