"""The product of the adapter layers and its gradients: ys of one or several layers that have one x.

y = x W^T + bias + s * (((x' A^T) * d) B^T) * b. Shapes: x (tokens, in), W (out, in), A (r, in), B (out, r), d (r,),
b (out,); x' is x, or x after dropout. x may be the product of a gate and what it lets through, formed here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from pissa_cli.matrices.products import product_dtype, without_autocast

KEPT_FROM = 2  # times as many rows in x as in a merged weight, and it is kept: it takes at most half of what x does


class Part(NamedTuple):
    """What a layer has beside its factors. shares_A: A is that of all layers with as many inputs."""

    read_weight: Callable[[torch.dtype], Tensor]
    bias: Tensor | None = None
    scale: float = 1.0
    keeps_weight: bool = False
    shares_A: bool = False


class Gate(NamedTuple):
    """What x is multiplied by: activation(values), values (tokens, in)."""

    activation: Callable[[Tensor], Tensor]
    values: Tensor


class LowRankFunction(torch.autograd.Function):
    """The outputs ys of one or several layers that get the same x.

    Inputs: x; x' (x after dropout), None for x itself; the activation and the values of a gate, or None twice; a `Part`
    for each layer; then A, B, d and b of the first layer, of the second, and so on.

    A layer is computed in one of two ways. Where that loses no bits and costs less (`_merges`), it is one product with
    W + s (b B) (d A). Else x goes two paths, through W and through A and B, and the products with A of all such layers
    are one. Saved for the backward pass are x' and, of two paths, h = x' A^T; W is read again there, unless what was
    multiplied with is kept. With a gate x = activation(values) * (x as it was given), which is formed again there: the
    two parts are saved instead.

    Products run in `product_dtype`; each y has the dtype of x.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        activation: Callable[[Tensor], Tensor] | None,
        gate: Tensor | None,
        parts: Sequence[Part],
        *factors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        saved, ctx.activation = x if dropped is None else dropped, activation
        if activation is not None and gate is not None:
            x = activation(gate) * x
        dtype = ctx.dtype = product_dtype(x)
        ctx.parts, ctx.shared, given = parts, dropped is None, _by_layer(factors)
        flat = _cast(x.flatten(0, -2), dtype)
        tokens = len(flat)  # here and below: on torch 2.11 the compiler fails over shape[0]
        ctx.merged = [ctx.shared and _merges(tokens, f, dtype) for f in given]
        low = [f.A for f, merged in zip(given, ctx.merged, strict=True) if not merged]
        h: Tensor | None = None
        if low:
            from_A = flat if dropped is None else _cast(dropped.flatten(0, -2), dtype)
            h = from_A @ _cast(_stacked(low, parts[0].shares_A), dtype).T
        ys, kept = [], []
        for part, f, merged, own in zip(parts, given, ctx.merged, _shares(h, given, ctx), strict=True):
            W = part.read_weight(dtype)
            bias = None if part.bias is None else _cast(part.bias, dtype)
            if own is None:
                W = _merged(W, f, part.scale)
                y = functional.linear(flat, W, bias)
            else:
                # the update first: of what is added to an output that is rounded already, all below half a bit is lost
                y = _times(own, f.d) @ _rows_times(_cast(f.B, dtype), f.b).T
                y.addmm_(flat, W.T, beta=part.scale)
                y = y if bias is None else y.add_(bias)
            num_out = len(W)
            # no view: DeBERTa divides its queries in place
            y = _cast(torch.ops.aten._unsafe_view(y, [*x.shape[:-1], num_out]), x.dtype)
            ys.append(y.clone() if torch.compiler.is_compiling() else y)  # torch 2.11 loses the gradient of an alias
            kept.append(W if part.keeps_weight or (merged and tokens >= KEPT_FROM * num_out) else None)
        ctx.save_for_backward(saved, gate, h, *factors, *kept)
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        with without_autocast(grads[0]):
            return LowRankFunction._gradients(ctx, grads)

    @staticmethod
    def _gradients(ctx: Any, grads: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """Of the inputs, in their order. They are formed for the factors layer by layer, but for A; then for x and A
        through A, of all layers on two paths together; for x through W of each layer; and for both parts of a gate."""
        inner, gate, h, *rest = ctx.saved_tensors
        given, kept = _by_layer(rest[: 4 * len(grads)]), rest[4 * len(grads) :]
        needs_x, needs_dropped, _, needs_gate, _, *needs_factors = ctx.needs_input_grad
        needed = _in_fours(needs_factors)
        dtype, like, activated = ctx.dtype, inner, None
        if gate is not None:
            if torch.is_grad_enabled():
                raise RuntimeError("a joined gate has no second derivative")
            with torch.enable_grad():
                values = gate.detach().requires_grad_()
                activated = ctx.activation(values)
            inner, needs_x = activated.detach() * like, needs_x or needs_gate
        flat = _cast(inner.flatten(0, -2), dtype)
        low: list[int] = []  # layers whose gradient of x takes two paths
        grads_h: list[Tensor] = []
        factor_grads: list[list[Tensor | None]] = []  # of A, B, d and b, by layer
        for number, (part, f, own) in enumerate(zip(ctx.parts, given, _shares(h, given, ctx), strict=True)):
            g, wants, grad_hd = _cast(grads[number].flatten(0, -2), dtype), needed[number], None
            if own is not None and not (needs_x and ctx.shared and _merges_back(len(flat), f, wants, ctx.parts)):
                grad_hd = _scaled(g @ _rows_times(_cast(f.B, dtype), f.b), part.scale)
                grads_h.append(_times(grad_hd, f.d))
                low.append(number)
            factor_grads.append(_factor_gradients(flat, g, own, grad_hd, f, part.scale, wants))
        grad_x: Tensor | None = None
        grad_dropped = None
        if low:
            shares_A = ctx.parts[0].shares_A
            stack = _cast(_stacked([given[number].A for number in low], shares_A), dtype)
            grad_h = sum(grads_h[1:], grads_h[0]) if shares_A else _joined(grads_h, 1)
            if needs_x and ctx.shared:
                grad_x = grad_h @ stack
            if needs_dropped:
                grad_dropped = _cast((grad_h @ stack).view_as(like), like.dtype)
            if any(needed[number][0] for number in low):
                grads_A = _split(grad_h.T @ flat, [given[number].A.shape[0] for number in low], 0)
                for number, grad_A in zip(low, grads_A, strict=True):
                    factor_grads[number][0] = _cast(grad_A, given[number].A.dtype) if needed[number][0] else None
        for number, (part, f, W) in enumerate(zip(ctx.parts, given, kept, strict=True)) if needs_x else ():
            g, is_merged = _cast(grads[number].flatten(0, -2), dtype), W is not None and ctx.merged[number]
            W = part.read_weight(dtype) if W is None else W
            W = W if is_merged or number in low else _merged(W, f, part.scale)
            grad_x = g @ W if grad_x is None else grad_x.addmm_(g, W)
        if grad_x is not None:
            grad_x = _cast(grad_x.view_as(like), like.dtype)
        grad_gate: Tensor | None = None
        del inner, flat  # before there are two gradients of their size
        if activated is not None and grad_x is not None:
            (grad_gate,) = torch.autograd.grad(activated, values, grad_x * like)
            grad_x = grad_x * activated.detach()
        return grad_x, grad_dropped, None, grad_gate, None, *chain(*factor_grads)


class _Factors(NamedTuple):
    A: Tensor
    B: Tensor
    d: Tensor | None
    b: Tensor | None


def _by_layer(factors: Sequence[Any]) -> list[_Factors]:
    return [_Factors(*four) for four in _in_fours(factors)]


def _in_fours(flat: Sequence[Any]) -> list[Sequence[Any]]:
    """What there is for A, B, d and b of each layer, out of one sequence for all."""
    return [flat[begin : begin + 4] for begin in range(0, len(flat), 4)]


def _stacked(As: list[Tensor], shared: bool) -> Tensor:
    """The matrix that gives the products with all As at once."""
    return As[0] if shared else _joined(As, 0)


def _shares(h: Tensor | None, given: list[_Factors], ctx: Any) -> list[Tensor | None]:
    """Of h, what each layer has; None for one that is merged."""
    if h is None:
        return [None] * len(given)
    ranks = [0 if merged else f.A.shape[0] for f, merged in zip(given, ctx.merged, strict=True)]
    parts = [h] * len(given) if ctx.parts[0].shares_A else _split(h, ranks, 1)
    return [None if merged else part for part, merged in zip(parts, ctx.merged, strict=True)]


def _merges(tokens: int, f: _Factors, dtype: torch.dtype) -> bool:
    """Whether to multiply with W + s (b B) (d A) in one product. Three things have to hold: products are in fp32, so
    that no bits of the update are lost; A and B have more than half as many numbers as W (VeRA's); and to form the
    update in both passes costs less than to take the tokens through A and B in one.
    """
    rank, inn, out = *f.A.shape, f.B.shape[0]
    return dtype.itemsize >= 4 and 2 * rank * (inn + out) > inn * out and tokens * (inn + out) > 2 * inn * out


def _merges_back(tokens: int, f: _Factors, needed: Sequence[bool], parts: Sequence[Part]) -> bool:
    """Whether a layer on two paths has its gradient of x by one product with W + s (b B) (d A), rounded as W is: where
    no gradient of a factor takes the tokens back through B and A in any case (VeRA's), and to form the update costs
    less than that.
    """
    needs_A, needs_B, _, needs_b = needed
    inn, out, layers_of_A = f.A.shape[1], f.B.shape[0], len(parts) if parts[0].shares_A else 1
    return not needs_A and (needs_B or needs_b) and tokens * (inn / layers_of_A + out) > inn * out


def _merged(W: Tensor, f: _Factors, scale: float) -> Tensor:
    """W + s (b B) (d A)."""
    return torch.addmm(W, _times(_rows_times(_cast(f.B, W.dtype), f.b), f.d), _cast(f.A, W.dtype), alpha=scale)


def _factor_gradients(
    x: Tensor, g: Tensor, h: Tensor | None, grad_hd: Tensor | None, f: _Factors, scale: float, needed: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of A, B, d and b of a layer; None for those not `needed`.

    x (tokens, in); g (tokens, out), the gradient of y. On two paths h = x A^T (tokens, r) is given, and the gradient of
    A is formed elsewhere, for all layers at once; grad_hd: that of h * d, where it is known.

    With M = s g^T h (out, r), N = s (b B)^T g^T x (r, in) and P = M * B, number by number, they are d N, b M d, P^T b
    and P d. Without h, M and N come from G = g^T x (out, in) where that is cheaper than x A^T and g B.
    """
    needs_A, needs_B, needs_d, needs_b = needed
    if not any(needed):
        return [None] * 4
    A, B, d, b = f
    dtype, ways = x.dtype, 2 if needs_A else 1
    N: Tensor | None = None
    if h is not None:
        M: Tensor | None = g.T @ h if needs_B or needs_b else None
    else:
        rank, tokens, inn, out = A.shape[0], *x.shape, g.shape[1]
        scaled = _rows_times(_cast(B, dtype), b) if needs_A else None
        if (tokens + ways * rank) * inn * out < ways * tokens * rank * (inn + out):
            G = g.T @ x
            M = G @ _cast(A, dtype).T
            N = None if scaled is None else _scaled(scaled.T @ G, scale)
        else:
            M = g.T @ (x @ _cast(A, dtype).T)
            N = None if scaled is None else _scaled((g @ scaled).T @ x, scale)
    M = None if M is None else _scaled(_cast(M, B.dtype if d is None else d.dtype), scale)
    grad_A = grad_B = grad_d = grad_b = None
    if N is not None:
        grad_A = _cast(N if d is None else N * _cast(d, dtype)[:, None], A.dtype)
    if M is not None and needs_B:
        grad_B = _rows_times(_times(M, d), b)
    P = None if M is None or not (needs_b or needs_d) else _cast(M * B, M.dtype)
    if P is not None and needs_b:
        grad_b = P.sum(1) if d is None else P @ d
    if P is not None and needs_d:
        grad_d = P.sum(0) if b is None else b @ P
    elif needs_d and d is not None and h is not None and grad_hd is not None:
        grad_d = (grad_hd * h).sum(0, dtype=d.dtype)
    return [grad_A, grad_B, grad_d, grad_b]


def _times(h: Tensor, d: Tensor | None) -> Tensor:
    return h if d is None else h * _cast(d, h.dtype)


def _rows_times(B: Tensor, b: Tensor | None) -> Tensor:
    return B if b is None else B * _cast(b, B.dtype)[:, None]


# Of small models a step is the time of the calls from Python: what does nothing is not called.


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)


def _scaled(x: Tensor, scale: float) -> Tensor:
    return x if scale == 1.0 else x * scale


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def _split(x: Tensor, sizes: list[int], dim: int) -> Sequence[Tensor]:
    return [x] if len(sizes) == 1 else x.split(sizes, dim)
