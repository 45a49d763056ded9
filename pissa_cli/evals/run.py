"""`eval`: score what a run exported, one benchmark after the other."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pissa_cli.base.configuration import read_config, require_tokens
from pissa_cli.base.loading import load_tokenizer
from pissa_cli.base.model import best_device, context_length
from pissa_cli.data.chat import end_of_turn
from pissa_cli.data.examples import Examples
from pissa_cli.data.rows import Row
from pissa_cli.data.tokenize import question_prompt
from pissa_cli.errors import UsageError
from pissa_cli.evals import classify, harness, held_out, mt_bench
from pissa_cli.evals.bench import Count, published_set
from pissa_cli.evals.benches import GENERATED, check_benches, runs_code
from pissa_cli.evals.generate import generate, same_in_batches, special_stops
from pissa_cli.evals.judge import Judge
from pissa_cli.evals.load import load_bench
from pissa_cli.evals.outputs import Kept
from pissa_cli.evals.published import published
from pissa_cli.evals.results import Progress, grade_outputs, write_scores
from pissa_cli.evals.sandbox import protection
from pissa_cli.evals.served import Server, serve
from pissa_cli.files import locked, require_writable
from pissa_cli.outputs.probes import PROBES
from pissa_cli.outputs.trained import load_plain_base, load_result, merged_folder, result_hash, trained_facts
from pissa_cli.run.started import open_run, require_base
from pissa_cli.schema.glue import GLUE, SETS
from pissa_cli.schema.recipe import Recipe
from pissa_cli.training.loss import autocast

UNSCORED = {"metric": "not run", "note": "--allow-code-execution scores the answers, which are kept"}
BATCH_TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2}
"""By how much the scores of a prompt in a batch may differ from those alone, as a share of the largest."""


@dataclass(frozen=True)
class _Session:
    """A model under evaluation, here or on a server; it sees `context` tokens; `facts` say which, in every result."""

    recipe: Recipe
    writer: PreTrainedModel | Server
    tokenizer: PreTrainedTokenizerBase
    folder: Path
    context: int
    facts: dict[str, Any]
    allow_code: bool

    @property
    def model(self) -> PreTrainedModel:
        """For what is not generated; `check_benches` lets nothing of that through to a server."""
        assert not isinstance(self.writer, Server)
        return self.writer

    @cached_property
    def one_by_one(self) -> bool:
        """Whether answers of this model change with what is asked beside them."""
        if isinstance(self.writer, Server) or self.recipe.eval.batch_size == 1:
            return False
        prompts = [self.tokenizer(text)["input_ids"] for text in PROBES]
        with autocast(self.recipe, self.model.device):
            return not same_in_batches(self.model, self.tokenizer, prompts, BATCH_TOLERANCE[self.recipe.precision])


def evaluate(
    recipe: Recipe,
    base: bool = False,
    allow_code: bool = False,
    progress: Progress = lambda *_: None,
    step: int | None = None,
) -> dict[str, dict[str, Any]]:
    """Results by benchmark: score, stderr, n (and more). `base` scores the model before training instead, `step` a
    checkpoint.

    Writes eval/<bench>/{result.json, samples.jsonl}; for the base and for a checkpoint below eval/base/ and
    eval/step-N/. What a model wrote is kept as it comes: interrupted, the same evaluation goes on. allow_code: run the
    programs that the model writes; without it a benchmark of programs has no score (None) and nothing is written for
    it, but its answers are kept.
    Raises UsageError for an unknown bench, missing data, or a run that is not trained.
    """
    check_benches(recipe, base)
    if step is not None and recipe.eval.engine != "transformers":
        raise UsageError(f"eval.engine: {recipe.eval.engine} serves merged/, no checkpoint", "leave the engine out")
    if allow_code and runs_code(recipe):
        protection()
    if "mt_bench" in recipe.eval.bench:
        Judge(str(recipe.eval.judge_url), str(recipe.eval.judge_model)).require()
    run, manifest = open_run(recipe)
    base_folder = require_base(manifest, recipe)
    tokenizer, context = load_tokenizer(base_folder, recipe), context_length(base_folder, recipe.model) or 2**31
    data = {bench: load_bench(bench, recipe, tokenizer, context) for bench in recipe.eval.bench}
    for bench, loaded in data.items():
        if isinstance(loaded, Examples):
            require_tokens(bench, [int(loaded.ids.max())], read_config(base_folder, recipe.model))
    facts = {
        "model": "base" if base else "trained",
        "step": 0 if base else step or trained_facts(recipe)["step"],
        "base_fingerprint": manifest["base"]["fingerprint"],
        "started": manifest["created"],
        "precision": recipe.precision,
    }
    folder = run.scores / ("base" if base else f"step-{step}" if step else "")
    require_writable(folder)
    with _writer(recipe, base, step, base_folder, context) as writer:
        facts |= {} if base else {"result": result_hash(recipe, step)}
        session = _Session(recipe, writer, tokenizer, folder, context, facts, allow_code)
        return _score_all(session, data, progress)


@contextmanager
def _writer(
    recipe: Recipe, base: bool, step: int | None, base_folder: Path, context: int
) -> Iterator[PreTrainedModel | Server]:
    """What answers: the model in this process, or vLLM with merged/ (or the plain base)."""
    if recipe.eval.engine == "transformers":
        yield load_plain_base(recipe, best_device()) if base else load_result(recipe, best_device(), step)
        return
    folder = base_folder if base else merged_folder(recipe)
    with serve(folder, recipe.precision, context, recipe.model.trust_remote_code) as server:
        yield server


def _score_all(session: _Session, data: dict[str, Any], progress: Progress) -> dict[str, dict[str, Any]]:
    recipe, results = session.recipe, {}
    for bench, loaded in data.items():
        began = time.monotonic()

        def count(done: int, total: int, bench: str = bench) -> None:
            progress(done, total, bench)

        folder = session.folder / bench.replace(":", "/")
        with locked(session.folder / f"outputs of {bench.replace('/', ' ')}"):
            scored = _SCORERS[bench.partition(":")[0]](session, bench, loaded, count)
            if scored is None:
                results[bench] = {"score": None, "stderr": None, "n": len(loaded)} | UNSCORED | session.facts
                continue
            result, samples, kept = scored
            results[bench] = write_scores(folder, result | session.facts, bench, recipe, samples, began)
            if kept is not None:
                kept.remove()
    return results


_Scored = tuple[dict[str, Any], list[dict[str, Any]], Kept | None]
"""A result, its samples, and what was kept on the way and is not needed any more."""


def _score_examples(session: _Session, bench: str, examples: Examples, count: Count) -> _Scored:
    """`loss` and `glue/*`: a classifier's metrics, or a language model's loss on what is held out."""
    recipe, model, tokenizer, known = session.recipe, session.model, session.tokenizer, SETS.get(bench)
    with autocast(recipe, model.device):
        if examples.labels is None:
            result, samples = held_out.score(model, tokenizer, examples, count)
        else:
            metric = None if known is None else GLUE[known.task].metric
            result, samples = classify.score(model, tokenizer, examples, recipe, metric, count)
    n = result["n"]
    if known is not None:
        result["rows"] = published_set(known.rows, n)
    result |= {"rows_not_used": sum(map(len, examples.unusable.values())), "notes": examples.notes(bench)}
    return result | _published(session, bench, n), samples, None


def _score_generated(session: _Session, bench: str, rows: list[Row], count: Count) -> _Scored | None:
    recipe = session.recipe
    rows = [row for row in rows for _ in range(recipe.eval.samples)]
    prompts = [question_prompt(GENERATED[bench].question(row), recipe.data, session.tokenizer) for row in rows]
    kept = _answers(session, f".{bench}.outputs.jsonl", prompts, count)
    if GENERATED[bench].runs_code and not session.allow_code:
        return None
    outputs = [kept.outputs[number] for number in range(len(rows))]
    result, samples = grade_outputs(bench, rows, outputs, count, recipe.eval.samples)
    samples = [{"prompt": text} | sample for (text, _), sample in zip(prompts, samples, strict=True)]
    return result | _settings(session, bench, result["n"]) | _lengths(session, prompts, outputs), samples, kept


def _score_mt_bench(session: _Session, bench: str, data: mt_bench.MTBench, count: Count) -> _Scored:
    """Answers and judgments stay in hidden files beside the result, so that judging alone can be repeated."""
    recipe, tokenizer = session.recipe, session.tokenizer
    turns = [row["turns"] for row in data.questions]
    first = [question_prompt(one, recipe.data, tokenizer) for one, _ in turns]
    ones = _answers(session, f".{bench}.turn1.jsonl", first, count).outputs
    second = [question_prompt(two, recipe.data, tokenizer, [(one, ones[i])]) for i, (one, two) in enumerate(turns)]
    twos = _answers(session, f".{bench}.turn2.jsonl", second, count).outputs
    answers = [(ones[number], twos[number]) for number in range(len(turns))]
    judge = Judge(str(recipe.eval.judge_url), str(recipe.eval.judge_model))
    asked = [
        mt_bench.judge_prompt(data, q, a, turn) for q, a in zip(data.questions, answers, strict=True) for turn in (0, 1)
    ]
    with Kept(session.folder / f".{bench}.judgments.jsonl", (judge.url, judge.model), asked) as kept:
        result, samples = mt_bench.grade(data, answers, judge, kept.outputs, kept.add, count)
    lengths = _lengths(session, first + second, [one for one, _ in answers] + [two for _, two in answers])
    return result | _settings(session, bench, len(samples)) | lengths | {"samples": 1}, samples, None


def _score_harness(session: _Session, bench: str, manager: Any, _count: Count) -> _Scored:
    with autocast(session.recipe, session.model.device):
        return *harness.score(session.model, session.tokenizer, manager, bench, session.recipe), None


_SCORERS: dict[str, Callable[..., _Scored | None]] = {
    **dict.fromkeys(GENERATED, _score_generated),
    **dict.fromkeys(("loss", *SETS), _score_examples),
    "mt_bench": _score_mt_bench,
    "lm_eval": _score_harness,
}


def _settings(session: _Session, bench: str, n: int) -> dict[str, Any]:
    """What stands behind the score of generated answers."""
    section, asked = session.recipe.data, session.recipe.eval
    settings: dict[str, Any] = {"engine": asked.engine, "template": section.template or section.format}
    settings |= {"temperature": asked.temperature, "samples": asked.samples, "seed": session.recipe.seed}
    settings |= {"max_new_tokens": asked.max_new_tokens, "stop": asked.stop}
    settings |= {"batch_size": "1: what is asked beside it changes its answers"} if session.one_by_one else {}
    return settings | _published(session, bench, n)


def _lengths(session: _Session, prompts: list[tuple[str, list[int]]], outputs: Sequence[str]) -> dict[str, int]:
    """How many prompts fill the context, so that their answers are empty, and how many answers are as long as they may
    be, to a token that tokenizing them again may take; where there are such."""
    rooms = [min(session.recipe.eval.max_new_tokens, session.context - len(tokens)) for _, tokens in prompts]
    written = session.tokenizer(list(outputs), add_special_tokens=False, verbose=False)["input_ids"] if outputs else []
    counts = {
        "prompts_without_room": sum(room < 1 for room in rooms),
        "answers_without_end": sum(len(ids) >= max(1, room - 1) for room, ids in zip(rooms, written, strict=True)),
    }
    return {name: count for name, count in counts.items() if count}


def _published(session: _Session, bench: str, n: int) -> dict[str, Any]:
    """The published figure where it is of as many rows, and greedy as well."""
    recipe = session.recipe
    found = published(recipe.model.name, recipe.adapter.method, recipe.model.bits, bench, n)
    if found is None or session.facts["model"] != "trained" or recipe.eval.temperature:
        return {}
    return dict(zip(("published", "published_in"), found, strict=True))


def _answers(session: _Session, file: str, prompts: list[tuple[str, list[int]]], count: Count) -> Kept:
    """The model's outputs for prompts (text, tokens), of which those that were kept are not asked for again."""
    section = session.recipe.eval
    turn = end_of_turn(session.tokenizer) if session.recipe.data.format == "chat" else []
    stop, stop_ids = special_stops([*section.stop, *turn], session.tokenizer)
    sampling = (section.engine, section.max_new_tokens, section.temperature, session.recipe.seed, stop, stop_ids)
    with Kept(session.folder / file, (session.facts, *sampling), [text for text, _ in prompts]) as kept:
        left = [number for number in range(len(prompts)) if number not in kept.outputs]
        asked = [prompts[number][1] for number in left]

        def counted(done: int, _total: int) -> None:
            count(len(prompts) - len(left) + done, len(prompts))

        length, warmth, seed = section.max_new_tokens, section.temperature, session.recipe.seed
        if isinstance(session.writer, Server):
            seeds = [seed + number for number in left]
            answers = session.writer.generate(asked, length, warmth, seeds, stop, stop_ids, counted)
        else:
            seed += len(kept.outputs)  # after an interruption not the same numbers again
            settings = (1 if session.one_by_one else section.batch_size, length, warmth, seed, stop, stop_ids, counted)
            answers = generate(session.writer, session.tokenizer, asked, *settings)
        with autocast(session.recipe, best_device()):
            for index, output in answers:
                kept.add(left[index], output)
    return kept
