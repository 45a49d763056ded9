"""What a benchmark is scored on, from wherever it is."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from pissa_cli.data.sets import load_held_out, load_sources
from pissa_cli.errors import Unreachable
from pissa_cli.evals import harness, mt_bench
from pissa_cli.evals.benches import GENERATED, is_held_out, read_bench, source_of
from pissa_cli.outputs.trained import trained_on
from pissa_cli.schema.recipe import Recipe
from pissa_cli.training.guards import require_context


def load_bench(bench: str, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, context: int) -> Any:
    """What a benchmark is scored on: rows, tokenized examples, or MT-Bench's questions. Raises as `read_bench`."""
    try:
        return _load(bench, recipe, tokenizer, context)
    except Unreachable as error:
        error.hint = f"check the network, or give a local file: --data {bench}=FILE"
        raise


def _load(bench: str, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, context: int) -> Any:
    if bench.startswith(harness.PREFIX):
        return harness.load_task(bench, recipe.eval.data.get(bench))
    if bench == "mt_bench":
        return mt_bench.load(source_of(bench, recipe), recipe.eval.limit)
    if bench in GENERATED:
        return read_bench(bench, recipe)
    source = source_of(bench, recipe)
    if is_held_out(bench, recipe):
        examples = load_held_out(recipe, tokenizer, recipe.eval.limit, trained_on(recipe))
    else:
        section = recipe.data.model_copy(update={"limit": recipe.eval.limit})
        examples = load_sources([source], section, recipe, tokenizer)
    require_context(source, examples, context)
    return examples
