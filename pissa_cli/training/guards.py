"""What is checked before the first step: that the run may go on, that the start is the base, that packing is sound."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import torch
from torch import nn
from transformers import PreTrainedModel

from pissa_cli.data.examples import Examples
from pissa_cli.errors import PissaError, UsageError, first_line
from pissa_cli.run.inputs import require_start
from pissa_cli.run.reached import LENGTH, goes_on, latest_checkpoint, newest_facts, sections_before, step_of
from pissa_cli.run.rundir import run_of
from pissa_cli.run.started import open_run
from pissa_cli.schema.recipe import Recipe
from pissa_cli.training.batches import collate, on_device
from pissa_cli.training.loss import autocast, summed_loss
from pissa_cli.training.packing import attend_by_mask, attend_by_sequence, takes_positions, without_mask
from pissa_cli.training.steps import count_steps

LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}
"""By how much the adapter at step 0, or other kernels, may change the loss, as a share of it (or of 1, below)."""
PACKING_TOLERANCE = {"fp32": 1e-6, "bf16": 2e-3}
"""The same of packing."""
EDGE = 64  # tokens
FEW_TOKENS = 16  # of an example of which all but the first are changed, to see whether those notice
FEW_LENGTHS = 4  # of texts that are padded, to see whether that changes the answer
LEAK_TOKENS = 512  # of an example at most, to see whether it leaks into the next
LEAST_LOGITS = {"fp32": 1e-2, "bf16": 1e-1}
"""A change of logits is compared with their size, or with this where a new head gives hardly more than rounding."""
CAUSAL_TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2}
LEAK_TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}
"""By how much logits may change, relative to their size, with the tokens that follow, and with another example in the
row or padding."""


def resumes(recipe: Recipe, resume: bool) -> bool:
    """As `goes_on`, after checking the output folder, and that the run there was started by this recipe."""
    require_start(recipe, resume)
    if not run_of(recipe).exists():
        return False
    open_run(recipe)
    return goes_on(recipe, resume)


def require_reach(num: int, recipe: Recipe) -> None:
    """Refuse a recipe by which the run over `num` examples would have ended before where it is."""
    run = run_of(recipe)
    checkpoint, steps = latest_checkpoint(run), count_steps(num, recipe, newest_facts(run)["missed"])
    if checkpoint is not None and steps < step_of(checkpoint):
        raise UsageError(
            f"train.steps, train.epochs: {steps} steps are less than the run has taken ({checkpoint.name})",
            "give at least as many, or start a new run with another --output",
        )


def schedule_change(recipe: Recipe) -> str | None:
    """A line for the person watching if the run was begun with another length: the learning rates change with it."""
    before, now = sections_before(run_of(recipe))["train"], recipe.train
    same = now.schedule == "constant" and not 0 < now.warmup < 1
    if same or all(before[key] == getattr(now, key) for key in LENGTH):
        return None
    was, will = (
        f"{steps} steps" if steps else f"{epochs or 1} epochs"
        for steps, epochs in ([before[key] for key in LENGTH], [getattr(now, key) for key in LENGTH])
    )
    return f"the run was begun for {was} and goes on for {will}: the {now.schedule} schedule is stretched to fit"


def require_context(name: str, examples: Examples, context: int | None) -> None:
    """Raise UsageError if an example is longer than the model's context."""
    longest = int(examples.offsets.diff().max())
    if context is not None and longest > context:
        raise UsageError(
            f"{name}: the longest example has {longest} tokens, the model sees {context}",
            f"set data.max_length to {context} or less",
        )


@contextmanager
def runs_in_bf16(model: PreTrainedModel, precision: str) -> Iterator[None]:
    """Where a model runs first: UsageError if its code mixes bf16 with fp32 of its own (XLNet's, xLSTM's)."""
    try:
        yield
    except RuntimeError as error:
        if precision != "bf16" or "bfloat16" not in str(error).lower():
            raise
        raise UsageError(
            f"{type(model).__name__}: transformers' code of it does not run in bf16 ({first_line(error)})",
            "set model.bits to 32; with 4 bits, train.precision to fp32",
        ) from None


