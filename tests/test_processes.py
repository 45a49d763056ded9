"""Two processes over gloo do what one does: the same losses, the same adapter."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MOE_CONFIGS, PACKAGE, make_model, save_model
from forks import await_that, entry, exit_code, forked, train_together
from runs import BASE, adapter, events, same
from test_start import started
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, BigBirdConfig, ViTConfig, ViTModel

from pissa_cli import process
from pissa_cli.base.experts import has_experts, holders_of_3d_weights
from pissa_cli.base.weights import load_tensors
from pissa_cli.cli.edge import _tell_launcher
from pissa_cli.errors import LAUNCHED, Interrupted, PissaError, UsageError
from pissa_cli.files import locked
from pissa_cli.process import stop_signals
from pissa_cli.run.rundir import Run
from pissa_cli.schema.recipe_file import dump, load, shipped
from pissa_cli.train import train
from pissa_cli.training import launch
from pissa_cli.training.launch import _wait
from pissa_cli.training.sharding import asked_by_accelerate, shard

ENVIRONMENT = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
CLOSE = 1e-4
"""Of an adapter's norm. AdamW divides by the size of the gradient: where that is a rounding error, so is the step,
and one element of one layer can be 2e-5 away (measured: 1.7e-5) with all others at 1e-7. With AdamW's count of steps
off by one they are 2e-3 away and more."""
WAYS = ("one", "two")
ASKED = {
    "fsdp": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
    "zero": {"ACCELERATE_USE_DEEPSPEED": "true"},
}
"""What `accelerate launch` tells its processes."""
STEPS = int(os.environ.get("PISSA_TEST_STEPS", "7"))
RUNS = {
    "lora": ["adapter={method: lora, rank: 4}"],
    "pissa": [],
    "vera": ["adapter={method: vera, rank: 8}"],
    "svfit": ["adapter={method: svfit, rank: 8}"],
    "qpissa": ["model.bits=4", "train.precision=fp32"],
}

SHARDED = {
    "checkpointing": ["train.gradient_checkpointing=true", "data.eval={rows}", "train.eval_every=5"],
    "some-layers": ["model.bits=4", "train.precision=fp32", "adapter={method: lora, rank: 4, targets: [q_proj]}"],
    "head": ["adapter={method: pissa, rank: 4, modules_to_save: [lm_head]}", "data.eval={rows}"],
    "full": ["adapter={method: full}", "train.lr=0.0003", "data.eval={rows}"],
}
"""Runs that differ where parameters are spread."""


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine rows: with three epochs of batches of four, the last step has fewer examples than there are processes."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [{"instruction": f"Count {n} and {n}." + " More." * n, "output": f"That is {2 * n}."} for n in range(9)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def result(recipe: Any) -> dict[str, Any]:
    """The tensors of `adapter/`, or of `merged/` after full fine-tuning."""
    merged = Run(Path(recipe.output)).merged / "model.safetensors"
    return load_tensors(merged) if merged.is_file() else adapter(recipe)


@pytest.fixture(scope="module")
def alone() -> Callable[[Any], tuple[dict[str, Any], list[Any], list[Any]]]:
    """What a training in this process gives: tensors, losses, held-out losses. Made once, whatever the folder."""
    made: dict[str, Any] = {}

    def figures(recipe: Any) -> tuple[dict[str, Any], list[Any], list[Any]]:
        key = recipe.model_copy(update={"output": ""}).model_dump_json()
        if key not in made:
            train(recipe)
            made[key] = (result(recipe), *losses(recipe))
        return made[key]  # type: ignore[no-any-return]

    return figures


def losses(recipe: Any) -> tuple[list[Any], list[Any]]:
    """Of the steps, with the norms of their gradients, and held out."""
    seen = events(recipe)
    steps = [event[key] for event in seen for key in ("loss", "grad_norm")]
    return steps, [event["eval_loss"] for event in seen if "eval_loss" in event]


@pytest.mark.parametrize("layout", ["copies", "fsdp2", "zero-2", "zero-3"])
def test_two_processes_are_one(
    models: Callable[[str], Path], rows: Path, tmp_path: Path, alone: Callable[..., Any], layout: str
) -> None:
    """Each with the model in whole (DDP), or with a part of it (FSDP2, DeepSpeed), in memory."""
    environment = {}
    if layout.startswith("zero"):
        pytest.importorskip("deepspeed")
        environment = ASKED["zero"] | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": layout[-1]}
    runs = RUNS if layout == "copies" else RUNS | SHARDED
    if layout == "fsdp2" and torch.__version__ < "2.13":  # which spreads no bytes, and is told so
        runs = {name: sets for name, sets in runs.items() if "model.bits=4" not in sets}
    made = {}
    for name, sets in runs.items():
        sets = [one.replace("{rows}", str(rows)) for one in (*sets, f"train.shard={str(layout == 'fsdp2').lower()}")]
        for way in WAYS:
            common = [f"data.train={rows}", f"train.steps={STEPS}", "train.batch_size=5", "train.micro_batch_size=2"]
            common.append("train.max_grad_norm=1.5")  # which clips some steps; 1 (the default) would clip all
            base = [one for one in BASE if "rank" not in one or "adapter={method: full}" not in sets]
            flags = {("model", "name"): ("--model", str(models("llama")))}
            output = f"output={tmp_path / f'{name}-{way}'}"
            made[name, way] = load(None, flags, [*base, *common, "train.lr=0.003", *sets, output]).recipe
    train_together([made[name, "two"] for name in runs], 2, tmp_path, environment)
    assert "built" not in (tmp_path / "process-0.txt").read_text()  # a kernel that nothing calls
    for name in runs:
        one, wanted, held_out = alone(made[name, "one"])
        two, (found, also_held_out) = result(made[name, "two"]), losses(made[name, "two"])
        assert also_held_out == pytest.approx(held_out, rel=1e-5)
        assert len(wanted) == len(found) == 2 * STEPS
        assert found == pytest.approx(wanted, rel=1e-5), name
        for key, tensor in one.items():
            assert float((two[key] - tensor).norm() / tensor.norm().clamp_min(1e-30)) < CLOSE, f"{name} {key}"


@pytest.mark.skipif(torch.__version__ < "2.13", reason="it spreads no bytes")
def test_what_is_spread_and_by_which_blocks(models: Callable[[str], Path], recipe: Any, tmp_path: Path) -> None:
    """The losses are the same if less is, but not the memory."""
    sets = ["model.bits=4", "adapter={method: lora, rank: 4, targets: [q_proj]}", "train.precision=fp32"]
    model: Any = started(recipe(models("llama"), *sets))

    def work() -> None:
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        shard(model, torch.device("cpu"), 1)
        assert [isinstance(module, FSDPModule) for module in (model, model.model, *model.model.layers)] == [1, 0, 1, 1]
        layer = model.model.layers[0].self_attn.q_proj
        assert all(isinstance(tensor, DTensor) for tensor in (layer.base.weight, layer.A, model.lm_head.weight))

    assert exit_code(forked(work, tmp_path / "log")) == 0, (tmp_path / "log").read_text()


def test_a_part_that_text_does_not_reach(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """BigBird's pooler has an adapter that gets no gradient, which DDP does not take by itself."""
    monkeypatch.setattr("pissa_cli.training.assembly.require_causal", lambda *_: None)  # not in transformers 5.17
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    dropout = {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}  # drawn by each process for itself
    config = BigBirdConfig(vocab_size=512, **shape, **dropout, is_decoder=True, attention_type="original_full")
    folder = save_model(AutoModelForCausalLM.from_config(config), tmp_path / "bigbird")
    sets = ["adapter={method: lora, rank: 4}", "train.steps=2", "model.bits=32", f"data.train={rows}"]
    one, two = (load(None, {}, [f"model.name={folder}", *sets, f"output={tmp_path / way}"]).recipe for way in WAYS)
    train(one)
    train_together([two], 2, tmp_path)
    assert losses(one)[0] == pytest.approx(losses(two)[0], rel=1e-5)


