"""From files and flags to a checked recipe: default < block < recipe < named flag < --set. Values keep their source."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pissa_cli.errors import UsageError
from pissa_cli.paths import RUN_RECIPE, as_recipe, holds_run, kind_of, located, run_around, run_with
from pissa_cli.schema.adapter_options import ScaledBase
from pissa_cli.schema.other_tools import ABSENT, SYNONYMS
from pissa_cli.schema.recipe import ModelSection, Recipe
from pissa_cli.schema.recipe_errors import SECTIONS, messages
from pissa_cli.schema.yamlfile import KeyPath, Value, parse_scalar, read_flat, require_plain, shown, write_yaml

PACKAGE = Path(__file__).resolve().parents[1]
PATTERNS = (("adapter", "rank_pattern"), ("adapter", "alpha_pattern"))
"""Mappings by names of layers, which have dots of their own."""
MOST_ERRORS = 100
NAMES = (("model", "name"), ("data", "train"), ("data", "eval"), ("output",))


@dataclass(frozen=True)
class Loaded:
    """A recipe, and where each of its values that is not a default was written."""

    recipe: Recipe
    sources: Mapping[KeyPath, str]


def shipped(kind: str) -> Path:
    """The folder `configs` or `recipes`: inside an installed package, beside it in a checkout."""
    inside = PACKAGE / kind
    return inside if inside.is_dir() else PACKAGE.parent / kind


def load(target: str | None, flags: Mapping[KeyPath, tuple[str, Any]], sets: Sequence[str] = ()) -> Loaded:
    """Load a recipe file, a run folder, or (with no target) the run in the output folder, else defaults plus flags.

    flags: `{("adapter", "rank"): ("--rank", 128)}`, those that were given; sets: texts such as "train.lr=3e-4".
    Raises UsageError naming the key's whole path, file and line, and the nearest valid key.
    """
    given = {key: Value(value, flag) for key, (flag, value) in flags.items()}
    given = _over(given, {key: value for text in sets for key, value in _parse_set(text).items()})
    _require_names(given)
    if target is None:
        folder = Path(str(given[("output",)].value if ("output",) in given else "out"))
        if holds_run(folder):
            return _load_unnamed(folder, given)
    return _load(target, given)


def _load_unnamed(folder: Path, given: Mapping[KeyPath, Value]) -> Loaded:
    """The run in the output folder, which nobody named: flags that do not go with it may be meant for a new one."""
    hint = f"{folder} holds a run, whose recipe was taken; name it to go on with it, or another folder with --output"
    try:
        return _load(str(folder), given)
    except UsageError as error:
        try:
            _load(None, {("model", "name"): Value("any", "--model"), **given})
        except UsageError as alone:
            if error.message == alone.message:
                raise error from None  # no recipe makes these flags right
        raise UsageError(error.message, f"{error.hint}; {hint}" if error.hint else hint) from None


def _load(target: str | None, given: Mapping[KeyPath, Value]) -> Loaded:
    file = find_recipe(target) if target is not None else None
    flat: dict[KeyPath, Value] = dict(read_flat(file)) if file else {}
    if file and (run := run_with(file)) is not None:
        flat[("output",)] = Value(str(run), "the run folder")
    _require_names(flat)
    flat = _over(flat, given)
    values = _blocks(flat)
    alias = _alias(flat)
    if alias is not None:
        values |= _read_block("model", alias)
        del flat[("model", "name")]
    values = _over(values, {key: value for key, value in flat.items() if key[0] != "use"})
    _locate_paths(values, file)
    return Loaded(_validate(values), {key: value.source for key, value in values.items()})


def find_recipe(target: str) -> Path:
    """The YAML file of a target: a run folder, a path, or the name of a recipe, the user's before the shipped ones."""
    path, kind = Path(target), kind_of(target)
    if kind == "folder" and kind_of(path / RUN_RECIPE) != "file":
        named = [folder for folder in (Path("recipes"), shipped("recipes")) if (folder / f"{target}.yaml").is_file()]
        if not named:
            instead = "give a recipe, or run `pissa init` first"
            if (run := run_around(path)) is not None:
                instead = f"it belongs to a run: name that, {run} (eval and export take --checkpoint N)"
                instead += f"; to train it on: --model {target} --output NEW" if path.name == "merged" else ""
            elif kind_of(path / "adapter_config.json"):
                instead = "it is an adapter: name the run that it comes from; to one that pissa has not made PEFT sees"
            elif kind_of(path / "config.json"):
                instead = "it is a model: init and train take it by --model; to score it: init, eval --compare-base"
            raise UsageError(f"{target}: not a run folder (no {RUN_RECIPE} in it)", instead)
        return named[0] / f"{target}.yaml"
    if kind == "folder":
        return path / RUN_RECIPE
    short = target.removeprefix("recipes/").removesuffix(".yaml")
    for candidate in (path, Path("recipes") / f"{short}.yaml", shipped("recipes") / f"{short}.yaml"):
        if kind_of(candidate) == "file":
            return as_recipe(candidate)
    known, runs = names_in(shipped("recipes")), [str(file.parent) for file in path.parent.glob(f"*/{RUN_RECIPE}")]
    near = difflib.get_close_matches(short.rstrip("/"), [*known, *runs], n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"shipped recipes: {', '.join(known)}"
    if target.endswith("/") and not near:
        hint = "`pissa init` and `pissa train` make a run; --output names its folder"
    what = "neither a file nor a folder" if kind == "other" else "no such recipe or run folder"
    raise UsageError(f"{target}: {what}", hint)


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML, with every default written out; enough to run again."""
    return write_yaml(recipe.model_dump(mode="json"))


def listing(loaded: Loaded) -> list[tuple[str, str, str]]:
    """Rows (key, value, source) of every value of the recipe, defaults included."""
    recipe, rows = loaded.recipe, list[tuple[str, str, str]]()
    by_other_keys: dict[KeyPath, Any] = {("train", "lr"): recipe.lr, ("train", "precision"): recipe.precision}
    if isinstance(recipe.adapter, ScaledBase) and recipe.adapter.rank != "auto":
        by_other_keys[("adapter", "alpha")] = float(recipe.adapter.rank)
    if "passes" in type(recipe.adapter).model_fields:
        by_other_keys[("adapter", "passes")] = recipe.passes
    if recipe.train.steps is None:
        by_other_keys[("train", "epochs")] = recipe.train.epochs or 1.0

    def walk(value: Any, path: KeyPath) -> None:
        if isinstance(value, dict) and (value or len(path) < 2):
            for key, child in value.items():
                walk(child, (*path, key))
        else:
            source = loaded.sources.get(path, "default")
            if value is None and path in by_other_keys:
                value, source = by_other_keys[path], "default, from other keys"
            long = isinstance(value, str) and "\n" in value
            text = json.dumps(value, ensure_ascii=False) if long else write_yaml(value, inline=True)
            rows.append((".".join(path), text, source))

    walk(loaded.recipe.model_dump(mode="json"), ())
    return rows


def _parse_set(text: str) -> dict[KeyPath, Value]:
    key, equals, value = text.partition("=")
    path = tuple(key.split("."))
    if path[:2] in PATTERNS and len(path) > 3:
        path = (*path[:2], ".".join(path[2:]))
    if not equals or not all(path):
        raise UsageError(
            f"--set {shown(text)}: expected key=value, e.g. --set train.lr=2e-5", "docs/recipes.md lists the keys"
        )
    return _leaves(path, parse_scalar(value, f"--set {key}"), f"--set {key}")


def _leaves(path: KeyPath, value: Any, source: str) -> dict[KeyPath, Value]:
    """The single values of a mapping, as files have them; an empty one is a value."""
    if not isinstance(value, dict) or not value:
        return {path: Value(value, source)}
    return {leaf: one for key, child in value.items() for leaf, one in _leaves((*path, key), child, source).items()}


def _is_name(key: KeyPath) -> bool:
    """Whether a value is a name that is looked up on the disk."""
    return key in NAMES or key[:2] == ("eval", "data") or key[0] == "use"


def _require_names(values: Mapping[KeyPath, Value]) -> None:
    """UsageError for text that cannot be written down, and for a name that no file can have."""
    for key, value in values.items():
        for text in (part for part in _parts(value.value) if isinstance(part, str)):
            source = f"{value.source}: {'.'.join(key)}"
            try:
                require_plain(text)
            except ValueError as error:
                raise UsageError(f"{source}: {error}", "write it without") from None
            if _is_name(key):
                kind_of(text, source)


def _over(lower: Mapping[KeyPath, Value], upper: Mapping[KeyPath, Value]) -> dict[KeyPath, Value]:
    """Both layers, the upper winning key by key. A length in steps above puts aside one in epochs below, and vice
    versa; an empty mapping above, or null by --set, empties one below; an empty section leaves it as it is."""
    emptied = {key for key, value in upper.items() if (value.value == {} or value.takes_back) and len(key) > 1}
    kept = {
        key: value for key, value in lower.items() if not any(key[:depth] in emptied for depth in range(2, len(key)))
    }
    for one, other in (("steps", "epochs"), ("epochs", "steps")):
        if ("train", one) in upper and upper[("train", one)].value is not None:
            kept.pop(("train", other), None)
    return {**kept, **upper}


def _blocks(flat: Mapping[KeyPath, Value]) -> dict[KeyPath, Value]:
    """The values of the blocks that `use` names."""
    uses = {key[1:]: v for key, v in flat.items() if key[0] == "use" and not (v.takes_back and len(key) > 1)}
    values: dict[KeyPath, Value] = {}
    for key, value in uses.items():
        if len(key) != 1 or key[0] not in SECTIONS or not isinstance(value.value, str):
            name = ".".join(("use", *key))
            raise UsageError(
                f"{value.source}: {name}: expected `use: {{section: block}}`", f"sections: {', '.join(SECTIONS)}"
            )
        values |= _read_block(key[0], value)
    return values


def _alias(flat: Mapping[KeyPath, Value]) -> Value | None:
    """The model's name if it is that of a block (`mistral-7b`); a folder of that name wins."""
    name = flat.get(("model", "name"))
    if name is None or not isinstance(name.value, str) or kind_of(name.value):
        return None
    return name if _block_file("model", name.value) else None


def _block_file(section: str, name: str) -> Path | None:
    file = f"{section}/{name}.yaml"
    candidates = (Path(name), Path("configs") / file, shipped("configs") / file)
    return next((path for path in candidates if path.suffix == ".yaml" and kind_of(path) == "file"), None)


def _read_block(section: str, name: Value) -> dict[KeyPath, Value]:
    file = _block_file(section, name.value)
    if file is None:
        known = names_in(shipped("configs") / section)
        near = difflib.get_close_matches(name.value, known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"blocks of {section}: {', '.join(known) or 'none'}"
        raise UsageError(f"{name.source}: no block '{name.value}' in configs/{section}", hint)
    values = {(section, *key): value for key, value in read_flat(file).items()}
    _require_names(values)
    return values


def names_in(folder: Path) -> list[str]:
    """Those of the blocks or recipes in a folder."""
    return sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml"))


def _locate_paths(values: dict[KeyPath, Value], file: Path | None) -> None:
    """Make local paths absolute: from the working directory, else from the recipe's folder, else from the package."""
    roots = [Path(), *([file.parent] if file else []), PACKAGE]
    for key, value in values.items():
        if _is_name(key) and key != ("output",):
            found = [located(one, roots, value.source) if isinstance(one, str) else one for one in _parts(value.value)]
            values[key] = Value(found if isinstance(value.value, list) else found[0], value.source)


def _parts(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _validate(values: Mapping[KeyPath, Value]) -> Recipe:
    tree: dict[str, Any] = {}
    for key, value in values.items():
        if value.takes_back and len(key) > 1:
            continue
        node = tree
        for part in key[:-1]:
            child = node.setdefault(part, {})
            if not isinstance(child, dict):
                raise UsageError(
                    f"{value.source}: {'.'.join(key)}: '{part}' was given as a single value elsewhere",
                    "give the section as keys with values in both places",
                )
            node = child
        if isinstance(node.get(key[-1]), dict) and not isinstance(value.value, dict):
            raise UsageError(
                f"{value.source}: {'.'.join(key)}: expected a section with keys, found {shown(value.value)}",
                "docs/recipes.md lists the keys of every section",
            )
        if value.value == {}:
            node.setdefault(key[-1], {})
        else:
            node[key[-1]] = value.value
    model = tree.get("model", {})
    unnamed = isinstance(model, dict) and "name" not in model and model.keys() <= ModelSection.model_fields.keys()
    if unnamed and not (SYNONYMS | ABSENT).keys() & tree.keys():
        known = ", ".join(names_in(shipped("configs") / "model"))
        raise UsageError(
            "model.name: no model given",
            f"give a recipe or a run folder; init and train take --model, too: a folder, Hub id or alias ({known})",
        )
    if isinstance(tree.get("adapter"), dict):
        tree["adapter"].setdefault("method", "pissa")
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        lines = messages(error, values, tree)
        more = [f"... and {len(lines) - MOST_ERRORS:,} more"] if len(lines) > MOST_ERRORS else []
        raise UsageError("\n".join([*lines[:MOST_ERRORS], *more]), None) from None
