"""The loop: the loss it minimizes and the examples it takes."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import DEMO, Outcome, make_model, save_model
from runs import BASE, events
from transformers import AutoModelForCausalLM, AutoTokenizer, BartConfig, BartForCausalLM, get_scheduler

from pissa_cli import train as loop
from pissa_cli.base.peft_files import read_peft
from pissa_cli.base.weights import load_tensors, save_tensors
from pissa_cli.errors import PissaError, UsageError
from pissa_cli.evals.generate import generate
from pissa_cli.initialize import initialize
from pissa_cli.outputs.trained import load_result
from pissa_cli.run.reached import result_of
from pissa_cli.run.report import mean_losses
from pissa_cli.run.rundir import Run
from pissa_cli.schema.recipe import TrainSection
from pissa_cli.train import train
from pissa_cli.training import assembly, loss
from pissa_cli.training import trainer as module
from pissa_cli.training.batches import padding
from pissa_cli.training.checkpoint import lowest_held_out, remove_old
from pissa_cli.training.optim import learning_rate, make_optimizer, optimizer_tensors, restore_optimizer
from pissa_cli.training.steps import count_steps, seed_step, step_examples

Make = Callable[..., Any]


@pytest.mark.usefixtures("rendered")
def test_the_loss_falls_and_everything_is_recorded(models: Callable[[str], Path], recipe: Make, rows: Path) -> None:
    made = recipe(
        models("llama"), *BASE, f"data.train={rows}", f"data.eval={rows}", "train.steps=12", "train.eval_every=6"
    )
    figures = train(made)
    run = Run(Path(made.output))
    lines = events(made)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert figures["loss_last"] < figures["loss_first"] - 0.05
    assert figures["tokens"] == sum(e["tokens"] for e in lines)
    assert (figures["method"], figures["lr"]) == ("pissa", 0.005) and max(e["lr"] for e in lines) <= 0.005
    assert [e["step"] for e in lines if "eval_loss" in e] == [6, 12] and lines[-1]["eval_loss"] == figures["eval_loss"]
    assert (run.folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert figures["result"] == str(run.adapter) and not list(run.folder.rglob("*.tmp*"))


def test_what_may_take_minutes_before_the_first_step_is_said(
    models: Callable[[str], Path], recipe: Make, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = list[dict[str, Any]]()

    def load_model(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "load_model", load_model)
    with pytest.raises(KeyboardInterrupt):
        train(recipe(models("llama"), *BASE, f"data.train={rows}"), watch=notes.append)
    assert notes[-1] == {"note": "loading the model, and trying it out before the first step"}


@pytest.mark.parametrize("method", ["pissa", "full"])
def test_layers_that_no_text_reaches_are_said(method: str, recipe: Make, rows: Path, tmp_path: Path) -> None:
    """Of BART's decoder alone those that attend to what it writes from: transformers' own gradients pass them by."""
    sizes = {"d_model": 16, "decoder_ffn_dim": 32, "decoder_layers": 2, "decoder_attention_heads": 2}
    model = BartForCausalLM(BartConfig(vocab_size=512, **sizes))
    model(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
    idle = {name.rpartition(".")[0] for name, parameter in model.named_parameters() if parameter.grad is None}
    chosen = "norm" if method == "pissa" else " "  # none but linear layers get an adapter
    idle = sorted(name for name in idle if chosen not in name)
    sets = [] if method == "full" else BASE[1:2]
    folder, notes = save_model(model, tmp_path / "model"), list[dict[str, Any]]()
    made = recipe(folder, "model.bits=32", *sets, f"adapter.method={method}", f"data.train={rows}", "train.steps=1")
    train(made, watch=notes.append)
    assert {"note": f"no text changes {len(idle)} of the layers that train: {', '.join(idle[:3])}, ..."} in notes
    assert len(idle) == (8 if method == "pissa" else 10)


@pytest.mark.parametrize("sets", [[], ["adapter.method=vera"], ["model.bits=4"], ["adapter.method=full"]])
def test_dry_run_and_training_count_the_same(
    sets: list[str], models: Callable[[str], Path], recipe: Make, rows: Path, pissa: Callable[..., Any]
) -> None:
    words = [f"data.train={rows}", "train.epochs=0.2", "train.batch_size=3", "adapter.rank=4", "model.bits=32", *sets]
    words = [word for word in words if "full" not in str(sets) or "rank" not in word]
    arguments = ["--model", models("qwen2"), *(part for word in words for part in ("--set", word))]
    planned = pissa("train", *arguments, "--dry-run").out
    (counts,) = re.findall(r"[\d,]+ parameters train, the base has [\d,]+", planned)
    (steps,) = re.findall(r"\n(\d+) steps of 3 examples, if all 40 rows can be used", planned)
    listed = pissa("train", *arguments, "--dry-run", "--json").json
    assert (listed["steps"], listed["rows"]) == (int(steps), 40)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(rows.parent)
        done = pissa("train", *arguments)
    assert done.code == 0 and f"{counts}; {steps} steps" in " ".join(done.err.split())
    assert "(first and last step)" in done.out
    base = AutoModelForCausalLM.from_pretrained(models("qwen2"))
    assert counts.endswith(f" {sum(p.numel() for p in base.parameters()):,}")


def test_the_shown_losses_are_means_over_several_steps(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    for losses, wanted in (([4.0], (4, 4, 1)), ([4, 3, 9, 2, 1], (3.5, 1.5, 2)), (list(range(100)), (4.5, 94.5, 10))):
        metrics.write_text("".join(json.dumps({"step": n, "loss": loss}) + "\n" for n, loss in enumerate(losses)))
        assert mean_losses(metrics) == wanted


def test_loss_and_gradient_against_a_plain_computation(recipe: Make, rows: Path) -> None:
    """One step's by hand: unpadded, example by example, prompt masked, averaged over all answer tokens. Of a trained
    model: an untrained one finds the wrong token nearly as likely."""
    folder = DEMO / "base"
    made = recipe(folder, *BASE, f"data.train={rows}", "train.steps=1")
    figures = train(made)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    content = [json.loads(line) for line in rows.read_text().splitlines()]
    total, count = torch.zeros((), dtype=torch.float64), 0
    for index in step_examples(0, len(content), made):
        prompt = (
            "Below is an instruction that describes a task. Write a response that appropriately completes the request."
            f"\n\n### Instruction:\n{content[index]['instruction']}\n\n### Response:"
        )
        whole = tokenizer(f"{prompt}{content[index]['output']}\n")["input_ids"] + [tokenizer.eos_token_id]
        begin = len(tokenizer(prompt)["input_ids"])
        log_probabilities = torch.log_softmax(model(torch.tensor([whole])).logits[0].double(), -1)
        for position in range(begin, len(whole)):
            total = total - log_probabilities[position - 1, whole[position]]
            count += 1
    (total / count).backward()
    assert figures["loss_first"] == pytest.approx(float(total) / count, rel=1e-5)
    squares = 0.0
    for name, factors in read_peft(Run(Path(made.output)).init)[1].factors.items():  # y = ... + s B A x
        gradient = model.get_parameter(f"{name}.weight").grad
        squares += float((gradient @ factors["A"].T).square().sum() + (factors["B"].T @ gradient).square().sum())
    assert events(made)[0]["grad_norm"] == pytest.approx(squares**0.5, rel=1e-4)


@pytest.mark.parametrize("packing", [False, True])
def test_the_layout_of_a_step_does_not_matter(
    packing: bool, models: Callable[[str], Path], recipe: Make, rows: Path, tmp_path: Path
) -> None:
    runs = []
    for number, size in enumerate((8, 4, 3, 1)):
        sets = [
            f"output={tmp_path / str(number)}",
            f"train.micro_batch_size={size}",
            f"data.train={rows}",
            "train.steps=6",
        ]
        sets += [f"data.packing={str(packing and number > 0).lower()}"]
        made = recipe(models("llama"), *BASE, *sets)
        train(made)
        runs.append([event["loss"] for event in events(made)])
    for losses in runs[1:]:
        assert losses == pytest.approx(runs[0], rel=1e-6)


def test_every_epoch_takes_every_example_once(recipe: Make) -> None:
    made = recipe(Path("x"), "train.batch_size=3", "train.epochs=3")
    assert count_steps(7, made) == 7
    taken = [i for step in range(7) for i in step_examples(step, 7, made)]
    assert [sorted(taken[e * 7 : e * 7 + 7]) for e in range(3)] == [list(range(7))] * 3 and len(taken) == 21
    assert taken[:7] != taken[7:14]
    half = recipe(Path("x"), "train.batch_size=3", "train.epochs=0.5")
    assert [len(step_examples(step, 8, half)) for step in range(count_steps(8, half))] == [3, 1]
    least = recipe(Path("x"), "train.batch_size=3", "train.epochs=0.01")
    assert count_steps(8, least) == 1 == len(step_examples(0, 8, least))
    counted = recipe(Path("x"), "train.batch_size=5", "train.steps=4")
    assert [len(step_examples(step, 2, counted)) for step in range(4)] == [5] * 4


@pytest.mark.parametrize("batch_size", [3, 5, 20])
def test_more_epochs_pass_over_no_example(
    batch_size: int, models: Callable[[str], Path], recipe: Make, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """7 examples: the last step of a run of less epochs is short, and those of the next go on from there."""
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:7]))
    sets = (*BASE, f"data.train={rows}", f"train.batch_size={batch_size}", "train.schedule=constant", "train.warmup=0")
    taken: list[int] = []

    def noted(*arguments: Any) -> list[int]:
        taken.extend(step_examples(*arguments))
        return step_examples(*arguments)

    monkeypatch.setattr(module, "step_examples", noted)
    for epochs in (1, 1.5, 3, 4):
        train(recipe(models("llama"), *sets, f"train.epochs={epochs}"), resume=epochs > 1)
    straight = recipe(models("llama"), *sets, "train.epochs=4")
    steps = range(count_steps(7, straight))
    assert taken == [i for step in steps for i in step_examples(step, 7, straight)]


def test_a_held_out_loss_that_is_no_number_is_said(
    models: Callable[[str], Path], recipe: Make, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "evaluate_loss", lambda *_: float("nan"))
    made, notes = recipe(models("llama"), *BASE, f"data.train={rows}", f"data.eval={rows}", "train.steps=1"), []
    figures = train(made, watch=notes.append)
    assert figures["eval_loss"] is None and "NaN" not in Run(Path(made.output)).metrics.read_text()
    assert {"note": "step 1: the held-out loss is nan"} in notes


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(("warmup", "steps"), [(0.1, 20), (0.03, 50), (4, 20), (0.0, 7), (5, 5), (9, 5)])
def test_schedules_are_those_of_transformers_after_the_warmup(schedule: str, warmup: float, steps: int) -> None:
    section = TrainSection(schedule=schedule, warmup=warmup)  # type: ignore[arg-type]
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([parameter], lr=0.5)
    num_warmup = -int(-warmup * steps // 1) if warmup < 1 else int(warmup)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    oracle = get_scheduler(name, optimizer, num_warmup_steps=num_warmup, num_training_steps=steps)
    for step in range(steps):
        wanted = oracle.get_last_lr()[0] if step >= num_warmup else 0.5 * (step + 1) / (num_warmup + 1)
        assert learning_rate(step, steps, section, 0.5) == pytest.approx(wanted, abs=1e-12)
        optimizer.step()
        oracle.step()


@pytest.mark.parametrize("name", ["adamw", "paged-adamw-8bit"])
def test_what_an_optimizer_has_is_put_back(name: str, recipe: Make, tmp_path: Path) -> None:
    """In the same one, and in a new one; a parameter that no gradient had reached begins anew. 8 bits from 4096 on."""
    made = recipe(tmp_path, f"train.optimizer={name}", "train.weight_decay=0.25")
    names = {torch.nn.Parameter(torch.randn(64, 128)): f"layer{number}.A" for number in range(3)}

    def steps(optimizer: torch.optim.Optimizer, reached: int) -> list[torch.Tensor]:
        for parameter in list(names)[:reached]:
            parameter.grad = parameter.detach().sin()
        for _ in range(2):
            optimizer.step()
        optimizer.zero_grad()
        return [parameter.detach().clone() for parameter in names]

    same = make_optimizer(names, made)
    settings = [[group[key] for key in ("lr", "ratio", "weight_decay", "betas", "eps")] for group in same.param_groups]
    assert settings == [[made.lr, 1.0, 0.25, (0.9, 0.999), 1e-8]]
    before = steps(same, 2)
    save_tensors(tmp_path / "state.safetensors", optimizer_tensors(same, names, True))
    wanted = steps(same, 3)
    for optimizer in (same, make_optimizer(names, made)):
        with torch.no_grad():
            for parameter, value in zip(names, before, strict=True):
                parameter.copy_(value)
            restore_optimizer(optimizer, names, load_tensors(tmp_path / "state.safetensors"))
        assert all(map(torch.equal, steps(optimizer, 3), wanted))


def test_the_environment_does_not_divide_gradients(
    models: Callable[[str], Path], recipe: Make, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = (*BASE, f"data.train={rows}", "train.steps=1")
    plain, divided = (recipe(models("llama"), *sets, f"output={tmp_path / name}") for name in ("plain", "divided"))
    train(plain)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    train(divided)
    assert [e["grad_norm"] for e in events(plain)] == [e["grad_norm"] for e in events(divided)]


def test_the_environment_does_not_compile_the_model(
    models: Callable[[str], Path], recipe: Make, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `accelerate config` says of dynamo: the model would be compiled whole, and a GPU multiply in TF32."""
    AcceleratorState._reset_state()
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("compiled"))
    train(recipe(models("llama"), *BASE, f"data.train={rows}", "train.steps=1"))
    assert AcceleratorState().dynamo_plugin.backend == "NO"