def test_only_3d_weights_of_experts_are_experts() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = ViTModel(ViTConfig(**sizes, image_size=28, patch_size=14))
    assert holders_of_3d_weights(vision) and not has_experts(vision)
    assert all(has_experts(make_model(name)) for name in MOE_CONFIGS)


def test_the_command_survives_a_killed_process_and_goes_on_alone(
    models: Callable[[str], Path], rows: Path, tmp_path: Path, pissa: Callable[..., Any]
) -> None:
    sets = [*BASE, f"data.train={rows}", "train.epochs=3", "train.batch_size=4", "train.save_every=2"]
    sets.append("data.max_length=168")  # which cuts the longest
    words = [word for one in sets for word in ("--set", one)]
    whole = ["train", "--model", str(models("llama")), *words, "--output", str(tmp_path / "whole")]
    assert pissa(*whole).code == 0
    command = ["train", "--model", str(models("llama")), *words, "--output", str(tmp_path / "out")]
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    started = subprocess.Popen(
        [sys.executable, "-m", "pissa_cli", *command, "--processes", "2"],
        env=ENVIRONMENT | {"TMPDIR": str(scratch)},
        stderr=subprocess.PIPE,
    )
    await_that((Run(tmp_path / "out").checkpoints / "step-2").is_dir)
    victims = _workers(started.pid)
    if victims:
        os.kill(victims[-1], signal.SIGKILL)
    _, said = started.communicate(timeout=300)
    assert said.count(b"cut at data.max_length") == 1
    assert b"in 2 processes failed: " in said and b"please report it" not in said
    assert not list(scratch.iterdir())
    outcome = pissa(*command, "--resume", "--json")
    assert outcome.code == 0, outcome.err
    one, two = (adapter(load(str(tmp_path / name), {}).recipe) for name in ("whole", "out"))
    for key, wanted in one.items():
        assert float((two[key] - wanted).norm() / wanted.norm()) < CLOSE, key


