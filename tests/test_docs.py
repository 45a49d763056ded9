"""What the documentation and the shipped files say is true."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import make_errors
import pytest

from pissa_cli.cli import app
from pissa_cli.evals import gsm8k
from pissa_cli.schema.recipe import AdapterOptions, Recipe, json_schema
from pissa_cli.schema.recipe_file import load, shipped

ROOT = Path(__file__).resolve().parents[1]


def values(annotation: Any) -> str:
    """What a key accepts, in words."""
    if get_origin(annotation) is Literal:
        return " ".join(f"`{value}`" for value in get_args(annotation))
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(values(part) for part in get_args(annotation) if part is not type(None))
    if get_origin(annotation) is Annotated:
        return values(get_args(annotation)[0])
    if get_origin(annotation) is list:
        return "list"
    if get_origin(annotation) is dict:
        return "keys and values"
    return {bool: "true, false", int: "whole number", float: "number", str: "text"}[annotation]


def key_row(key: str, field: Any, meaning: str) -> str:
    default = field.get_default(call_default_factory=True)
    shown = "needed" if field.is_required() else "" if default is None else f"`{json.dumps(default)}`"
    return f"| `{key}` | {values(field.annotation)} | {shown} | {meaning} |"


def key_table() -> str:
    """The table of docs/recipes.md, from the schema; keys that several methods share stand once."""
    lines = ["| key | values | default | meaning |", "|---|---|---|---|"]
    for section, field in Recipe.model_fields.items():
        if section in ("output", "seed"):
            lines.append(key_row(section, field, field.description or ""))
        elif section != "adapter":
            for name, inner in field.annotation.model_fields.items():
                lines.append(key_row(f"{section}.{name}", inner, inner.description or ""))
        else:
            every = {o.model_fields["method"].default: o.model_fields for o in get_args(get_args(AdapterOptions)[0])}
            methods = " ".join(f"`{method}`" for method in every)
            lines.append(f"| `adapter.method` | {methods} | `pissa` | how the adapter starts |")
            owners: dict[str, list[str]] = {}
            for method, fields in every.items():
                for name, inner in fields.items():
                    if name != "method":
                        owners.setdefault(key_row(f"adapter.{name}", inner, inner.description or ""), []).append(method)
            for row, having in sorted(owners.items(), key=lambda item: item[0].split("`")[1]):
                lines.append(f"{row.removesuffix(' |')} ({', '.join(having)}) |")
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


def test_every_message_is_documented() -> None:
    path, wanted = ROOT / "docs" / "errors.md", make_errors.page()
    if not path.is_file() or path.read_text() != wanted:
        path.write_text(wanted)
        pytest.fail("docs/errors.md was out of date and has been written anew; commit it")


def test_every_message_says_what_to_do() -> None:
    rows = [one for one in make_errors.messages() if one.code is not None]
    said = (*make_errors.IN_MESSAGE, "schema.recipe_errors")
    silent = [one for one in rows if not one.hint and one.module not in said]
    assert len(rows) > 200 and [one.text for one in silent] == ["interrupted"]
    assert {one.code for one in rows} == {1, 2, 130}


def test_messages_are_read_out_of_the_source() -> None:
    source = """
ONE, FILES, KINDS = 1, ("a.json", "b.json"), {"x": "say x", "y": "say y"}
def check(recipe, folder, names, last, error):
    held = "nothing"
    if last:
        held = f"a {last.name}"
    hint = "wait" if ONE else f"try {', '.join(names)}"
    raise UsageError(
        f"{folder / FILES[1]}: {recipe.model.name} holds {held}{', at most' if last else ''} {min(names)!r} "
        "of " + f"{len(names)} ({error})", hint
    )
    raise PissaError("\\n".join(["the end:", *names]), KINDS[last])
    raise Interrupted(f"{ONE:,} of {last}", None)
    raise UsageError("no hint")
"""
    tree = ast.parse(source)
    words = make_errors.Words(tree.body[1], make_errors._constants(tree))  # type: ignore[arg-type]
    calls = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise)]
    found = [[words.text(argument) for argument in call.args] for call in calls if isinstance(call, ast.Call)]
    assert found == [
        [
            "<folder>/b.json: <model.name> holds [nothing / a <last>][, at most] '<names>' of <number> (<reason>)",
            "[wait / try <names>, ...]",
        ],
        ["the end: <names>", "[say x / say y]"],
        ["1 of <last>", ""],
        ["no hint"],
    ]


@pytest.mark.parametrize("path", sorted(shipped("recipes").rglob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_loads(path: Path) -> None:
    load(str(path), {})


BLOCKS = sorted(path for path in shipped("configs").rglob("*.yaml") if path.parent.name != "accelerate")


@pytest.mark.parametrize("path", sorted(shipped("configs").glob("accelerate/*.yaml")), ids=lambda p: p.stem)
def test_accelerate_reads_its_files(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.distributed_type == {"ddp": "MULTI_GPU", "fsdp": "FSDP", "zero": "DEEPSPEED"}[path.stem.rstrip("23")]


@pytest.mark.parametrize("path", BLOCKS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_block_loads(path: Path) -> None:
    section = path.parent.name
    flags = {} if section == "model" else {("model", "name"): ("--model", "x")}
    four = ["model.bits=4"] if path.stem.startswith(("loftq", "qpissa")) else []
    labels = ["data.format=glue/cola"] if "task: sequence-classification" in path.read_text() else []
    load(None, flags, [f"use.{section}={path.stem}", *four, *labels])


def test_the_commands_of_the_readme_exist() -> None:
    known = {command.name for command in app.registered_commands}
    used = set(re.findall(r"^pissa (\w+)", (ROOT / "README.md").read_text(), re.M))
    assert used == known == {"init", "train", "eval", "merge", "quantize", "export"}


def test_the_documented_conversion_makes_rows_that_score(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "evaluation.md").read_text()
    (script,) = re.findall(r"```python\n(.*?)```", page.partition("## Rows for GSM8K")[2], re.S)[:1]
    own = {"question": "12 a day for 100 days?", "answer": "12 * 100 = <<12*100=1200>>1,200 in all.\n#### 1,200"}
    command, given = [sys.executable, "-c", script], json.dumps(own) + "\n"
    row = json.loads(subprocess.run(command, input=given, capture_output=True, text=True, check=True).stdout)
    assert row["query"] == own["question"]
    assert row["response"] == "12 * 100 = 1,200 in all.\n#### 1,200\nThe answer is: 1,200"
    assert gsm8k.score(row["response"], gsm8k.gold(own))


def test_links_in_the_documentation_lead_somewhere() -> None:
    for path in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", path.read_text()):
            assert (path.parent / target).exists(), f"{path}: {target}"


def test_what_ships_is_small() -> None:
    assert sum(p.stat().st_size for p in (ROOT / "pissa_cli" / "demo").rglob("*") if p.is_file()) < 3_000_000
