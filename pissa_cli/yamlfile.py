"""Read YAML strictly: duplicate keys and aliases are refused, `3e-4` is a number, every value keeps its line."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pissa_cli.errors import UsageError

MAX_BYTES = 1_000_000
MAX_DEPTH = 20

_FLOAT = re.compile(r"^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?(?:[eE][-+]?[0-9]+)?$|^[-+]?\.[0-9_]+(?:[eE][-+]?[0-9]+)?$")


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads `3e-4` and `1e5` as numbers (YAML 1.2), which PyYAML leaves as strings."""


_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
for _first in "-+.0123456789":
    _Loader.yaml_implicit_resolvers.setdefault(_first, []).append(("tag:yaml.org,2002:float", _FLOAT))


@dataclass(frozen=True)
class Value:
    """One leaf of a recipe and where it was written, e.g. `recipes/gsm8k.yaml:7`."""

    value: Any
    source: str


def parse_scalar(text: str) -> Any:
    """The value of `c` in `--set a.b=c`, read by the rules of the files."""
    try:
        value = yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise UsageError(
            f"cannot read {text!r} as a YAML value: {error}", "quote text with special characters"
        ) from None
    if isinstance(value, dict) and any(v is None and ":" in str(key) for key, v in value.items()):
        raise UsageError(f"{text}: YAML wants a space after the colon", "as in {q_proj: 8}")
    return value


KeyPath = tuple[str, ...]


def read_flat(path: Path) -> dict[KeyPath, Value]:
    """Read a YAML mapping as `{("train", "lr"): Value}`; nested mappings are flattened, lists are values.

    Raises UsageError naming file and line for a missing, unreadable, too large or malformed file, a duplicate key,
    a key that is not a string, and anchors or aliases.
    """
    text = _read_text(path)
    try:
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
            raise UsageError(f"{path}: YAML aliases (*name) are not supported in recipes", "write the value out")
        root = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UsageError(
            f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}",
            "mend this line; text with : or # in it needs quotes",
        ) from None
    except RecursionError:
        raise UsageError(f"{path}: nested too deeply", "a recipe has sections with keys, no deeper") from None
    flat: dict[KeyPath, Value] = {}
    if root is not None:
        if not isinstance(root, yaml.MappingNode):
            raise UsageError(
                f"{path}: expected keys and values, found {_kind(root)}",
                "write sections with keys, e.g. model: {name: ...}",
            )
        _flatten(root, (), path, flat)
    return flat


def _read_text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UsageError(
                f"{path}: larger than {MAX_BYTES:,} bytes; is this a recipe?", "give the recipe file, or a run folder"
            )
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})", "save it as UTF-8") from None
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}", "check the path and the rights to read it") from None


def _flatten(node: yaml.MappingNode, prefix: KeyPath, path: Path, flat: dict[KeyPath, Value]) -> None:
    if len(prefix) > MAX_DEPTH:
        raise UsageError(
            f"{path}:{node.start_mark.line + 1}: nested too deeply", "a recipe has sections with keys, no deeper"
        )
    seen: dict[str, int] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if key_node.tag != "tag:yaml.org,2002:str":
            raise UsageError(
                f"{path}:{line}: a key must be plain text, found {key_node.value!r}",
                "put the key in quotes, or check the indentation",
            )
        key = key_node.value
        full = (*prefix, key)
        if key in seen:
            raise UsageError(
                f"{path}:{line}: duplicate key '{'.'.join(full)}', first given in line {seen[key]}",
                "remove one of them",
            )
        seen[key] = line
        if isinstance(value_node, yaml.MappingNode) and value_node.value:
            _flatten(value_node, full, path, flat)
        else:
            flat[full] = Value(_construct(value_node, path), f"{path}:{line}")


def _construct(node: yaml.Node, path: Path) -> Any:
    loader = _Loader("")
    try:
        return loader.construct_object(node, deep=True)
    except (yaml.YAMLError, ValueError) as error:
        raise UsageError(
            f"{path}:{node.start_mark.line + 1}: cannot read this value: {error}",
            "write a text, number, list or true/false",
        ) from None
    finally:
        loader.dispose()


def _kind(node: yaml.Node) -> str:
    return "a list" if isinstance(node, yaml.SequenceNode) else "a single value"
