"""Generation in batches of prompts of like length, greedy or sampled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import takewhile

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from pissa_cli.errors import UsageError

TOP_P = 0.95


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    batch_size: int,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> Iterator[tuple[int, str]]:
    """(index of the prompt, answer text) in the order they are done: the longest prompts first.

    Prompts (token ids) are padded on the left; an answer ends at end-of-text (the tokenizer's, or one the model's own
    generation_config names: chat models end a turn by it), at `max_new_tokens` or at the end of the context. Nothing
    else of the model's generation_config counts: a repetition penalty there would change the score. Above temperature 0
    answers are sampled from the likeliest tokens that make 95 %, by `seed` and the place of a batch.
    Batches that do not fit into memory are halved. Raises UsageError for a prompt that leaves no room for an answer.
    """
    eos = tokenizer.eos_token_id
    own = model.generation_config.eos_token_id if model.generation_config is not None else None
    stops = sorted({eos, *(own if isinstance(own, list) else [own] if own is not None else [])})
    model.generation_config = GenerationConfig(eos_token_id=own)
    context = getattr(model.config, "max_position_embeddings", None) or 2**31
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    done = 0
    while done < len(order):
        chunk = order[done : done + batch_size]
        longest = max(len(prompts[i]) for i in chunk)
        room = min(max_new_tokens, context - longest)
        if room < 1:
            raise UsageError(f"a prompt of {longest} tokens leaves no room for an answer in a context of {context}")
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos
        ids = torch.full((len(chunk), longest), pad)
        mask = torch.zeros_like(ids)
        for row, index in enumerate(chunk):
            ids[row, longest - len(prompts[index]) :] = torch.tensor(prompts[index])
            mask[row, longest - len(prompts[index]) :] = 1
        config = GenerationConfig(
            max_new_tokens=room,
            **(
                {"do_sample": True, "temperature": temperature, "top_p": TOP_P, "top_k": 0}
                if temperature
                else {"do_sample": False}
            ),
            eos_token_id=stops,
            pad_token_id=pad,
            bos_token_id=tokenizer.bos_token_id,
        )
        device = model.device
        torch.manual_seed(seed + done)
        try:
            output = model.generate(ids.to(device), attention_mask=mask.to(device), generation_config=config)
        except torch.OutOfMemoryError:
            if len(chunk) == 1:
                raise
            torch.cuda.empty_cache()
            batch_size = len(chunk) // 2
            continue
        for row, index in enumerate(chunk):
            tokens = output[row, longest:].tolist()
            tokens = list(takewhile(lambda token: token not in stops, tokens))
            yield index, tokenizer.decode(tokens, skip_special_tokens=True)
        done += len(chunk)
        progress(done, len(order))
