"""MT-Bench (Zheng et al. 2023, arXiv 2306.05685): 80 questions of two turns, each turn graded 1 to 10 by a judge.

Single-answer grading, by FastChat's prompts: those of `judge_prompts.jsonl`, with GPT-4's reference answers for math,
reasoning and coding. A judgment without a rating is no score, and is counted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pissa_cli.data.rows import Row, read_rows, text_of
from pissa_cli.errors import UsageError
from pissa_cli.evals.bench import Count
from pissa_cli.evals.judge import Judge

DATA = "lmsys/mt-bench"
FOLDER = "data/mt_bench"
FILES = ("question.jsonl", "judge_prompts.jsonl", "reference_answer/gpt-4.jsonl")
WITH_REFERENCE = ("math", "reasoning", "coding")
REMEDY = "get FastChat's own files again, or give their folder: --data mt_bench=FOLDER"
METRIC = "mean rating, 1 to 10"
PROTOCOL = "FastChat single-answer grading, two turns, answers at `temperature`"
_RATINGS = (re.compile(r"\[\[(\d+\.?\d*)\]\]"), re.compile(r"\[(\d+\.?\d*)\]"))


@dataclass(frozen=True)
class MTBench:
    """Questions, the judge's prompts by name, and the reference answers (two turns) by question id."""

    questions: list[Row]
    prompts: dict[str, Row]
    references: dict[Any, list[str]]


def load(source: str, limit: int | None) -> MTBench:
    """From a folder with FILES, or the Space on the Hub that has them. Raises UsageError for what is missing."""
    folder = Path(source)
    if not folder.is_dir():
        folder = _from_hub(source)
    questions = _rows(folder / FILES[0], ("question_id", "category", "turns"))[:limit]
    for row in questions:
        turns = row["turns"]
        if not isinstance(turns, list) or len(turns) != 2 or not all(isinstance(turn, str) for turn in turns):
            raise UsageError(f"{folder / FILES[0]}: question {row['question_id']} has not two turns", REMEDY)
    prompts = {row["name"]: row for row in _rows(folder / FILES[1], ("name", "system_prompt", "prompt_template"))}
    answers = _rows(folder / FILES[2], ("question_id", "choices"))
    references = {}
    for row in answers:
        try:
            references[row["question_id"]] = [str(row["choices"][0]["turns"][turn]) for turn in (0, 1)]
        except (IndexError, KeyError, TypeError):
            raise UsageError(
                f"{folder / FILES[2]}: question {row['question_id']} has not two answers", REMEDY
            ) from None
    for row in questions:
        if row["category"] in WITH_REFERENCE and row["question_id"] not in references:
            raise UsageError(f"{folder / FILES[2]}: no reference answer for question {row['question_id']}", REMEDY)
    missing = {_name(category, turn) for category in ("math", "writing") for turn in (0, 1)} - set(prompts)
    if missing:
        raise UsageError(f"{folder / FILES[1]}: no prompt {min(missing)}", REMEDY)
    return MTBench(questions, prompts, references)


def _from_hub(source: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        patterns = [f"{FOLDER}/{name}" for name in FILES]
        return Path(snapshot_download(source, repo_type="space", allow_patterns=patterns)) / FOLDER
    except Exception as error:  # the network and the Hub raise many kinds
        raise UsageError(
            f"{source}: cannot get MT-Bench from the Hub ({type(error).__name__})",
            f"give a folder with {', '.join(FILES)}: --data mt_bench=FOLDER",
        ) from None


def _rows(file: Path, fields: Sequence[str]) -> list[Row]:
    found = []
    for number, row in read_rows(str(file)):
        if isinstance(row, str) or any(field not in row for field in fields):
            raise UsageError(f"{file}: line {number} has not {', '.join(fields)}", REMEDY)
        try:
            for field in set(fields) - {"turns", "choices"}:
                text_of(row, field)
        except ValueError as error:
            raise UsageError(f"{file}: line {number}: {error}", REMEDY) from None
        found.append(row)
    return found


def _name(category: str, turn: int) -> str:
    return ("single-math-v1" if category in WITH_REFERENCE else "single-v1") + ("-multi-turn" if turn else "")


def judge_prompt(data: MTBench, question: Row, answers: Sequence[str], turn: int) -> tuple[str, str]:
    """(system, prompt) that ask for a rating of the answer of a turn (0 or 1)."""
    prompt = data.prompts[_name(question["category"], turn)]
    references = data.references.get(question["question_id"], ["", ""])
    values = {"question": question["turns"][0], "answer": answers[0]}
    for number in (0, 1):
        values[f"question_{number + 1}"] = question["turns"][number]
        values[f"answer_{number + 1}"] = answers[number]
        values[f"ref_answer_{number + 1}"] = references[number]
    pattern = re.compile("|".join(f"{{{name}}}" for name in values))
    text = pattern.sub(lambda match: str(values[match.group()[1:-1]]), prompt["prompt_template"])
    return str(prompt["system_prompt"]), text


def rating(text: str) -> float | None:
    """The judge's rating: [[5]], [[5.5]], else [5]; None if there is none from 1 to 10."""
    for pattern in _RATINGS:
        match = pattern.search(text)
        if match:
            value = float(match[1])
            return value if 1 <= value <= 10 else None
    return None


def grade(
    data: MTBench,
    answers: Sequence[Sequence[str]],
    judge: Judge,
    kept: dict[int, str],
    keep: Callable[[int, str], None],
    progress: Count,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(result, samples): every turn of every question judged, but those that are `kept` by 2 question + turn."""
    samples: list[dict[str, Any]] = []
    for number, (question, pair) in enumerate(zip(data.questions, answers, strict=True)):
        for turn in (0, 1):
            place = 2 * number + turn
            judgment = kept.get(place) or judge.ask(*judge_prompt(data, question, pair, turn))
            if rating(judgment) is not None and place not in kept:  # what else it says may be a fault that passes
                keep(place, judgment)
            sample = {"id": question["question_id"], "category": question["category"], "turn": turn + 1}
            sample |= {"output": pair[turn], "judgment": judgment, "rating": rating(judgment)}
            samples.append(sample)
            progress(place + 1, 2 * len(data.questions))
    rated = [sample["rating"] for sample in samples if sample["rating"] is not None]
    if not rated:
        raise UsageError(
            f"{judge.url}: not one of {len(samples)} judgments has a rating", "try another eval.judge_model"
        )
    mean, n = sum(rated) / len(rated), len(rated)
    spread = sum((value - mean) ** 2 for value in rated) / max(1, n - 1)
    result = {"score": mean, "stderr": math.sqrt(spread / n), "n": n, "metric": METRIC, "protocol": PROTOCOL}
    result |= {"unrated": len(samples) - n, "judge": judge.model, "judge_url": judge.url}
    result["turns"] = [_mean(s["rating"] for s in samples if s["turn"] == turn) for turn in (1, 2)]
    categories = dict.fromkeys(question["category"] for question in data.questions)
    result["categories"] = {c: _mean(s["rating"] for s in samples if s["category"] == c) for c in categories}
    return result, samples


def _mean(ratings: Any) -> float | None:
    values = [value for value in ratings if value is not None]
    return sum(values) / len(values) if values else None
