"""Texts to classify: from rows to tokens and the numbers of their classes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from pissa_cli.data.columns import label_columns
from pissa_cli.data.examples import Encoded, Examples
from pissa_cli.data.rows import Row, text_of, value_of
from pissa_cli.errors import UsageError, escaped, listed
from pissa_cli.schema.data_options import DataSection

SHOWN = 40
TRUTH = ("true", "false")
"""Labels that are written in more than one way: true in JSON, True in Python, TRUE in a spreadsheet."""
LARGEST = 1e18
"""Of quantities: their errors are squared and summed in fp32."""


def encode_classified(
    rows: list[Row],
    section: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    labels: Sequence[str],
    end: int | None,
) -> list[Encoded | str]:
    """(tokens, token types, label) of each row, or why it cannot be used. What is too long is cut where the
    tokenizer cuts it.

    end: a token that no text may hold beyond those that the tokenizer adds.
    """
    results: list[Encoded | str] = []
    found: dict[int, list[tuple[int, list[str], float]]] = {1: [], 2: []}
    for index, row in enumerate(rows):
        results.append("no text")
        *columns, label_column = label_columns(section, list(row)).values()
        try:
            if section.glue is None and value_of(row, columns[-1]) in (None, ""):
                columns = columns[:1]  # the second text is not there
            texts = [text_of(row, column) for column in columns]
            label = label_number(value_of(row, label_column), label_column, labels)
        except ValueError as error:
            results[index] = str(error)
            continue
        if texts[0].strip():
            found[len(texts)].append((index, texts, label))
    for num_texts, group in found.items():
        wanted = [texts for _, texts, _ in group]
        encoded = _encode(wanted, tokenizer)
        long = [place for place, (ids, _) in enumerate(encoded) if len(ids) > section.max_length]
        shorter = _encode([wanted[place] for place in long], tokenizer, truncation=True, max_length=section.max_length)
        cut = dict(zip(long, shorter, strict=True))
        ends = tokenizer(*["a"] * num_texts, verbose=False)["input_ids"].count(end)
        for place, (index, _, label) in enumerate(group):
            ids, types = cut.get(place, encoded[place])
            if end is not None and ids.count(end) != ends:
                token = tokenizer.convert_ids_to_tokens(end)
                results[index] = f"a text holds {token}, at which this model looks for its end"
            elif ids:
                results[index] = Encoded(ids, list(map(bool, types)), label, place in cut)
    return results


def _encode(
    texts: list[list[str]], tokenizer: PreTrainedTokenizerBase, **options: Any
) -> list[tuple[list[int], list[int]]]:
    """(tokens, token types) of single texts, or of pairs, all at once."""
    if not texts:
        return []
    columns = map(list, zip(*texts, strict=True))
    encoded: Any = tokenizer(*columns, verbose=False, return_attention_mask=False, **options)
    types = encoded.get("token_type_ids") or [[0] * len(ids) for ids in encoded["input_ids"]]
    return list(zip(encoded["input_ids"], types, strict=True))


def require_same_ends(name: str, examples: Examples, end: int) -> None:
    """UsageError for examples with no end-of-text, `end`, or with more in one than in another."""
    before = torch.cat([torch.zeros(1, dtype=torch.int64), (examples.ids == end).cumsum(0)])
    found = before[examples.offsets].diff().unique().tolist()
    if found == [0]:
        raise UsageError(
            f"{name}: the tokenizer ends no text with end-of-text, at which this model looks at it",
            "use the tokenizer that belongs to the model",
        )
    if len(found) > 1:
        raise UsageError(
            f"{name}: some rows are pairs of texts and some single texts, which this model does not take together",
            "give every row a text_pair, or none: remove the column",
        )


def class_counts(examples: Examples, labels: Sequence[str]) -> str | None:
    """A line with the rows of each class, where one has none."""
    assert examples.labels is not None
    if len(labels) == 1:
        return None
    counts = torch.bincount(examples.labels.long(), minlength=len(labels)).tolist()
    if 0 not in counts:
        return None
    rows = listed([f"{label} {count:,}" for count, label in sorted(zip(counts, labels, strict=True))])
    return f"classes without a row: {counts.count(0)} of {len(labels)}; rows of each: {rows}"


def label_number(value: object, column: str, labels: Sequence[str]) -> float:
    """The class of a row by its name or its number, or with one label the quantity. ValueError for anything else."""
    if isinstance(value, list):
        raise ValueError(f"'{column}' is a list: one class a text; several labels a text are not trained here")
    if value is None or not isinstance(value, str | int | float):
        raise ValueError(f"'{column}' is {'missing' if value is None else 'neither a text nor a number'}")
    text, number = str(value), _number(value)
    text = text if text in labels else text.strip()
    quoted = escaped(text[:SHOWN])
    if len(labels) == 1:
        if abs(number) <= LARGEST:
            return number
        raise ValueError(f"'{column}' is '{quoted}', not a number")
    if text in labels:
        return float(labels.index(text))
    if text.lower() in TRUTH and text.lower() in (lowered := [label.lower() for label in labels]):
        return float(lowered.index(text.lower()))
    numbers = [_number(label) for label in labels]
    if any(map(math.isfinite, numbers)):  # classes such as 1 to 5: their names count, not their places
        if number in numbers:
            return float(numbers.index(number))
    elif number.is_integer() and 0 <= number < len(labels) and [label.lower() for label in labels] != list(TRUTH):
        return number
    raise ValueError(f"'{column}' is '{quoted}', not one of model.labels ({listed(labels)})")


def labels_of(rows: list[Row], section: DataSection, labels: Sequence[str]) -> Counter[str | float]:
    """How many rows have each name of `labels`, and each number up to as many, for their label."""
    found = [value_of(row, label_columns(section, list(row))["label"]) for row in rows]
    known = {*labels, *range(len(labels) + 1)}
    keys = [number if (number := _number(value)).is_integer() else str(value).strip() for value in found]
    return Counter(key for key in keys if key in known)


def require_from_zero(source: str, found: Counter[str | float], labels: Sequence[str]) -> None:
    """UsageError where the labels `found` in a set count the classes from 1, and most of them are no names of one."""
    last = len(labels)
    numbers, names = [found[number] for number in range(1, last + 1)], sum(found[label] for label in labels)
    named = any(math.isfinite(_number(label)) for label in labels) or names > sum(numbers)
    if last > 1 and not named and found[last] and not found[0] and any(numbers[:-1]):
        raise UsageError(
            f"{source}: its labels count the classes from 1 to {last}; model.labels has them from 0 ({listed(labels)})",
            "write names or numbers from 0 into the rows, or let model.labels be the numbers: "
            f"[{listed([str(number + 1) for number in range(last)])}]",
        )


def _number(value: object) -> float:
    try:
        return float(str(value))
    except ValueError:
        return math.nan
