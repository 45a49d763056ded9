"""What config.json says of a model, as transformers reads it."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from pissa_cli.errors import UsageError, in_one_line
from pissa_cli.schema.recipe import ModelSection

MOST_PARTS = 10_000
"""Layers, or experts in one: making the modules of absurdly many would take forever."""


def read_config(folder: Path, section: ModelSection) -> Any:
    """The configuration, with the classes of a classifier; one that pools the last token has to know the padding."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=section.trust_remote_code)
        values = config.get_text_config().to_dict()
    except Exception as error:  # transformers' classes raise what they like at values they did not expect
        raise UsageError(
            f"{folder / 'config.json'}: transformers cannot read it ({in_one_line(error)})",
            "check the file; code that comes with a model runs only with model.trust_remote_code",
        ) from None
    for key, value in values.items():
        fault = _fault(key, value)
        if fault is not None:
            raise UsageError(f"{folder / 'config.json'}: {key} is {value}, {fault}", "this file is damaged")
    if section.task == "sequence-classification":
        config.num_labels = len(section.labels)
        config.id2label = dict(enumerate(section.labels))
        config.label2id = {label: number for number, label in enumerate(section.labels)}
        config.problem_type = "regression" if len(section.labels) == 1 else "single_label_classification"
        config.pad_token_id = _padding(folder, section, config)
    return config


def _padding(folder: Path, section: ModelSection, config: Any) -> int | None:
    """The token that pads a classifier's texts, the first of these that the model has an embedding of: its own padding,
    unless texts have that token; the tokenizer's, with which others pad; the end-of-text of either."""
    known = vocabulary_of(config)
    own, found = getattr(config, "pad_token_id", None), end_tokens(getattr(config, "eos_token_id", None))
    files = tuple((path.name, path.stat().st_mtime_ns) for path in sorted(folder.glob("*token*")))
    pad, end, added = _tokenizers_own(folder, files, section.trust_remote_code)
    if added is not None and own not in added:
        own = None
    return next((token for token in (own, pad, *found, end) if token is not None and 0 <= token < known), None)


@lru_cache(maxsize=4)
def _tokenizers_own(
    folder: Path, _files: tuple[tuple[str, int], ...], trust_remote_code: bool
) -> tuple[int | None, int | None, frozenset[int] | None]:
    """A tokenizer's padding, end-of-text, and tokens that are no part of texts, read once unless a file changes; None
    for what it lacks."""
    with suppress(Exception), no_panic(folder):  # whoever needs the tokenizer says what is wrong with it
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        return tokenizer.pad_token_id, tokenizer.eos_token_id, frozenset(tokenizer.added_tokens_decoder)
    return None, None, None


def require_tokens(name: str, tokens: Iterable[int], config: Any) -> None:
    """UsageError for a token above those that the model has embeddings of."""
    known, highest = vocabulary_of(config), max(tokens, default=0)
    if highest >= known:
        raise UsageError(
            f"{name}: token {highest} is beyond the model's vocabulary of {known}",
            "the tokenizer and the model do not belong together",
        )


def vocabulary_of(config: Any) -> int:
    """How many tokens a model knows. CANINE has no such number: its tokens are characters, whichever they are."""
    return int(getattr(config.get_text_config(), "vocab_size", sys.maxunicode + 1))


def context_of(config: Any) -> int | None:
    """Tokens that a model of this configuration can see, where it says."""
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None


def end_tokens(ids: int | list[int] | None) -> list[int]:
    """What an `eos_token_id` of a configuration names: one token, several or none."""
    return ids if isinstance(ids, list) else [] if ids is None else [ids]


def _fault(key: str, value: Any) -> str | None:
    """What is wrong with a value that transformers takes, and that a model cannot be made or run with."""
    if value is None and re.search(r"^(attention|hidden).*dropout|pdrop", key):
        return "which is no probability"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if re.search(r"layers$|^n_layer$|experts$", key) and not 0 <= value <= MOST_PARTS:
        return f"which is not from 0 to {MOST_PARTS:,}"
    if re.search(r"dropout|pdrop", key) and not 0 <= value < 1:
        return "which is no probability below 1"
    return None


@contextmanager
def no_panic(source: object) -> Iterator[None]:
    """Where a tokenizer runs: UsageError if the library in Rust breaks down, which is no Exception in Python."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise UsageError(
            f"{source}: the tokenizer breaks down ({in_one_line(error)})", "is its file damaged?"
        ) from None
