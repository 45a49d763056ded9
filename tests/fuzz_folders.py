"""Mutated folders: runs and base models with files that are gone, damaged, of another shape, or lead elsewhere."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

JUNK: list[Any] = [
    *(None, True, False, 0, 1, -1, 3, 10**6, 2**40, 2**70, 0.5, float("nan"), 1e308, "", "a"),
    *("1", "../../x", "/etc/passwd"),
    *("\0", "\ud800", "x" * 5000, [], [1], ["a"], [[]], [None], {}, {"a": 1}, {"a": {"b": []}}),
    *([{}], "llama", "float32"),
]
NAMES = ["../../x", "/tmp/x", "", ".", "..", "a/b", "x" * 300, "\0", "model.safetensors", "__metadata__", "\u202e"]
DTYPES = [torch.float16, torch.float64, torch.int64, torch.bool, torch.uint8, torch.float8_e4m3fn, torch.complex64]


class Damage(NamedTuple):
    """One thing done to a folder: to which file (a number among those there are), what, and with what."""

    file: int
    kind: str
    number: int
    junk: Any


KINDS = {
    "any": (
        "remove",
        "empty",
        "truncate",
        "flip",
        "append",
        "folder",
        "out",
        "loop",
        "fifo",
        "dangling",
        "noise",
        "extra",
    ),
    "json": ("value", "value", "value", "key gone", "key new", "not an object", "encoding"),
    "safetensors": ("tensor gone", "tensor new", "shape", "dtype", "nan", "inf", "huge", "header", "names", "one bit"),
}


def damages() -> st.SearchStrategy[list[Damage]]:
    kinds = [*KINDS["any"], *KINDS["json"], *KINDS["safetensors"], *KINDS["json"], *KINDS["safetensors"]]
    numbers, junk = st.integers(0, 10**6), st.sampled_from(JUNK)
    one = st.builds(Damage, numbers, st.sampled_from(kinds), numbers, junk)
    return st.lists(one, min_size=1, max_size=2)


def damage(folder: Path, change: Damage, outside: Path) -> str:
    """Do it; returns the file it was done to. outside: what links that lead out lead to."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    suffix = next((suffix for suffix in ("json", "safetensors") if change.kind in KINDS[suffix]), None)
    if suffix is not None:
        files = [
            path for path in files if path.suffix == f".{suffix}" or (path.suffix == ".jsonl" and suffix == "json")
        ]
    places: list[Path] = (
        sorted({*files, *(path.parent for path in files)} - {folder}) if change.kind == "out" else files
    )
    if not places:
        return "nothing"
    path = places[change.file % len(places)]
    if suffix == "json" and path.suffix == ".json":
        _json(path, change)
    elif suffix == "safetensors":
        _safetensors(path, change)
    else:
        _any(path, change, folder, outside)
    return f"{change.kind} {path.relative_to(folder)}"


def _any(path: Path, change: Damage, folder: Path, outside: Path) -> None:
    content = path.read_bytes() if path.is_file() else b""
    place = change.number % max(1, len(content))
    if change.kind == "out":  # to a copy, so that what is read is right
        target = outside / path.name
        if path.is_dir():
            shutil.copytree(path, target, dirs_exist_ok=True)
            shutil.rmtree(path)
        else:
            shutil.move(path, target)
        path.symlink_to(target)
    elif change.kind in ("remove", "folder", "loop", "fifo", "dangling"):
        path.unlink()
        if change.kind == "folder":
            path.mkdir()
        elif change.kind == "loop":
            path.symlink_to(path.name)
        elif change.kind == "fifo":
            os.mkfifo(path)
        elif change.kind == "dangling":
            path.symlink_to(outside / "new")
    elif change.kind == "extra":
        names = (
            "eval",
            "merged",
            "base",
            "adapter",
            "metrics.jsonl",
            ".checkpoints.lock",
            "loss.png",
            "model.safetensors",
        )
        name = names[change.number % len(names)]
        if not os.path.lexists(folder / name):
            (folder / name).symlink_to(outside / name) if change.file % 2 else (folder / name).write_bytes(content)
    elif change.kind == "flip" and content:
        path.write_bytes(content[:place] + bytes([content[place] ^ (1 << change.file % 8)]) + content[place + 1 :])
    elif change.kind == "noise":
        path.write_bytes(os.urandom(0) + bytes((change.number * i) % 256 for i in range(200)))
    elif change.kind == "append":
        path.write_bytes(content + b"\0x" * 10)
    else:
        path.write_bytes(b"" if change.kind == "empty" else content[:place])


