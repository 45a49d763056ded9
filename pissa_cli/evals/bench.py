"""What a benchmark is: rows, a question for each, and grades for the answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pissa_cli.data.rows import Row

Count = Callable[[int, int], None]
"""Called with (done, in all) of one benchmark."""


@dataclass(frozen=True)
class Grade:
    """What was read out of an output, whether it is right, and why not where there is more to say."""

    answer: Any
    correct: bool
    detail: str = ""


Grading = Callable[[Sequence[Row], Sequence[str], Count], list[Grade]]
"""(rows, outputs, count) -> a grade each."""


@dataclass(frozen=True)
class Bench:
    """One benchmark.

    data: id[:subset[:split]] on the Hub. published: number of rows -> the set that has so many.
    fields: the texts that a row needs.
    problem: (row) -> why it is no row of this benchmark, or None. identity: a row's own id, where it has one.
    runs_code: whether grading runs what the model wrote.
    beside: (rows, outputs) -> figures that stand beside the score. note: (outputs) -> what makes the score misleading.
    """

    data: str
    published: Mapping[int, str]
    fields: tuple[str, ...]
    question: Callable[[Row], str]
    reference: Callable[[Row], str]
    grade: Grading
    metric: str
    protocol: str
    problem: Callable[[Row], str | None] = lambda _row: None
    identity: Callable[[Row], str | None] = lambda _row: None
    beside: Callable[[Sequence[Row], Sequence[str]], dict[str, float]] = lambda _rows, _outputs: {}
    note: Callable[[Sequence[str]], str | None] = lambda _outputs: None
    runs_code: bool = False


def row_by_row(grade: Callable[[Row, str], Grade]) -> Grading:
    """Grades that need but a row and its output."""
    return lambda rows, outputs, _: [grade(row, output) for row, output in zip(rows, outputs, strict=True)]


def pass_at(k: int, n: int, right: int) -> float:
    """The chance that one of k samples is right, unbiased from n (Chen et al. 2021, equation 1)."""
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def published_set(sets: Mapping[int, str], n: int) -> str:
    """Which of the published `sets`, by their numbers of rows, `n` rows are."""
    return sets.get(n, f"not a published set ({', '.join(map(str, sets))} rows)")