def test_padding_is_a_token_that_the_model_knows(models: Callable[[str], Path], rows: Path) -> None:
    model, tokenizer = make_model("llama"), AutoTokenizer.from_pretrained(models("llama"))
    assert padding(model, tokenizer) == tokenizer.pad_token_id
    tokenizer.add_tokens([f"<{number}>" for number in range(512 - len(tokenizer))])
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id >= model.config.vocab_size and padding(model, tokenizer) == 0
    prompts = [[5] * 9, [7] * 4]
    assert dict(generate(model, tokenizer, prompts, 2, 4)) == dict(generate(model, tokenizer, prompts, 1, 4))
    for own, wanted in ((7, 7), (511, 511), (512, 0), (-1, 0), (None, 0)):
        model.config.pad_token_id = own
        classifier: Any = SimpleNamespace(config=model.config, get_output_embeddings=lambda: None)
        assert padding(classifier, tokenizer) == wanted


def test_random_numbers_are_those_of_seed_step_and_process() -> None:
    def drawn(*of: int) -> tuple[float, ...]:
        seed_step(*of)
        return tuple(torch.rand(3).tolist())

    assert drawn(1, 2, 0) == drawn(1, 2, 0)
    assert len({drawn(*of) for of in ((1, 2, 0), (1, 2, 1), (1, 3, 0), (2, 2, 0))}) == 4