def _json(path: Path, change: Damage) -> None:
    try:
        content = json.loads(path.read_bytes())
    except ValueError:
        return
    if change.kind == "not an object":
        content = change.junk
    elif change.kind == "encoding":
        path.write_bytes(
            path.read_bytes()
            .decode(errors="replace")
            .encode(["utf-16", "utf-8-sig", "latin-1"][change.number % 3], "replace")
        )
        return
    else:
        places = [(holder, key) for holder in _holders(content) for key in _keys(holder)]
        if not places:
            return
        holder, key = places[change.number % len(places)]
        if change.kind == "key gone":
            del holder[key]
        elif change.kind == "key new" and isinstance(holder, dict):
            holder[NAMES[change.file % len(NAMES)]] = change.junk
        else:
            holder[key] = change.junk
    path.write_text(json.dumps(content))


def _keys(holder: Any) -> list[Any]:
    """At most 20: those of a tokenizer's vocabulary tell nothing new."""
    return (list(holder) if isinstance(holder, dict) else list(range(len(holder))))[:20]


def _holders(content: Any) -> Iterator[Any]:
    """Every mapping and list in a JSON document, at most 30, the outermost first."""
    left, count = [content], 0
    while left and count < 30:
        one = left.pop(0)
        if isinstance(one, dict | list):
            count += 1
            yield one
            left += [one[key] for key in _keys(one)]


def _safetensors(path: Path, change: Damage) -> None:
    if change.kind == "header":
        content = path.read_bytes()
        length = [0, 1, 7, 2**31, 2**63, 2**64 - 1, len(content), len(content) - 8][change.number % 8]
        path.write_bytes(struct.pack("<Q", length) + content[8:])
        return
    try:
        tensors = load_file(path)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
    except Exception:  # it is damaged already
        return
    name = sorted(tensors)[change.number % len(tensors)] if tensors else ""
    tensor = tensors.get(name, torch.zeros(2))
    if change.kind == "tensor gone":
        tensors.pop(name, None)
    elif change.kind == "tensor new":
        tensors[["x", "../../x", "base_model.model.x.lora_A.weight", "a.b.c|d"][change.file % 4]] = torch.ones(3, 2)
    elif change.kind == "names":
        tensors = {NAMES[change.file % len(NAMES)] if key == name else key: value for key, value in tensors.items()}
        tensors.pop("__metadata__", None)
    elif change.kind == "shape":
        more = tensor if tensor.ndim else tensor[None]
        shapes = [more[None], more.flatten(), more[:0], more.mT if more.ndim > 1 else more[1:], torch.cat([more, more])]
        tensors[name] = shapes[change.file % 5].contiguous().clone()
    elif change.kind == "dtype":
        tensors[name] = tensor.to(DTYPES[change.file % len(DTYPES)])
    elif tensor.is_floating_point() and tensor.numel():
        spoilt = tensor.clone()
        values = {"nan": float("nan"), "inf": float("inf"), "huge": 1e38}
        if change.kind == "one bit":
            bits = spoilt.view(-1).view(torch.uint8)
            bits[change.number % len(bits)] ^= 1 << change.file % 8
        else:
            spoilt.view(-1)[change.number % tensor.numel()] = values[change.kind]
        tensors[name] = spoilt
    try:
        save_file(tensors, path, metadata=metadata)
    except Exception:  # no file can hold it
        return
