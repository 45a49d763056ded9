"""Where in a rendered conversation the assistant speaks, and its tokens."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate, chain, pairwise
from typing import Any

from transformers import PreTrainedTokenizerBase

MARK = "\u00a7\u00a7"
"""Put beside a message to see where the template writes it."""
LOST = "the chat template writes a turn of the assistant where it cannot be found, or not at all"

Message = dict[str, Any]
Render = Callable[[Sequence[Message], bool], str]
"""(messages, whether the next is the assistant's) -> text."""


def span_of(
    messages: list[Message], turn: int, whole: str, render: Render, tokenizer: PreTrainedTokenizerBase
) -> tuple[int, int]:
    """Where in the `whole` text the model writes this turn: after what it is asked with, its end-of-turn included.

    Templates that write a turn in another way once it is followed by others (Qwen3 drops the thoughts) are seen by what
    changes with a mark in the message. Raises ValueError, with the reason, where that does not show it.
    """
    special = _special(tokenizer)

    def marked(before: str = "", after: str = "", upto: int | None = None, at: int = turn) -> str | None:
        """The text with a mark beside the content of a message, or in its place if both are given; None if refused."""
        try:
            return render(_marked(messages, at, before, after)[:upto], False)
        except Exception:  # some want no content beside a thought or a call
            return None

    def differs(text: str, other: str | None) -> int | None:
        """Characters until the texts part; None if they do not."""
        return None if other is None or other == text else _common(text, other)

    asked = render(messages[:turn], True) if turn else None
    begin: int | None
    if asked is not None and whole.startswith(asked):
        begin = len(asked)
    else:
        begin = differs(whole, marked(MARK, MARK))
        alone = marked(MARK, MARK, turn + 1)
        if begin is not None and asked is not None and alone is not None and alone.startswith(asked):
            begin -= len(lead) if whole[:begin].endswith(lead := alone[len(asked) :].partition(MARK)[0]) else 0
    if begin is None:
        raise ValueError(LOST)
    upto = render(messages[: turn + 1], False)
    if whole.startswith(upto):
        if len(upto) <= begin:
            raise ValueError(LOST)
        return begin, len(upto)
    said, alone_said = differs(whole, marked(after=MARK)), differs(upto, marked(after=MARK, upto=turn + 1))
    if said is None or alone_said is None or said < begin:  # a call, beside which the content is not shown
        said = alone_said = begin
    end = said + _common(whole[said:], upto[alone_said:])
    for text, after in ((whole, said), (upto, alone_said)):
        parted = next(
            (one for one in special.finditer(text, after) if one.start() < end - said + after < one.end()), None
        )
        if parted is not None:  # one token in place of another ends the turn; after a whole one it ends before that
            whole_one = special.search(text, after, parted.start()) or text is upto
            end = said - after + (parted.start() if whole_one else parted.end())
            break
    limit = differs(whole, marked(MARK, at=turn + 1)) if turn + 1 < len(messages) else None
    end = end if limit is None else min(end, limit)
    if end <= begin:
        raise ValueError(LOST)
    return begin, end


def _marked(messages: list[Message], turn: int, before: str, after: str) -> list[Message]:
    """With a mark before or after the content of a message; in its place if both are given."""
    content = messages[turn].get("content")
    if before and after:
        content = before
    elif isinstance(content, list):
        content = [{"type": "text", "text": before}] * bool(before) + content
        content += [{"type": "text", "text": after}] * bool(after)
    else:
        content = f"{before}{content or ''}{after}"
    return [*messages[:turn], {**messages[turn], "content": content}, *messages[turn + 1 :]]


def _common(one: str, other: str) -> int:
    """Characters that both begin with."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[:middle] == other[:middle] else (low, middle - 1)
    return low


@lru_cache(1)
def _special(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Finds the tokens that are one, whatever stands beside them."""
    added = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, added)) or r"(?!)")


def tokens_apart(text: str, bounds: list[int], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Tokens of the text, none of which spans one of the `bounds` (ascending), and how many lie before each of these.

    At a bound within a token of the whole text, both sides are tokenized apart.
    """
    whole, *pieces = _tokens([text, *(text[begin:end] for begin, end in pairwise([0, *bounds, len(text)]))], tokenizer)
    if list(chain(*pieces)) == whole:
        return whole, list(accumulate(map(len, pieces[:-1])))
    done: list[int] = []
    start, counts, tokens = 0, [], tokens_of
    for bound, following in pairwise([*bounds, len(text)]):
        head, both, after = (
            tokens(text[start:bound], tokenizer),
            tokens(text[start:following], tokenizer),
            tokens_of(text[bound:following], tokenizer),
        )
        counts.append(len(done) + len(head))
        parted = both[: len(head)] != head
        if parted or both == head + after:
            done += head
            start, tokens = bound, tokens_within if parted else tokens_of
    return done + tokens(text[start:], tokenizer), counts


def tokens_of(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return _tokens([text], tokenizer)[0]


def tokens_within(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens of a text that follows other text: without the space that some tokenizers (Llama 2, Mistral) put first."""
    return _tokens_after(text, tokenizer) if _puts_a_space(tokenizer) else tokens_of(text, tokenizer)


@lru_cache(1)
def _puts_a_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    return _tokens_after("a", tokenizer) != tokens_of("a", tokenizer)


def _tokens_after(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens of the text after those of one that does not grow together with it."""
    for before in ("\n", ":"):
        alone, both = _tokens([before, before + text], tokenizer)
        if both[: len(alone)] == alone:
            return both[len(alone) :]
    return tokens_of(text, tokenizer)


def _tokens(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    return list(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])