def test_apples_gpu_is_no_gpu_here() -> None:
    """Accelerate would take it, and the loss could not be formed there."""
    code = "import torch; torch.backends.mps.is_available = torch.backends.mps.is_built = lambda: True; "
    code += "from accelerate import Accelerator; from pissa_cli.process import process_state; "
    code += "print(process_state().device.type, Accelerator().device.type)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["cpu", "cpu"]


def test_only_the_newest_checkpoints_are_kept(models: Callable[[str], Path], recipe: Make, rows: Path) -> None:
    made = recipe(models("llama"), *BASE, f"data.train={rows}", "train.steps=7", "train.save_every=2", "train.keep=2")
    train(made)
    assert sorted(p.name for p in Run(Path(made.output)).checkpoints.iterdir()) == ["step-6", "step-7"]


def test_a_checkpoint_is_due_after_ten_minutes(
    models: Callable[[str], Path], recipe: Make, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = (*BASE, f"data.train={rows}", "train.steps=4")
    made = recipe(models("llama"), *sets)
    train(made)
    assert [p.name for p in Run(Path(made.output)).checkpoints.iterdir()] == ["step-4"]
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0)
    monkeypatch.setattr(loop, "SAVE_SHARE", 0)
    for sometimes, names in (("null", ["step-3", "step-4"]), ("3", ["step-3", "step-4"]), ("4", ["step-4"])):
        made = recipe(models("llama"), *sets, f"train.save_every={sometimes}", f"output={made.output}{sometimes}")
        train(made)
        assert sorted(p.name for p in Run(Path(made.output)).checkpoints.iterdir()) == names


