"""Conversations in the tokenizer's chat template: the assistant's turns are the targets."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate, chain, pairwise
from typing import Any

from transformers import PreTrainedTokenizerBase

from pissa_cli.configuration import first_line
from pissa_cli.data_options import DataSection
from pissa_cli.errors import UsageError
from pissa_cli.examples import Encoded
from pissa_cli.rows import Row, has_surrogate, value_of

SHAREGPT = {"human": "user", "gpt": "assistant", "observation": "tool"}
"""Roles of ShareGPT's rows; others are called as elsewhere."""
MARK = "\u00a7\u00a7"
"""Put beside a message to see where the template writes it."""

Message = dict[str, Any]
Render = Callable[[Sequence[Message], bool], str]
"""(messages, whether the next is the assistant's) -> text."""


def require_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """UsageError where there is no template for `format: chat`, or one that is not Jinja."""
    if not tokenizer.chat_template:
        raise UsageError(
            "data.format chat: this tokenizer has no chat template",
            "give one in data.template (docs/recipes.md has ChatML's), or use format alpaca or prompt",
        )
    from jinja2 import TemplateSyntaxError

    try:
        _render(tokenizer)([{"role": "user", "content": ""}], True)
    except TemplateSyntaxError as error:
        raise UsageError(
            f"data.template: not a chat template in Jinja (line {error.lineno}: {error.message})", "correct it"
        ) from None
    except Exception:  # of this conversation: the rows and questions say what the template has against them
        return


def question_text(question: str, before: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase) -> str:
    """A question, after the questions and answers of earlier turns, up to where the assistant answers."""
    require_template(tokenizer)
    messages = []
    for one, answer in before:
        messages += [{"role": "user", "content": one}, {"role": "assistant", "content": answer}]
    try:
        return _render(tokenizer)([*messages, {"role": "user", "content": question}], True)
    except Exception as error:  # templates raise what they like
        raise UsageError(
            f"data.format chat: the chat template refuses a question ({first_line(error)})",
            "give another in data.template",
        ) from None


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text by which the template ends what the assistant says, its first special token if there is one."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": MARK}]
    try:
        _, found, tail = _render(tokenizer)(messages, False).rpartition(MARK)
    except Exception:  # as above; then an answer ends at end-of-text alone
        return []
    special = _special(tokenizer).search(tail)
    end = special.group() if special else tail.strip()
    return [end] if found and end else []


def encode_chat(row: Row, section: DataSection, tokenizer: PreTrainedTokenizerBase) -> Encoded | str:
    """Tokens of a conversation, or why it cannot be used."""
    column = section.columns.get("messages", "messages")
    messages = _messages(value_of(row, column))
    if messages is None:
        return f"'{column}' is not a list of messages with role and content, or from and value"
    try:
        tools = _tools(row, section)
    except ValueError as error:
        return str(error)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        return "no assistant message"
    render = _render(tokenizer, tools)
    try:
        whole = render(messages, False)
        spans = [_span(messages, turn, whole, render, tokenizer) for turn in turns]
    except Exception as error:  # templates raise what they like
        return f"the chat template refuses it ({first_line(error)})"
    if None in spans or not _kept(messages[turns[-1]], whole):
        return "the chat template leaves out what the assistant says"
    if has_surrogate(whole):
        return f"'{column}' holds a broken character (a lone surrogate)"
    bounds = [place for span in spans if span for place in span]
    ids, counts = _tokens(whole, bounds, tokenizer)
    targets = [False] * len(ids)
    for begin, end in zip(counts[::2], counts[1::2], strict=True):
        targets[begin:end] = [True] * (end - begin)
    return Encoded(ids, targets)


def _messages(value: Any) -> list[Message] | None:
    """Messages with role and content, from ShareGPT's as well; without None, with which parquet files fill up."""
    if not isinstance(value, list):
        return None
    messages = []
    for one in value:
        if not isinstance(one, dict):
            return None
        if {"from", "value"} <= set(one) and "role" not in one:
            one = {"role": SHAREGPT.get(str(one["from"]), one["from"]), "content": one["value"]}
        if "role" not in one or not {"content", "tool_calls"} & set(one):
            return None
        messages.append({key: value for key, value in one.items() if value is not None or key == "content"})
    return messages


def _tools(row: Row, section: DataSection) -> list[Any] | None:
    column = section.optional_column("tools")
    tools = None if column is None else value_of(row, column)
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError:
            tools = tools or None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError(f"'{column}' is not a list of tools")
    return tools or None


def _render(tokenizer: PreTrainedTokenizerBase, tools: list[Any] | None = None) -> Render:
    def render(messages: Sequence[Message], ask: bool) -> str:
        return str(
            tokenizer.apply_chat_template(list(messages), tools=tools, tokenize=False, add_generation_prompt=ask)
        )

    return render


def _span(
    messages: list[Message], turn: int, whole: str, render: Render, tokenizer: PreTrainedTokenizerBase
) -> tuple[int, int] | None:
    """Where in the `whole` text the model writes this turn: after what it is asked with, its end-of-turn included.

    Templates that write a turn in another way once it is followed by others (Qwen3 drops the thoughts) are seen by what
    changes with a mark beside the message. None for a message that the template leaves out.
    """
    asked = render(messages[:turn], True) if turn else None
    if asked is not None and whole.startswith(asked):
        begin = len(asked)
    else:
        begin = _common(whole, render(_marked(messages, turn, before=MARK), False))
    upto = render(messages[: turn + 1], False)
    if whole.startswith(upto):
        end = len(upto)
    else:
        marked = _marked(messages, turn, after=MARK)
        said, alone = _common(whole, render(marked, False)), _common(upto, render(marked[: turn + 1], False))
        end = said + _common(whole[said:], upto[alone:])
        inside = (found.end() for found in _special(tokenizer).finditer(whole) if found.start() < end < found.end())
        end = next(inside, end)
    return (begin, end) if begin < end else None


def _marked(messages: list[Message], turn: int, before: str = "", after: str = "") -> list[Message]:
    content = messages[turn].get("content")
    if isinstance(content, list):
        content = [{"type": "text", "text": before}] * bool(before) + content
        content += [{"type": "text", "text": after}] * bool(after)
    else:
        content = f"{before}{content or ''}{after}"
    return [*messages[:turn], {**messages[turn], "content": content}, *messages[turn + 1 :]]


def _kept(message: Message, whole: str) -> bool:
    """Whether the text has all that a message says, but for white space."""
    content = message.get("content")
    return not isinstance(content, str) or "".join(content.split()) in "".join(whole.split())


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


def _tokens(text: str, bounds: list[int], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Tokens of the text, none of which spans one of the `bounds` (ascending), and how many lie before each of these.

    At a bound within a token of the whole text, both sides are tokenized apart.
    """

    def tokenize(part: str) -> list[int]:
        return [] if not part else list(tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"])

    whole, edges = tokenize(text), [0, *bounds, len(text)]
    parts = [tokenize(text[begin:end]) for begin, end in pairwise(edges)]
    if list(chain(*parts)) == whole:
        return whole, list(accumulate(map(len, parts[:-1])))
    done: list[int] = []
    start, rest, counts = 0, whole, []
    for bound in bounds:
        head = tokenize(text[start:bound])
        counts.append(len(done) + len(head))
        if rest[: len(head)] != head:
            done += head
            start, rest = bound, tokenize(text[bound:])
    return done + rest, counts
