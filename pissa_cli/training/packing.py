"""Several examples in one row, each of which sees itself alone.

transformers builds a block-diagonal mask where position ids start again. With SDPA most of what such a mask costs is
thrown away: here its blocks are attended to one by one instead, or by flash attention together, where that is sound.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from pissa_cli.matrices.products import attention_dtype, in_autocast_dtype, without_autocast

BY_SEQUENCE = "sdpa_by_sequence"
FLASH = torch.ops.aten._flash_attention_forward
TRIED = (3, 70, 27)  # lengths of sequences over which it has to agree with SDPA
AGREES = 0.02


def takes_positions(model: PreTrainedModel) -> bool:
    """Whether the model can be told where examples begin."""
    return "position_ids" in inspect.signature(model.forward).parameters


def attend_by_sequence(model: PreTrainedModel) -> None:
    """Let a model that attends with SDPA do so block by block, in rows of several examples."""
    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(BY_SEQUENCE, _attention)
        AttentionMaskInterface.register(BY_SEQUENCE, _mask)
        model.set_attn_implementation(BY_SEQUENCE)


def attend_by_mask(model: PreTrainedModel) -> None:
    """Undo `attend_by_sequence`."""
    if model.config._attn_implementation == BY_SEQUENCE:
        model.set_attn_implementation("sdpa")


def attend_in_fp32() -> None:
    """Have SDPA run in `attention_dtype`, in this process, where examples are padded, too: with a mask its gradients
    take a CPU two to eight times as long in bf16."""
    AttentionInterface.register("sdpa", _attention)


def without_mask(model: PreTrainedModel) -> bool:
    """Whether rows of several examples cost no more than the examples apart."""
    return "flash" in str(model.config._attn_implementation) or model.config._attn_implementation == BY_SEQUENCE


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """SDPA; attention_mask may be the lengths (n,) of sequences that together make the one row."""
    if attention_mask is None or attention_mask.ndim != 1:
        return _sdpa(module, query, key, value, attention_mask, **options), None
    lengths: list[int] = attention_mask.tolist()
    if query.is_cuda:  # what autocast would do within: the flash attention itself takes no fp32
        query, key, value = map(in_autocast_dtype, (query, key, value))
    plain = not options.get("dropout") and options.get("softcap") is None and options.get("position_bias") is None
    alike = len({(x.dtype, x.shape[3]) for x in (query, key, value)}) == 1
    if query.is_cuda and plain and alike and _flash_agrees(query.dtype, query.shape[1], key.shape[1], query.shape[3]):
        return _flash(query, key, value, lengths, options.get("scaling")), None
    parts = [x.split(lengths, dim=2) for x in (query, key, value)]
    outputs = [_sdpa(module, q, k, v, None, **options) for q, k, v in zip(*parts, strict=True)]
    return torch.cat(outputs, dim=1), None


def _sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> Tensor:
    """transformers' SDPA, in `attention_dtype`, masks and biases that are added as well."""
    given = in_autocast_dtype(query)
    wide = attention_dtype(given)
    if wide == given.dtype:
        plain: Tensor = sdpa_attention_forward(module, query, key, value, attention_mask, **options)[0]
        return plain

    def cast(x: Any) -> Any:
        return x.to(wide) if isinstance(x, Tensor) and x.is_floating_point() else x

    inputs, named = map(cast, (given, key, value, attention_mask)), {name: cast(x) for name, x in options.items()}
    with without_autocast(query):
        output: Tensor = sdpa_attention_forward(module, *inputs, **named)[0]
    return output.to(given.dtype)


def _flash(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scale: float | None) -> Tensor:
    """Causal attention within each sequence of a row: q, k, v (1, heads, tokens, dim) -> (1, tokens, heads, dim)."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    begins = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32).to(q.device, non_blocking=True)
    longest = max(lengths)
    output: Tensor = FLASH(q, k, v, begins, begins, longest, longest, 0.0, True, False, scale=scale)[0]
    return output[None]


@functools.cache
def _flash_agrees(
    dtype: torch.dtype, heads: int, key_heads: int, dim: int, device: torch.device | str = "cuda"
) -> bool:
    """Whether torch's flash attention takes inputs of this kind, and gives what SDPA gives for each sequence, and its
    gradients."""
    unseen = saved_tensors_hooks(lambda x: x, lambda x: x)  # by checkpointing, in whose block this may be
    with unset_fake_temporarily(), torch.enable_grad(), unseen:
        source = torch.Generator(device).manual_seed(0)
        inputs = [
            torch.randn(1, n, sum(TRIED), dim, dtype=dtype, device=device, generator=source, requires_grad=True)
            for n in (heads, key_heads, key_heads)
        ]
        try:
            together = _with_gradients(_flash(inputs[0], inputs[1], inputs[2], list(TRIED), None), inputs)
        except torch.OutOfMemoryError:  # which says nothing of the next time
            raise
        except RuntimeError:
            return False
        parts = zip(*(x.split(list(TRIED), 2) for x in inputs), strict=True)
        outputs = [scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True) for q, k, v in parts]
        apart = _with_gradients(torch.cat(outputs, 2).transpose(1, 2), inputs)
        return all(bool((a - b).norm() <= AGREES * b.norm()) for a, b in zip(together, apart, strict=True))


def _with_gradients(output: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return [part.float() for part in (output, *torch.autograd.grad(output.float().square().sum(), inputs))]


def _mask(
    *, batch_size: int, q_length: int, kv_length: int, mask_function: Callable[..., Tensor], **options: Any
) -> Tensor | None:
    """The lengths (n,) of the sequences of a row, on the CPU, if each is causal and whole; else SDPA's mask."""
    if batch_size == 1 and 1 < q_length == kv_length and not options.get("use_vmap"):
        lengths = _lengths(q_length, mask_function, options.get("device", "cpu"))
        if lengths is not None:
            return lengths
    mask: Tensor | None = sdpa_mask(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, mask_function=mask_function, **options
    )
    return mask


def _lengths(length: int, sees: Callable[..., Tensor], device: torch.device | str) -> Tensor | None:
    """The lengths (n,) of the sequences in a row of `length` tokens, on the CPU; None unless each of them is causal and
    seen in whole. sees: the mask, as a function of (batch, head, query, key).

    A sequence begins where a token does not see the one before it. A GPU is waited for once.
    """
    index = torch.arange(length, device=device)
    zero = torch.zeros_like(index)
    begins = torch.cat([zero[:1] == 0, ~sees(zero[1:], zero[1:], index[1:], index[:-1])])
    first = torch.where(begins, index, zero).cummax(0).values
    whole = sees(zero, zero, index, first).all() & ~sees(zero[1:], zero[1:], index[:-1], index[1:]).any()
    told = torch.cat([begins, whole[None]]).cpu()
    starts = told[:-1].nonzero().flatten()
    return torch.diff(starts, append=starts.new_tensor([length])) if bool(told[-1]) else None
