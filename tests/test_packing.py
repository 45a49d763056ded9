"""Packed examples: they see themselves alone, hardly anything is padded, and loss and gradients stay what they are."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from conftest import CONFIGS, MOE_CONFIGS, make_model, save_model
from packaging.version import Version
from runs import BASE
from test_start import started
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import (
    Lfm2Config,
    Lfm2ForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from pissa_cli import train as module
from pissa_cli.adapters.lowrank import LowRank
from pissa_cli.base.attach import checkpoint_activations, join_gates, share_inputs
from pissa_cli.data.examples import Examples
from pissa_cli.data.tokenize import load_examples
from pissa_cli.errors import UsageError
from pissa_cli.schema.data_options import DataSection
from pissa_cli.schema.recipe import Recipe
from pissa_cli.training import batches, guards, packing
from pissa_cli.training.batches import collate, micro_batches, row_length
from pissa_cli.training.guards import pack_if_sound
from pissa_cli.training.loss import IGNORED, summed_loss
from pissa_cli.training.packing import attend_by_sequence

Make = Callable[..., Any]
INDICES = [3, 8, 1, 5]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def close(
    found: dict[str, Tensor], wanted: dict[str, Tensor], share: float, rounded: dict[str, Tensor] | None = None
) -> None:
    """Within a share of their norms, and what those that were `rounded` are off."""
    assert set(found) == set(wanted) and wanted
    for name, gradient in wanted.items():
        rounding = float((rounded[name] - gradient).norm()) if rounded else 1e-9
        assert float((found[name] - gradient).norm()) <= share * float(gradient.norm()) + rounding, name


def packs(made: Recipe, model: PreTrainedModel, examples: Examples) -> bool:
    return pack_if_sound(made, model, examples, partial(guards.probe_loss, made, model, examples, 0, True))


@pytest.fixture
def leaking() -> PreTrainedModel:
    """Short convolutions see across where an example begins; weights so large that it shows."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Lfm2Config(vocab_size=512, **shape, layer_types=["conv", "full_attention"], num_hidden_layers=2)
    model = Lfm2ForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data *= 4
    return model


@pytest.mark.parametrize("first", [2, 3, 20])
def test_a_leak_shows_whatever_the_first_example(first: int, leaking: PreTrainedModel, recipe: Make) -> None:
    lengths = torch.tensor([first, 30, 30, 30, 30])
    ids = torch.randint(3, 512, (int(lengths.sum()),), dtype=torch.int32)
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    examples = Examples(ids, torch.ones(len(ids), dtype=torch.bool), offsets)
    made = recipe(Path("none"), "train.precision=bf16")
    assert not packs(made, leaking.bfloat16(), examples)


def test_a_leak_is_looked_for_at_both_ends_of_an_example(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "EDGE", 2)

    def keeps(input_ids: Tensor, logits_to_keep: Tensor, **_: Any) -> Any:
        return SimpleNamespace(logits=input_ids[:, logits_to_keep])

    for forward in (keeps, lambda input_ids, **_: SimpleNamespace(logits=input_ids)):
        model: Any = type("Model", (), {"forward": staticmethod(forward), "__call__": lambda _, **k: _.forward(**k)})()
        for length, places in ((10, [3, 4, 8, 9]), (6, [3, 4, 5])):
            found = guards._logits_from(model, 3, torch.arange(length)[None], torch.arange(length)[None])
            assert found.tolist() == [places]


