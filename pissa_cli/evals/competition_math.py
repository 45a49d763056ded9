"""MATH (Hendrycks et al. 2021, arXiv 2103.03874) as the PiSSA repository scores it.

What follows the last "The answer is: ", up to a full stop at the end of a line, equals the last \\boxed{} of the
solution once both are normalized by the rules that came with the data set. No algebra is done.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence

from pissa_cli.data.rows import Row
from pissa_cli.evals.bench import Bench, Grade, row_by_row
from pissa_cli.evals.gsm8k import MARKER

_REMOVED = ("\\left", "\\right", "^{\\circ}", "^\\circ", "\\$")


def gold(row: Row) -> str | None:
    """The content of the last \\boxed{} (or \\fbox{}) of the solution; None if there is none."""
    solution = str(row["solution"])
    if "\\boxed " in solution:
        return solution.rpartition("\\boxed ")[2].partition("$")[0]
    begin = solution.rfind("\\boxed")
    begin = begin if begin >= 0 else solution.rfind("\\fbox")
    if begin < 0 or "{" not in solution[begin:]:
        return None
    opening = solution.index("{", begin)
    depth = 0
    for place in range(opening, len(solution)):
        depth += {"{": 1, "}": -1}.get(solution[place], 0)
        if depth == 0:
            return solution[opening + 1 : place]
    return None


def extract(output: str) -> str | None:
    """The answer in a model's output; None if there is none."""
    _, marker, after = output.rpartition(MARKER)
    if not marker:
        return None
    return after.partition(".\n")[0].strip().removesuffix(".").strip()


def equal(one: str, other: str) -> bool:
    """Whether two answers are the same text after normalization; as they are, where a rule cannot be applied."""
    try:
        return normalize(one) == normalize(other)
    except (ValueError, IndexError):
        return one == other


def normalize(text: str) -> str:
    """The data set's own rules, in its order. Raises ValueError or IndexError where its code would fail."""
    text = text.replace("\n", "").replace("\\!", "").replace("\\\\", "\\")
    text = text.replace("tfrac", "frac").replace("dfrac", "frac")
    for removed in _REMOVED:
        text = text.replace(removed, "")
    text = _without_units(text).replace("\\%", "")
    text = text.replace(" .", " 0.").replace("{.", "{0.")
    if not text:
        return text
    if text[0] == ".":
        text = "0" + text
    sides = text.split("=")
    if len(sides) == 2 and len(sides[0]) <= 2:
        text = sides[1]
    text = _braced_roots(text).replace(" ", "")
    text = _braced_fractions(text)
    return _as_fraction("\\frac{1}{2}" if text == "0.5" else text)


def _without_units(text: str) -> str:
    if "\\text{ " not in text:
        return text
    before, _unit = text.split("\\text{ ")  # ValueError for two
    return before


def _braced_roots(text: str) -> str:
    """\\sqrt3 -> \\sqrt{3}"""
    first, *rest = text.split("\\sqrt")
    return first + "".join("\\sqrt" + (part if part[0] == "{" else f"{{{part[0]}}}{part[1:]}") for part in rest)


def _braced_fractions(text: str) -> str:
    """\\frac12 -> \\frac{1}{2}, \\frac1{72} -> \\frac{1}{72}; left alone where one has less than two characters."""
    first, *rest = text.split("\\frac")
    parts = [first]
    for part in rest:
        if part[0] == "{":
            parts.append(part)
        elif len(part) < 2:
            return text
        elif part[1] == "{":
            parts.append(f"{{{part[0]}}}{part[1:]}")
        else:
            parts.append(f"{{{part[0]}}}{{{part[1]}}}{part[2:]}")
    return "\\frac".join(parts)


def _as_fraction(text: str) -> str:
    """3/4 -> \\frac{3}{4}, if that is all there is."""
    match = re.fullmatch(r"(-?\d+)/(-?\d+)", text)
    if match is None or any(str(int(number)) != number for number in match.groups()):
        return text
    return f"\\frac{{{match[1]}}}{{{match[2]}}}"


def _grade(row: Row, output: str) -> Grade:
    answer, reference = extract(output), gold(row)
    return Grade(answer, answer is not None and reference is not None and equal(answer, reference))


def _symbolic(rows: Sequence[Row], outputs: Sequence[str]) -> dict[str, float]:
    """The share that is right by the rules above or by algebra, where math-verify is installed (extra `math`)."""
    if importlib.util.find_spec("math_verify") is None:
        return {}
    from math_verify import parse, verify

    def right(row: Row, output: str) -> bool:
        answer, reference = extract(output), gold(row)
        if answer is None or reference is None:
            return False
        return equal(answer, reference) or bool(verify(parse(f"${reference}$"), parse(f"${answer}$")))

    return {"symbolic": 100 * sum(map(right, rows, outputs)) / len(rows)}


BENCH = Bench(
    data="DigitalLearningGmbH/MATH-lighteval::test",
    published={5000: "the test set", 500: "MATH-500"},
    fields=("problem", "solution"),
    question=lambda row: str(row["problem"]),
    reference=lambda row: str(gold(row)),
    problem=lambda row: None if gold(row) is not None else "its solution has no \\boxed{}",
    grade=row_by_row(_grade),
    beside=_symbolic,
    metric="exact match, %",
    protocol="PiSSA repository: after the last 'The answer is: ', normalized as in MATH's own code, no algebra",
)