def test_what_is_due_waits_for_a_held_out_loss_and_for_room(
    models: Callable[[str], Path], recipe: Make, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """400 s a step: due after 600 s, or 1200 s if no held-out loss is taken before."""
    for every, free, names in (
        (3, 10**15, ["step-3", "step-4"]),
        (None, 10**15, ["step-2", "step-4"]),
        (3, 9, ["step-4"]),
    ):
        clock, notes = [0.0], []

        def watch(event: dict[str, Any], clock: list[float] = clock, notes: list[Any] = notes) -> None:
            clock[0] += 400 if "step" in event else 0
            notes.append(event.get("note", ""))

        monkeypatch.setattr(loop.time, "monotonic", lambda clock=clock: clock[0])
        monkeypatch.setattr(loop.shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        sets = (f"data.train={rows}", f"data.eval={rows}", "train.steps=4", f"train.eval_every={every or 'null'}")
        made = recipe(models("llama"), *BASE, *sets, f"output={rows.parent / f'{every}-{free}'}")
        train(made, watch=watch)
        assert sorted(p.name for p in Run(Path(made.output)).checkpoints.iterdir()) == names
        assert any("no checkpoint, as there is no room" in note for note in notes) == (free == 9)


def test_held_out_losses_of_other_data_are_not_compared(
    models: Callable[[str], Path], recipe: Make, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([1.0, 3.0, 2.0])
    monkeypatch.setattr(loop, "evaluate_loss", lambda *_: next(losses))
    sets = (*BASE, f"data.train={rows}", "train.save_every=1", "train.eval_every=1", "train.keep=1")
    train(recipe(models("llama"), *sets, f"data.eval={rows}", "train.steps=1"))
    other = rows.with_name("other.jsonl")
    other.write_text("".join(rows.read_text().splitlines(keepends=True)[:5]))
    made = recipe(models("llama"), *sets, f"data.eval={other}", "train.steps=3")
    assert "lowest" not in train(made, resume=True)
    assert [p.name for p in Run(Path(made.output)).checkpoints.iterdir()] == ["step-3"]


def test_full_fine_tuning_keeps_no_other_checkpoint(
    models: Callable[[str], Path], recipe: Make, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([1.0, 2.0, 3.0])
    monkeypatch.setattr(loop, "evaluate_loss", lambda *_: next(losses))
    sets = (f"data.train={rows}", f"data.eval={rows}", "train.save_every=1", "train.eval_every=1", "train.keep=1")
    made = recipe(models("llama"), "model.bits=32", "adapter.method=full", *sets, "train.steps=3", "train.batch_size=4")
    assert train(made)["lowest"] == {"step": 1, "eval_loss": 1.0, "kept": False}
    assert [p.name for p in Run(Path(made.output)).checkpoints.iterdir()] == ["step-3"]


def test_the_checkpoint_with_the_lowest_held_out_loss_is_kept(
    models: Callable[[str], Path],
    recipe: Make,
    rows: Path,
    pissa: Callable[..., Outcome],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sets = (*BASE, f"data.train={rows}", f"data.eval={rows}", "train.steps=6", "train.keep=1")
    sets += ("train.save_every=1", "train.eval_every=1")
    losses = iter([3.0, 1.0, 2.0, 4.0, 5.0, 6.0])
    monkeypatch.setattr(loop, "evaluate_loss", lambda *_: next(losses))
    made = recipe(models("llama"), *sets)
    figures = train(made)
    kept = Run(Path(made.output)).checkpoints
    assert sorted(p.name for p in kept.iterdir()) == ["step-2", "step-6"]
    assert figures["lowest"] == {"step": 2, "eval_loss": 1.0, "kept": True}
    losses = iter([7.0])
    out = pissa("train", made.output, "--resume", "--set", "train.steps=7").out
    assert "`pissa eval` and `pissa export` take it by --checkpoint 2" in out.replace("\n", " ")
    assert sorted(p.name for p in kept.iterdir()) == ["step-2", "step-7"]
    losses = iter([0.5])
    assert "lowest" not in pissa("train", made.output, "--resume", "--set", "train.steps=8", "--json").json
    assert [p.name for p in kept.iterdir()] == ["step-8"]


def test_the_lowest_of_those_that_were_saved_is_kept(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for step in (2, 4, 6):
        (run.checkpoints / f"step-{step}").mkdir(parents=True)
    said = [{"step": step, "loss": 1.0, "eval_loss": float(step), "eval_set": "a"} for step in range(1, 7)]
    run.metrics.write_text("".join(json.dumps(event) + "\n" for event in said))
    assert lowest_held_out(run) == (1, 1.0)
    for best_as_well, kept in ((True, ["step-2", "step-6"]), (False, ["step-6"])):
        remove_old(run, 1, best_as_well)
        assert sorted(folder.name for folder in run.checkpoints.iterdir()) == kept


def test_a_checkpoint_takes_no_more_memory_after_a_day(tmp_path: Path) -> None:
    """What the best one is asked for is read line by line: kept whole, a day's lines took 25 MB."""
    run = Run(tmp_path)
    line = '{"step": %d, "loss": 1.0, "lr": 1e-05, "grad_norm": 1.0, "tokens": 500, "seconds": 1.0}\n'
    run.metrics.write_text("".join(line % step for step in range(1, 17281)) + '{"step": 9, "loss": 1, "eval_loss": 2}')
    tracemalloc.start()
    assert lowest_held_out(run) == (9, 2)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 2**18


def test_a_diverging_run_stops_with_a_reason(models: Callable[[str], Path], recipe: Make, rows: Path) -> None:
    grows = ("train.lr=100", "train.weight_decay=1000")  # 100,000 times as large at each step
    made = recipe(models("llama"), *BASE, f"data.train={rows}", "train.steps=9", "train.save_every=1", *grows)
    with pytest.raises(PissaError, match="diverged"):
        train(made)
    run = Run(Path(made.output))
    assert not run.adapter.exists()
    for folder in run.checkpoints.iterdir():
        assert all(bool(torch.isfinite(t).all()) for t in load_tensors(folder / "optimizer.safetensors").values())


@pytest.mark.parametrize("bits", [32, 4])
def test_a_changed_start_is_refused(bits: int, models: Callable[[str], Path], recipe: Make, rows: Path) -> None:
    from safetensors.torch import save_file

    made = recipe(models("llama"), *BASE[1:], f"model.bits={bits}", f"data.train={rows}", "train.steps=2")
    initialize(made)
    path = Run(Path(made.output)).init / "adapter_model.safetensors"
    save_file({name: tensor * 1.5 for name, tensor in load_tensors(path).items()}, path)
    with pytest.raises(UsageError, match="not what was written") as raised:
        train(made)
    assert "NaN" not in str(raised.value)


@pytest.mark.parametrize(("method", "file"), [("pissa", "adapter_model.safetensors"), ("full", "model.safetensors")])
def test_a_damaged_result_is_written_anew_from_its_checkpoint(
    method: str, file: str, models: Callable[[str], Path], recipe: Make, rows: Path
) -> None:
    sets = BASE[1:] if method == "pissa" else ("model.bits=32",)
    made = recipe(models("llama"), f"adapter.method={method}", *sets, f"data.train={rows}", "train.steps=2")
    train(made)
    path = result_of(made) / file
    content = path.read_bytes()
    path.write_bytes(content[:-2] + b"??")
    with pytest.raises(UsageError, match="not what was written") as raised:
        load_result(made, torch.device("cpu"))
    assert f"pissa train {made.output} --resume" in str(raised.value.hint)
    train(made, resume=True)
    assert path.read_bytes() == content and load_result(made, torch.device("cpu"))


def test_a_start_that_is_not_the_base_is_noticed(
    models: Callable[[str], Path], recipe: Make, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adapter without its residual, the commonest mistake with PiSSA elsewhere: the loss would start too high."""
    original = assembly.attach
    monkeypatch.setattr(assembly, "attach", lambda m, f, _, *rest: original(m, f, assembly.METHODS["lora"], *rest))
    with pytest.raises(PissaError, match="step 0"):
        train(recipe(models("llama"), *BASE, f"data.train={rows}", "train.steps=2"))


def test_full_fine_tuning_trains_everything(models: Callable[[str], Path], recipe: Make, rows: Path) -> None:
    made = recipe(
        models("llama"), "model.bits=32", "adapter.method=full", f"data.train={rows}", "train.steps=3", "train.lr=0.001"
    )
    figures = train(made)
    before = AutoModelForCausalLM.from_pretrained(models("llama")).state_dict()
    after = AutoModelForCausalLM.from_pretrained(figures["result"]).state_dict()
    assert all(not torch.equal(before[name], after[name]) for name in before if "norm" not in name)
    modes = {path.stat().st_mode for path in Path(figures["result"]).iterdir()}
    assert len(modes) == 1, "files that not all may read who may read the others"


@pytest.mark.parametrize("sets", [["model.bits=4"], ["model.bits=16"], ["model.bits=32", "train.precision=bf16"]])
def test_bf16_and_gradient_checkpointing_train(
    sets: list[str], models: Callable[[str], Path], recipe: Make, rows: Path
) -> None:
    made = recipe(
        models("llama"), *BASE[1:], *sets, f"data.train={rows}", "train.steps=8", "train.gradient_checkpointing=true"
    )
    figures = train(made)
    assert figures["loss_last"] < figures["loss_first"]


def test_gradient_checkpointing_changes_nothing(
    models: Callable[[str], Path], recipe: Make, rows: Path, tmp_path: Path
) -> None:
    losses = []
    for flag in ("false", "true"):
        sets = (
            f"output={tmp_path / flag}",
            f"data.train={rows}",
            "train.steps=3",
            f"train.gradient_checkpointing={flag}",
        )
        made = recipe(models("llama"), *BASE, *sets)
        train(made)
        losses.append([e["loss"] for e in events(made)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_loss_in_chunks_against_the_whole(dtype: torch.dtype, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loss.LOGITS, "cpu", 50 * 16)
    monkeypatch.setattr(loss, "ROWS", 16)
    torch.manual_seed(0)
    head = torch.nn.Linear(12, 50, bias=bias, dtype=dtype)
    x, targets = torch.randn(70, 12, dtype=dtype).requires_grad_(), torch.randint(0, 50, (70,))
    whole = torch.nn.functional.cross_entropy(head(x).float(), targets, reduction="sum")
    parts = loss.HeadCrossEntropy.apply(x, head.weight, head.bias, targets)
    inputs = [x, *head.parameters()]
    wanted, found = torch.autograd.grad(whole / 7, inputs), torch.autograd.grad(parts / 7, inputs)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(parts, whole, rtol=tolerance, atol=0)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_gradients_of_many_chunks_are_added_up_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loss.LOGITS, "cpu", 50 * 16)
    monkeypatch.setattr(loss, "ROWS", 16)
    torch.manual_seed(0)
    x, targets = torch.randn(4000, 12).bfloat16(), torch.randint(0, 50, (4000,))
    head = torch.nn.Linear(12, 50).bfloat16()
    exact = copy.deepcopy(head).float()
    found = torch.autograd.grad(
        loss.HeadCrossEntropy.apply(x, head.weight, head.bias, targets), list(head.parameters())
    )
    whole = torch.nn.functional.cross_entropy(exact(x.float()), targets, reduction="sum")
    for one, other in zip(found, torch.autograd.grad(whole, list(exact.parameters())), strict=True):
        assert one.dtype == torch.bfloat16 and float((one - other).norm()) < 2.0**-7 * float(other.norm())


def test_the_loss_of_a_model_in_16_bits_is_in_fp32() -> None:
    model, ids = make_model("llama").bfloat16(), torch.arange(5, 25)[None]
    wanted = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1].float(), ids[0, 1:], reduction="sum")
    found = loss.summed_loss(model, {"input_ids": ids, "labels": ids.clone()})
    assert found.dtype == torch.float32 and float(found) == pytest.approx(float(wanted), rel=1e-3)


def test_a_held_out_loss_forms_no_gradients_of_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted: list[bool] = []
    original = loss.HeadCrossEntropy.apply

    def apply(x: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
        wanted.append(weight.requires_grad)
        return original(x, weight, *rest)

    monkeypatch.setattr(loss.HeadCrossEntropy, "apply", apply)
    model, ids = make_model("llama"), torch.arange(5, 25)[None]
    found = loss.summed_loss(model, {"input_ids": ids, "labels": ids.clone()}, chunked=True)
    with torch.no_grad():
        again = loss.summed_loss(model, {"input_ids": ids, "labels": ids.clone()}, chunked=True)
    assert wanted == [True, False] and torch.equal(found, again)


def test_the_head_is_as_before_also_where_a_step_fails() -> None:
    model, ids = make_model("llama"), torch.arange(5, 25)[None]
    head = model.get_output_embeddings()
    for own in (None, lambda x: torch.nn.Linear.forward(head, x)):
        if own is not None:
            head.forward = own
        assert float(loss.summed_loss(model, {"input_ids": ids, "labels": ids.clone()}, chunked=True).detach()) > 0
        assert head.__dict__.get("forward") is own
        with pytest.raises(IndexError):
            loss.summed_loss(model, {"input_ids": ids + 9999, "labels": ids.clone()}, chunked=True)
        assert head.__dict__.get("forward") is own


def test_gradients_of_the_loss_are_scaled_before_they_are_rounded() -> None:
    """1 / 171 in bf16 is 0.2 % more."""
    torch.manual_seed(0)
    head, x = torch.nn.Linear(64, 50).bfloat16(), torch.randn(171, 64).bfloat16().requires_grad_()
    total = loss.HeadCrossEntropy.apply(x, head.weight, head.bias, torch.randint(0, 50, (171,)))
    (summed,) = torch.autograd.grad(total, x, retain_graph=True)
    (mean,) = torch.autograd.grad(total / 171, x)
    assert float(mean.float().norm()) == pytest.approx(float(summed.float().norm()) / 171, rel=3e-4)


@pytest.mark.parametrize(("architecture", "chunks"), [("llama", True), ("gpt2", True), ("gemma2", False)])
@pytest.mark.parametrize("whole", ["[]", "[lm_head, embed_tokens]"])
def test_training_in_chunks_is_training(
    architecture: str, chunks: bool, whole: str, models: Any, recipe: Make, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Models that cap their logits keep the plain loss."""
    if whole != "[]" and architecture != "llama":
        pytest.skip("other names")
    used = []
    original = loss.HeadCrossEntropy.forward
    monkeypatch.setattr(loss.HeadCrossEntropy, "forward", lambda *args: used.append(1) or original(*args))
    sets = [*BASE, f"data.train={rows}", "train.steps=4", f"adapter.modules_to_save={whole}"]
    results = []
    for chunked in (True, False):
        if not chunked:
            monkeypatch.setattr("pissa_cli.training.assembly.chunks_loss", lambda *_: False)
        made = recipe(models(architecture), *sets, f"output={rows.parent / str(chunked)}")
        train(made)
        results.append([event["loss"] for event in events(made) if "loss" in event])
        assert len(used) > 4 if chunks else True
    assert results[0] == pytest.approx(results[1], rel=1e-5)
    if not chunks:
        assert len(used) <= 1


@pytest.mark.parametrize("training", [True, False])
def test_micro_batches_that_do_not_fit_are_halved(
    training: bool,
    models: Callable[[str], Path],
    recipe: Make,
    rows: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Losses are those of micro-batches that fit. Held-out rows alone may be too long, too: no step is lost by them."""
    sets = (*BASE[:3], f"data.train={rows}", f"data.eval={rows}", "train.batch_size=8", "train.steps=4")
    sets = (*sets, "data.packing=false")
    wanted = recipe(models("llama"), *sets, "train.micro_batch_size=2", f"output={tmp_path / 'wanted'}")
    train(wanted)
    original, notes = module.summed_loss, list[dict[str, Any]]()

    def full(model: Any, batch: Any, *rest: Any) -> Any:
        if model.training is training and len(batch["input_ids"]) > 2:
            raise torch.OutOfMemoryError("no room")
        return original(model, batch, *rest)

    monkeypatch.setattr(module, "summed_loss", full)
    made = recipe(models("llama"), *sets, "train.micro_batch_size=8")
    train(made, watch=notes.append)
    assert [note["note"][:35] for note in notes if "out of memory" in note.get("note", "")] == [
        "out of memory: micro-batches of 4 e",
        "out of memory: micro-batches of 2 e",
    ]
    losses = [[e["loss"] for e in events(one)] + [events(one)[-1]["eval_loss"]] for one in (made, wanted)]
    assert losses[0] == pytest.approx(losses[1], rel=0 if training else 1e-6, abs=0)
    monkeypatch.setattr(module, "summed_loss", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("never")))
    with pytest.raises(torch.OutOfMemoryError):
        train(recipe(models("llama"), *sets, f"output={tmp_path / 'never'}"))
