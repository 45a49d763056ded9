"""Read rows of data: jsonl, json, csv, tsv and parquet files, or data on the Hub. A bad row is named, not lost."""

from __future__ import annotations

import codecs
import csv
import glob
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pissa_cli.errors import Unreachable, UsageError, first_line
from pissa_cli.paths import is_lfs_pointer, kind_of

Row = dict[str, Any]
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
LONGEST_CELL = 2**31 - 1
SAVED = ("dataset_dict.json", "state.json")
"""In a folder that `save_to_disk` of datasets has written, of several splits or of one."""
SHEETS, PACKED = (".xlsx", ".xls", ".ods"), (".gz", ".bz2", ".xz", ".zst", ".zip")


def read_rows(source: str, limit: int | None = None) -> Iterator[tuple[int, Row | str]]:
    """(number, row) of each row, counted from 1 (jsonl: the line); a text instead of a row says why it is unusable.

    `source` is a file, or `id`, `id:subset` or `id:subset:split` of a data set on the Hub (split: train).
    Raises UsageError for a missing, unreadable or unknown file, and a data set that cannot be reached.
    """
    rows = _file_rows(Path(source)) if is_local(source) else enumerate(map(_pruned, _hub_data(source)), start=1)
    for count, row in enumerate(rows):
        if count == limit:
            return
        yield row


def content_hash(source: str) -> str:
    """A hash of what `read_rows` reads: of the file's bytes and kind, or the data set's own fingerprint."""
    from pissa_cli.base.weights import hash_file

    if is_local(source):
        return f"{hash_file(Path(source))}{Path(source).suffix}"
    return f"{source} {_hub_data(source)._fingerprint}"


def text_of(row: Row, column: str) -> str:
    """The text of a column, numbers written out. Raises ValueError, with the reason, for anything else."""
    value = value_of(row, column)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise ValueError(f"'{column}' is {'missing' if value is None else 'not text'}")
    if has_surrogate(value):
        raise ValueError(f"'{column}' holds a broken character (a lone surrogate)")
    return value


