"""From rows to tokens: prompt templates, masks, truncation; or the tokens from the cache."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pissa_cli.base.configuration import no_panic
from pissa_cli.data.chat import encode_chats, question_text, require_template
from pissa_cli.data.classification import encode_classified, labels_of, require_from_zero
from pissa_cli.data.columns import preference, require_columns, unused_columns
from pissa_cli.data.examples import CUT, Encoded, Examples, cache_key, no_usable_row, read_cache, refuse, write_cache
from pissa_cli.data.messages import unused_keys
from pissa_cli.data.rows import Row, content_hash, read_rows, text_of, value_of
from pissa_cli.data.turns import tokens_of, tokens_within
from pissa_cli.schema.data_options import FIELDS, DataSection

INTRO = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
INTRO_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
)
TEMPLATE = INTRO + "### Instruction:\n{instruction}\n\n### Response:{output}\n"
"""PiSSA's template (its train.py): nothing between 'Response:' and the answer, a newline before end-of-text."""
TEMPLATE_INPUT = INTRO_INPUT + "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:{output}\n"
Say = Callable[[str], None]
SAY_SECONDS = 10
BATCH, CHARACTERS = 1000, 2**22
"""Most rows that are tokenized at once, and most characters: their tokens take a hundred times the memory."""


def load_examples(
    source: str,
    section: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    cache: Path | None,
    labels: Sequence[str] = (),
    end: int | None = None,
    say: Say = lambda _: None,
) -> Examples:
    """Tokenize `source` by the recipe's `data` section, or take the tokens from the cache. labels: `model.labels`; end:
    as in `encode_classified`; say: told every ten seconds how far it is.

    Raises UsageError for a missing column (the columns are listed) and for a set without a usable row.
    """
    if section.format == "chat":
        require_template(tokenizer)
    path = None
    if cache is not None:
        path = cache / f"{cache_key(content_hash(source), section, tokenizer, labels, end)}.safetensors"
    if path is not None and path.is_file() and (cached := read_cache(path)) is not None:
        return cached
    with no_panic(source):
        examples = _tokenize(source, section, tokenizer, labels, end, say)
    if path is not None:
        write_cache(path, examples)
    return examples


def render(row: Row, section: DataSection) -> tuple[str, str]:
    """(prompt, answer) of a row that is not a chat. Raises ValueError, with the reason, for an unusable row."""
    fields = {name: text_of(row, section.column(name)) for name in FIELDS[section.format]}
    learned = FIELDS[section.format][-1]
    if not fields[learned].strip():
        raise ValueError(f"'{section.column(learned)}' is empty")
    if section.format == "text":
        return "", fields["text"]
    if section.format == "prompt":
        return fields["prompt"], fields["completion"]
    further = section.optional_column("input")
    extra = "" if further is None or value_of(row, further) is None else text_of(row, further)
    if extra and section.template is not None and "{input}" not in section.template:
        raise ValueError(f"'{further}' has text, data.template no {{input}}")
    if not (fields["instruction"] + extra).strip():
        raise ValueError(f"'{section.column('instruction')}' is empty")
    return _fill(section, fields["instruction"], extra, fields["output"])


def question_prompt(
    question: str, section: DataSection, tokenizer: PreTrainedTokenizerBase, before: Sequence[tuple[str, str]] = ()
) -> tuple[str, list[int]]:
    """(text, tokens) that ask a model trained by this `data` section a question, tokenized as in training.

    before: questions and answers of earlier turns. Raises UsageError for chat where there is no template for it.
    """
    if section.format == "chat":
        text = question_text(question, before, tokenizer)
        return text, tokens_of(text, tokenizer)

    def ask(question: str) -> str:
        return _fill(section, question, "", "")[0] if section.format == "alpaca" else question

    text = "".join(f"{ask(one)}{answer}\n\n" for one, answer in before) + ask(question)
    ids = tokenizer(text, verbose=False)["input_ids"]
    return text, ids[:-1] if _appends_eos(tokenizer) else ids


def _fill(section: DataSection, instruction: str, extra: str, output: str) -> tuple[str, str]:
    template = section.template or (TEMPLATE_INPUT if extra else TEMPLATE)
    before, _, after = template.partition("{output}")
    values = {"{instruction}": instruction, "{input}": extra}
    prompt = re.sub(r"\{instruction\}|\{input\}", lambda match: values[match.group()], before)
    return prompt, output + after


def _tokenize(
    source: str,
    section: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    labels: Sequence[str],
    end: int | None,
    say: Say,
) -> Examples:
    """The examples of all rows, tokenized a batch at a time; arguments as in `load_examples`."""
    taken, found = _Taken(section, tokenizer.bos_token_id), Counter[str | float]()
    columns: dict[str, Any] = {}
    inner: dict[str, None] = {}
    said = time.monotonic()
    for batch, last in _batches(source, section, taken.unusable):
        rows = list(batch.values())
        for row in rows:
            if len(columns) < 100:
                columns |= {name: value for name, value in row.items() if name not in columns}
            if section.format == "chat" and len(inner) < 100:
                inner |= dict.fromkeys(unused_keys(row, section, tokenizer))
        require_columns(source, section, columns, whole=last)
        if section.classifies:
            found.update(labels_of(rows, section, labels))
        taken.add(batch, _encode(rows, section, tokenizer, labels, end))
        if not last and time.monotonic() - said > SAY_SECONDS:
            said, number = time.monotonic(), max(batch)
            say(f"{source}: {number:,} rows tokenized so far")
    require_from_zero(source, found, labels)
    if len(taken.lengths) == 1:
        raise no_usable_row(source, section, taken.unusable)
    return taken.examples([*unused_columns(section, columns), *inner])


