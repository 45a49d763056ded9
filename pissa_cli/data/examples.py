"""Tokenized examples in one flat piece, and their cache by content."""

from __future__ import annotations

import itertools
import json
import os
import secrets
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pissa_cli.base.weights import hash_file, load_tensors, save_tensors
from pissa_cli.errors import PissaError, UsageError
from pissa_cli.schema.data_options import DataSection

CUT = "answer cut off entirely by data.max_length"
REASONS = 10
KEPT_SECONDS = 30 * 24 * 3600
"""How long the tokens of a set stay in the cache when nobody asks for them."""
SHOWN, TURNS = 60, 4  # of the first example: characters at either end of a text, texts


class Encoded(NamedTuple):
    """Tokens of one row, and as in `Examples` what is a target; of a text to classify its label, and if it was cut."""

    ids: list[int]
    targets: list[bool]
    label: float | None = None
    cut: bool = False


@dataclass
class Examples:
    """Tokenized examples: `ids` (sum of lengths,) int32, `targets` likewise bool (True where the loss counts),
    `offsets` (n + 1,) int64 where each begins; and what happened on the way.

    Of texts to classify, `labels` (n,) fp32 holds the number of each one's class, or its quantity, and `targets` marks
    the tokens of type 1: those of the second text, for models that are told. `unused`: columns that nothing asked for.
    `num_cut`, `num_lost`: examples that were too long, and the tokens of those that are left out.
    """

    ids: Tensor
    targets: Tensor
    offsets: Tensor
    unusable: dict[str, list[int]] = field(default_factory=dict)
    num_cut: int = 0
    labels: Tensor | None = None
    unused: list[str] = field(default_factory=list)
    num_lost: int = 0

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def length(self, index: int) -> int:
        """Tokens of one example."""
        return int(self.offsets[index + 1] - self.offsets[index])

    def by_length(self) -> Tensor:
        """The examples (n,) from the shortest to the longest, alike ones in their order."""
        return self.offsets.diff().argsort(stable=True)

    def tokens(self, index: int) -> Tensor:
        """Those of one example, int32."""
        return self.ids[int(self.offsets[index]) : int(self.offsets[index + 1])]

    def num_targets(self, index: int) -> int:
        """Tokens of one example that are predicted, of which the first never is; of a text to classify, one label."""
        if self.labels is not None:
            return 1
        begin, end = int(self.offsets[index]), int(self.offsets[index + 1])
        return int(self.targets[begin + 1 : end].sum())

    def select(self, wanted: Tensor) -> Examples:
        """The examples where `wanted` (n,) bool is true, in their order; what happened on the way stays."""
        outside = torch.zeros(1, dtype=torch.int64)
        edges = torch.cat([outside, wanted, outside]).diff().nonzero().flatten()
        runs = [slice(*run) for run in self.offsets[edges].reshape(-1, 2).tolist()]
        ids, targets = (torch.cat([flat[:0], *(flat[run] for run in runs)]) for flat in (self.ids, self.targets))
        offsets = torch.cat([outside, self.offsets.diff()[wanted].cumsum(0)])
        labels = None if self.labels is None else self.labels[wanted]
        return replace(self, ids=ids, targets=targets, offsets=offsets, labels=labels)

    def digest(self) -> str:
        """A hash over all tokens, targets and lengths."""
        whole = xxhash.xxh3_128()
        labels = () if self.labels is None else (self.labels,)
        for tensor in (self.ids, self.targets, self.offsets, *labels):
            whole.update(tensor.contiguous().view(torch.uint8).numpy().data)
        return f"xxh3:{whole.hexdigest()}"

    def facts(self) -> dict[str, Any]:
        """Counts and hash, for the record: examples used, rows not used by reason, examples cut at the end."""
        unusable = {reason: len(rows) for reason, rows in self.unusable.items()}
        return {"used": len(self), "not_used": unusable, "cut": self.num_cut, "hash": self.digest()}

    def notes(self, name: str) -> list[str]:
        """What happened to rows on the way, for the person watching."""
        lost = f" ({self.num_lost:,} tokens left out)" if self.num_lost else ""
        cut = f", {self.num_cut:,} of them cut at data.max_length{lost}" if self.num_cut else ""
        lines = [f"{name}: {len(self):,} examples, {len(self.ids):,} tokens{cut}"]
        if self.unused:
            lines.append(f"{name}: columns not used: {', '.join(self.unused)}")
        for reason, rows in self.unusable.items():
            lines.append(f"{name}: rows not used: {len(rows)}, {reason} (row {_first(rows)})")
        left_out = sum(map(len, self.unusable.values()))
        number = left_out + len(self)
        if left_out > len(self):
            lines.append(f"{name}: most rows are not used ({left_out:,} of {number:,}): is that meant?")
        return lines


