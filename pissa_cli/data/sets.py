"""The examples a recipe trains on and those it holds out: from one source or several, or a share of the former."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
import xxhash
from huggingface_hub.constants import HF_HOME
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pissa_cli.base.configuration import end_tokens, read_config
from pissa_cli.data.classification import require_same_ends
from pissa_cli.data.examples import Examples, join
from pissa_cli.data.tokenize import Say, load_examples
from pissa_cli.errors import UsageError
from pissa_cli.schema.data_options import DataSection, held_out_name, held_out_sources, sources_of
from pissa_cli.schema.recipe import Recipe


def load_sets(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, say: Say = lambda _: None
) -> tuple[Examples, Examples | None]:
    """(to train on, held out) as `data.train` and `data.eval` say; what is held out is used whole. say: as in
    `load_examples`, and of held-out examples that are trained on.

    Raises UsageError as `load_examples`, and for a share of too few examples.
    """
    section = recipe.data
    train = load_sources(sources_of(section.train), section, recipe, tokenizer, say)
    if section.held_out_share is not None:
        return _split(train, section.held_out_share)
    if section.eval is None:
        return train, None
    whole = section.model_copy(update={"limit": None})
    held_out = load_sources(sources_of(section.eval), whole, recipe, tokenizer, say)
    if seen := int(torch.isin(_hashes(held_out), _hashes(train)).sum()):
        say(f"data.eval: {seen:,} of {len(held_out):,} examples are trained on, too")
    return train, held_out


def load_held_out(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, limit: int | None, trained_on: str = ""
) -> Examples:
    """The first `limit` held-out examples, as training has them. Needs `data.eval`; raises as `load_sets`.

    trained_on: the hash of the examples that a run was trained on, if there was one. UsageError where a share leaves
    other examples to train on than those: the run may have seen some of what is held out now.
    """
    section, share = recipe.data, recipe.data.held_out_share
    if share is None:
        section = section.model_copy(update={"limit": limit})
    found = load_sources(held_out_sources(section), section, recipe, tokenizer)
    if share is not None:
        train, found = _split(found, share)
        if trained_on and train.digest() != trained_on:
            raise UsageError(
                f"{held_out_name(section)} is not what this run held out: it was trained on other tokens than are left",
                "bring the old rows and the run's data section back, or name rows that it has not seen: "
                "--data loss=FILE",
            )
    if limit is None or len(found) <= limit:
        return found
    return found.select(torch.arange(len(found)) < limit)


def load_sources(
    sources: Sequence[str],
    section: DataSection,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    say: Say = lambda _: None,
) -> Examples:
    """The examples of all sources, each from the cache of tokens if it is there. Raises as `load_examples`.

    Texts to classify are as the model beside the tokenizer takes them: without token types that it does not know, and
    with as many ends where it looks for these.
    """
    cache, labels = Path(HF_HOME) / "pissa" / "tokens", recipe.model.labels
    if not section.classifies:
        return join([(source, load_examples(source, section, tokenizer, cache, say=say)) for source in sources])
    folder = Path(tokenizer.name_or_path)
    config = read_config(folder, recipe.model)
    if config.is_encoder_decoder and config.model_type.startswith("t5gemma"):
        raise UsageError(
            f"{folder}: a T5Gemma's answer to a text changes with the padding on the right of it",
            'use another model; of T5Gemma, not 2, "is_encoder_decoder": false in its config.json takes the encoder '
            "alone",
        )
    ends = end_tokens(getattr(config, "eos_token_id", None)) if config.is_encoder_decoder else []
    if config.is_encoder_decoder and not ends:
        raise UsageError(
            f"{folder}: no eos_token_id in its config.json, and this model looks at where a text ends", "write it there"
        )
    end = ends[0] if ends else None
    examples = join(
        [(source, load_examples(source, section, tokenizer, cache, labels, end, say)) for source in sources]
    )
    if getattr(config, "type_vocab_size", 2) < 2:
        examples.targets = torch.zeros_like(examples.targets)
    if end is not None:
        require_same_ends(", ".join(sources), examples, end)
    return examples


def num_held_out(num: int, share: float) -> int:
    """How many of `num` examples a share holds out: at least one."""
    return max(1, round(num * share))


def _hashes(examples: Examples) -> Tensor:
    """A number for each example, by its tokens."""
    ids, offsets = examples.ids.numpy(), examples.offsets.tolist()
    return torch.tensor([xxhash.xxh3_64_intdigest(ids[begin:end].data) >> 1 for begin, end in pairwise(offsets)])


def _split(examples: Examples, share: float) -> tuple[Examples, Examples]:
    """(examples to train on, `share` of them that is held out).

    Held out are those whose tokens have the lowest hashes. So equal examples are on one side, and rows that are added
    later move few from one side to the other. An example that is there more often than the share has room for is passed
    over.
    """
    groups, group_of, counts = _hashes(examples).unique(return_inverse=True, return_counts=True)
    taken, room = torch.zeros(len(groups), dtype=torch.bool), num_held_out(len(examples), share)
    for group, count in enumerate(counts.tolist()):
        if count <= room:
            taken[group], room = True, room - count
        if room == 0:
            break
    if not taken.any():
        taken[int(counts.argmin())] = True
    wanted: Tensor = taken[group_of]
    if wanted.all():
        raise UsageError(
            f"data.eval: {share:.2%} of {len(examples)} examples leaves none to train on, as equal ones stay together",
            "give more rows, or held-out rows of their own",
        )
    held_out = replace(examples.select(wanted), unusable={}, unused=[], num_cut=0, num_lost=0)
    return examples.select(~wanted), held_out