@torch.no_grad()
def probe_loss(
    recipe: Recipe,
    model: PreTrainedModel,
    examples: Examples,
    pad_id: int,
    chunked: bool,
    packing: bool = False,
    chosen: Sequence[int] = (),
) -> float:
    """The loss on `chosen` examples, or the first few, without dropout, in no more memory than a step of training
    takes. chunked: what `chunks_loss` tells of the model."""
    few = chosen or _first_few(recipe, examples)
    batch = collate(examples, few, pad_id, packing)
    with autocast(recipe, model.device):
        total = summed_loss(model.eval(), on_device(batch, model.device), chunked)
    return float(total) / sum(examples.num_targets(i) for i in few)


def _first_few(recipe: Recipe, examples: Examples) -> Sequence[int]:
    return range(min(4, max(2, recipe.train.micro_batch_size), len(examples)))


@torch.no_grad()
def chunks_loss(model: PreTrainedModel, examples: Examples) -> bool:
    """Whether the loss can be formed in chunks: if the head is a linear layer, and at most a factor follows it.

    Then logits 1024 times as large come out 1024 times as large, bit for bit; not so where they are capped (Gemma 2).
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        return False
    ids = examples.ids[: min(16, examples.length(0))].long()[None].to(head.weight.device)
    with torch.autocast(ids.device.type, enabled=False):
        logits = model.eval()(input_ids=ids, use_cache=False).logits
        hook = head.register_forward_hook(lambda _module, _given, output: output * 1024)
        larger = model(input_ids=ids, use_cache=False).logits
        hook.remove()
    return torch.allclose(larger, logits * 1024, rtol=1e-3, atol=0)


@torch.no_grad()
def require_padding_unseen(recipe: Recipe, model: PreTrainedModel, examples: Examples, pad_id: int) -> None:
    """Raise UsageError for a classifier whose answer to a text depends on what is padded beside it: to any of a few of
    different lengths, as CANINE sees no padding beside a multiple of 4."""
    lengths, long = examples.offsets.diff(), int(examples.by_length()[-1])
    texts = [int((lengths == length).nonzero()[0]) for length in lengths.unique()[:FEW_LENGTHS]]

    def logits(chosen: list[int]) -> torch.Tensor:
        batch = collate(examples, chosen, pad_id, packing=False)
        del batch["labels"]
        with autocast(recipe, model.device):
            found: torch.Tensor = model.eval()(**on_device(batch, model.device)).logits[0]
        return found.float()

    alone, beside = (torch.stack([logits([text, *other]) for text in texts]) for other in ([], [long]))
    size = max(LEAST_LOGITS[recipe.precision], float(alone.abs().max()))
    if float((alone - beside).abs().max()) > LEAK_TOLERANCE[recipe.precision] * size:
        raise UsageError(
            f"{type(model).__name__}: its answer to a text changes with the padding on the right of it",
            "models of this kind cannot be trained here, where texts are padded on the right; use another",
        )


@torch.no_grad()
def require_causal(recipe: Recipe, model: PreTrainedModel, examples: Examples) -> None:
    """Raise UsageError for a model whose tokens see those after them, from which it would copy what to predict."""
    ids = examples.tokens(0)[:FEW_TOKENS].long()[None].to(model.device)
    before = -(-ids.shape[1] // 4)
    other = torch.cat([ids[:, :before], (ids[:, before:] == 0).long()], dim=1)
    with autocast(recipe, model.device):
        logits, changed = (model.eval()(input_ids=x, use_cache=False).logits[0, :before].float() for x in (ids, other))
    differences = (logits - changed).norm(dim=1) / logits.norm(dim=1)  # experts near a tie may change a few
    if float(differences.median()) > CAUSAL_TOLERANCE[recipe.precision]:
        raise UsageError(
            f"{type(model).__name__}: its tokens see those that follow, which are what it would learn to predict",
            "train this kind with model.task: sequence-classification, or use a model that writes from left to right",
        )


def pack_if_sound(recipe: Recipe, model: PreTrainedModel, examples: Examples, probe: Callable[..., float]) -> bool:
    """Have the model attend to packed examples one by one, where it can, and return whether examples are packed: if
    `data.packing` asks for it and it is sound in this model. With `auto` it must cost nothing either, as a mask over
    the whole row would. probe: (packing, chosen) -> `probe_loss`.

    Raises UsageError where the recipe insists on packing and it is not sound.
    """
    wanted = recipe.data.packing
    if not wanted or recipe.data.classifies:
        return False
    if takes_positions(model):
        for attend in (attend_by_sequence, attend_by_mask):
            with suppress(ValueError):  # parts of the model may have no SDPA
                attend(model)
            if (wanted is True or without_mask(model)) and _packs_soundly(recipe, model, examples, probe):
                return True
    if wanted == "auto":
        return False
    raise UsageError("data.packing: this model lets packed examples see each other", "set data.packing to false")


def _packs_soundly(recipe: Recipe, model: PreTrainedModel, examples: Examples, probe: Callable[..., float]) -> bool:
    """Whether packing changes nothing. The loss has to be that of padded examples, of the first few and in the longest
    row that a step can have; and the logits of a row's second example may not change when its first is another."""
    longest = examples.by_length()[-recipe.train.micro_batch_size :].tolist()
    tried = _first_few(recipe, examples), longest
    first, second = examples.tokens(longest[-1])[:LEAK_TOKENS], examples.tokens(longest[0])[:LEAK_TOKENS]
    # tokens from half of the data away, and one more for rows that are there twice
    others = examples.ids.roll(-int(examples.offsets[longest[-1]]) - len(examples.ids) // 2 - 1)[: len(first)]
    positions = torch.cat([torch.arange(len(first)), torch.arange(len(second))])[None].to(model.device)
    try:
        if not all(_same_packed(recipe.precision, probe, chosen) for chosen in tried):
            return False
        rows = [torch.cat([before, second]).long()[None].to(model.device) for before in (first, others)]
        with autocast(recipe, model.device):
            logits, changed = (_logits_from(model, len(first), ids, positions) for ids in rows)
    except torch.OutOfMemoryError:  # which says nothing of the model
        raise
    except (RuntimeError, IndexError, TypeError, ValueError):  # a model that takes its mask or its positions otherwise
        return False
    return float((logits - changed).abs().max()) <= LEAK_TOLERANCE[recipe.precision] * float(logits.abs().max())


def _same_packed(precision: str, probe: Callable[..., float], chosen: Sequence[int]) -> bool:
    """Whether the loss on `chosen` examples, or on as many as memory has room for, is the same packed and padded."""
    while True:
        try:
            padded, packed = (probe(way, chosen) for way in (False, True))
            return abs(packed - padded) <= PACKING_TOLERANCE[precision] * max(1.0, abs(padded))
        except torch.OutOfMemoryError:
            if len(chosen) < 2:
                raise
        chosen = chosen[len(chosen) // 2 :]
        torch.cuda.empty_cache()


@torch.no_grad()
def _logits_from(model: PreTrainedModel, begin: int, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Logits in fp32 of the first and the last `EDGE` positions from `begin` on, where the model can leave others out.

    What leaks from one example into the next is seen where that begins, where it ends, or both.
    """
    places = torch.arange(begin, ids.shape[1], device=ids.device)
    places = torch.cat([places[:EDGE], places[EDGE:][-EDGE:]])
    keep = {"logits_to_keep": places} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    logits: torch.Tensor = model(input_ids=ids, position_ids=positions, use_cache=False, **keep).logits
    return (logits if keep else logits[:, places]).float()


def require_same_loss(before: float, after: float, precision: str) -> None:
    """Raise PissaError if the adapter at step 0 changes the loss of the base, or that is no number itself."""
    if not math.isfinite(before):
        raise PissaError(
            f"the loss of the base is {before} before training has begun",
            "its weights or its config.json are damaged, or too large for the products' dtype (train.precision)",
        )
    if not abs(after - before) <= LOSS_TOLERANCE[precision] * max(1.0, abs(before)):
        raise PissaError(
            f"the loss with the adapter at step 0 is {after:.4f}, that of the base {before:.4f}; they must agree",
            "the files in init/ do not belong to this base; remove the run folder and run init again",
        )
