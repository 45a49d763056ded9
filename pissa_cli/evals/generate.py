"""Greedy generation in batches of prompts of like length."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from pissa_cli.errors import UsageError


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    batch_size: int,
    max_new_tokens: int,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> Iterator[tuple[int, str]]:
    """(index of the prompt, answer text) in the order they are done: the longest prompts first.

    Prompts are padded on the left; an answer ends at end-of-text, `max_new_tokens` or the model's context.
    Raises UsageError for a prompt that leaves no room for an answer.
    """
    encoded = [tokenizer(prompt, verbose=False)["input_ids"] for prompt in prompts]
    eos = tokenizer.eos_token_id
    encoded = [ids[:-1] if ids and ids[-1] == eos else ids for ids in encoded]
    context = getattr(model.config, "max_position_embeddings", None) or 2**31
    order = sorted(range(len(prompts)), key=lambda i: -len(encoded[i]))
    done = 0
    for begin in range(0, len(order), batch_size):
        chunk = order[begin : begin + batch_size]
        longest = max(len(encoded[i]) for i in chunk)
        room = min(max_new_tokens, context - longest)
        if room < 1:
            raise UsageError(f"a prompt of {longest} tokens leaves no room for an answer in a context of {context}")
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos
        ids = torch.full((len(chunk), longest), pad)
        mask = torch.zeros_like(ids)
        for row, index in enumerate(chunk):
            ids[row, longest - len(encoded[index]) :] = torch.tensor(encoded[index])
            mask[row, longest - len(encoded[index]) :] = 1
        config = GenerationConfig(
            max_new_tokens=room,
            do_sample=False,
            eos_token_id=eos,
            pad_token_id=pad,
            bos_token_id=tokenizer.bos_token_id,
        )
        device = model.device
        output = model.generate(ids.to(device), attention_mask=mask.to(device), generation_config=config)
        for row, index in enumerate(chunk):
            tokens = output[row, longest:].tolist()
            tokens = tokens[: tokens.index(eos)] if eos in tokens else tokens
            yield index, tokenizer.decode(tokens, skip_special_tokens=True)
        done += len(chunk)
        progress(done, len(order))