def test_the_longest_row_is_compared_as_well(recipe: Make) -> None:
    """Llama 4 counts positions by their place in the row, and heats attention up from some length on."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 64, "intermediate_size_mlp": 64, "num_attention_heads": 4}
    config = Llama4TextConfig(
        vocab_size=512, **shape, num_key_value_heads=2, num_hidden_layers=2, no_rope_layers=[0, 0], floor_scale=256
    )
    model = Llama4ForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    ids = torch.randint(3, 512, (8 * 40,), dtype=torch.int32)
    examples = Examples(ids, torch.ones(len(ids), dtype=torch.bool), torch.arange(0, 8 * 40 + 1, 40))
    for size, sound in (("2", True), ("8", False)):
        made = recipe(Path("none"), "model.bits=32", "train.precision=fp32", f"train.micro_batch_size={size}")
        assert packs(made, model, examples) == sound


def test_memory_that_does_not_suffice_says_nothing_of_packing(
    recipe: Make, tokenizer: PreTrainedTokenizerBase, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen = make_model("llama"), list[int]()
    examples = load_examples(str(rows), DataSection(), tokenizer, None)

    def full(model: nn.Module, batch: dict[str, Tensor], chunked: bool) -> Tensor:
        seen.append(batch["input_ids"].numel())
        if batch["input_ids"].numel() > 600:
            raise torch.OutOfMemoryError("full")
        return summed_loss(model, batch, chunked)

    monkeypatch.setattr(guards, "summed_loss", full)
    made = recipe(Path("none"), "model.bits=32", "train.precision=fp32")
    assert packs(made, model, examples) and seen[0] > 600  # on the first few already
    monkeypatch.setattr(guards, "summed_loss", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("never")))
    with pytest.raises(torch.OutOfMemoryError):
        packs(made, model, examples)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU attends in bf16")
@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("packed", ["true", "false"])
def test_attention_in_training_runs_in_fp32_on_a_cpu(
    packed: str, bits: int, models: Callable[[str], Path], recipe: Make, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[tuple[torch.dtype, bool]] = set()
    original = packing.sdpa_attention_forward

    def see(attending: nn.Module, query: Tensor, *rest: Any, **options: Any) -> Any:
        seen.add((query.dtype, torch.is_autocast_enabled("cpu")))
        return original(attending, query, *rest, **options)

    monkeypatch.setattr(packing, "sdpa_attention_forward", see)
    sets = [f"model.bits={bits}", "train.precision=bf16", f"data.train={rows}", "train.steps=1", "train.batch_size=4"]
    module.train(recipe(models("llama"), *sets, f"data.packing={packed}"))
    assert seen == {(torch.float32, False)}


def test_what_is_added_to_scores_has_their_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "attention_dtype", lambda _: torch.float32)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 9, 16, dtype=torch.bfloat16) for _ in range(3))
    mask, bias = torch.randn(2, 1, 9, 9, dtype=torch.bfloat16), torch.randn(1, 4, 9, 9, dtype=torch.bfloat16)
    known = "position_bias" in inspect.signature(packing.sdpa_attention_forward).parameters  # not in older transformers
    named = {"position_bias": bias} if known else {}
    scores = q.double() @ k.double().mT / 4 + mask + (bias if known else 0)
    wanted = (scores.softmax(-1) @ v.double()).transpose(1, 2)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found, _ = packing._attention(nn.Module(), q, k, v, mask, is_causal=False, **named)
        assert found.dtype == torch.bfloat16
        assert float((found - wanted).norm() / wanted.norm()) < 2**-8


@pytest.mark.parametrize("architecture", [*CONFIGS, *MOE_CONFIGS])
def test_each_example_sees_itself_alone(
    architecture: str, tokenizer: PreTrainedTokenizerBase, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(architecture)
    examples = load_examples(str(rows), DataSection(), tokenizer, None)
    alone = torch.zeros(())
    for i in INDICES:
        alone = alone + summed_loss(model, collate(examples, [i], 0, packing=False))
    alone.backward()
    wanted = gradients(model)
    sdpa = model.config._attn_implementation == "sdpa"
    attend_by_sequence(model)
    monkeypatch.setattr(batches, "LONG_ROW", 1)  # with padding at the end
    seen: list[Any] = []
    original = packing.sdpa_attention_forward
    monkeypatch.setattr(packing, "sdpa_attention_forward", lambda *a, **k: (seen.append(a[4]), original(*a, **k))[1])
    total = summed_loss(model, collate(examples, INDICES, 0, packing=True))
    total.backward()
    assert float(total) == pytest.approx(float(alone), rel=1e-6)
    close(gradients(model), wanted, 2e-5)
    assert bool(seen) == sdpa
    if Version(transformers.__version__) >= Version("5.23"):  # before, Gemma2 builds a mask for its wide windows, too
        assert all(mask is None for mask in seen)


def test_a_window_shorter_than_an_example_keeps_its_mask(tokenizer: PreTrainedTokenizerBase, rows: Path) -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = MistralForCausalLM(MistralConfig(vocab_size=512, sliding_window=8, num_key_value_heads=2, **shape)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    examples = load_examples(str(rows), DataSection(), tokenizer, None)
    alone = sum(float(summed_loss(model, collate(examples, [i], 0, packing=False))) for i in INDICES)
    attend_by_sequence(model)
    assert float(summed_loss(model, collate(examples, INDICES, 0, packing=True))) == pytest.approx(alone, rel=1e-6)


@pytest.mark.parametrize("packing", [True, False])
def test_no_example_is_begun_by_the_one_before(packing: bool) -> None:
    """Its first token is no target, though all of its tokens are learned."""
    examples = Examples(torch.arange(5, 10), torch.ones(5, dtype=torch.bool), torch.tensor([0, 3, 5]))
    labels = collate(examples, [0, 1], 0, packing)["labels"]
    assert labels[labels != IGNORED].tolist() == [6, 7, 9] and examples.num_targets(0) + examples.num_targets(1) == 3


def test_a_text_has_types_where_a_second_one_follows() -> None:
    ids, offsets, labels = torch.arange(5, 10), torch.tensor([0, 3, 5]), torch.tensor([1.0, 0.0])
    one = collate(Examples(ids, torch.zeros(5, dtype=torch.bool), offsets, labels=labels), [1, 0], 9, False)
    assert one.keys() == {"input_ids", "attention_mask", "labels"} and one["labels"].tolist() == [0, 1]
    assert one["input_ids"].tolist() == [[8, 9, 9], [5, 6, 7]] and one["attention_mask"].tolist() == [
        [1, 1, 0],
        [1] * 3,
    ]
    two = torch.tensor([False, False, True, False, True])
    types = collate(Examples(ids, two, offsets, labels=labels), [1, 0], 9, False)["token_type_ids"]
    assert types.tolist() == [[0, 1, 0], [0, 0, 1]]


def test_a_row_of_several_is_filled_up_to_32_from_1024_on() -> None:
    lengths = {(1030,): 1030, (1000, 30): 1056, (500, 523): 1023, (512, 512): 1024, (512, 513): 1056, (): 0}
    assert {one: row_length(one) for one in lengths} == lengths


def test_only_long_rows_are_filled_up_and_micro_batches_are_even(
    tokenizer: PreTrainedTokenizerBase, rows: Path
) -> None:
    examples = load_examples(str(rows), DataSection(), tokenizer, None)
    indices = list(range(30))
    chunks = micro_batches(examples, indices, 8, packed=True)
    assert sorted(i for chunk in chunks for i in chunk) == indices and max(map(len, chunks)) <= 8
    totals = [sum(examples.length(i) for i in chunk) for chunk in chunks]
    assert all(1024 <= total < 1344 for total in totals)
    filled = [collate(examples, chunk, 0, True)["input_ids"].numel() for chunk in chunks]
    assert filled == [-(-total // 32) * 32 for total in totals] and filled != totals
    short = micro_batches(examples, indices, 5, packed=True)
    totals = [sum(examples.length(i) for i in chunk) for chunk in short]
    assert [collate(examples, chunk, 0, True)["input_ids"].numel() for chunk in short] == totals
    assert max(totals) < 1.2 * sum(totals) / len(totals)
    like = micro_batches(examples, indices, 8, packed=False)
    lengths = [[examples.length(i) for i in chunk] for chunk in like]
    assert all(max(a) <= min(b) for a, b in itertools.pairwise(lengths))


def opt(folder: Path) -> Path:
    """A model that takes its positions from the mask, and so cannot tell packed examples apart."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = OPTConfig(vocab_size=512, max_position_embeddings=256, word_embed_proj_dim=64, dropout=0.0, **shape)
    model = OPTForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return save_model(model, folder)


