"""The product of the adapter layers and its gradients: ys of one or several layers that have one x.

y = x W^T + bias + s * (((x' A^T) * d) B^T) * b. Shapes: x (tokens, in), W (out, in), A (r, in), B (out, r), d (r,),
b (out,); x' is x, or x after dropout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional

from pissa_cli.products import product_dtype

KEPT_FROM = 2  # rows of x for each of a merged weight, from which on it is kept: it takes half of what x does at most


class Part(NamedTuple):
    """What a layer has beside its factors. shares_A: A is that of all layers with as many inputs."""

    read_weight: Callable[[torch.dtype], Tensor]
    bias: Tensor | None = None
    scale: float = 1.0
    keeps_weight: bool = False
    shares_A: bool = False


class LowRankFunction(torch.autograd.Function):
    """Layers of one x: (x, x' or None for x itself, their parts, A, B, d, b of the first, of the second, ...) -> ys.

    Each is one product with W + s (b B) (d A), where that is sound and the cheaper way (`_merges`); else two paths, of
    which the products with A are one for all layers. Saves x' and, on two paths, h = x' A^T; reads W again in the
    backward pass, or saves what it multiplied with. Products run in `product_dtype`; y has the dtype of x.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dropped: Tensor | None, parts: Sequence[Part], *factors: Tensor | None
    ) -> tuple[Tensor, ...]:
        inner = x if dropped is None else dropped
        ctx.dtype, ctx.parts, ctx.shared = product_dtype(x), parts, dropped is None
        flat, given = x.flatten(0, -2).to(ctx.dtype), _by_layer(factors)
        ctx.merged = [ctx.shared and _merges(len(flat), f, ctx.dtype) for f in given]
        low = [f.A for f, merged in zip(given, ctx.merged, strict=True) if not merged]
        h = inner.flatten(0, -2).to(ctx.dtype) @ _stacked(low, parts[0].shares_A).to(ctx.dtype).T if low else None
        ys, kept = [], []
        for part, f, merged, own in zip(parts, given, ctx.merged, _shares(h, given, ctx), strict=True):
            W = part.read_weight(ctx.dtype)
            if merged:
                W = _merged(W, f, part.scale)
            y = functional.linear(flat, W, None if part.bias is None else part.bias.to(ctx.dtype))
            if own is not None:
                y.addmm_(_times(own, f.d), _rows_times(f.B.to(ctx.dtype), f.b).T, alpha=part.scale)
            # no view: DeBERTa divides its queries in place
            y = cast(Tensor, torch.ops.aten._unsafe_view(y, [*x.shape[:-1], len(W)])).to(x.dtype)
            ys.append(y.clone() if torch.compiler.is_compiling() else y)  # torch 2.11 loses the gradient of an alias
            kept.append(W if part.keeps_weight or (merged and len(flat) >= KEPT_FROM * len(W)) else None)
        ctx.save_for_backward(inner, h, *factors, *kept)
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        with torch.autocast(grads[0].device.type, enabled=False):
            return LowRankFunction._gradients(ctx, grads)

    @staticmethod
    def _gradients(ctx: Any, grads: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        inner, h, *rest = ctx.saved_tensors
        given, kept = _by_layer(rest[: 4 * len(grads)]), rest[4 * len(grads) :]
        needs_x, needs_dropped, _, *needed = ctx.needs_input_grad
        dtype, flat = ctx.dtype, inner.flatten(0, -2).to(ctx.dtype)
        grad_x: Tensor | None = None
        grads_h: list[Tensor] = []
        factor_grads: list[Tensor | None] = []
        for number, (part, f, own) in enumerate(zip(ctx.parts, given, _shares(h, given, ctx), strict=True)):
            grad, W, wants = grads[number].flatten(0, -2).to(dtype), kept[number], needed[4 * number :][:4]
            if needs_x:
                if W is None:
                    W = part.read_weight(dtype)
                    W = _merged(W, f, part.scale) if own is None else W
                grad_x = grad @ W if grad_x is None else grad_x.addmm_(grad, W)
            grad_hd = None
            if own is not None:
                grad_hd = (grad @ _rows_times(f.B.to(dtype), f.b)) * part.scale
                grads_h.append(_times(grad_hd, f.d))
            factor_grads += _factor_gradients(flat, grad, own, grad_hd, f, part.scale, wants)
        low = [number for number, merged in enumerate(ctx.merged) if not merged]
        grad_dropped = None
        if low:
            shares_A = ctx.parts[0].shares_A
            stack = _stacked([given[number].A for number in low], shares_A)
            grad_h = sum(grads_h[1:], grads_h[0]) if shares_A else torch.cat(grads_h, 1)
            if grad_x is not None and ctx.shared:
                grad_x.addmm_(grad_h, stack.to(dtype))
            if needs_dropped:
                grad_dropped = (grad_h @ stack.to(dtype)).view_as(inner).to(inner.dtype)
            if any(needed[4 * number] for number in low):
                grads_A = (grad_h.T @ flat).split([len(given[number].A) for number in low])
                for number, grad_A in zip(low, grads_A, strict=True):
                    factor_grads[4 * number] = grad_A.to(given[number].A.dtype) if needed[4 * number] else None
        if grad_x is not None:
            grad_x = grad_x.view_as(inner).to(inner.dtype)
        return grad_x, grad_dropped, None, *factor_grads


class _Factors(NamedTuple):
    A: Tensor
    B: Tensor
    d: Tensor | None
    b: Tensor | None


def _by_layer(factors: Sequence[Any]) -> list[_Factors]:
    return [_Factors(*factors[begin : begin + 4]) for begin in range(0, len(factors), 4)]


def _stacked(As: list[Tensor], shared: bool) -> Tensor:
    """The matrix that gives the products with all As at once."""
    return As[0] if shared or len(As) == 1 else torch.cat(As)


def _shares(h: Tensor | None, given: list[_Factors], ctx: Any) -> list[Tensor | None]:
    """Of h, what each layer has; None for one that is merged."""
    if h is None:
        return [None] * len(given)
    ranks = [0 if merged else len(f.A) for f, merged in zip(given, ctx.merged, strict=True)]
    parts = [h] * len(given) if ctx.parts[0].shares_A else h.split(ranks, 1)
    return [None if merged else part for part, merged in zip(parts, ctx.merged, strict=True)]


def _merges(tokens: int, f: _Factors, dtype: torch.dtype) -> bool:
    """Whether to multiply with W and its update in one: where no bits of the update are lost, the factors cost over
    half of what W does (VeRA's), and forming the update twice costs less than taking the tokens through both, twice.
    """
    rank, inn, out = *f.A.shape, len(f.B)
    return dtype.itemsize >= 4 and 2 * rank * (inn + out) > inn * out and tokens * (inn + out) > 2 * inn * out


def _merged(W: Tensor, f: _Factors, scale: float) -> Tensor:
    """W + s (b B) (d A)."""
    return torch.addmm(W, _times(_rows_times(f.B.to(W.dtype), f.b), f.d), f.A.to(W.dtype), alpha=scale)


def _factor_gradients(
    x: Tensor, g: Tensor, h: Tensor | None, grad_hd: Tensor | None, f: _Factors, scale: float, needed: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of A, B, d and b; None for those not `needed`. x (tokens, in), g (tokens, out) the gradient of y;
    h = x A^T and that of h * d are given on two paths, whose gradient of A is not formed here.

    With M = s g^T h and N = s (b B)^T g^T x they are d N, b M d, the sums over out of (b B) M, and those over r of
    B M d. M and N come from G = g^T x (out, in), where that is cheaper than x A^T and g B.
    """
    needs_A, needs_B, needs_d, needs_b = needed
    if not any(needed):
        return [None] * 4
    A, B, d, b = f
    dtype, ways, rank = x.dtype, 2 if needs_A else 1, len(A)
    pairs, scaled = ways * len(x) * rank * (x.shape[1] + g.shape[1]), _rows_times(B.to(dtype), b)
    N: Tensor | None = None
    if h is not None:
        M: Tensor | None = g.T @ h if needs_B or needs_b else None
    elif (len(x) + ways * rank) * x.shape[1] * g.shape[1] < pairs:
        G = g.T @ x
        M = G @ A.to(dtype).T
        N = scaled.T @ G * scale if needs_A else None
    else:
        M = g.T @ (x @ A.to(dtype).T)
        N = (g @ scaled).T @ x * scale if needs_A else None
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
