"""The forecast of memory beside what torch's profiler sees a training allocate."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from classifiers import CONFIGS
from conftest import save_model
from runs import BASE
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModel, AutoModelForCausalLM, Gemma2Config, GraniteConfig, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaModel, LlamaRMSNorm

from pissa_cli.base.model import resolve_base
from pissa_cli.base.plan import make_plan
from pissa_cli.errors import Interrupted
from pissa_cli.heap import KERNELS, TUNABLES
from pissa_cli.matrices.pipeline import in_order
from pissa_cli.train import train
from pissa_cli.training.assembly import _one_pass
from pissa_cli.training.ledger import Ledger
from pissa_cli.training.memory import KINDS, _chunks, _spread, forecast
from pissa_cli.training.trainer import Trainer, _accumulate

Make = Callable[..., Any]
LENGTH = 96
LONG = ("train.steps=2", "train.batch_size=8", f"data.max_length={LENGTH}", "data.format=text")


@pytest.fixture
def long_rows(tmp_path: Path) -> Path:
    """Rows that all fill the length."""
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps({"text": f"{n} and " * LENGTH}) + "\n" for n in range(16)))
    return path


def most_allocated(work: Callable[[], Any]) -> int:
    """Bytes that torch's profiler counts at the highest moment."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    now, most = 0, 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.parametrize(
    ("name", "sets"),
    [
        ("llama", ["adapter.rank=4"]),
        ("llama", ["adapter.rank=4", "data.packing=false", "train.gradient_checkpointing=true"]),
        ("llama", ["adapter.rank=4", "model.bits=16"]),
        ("llama", ["adapter.rank=4", "model.bits=4", "train.precision=fp32"]),
        ("llama", ["adapter.method=vera", "adapter.rank=8"]),
        ("llama", ["adapter.method=full"]),
        ("llama", ["adapter={method: pissa, rank: 4, modules_to_save: [lm_head]}", "model.bits=16"]),
        ("gpt2", ["adapter.method=lora", "adapter.rank=8"]),
    ],
)
def test_a_forecast_is_what_training_allocates(
    name: str, sets: list[str], models: Callable[[str], Path], recipe: Make, long_rows: Path
) -> None:
    made = recipe(models(name), "model.bits=32", "train.micro_batch_size=4", *LONG, f"data.train={long_rows}", *sets)
    found = forecast(made, make_plan(made, resolve_base(made.model)), 1)
    assert found.rough is None and found.device == "cpu"
    wanted = most_allocated(lambda: train(made))
    held = found.bytes["total"] - sum(found.bytes[part] for part in ("libraries", "heap", "loading"))
    assert held == pytest.approx(wanted, rel=0.08)


