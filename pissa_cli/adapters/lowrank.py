"""The one adapter layer: y = x W^T + bias + s * (((x' A^T) * d) B^T) * b, with x' = dropout(x).

Shapes: x (tokens, in), W (out, in), A (r, in), B (out, r), d (r,), b (out,). W is frozen and may be stored in NF4.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from pissa_cli.adapters.start import Factors, Projections
from pissa_cli.products import product_dtype
from pissa_cli.quant import packed_weight, read

FACTOR_NAMES = ("A", "B", "d", "b")


class LowRank(nn.Module):
    """A linear layer with a frozen base (nn.Linear, transformers' Conv1D or bitsandbytes' Linear4bit) and factors.

    Factors in `trains` are fp32 parameters, the others fp32 buffers; A and B may come from shared projections instead.
    Products run in the dtype of x, or of autocast. `keeps_weight`: W as it was read is saved for the backward pass; for
    gradient checkpointing, which saves nothing before it runs the layer again.
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
        packed = packed_weight(self.base)
        if packed is not None:
            return read(packed, dtype)
        weight: Tensor = self.base.weight.to(dtype)  # type: ignore[assignment]
        return weight.T if isinstance(self.base, Conv1D) else weight

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        dropped = functional.dropout(x, self.dropout, self.training) if self.dropout else None
        bias: Tensor | None = self.base.bias  # type: ignore[assignment]
        A, B = self.pair(x)
        with torch.autocast(x.device.type, enabled=False):
            y: Tensor = LowRankFunction.apply(
                x, dropped, self.base_weight, bias, A, B, self.d, self.b, self.scale, self.keeps_weight
            )
        return y


class LowRankEmbedding(LowRank):
    """An nn.Embedding (in, out) with factors: token ids -> W^T[ids] + s A^T[ids] B^T. Dropout has no place here."""

    def base_weight(self, dtype: torch.dtype) -> Tensor:
        weight: Tensor = self.base.weight.to(dtype)  # type: ignore[assignment]
        return weight.T

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.base(ids)
        return y + self.scale * functional.embedding(ids, self.A.T).to(y.dtype) @ self.B.T.to(y.dtype)