def _batches(
    source: str, section: DataSection, unusable: dict[str, list[int]]
) -> Iterator[tuple[dict[int, Row], bool]]:
    """(rows by their number, whether they are the last): BATCH rows of `source` at a time, fewer where they are long.

    What is no row goes to `unusable`, and what is none to imitate. The last batch may be empty.
    """
    batch: dict[int, Row] = {}
    characters = 0
    for number, row in read_rows(source, section.limit):
        if isinstance(row, str):
            refuse(unusable, row, number)
            continue
        if preference(section, row) == "false":
            refuse(unusable, "'label' is false: not to be imitated", number)
            continue
        batch[number] = row
        characters += sum(len(str(value)) for value in row.values())
        if len(batch) == BATCH or characters >= CHARACTERS:
            yield batch, False
            batch, characters = {}, 0
    yield batch, True


class _Taken:
    """What has been tokenized so far, and which rows could not be used: the makings of `Examples`."""

    def __init__(self, section: DataSection, bos: int | None) -> None:
        self._section, self._bos = section, bos
        self._ids: list[Tensor] = []
        self._targets: list[Tensor] = []
        self._classes: list[float] = []
        self._num_cut = self._num_lost = 0
        self.lengths = [0]
        self.unusable: dict[str, list[int]] = {}

    def add(self, numbers: Iterable[int], encoded: Iterable[Encoded | str]) -> None:
        """Take what was made of the rows with these numbers. What is longer than `data.max_length` loses its end; a
        text of format `text` becomes several examples instead."""
        ids: list[int] = []
        targets: list[bool] = []
        most = self._section.max_length
        for number, result in zip(numbers, encoded, strict=True):
            if isinstance(result, str):
                refuse(self.unusable, result, number)
                continue
            if self._section.format == "text" and len(result.ids) > most:
                for piece in _pieces(result.ids, most, self._bos):
                    ids += piece
                    targets += [False, *[True] * (len(piece) - 1)]
                    self.lengths.append(len(piece))
                continue
            cut_ids, cut_targets = result.ids[:most], result.targets[:most]
            if result.label is not None:
                self._classes.append(result.label)
            elif not any(cut_targets[1:]):
                refuse(self.unusable, CUT if any(result.targets[1:]) else "no answer to learn from", number)
                continue
            self._num_cut += result.cut or len(cut_ids) < len(result.ids)
            self._num_lost += len(result.ids) - len(cut_ids)
            ids += cut_ids
            targets += cut_targets
            self.lengths.append(len(cut_ids))
        self._ids.append(torch.tensor(ids, dtype=torch.int32))
        self._targets.append(torch.tensor(targets, dtype=torch.bool))

    def examples(self, unused: list[str]) -> Examples:
        """All of it; unused: columns that nothing asked for."""
        return Examples(
            ids=torch.cat(self._ids),
            targets=torch.cat(self._targets),
            offsets=torch.tensor(self.lengths).cumsum(0),
            unusable=self.unusable,
            num_cut=self._num_cut,
            labels=torch.tensor(self._classes) if self._classes else None,
            unused=unused,
            num_lost=self._num_lost,
        )


def _pieces(ids: list[int], length: int, bos: int | None) -> list[list[int]]:
    """A text cut into examples of at most `length` tokens, each token but the first learned in one of them: they begin
    with begin-of-text where the text does, else with the last token of the piece before."""
    step = length - 1
    lead = [ids[0]] if ids[0] == bos else []
    return [(lead or ids[begin - 1 : begin]) + ids[begin : begin + step] for begin in range(1, len(ids), step)]


def _encode(
    rows: list[Row], section: DataSection, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str], end: int | None
) -> list[Encoded | str]:
    """(tokens, mask) of each row, or why it cannot be used."""
    if section.classifies:
        return encode_classified(rows, section, tokenizer, labels, end)
    if section.format == "chat":
        return encode_chats(rows, section, tokenizer)
    results: list[Encoded | str] = []
    texts: list[tuple[int, str, str]] = []
    for row in rows:
        results.append("")
        try:
            texts.append((len(results) - 1, *render(row, section)))
        except ValueError as error:
            results[-1] = str(error)
    if not texts:
        return results
    prompts = tokenizer([prompt for _, prompt, _ in texts], verbose=False)["input_ids"]
    if _appends_eos(tokenizer):
        prompts = [ids[:-1] for ids in prompts]
    wholes = tokenizer([prompt + answer for _, prompt, answer in texts], verbose=False)["input_ids"]
    for (index, prompt, answer), prompt_ids, whole_ids in zip(texts, prompts, wholes, strict=True):
        results[index] = _join(prompt, answer, prompt_ids, whole_ids, tokenizer)
    return results


def _join(
    prompt: str, answer: str, prompt_ids: list[int], whole_ids: list[int], tokenizer: PreTrainedTokenizerBase
) -> Encoded:
    """Prompt and answer tokens, ended by end-of-text. No token spans the two: generation starts at the boundary."""
    eos = tokenizer.eos_token_id
    prompt_ids = prompt_ids if prompt else []
    answer_ids = whole_ids[len(prompt_ids) :]
    if whole_ids[: len(prompt_ids)] != prompt_ids:
        answer_ids = tokens_within(answer, tokenizer)
    if not answer_ids or answer_ids[-1] != eos:
        answer_ids = [*answer_ids, eos]
    return Encoded([*prompt_ids, *answer_ids], [False] * len(prompt_ids) + [True] * len(answer_ids))


def _appends_eos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether it ends every text by end-of-text, as some do; a prompt is without."""
    with_special, plain = (tokenizer("a", add_special_tokens=add, verbose=False)["input_ids"] for add in (True, False))
    return len(with_special) > len(plain) and with_special[-1] == tokenizer.eos_token_id