def test_kernels_that_are_kept_are_foreseen(
    models: Callable[[str], Path], recipe: Make, long_rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where products are of bf16 numbers, and the processor has such."""
    found = {}
    monkeypatch.setattr("pissa_cli.training.memory.peak_memory", lambda: 0)
    for precision, bits in (("bf16", 16), ("fp32", 32)):
        for fast, amx in ((False, False), (True, False), (True, True)):
            monkeypatch.setattr("pissa_cli.training.memory.has_fast_bf16", lambda device, fast=fast: fast)
            monkeypatch.setattr("pissa_cli.training.memory.has_amx", lambda amx=amx: amx)
            made = recipe(models("llama"), *LONG, f"data.train={long_rows}", f"model.bits={bits}")
            plan = make_plan(made, resolve_base(made.model))
            assert made.precision == precision
            found[precision, fast, amx] = forecast(made, plan, 1).bytes["libraries"]
    kept = int(KERNELS["ONEDNN_PRIMITIVE_CACHE_CAPACITY"])
    assert found.pop(("bf16", True, False)) == kept * 900_000
    assert found.pop(("bf16", True, True)) == kept * 1_500_000
    assert not any(found.values())


def test_to_see_which_parts_a_text_reaches_takes_no_more_than_a_step(
    models: Callable[[str], Path], recipe: Make, long_rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = ("model.bits=4", "adapter.rank=4", "train.gradient_checkpointing=true", "train.micro_batch_size=1")
    made, peaks = recipe(models("llama"), *LONG, f"data.train={long_rows}", *sets), []

    def looked_at(trainer: Trainer, step: int, indices: list[int]) -> torch.Tensor:
        for work in (lambda: _accumulate(trainer, step, indices), lambda: _one_pass(trainer)):
            with Ledger() as ledger:
                work()
            trainer.optimizer.zero_grad()
            peaks.append(ledger.peak.total())
        raise Interrupted("seen", "")

    monkeypatch.setattr("pissa_cli.training.trainer._accumulate", looked_at)
    with pytest.raises(Interrupted):
        train(made)
    assert peaks[1] <= peaks[0]


def test_the_ledger_counts_storages_until_they_are_freed() -> None:
    held: dict[int, int] = {}
    heap: Any = SimpleNamespace(take=held.__setitem__, give_back=held.pop)
    with Ledger(heap) as ledger:
        one = torch.empty(1000)
        view, two = one[10:], torch.empty(500)
        del one
        ledger.kind = "logits"
        three = torch.empty(250)
        del view, three
        torch.empty(10)
        ledger.name(two, "weights")
        both = two[:10].sort()
    assert ledger.peak == {"activations": 6000, "logits": 1000}
    assert ledger.now == {"activations": 0, "logits": 10 * (4 + 8), "weights": 2000}
    assert sum(held.values()) == ledger.now.total()
    del two, both
    assert ledger.now == {"activations": 0, "logits": 0, "weights": 0} and not held


def test_the_heap_grows_by_what_is_taken_and_remembers_its_most() -> None:
    """In a process of its own: what other tests have freed would serve."""
    script = """
from pissa_cli.training.ledger import Heap
heap, taken = Heap(), []
for key in range(4 if heap.works else 0):
    heap.take(key, 2**26)
taken.append(heap.growth())
for key in range(4):
    heap.give_back(key)
heap.take(0, 2**26)  # where one of those was
heap.give_back(0)
taken.append(heap.growth())
heap.take(4, 2**30 + 2**20)  # which glibc maps by itself, and unmaps
heap.give_back(4)
print(int(heap.works), *taken, heap.growth())
"""
    works, grown, then, large = map(int, subprocess.check_output([sys.executable, "-c", script]).split())
    if not works:
        pytest.skip("no glibc, or an old one")
    assert 3.5 * 2**26 < grown < 5 * 2**26
    assert then == grown and large >= grown + 2**30


def test_the_process_starts_anew_once_with_the_same_words(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\nfrom pissa_cli import heap\nheap.DRIVERS = ()\nheap.restart_with_lean_heap()\n"
        "print(os.getpid(), os.environ['GLIBC_TUNABLES'], sys.argv[1:])\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "GLIBC_TUNABLES"}
    started = subprocess.Popen(
        [sys.executable, script, "train", "a b"], env=environment, stdout=subprocess.PIPE, text=True
    )
    said, _ = started.communicate()
    assert said == f"{started.pid} {':'.join(TUNABLES)} ['train', 'a b']\n"


def test_work_is_taken_in_order_and_threads_are_as_before() -> None:
    threads = torch.get_num_threads()
    found = list(in_order(lambda n: (n, torch.get_num_threads()), range(9), 3, 4, 2))
    assert found == [(n, 1) for n in range(9)]

    def fails(number: int) -> int:
        if number == 3:
            raise ValueError("three")
        return number

    taken = []
    with pytest.raises(ValueError, match="three"):
        for number in in_order(fails, range(9), 2, 4, 1):
            taken.append(number)
    assert taken == [0, 1, 2] and torch.get_num_threads() == threads


def test_processes_hold_gradients_twice_and_share_the_batch(models: Callable[[str], Path], recipe: Make) -> None:
    """DDP's buckets are a second copy; of 16 examples in micro-batches of four each of eight has two."""
    sets = (*BASE, f"data.max_length={LENGTH}", "train.batch_size=16")
    made = recipe(models("llama"), *sets)
    plan = make_plan(made, resolve_base(made.model))
    one, two, five, eight = (forecast(made, plan, processes).bytes for processes in (1, 2, 5, 8))
    assert one["gradients"] == 4 * plan.num_trainable(made)
    assert two["gradients"] == 2 * one["gradients"]
    assert one["activations"] / eight["activations"] == pytest.approx(2, rel=0.1)
    assert one["activations"] == pytest.approx(five["activations"], rel=0.1), "some of them have four"
    assert eight["gradients"] == one["gradients"], (
        "of a step with one micro-batch none are there before its backward pass"
    )


def test_loading_takes_the_files_as_well_where_their_dtype_is_another(
    models: Callable[[str], Path], recipe: Make
) -> None:
    for bits, at_first in ((16, 4 + 2), (32, 0)):
        short = ("data.max_length=16", "train.micro_batch_size=1", f"model.bits={bits}", "adapter.rank=4")
        made = recipe(models("llama"), *short)
        plan = make_plan(made, resolve_base(made.model))
        found = forecast(made, plan, 1).bytes
        assert bool(found["loading"]) == bool(at_first)
        assert not at_first or found["total"] - found["libraries"] == pytest.approx(at_first * plan.num_total, rel=1e-3)


def test_processes_that_share_a_model_hold_their_part(models: Callable[[str], Path], recipe: Make) -> None:
    made = [
        recipe(models("llama"), "model.bits=32", "adapter.method=full", f"train.shard={flag}")
        for flag in ("false", "true")
    ]
    plan = make_plan(made[0], resolve_base(made[0].model))
    alone, spread = (forecast(one, plan, 4) for one in made)
    assert alone.rough is None and spread.rough
    assert spread.bytes["weights"] == alone.bytes["weights"] // 4
    assert spread.bytes["optimizer"] == alone.bytes["optimizer"] // 4
    assert 0 < spread.bytes["gathered"] < 4 * alone.bytes["weights"]
    last, passing = dict.fromkeys(KINDS, 0) | {"weights": 1000}, {"heap": 0, "loading": 5000}
    for found, at_first in ((last, 1000), (last | passing, 6000), (last | passing | {"activations": 9000}, 15000)):
        assert sum((found | _spread(made[1], plan, found, 4)).values()) == max(at_first, 2250 + found["activations"])


def test_a_model_that_casts_a_part_of_itself_is_foreseen(
    models: Callable[[str], Path], recipe: Make, long_rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As DeepSeek V4's and Inkling's do when they are made."""
    original = LlamaRMSNorm.__init__

    def casting(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.bfloat16()

    made = recipe(models("llama"), *LONG, f"data.train={long_rows}")
    plan = make_plan(made, resolve_base(made.model))
    monkeypatch.setattr(LlamaRMSNorm, "__init__", casting)
    assert forecast(made, plan, 1).rough is None


@pytest.mark.parametrize(("kind", "chunks"), [(LlamaConfig, True), (GraniteConfig, True), (Gemma2Config, False)])
def test_the_forecast_takes_the_loss_in_chunks_where_logits_are_scaled_at_most(kind: Any, chunks: bool) -> None:
    """Granite divides them, Gemma 2 caps them."""
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    with FakeTensorMode():
        assert _chunks(AutoModelForCausalLM.from_config(kind(**shape, **heads))) == chunks


def test_where_a_model_looks_at_its_numbers_the_forecast_is_rough(
    models: Callable[[str], Path], pissa: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = LlamaModel.forward

    def looks(self: Any, *args: Any, **kwargs: Any) -> Any:
        assert float(self.norm.weight.sum()) > 0
        return original(self, *args, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", looks)
    outcome = pissa("train", "--model", models("llama"), "--dry-run", *(w for one in BASE for w in ("--set", one)))
    assert outcome.code == 0 and "roughly (the model cannot be run without content" in outcome.out + outcome.err


def test_where_ligers_kernels_would_run_the_forecast_says_that_it_does_not_know_them(
    models: Callable[[str], Path], recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pissa_cli.training.memory.wants_liger", lambda section: True)
    made = recipe(models("llama"), *BASE)
    plan = make_plan(made, resolve_base(made.model))
    assert forecast(made, plan, 1).rough == "Liger's kernels are not counted"


@pytest.mark.parametrize(
    ("longest", "said"), [(64, "data.max_length (64 tokens)"), (512, "the model's context (256 tokens)")]
)
def test_the_forecast_says_of_what_rows_it_is(
    longest: int, said: str, models: Callable[[str], Path], pissa: Callable[..., Any]
) -> None:
    words = [word for one in (*BASE, f"data.max_length={longest}") for word in ("--set", one)]
    assert f"if rows are as long as {said}: " in pissa("train", "--model", models("llama"), "--dry-run", *words).out


def test_a_roberta_sees_as_many_tokens_as_it_has_positions_for(tmp_path: Path, pissa: Callable[..., Any]) -> None:
    """They begin behind its padding's number: of 130 positions two are no token's."""
    folder = save_model(AutoModel.from_config(CONFIGS["roberta"]()), tmp_path / "roberta")
    sets = ("model.task=sequence-classification", "data.format=glue/mrpc", "adapter.rank=4")
    words = [word for one in sets for word in ("--set", one)]
    assert "the model's context (128 tokens)" in pissa("train", "--model", folder, "--dry-run", *words).out