class LowRankFunction(torch.autograd.Function):
    """One product with W + s (b B) (d A), where that is sound and the cheaper way (`_merges`); else two paths.

    Saves x' (x itself where `dropped` is None) and, on two paths, h = x' A^T; reads W again in the backward pass, or
    saves what it multiplied with. Products run in `product_dtype`; y is rounded to the dtype of x once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        read_weight: Callable[[torch.dtype], Tensor],
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        d: Tensor | None,
        b: Tensor | None,
        scale: float,
        keeps_weight: bool,
    ) -> Tensor:
        inner = x if dropped is None else dropped
        dtype = product_dtype(x)
        flat, W = x.flatten(0, -2).to(dtype), read_weight(dtype)
        merges = dropped is None and _merges(len(flat), len(A), W)
        h = None
        if merges:
            W = _merged(W, A, B, d, b, scale)
        y = functional.linear(flat, W, None if bias is None else bias.to(dtype))
        if not merges:
            h = inner.flatten(0, -2).to(dtype) @ A.to(dtype).T
            y.addmm_(_times(h, d), _rows_times(B.to(dtype), b).T, alpha=scale)
        # no view: DeBERTa divides its queries in place
        y = cast(Tensor, torch.ops.aten._unsafe_view(y, [*x.shape[:-1], len(W)]))
        ctx.save_for_backward(inner, h, A, B, d, b, W if keeps_weight else None)
        ctx.read_weight, ctx.scale, ctx.shared, ctx.dtype = read_weight, scale, dropped is None, dtype
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        with torch.autocast(grads[0].device.type, enabled=False):
            return LowRankFunction._gradients(ctx, grads[0])

    @staticmethod
    def _gradients(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        inner, h, A, B, d, b, W = ctx.saved_tensors
        needs_x, needs_dropped, _, _, *needed, _, _ = ctx.needs_input_grad
        dtype, scale, merged = ctx.dtype, ctx.scale, h is None
        grad, flat = grad_y.flatten(0, -2).to(dtype), inner.flatten(0, -2).to(dtype)
        grad_x: Tensor | None = None
        grad_dropped = grad_hd = None
        if needs_x:
            if W is None:
                W = ctx.read_weight(dtype)
                W = _merged(W, A, B, d, b, scale) if merged else W
            grad_x = grad @ W
        if not merged:
            grad_hd = (grad @ _rows_times(B.to(dtype), b)) * scale
            if grad_x is not None and ctx.shared:
                grad_x.addmm_(_times(grad_hd, d), A.to(dtype))
            if needs_dropped:
                grad_dropped = (_times(grad_hd, d) @ A.to(dtype)).view_as(inner).to(inner.dtype)
        if grad_x is not None:
            grad_x = grad_x.view_as(inner).to(inner.dtype)
        factors = _factor_gradients(flat, grad, h, grad_hd, A, B, d, b, scale, needed)
        return grad_x, grad_dropped, None, None, *factors, None, None


def _merges(tokens: int, rank: int, W: Tensor) -> bool:
    """Whether to multiply with W and its update in one: where no bits of the update are lost, the factors cost over
    half of what W does (VeRA's), and forming the update twice costs less than taking the tokens through both, twice.
    """
    (out, inn), whole = W.shape, W.numel()
    return W.dtype.itemsize >= 4 and 2 * rank * (inn + out) > whole and tokens * (inn + out) > 2 * whole


def _merged(W: Tensor, A: Tensor, B: Tensor, d: Tensor | None, b: Tensor | None, scale: float) -> Tensor:
    """W + s (b B) (d A)."""
    return torch.addmm(W, _times(_rows_times(B.to(W.dtype), b), d), A.to(W.dtype), alpha=scale)


def _factor_gradients(
    x: Tensor,
    g: Tensor,
    h: Tensor | None,
    grad_hd: Tensor | None,
    A: Tensor,
    B: Tensor,
    d: Tensor | None,
    b: Tensor | None,
    scale: float,
    needed: list[bool],
) -> list[Tensor | None]:
    """The gradients of A, B, d and b; None for those not `needed`. x (tokens, in), g (tokens, out) the gradient of y;
    h = x A^T and that of h * d are given where they are known.

    With M = s g^T h and N = s (b B)^T g^T x they are d N, b M d, the sums over out of (b B) M, and those over r of
    B M d. M and N come from G = g^T x (out, in), where that is cheaper than x A^T and g B.
    """
    needs_A, needs_B, needs_d, needs_b = needed
    dtype, ways, rank = x.dtype, 2 if needs_A else 1, len(A)
    pairs, scaled = ways * len(x) * rank * (x.shape[1] + g.shape[1]), _rows_times(B.to(dtype), b)
    if not any(needed):
        return [None] * 4
    if h is None and (len(x) + ways * rank) * x.shape[1] * g.shape[1] < pairs:
        G = g.T @ x
        M: Tensor | None = G @ A.to(dtype).T
        N = scaled.T @ G * scale if needs_A else None
    else:
        h = x @ A.to(dtype).T if h is None else h
        grad_hd = (g @ scaled) * scale if grad_hd is None and needs_A else grad_hd
        M = g.T @ h if needs_B or needs_b or grad_hd is None else None
        N = grad_hd.T @ x if needs_A and grad_hd is not None else None
    M = None if M is None else M.to(B.dtype) * scale
    grad_A = grad_B = grad_d = grad_b = None
    if N is not None:
        grad_A = (N if d is None else N * d.to(dtype)[:, None]).to(A.dtype)
    if M is not None and needs_B:
        grad_B = _rows_times(_times(M, d), b)
    if M is not None and needs_b:
        grad_b = (_times(M, d) * B).sum(1)
    if needs_d and d is not None:
        if h is not None and grad_hd is not None:
            grad_d = (grad_hd * h).sum(0).to(d.dtype)
        elif M is not None:
            grad_d = (M * _rows_times(B, b)).sum(0)
    return [grad_A, grad_B, grad_d, grad_b]


def _times(h: Tensor, d: Tensor | None) -> Tensor:
    return h if d is None else h * d.to(h.dtype)


def _rows_times(B: Tensor, b: Tensor | None) -> Tensor:
    return B if b is None else B * b.to(B.dtype)[:, None]
