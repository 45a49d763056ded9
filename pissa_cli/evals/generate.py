"""Generation in batches of prompts of like length, greedy or sampled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from pissa_cli.base.configuration import context_of, end_tokens, require_tokens
from pissa_cli.data.chat import special_tokens
from pissa_cli.training.batches import padding

TOP_P = 0.95
MOST = 256  # prompts of a batch
ON_CPU = 32  # prompts of a batch there
FREE_SHARE = 0.6  # of a GPU's free memory, for keys and values
FEW = 4  # a batch ends when one in so many of its answers is left
BESIDE = 32  # tokens by which the longer of two prompts is longer at most, where it is tried what batches change


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    batch_size: int | None,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    stop: Sequence[str] = (),
    stop_ids: Sequence[int] = (),
    progress: Callable[[int, int], None] = lambda *_: None,
) -> Iterator[tuple[int, str]]:
    """(index of the prompt, answer text) of all prompts (token ids), as they are done: the longest prompts first.

    An answer ends at end-of-text (the tokenizer's, or one that the model's own generation_config names, as chat models
    do), before a `stop` string or a token of `stop_ids`, after `max_new_tokens`, and at the end of the context. Nothing
    else of generation_config counts, as a repetition penalty there would change the score. Above temperature 0 tokens
    are sampled from the likeliest ones that make 95 %, by `seed` and the place of a batch.

    Batches are padded on the left. batch_size: None for as many as should fit (`fitting`); a batch that does not fit is
    halved. When few answers of a batch are left, they are put aside, to go on together later. Where the longest prompt
    of a batch has come to the end of its room, the others go on. A prompt that fills the context gets an empty answer.
    """
    require_tokens("the questions", (token for prompt in prompts for token in prompt), model.config)
    stops = sorted({tokenizer.eos_token_id, *stop_ids, *_forget_settings(model)})
    context, pad = context_of(model.config) or 2**31, padding(model, tokenizer)
    sampled = {"do_sample": True, "temperature": temperature, "top_p": TOP_P, "top_k": 0}
    config = GenerationConfig(
        **(sampled if temperature else {"do_sample": False}),
        eos_token_id=stops,
        pad_token_id=pad,
    )
    written: list[list[int]] = [[] for _ in prompts]

    def room(index: int) -> int:
        return min(max_new_tokens, context - len(prompts[index])) - len(written[index])

    waiting = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    full = [index for index in waiting if room(index) <= 0]
    yield from ((index, "") for index in full)
    waiting, done, most = waiting[len(full) :], len(full), batch_size or MOST
    going: list[int] = []
    aside: list[int] = []
    while going or waiting or aside:
        if not going:
            if not waiting:
                waiting, aside = sorted(aside, key=lambda i: -len(prompts[i]) - len(written[i])), []
            tokens_of_one = min(max(len(prompts[index]) for index in waiting) + max_new_tokens, context)
            num = min(most, batch_size or fitting(model, tokens_of_one))
            going, waiting = waiting[:num], waiting[num:]
            torch.manual_seed(seed + done)
        texts = [prompts[index] + written[index] for index in going]
        ids, mask = _padded(texts, pad)
        longest = ids.shape[1]
        config.max_new_tokens = min(map(room, going))
        few = len(going) // FEW if waiting or aside else 0
        ends = [_Ends(tokenizer, longest, stop, torch.tensor(stops, device=model.device), few)] if stop or few else []
        try:
            output = model.generate(
                ids.to(model.device),
                attention_mask=mask.to(model.device),
                generation_config=config,
                stopping_criteria=StoppingCriteriaList(ends),
            )
        except torch.OutOfMemoryError:
            if len(going) == 1:
                raise
            output = None
        if output is None:  # after the exception, which holds on to what is to be freed
            torch.cuda.empty_cache()
            most = len(going) // 2
            going, waiting = [], going + waiting
            continue
        unfinished = []
        for row, index in enumerate(going):
            tokens = output[row, longest:].tolist()
            kept = list(takewhile(lambda token: token not in stops, tokens))
            written[index] += kept
            text = tokenizer.decode(written[index], skip_special_tokens=True)
            if len(kept) < len(tokens) or not room(index) or any(one in text for one in stop):
                yield index, cut(text, stop)
            else:
                unfinished.append(index)
        done += len(going) - len(unfinished)
        going, aside = (unfinished, aside) if len(unfinished) > few else ([], aside + unfinished)
        progress(done, len(prompts))


@torch.no_grad()
def same_in_batches(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], tolerance: float
) -> bool:
    """Whether the scores of the two tokens after a prompt are the same beside a longer one as alone, but for
    `tolerance` of the largest. Some models take no mask, or have a state that a batch shares."""
    short, long = min(prompts, key=len), max(prompts, key=len)
    pad = padding(model, tokenizer)
    _forget_settings(model)
    config = GenerationConfig(max_new_tokens=2, min_new_tokens=2, do_sample=False, pad_token_id=pad)

    def scores(texts: list[list[int]]) -> list[torch.Tensor]:
        ids, mask = (part.to(model.device) for part in _padded(texts, pad))
        found = model.generate(
            ids, attention_mask=mask, generation_config=config, output_logits=True, return_dict_in_generate=True
        )
        return [step[0] for step in found.logits]

    alone, beside = scores([short]), scores([short, long[: len(short) + BESIDE]])
    compared = 2 if int(alone[0].argmax()) == int(beside[0].argmax()) else 1
    pairs = zip(alone[:compared], beside, strict=False)
    return all(float((a - b).abs().max()) <= tolerance * float(a.abs().max()) for a, b in pairs)


def _forget_settings(model: PreTrainedModel) -> list[int]:
    """Leave of the model's own generation_config, which transformers adds to any other, the ends of a text alone; these
    are returned."""
    ends = model.generation_config.eos_token_id if model.generation_config is not None else None
    model.generation_config = GenerationConfig(eos_token_id=ends)
    return end_tokens(ends)


def _padded(texts: list[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens padded on the left, and which are no padding."""
    longest = max(map(len, texts))
    ids = torch.tensor([[pad] * (longest - len(text)) + text for text in texts])
    return ids, torch.tensor([[0] * (longest - len(text)) + [1] * len(text) for text in texts])


