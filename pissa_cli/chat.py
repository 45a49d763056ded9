"""Conversations in the tokenizer's chat template: the assistant's turns are the targets."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from pissa_cli.configuration import first_line
from pissa_cli.data_options import DataSection
from pissa_cli.errors import UsageError
from pissa_cli.examples import Encoded
from pissa_cli.loading import load_tokenizer
from pissa_cli.recipe import Recipe
from pissa_cli.rows import Row, has_surrogate, value_of
from pissa_cli.rundir import read_json, write_json
from pissa_cli.turns import MARK, Message, Render, span_of, tokens_apart

SHAREGPT = {"human": "user", "observation": "tool"} | dict.fromkeys(
    ("gpt", "chatgpt", "bing", "bard", "model", "function_call"), "assistant"
)
"""Roles of ShareGPT's rows; others are called as elsewhere."""


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
            f"data.format chat: the chat template refuses a question ({first_line(error)})",
            "give another in data.template",
        ) from None


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text by which the template ends what the assistant says, its first special token if there is one."""
    return _end_of_turn(tokenizer, str(tokenizer.chat_template))


@lru_cache(1)
def _end_of_turn(tokenizer: PreTrainedTokenizerBase, _template: str) -> list[str]:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": MARK}]
    try:
        _, found, tail = _render(tokenizer)(messages, False).rpartition(MARK)
    except Exception:  # as above; then an answer ends at end-of-text alone
        return []
    special = [token for token in special_tokens(tokenizer) if token in tail]
    end = min(special, key=tail.find) if special else tail.strip()
    return [end] if found and end else []


def write_stops(folder: Path, recipe: Recipe) -> None:
    """Have the model in `folder` end its answers where the template ends a turn, if that is one token: other programs
    ask generation_config.json for it."""
    if recipe.data.format != "chat":
        return
    path, tokenizer = folder / "generation_config.json", load_tokenizer(folder, recipe)
    ends = [number for token, number in special_tokens(tokenizer).items() if token in end_of_turn(tokenizer)]
    settings = read_json(path) if path.is_file() else {}
    known = settings.get("eos_token_id", tokenizer.eos_token_id)
    known = known if isinstance(known, list) else [known]
    if set(ends) - set(known):
        write_json(path, settings | {"eos_token_id": [*known, *(number for number in ends if number not in known)]})


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Those that no text of an answer shows, and their numbers."""
    return {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}


def encode_chat(row: Row, section: DataSection, tokenizer: PreTrainedTokenizerBase) -> Encoded | str:
    """Tokens of a conversation, or why it cannot be used."""
    column = section.columns.get("messages", "messages")
    messages = _messages(value_of(row, column), "tool_calls" in str(tokenizer.chat_template))
    if messages is None:
        return f"'{column}' is not a list of messages with role and content, or from and value"
    try:
        tools = _tools(row, section)
    except ValueError as error:
        return str(error)
    said = [message for message in messages if message["role"] == "assistant"]
    if not said:
        return "no assistant message"
    if not all(message.get("content") or message.get("tool_calls") for message in said):
        return "the assistant says nothing"
    if any(message.get("weight", 1) != 1 for message in messages):
        return "a message has a weight that is not 1: all that the assistant says is learned"
    system = value_of(row, section.optional_column("system") or "")
    if isinstance(system, str) and system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    render = _render(tokenizer, tools)
    found: tuple[list[Message], str] | str = ""
    for form in _forms(messages):
        try:
            found = form, render(form, False)
            break
        except Exception as error:  # templates raise what they like
            found = found or f"the chat template refuses it ({first_line(error)})"
    if isinstance(found, str):
        return found
    messages, whole = found
    if not all(str(tool.get("function", tool).get("name", "")) in whole for tool in tools or ()):
        return "the chat template leaves out the tools"
    if has_surrogate(whole):
        return f"'{column}' holds a broken character (a lone surrogate)"
    spans = []
    for turn, message in enumerate(messages):
        span = (0, len(whole))
        if message["role"] == "assistant":
            try:
                span = span_of(messages, turn, whole, render, tokenizer)
            except ValueError as error:
                return str(error)
            spans.append(span)
        if not _shown(message, whole[slice(*span)], last=turn == len(messages) - 1):
            return f"the chat template leaves out what the {message['role']} says"
    ids, counts = tokens_apart(whole, [place for span in spans for place in span], tokenizer)
    targets = [False] * len(ids)
    for begin, end in zip(counts[::2], counts[1::2], strict=True):
        targets[begin:end] = [True] * (end - begin)
    if targets[-1] and not end_of_turn(tokenizer):
        ids, targets = [*ids, tokenizer.eos_token_id], [*targets, True]
    return Encoded(ids, targets)


