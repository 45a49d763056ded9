"""All that training needs before its model is loaded."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from pissa_cli.base.configuration import read_config, require_tokens
from pissa_cli.base.folder import local_base
from pissa_cli.base.heads import head_note
from pissa_cli.base.loading import load_tokenizer
from pissa_cli.base.model import context_length
from pissa_cli.data.chat import require_template, unlearned_prompt
from pissa_cli.data.classification import class_counts
from pissa_cli.data.columns import require_data
from pissa_cli.data.examples import Examples, first_example
from pissa_cli.data.rows import is_local, read_rows
from pissa_cli.data.sets import load_sets, num_held_out
from pissa_cli.data.tokenize import Say
from pissa_cli.files import require_writable
from pissa_cli.initialize import Progress, initialize, plan_start
from pissa_cli.run.reached import newest_facts
from pissa_cli.run.report import notes_of
from pissa_cli.run.rundir import run_of
from pissa_cli.run.started import open_run, require_base
from pissa_cli.schema.data_options import sources_of
from pissa_cli.schema.recipe import Recipe
from pissa_cli.training.guards import require_context, require_reach, resumes, schedule_change
from pissa_cli.training.kernels import require_kernels
from pissa_cli.training.steps import count_steps, step_examples

Prepared = tuple[dict[str, Any], PreTrainedTokenizerBase, Examples, Examples | None]
"""The manifest, the tokenizer, examples to train and to hold out."""


def check_inputs(recipe: Recipe, resume: bool) -> tuple[int, int] | None:
    """Raise UsageError for what shows before any work: a run that is there already or goes by another recipe, kernels
    that cannot run here, chats for a local base without a template. Returns `steps_to_take`."""
    resumes(recipe, resume)
    require_kernels(recipe.train)
    if recipe.data.format == "chat" and (base := local_base(recipe.model)) is not None:
        require_template(load_tokenizer(base, recipe))
    planned = steps_to_take(recipe)
    if planned is not None:
        require_reach(planned[1], recipe)
    return planned


def steps_to_take(recipe: Recipe) -> tuple[int, int] | None:
    """(steps, rows): how many steps the rows of local files make, if all of them can be used; None where an example is
    no row, and where data are on the Hub."""
    sources, share = sources_of(recipe.data.train), recipe.data.held_out_share
    if not sources or not all(is_local(source) for source in sources) or recipe.data.format == "text":
        return None
    rows = sum(isinstance(row, dict) for source in sources for _, row in read_rows(source, recipe.data.limit))
    rows -= 0 if share is None else num_held_out(rows, share)
    return count_steps(rows, recipe, newest_facts(run_of(recipe))["missed"]), rows


def prepare(
    recipe: Recipe, resume: bool, say: Say = lambda _: None, init_progress: Progress = lambda *_: None
) -> Prepared:
    """Check, tokenize and initialize. Raises UsageError; what was done is not done again.

    say: told what the person watching should know.
    """
    run = run_of(recipe)
    resumed = resumes(recipe, resume)
    if resume and not resumed:
        say(f"{run.folder}: there is no checkpoint; training begins with the first step")
    require_data(recipe)
    require_writable(run.folder)
    if recipe.train.eval_every is not None and recipe.data.eval is None:
        say("train.eval_every: without data.eval there is nothing to take losses on")
    require_kernels(recipe.train)
    # a wrong rank or target must not cost the tokenization
    folder = require_base(open_run(recipe)[1], recipe) if run.exists() else plan_start(recipe)[0].folder
    tokenizer = load_tokenizer(folder, recipe)
    examples, held_out = load_sets(recipe, tokenizer, say)
    require_reach(len(examples), recipe)
    if resumed and (change := schedule_change(recipe)):
        say(change)
    if len(step_examples(0, len(examples), recipe)) > len(examples):
        say(f"train.batch_size: a step of {recipe.train.batch_size} has each example more than once")
    if recipe.train.warmup >= (steps := count_steps(len(examples), recipe, newest_facts(run)["missed"])):
        say(
            f"train.warmup: of {recipe.train.warmup:g} steps, and training has {steps}: the rate never reaches train.lr"
        )
    for name, loaded in (("data.train", examples), ("data.eval", held_out)):
        if loaded is not None:
            require_context(name, loaded, context_length(folder, recipe.model))
            require_tokens(name, [int(loaded.ids.max())], read_config(folder, recipe.model))
            for line in loaded.notes(name):
                say(line)
    if recipe.data.classifies:
        if counts := class_counts(examples, recipe.model.labels):
            say(f"data.train: {counts}")
    else:
        say(f"data.train: the first example: {first_example(examples, tokenizer)}")
    if recipe.data.format == "chat" and (prompt := unlearned_prompt(examples, tokenizer)) is not None:
        say(f"data.format chat: `eval` asks with {prompt!r}, which what is learned does not follow here")
    manifest = initialize(recipe, init_progress)  # after the data: a missing column must not cost an init
    if recipe.data.classifies and not resumed:
        say(head_note(folder, recipe))
    for line in notes_of(manifest):
        say(line)
    return manifest, tokenizer, examples, held_out
