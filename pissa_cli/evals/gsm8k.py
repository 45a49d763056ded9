"""GSM8K as the PiSSA repository scores it: the number after the last "The answer is: ", rounded = gold."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from fractions import Fraction

from pissa_cli.data.rows import Row
from pissa_cli.evals.bench import Bench, Grade, row_by_row

MARKER = "The answer is: "
_NUMBER = re.compile(r"[-+]?\d*[.,/]?\d+")
_OTHER_END = re.compile(r"(####|\banswer( is)?:?)[^\w\n]*\d", re.IGNORECASE)


def gold(row: Row) -> str:
    """The reference answer: what follows '####' in GSM8K's own rows."""
    return str(row["answer"]).rpartition("####")[2].strip()


def is_number(reference: str) -> bool:
    """Whether a reference can be compared ("1,250" can)."""
    try:
        return math.isfinite(float(reference.replace(",", "")))
    except ValueError:
        return False


def extract(output: str) -> int | None:
    """The answer in a model's output; None if there is none.

    Follows the reference protocol to the letter: of what follows the last marker the first number counts, with at
    most one of `.,/` inside (so "1,234,567" reads 1234), a fraction is divided (but by 0), and everything is rounded
    half to even.
    """
    _, marker, after = output.rpartition(MARKER)
    if not marker:
        return None
    match = _NUMBER.search(after)
    if match is None:
        return None
    text = match.group().replace(",", "")
    try:
        return round(float(Fraction(text.removesuffix("/0"))))
    except (ValueError, ZeroDivisionError, OverflowError):
        return None


def score(output: str, reference: str) -> bool:
    """Whether the extracted answer equals the reference ("1,250" reads 1250)."""
    answer = extract(output)
    return answer is not None and float(answer) == float(reference.replace(",", ""))


def other_form(outputs: Sequence[str]) -> str | None:
    """A note if most answers end as GSM8K's own rows do, or nearly as the protocol asks, and hardly any as it does."""
    marked = sum(MARKER in output for output in outputs)
    others = sum(_OTHER_END.search(output) is not None and MARKER not in output for output in outputs)
    if 10 * marked > len(outputs) or 2 * others < len(outputs):
        return None
    return (
        f"{others} of {len(outputs)} answers end in '#### ...' as GSM8K's own rows do, or the like, {marked} in "
        f"'{MARKER}...', which alone counts; train on rows that end so: docs/evaluation.md, Rows for GSM8K"
    )


BENCH = Bench(
    data="openai/gsm8k:main:test",
    published={1319: "the test set", 7473: "the training set"},
    fields=("question", "answer"),
    question=lambda row: str(row["question"]),
    reference=gold,
    problem=lambda row: None if is_number(gold(row)) else "its answer does not end in '#### number'",
    grade=row_by_row(lambda row, output: Grade(extract(output), score(output, gold(row)))),
    metric="exact match, %",
    note=other_form,
    protocol="PiSSA repository: first number after the last 'The answer is: ', rounded to an integer",
)
