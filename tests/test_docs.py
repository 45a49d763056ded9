"""What the documentation and the shipped files say is true."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest

from pissa_cli.cli import app
from pissa_cli.recipe import AdapterOptions, Recipe, json_schema
from pissa_cli.recipe_file import load, shipped

ROOT = Path(__file__).resolve().parents[1]


def key_table() -> str:
    """The table of docs/recipes.md, from the schema."""
    lines = ["| key | default | meaning |", "|---|---|---|"]

    def rows(prefix: str, fields: dict[str, Any]) -> None:
        for name, field in fields.items():
            if name == "method":
                continue
            default = "" if field.is_required() else json.dumps(field.get_default(call_default_factory=True))
            lines.append(
                f"| `{prefix}{name}` | {f'`{default}`' if default else 'needed'} | {field.description or ''} |"
            )

    for section, field in Recipe.model_fields.items():
        if section == "adapter":
            for options in get_args(get_args(AdapterOptions)[0]):
                method = options.model_fields["method"].default
                lines.append(f"| `adapter.method: {method}` | {'`pissa`' if method == 'pissa' else ''} | |")
                rows("adapter.", options.model_fields)
        elif section in ("output", "seed"):
            rows("", {section: field})
        else:
            rows(f"{section}.", field.annotation.model_fields)
    return "\n".join(lines)


def test_every_key_is_documented() -> None:
    path = ROOT / "docs" / "recipes.md"
    begin, end = "<!-- keys: begin -->\n", "\n<!-- keys: end -->"
    before, _, rest = path.read_text().partition(begin)
    found, _, after = rest.partition(end)
    if found != key_table():
        path.write_text(before + begin + key_table() + end + after)
        pytest.fail("docs/recipes.md was out of date and has been written anew; commit it")


def test_the_schema_is_current() -> None:
    path, wanted = ROOT / "docs" / "recipe.schema.json", json.dumps(json_schema(), indent=2) + "\n"
    if not path.is_file() or path.read_text() != wanted:
        path.write_text(wanted)
        pytest.fail("docs/recipe.schema.json was out of date and has been written anew; commit it")


@pytest.mark.parametrize("path", sorted(shipped("recipes").rglob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_loads(path: Path) -> None:
    load(str(path), {})


@pytest.mark.parametrize("path", sorted(shipped("configs").rglob("*.yaml")), ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_block_loads(path: Path) -> None:
    section = path.parent.name
    flags = {} if section == "model" else {("model", "name"): ("--model", "x")}
    load(None, flags, [f"use.{section}={path.stem}"])


def test_the_commands_of_the_readme_exist() -> None:
    known = {command.name for command in app.registered_commands}
    used = set(re.findall(r"^pissa (\w+)", (ROOT / "README.md").read_text(), re.M))
    assert used == known == {"init", "train", "eval", "merge", "quantize"}


def test_links_in_the_documentation_lead_somewhere() -> None:
    for path in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", path.read_text()):
            assert (path.parent / target).exists(), f"{path}: {target}"


def test_what_ships_is_small() -> None:
    assert sum(p.stat().st_size for p in (ROOT / "pissa_cli" / "demo").rglob("*") if p.is_file()) < 3_000_000
