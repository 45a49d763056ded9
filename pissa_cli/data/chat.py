"""Conversations in the tokenizer's chat template: the assistant's turns are the targets."""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache
from itertools import accumulate, chain
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from pissa_cli.data.examples import Encoded, Examples
from pissa_cli.data.messages import forms_of, is_learned, messages_of, tools_of
from pissa_cli.data.rows import Row, has_surrogate, value_of
from pissa_cli.data.turns import MARKS, Message, Render, common, span_of, tokens_apart
from pissa_cli.errors import UsageError, in_one_line
from pissa_cli.schema.data_options import DataSection

DAY = datetime(2024, 7, 26)
"""What templates write that ask for the date, the default of Llama 3's: examples and questions must not change from day
to day."""
_DATE = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")


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
        pass


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
            f"data.format chat: the chat template refuses a question ({in_one_line(error)})",
            "give another in data.template",
        ) from None


def unlearned_prompt(examples: Examples, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """What the template asks the assistant with, if what is learned of the first example does not follow that; else
    None. R1's template asks with an opened thought, and the answers of many data sets have none."""
    prompt = _asks([{"role": "user", "content": "a"}], _render(tokenizer))
    begin = int(examples.targets[: examples.length(0)].int().argmax())
    read = str(tokenizer.decode(examples.tokens(0)[:begin]))
    return None if "".join(read.split()).endswith("".join(prompt.split())) else prompt


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text by which the template ends what the assistant says, its first special token if there is one."""
    return _end_of_turn(tokenizer, str(tokenizer.chat_template))


@lru_cache(1)
def _end_of_turn(tokenizer: PreTrainedTokenizerBase, _template: str) -> list[str]:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": MARKS[0]}]
    try:
        _, found, tail = _render(tokenizer)(messages, False).rpartition(MARKS[0])
    except Exception:  # as above; then an answer ends at end-of-text alone
        return []
    special = [token for token in special_tokens(tokenizer) if token in tail]
    end = min(special, key=tail.find) if special else tail.strip()
    return [end] if found and end else []


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Those that no text of an answer shows, and their numbers."""
    return {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}


class _Conversation(NamedTuple):
    """The text of a conversation, where in it the assistant speaks, and which of these turns are learned."""

    text: str
    spans: list[tuple[int, int]]
    learned: list[bool]


def encode_chats(rows: Sequence[Row], section: DataSection, tokenizer: PreTrainedTokenizerBase) -> list[Encoded | str]:
    """Tokens of each conversation, or why it cannot be used; they are tokenized together."""
    found: list[_Conversation | str] = []
    for row in rows:
        try:
            found.append(_conversation(row, section, tokenizer))
        except ValueError as error:
            found.append(str(error))
    texts = [(one.text, list(chain(*one.spans))) for one in found if not isinstance(one, str)]
    tokens = tokens_apart(texts, tokenizer)
    return [one if isinstance(one, str) else _masked(one, *next(tokens), tokenizer) for one in found]


def _masked(found: _Conversation, ids: list[int], counts: list[int], tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """Tokens of a conversation and which of them are learned. counts: tokens before each begin and end of a span."""
    targets = [False] * len(ids)
    for begin, end, one in zip(counts[::2], counts[1::2], found.learned, strict=True):
        targets[begin:end] = [one] * (end - begin)
    if targets[-1] and not end_of_turn(tokenizer):
        ids, targets = [*ids, tokenizer.eos_token_id], [*targets, True]
    return Encoded(ids, targets)


def _conversation(row: Row, section: DataSection, tokenizer: PreTrainedTokenizerBase) -> _Conversation:
    """Raises ValueError, with the reason, for a row that cannot be used."""
    column, completion = section.column("messages"), section.optional_column("completion")
    calls, tools = "tool_calls" in str(tokenizer.chat_template), tools_of(row, section)
    messages = messages_of(row, column, calls)
    learned = [is_learned(message) for message in messages]
    if completion in row:
        answer = messages_of(row, completion, calls)
        learned = [False] * len(messages) + [is_learned(message) for message in answer]
        messages += answer
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("no assistant message")
    said = [message for message, one in zip(messages, learned, strict=True) if one]
    if not all((message.get("content") or "").strip() or message.get("tool_calls") for message in said):
        raise ValueError("the assistant says nothing")
    system = value_of(row, section.optional_column("system") or "")
    if isinstance(system, str) and system:
        if messages[0]["role"] == "system":
            raise ValueError("a system message beside the column for it")
        messages.insert(0, {"role": "system", "content": system})
        learned.insert(0, False)
    render = _render(tokenizer, tools)
    messages, whole = _rendered(messages, render)
    if not all(str(tool.get("function", tool).get("name", "")) in whole for tool in tools or ()):
        raise ValueError("the chat template leaves out the tools")
    if has_surrogate(whole):
        raise ValueError(f"'{column}' holds a broken character (a lone surrogate)")
    turns = [one for one, message in zip(learned, messages, strict=True) if message["role"] == "assistant"]
    spans = None if tools else _spans_by_roles(messages, whole, tokenizer)
    return _Conversation(whole, spans or _spans(messages, whole, render, tokenizer), turns)


def _rendered(messages: list[Message], render: Render) -> tuple[list[Message], str]:
    """(the messages in the first form that the template takes, their text). Raises ValueError, with the reason, if it
    takes none."""
    reason = ""
    for form in forms_of(messages):
        try:
            return form, render(form, False)
        except Exception as error:  # templates raise what they like
            reason = reason or in_one_line(error)
    raise ValueError(f"the chat template refuses it ({reason})")


def _spans(
    messages: list[Message], whole: str, render: Render, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[int, int]]:
    """Where in the `whole` text the assistant speaks. Raises ValueError, with the reason, where that cannot be found,
    or a message is left out."""
    spans = []
    for turn, message in enumerate(messages):
        span = (0, len(whole))
        if message["role"] == "assistant":
            span = span_of(messages, turn, whole, render, tokenizer)
            spans.append(span)
        last, text = turn == len(messages) - 1, whole[slice(*span)]
        if not _shown(message, text, last) and not _shown(message, _asks(messages[:turn], render) + text, last):
            raise ValueError(f"the chat template leaves out what the {message['role']} says")
    return spans


def _spans_by_roles(
    messages: list[Message], whole: str, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[int, int]] | None:
    """As `_spans`, without a rendering for every turn: for templates that write the contents of messages one after the
    other, between texts that depend on the roles alone (`_around`). None if the `whole` text is not put together so.
    """
    contents = [message.get("content") or "" for message in messages]
    if any(set(message) != {"role", "content"} for message in messages) or not all(contents):
        return None
    roles = tuple(message["role"] for message in messages)
    around, places = _around(roles, tokenizer, str(tokenizer.chat_template))
    if not around or "".join(chain(*zip(around, contents, strict=False), around[-1:])) != whole:
        return None
    before = [0, *accumulate(map(len, contents))]
    bounds = [before[count] + length for count, length in places]
    return list(zip(bounds[::2], bounds[1::2], strict=True))


@lru_cache(1000)
def _around(
    roles: tuple[str, ...], tokenizer: PreTrainedTokenizerBase, _template: str
) -> tuple[list[str], list[tuple[int, int]]]:
    """What the template writes around the contents of messages in these roles: the texts before, between and behind
    them; and each begin and end of a turn of the assistant, as (number of contents before it, characters of these texts
    before it).

    Two empty lists unless the template writes every content once, in order, and renders the beginning of a conversation
    as the whole one begins.
    """
    messages = [{"role": role, "content": f"a{number}b"} for number, role in enumerate(roles)]
    render, bounds = _render(tokenizer), list[int]()
    try:
        whole = render(messages, False)
        for turn, role in enumerate(roles):
            if role == "assistant":
                asked, upto = render(messages[:turn], True), render(messages[: turn + 1], False)
                if not whole.startswith(asked) or not whole.startswith(upto) or len(upto) <= len(asked):
                    return [], []
                bounds += len(asked), len(upto)
    except Exception:  # as above
        return [], []
    around, ends, rest = list[str](), list[int](), whole
    for message in messages:
        before, found, rest = rest.partition(message["content"])
        if not found or message["content"] in rest:
            return [], []
        around.append(before)
        ends.append(len(whole) - len(rest))
    lengths = [len(message["content"]) for message in messages]
    places = list[tuple[int, int]]()
    for place in bounds:
        count = bisect_right(ends, place)
        if count < len(ends) and place > ends[count] - lengths[count]:
            return [], []
        places.append((count, place - sum(lengths[:count])))
    return [*around, rest], places


def _render(tokenizer: PreTrainedTokenizerBase, tools: list[Any] | None = None) -> Render:
    def render(messages: Sequence[Message], ask: bool) -> str:
        template = _DATE.sub(lambda call: repr(DAY.strftime(call[2])), tokenizer.get_chat_template(tools=tools))
        return str(
            tokenizer.apply_chat_template(
                list(messages), chat_template=template, tools=tools, tokenize=False, add_generation_prompt=ask
            )
        )

    return render


def _asks(messages: list[Message], render: Render) -> str:
    """What the template asks the assistant with: of some the begin of a thought."""
    try:
        asked = render(messages, True)
        return asked[common(asked, render(messages, False)) :]
    except Exception:  # as above
        return ""


def _shown(message: Message, text: str, last: bool) -> bool:
    """Whether the text shows what a message says, white space aside. Of the assistant it has to show the names of tool
    calls and, in the last turn, what it says; in earlier ones templates may leave its thoughts out."""
    content = message.get("content")
    if message["role"] == "assistant":
        names = [call.get("function", call)["name"] for call in message.get("tool_calls", [])]
        return all(name in text for name in names) and (not last or _has(text, content))
    return _has(text, content) or _has(text, json.dumps(content, ensure_ascii=False)[1:-1])


def _has(text: str, said: Any) -> bool:
    """Whether a text is in another, but for white space; what is no text counts as such."""
    return not isinstance(said, str) or "".join(said.split()) in "".join(text.split())
