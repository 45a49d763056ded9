"""Micro-batches: which examples, and how they lie in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pissa_cli.base.configuration import vocabulary_of
from pissa_cli.data.examples import Examples
from pissa_cli.training.loss import IGNORED, summed_loss

ROW_OF, LONG_ROW = 32, 1024  # tokens: at most 3 % of a row are padding


def micro_batches(examples: Examples, indices: list[int], size: int, packed: bool) -> list[list[int]]:
    """At most `size` examples each: of like length where they are padded, of like total length where packed.

    Their order has no meaning: a step's loss is one average.
    """
    ordered = sorted(indices, key=examples.length)
    if packed:
        count = -(-len(ordered) // size)
        return [ordered[number::count] for number in range(count)]
    return [ordered[begin : begin + size] for begin in range(0, len(ordered), size)]


def padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that fills up a batch. A classifier has its own, as it may look for the last token before the padding.
    0 where the model has no embedding of it: a tokenizer may have got one that the model does not know."""
    own = model.config.pad_token_id if model.get_output_embeddings() is None else tokenizer.pad_token_id
    return own if own is not None and 0 <= own < vocabulary_of(model.config) else 0


@torch.no_grad()
def batch_losses(
    model: PreTrainedModel, examples: Examples, pad_id: int, size: int
) -> Iterator[tuple[list[int], float]]:
    """(examples, summed loss over their targets) of all `examples`, `size` at a time."""
    for chunk in micro_batches(examples, list(range(len(examples))), size, packed=False):
        batch = collate(examples, chunk, pad_id, packing=False)
        yield chunk, float(summed_loss(model, on_device(batch, model.device)))


def on_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The inputs of a micro-batch where the model is, without waiting for a GPU; `labels` stay for `summed_loss`."""
    return {key: t if key == "labels" else t.to(device, non_blocking=True) for key, t in batch.items()}


def row_length(lengths: Sequence[int]) -> int:
    """Of packed examples of these lengths: several that make a long row get padding at its end."""
    total = sum(lengths)
    return -(-total // ROW_OF) * ROW_OF if len(lengths) > 1 and total >= LONG_ROW else total


def collate(examples: Examples, indices: Sequence[int], pad_id: int, packing: bool) -> dict[str, Tensor]:
    """One micro-batch as the model takes it, labels not yet shifted (of texts to classify: one each).

    Padded: (n, longest) on the right. Packed: (1, sum of lengths), position ids starting again at each example,
    from which transformers builds a block-diagonal attention mask; a long row is filled up to a multiple of ROW_OF by
    one more, of padding: on a CPU products of a length not met before wait for kernels to be made.
    """
    parts = [slice(int(examples.offsets[i]), int(examples.offsets[i + 1])) for i in indices]
    ids = [examples.ids[part].long() for part in parts]

    def pad(rows: list[Tensor], value: int) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

    def padded(labels: Tensor) -> dict[str, Tensor]:
        mask = pad([torch.ones_like(tokens) for tokens in ids], 0)
        return {"input_ids": pad(ids, pad_id), "attention_mask": mask, "labels": labels}

    if examples.labels is not None:
        types = pad([examples.targets[part].long() for part in parts], 0)
        batch = padded(examples.labels[list(indices)])
        return batch | ({"token_type_ids": types} if bool(examples.targets.any()) else {})
    labels = []
    for part, tokens in zip(parts, ids, strict=True):
        label = tokens.masked_fill(~examples.targets[part], IGNORED)
        label[0] = IGNORED
        labels.append(label)
    if packing and (rest := row_length(list(map(len, ids))) - sum(map(len, ids))):
        ids.append(torch.full((rest,), pad_id))
        labels.append(torch.full((rest,), IGNORED))
    if packing:
        positions = torch.cat([torch.arange(len(tokens)) for tokens in ids])
        return {"input_ids": torch.cat(ids)[None], "position_ids": positions[None], "labels": torch.cat(labels)[None]}
    return padded(pad(labels, IGNORED))