def test_packing_is_refused_where_examples_would_see_each_other(recipe: Make, rows: Path, tmp_path: Path) -> None:
    sets = [*BASE, f"data.train={rows}", "train.steps=1"]
    with pytest.raises(UsageError, match="see each other"):
        module.train(recipe(opt(tmp_path / "opt"), *sets, "data.packing=true"))


def test_by_itself_packing_is_left_out_there_and_said(recipe: Make, rows: Path, tmp_path: Path) -> None:
    notes: list[dict[str, Any]] = []
    sets = [*BASE, f"data.train={rows}", "train.steps=1"]
    auto = module.train(recipe(opt(tmp_path / "opt"), *sets), watch=notes.append)
    assert sum("see each other" in note.get("note", "") for note in notes) == 1
    off = module.train(recipe(opt(tmp_path / "opt2"), *sets, "data.packing=false", f"output={tmp_path / 'off'}"))
    assert auto["loss_last"] == off["loss_last"]


def plain_layer(layer: LowRank, x: Tensor) -> Tensor:
    """The layer's equation in autograd's own operations."""
    A, B = layer.pair(x)
    h = x @ A.T if layer.d is None else (x @ A.T) * layer.d
    u = h @ B.T if layer.b is None else (h @ B.T) * layer.b
    y = x @ layer.base_weight(x.dtype).T + layer.scale * u
    return y if layer.bias is None else y + layer.bias


