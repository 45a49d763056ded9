"""Mutated data files: rows with fields that nobody expects, and files that are not what their name says."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import strategies as st

FORMATS = {
    "alpaca": {"instruction": "Add 1 and 2.", "input": "", "output": "3"},
    "prompt": {"prompt": "1 + 2 =", "completion": " 3"},
    "text": {"text": "Anna has 3 apples."},
    "chat": {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]},
    "classification": {"text": "good", "text_pair": "bad", "label": "yes"},
    "glue/mrpc": {"sentence1": "a", "sentence2": "b", "label": 1},
    "glue/stsb": {"sentence1": "a", "sentence2": "b", "score": 2.5},
    "glue/cola": {"sentence": "a", "label": 0},
}
BENCHES = {
    "gsm8k": {"question": "1 + 1?", "answer": "It is 2. #### 2"},
    "math": {"problem": "1 + 1?", "solution": "It is $\\boxed{2}$."},
    "humaneval": {"task_id": "a/0", "prompt": "def f():\n", "test": "def check(f): pass", "entry_point": "f"},
    "mbpp": {"task_id": 1, "text": "Write f.", "code": "f = 1", "test_list": ["assert f"]},
}
LABELS = {"classification": ["no", "yes"], "glue/mrpc": ["not_equivalent", "equivalent"], "glue/stsb": ["score"]}
LABELS["glue/cola"] = ["unacceptable", "acceptable"]
VALUES: list[Any] = [
    *("", " ", "\n\t\r\n", "a", "0", "1", "yes", "<eos>", "<pad>", "<eos><eos>", "<|endoftext|>", "[INST]", "\ud800"),
    *("a\ud800b", "\udfff\ud800", "\0", "a\0b", "\x01\x02\x1b[2J", "\u202eabc", "\u2028", "\ufeff"),
    *("😀", "﷽", "e\u0301"),
    *("{instruction}{output}", "{input}", "%s", "[red]", "\\boxed{", "\\boxed{}", "\\boxed "),
    *("#### ", "#### nan", "\x85"),
    *("#### 1e999", "#### 1/0", "#### 1,2,3", "#### 😀", "#### -", f"#### {'9' * 5000}", "\\frac", "\\boxed{\\frac}"),
    *("1" * 300, "x" * 100_000, " " * 20_000, "<eos>" * 2000, "\u0300" * 3000, "word " * 200_000),
    *(None, True, False, 0, 1, 2, -1, 3, 0.5, 2.5, 1e308, float("nan"), float("inf"), -float("inf"), 2**70, 10**400),
    *([], {}, [[]], ["a"], [None], {"a": 1}, [1, "a"], {"role": "user"}, [{}], [{"a": []}], [{"role": "user"}]),
]
TEXTS: list[Any] = [value for value in VALUES if isinstance(value, str)]
ROLES: list[Any] = ["user", "assistant", "system", "tool", "function", "Assistant", "", None, 1, ["user"]]
LINES = [
    *(b"", b"   ", b"null", b"1", b"[]", b"{}", b'"a"', b"{", b"}", b'{"a": }', b"NaN"),
    *(b"\xef\xbb\xbf{}", b"\x00", b"\xff"),
    *(b'{"instruction": "\\ud800", "output": "b"}', b'{"text": "a\xff"}'),
    *(b"[" * 100_000, b'{"a": ' * 30_000, b"1" * 5000),
    *(b'{"a": 1, "a": 2}', b"//", b"# x", b"\xed\xa0\x80", b"\xff\xfe{\x00}\x00", b"a,b,c", b'"'),
    *(b"\t\t\t", b"\r", b"'"),
]
SUFFIXES = ("jsonl", "json", "csv", "tsv", "parquet")
SPECIAL = ("folder", "loop", "fifo", "dangling", "device", "missing", "empty", "gzip", "newline", "no permission")


class Data(NamedTuple):
    """A file to write: its format, name, bytes, or what it is instead of a file."""

    format: str
    suffix: str
    content: bytes
    special: str


@st.composite
def mutated(draw: st.DrawFn, formats: dict[str, dict[str, Any]]) -> Data:
    """A data file of one of `formats`."""
    name = draw(st.sampled_from(sorted(formats)))
    rows = [_row(draw, formats[name]) for _ in range(draw(st.sampled_from([0, 1, 2, 2, 3, 5])))]
    if rows and draw(st.integers(0, 2)):
        rows.append(dict(formats[name]))  # so that the set is of use
    suffix = draw(st.sampled_from(SUFFIXES))
    content = _serialized(draw, rows, suffix)
    if draw(st.integers(0, 3)) == 0:
        content = _damaged(draw, content)
    special = draw(st.sampled_from(SPECIAL)) if draw(st.integers(0, 25)) == 0 else ""
    return Data(name, suffix, content, special)


def place(data: Data, folder: Path) -> Path:
    """Write it."""
    path = folder / f"rows.{data.suffix}"
    if data.special == "folder":
        path.mkdir()
    elif data.special == "loop":
        path.symlink_to(path)
    elif data.special == "fifo":
        os.mkfifo(path)
    elif data.special == "dangling":
        path.symlink_to(folder / "nowhere")
    elif data.special == "device":
        path.symlink_to("/dev/zero")
    elif data.special != "missing":
        content = {"empty": b"", "gzip": gzip.compress(data.content), "newline": b"\n"}.get(data.special, data.content)
        path.write_bytes(content)
        if data.special == "no permission":
            path.chmod(0)
    return path


def _row(draw: st.DrawFn, good: dict[str, Any]) -> dict[str, Any]:
    row = dict(good)
    for _ in range(draw(st.integers(0, 2))):
        key = draw(st.sampled_from(sorted(good)))
        kind = draw(st.integers(0, 9))
        if kind <= 5:
            row[key] = draw(st.sampled_from(VALUES))
        elif kind == 6:
            row.pop(key, None)
        elif kind == 7:
            row[draw(st.sampled_from(["", "x", key.upper(), "\ud800", "__class__", "a" * 3000]))] = 1
        elif isinstance(good[key], list):
            row[key] = [_message(draw) for _ in range(draw(st.integers(0, 4)))]
        else:
            row[key] = draw(st.text(max_size=20))
    return row


def _message(draw: st.DrawFn) -> Any:
    message = {"role": draw(st.sampled_from(ROLES[:3])), "content": draw(st.sampled_from(TEXTS[:20]))}
    kind = draw(st.integers(0, 7))
    if kind == 0:
        message["role"] = draw(st.sampled_from(ROLES))
    elif kind == 1:
        message["content"] = draw(st.sampled_from(VALUES))
    elif kind == 2:
        message["tool_calls"] = draw(st.sampled_from(VALUES))
    elif kind == 3:
        del message[draw(st.sampled_from(["role", "content"]))]
    return message


def _serialized(draw: st.DrawFn, rows: list[dict[str, Any]], suffix: str) -> bytes:
    ascii_only = draw(st.booleans())
    if suffix == "json":
        whole: Any = (
            rows if draw(st.integers(0, 7)) else draw(st.sampled_from([{"rows": rows}, rows[:1], None, rows * 2]))
        )
        return json.dumps(whole, ensure_ascii=ascii_only).encode(errors="surrogatepass")
    if suffix == "jsonl":
        lines = [json.dumps(row, ensure_ascii=ascii_only).encode(errors="surrogatepass") for row in rows]
        if draw(st.integers(0, 2)) == 0:
            lines.insert(draw(st.integers(0, len(lines))), draw(st.sampled_from(LINES)))
        return draw(st.sampled_from([b"\n", b"\n", b"\n", b"\r\n", b"\n\n", b"\r"])).join([*lines, b""])
    if suffix == "parquet":
        return _parquet(rows)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    if columns and draw(st.integers(0, 4)) == 0:
        columns.append(draw(st.sampled_from([columns[0], "", "x", " "])))
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter="\t" if suffix == "tsv" else ",", escapechar="\\", strict=False)
    for line in [columns, *[[row.get(column, "") for column in columns] for row in rows]]:
        odd = draw(st.integers(0, 9))
        writer.writerow(line[:-1] if odd == 0 else [*line, "x"] if odd == 1 else line)
    return text.getvalue().encode(errors="surrogatepass")


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow
    from pyarrow import parquet

    out = io.BytesIO()
    try:
        table = pyarrow.Table.from_pylist(rows)
        parquet.write_table(table, out)
    except (pyarrow.ArrowException, OverflowError, UnicodeEncodeError, KeyError, TypeError):  # no such column can be
        table = pyarrow.Table.from_pylist(
            [{key: ascii(value)[:50] for key, value in row.items() if key.isascii()} for row in rows]
        )
        parquet.write_table(table, out)
    return out.getvalue()


def _damaged(draw: st.DrawFn, content: bytes) -> bytes:
    kind = draw(st.integers(0, 7))
    if kind == 0:
        return content[: draw(st.integers(0, len(content)))]
    if kind == 1:
        encoding = draw(st.sampled_from(["utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252"]))
        return content.decode(errors="replace").encode(encoding, errors="replace")
    if kind == 2:
        return b"\xef\xbb\xbf" + content
    if kind == 3:
        return content * 2
    if kind == 4:
        return content.replace(b'"', draw(st.sampled_from([b"'", b"", b'""', b"\\"])))
    place = draw(st.integers(0, max(0, len(content) - 1)))
    if kind == 5:
        return content[:place] + draw(st.binary(min_size=1, max_size=8)) + content[place + 1 :]
    if kind == 6 and content:
        return content[:place] + bytes([content[place] ^ (1 << draw(st.integers(0, 7)))]) + content[place + 1 :]
    return content[:place] + draw(st.sampled_from([b"\0", b"\xff", b"\n", b'"', b"\xed\xa0\x80"])) + content[place:]