def start_two(model: Path, sets: list[str], folder: Path) -> int:
    """`train --processes 2` into folder/out, on its way; its process, which prints into folder/said."""
    words = ["train", "--model", model, *(word for one in sets for word in ("--set", one))]
    return forked(entry(*words, "--output", folder / "out", "--processes", "2"), folder / "said", ENVIRONMENT)


@pytest.mark.skipif(sys.platform != "linux", reason="the processes learn of it from Linux")
@pytest.mark.parametrize("signaled", ["the command", "the launcher", "one of them", "the command, by Ctrl-C"])
def test_killing_the_command_stops_its_processes(
    models: Callable[[str], Path], rows: Path, tmp_path: Path, signaled: str
) -> None:
    """They save a checkpoint, as after SIGTERM to one of them."""
    sets = [*BASE, f"data.train={rows}", "train.steps=3000", "train.batch_size=4", "train.save_every=2"]
    started = start_two(models("llama"), sets, tmp_path)
    run = Run(tmp_path / "out")
    await_that((run.checkpoints / "step-2").is_dir)
    workers = _workers(started)
    assert len(workers) == 2
    try:
        if signaled == "the command":
            os.kill(started, signal.SIGKILL)
            assert exit_code(started) == -signal.SIGKILL
        elif signaled == "the launcher":
            os.kill(int(_fields(Path(f"/proc/{workers[0]}/stat"))[1]), signal.SIGKILL)
            assert exit_code(started) == 1
        elif signaled == "one of them":
            os.kill(workers[-1], signal.SIGTERM)
            assert exit_code(started) == 130
        else:
            os.kill(started, signal.SIGINT)
            assert exit_code(started) == 130
            assert "Traceback" not in (tmp_path / "said").read_text()
        await_that(lambda: not any(map(_lives, workers)))
    finally:
        for process in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
    steps = len(run.metrics.read_text().splitlines())
    assert steps < 3000 and (run.checkpoints / f"step-{steps}").is_dir()