def plain_norm(norm: Any, x: Tensor) -> Tensor:
    """transformers' rounds to fp32 on the way."""
    y: Tensor = norm.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon)
    return y


def plain_loss(model: PreTrainedModel, examples: Examples, indices: list[int]) -> Tensor:
    """One example after another, with logits at every position."""
    total = torch.zeros((), dtype=torch.float64)
    for i in indices:
        batch = collate(examples, [i], 0, packing=False)
        logits = model(input_ids=batch["input_ids"], use_cache=False).logits[0, :-1]
        total = total + functional.cross_entropy(logits, batch["labels"][0, 1:], ignore_index=IGNORED, reduction="sum")
    return total


STORES = {
    "fp32": ["model.bits=32"],
    "nf4": ["model.bits=4", "train.precision=fp32"],
    "double": ["model.bits=4", "model.double_quant=true", "train.precision=fp32"],
}
VARIANTS = {
    "lora": ["adapter.method=lora", "adapter.rank=4", "adapter.init=A"],
    "lora-B": ["adapter.method=lora", "adapter.rank=4", "adapter.init=B"],
    "pissa": ["adapter.method=pissa", "adapter.rank=4"],
    "loftq": ["adapter.method=loftq", "adapter.rank=4"],
    "vera": ["adapter.method=vera", "adapter.rank=16"],
    "svfit": ["adapter.method=svfit", "adapter.rank=8"],
}


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_of_the_fast_path_are_those_of_the_plain_one(
    variant: str,
    store: str,
    models: Callable[[str], Path],
    recipe: Make,
    tokenizer: PreTrainedTokenizerBase,
    rows: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Packed, attended to by sequence, layers of one x together, the layers' and the head's own gradients, under
    checkpointing and not; in fp32, as near to fp64 as the plain path in fp32 is, and 1e-6."""
    if variant == "loftq" and store == "fp32":
        pytest.skip("loftq is refused over dense weights")
    examples = load_examples(str(rows), DataSection(), tokenizer, None)
    model = started(recipe(models("llama"), *VARIANTS[variant], *STORES[store]))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # no factor stays zero
                parameter.add_(torch.randn_like(parameter), alpha=0.01)
    with monkeypatch.context() as context:
        context.setattr(LowRank, "forward", plain_layer)
        plain_loss(model, examples, INDICES).backward()
        plain = gradients(model)
        context.setattr(LlamaRMSNorm, "forward", plain_norm)
        plain_loss(nn.Module.double(model), examples, INDICES).backward()
        exact = {name: gradient.float() for name, gradient in gradients(model).items()}
    nn.Module.float(model)  # transformers refuses quantized models
    attend_by_sequence(model)
    share_inputs(model, lambda: model(input_ids=torch.tensor([[3, 4]])))
    join_gates(model)
    for checkpointing in (False, True):
        if checkpointing:
            checkpoint_activations(model)
            model.train()
        summed_loss(model, collate(examples, INDICES, 0, packing=True), chunked=True).backward()
        close(gradients(model), exact, 1e-6, plain)


def test_two_hundred_steps_packed_and_fused_are_those_unpacked_and_plain(
    models: Callable[[str], Path], recipe: Make, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def losses(name: str, *sets: str) -> list[float]:
        made = recipe(
            models("llama"), *BASE, f"data.train={rows}", "train.steps=200", f"output={tmp_path / name}", *sets
        )
        found: list[float] = []
        module.train(made, watch=lambda event: found.append(event["loss"]) if "loss" in event else None)
        return found

    fast = losses("fast")
    monkeypatch.setattr(LowRank, "forward", plain_layer)
    monkeypatch.setattr("pissa_cli.base.attach.join_gates", lambda _: None)
    monkeypatch.setattr("pissa_cli.training.assembly.chunks_loss", lambda *_: False)
    plain = losses("plain", "data.packing=false", "train.micro_batch_size=1")
    assert len(plain) == 200 and plain[-1] < plain[0] - 0.2
    assert fast == pytest.approx(plain, rel=1e-4)


def flash(q: Tensor, k: Tensor, v: Tensor, begins: Tensor, *rest: Any, scale: float | None) -> tuple[Tensor]:
    """What torch's flash attention computes of (tokens, heads, dim), in its plain operations."""
    _, longest, _, dropout, causal, _ = rest
    lengths = torch.diff(begins).tolist()
    assert longest == max(lengths) and dropout == 0.0
    outputs, heads = [], q.shape[1]
    for parts in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
        q, k, v = (x.transpose(0, 1).repeat_interleave(heads // x.shape[1], 0) for x in parts)
        scores = q @ k.transpose(1, 2) * (q.shape[-1] ** -0.5 if scale is None else scale)
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores[0], dtype=torch.bool).triu(1), -torch.inf)
        outputs.append((scores.softmax(-1) @ v).transpose(0, 1))
    return (torch.cat(outputs),)


def test_flash_attention_is_used_where_it_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    agrees = packing._flash_agrees.__wrapped__
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 4, 30, 8), torch.randn(1, 2, 30, 8), torch.randn(1, 2, 30, 8)
    module = SimpleNamespace(num_key_value_groups=2, is_causal=True)
    wanted, _ = packing._attention(module, query, key, value, torch.tensor([7, 23]), scaling=0.3)
    assert not agrees(torch.float32, 4, 2, 8, "cpu")  # there is none for a CPU

    monkeypatch.setattr(packing, "FLASH", flash)
    assert agrees(torch.float32, 4, 2, 8, "cpu")
    torch.testing.assert_close(packing._flash(query, key, value, [7, 23], 0.3), wanted)
    monkeypatch.setattr(packing, "FLASH", lambda *args, **options: flash(*args[:8], False, False, **options))
    assert not agrees(torch.float32, 4, 2, 8, "cpu")

    monkeypatch.undo()
    meta = [x.to("meta", torch.bfloat16) for x in (query, key, value)]
    assert packing._flash(*meta, [7, 23], None).shape == wanted.shape