class _Ends(StoppingCriteria):  # type: ignore[misc]
    """Ends an answer that has one of the stop strings; what the prompt says does not count, as transformers' own would.
    And the whole batch, when all but `few` answers have ended: what goes on alone costs as much as all together.

    The string may begin some tokens back: every token but a part of a character adds at least one.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, begin: int, stop: Sequence[str], stops: torch.Tensor, few: int
    ) -> None:
        self.tokenizer, self.begin, self.stop, self.stops, self.few = tokenizer, begin, stop, stops, few
        self.tokens = 4 * max(map(len, stop), default=0) + 4
        self.ended: torch.Tensor | bool = False

    def __call__(self, input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        ended = torch.isin(input_ids[:, -1], self.stops) | self.ended
        if self.stop:
            tail = input_ids[:, max(self.begin, input_ids.shape[1] - self.tokens) :]
            texts = self.tokenizer.batch_decode(tail, skip_special_tokens=True)
            ended |= torch.tensor([any(one in text for one in self.stop) for text in texts], device=input_ids.device)
        self.ended = ended
        return ended | ((~ended).sum() <= self.few) if self.few else ended


def fitting(model: PreTrainedModel, tokens: int) -> int:
    """How many sequences of so many tokens should fit beside the model: by the size of their keys and values."""
    if model.device.type == "cpu":
        return ON_CPU
    config = model.config.get_text_config()
    alike = not getattr(config, "is_heterogeneous", False)
    layers = [config] * getattr(config, "num_hidden_layers", 0) if alike else config.per_layer_config
    each = 2 * sum(map(_width, layers)) * model.dtype.itemsize * tokens
    if not each:  # no keys and values: a state of fixed size
        return ON_CPU
    free, _ = torch.cuda.mem_get_info(model.device)
    free += torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
    return max(1, min(MOST, int(FREE_SHARE * free / each)))


def _width(layer: Any) -> int:
    """Numbers of a token's keys, by the configuration of a layer."""
    heads: int = getattr(layer, "num_key_value_heads", None) or getattr(layer, "num_attention_heads", None) or 0
    return heads and heads * (getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads)


def special_stops(stop: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> tuple[list[str], list[int]]:
    """Stop strings, and in their place the tokens of those that are a special one, which no text of an answer shows."""
    special = {one: number for one, number in special_tokens(tokenizer).items() if one in stop}
    return [one for one in stop if one not in special], sorted(special.values())


def cut(text: str, stop: Sequence[str]) -> str:
    """The text before the first of the stop strings."""
    return text[: min((place for one in stop if (place := text.find(one)) >= 0), default=len(text))]