def test_the_launcher_hears_of_one_stop() -> None:
    """After several torchrun does not wait for the processes, whose checkpoint is then lost."""
    counts = "heard = []; signal.signal(signal.SIGTERM, lambda *_: heard.append(1)); print(flush=True)"
    until = "while not heard: time.sleep(0.01)\ntime.sleep(1.5)"  # for others that would come
    child = subprocess.Popen(
        [sys.executable, "-c", f"import signal, sys, time\n{counts}\n{until}\nsys.exit(len(heard))"],
        stdout=subprocess.PIPE,
    )
    assert child.stdout is not None and child.stdout.readline()
    for number, asks in enumerate((signal.SIGHUP, signal.SIGTERM, signal.SIGTERM)):
        threading.Timer(0.2 * (number + 1), os.kill, (os.getpid(), asks)).start()
    assert _wait(child) == (1, True)


def test_a_stop_that_comes_while_the_launcher_is_forked(
    models: Callable[[str], Path], rows: Path, tmp_path: Path
) -> None:
    """Python itself forgets what a handler raises there, and says so."""
    words = ["train", "--model", models("llama"), *(word for one in BASE for word in ("--set", one))]
    words += ["--set", f"data.train={rows}", "--output", tmp_path / "out", "--processes", "2"]

    def work() -> None:
        os.register_at_fork(before=lambda: signal.raise_signal(signal.SIGTERM))
        entry(*words)()

    assert exit_code(forked(work, tmp_path / "said", ENVIRONMENT)) == 130
    assert "ignored" not in (tmp_path / "said").read_text()
    assert not Run(tmp_path / "out").metrics.exists()


@pytest.mark.parametrize(("system", "second"), [("linux", "kill"), ("darwin", "send_signal")])
def test_a_second_interrupt_ends_the_launcher(system: str, second: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed at once where Linux tells the processes of it; elsewhere asked again. SIGTERM asks once."""
    heard = []

    class Launcher:
        def send_signal(self, number: int) -> None:
            heard.append(("send_signal", number))

        def kill(self) -> None:
            heard.append(("kill", signal.SIGKILL))

        def wait(self) -> int:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
                signal.raise_signal(number)
            return 0

    monkeypatch.setattr(launch.sys, "platform", system)
    assert _wait(Launcher()) == (0, True)  # type: ignore[arg-type]
    assert heard == [("send_signal", signal.SIGTERM), (second, {"kill": 9, "send_signal": signal.SIGTERM}[second])]


def test_a_launcher_that_dies_thread_by_thread_asks_for_one_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux sends the signal that a process asked for whenever the thread that is its parent ends, once and again."""
    with pytest.raises(KeyboardInterrupt), stop_signals():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    monkeypatch.setenv(LAUNCHED, "failure.json")
    with stop_signals() as asked:
        assert not asked()
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert asked()
    with pytest.raises(KeyboardInterrupt), stop_signals():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)


@pytest.mark.skipif(sys.platform != "linux", reason="the processes learn of it from Linux")
def test_a_second_interrupt_does_not_wait_for_the_step(
    models: Callable[[str], Path], rows: Path, tmp_path: Path
) -> None:
    sets = [*BASE, f"data.train={rows}", "train.steps=2", "train.batch_size=100000", "train.micro_batch_size=1"]
    started = start_two(models("llama"), sets, tmp_path)
    await_that(Run(tmp_path / "out").metrics.is_file)
    workers = _workers(started)
    assert len(workers) == 2
    time.sleep(2)  # until the other one is in its first step as well
    try:
        os.kill(started, signal.SIGINT)
        time.sleep(2)
        assert all(map(_lives, workers))
        os.kill(started, signal.SIGINT)
        assert exit_code(started) == 130  # the step would take half an hour
        await_that(lambda: not any(map(_lives, workers)))
    finally:
        for process in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


