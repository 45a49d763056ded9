"""`lm_eval:<task>`: any task of EleutherAI's lm-evaluation-harness, with the run's model (extra `lm-eval`)."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
from typing import TYPE_CHECKING, Any

from pissa_cli.errors import PissaError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pissa_cli.schema.recipe import Recipe

PREFIX = "lm_eval:"
MAIN = ("acc_norm", "exact_match", "acc", "f1", "em", "pass@1", "bleu", "rougeL", "word_perplexity")
"""Metrics, the first of which that a task has is its score."""


def require_harness(bench: str) -> None:
    """UsageError where the harness is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UsageError(f"eval.bench: {bench} needs EleutherAI's harness", "pip install 'pissa[lm-eval]'")


def load_task(bench: str, folder: str | None) -> Any:
    """The harness's task manager, after checking that it knows the task; folder: of task files of one's own."""
    from lm_eval.tasks import TaskManager

    manager, task = TaskManager(include_path=folder), bench.removeprefix(PREFIX)
    known = [*manager.all_subtasks, *manager.all_groups]  # not tags: they have no figure of their own
    if task not in known:
        near = [name for name in known if task in name]
        raise UsageError(
            f"eval.bench: the harness has no task '{task}'",
            f"near it: {', '.join(near[:8])}" if near else "`lm_eval ls tasks` lists them",
        )
    return manager


def score(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, manager: Any, bench: str, recipe: Recipe
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(result, samples) as the harness has them: its metrics, its numbers of shots, its prompts; scores are not scaled.

    A model trained on chats is asked in its chat template. Raises PissaError, with the reason, for what the harness
    cannot do.
    """
    import lm_eval
    import torch
    from lm_eval.models.huggingface import HFLM

    task, section = bench.removeprefix(PREFIX), recipe.eval
    try:
        with contextlib.redirect_stdout(sys.stderr):
            wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=section.batch_size or "auto")
            found: Any = lm_eval.simple_evaluate(
                wrapped,
                tasks=[task],
                limit=section.limit,
                task_manager=manager,
                apply_chat_template=recipe.data.format == "chat",
                bootstrap_iters=1000,
            )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # tasks are anyone's code, and their data come from the network
        raise PissaError(
            f"{bench}: the harness failed ({type(error).__name__}: {error})",
            "without a network the task's data have to be in the cache, or in a folder: --data BENCH=FOLDER",
        ) from error
    figures = {**found.get("results", {}), **found.get("groups", {})}[task]
    names: dict[str, str] = {}  # of several filters the first, as the harness lists them
    for key in figures:
        if "_stderr" not in key and isinstance(figures[key], float):
            names.setdefault(key.partition(",")[0], key)
    main = next((name for name in MAIN if name in names), next(iter(names), None))
    if main is None:
        raise PissaError(
            f"{bench}: the harness gave no figure ({', '.join(figures)})", "choose another task of the harness"
        )
    key = names[main]
    stderr = figures.get(key.replace(main, f"{main}_stderr", 1))
    samples = [sample for rows in found.get("samples", {}).values() for sample in rows]
    result = {
        "score": figures[key],
        "metric": f"{key.removesuffix(',none')} (lm_eval {lm_eval.__version__})",
        "stderr": stderr if isinstance(stderr, float) else None,
        "n": sum(count["effective"] for count in found["n-samples"].values()),
        "figures": {name: value for name, value in figures.items() if isinstance(value, int | float)},
        "engine": "lm_eval",
    }
    return result, json.loads(json.dumps(samples, default=str))