def test_flash_attention_gets_what_autocast_makes_of_its_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries and keys are in fp32 there, once they were rotated, and values are not."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda _: torch.bfloat16)
    seen: list[set[torch.dtype]] = []
    monkeypatch.setattr(packing, "_flash_agrees", lambda dtype, *_: dtype == torch.bfloat16)
    monkeypatch.setattr(packing, "_flash", lambda *given: seen.append({x.dtype for x in given[:3]}))
    with FakeTensorMode():
        q, k, v = (torch.empty(1, heads, 30, 8, device="cuda") for heads in (4, 2, 2))
    packing._attention(nn.Module(), q, k, v.bfloat16(), torch.tensor([7, 23]))
    assert seen == [{torch.bfloat16}]


def test_flash_attention_is_tried_within_a_block_that_runs_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the forecast of memory under checkpointing: the second time it is known, and a block saves less."""
    tries = itertools.count()

    def block(x: Tensor) -> Tensor:
        if next(tries) == 0:
            assert packing._flash_agrees.__wrapped__(torch.float32, 4, 2, 8, "cpu")
        return x.sin()

    monkeypatch.setattr(packing, "FLASH", flash)
    x = torch.ones(3, requires_grad=True)
    checkpoint(block, x, use_reentrant=False).sum().backward()
    torch.testing.assert_close(x.grad, x.detach().cos())
    assert next(tries) == 2