def _forms(messages: list[Message]) -> Iterator[list[Message]]:
    """The messages as templates may want them: arguments of tool calls as mappings, else as JSON text; without the
    content that is None, else with an empty one."""
    for empty in (None, ""):
        for convert in (_parsed, _written):
            yield [_form(message, convert, empty) for message in messages]


def _form(message: Message, convert: Callable[[Any], Any], empty: str | None) -> Message:
    calls = message.get("tool_calls")
    if isinstance(calls, list) and all(isinstance(call, dict) for call in calls):
        message = {**message, "tool_calls": [_call(call, convert) for call in calls]}
    return {**message, "content": empty} if message.get("content", "") is None else message


def _call(call: dict[str, Any], convert: Callable[[Any], Any]) -> dict[str, Any]:
    if isinstance(call.get("function"), dict):
        return {**call, "function": _call(call["function"], convert)}
    return {**call, "arguments": convert(call["arguments"])} if "arguments" in call else call


def _parsed(arguments: Any) -> Any:
    """OpenAI's arguments are a JSON text, which templates would write as one, in quotes."""
    try:
        found = json.loads(arguments)
    except (ValueError, TypeError):
        return arguments
    return found if isinstance(found, dict) else arguments


def _written(arguments: Any) -> Any:
    return json.dumps(arguments, ensure_ascii=False) if isinstance(arguments, dict) else arguments


def _messages(value: Any, calls: bool) -> list[Message] | None:
    """Messages with role and content, from ShareGPT's as well; without None, with which parquet files fill up. calls:
    what ShareGPT has as a function_call, in JSON, becomes one."""
    if not isinstance(value, list):
        return None
    messages = []
    for one in value:
        if not isinstance(one, dict):
            return None
        if {"from", "value"} <= set(one) and "role" not in one:
            called = _called(one["value"]) if calls and one["from"] == "function_call" else None
            one = {"role": SHAREGPT.get(str(one["from"]), one["from"]), "content": one["value"]}
            one = one if called is None else {"role": "assistant", "tool_calls": called}
        if "role" not in one or not {"content", "tool_calls"} & set(one):
            return None
        parts = one.get("content")
        if isinstance(parts, list) and all(isinstance(part, dict) and set(part) == {"type", "text"} for part in parts):
            one = {**one, "content": "".join(str(part["text"]) for part in parts)}
        messages.append({key: value for key, value in one.items() if value is not None or key == "content"})
    return messages


def _called(value: Any) -> list[dict[str, Any]] | None:
    """The tool calls of a JSON text of one, or of a list; None if it is something else."""
    try:
        found = json.loads(value)
    except (ValueError, TypeError):
        return None
    found = found if isinstance(found, list) else [found]
    if not found or not all(isinstance(call, dict) and {"name", "arguments"} <= set(call) for call in found):
        return None
    return [{"type": "function", "function": call} for call in found]


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


def _shown(message: Message, text: str, last: bool) -> bool:
    """Whether the text has what a message says, but for white space: of tool calls the names, of what the assistant
    says in earlier turns nothing but that, as its thoughts may be left out, and of a tool's answer nothing."""
    content, role = message.get("content"), message["role"]
    if role == "assistant":
        calls = message.get("tool_calls") or []
        called = (
            [call.get("function", call) for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []
        )
        if any(isinstance(one, dict) and str(one.get("name", "")) not in text for one in called):
            return False
    says = isinstance(content, str) and (last if role == "assistant" else role in ("user", "system", "developer"))
    return not says or "".join(str(content).split()) in "".join(text.split())
