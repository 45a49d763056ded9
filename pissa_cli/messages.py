"""The messages of a row, in the forms that data have them in."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase

from pissa_cli.data_options import DataSection
from pissa_cli.rows import Row, value_of
from pissa_cli.turns import Message

SHAREGPT = {"human": "user", "observation": "tool"} | dict.fromkeys(
    ("gpt", "chatgpt", "bing", "bard", "model", "function_call"), "assistant"
)
"""Roles of ShareGPT's rows; others are called as elsewhere."""
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
READ = {"role", "content", "from", "value", "tool_calls", "tool_call_id", "weight", "train", *THOUGHTS}
"""Keys of a message that are looked at here, whatever the template does with them."""


def messages_of(value: Any, calls: bool) -> list[Message] | None:
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
            said = {"content": one["value"]} if called is None else {"tool_calls": called}
            others = {key: value for key, value in one.items() if key not in ("from", "value")}
            one = {"role": SHAREGPT.get(str(one["from"]), one["from"])} | said | others
        if "role" not in one or not {"content", "tool_calls"} & set(one):
            return None
        if "content" in one and (one["role"] != "tool" or isinstance(one["content"], list)):
            one = one | {"content": _text(one["content"])}
        messages.append({key: value for key, value in one.items() if value is not None or key == "content"})
    return messages


def _text(content: Any) -> str | None:
    """Of a list of parts the texts, one after the other. Raises ValueError, with the reason, for anything else."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError("a message's content is neither text nor a list of parts")
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else part
            raise ValueError(f"a message has a part that is no text ({str(kind)[:20]})")
    return "".join(part["text"] for part in content)


def is_learned(message: Message) -> bool:
    """Whether a turn is the assistant's, and not one to skip: OpenAI's weight 0, Axolotl's train: false. Raises
    ValueError, with the reason, for what cannot be done."""
    weight, train = message.get("weight", 1), message.get("train")
    if weight not in (0, 1):
        raise ValueError("a message has a weight that is neither 0 nor 1")
    if message["role"] != "assistant" and train:
        raise ValueError("a message that is not the assistant's has train: true; only what that says is learned")
    return message["role"] == "assistant" and weight == 1 and train in (None, True)


def unused_keys(row: Row, section: DataSection, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Keys of the messages that neither the template nor this module asks for."""
    column = section.columns.get("messages", "messages")
    messages = value_of(row, column)
    keys = [key for one in messages if isinstance(one, dict) for key in one] if isinstance(messages, list) else []
    return [f"{column}.{key}" for key in keys if key not in READ and key not in str(tokenizer.chat_template)]


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


def tools_of(row: Row, section: DataSection) -> list[Any] | None:
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


def forms_of(messages: list[Message]) -> Iterator[list[Message]]:
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
