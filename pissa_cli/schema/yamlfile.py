"""Read YAML strictly, by version 1.2: duplicate keys, aliases and tags are refused, every value keeps its line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pissa_cli.errors import UsageError

MAX_BYTES = 1_000_000
MAX_DEPTH = 20
SHOWN = 200

_SCALARS = {
    "null": ("~nN", r"~|null|Null|NULL"),
    "bool": ("tTfF", r"true|True|TRUE|false|False|FALSE"),
    "int": ("-+0123456789", r"[-+]?[0-9][0-9_]*"),
    "float": (
        "-+.0123456789",
        r"[-+]?(?:[0-9][0-9_]*\.?|[0-9][0-9_]*\.[0-9_]+|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
    ),
}
"""Kind of value: the characters that it may begin with, and all that it may be. Anything else is text."""
_RESOLVERS: dict[str, list[tuple[str, re.Pattern[str]]]] = {"": [("tag:yaml.org,2002:null", re.compile("$"))]}
for _kind_of_value, (_firsts, _pattern) in _SCALARS.items():
    for _first in _firsts:
        _RESOLVERS.setdefault(_first, []).append(
            (f"tag:yaml.org,2002:{_kind_of_value}", re.compile(rf"^(?:{_pattern})$"))
        )


class _Unsupported(yaml.MarkedYAMLError):
    """YAML that recipes do without."""


class _Loader(yaml.SafeLoader):
    """SafeLoader by YAML 1.2, where PyYAML reads 1.1: `3e-4` and `010` are numbers, `no` and `1:30` are text.

    Refuses anchors, aliases and tags, and what is nested too deeply, before it reads on.
    """

    yaml_implicit_resolvers = _RESOLVERS
    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()
        problem = None
        if event.anchor is not None:
            problem = "YAML anchors and aliases (&name, *name) are not supported; write the value out"
        elif event.tag is not None:
            problem = "YAML tags (!name) are not supported; write the value alone, in quotes if it is text"
        elif self._depth == MAX_DEPTH:
            problem = "nested too deeply"
        if problem is not None:
            raise _Unsupported(problem=problem, problem_mark=event.start_mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


def _construct_int(_: Any, node: Any) -> int:
    return int(node.value.replace("_", ""))


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


_QUOTED = {
    first: [*yaml.SafeLoader.yaml_implicit_resolvers.get(first, []), *_RESOLVERS.get(first, [])]
    for first in {*yaml.SafeLoader.yaml_implicit_resolvers, *_RESOLVERS}
}


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes the texts that `_Loader`, or another reader, would not read as text."""

    yaml_implicit_resolvers = _QUOTED


@dataclass(frozen=True)
class Value:
    """One leaf of a recipe and where it was written, e.g. `recipes/gsm8k.yaml:7`."""

    value: Any
    source: str

    @property
    def takes_back(self) -> bool:
        """Whether this is `--set key=null`, by which a value of the recipe goes back to its default."""
        return self.value is None and self.source.startswith("--set ")


KeyPath = tuple[str, ...]


SHELL = (
    "text with : or { or # in it, or * or & before it, needs quotes that the shell leaves: --set 'key=\"a: b\"'; "
    "single ones where it has a backslash"
)


def parse_scalar(text: str, source: str) -> Any:
    """The value of `c` in `--set a.b=c`, read by the rules of the files; source: `--set a.b`."""
    node = _compose(text, source, SHELL)
    if (text if node is None else text[node.end_mark.index :]).lstrip().startswith("#"):
        raise UsageError(f"{source}={text}: in YAML what follows # is a comment", SHELL)
    value = None if node is None else _construct(node, source)
    if isinstance(value, dict) and any(v is None and ":" in str(key) for key, v in value.items()):
        raise UsageError(f"{source}={text}: YAML wants a space after the colon", "as in {q_proj: 8}")
    return value


