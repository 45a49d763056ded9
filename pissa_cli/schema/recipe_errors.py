"""What is wrong with a recipe, in words: the key's whole path, where it was written, and what it should have been."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from pissa_cli.schema.adapter_options import AdapterOptions
from pissa_cli.schema.other_tools import ABSENT, FLAGS, SYNONYMS
from pissa_cli.schema.recipe import Recipe
from pissa_cli.schema.yamlfile import KeyPath, Value, shown

ADAPTER_OPTIONS: dict[str, type[BaseModel]] = {
    options.model_fields["method"].default: options for options in get_args(get_args(AdapterOptions)[0])
}
SECTIONS = [name for name, field in Recipe.model_fields.items() if name not in ("output", "seed")]
CHATS = ("sharegpt", "openai", "messages", "chatml", "chat_template", "conversational")
"""Formats of conversations in other tools."""
IN_4_BITS = {
    "qpissa": "; QPiSSA is pissa with --bits 4 (model.bits)",
    "qlora": "; QLoRA is lora with --bits 4 (model.bits)",
}


def messages(error: ValidationError, values: Mapping[KeyPath, Value], tree: dict[str, Any]) -> list[str]:
    """One line a faulty key: source, whole path, what is wrong, nearest valid key. Unions report each key once."""
    by_path: dict[KeyPath, list[str]] = {}
    for item in error.errors(include_url=False):
        path = tuple(str(part) for part in item["loc"])
        if path[:1] == ("adapter",) and len(path) > 1 and path[1] in ADAPTER_OPTIONS:
            path = ("adapter", *path[2:])
        while path and not any(key[: len(path)] == path for key in values):  # pydantic's names for parts of a union
            path = path[:-1]
        text = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            text = _unknown_key(path, tree)
        elif item["type"] == "missing":
            text = f"{'.'.join(str(part) for part in item['loc'])}: needed, and not given"
        elif item["type"] == "union_tag_invalid":
            path, text = ("adapter", "method"), f"unknown method; known: {', '.join(ADAPTER_OPTIONS)}"
            text += _other_name(str(item["ctx"]["tag"]).lower())
        elif item["type"] == "bool_type":
            text = f"should be true or false (found {shown(item['input'])})"
        elif item["type"] == "list_type" and isinstance(item["input"], str):
            text = f"should be a list, [{item['input']}] (found {shown(item['input'])})"
        elif item["type"] in ("model_type", "model_attributes_type") and path in values:
            first = _keys(path, tree)[0]
            text = f"is a section with keys, as in {path[-1]}: {{{first}: VALUE}} (found {shown(values[path].value)})"
        else:
            text = f"{text[0].lower()}{text[1:]}"
            if path in values:
                number = item["type"] in ("float_type", "int_type", "literal_error") and "'" not in text
                quoted = "; without the quotes it is a number" if number and _is_number(item["input"]) else ""
                text += f" (found {shown(values[path].value)}{quoted})"
            if path == ("data", "format") and item["input"] in CHATS:
                text += "; here it is chat"
        by_path.setdefault(path, []).append(text)
    lines = []
    for path, texts in by_path.items():
        within = [key for key in values if key[: len(path)] == path]
        about = (*path, texts[0].split(":")[0])  # what is wrong with a section begins with a key of it
        near = [path] if path in values else [key for key in within if key[: len(about)] == about] or within
        source = values[near[0]].source if near else ""
        parts = (source if path else "", ".".join(path), " or ".join(dict.fromkeys(texts)))
        lines.append(": ".join(part for part in parts if part))
    return lines


def advice_on_flag(flag: str, command: str) -> str | None:
    """What to do in place of a flag that no command has but other tools, or a recipe: --lr, --learning-rate, and of
    learning_rate=1e-4 without a flag."""
    section, _, name = flag.lstrip("-").partition("=")[0].replace("-", "_").rpartition(".")
    if not section and name in FLAGS.get(command, {}):
        return FLAGS[command][name]
    if name in ABSENT:
        return ABSENT[name]
    if name in ("config", "config_file", "recipe"):
        return f"a recipe needs no flag: pissa {'train' if command.startswith('-') else command} RECIPE"
    sections = [section] if section in SECTIONS else sorted(SECTIONS, key=lambda one: one != command)
    owners = [one for one in sections if name in _keys((one,), {"adapter": {}})]
    own = f"{owners[0]}.{name}" if owners else ""
    flags = SYNONYMS if command == "eval" else {**SYNONYMS, "data": "data.train"}
    key, _, about = (own if section else flags.get(name, own)).partition(" ")
    return f"keys of a recipe are set like this: --set {key}=VALUE {about}".rstrip() if key else None


def _is_number(value: Any) -> bool:
    """Whether it is the text of one."""
    try:
        return isinstance(value, str) and math.isfinite(float(value))
    except ValueError:
        return False


def _other_name(method: str) -> str:
    """What another tool's name of a method is here."""
    if method.startswith("pissa_niter"):
        return "; PEFT's pissa_niter_N is pissa, whose accuracy is adapter.svd"
    return IN_4_BITS.get(method) or (f"; {ABSENT[method]}" if method in ABSENT else "")


def _unknown_key(path: KeyPath, tree: dict[str, Any]) -> str:
    section, key = path[:-1], path[-1]
    known = _keys(section, tree)
    if key in SYNONYMS:
        return f"unknown key; here it is {SYNONYMS[key]}"
    if key in ABSENT:
        return f"unknown key; {ABSENT[key]}"
    if section and key in Recipe.model_fields:
        return "misplaced key; it belongs at the top, beside the sections"
    methods = [name for name, options in ADAPTER_OPTIONS.items() if key in options.model_fields]
    elsewhere = ["adapter"] if methods and section != ("adapter",) else []
    owners = [name for name in SECTIONS if key in _keys((name,), tree)] or elsewhere
    if owners:
        return f"misplaced key; it belongs under '{owners[0]}'"
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if near:
        return f"unknown key; did you mean '{'.'.join((*section, near[0]))}'?"
    if methods:
        wanted = f"(it is one of {', '.join(methods)}); remove it, or --set adapter.{key}=null"
        return f"method {tree['adapter'].get('method')} has no such option {wanted}"
    return f"unknown key; known here: {', '.join(known)}"


def _keys(section: KeyPath, tree: dict[str, Any]) -> list[str]:
    if not section:
        return ["use", *Recipe.model_fields]
    if section == ("adapter",):
        adapter = tree.get("adapter")
        method = adapter.get("method", "pissa") if isinstance(adapter, dict) else "pissa"
        known = isinstance(method, str) and method in ADAPTER_OPTIONS
        return list(ADAPTER_OPTIONS[method].model_fields) if known else []
    model = Recipe.model_fields[section[0]].annotation if section[0] in Recipe.model_fields else None
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []
