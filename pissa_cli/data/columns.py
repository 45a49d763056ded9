"""The columns that rows and files have, and those that a format reads. Knows no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pissa_cli.data.rows import is_local, read_rows
from pissa_cli.errors import UsageError
from pissa_cli.schema.data_options import FIELDS, OPTIONAL_FIELDS, DataSection, held_out_sources, sources_of
from pissa_cli.schema.glue import GLUE
from pissa_cli.schema.recipe import Recipe

FIRST_ROWS = 1000
"""Of a file, in which every column has to come; training asks the same of so many."""

PREFERRED = {"prompt", "completion", "label"}
"""The columns of KTO's rows; the label, true or false, says whether the completion is one to imitate."""
ASKED, ANSWERED = ("question", "query", "problem", "prompt", "input"), ("answer", "response", "solution", "completion")
USUAL = {"instruction": ASKED, "prompt": ASKED, "output": ANSWERED, "completion": ANSWERED}
"""What else data sets call these fields."""


def label_columns(section: DataSection, columns: Sequence[str]) -> dict[str, str]:
    """text, text_pair where there is such a column, and label: the columns of rows that have these `columns`."""
    if section.glue is not None:
        texts, label = GLUE[section.glue].columns(dict.fromkeys(columns))
        return dict(zip(("text", "text_pair"), texts, strict=False)) | {"label": label}
    pair = section.optional_column("text_pair")
    has_pair = pair in columns or "text_pair" in section.columns
    fields = ("text", "text_pair", "label") if has_pair else ("text", "label")
    return {name: section.column(name) for name in fields}


def preference(section: DataSection, row: Mapping[str, Any]) -> str | None:
    """true or false, the label of a row of KTO's; None for other rows, and where the label is what is learned."""
    if section.classifies or "label" in section.columns.values() or not row.keys() >= PREFERRED:
        return None
    said = str(row["label"]).lower()
    return said if said in ("true", "false") else None


def unused_columns(section: DataSection, columns: Mapping[str, Any]) -> list[str]:
    """The columns, with a value of each, that a format does not read; those of GLUE's own files are known."""
    if section.glue is not None:
        return []
    needed = {section.column(name) for name in FIELDS[section.format]}
    read = needed | {section.optional_column(name) for name in OPTIONAL_FIELDS.get(section.format, ())}
    read |= {"label"} if preference(section, columns) else set()
    return [column for column in columns if column not in read]


def require_columns(source: str, section: DataSection, columns: Mapping[str, Any], whole: bool) -> None:
    """UsageError if `columns`, those of the rows with a value of each, lack one that the format needs, or to which
    `data.columns` maps.

    whole: they are those of all rows. If not, the column of an optional field may still come in a later row.
    """
    wanted = {name: section.column(name) for name in FIELDS.get(section.format, ())}
    if section.classifies:
        wanted = label_columns(section, list(columns))
    if whole:
        optional = OPTIONAL_FIELDS.get(section.format, ())
        wanted |= {name: section.columns[name] for name in optional if name in section.columns}
    missing = {name: column for name, column in wanted.items() if column not in columns}
    prompt = wanted.get("prompt", "")
    if not missing and isinstance(columns.get(prompt), list):
        chat = _chat_of(prompt, wanted["completion"])
        raise UsageError(f"{source}: '{prompt}' is a list and no text (format prompt)", f"of messages: data: {chat}")
    if not columns or not missing:
        return
    other = _format_of(columns)
    mapped = next((name for name in missing if name in section.columns), None)
    if source in sources_of(section.train)[1:] or source in sources_of(section.eval)[1:]:
        hint = "all files of a list have the same columns: rename them in this one"
    elif mapped is not None:
        hint = f"data.columns maps '{mapped}' to it; map '{mapped}' to one of these"
    elif len(columns) == 1 and any(mark in next(iter(columns)) for mark in ";\t|"):
        hint = "cells are separated by commas in a csv, by tabs in a tsv file: save it so"
    elif {"chosen", "rejected"} <= set(columns) and isinstance(columns.get("prompt"), list):
        chosen = _chat_of("prompt", "chosen")
        hint = f"preferences are not trained here, but what was chosen can be: data: {chosen}"
    elif {"chosen", "rejected"} <= set(columns):
        hint = "preferences are not trained here, but what was chosen can be: map it to a field, as "
        hint += "{format: prompt, columns: {completion: chosen}} or {format: chat, columns: {messages: chosen}}"
    elif set(columns) >= PREFERRED:
        hint = f"preferences are not trained here, but rows whose label is true can be: data: {other}"
    elif other is not None:
        hint = f"these are columns of another format: data: {other}"
    else:
        form = "" if section.glue is None else "--set data.format=classification "
        free = columns.keys() - section.columns.values()
        usual = {name: next((c for c in USUAL.get(name, ()) if c in free), "<column>") for name in missing}
        fields = ", ".join(f"{name}: {column}" for name, column in (section.columns | usual).items())
        hint = f"say which they are, here or so in the recipe: {form}--set 'data.columns={{{fields}}}'"
    named = [f"'{column}'" if column == name else f"'{column}' for '{name}'" for name, column in missing.items()]
    raise UsageError(
        f"{source}: no column {', '.join(named)} (format {section.format}); it has: {', '.join(columns)}", hint
    )


def _format_of(columns: Mapping[str, Any]) -> str | None:
    """What data.format (and columns) rows with such columns would be read by, of those that are not classified."""
    if "conversations" in columns:
        return _chat_of("conversations")
    if "completion" in columns and isinstance(columns.get("prompt"), list):
        return _chat_of("prompt")
    formats = ("chat", "alpaca", "prompt", "text")
    found = next((name for name in formats if set(FIELDS[name]) <= set(columns)), None)
    said = next((name for name, value in columns.items() if _holds_messages(value)), None)
    if found is None and said is not None:
        return _chat_of(said)
    return None if found is None else f"{{format: {found}}}"


def _holds_messages(value: Any) -> bool:
    keys = set(value[0]) if isinstance(value, list) and value and isinstance(value[0], dict) else set()
    return {"role", "content"} <= keys or {"from", "value"} <= keys


def _chat_of(messages: str, completion: str | None = None) -> str:
    known = completion is None or (messages, completion) == ("prompt", "completion")
    answer = "" if known else f", completion: {completion}"
    return f"{{format: chat, columns: {{messages: {messages}{answer}}}}}"


def require_data(recipe: Recipe) -> None:
    """UsageError where there is nothing to train on."""
    if recipe.data.train is None:
        raise UsageError("data.train: no training data given", "name a file or a Hub id: --set data.train=file.jsonl")


def require_rows(recipe: Recipe) -> None:
    """UsageError for local files of data that are not there or lack a column in their first rows. Data on the Hub is
    not looked at."""
    for source in dict.fromkeys(sources_of(recipe.data.train) + held_out_sources(recipe.data)):
        check_columns(source, recipe)


def check_columns(source: str, recipe: Recipe) -> None:
    """UsageError for a local file that is not there or lacks a column in its first rows."""
    if not is_local(source):
        return
    columns: dict[str, Any] = {}
    count, reason = 0, "it is empty"
    for count, (_, row) in enumerate(read_rows(source, FIRST_ROWS), start=1):
        if isinstance(row, dict):
            columns |= {name: value for name, value in row.items() if name not in columns}
        if count == 1:
            reason = row if isinstance(row, str) else "its rows are empty"
    whole = count < FIRST_ROWS
    require_columns(source, recipe.data, columns, whole)
    if whole and not columns:
        raise UsageError(f"{source}: no usable row ({reason})", "is this the file?")
