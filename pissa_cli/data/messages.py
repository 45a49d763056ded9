"""The messages of a row, in the forms that data have them in."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from transformers import PreTrainedTokenizerBase

from pissa_cli.data.rows import Row, value_of
from pissa_cli.data.turns import Message
from pissa_cli.schema.data_options import DataSection

ROLES = {
    **{role: role for role in ("system", "user", "assistant", "tool")},
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "bot", "ai", "model", "function_call"), "assistant"),
    **dict.fromkeys(("observation", "function_response"), "tool"),
}
"""Roles of templates, and of ShareGPT's and OASST's rows, in small letters; others are called as they are."""
READ = {"role", "content", "from", "value", "tool_calls", "tool_call_id", "weight", "train"}
"""Keys of a message that are looked at here, whatever the template does with them."""


def messages_of(row: Row, column: str, calls: bool) -> list[Message]:
    """The messages in a column of a row, each with role and content, also of rows in ShareGPT's form. Keys without a
    value, with which parquet files fill objects up, are dropped.

    calls: ShareGPT's `function_call`, a text in JSON, becomes a tool call. Raises ValueError, with the reason, for what
    is no list of messages, and for contents and calls that cannot be used.
    """
    value, messages = value_of(row, column), list[Message]()
    reason = f"'{column}' is not a list of messages with role and content, or from and value"
    for one in value if isinstance(value, list) else [None]:
        if not isinstance(one, dict):
            raise ValueError(reason)
        if {"from", "value"} <= set(one) and "role" not in one:
            called = _called(one["value"]) if calls and one["from"] == "function_call" else None
            said = {"content": one["value"]} if called is None else {"tool_calls": called}
            others = {key: value for key, value in one.items() if key not in ("from", "value")}
            one = {"role": one["from"]} | said | others
        one = {key: value for key, value in one.items() if value is not None or key == "content"}
        if not isinstance(one.get("role"), str) or not {"content", "tool_calls"} & set(one):
            raise ValueError(reason)
        one["role"] = ROLES.get(one["role"].lower(), one["role"])
        if not one.get("tool_calls", True):
            del one["tool_calls"]
        _require_names(one.get("tool_calls", []))
        if "content" in one:
            one["content"] = _text(one["content"], one["role"])
        messages.append(one)
    return messages


def _require_names(calls: Any) -> None:
    """Raise ValueError, with the reason, for tool calls that are none."""
    for call in calls if isinstance(calls, list) else [None]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise ValueError("a message's tool_calls are not a list of calls with names")


def _text(content: Any, role: str) -> str | None:
    """Of a list of parts the texts, one after the other; of what a tool has given back as an object, JSON. Raises
    ValueError, with the reason, for anything else."""
    if content is None or isinstance(content, str):
        return content
    if role == "tool" and not (isinstance(content, list) and any(_is_part(part) for part in content)):
        return json.dumps(content, ensure_ascii=False)
    if not isinstance(content, list):
        raise ValueError("a message's content is neither text nor a list of parts")
    for part in content:
        if not _is_part(part) or part["type"] != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else part
            raise ValueError(f"a message has a part that is no text ({str(kind)[:20]})")
    return "".join(part["text"] for part in content)


def _is_part(part: Any) -> bool:
    return isinstance(part, dict) and "type" in part


def is_learned(message: Message) -> bool:
    """Whether a turn is the assistant's, and not one to skip: OpenAI's weight 0, Axolotl's train: false. Raises
    ValueError, with the reason, for what cannot be done."""
    weight, train = message.get("weight", 1), message.get("train")
    if weight not in (0, 1):
        raise ValueError("a message has a weight that is neither 0 nor 1")
    if train not in (None, True, False):
        raise ValueError("a message has a train that is neither true nor false")
    if message["role"] != "assistant" and train:
        raise ValueError("a message that is not the assistant's has train: true; only what that says is learned")
    return message["role"] == "assistant" and weight == 1 and train in (None, True)


def unused_keys(row: Row, section: DataSection, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Keys of the messages that neither the template nor this module asks for."""
    columns = section.column("messages"), section.optional_column("completion")
    lists = [(column, value_of(row, column)) for column in columns if column]
    objects = [(column, one) for column, found in lists if isinstance(found, list) for one in found]
    keys = [(column, k) for column, one in objects if isinstance(one, dict) for k, v in one.items() if v is not None]
    return [f"{column}.{key}" for column, key in keys if key not in READ and key not in str(tokenizer.chat_template)]


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
    """The tools of a row, from a list or its JSON. Raises ValueError, with the reason, for anything else."""
    column = section.optional_column("tools")
    tools = None if column is None else value_of(row, column)
    if isinstance(tools, str):
        with suppress(ValueError):
            tools = json.loads(tools) if tools.strip() else None
    if not tools and not isinstance(tools, str | dict):
        return None
    if isinstance(tools, list) and all(
        isinstance(tool, dict) and isinstance(tool.get("function", {}), dict) for tool in tools
    ):
        return [{key: value for key, value in tool.items() if value is not None} for tool in tools]
    raise ValueError(f"'{column}' is not a list of tools")


def forms_of(messages: list[Message]) -> Iterator[list[Message]]:
    """The messages as templates may want them: arguments of tool calls as mappings, else as JSON text; without the
    content that is None, else with an empty one."""
    for empty in (None, ""):
        for convert in (_parsed, _written):
            yield [_form(message, convert, empty) for message in messages]


def _form(message: Message, convert: Callable[[Any], Any], empty: str | None) -> Message:
    if "tool_calls" in message:
        message = {**message, "tool_calls": [_call(call, convert) for call in message["tool_calls"]]}
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
