"""Where in a rendered conversation the assistant speaks, and its tokens."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate, chain, islice, pairwise
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

MARKS = "\u00a7", *map(chr, range(0xE000, 0xF900))
"""The first of these that the text does not have is put into a message, to see where the template writes it."""
LOST = "the chat template writes a turn of the assistant where it cannot be found, or not at all"
PARTED = "the chat template refuses the conversation up to a turn of the assistant"

Message = dict[str, Any]
Render = Callable[[Sequence[Message], bool], str]
"""(messages, whether the next is the assistant's) -> text."""


def span_of(
    messages: list[Message], turn: int, whole: str, render: Render, tokenizer: PreTrainedTokenizerBase
) -> tuple[int, int]:
    """(begin, end) of what the model writes for message `turn` in the `whole` rendered conversation: from behind what
    it is asked with, up to its end-of-turn, that included (`Hello<|im_end|>\\n` of ChatML's
    `<|im_start|>assistant\\nHello<|im_end|>\\n`).

    Most templates render the beginning of a conversation as the whole one begins, and lengths tell. Others write a turn
    otherwise once it is followed by more (Qwen3 drops the thoughts). For these the conversation is rendered again with
    a mark in a message, and where the texts part, that message is. Raises ValueError, with the reason, where that does
    not tell either.
    """
    look = _Look(messages, turn, whole, render, 2 * next(one for one in MARKS if one not in whole))
    upto = whole if turn + 1 == len(messages) else look.attempt(messages[: turn + 1])
    if upto is None:
        raise ValueError(PARTED)
    begin = _begin(look)
    end = len(upto) if whole.startswith(upto) else _end(look, begin, upto, _special(tokenizer))
    if end <= begin:
        raise ValueError(LOST)
    return begin, end


@dataclass(frozen=True)
class _Look:
    """A turn that is looked for in the `whole` text, by rendering the conversation with a mark put into a message."""

    messages: list[Message]
    turn: int
    whole: str
    render: Render
    mark: str

    def attempt(self, changed: Sequence[Message], ask: bool = False) -> str | None:
        """The text; None if it is refused: some want no content beside a thought or a call."""
        try:
            return self.render(changed, ask)
        except Exception:  # templates raise what they like
            return None

    def marked(self, turn: int, where: Literal["before", "after", "instead"], upto: int | None = None) -> str | None:
        """The text with a mark before or after the content of message `turn`, or in its place; of the first `upto`
        messages alone where that is given."""
        content = self.messages[turn].get("content") or ""
        said = {"before": f"{self.mark}{content}", "after": f"{content}{self.mark}", "instead": self.mark}[where]
        return self._with(turn, {"content": said}, upto)

    def named(self, upto: int | None = None) -> str | None:
        """As `marked`, with the mark for the name of the turn's first tool call; None where it has none."""
        if not (calls := self.messages[self.turn].get("tool_calls")):
            return None
        call, name = calls[0], {"name": self.mark}
        call = {**call, "function": call["function"] | name} if "function" in call else call | name
        return self._with(self.turn, {"tool_calls": [call, *calls[1:]]}, upto)

    def _with(self, turn: int, values: Message, upto: int | None) -> str | None:
        changed = [*self.messages[:turn], self.messages[turn] | values, *self.messages[turn + 1 :]]
        return self.attempt(changed[:upto])


def _begin(look: _Look) -> int:
    """Where the model begins to write the turn: behind what it is asked with.

    Where the whole text does not begin with the conversation up to there, that is looked for by its own words, between
    what was said before and the turn; else by the words that the turn has before its content when nothing follows it.
    """
    messages, turn, whole = look.messages, look.turn, look.whole
    asked = look.attempt(messages[:turn], True) if turn else None
    if asked is not None and whole.startswith(asked):
        return len(asked)
    says, alone = _parting(whole, look.marked(turn, "instead")), look.marked(turn, "instead", turn + 1)
    only_calls = says is None
    if only_calls:
        says, alone = _parting(whole, look.named()), look.named(turn + 1)
    if says is None:
        raise ValueError(LOST)
    if asked is not None:
        prompt = asked.removeprefix(look.attempt(messages[:turn]) or asked)
        before = _parting(whole, look.marked(turn - 1, "after")) if prompt else None
        if before is not None and (place := whole.find(prompt, before, says)) >= 0:
            return place + len(prompt)
        if alone is not None and alone.startswith(asked):
            lead = alone.removeprefix(asked).partition(look.mark)[0]
            if whole[:says].endswith(lead):
                return says - len(lead)
    if only_calls:  # it begins somewhere before the name
        raise ValueError(LOST)
    return says


def _end(look: _Look, begin: int, upto: str, special: re.Pattern[str]) -> int:
    """Where the turn ends in the whole text. upto: the conversation rendered up to it, with which the whole does not
    begin, so that a message follows.

    Behind what the turn says, or the tool that it calls, both texts go on alike, and where they part it has ended; no
    special token is cut in two there, and the content of the next message is not reached.
    """
    whole = look.whole
    for marked in (partial(look.marked, look.turn, "after"), look.named):
        said, alone_said = _parting(whole, marked()), _parting(upto, marked(upto=look.turn + 1))
        if said is not None and alone_said is not None and said >= begin:
            break
    else:
        said = alone_said = begin
    length = common(whole[said:], upto[alone_said:])
    for text, after in ((whole, said), (upto, alone_said)):
        tokens = special.finditer(text, after)
        cut = next((token for token in tokens if token.start() < after + length < token.end()), None)
        if cut is not None:  # one token in place of another ends the turn; after a whole one it ends before that
            ends_before = text is upto or special.search(text, after, cut.start()) is not None
            length = (cut.start() if ends_before else cut.end()) - after
            break
    following = _parting(whole, look.marked(look.turn + 1, "before"))
    return said + length if following is None else min(said + length, following)


def _parting(text: str, other: str | None) -> int | None:
    """Characters until the texts part; None if they do not."""
    return None if other is None or other == text else common(text, other)


def common(one: str, other: str) -> int:
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


def tokens_apart(
    texts: Sequence[tuple[str, list[int]]], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[list[int], list[int]]]:
    """For each (text, bounds): its tokens, none of which spans a bound, and how many of them lie before each bound.

    bounds: places in the text, ascending. Where a token of the whole text would span one, the two sides of it are
    tokenized apart.
    """
    cut = [[text[begin:end] for begin, end in pairwise([0, *bounds, len(text)])] for text, bounds in texts]
    wholes = _tokens([text for text, _ in texts], tokenizer)
    parts = iter(_tokens(list(chain(*cut)), tokenizer))
    for (text, bounds), pieces, whole in zip(texts, cut, wholes, strict=True):
        found = list(islice(parts, len(pieces)))
        if list(chain(*found)) == whole:
            yield whole, list(accumulate(map(len, found[:-1])))
        else:
            yield _parted(text, bounds, tokenizer)


def _parted(text: str, bounds: list[int], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """`tokens_apart` of one text, bound by bound."""
    done: list[int] = []
    start, counts, tokens = 0, [], tokens_of
    for bound, following in pairwise([*bounds, len(text)]):
        head, both = tokens(text[start:bound], tokenizer), tokens(text[start:following], tokenizer)
        after = tokens_of(text[bound:following], tokenizer)
        counts.append(len(done) + len(head))
        parted = both[: len(head)] != head
        if parted or both == head + after:
            done += head
            start, tokens = bound, tokens_within if parted else tokens_of
    return done + tokens(text[start:], tokenizer), counts


def tokens_of(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens of a text by itself, without those that the tokenizer adds."""
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
    if not texts:
        return []
    return list(tokenizer(texts, add_special_tokens=False, verbose=False, return_attention_mask=False)["input_ids"])
