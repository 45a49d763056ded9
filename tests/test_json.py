"""The keys of `--json` are those of docs/json.md."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Outcome

PAGE = Path(__file__).parents[1] / "docs" / "json.md"


def documented() -> dict[str, tuple[set[str], set[str]]]:
    """By section of the page: the keys that are always there, and those under a condition."""
    found: dict[str, tuple[set[str], set[str]]] = {}
    section = ""
    for line in PAGE.read_text().splitlines():
        if line.startswith("## "):
            section = line.removeprefix("## ")
            found[section] = set(), set()
        elif line.startswith("| `"):
            keys, _, condition = line.split(" | ")[0].partition(" (")
            found[section][bool(condition)].update(re.findall(r"`(\w+)`", keys))
    return found


@pytest.mark.parametrize(
    "sets", [("model.bits=4",), ("adapter.method=vera", "adapter.rank=8"), ("adapter.method=full", "model.bits=32")]
)
def test_the_keys_of_every_command(
    sets: tuple[str, ...], models: Callable[[str], Path], rows: Path, tmp_path: Path, pissa: Callable[..., Outcome]
) -> None:
    out, pages = tmp_path / "out", documented()
    full = "adapter.method=full" in sets
    rank = [] if full else ["adapter.rank=4"]
    every = ["data.eval=20%", "train.steps=2", "train.eval_every=1", *rank, *sets, f"data.train={rows}"]
    words = ["--model", models("llama"), *(word for one in every for word in ("--set", one)), "--output", out]

    def check(section: str, *command: Any, also: set[str] = frozenset()) -> None:  # type: ignore[assignment]
        outcome = pissa(*command, "--json")
        assert outcome.code == 0, outcome.err
        always, sometimes = pages[section]
        assert outcome.json.keys() - sometimes == always and also <= outcome.json.keys()

    check("train --dry-run", "train", *words, "--dry-run", also={"steps", "rows"})
    check("init", "init", *words, *([] if full else ["--report"]), also=set() if full else {"report", "layers"})
    check("train", "train", out)
    check("eval", "eval", out, "--bench", "loss", "--compare-base", also={"base"})
    check("merge", "merge", out)
    check("quantize", "quantize", out)
    if not full:
        check("export", "export", out, "--check", also={"max_logit_difference"})
    outcome = pissa("train", out, "--set", "nonsense=1", "--json")
    assert outcome.json.keys() == {"error", "hint", "exit_code"}
