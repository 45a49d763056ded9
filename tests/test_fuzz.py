"""Hostile input of every kind: no traceback, no exit code but 0, 1 or 2, no file written outside the output folder.

In full, 2,000 recipes, 2,000 data files and 500 folders:

    PISSA_FUZZ=1 OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 python -m pytest tests/test_fuzz.py

PISSA_FUZZ_SEED=N draws others (default: 0).
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzz_recipes
import pytest
from fuzzing import examples, outside, problem, run, tree, writes
from hypothesis import given
from hypothesis import strategies as st

from pissa_cli.recipe_file import dump, load


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def fail(reason: str, case: Any) -> None:
    raise AssertionError(f"{reason}\n{case!r:.3000}")


class Example:
    """A folder of one example, with something beside the output folder that must stay as it is."""

    def __init__(self, place: Path) -> None:
        self.folder = Path(tempfile.mkdtemp(dir=place))
        self.work = self.folder / "work"
        self.work.mkdir()
        (self.folder / "x").write_text("precious")

    def __enter__(self) -> Example:
        self._before = Path.cwd()
        os.chdir(self.work)
        return self

    def __exit__(self, *_: object) -> None:
        os.chdir(self._before)
        shutil.rmtree(self.folder, ignore_errors=True)


def reread(file: Path, flags: list[str]) -> str | None:
    """What is wrong with the resolved recipe as the run folder keeps it: it must read as the one it was made from."""
    recipe = load(str(file), {}, flags[1::2]).recipe
    copy = file.with_name("resolved.yaml")
    copy.write_text(dump(recipe))
    again = load(str(copy), {}).recipe
    copy.unlink()
    return None if again == recipe else f"read again: {again}"


DRY = [("train",), ("init",), ("eval", "--bench", "loss"), ("merge",), ("quantize",)]


def test_mutated_recipes(place: Path, models: Callable[[str], Path]) -> None:
    model = models("llama")
    seeds = [*fuzz_recipes.SHIPPED.values(), *[fuzz_recipes.small(model, Path("rows.jsonl"))] * 60]

    @examples(2000, 60)
    @given(fuzz_recipes.mutated(seeds), st.sampled_from([*DRY[:1] * 8, *DRY]), st.booleans(), st.booleans())
    def check(recipe: fuzz_recipes.Recipe, command: tuple[str, ...], own: bool, as_json: bool) -> None:
        with Example(place) as example:
            file = example.work / "recipe.yaml"
            file.write_bytes(recipe.content)
            before = tree(example.folder)
            flags = [word for text in recipe.sets for word in ("--set", text)]
            flags += ["--set", f"model.name={model}"] if own else []
            with writes() as written:
                outcome = run(*command, file, "--dry-run", *flags, *(["--json"] if as_json else []))
            reason = problem(outcome, (0, 2))
            if reason is None and (tree(example.folder) != before or outside(written, [])):
                reason = f"written: {written}"
            if reason is None and outcome.code == 0:
                reason = reread(file, flags)
            if reason is not None:
                fail(reason, (recipe, command, own))

    check()