def has_surrogate(text: str) -> bool:
    """Whether there is half of a character, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def value_of(row: Row, column: str) -> Any:
    """What a row has in a column; None for nothing, as which NaN counts: pandas writes it for an empty cell."""
    value = row.get(column)
    return None if isinstance(value, float) and math.isnan(value) else value


def is_local(source: str) -> bool:
    """Whether it is a local file of data; data on the Hub if not. UsageError for a path to anything else."""
    path, kind = Path(source), kind_of(source)
    if kind == "file":
        if path.suffix not in SUFFIXES:
            raise _not_rows(path)
        return True
    if kind == "other":
        raise UsageError(f"{source}: not a file of data, but a pipe or device", "write its rows into a file first")
    if kind == "folder":
        saved = any((path / name).is_file() for name in SAVED)
        hint = f"have datasets write it anew: {_anew(path)}" if saved else f"name a file in it ({', '.join(SUFFIXES)})"
        raise UsageError(f"{source}: a folder", hint)
    name, *rest = source.split(":")
    if "://" in source or Path(name).suffix in SUFFIXES or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise _not_there(source)
    if len(rest) > 2:
        raise UsageError(f"{source}: expected id, id:subset or id:subset:split", "e.g. openai/gsm8k:main:train")
    return False


def _not_rows(path: Path) -> UsageError:
    """For a file of another kind."""
    hint = f"use one of {', '.join(SUFFIXES)}"
    if path.suffix == ".ndjson":
        hint = f"rename it to {path.stem}.jsonl, which is the same"
    elif path.suffix == ".txt":
        hint = 'write its texts into a .jsonl file, one {"text": "..."} a line, and set data.format to text'
    elif path.suffix in SHEETS:
        hint = "save it as csv, in UTF-8"
    elif path.suffix in PACKED:
        hint = "unpack it"
    elif path.suffix == ".arrow":
        hint = f"have datasets write it anew: {_anew(path.parent)}"
    return UsageError(f"{path}: unknown kind of data file", hint)


def _anew(folder: Path) -> str:
    """Python that makes a file of a folder of `save_to_disk`."""
    split = "['train']" if (folder / SAVED[0]).is_file() else ""
    return f"load_from_disk({str(folder)!r}){split}.to_json({f'{folder.name}.jsonl'!r})"


def _not_there(source: str) -> UsageError:
    """For what names no file: what to write in its place, if it names something else."""
    hint, parts = "check the path, which counts from the working directory", source.replace(",", " ").split()
    found = sorted(filter(os.path.isfile, glob.glob(source)))  # noqa: PTH207
    files = found or [one for one in parts if all(map(os.path.isfile, parts))]
    if files:
        some = f"[{', '.join(files[:3])}{', ...' if len(files) > 3 else ''}]"
        hint = f"name one file; data.train and data.eval also take a list: {some}"
    elif os.path.isfile(name := re.split(r"[:\[]", source, maxsplit=1)[0]):  # noqa: PTH113
        hint = f"name the whole file, {name}; data.limit takes the first of its examples"
    elif "://" in source:
        hint = "download it, and name the file; a data set on the Hub is user/name"
    elif "[" in source:
        hint = "a data set on the Hub is id, id:subset or id:subset:split; data.limit takes the first of its examples"
    return UsageError(f"{source}: no such data file", hint)


def _file_rows(path: Path) -> Iterator[tuple[int, Row | str]]:
    try:
        if is_lfs_pointer(path):
            raise UsageError(f"{path}: a pointer of Git LFS, not the rows", "fetch them: git lfs pull")
        if path.suffix == ".parquet":
            yield from enumerate(_parquet_rows(path), start=1)
        elif path.suffix == ".jsonl":
            yield from _json_lines(path)
        elif path.suffix == ".json":
            yield from enumerate(_json_list(path), start=1)
        else:
            yield from _table_rows(path)
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})", "save it as UTF-8") from None
    except (OSError, csv.Error) as error:
        raise UsageError(f"{path}: cannot read: {error}", "check the file and the rights to read it") from None


def _table_rows(path: Path) -> Iterator[tuple[int, Row | str]]:
    tabs: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}  # a quotation mark is only that
    csv.field_size_limit(LONGEST_CELL)
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, strict=True, **tabs if path.suffix == ".tsv" else {})
        columns = list(reader.fieldnames or [])
        if any("\0" in column for column in columns):
            raise UsageError(f"{path}: NUL characters in its first line", "is it UTF-16? save it as UTF-8")
        _require_unlike(path, columns)
        try:
            for number, row in enumerate(reader, start=1):
                yield number, row if None not in row and None not in row.values() else "wrong number of columns"
        except csv.Error as error:
            raise UsageError(
                f"{path}: after line {reader.line_num}: {error}",
                "in csv a cell with a quotation mark is in quotation marks, and that mark written twice",
            ) from None


def _require_unlike(path: Path, columns: Sequence[str]) -> None:
    twice = [name for name, count in Counter(columns).items() if count > 1]
    if twice:
        raise UsageError(f"{path}: two columns are called '{twice[0]}'", "rename or remove one of them")


def _json_lines(path: Path) -> Iterator[tuple[int, Row | str]]:
    with path.open("rb") as file:
        if file.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise UsageError(f"{path}: UTF-16 text", "save it as UTF-8")
        if file.peek(256).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"[":
            raise UsageError(f"{path}: a JSON list, where each line is to be an object", "name it .json")
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    row = json.loads(line.decode("utf-8-sig"))
                except (ValueError, RecursionError):
                    yield number, "not JSON in UTF-8"
                    continue
                yield number, row if isinstance(row, dict) else "not a JSON object"


def _json_list(path: Path) -> Iterator[Row | str]:
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        hint = "one object a line belongs into a .jsonl file; a file that was cut short has to be brought again"
        raise UsageError(f"{path}: not valid JSON ({error})", hint) from None
    if not isinstance(content, list):
        raise UsageError(
            f"{path}: expected a JSON list of rows", "write [{...}, {...}], or one object a line into a .jsonl file"
        )
    for row in content:
        yield row if isinstance(row, dict) else "not a JSON object"


def _parquet_rows(path: Path) -> Iterator[Row]:
    from pyarrow import ArrowException, parquet

    try:
        file = parquet.ParquetFile(path)
        _require_unlike(path, file.schema_arrow.names)
        for batch in file.iter_batches():
            yield from map(_pruned, batch.to_pylist())
    except UnicodeDecodeError:
        raise
    except (ArrowException, OverflowError, ValueError) as error:  # the latter two of dates that Python cannot hold
        raise UsageError(f"{path}: not a readable parquet file ({error})", "download or write it again") from None


def _pruned(row: Row) -> Row:
    """A row of a table, which gives all objects of a column the same keys, and None for what one of them lacks. Within
    an object (a call's arguments) such keys are removed; the object itself (a message) keeps its own."""
    return {
        column: [_kept(inner) for inner in value] if isinstance(value, list) else _kept(value)
        for column, value in row.items()
    }


def _kept(value: Any) -> Any:
    return {key: _without_none(inner) for key, inner in value.items()} if isinstance(value, dict) else value


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    return [_without_none(inner) for inner in value] if isinstance(value, list) else value


def _hub_data(source: str) -> Any:
    import datasets

    name, *rest = source.split(":")
    try:
        subset = rest[0] if rest and rest[0] else None
        return datasets.load_dataset(name, subset, split=rest[1] if len(rest) == 2 else "train")
    except Exception as error:  # the Hub, the network and the data set's own files each raise their own kinds
        raise Unreachable(
            f"{name}: cannot get this data set from the Hub ({type(error).__name__}: {first_line(error)})",
            "check the id and the network, or give a local jsonl, json, csv, tsv or parquet file",
        ) from None