def join(parts: Sequence[tuple[str, Examples]]) -> Examples:
    """The examples of several sources (name, examples), one after the other; rows not used keep the source's name."""
    if len(parts) == 1:
        return parts[0][1]
    every = [part for _, part in parts]
    begins = [0, *itertools.accumulate(len(part.ids) for part in every)]
    offsets = [begin + part.offsets[1:] for begin, part in zip(begins, every, strict=False)]
    labels = [part.labels for part in every if part.labels is not None]
    return Examples(
        torch.cat([part.ids for part in every]),
        torch.cat([part.targets for part in every]),
        torch.cat([torch.zeros(1, dtype=torch.int64), *offsets]),
        {f"{name}: {reason}": rows for name, part in parts for reason, rows in part.unusable.items()},
        sum(part.num_cut for part in every),
        torch.cat(labels) if labels else None,
        list(dict.fromkeys(column for part in every for column in part.unused)),
        sum(part.num_lost for part in every),
    )


def first_example(examples: Examples, tokenizer: PreTrainedTokenizerBase) -> str:
    """What of the first example is read and what is learned, in turns, each shortened in the middle."""
    end, turns = examples.length(0), []
    tokens = zip(examples.targets[:end].tolist(), examples.ids[:end].tolist(), strict=True)
    for learned, part in itertools.groupby(tokens, key=lambda token: token[0]):
        text = str(tokenizer.decode([token for _, token in part]))
        text = text if len(text) <= 2 * SHOWN else f"{text[:SHOWN]} ... {text[-SHOWN:]}"
        turns.append(f"{'learned' if learned else 'read'} {json.dumps(text, ensure_ascii=False)}")
    return ", ".join(turns[:TURNS]) + (", ..." if len(turns) > TURNS else "")


def refuse(unusable: dict[str, list[int]], reason: str, number: int) -> None:
    """Add a row that cannot be used; what is beyond REASONS different reasons, as of values, is counted together."""
    known = reason in unusable or len(unusable) < REASONS
    unusable.setdefault(reason if known else "for other reasons", []).append(number)


def no_usable_row(source: str, section: DataSection, unusable: dict[str, list[int]]) -> UsageError:
    """For a set whose every row was refused, with the reasons and the first rows."""
    reasons = "; ".join(f"{reason}: {len(rows)} (row {_first(rows)})" for reason, rows in unusable.items())
    if CUT in unusable:
        hint = f"raise data.max_length (now {section.max_length})"
    elif section.classifies:
        hint = "model.labels has to hold the labels as the rows have them; data.columns says in which column they are"
    elif any("the chat template" in reason for reason in unusable):
        hint = "data.template takes another chat template, which has to write all that the rows hold"
    else:
        hint = f"docs/recipes.md says what a row of format {section.format} is; data.columns takes other columns"
    return UsageError(f"{source}: no usable row ({reasons or 'it is empty'})", hint)


def _first(rows: Sequence[int]) -> str:
    return ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")


def cache_key(
    content: str, section: DataSection, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str], end: int | None
) -> str:
    """The name under which tokens are kept: a hash over all that they depend on. content: the hash of the rows."""
    options: dict[str, Any] = section.model_dump(exclude={"train", "eval", "packing"})
    options |= {"labels": list(labels), "end": end}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.no_truncation()  # that of the last text, which every call sets anew
    identity = backend.to_str() if backend is not None else f"{tokenizer!r} {_files_of(tokenizer)}"
    settings = tokenizer.chat_template, tokenizer.special_tokens_map, tokenizer.truncation_side
    whole = xxhash.xxh3_128(content.encode())
    for part in (json.dumps(options, sort_keys=True), identity, str(settings)):
        whole.update(part.encode())
    return f"v14-{whole.hexdigest()}"


def _files_of(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Hashes of the files of a tokenizer in Python, which does not say what it holds."""
    folder = Path(tokenizer.name_or_path)
    paths = [folder / str(name) for name in (*tokenizer.vocab_files_names.values(), "tokenizer_config.json")]
    return [hash_file(path) for path in paths if path.is_file()]


def write_cache(path: Path, examples: Examples) -> None:
    """Keep the tokens, and no longer those that nobody asked for in a month; a cache that cannot be written costs time,
    not the run."""
    kept = ("unusable", "num_cut", "num_lost", "unused")
    notes = json.dumps({name: getattr(examples, name) for name in kept}).encode()
    tensors = {"ids": examples.ids, "targets": examples.targets, "offsets": examples.offsets}
    tensors |= {} if examples.labels is None else {"labels": examples.labels}
    tensors["notes"] = torch.frombuffer(bytearray(notes), dtype=torch.uint8)
    temporary = path.with_suffix(f".{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(temporary, tensors)
        temporary.replace(path)
    except (OSError, PissaError):
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    for other in path.parent.glob("v*-*"):
        with suppress(OSError):  # another process forgets them, too
            if other.stat().st_mtime < time.time() - KEPT_SECONDS:
                other.unlink()


def read_cache(path: Path) -> Examples | None:
    """What `write_cache` kept; None where it cannot be read."""
    try:
        tensors = load_tensors(path)
        with suppress(OSError):  # of a cache that may only be read
            os.utime(path)
        notes = json.loads(bytes(tensors.pop("notes").tolist()))
        flat = tensors["ids"], tensors["targets"], tensors["offsets"]
        return Examples(*flat, labels=tensors.get("labels"), **notes)
    except (PissaError, KeyError, ValueError, TypeError):
        return None
