"""The tasks of GLUE: what their files call things, their classes and their metrics. Knows no torch.

Metrics as in the PiSSA paper's table 3 (appendix L): Matthews for CoLA, Pearson for STS-B, accuracy for the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Metric = Literal["accuracy", "matthews", "pearson"]


@dataclass(frozen=True)
class GlueTask:
    """texts, label: the names a column has in one file or another. labels: classes by number; one: a quantity."""

    texts: tuple[tuple[str, ...], ...]
    labels: tuple[str, ...]
    metric: Metric = "accuracy"
    label: tuple[str, ...] = ("label",)

    def columns(self, row: Mapping[str, object]) -> tuple[list[str], str]:
        """(columns of the texts, column of the label) of a row; of those it lacks, the first name."""
        found = [next((name for name in names if name in row), names[0]) for names in (*self.texts, self.label)]
        return found[:-1], found[-1]


GLUE = {
    "cola": GlueTask((("sentence",),), ("unacceptable", "acceptable"), "matthews"),
    "sst2": GlueTask((("sentence",),), ("negative", "positive")),
    "mrpc": GlueTask(
        (("sentence1", "#1 String"), ("sentence2", "#2 String")),
        ("not_equivalent", "equivalent"),
        label=("label", "Quality"),
    ),
    "stsb": GlueTask((("sentence1",), ("sentence2",)), ("score",), "pearson", ("label", "score")),
    "qqp": GlueTask((("question1",), ("question2",)), ("not_duplicate", "duplicate"), label=("label", "is_duplicate")),
    "mnli": GlueTask(
        (("premise", "sentence1"), ("hypothesis", "sentence2")),
        ("entailment", "neutral", "contradiction"),
        label=("label", "gold_label"),
    ),
    "qnli": GlueTask((("question", "sentence1"), ("sentence", "sentence2")), ("entailment", "not_entailment")),
    "rte": GlueTask((("sentence1",), ("sentence2",)), ("entailment", "not_entailment")),
}


@dataclass(frozen=True)
class GlueSet:
    """A set that a task is scored on: where it is on the Hub, and how many rows published ones have."""

    task: str
    data: str
    rows: Mapping[int, str]


def _set(task: str, rows: Mapping[int, str], split: str = "validation") -> GlueSet:
    return GlueSet(task, f"nyu-mll/glue:{task}:{split}", rows)


SETS = {
    "glue/cola": _set("cola", {1043: "GLUE dev"}),
    "glue/sst2": _set("sst2", {872: "GLUE dev"}),
    "glue/mrpc": _set("mrpc", {408: "GLUE dev", 1725: "MRPC test"}),
    "glue/stsb": _set("stsb", {1500: "GLUE dev"}),
    "glue/qqp": _set("qqp", {40430: "GLUE dev"}),
    "glue/mnli": _set("mnli", {9815: "GLUE dev, matched"}, "validation_matched"),
    "glue/mnli_mismatched": _set("mnli", {9832: "GLUE dev, mismatched"}, "validation_mismatched"),
    "glue/qnli": _set("qnli", {5463: "GLUE dev"}),
    "glue/rte": _set("rte", {277: "GLUE dev"}),
}
"""By benchmark."""