def read_flat(path: Path) -> dict[KeyPath, Value]:
    """Read a YAML mapping as `{("train", "lr"): Value}`; nested mappings are flattened, lists are values.

    Raises UsageError naming file and line for a missing, unreadable, too large or malformed file, a duplicate key,
    a key that is not printable text, anchors, aliases and tags.
    """
    root = _compose(_read_text(path), str(path))
    flat: dict[KeyPath, Value] = {}
    if root is not None:
        if not isinstance(root, yaml.MappingNode):
            raise UsageError(
                f"{path}: expected keys and values, found {_kind(root)}",
                "write sections with keys, e.g. model: {name: ...}",
            )
        _flatten(root, (), str(path), flat)
    return flat


def write_yaml(content: Any, inline: bool = False) -> str:
    """YAML text that reads back as `content`; inline: in one line, without its end."""
    options: dict[str, Any] = {"sort_keys": False, "allow_unicode": True}
    if inline:
        options |= {"default_flow_style": True, "width": 10**6}
    text: str = yaml.dump(content, Dumper=_Dumper, **options)
    return text.removesuffix("\n...\n").strip() if inline else text


def shown(value: Any) -> str:
    """A value for a message: in quotes where it is text, and not too long."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]} ... ({len(text):,} characters)"


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


def _compose(
    text: str, where: str, hint: str = "mend this line; text with : or # in it needs quotes"
) -> yaml.Node | None:
    """The one document in a text. where: its source, to which messages add the line."""
    try:
        return yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        place = _place(where, getattr(error, "problem_mark", None))
        kind = "" if isinstance(error, _Unsupported) else "not valid YAML: "
        raise UsageError(f"{place}: {kind}{getattr(error, 'problem', None) or error}", hint) from None


def _flatten(node: yaml.MappingNode, prefix: KeyPath, where: str, flat: dict[KeyPath, Value]) -> None:
    for key, value_node, place in _entries(node, prefix, where):
        full = (*prefix, key)
        if isinstance(value_node, yaml.MappingNode) and value_node.value:
            _flatten(value_node, full, where, flat)
        else:
            flat[full] = Value(_construct(value_node, where, full), place)


def _entries(node: yaml.MappingNode, prefix: KeyPath, where: str) -> Iterator[tuple[str, yaml.Node, str]]:
    """(key, value, where the key is) of a mapping."""
    seen: dict[str, int] = {}
    for key_node, value_node in node.value:
        place, line = _place(where, key_node.start_mark), key_node.start_mark.line + 1
        key = key_node.value
        if key_node.tag != "tag:yaml.org,2002:str" or not key.isprintable():
            found = shown(key) if isinstance(key_node, yaml.ScalarNode) else _kind(key_node)
            raise UsageError(
                f"{place}: a key must be plain text, found {found}", "put the key in quotes, or check the indentation"
            )
        if key in seen:
            full = shown(".".join((*prefix, key)))
            raise UsageError(f"{place}: duplicate key {full}, first given in line {seen[key]}", "remove one of them")
        seen[key] = line
        yield key, value_node, place


def _construct(node: yaml.Node, where: str, path: KeyPath = ()) -> Any:
    if isinstance(node, yaml.MappingNode):
        return {key: _construct(value, where, (*path, key)) for key, value, _ in _entries(node, path, where)}
    if isinstance(node, yaml.SequenceNode):
        return [_construct(child, where, (*path, "")) for child in node.value]
    loader = _Loader("")
    try:
        value = loader.construct_object(node)
        require_plain(value)
    except (yaml.YAMLError, ValueError) as error:
        raise UsageError(
            f"{_place(where, node.start_mark)}: cannot read this value: {error}",
            "write a text, number, list or true/false",
        ) from None
    finally:
        loader.dispose()
    return value


def require_plain(value: Any) -> None:
    """Raise ValueError for a scalar that no file and no message can hold: text with a character that is none, and a
    whole number of more than 64 bits."""
    if isinstance(value, str) and ("\0" in value or any("\ud800" <= character <= "\udfff" for character in value)):
        raise ValueError("text with a NUL or half a surrogate pair")
    if isinstance(value, int) and abs(value) >= 2**64:
        raise ValueError("a number of more than 64 bits")


def _place(where: str, mark: Any) -> str:
    return where if mark is None else f"{where}:{mark.line + 1}"


def _kind(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return "a single value"
    return "a list" if isinstance(node, yaml.SequenceNode) else "keys and values"
