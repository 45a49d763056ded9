"""Causal attention on a CPU in half of the work: torch's kernel multiplies up to 512 keys with every query, later ones
as well, and forgets what came of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

ROWS = 64
"""Queries at a time; they see the keys up to the last of them."""

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """q, k, v (batch, heads, tokens, dim), scale or None for dim^-1/2 -> (batch, heads, tokens, dim)."""
    # In 16 bits each block would have keys and values converted anew; the heads are what threads share of one.
    in_blocks = q.dtype == torch.float32 and q.shape[1] >= torch.get_num_threads() and q.shape[2] > ROWS
    if in_blocks and not torch.compiler.is_compiling():
        y: Tensor = _InBlocks.apply(q, k, v, scale)
        return y
    return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)


class _InBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        ctx.scale = scale
        y = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        logsumexp = q.new_empty(q.shape[:3])
        for begin, end, mask in _blocks(q):
            part = _forward(q[:, :, begin:end], k[:, :, :end], v[:, :, :end], attn_mask=mask, scale=scale)
            y[:, :, begin:end], logsumexp[:, :, begin:end] = part
        ctx.save_for_backward(q, k, v, y, logsumexp)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, y, logsumexp = ctx.saved_tensors
        grad_q, grad_k, grad_v = torch.empty_like(q), None, None
        for begin, end, mask in reversed(_blocks(q)):
            rows, keys = slice(begin, end), slice(end)
            of_q, of_k, of_v = _backward(
                *(grad[:, :, rows], q[:, :, rows], k[:, :, keys], v[:, :, keys], y[:, :, rows]),
                *(logsumexp[:, :, rows], 0.0, False),
                attn_mask=mask,
                scale=ctx.scale,
            )
            grad_q[:, :, rows] = of_q
            if grad_k is None or grad_v is None:
                grad_k, grad_v = of_k, of_v
            else:
                grad_k[:, :, keys] += of_k
                grad_v[:, :, keys] += of_v
        return grad_q, grad_k, grad_v, None


def _blocks(q: Tensor) -> list[tuple[int, int, Tensor]]:
    """Where blocks of queries begin and end, and what is added to their scores: -inf for the keys behind a query."""
    tokens = q.shape[2]
    last = (tokens - 1) // ROWS * ROWS
    hidden = torch.full((ROWS, last + ROWS), -torch.inf, dtype=q.dtype, device=q.device).triu_(last + 1)
    ends = [(begin, min(begin + ROWS, tokens)) for begin in range(0, tokens, ROWS)]
    return [(begin, end, hidden[: end - begin, last - begin : last - begin + end]) for begin, end in ends]