@pytest.mark.parametrize(("rank", "host"), [("0", "127.0.0.1"), ("1", "127.0.0.1"), ("0", "nowhere.invalid")])
def test_one_of_two_that_is_alone_says_so_and_can_be_stopped(
    rank: str, host: str, models: Callable[[str], Path], rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    environment = {"MASTER_ADDR": host, "MASTER_PORT": port, "WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank}
    command = entry("train", "--model", models("llama"), "--set", f"data.train={rows}", "-o", tmp_path / "out")
    log, said = tmp_path / "log", f"waiting at {host}:{port} for 2 processes (WORLD_SIZE)"
    said += "; no machine is known by that name" if host == "nowhere.invalid" else "\n"
    alone = forked(command, log, environment)
    try:
        await_that(lambda: said in log.read_text(), 60)
        os.kill(alone, signal.SIGTERM)
        await_that(lambda: "error: interrupted" in log.read_text(), 10)
    except AssertionError:
        os.kill(alone, signal.SIGKILL)
        raise
    finally:
        code = exit_code(alone)
    assert code == 130
    monkeypatch.setattr(process, "MEET_SECONDS", 0)
    assert exit_code(forked(command, log, environment)) == 1
    assert f"of 2 processes these have not come: {1 - int(rank)}\n" in log.read_text()


def test_a_port_that_somebody_else_has_is_named(models: Callable[[str], Path], rows: Path, tmp_path: Path) -> None:
    command = entry("train", "--model", models("llama"), "--set", f"data.train={rows}", "-o", tmp_path / "out")
    with socket.create_server(("0.0.0.0", 0)) as taken:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        started = forked(command, tmp_path / "log", place | {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"})
        assert exit_code(started) == 1
    assert "the processes cannot meet: " in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    "environment",
    [
        {"LOCAL_RANK": "0"},
        {"WORLD_SIZE": "two"},
        {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
        {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "99999"},
        {"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
    ],
)
def test_an_environment_of_half_a_launcher_is_refused(
    environment: dict[str, str], models: Callable[[str], Path], rows: Path, tmp_path: Path
) -> None:
    command = entry("train", "--model", models("llama"), "--set", f"data.train={rows}", "-o", tmp_path / "out")
    assert exit_code(forked(command, tmp_path / "log", environment)) == 2
    assert "unset WORLD_SIZE, RANK and LOCAL_RANK" in (tmp_path / "log").read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="the processes are found by Linux's /proc")
def test_a_process_killed_before_the_first_step_is_no_stop(
    models: Callable[[str], Path], rows: Path, tmp_path: Path
) -> None:
    sets = [*BASE, f"data.train={rows}", "train.steps=3000"]
    started, said = start_two(models("llama"), sets, tmp_path), tmp_path / "said"
    await_that(lambda: "\ntrain: " in f"\n{said.read_text()}")
    first, last = sorted(_workers(started))
    os.kill(first, signal.SIGSTOP)
    os.kill(last, signal.SIGKILL)
    time.sleep(2)  # the launcher has seen it, and asked the other one to stop
    os.kill(first, signal.SIGCONT)
    assert exit_code(started) == 1
    assert "in 2 processes failed: " in said.read_text() and "please report it" not in said.read_text()


def test_three_processes_go_on_with_the_same_bits(models: Callable[[str], Path], rows: Path, tmp_path: Path) -> None:
    recipes = []
    for name, steps in (("whole", 6), ("halves", 3), ("halves", 6)):
        sets = [*BASE, f"data.train={rows}", "train.schedule=constant", "train.warmup=0", f"train.steps={steps}"]
        recipes.append(load(None, {}, [f"model.name={models('llama')}", *sets, f"output={tmp_path / name}"]).recipe)
    train_together(recipes, 3, tmp_path)
    assert same(*(adapter(load(str(tmp_path / name), {}).recipe) for name in ("whole", "halves")))


def _fields(stat: Path) -> list[str]:
    """State, parent, ... of a process."""
    return stat.read_text().rpartition(")")[2].split()


def _lives(process: int) -> bool:
    try:
        state = _fields(Path(f"/proc/{process}/stat"))[0]
    except OSError:
        return False
    return state != "Z"


def _workers(parent: int) -> list[int]:
    """The processes two levels below one: those that train."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = _fields(stat)
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    return [worker for launcher in children.get(parent, []) for worker in children.get(launcher, [])]


def test_usage_errors_are_plain(models: Callable[[str], Path], pissa: Callable[..., Any], tmp_path: Path) -> None:
    words = ["--processes", "2", "--set", "data.train=none.jsonl", "--output", tmp_path / "out"]
    outcome = pissa("train", "--model", models("llama"), *words)
    assert outcome.code == 2 and "none.jsonl: no such data file" in outcome.err


def test_there_are_no_more_processes_than_examples_in_a_step(recipe: Any) -> None:
    with pytest.raises(UsageError, match=r"--processes 3: a step has 2 examples \(train.batch_size\)"):
        launch.launch(recipe(Path("x"), "train.batch_size=2"), False, 3, [], None, print)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch, recipe: Any) -> Callable[..., dict[str, Any]]:
    """Launch two processes that `ended` so, of which one `told` that; how they would have been started."""

    def run(
        ended: tuple[int, bool] = (0, False), told: Any = None, resume: bool = False, gpus: int = 0
    ) -> dict[str, Any]:
        seen: dict[str, Any] = {}

        def ready(_recipe: Any, resume: bool, init_progress: Any) -> None:
            seen.update(resume=resume, init_progress=init_progress)

        def start(command: list[str], **options: Any) -> None:
            seen.update(options, words=command[3:], recipe=load(command[command.index("train") + 1], {}).recipe)
            if told is not None:
                Path(options["env"][LAUNCHED]).write_text(json.dumps(told))

        def late(*path: Any, **options: Any) -> None:
            """A folder goes away, and a process that the launcher did not wait for tells how it ended."""
            _tell_launcher(Path(seen["env"][LAUNCHED]), Interrupted("interrupted", None))
            remove(*path, **options)

        remove = os.rmdir
        with monkeypatch.context() as patch:
            patch.setattr(os, "rmdir", late)
            patch.setattr(launch, "prepare", ready)
            patch.setattr(launch.gc, "collect", lambda: None)  # which takes its time after many tests
            patch.setattr(launch, "_wait", lambda _: ended)
            patch.setattr(subprocess, "Popen", start)
            patch.setattr(torch.cuda, "device_count", lambda: gpus)
            patch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
            launch.launch(recipe(Path("x"), "train.lr=3e-3"), resume, 2, ["--json"], 7, print)
        return seen

    return run


@pytest.mark.parametrize(
    ("ended", "told", "error", "says"),
    [
        ((130, False), None, Interrupted, "go on with: "),  # one of them was asked to stop
        ((143, True), None, Interrupted, "go on with: "),
        ((1, True), {"error": "interrupted", "exit_code": 130}, Interrupted, "go on with: "),
        ((1, True), {"error": "no space", "exit_code": 1, "hint": "free some"}, PissaError, "failed: no space free"),
        ((1, False), {"error": "no space", "exit_code": 1, "hint": None}, PissaError, "no space go on with: "),
        ((1, False), {"error": "no row", "exit_code": 2, "hint": None}, UsageError, "failed: no row go on with: "),
        ((2, False), {"error": "stopped", "exit_code": 130}, PissaError, "one ended with exit code 2 go on"),
        ((137, False), None, PissaError, "one ended with exit code 137 go on"),
        ((-9, False), None, PissaError, "one ended with exit code -9 go on"),
    ],
)
def test_how_processes_end_is_how_the_command_ends(
    ended: tuple[int, bool], told: Any, error: type[PissaError], says: str, launched: Callable[..., Any]
) -> None:
    with pytest.raises(error) as raised:
        launched(ended, told)
    assert raised.type is error and says in f"{raised.value} {raised.value.hint}"


def test_what_processes_are_given(
    launched: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the threads, time for a checkpoint, and the package that runs, be it a checkout; what is set stays."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 9)
    names = ("OMP_NUM_THREADS", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "ACCELERATE_USE_CPU", "PYTHONSAFEPATH")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    seen = launched()
    assert [seen["env"].get(name) for name in names] == ["4", "600", "true", "1"]
    words = " ".join(seen["words"])
    log, _, others = words.removeprefix("--standalone --local-addr=127.0.0.1 --log-dir=").partition(" ")
    assert not Path(log).exists(), "it is gone with the recipe"
    assert others.startswith(f"--nproc-per-node=2 -m pissa_cli train {log}/") and others.endswith(".yaml --json")
    assert seen["stdout"] == 7 and seen["start_new_session"] and seen["recipe"].lr == 3e-3
    assert (seen["resume"], seen["init_progress"]) == (False, print)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert launched()["env"]["OMP_NUM_THREADS"] == "1", "and not none"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "60")
    monkeypatch.chdir(PACKAGE.parent)
    seen = launched((0, True), resume=True)  # asked to stop in its last step
    assert [seen["env"].get(name) for name in names] == ["3", "60", "true", None]
    assert seen["words"][-2:] == ["--resume", "--json"] and seen["resume"]
    with locked(Run(tmp_path / "out").checkpoints), pytest.raises(UsageError, match="is writing here"):
        launched()
    with pytest.raises(UsageError, match="--processes 2: this machine has 1 GPUs"):
        launched(gpus=1)
    for name in names:
        monkeypatch.delenv(name, raising=False)
    seen = launched(gpus=2)
    assert [seen["env"].get(name) for name in names] == [None, "600", None, None]


@pytest.mark.parametrize("config", ["fsdp2", "zero2", "zero3"])
def test_what_accelerate_launches_goes_on_in_one_process_and_back(
    models: Callable[[str], Path], rows: Path, tmp_path: Path, config: str
) -> None:
    if config != "fsdp2":
        pytest.importorskip("deepspeed")
    sets = [f"model.name={models('llama')}", *BASE, f"data.train={rows}", "train.schedule=constant"]

    def recipe(name: str, steps: int) -> Any:
        return load(None, {}, [*sets, f"train.steps={steps}", f"output={tmp_path / name}"]).recipe

    train(recipe("whole", 6))
    asked = ASKED[config.rstrip("23")] | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": config[-1]}
    train_together([recipe("first", 2)], 2, tmp_path, asked)
    train(recipe("first", 4), resume=True)
    train_together([recipe("first", 6)], 2, tmp_path, asked)
    train(recipe("last", 2))
    file = tmp_path / "recipe.yaml"
    file.write_text(dump(recipe("last", 6)))
    configuration = shipped("configs") / "accelerate" / f"{config}.yaml"
    accelerate = str(Path(sys.executable).with_name("accelerate"))
    words = ["launch", "--config_file", str(configuration), "--num_processes", "2", "-m", "pissa_cli", "train"]
    done = subprocess.run(
        [accelerate, *words, str(file), "--resume", "--json"], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "in 2 processes that share the model" in done.stderr
    said = done.stdout[done.stdout.index("{") :]  # Accelerate itself may warn that DeepSpeed found no GPU
    assert json.loads(said)["steps"] == 6
    for name in ("first", "last"):
        for key, wanted in adapter(recipe("whole", 6)).items():
            assert float((adapter(recipe(name, 6))[key] - wanted).norm() / wanted.norm()) < CLOSE, key


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"},
            "ZeRO stage 1 is not supported",
        ),
        (
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"},
            "offload_param_device = cpu is not supported",
        ),
        *(
            ({"ACCELERATE_USE_DEEPSPEED": "true", f"ACCELERATE_{name}": value}, f" = {value} is not supported")
            for name, value in (
                ("DEEPSPEED_CONFIG_FILE", "own.json"),
                ("DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "nvme"),
                ("GRADIENT_ACCUMULATION_STEPS", "4"),
                ("GRADIENT_CLIPPING", "0.5"),
            )
        ),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_ACTIVATION_CHECKPOINTING": "true"},
            "FSDP's activation checkpointing .* is not supported",
        ),
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP version 1 is not supported"),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"},
            "offloading parameters to the CPU is not supported",
        ),
    ],
)
def test_what_accelerate_asks_for_in_vain_is_refused(
    environment: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=message):
        asked_by_accelerate()


@pytest.mark.parametrize(
    ("environment", "layout"),
    [
        ({}, None),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_GRADIENT_CLIPPING": "none"}, "zero-2"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, "zero-2"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "zero-3"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "false"}, "fsdp2"),
    ],
)
def test_what_accelerate_asks_for_is_done_here(
    environment: dict[str, str], layout: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By it nothing is spread once more."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert asked_by_accelerate() == layout and asked_by_accelerate() is None
