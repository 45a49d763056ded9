"""Going on after a stop as if there had been none."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import PACKAGE
from forks import await_that, entry, exit_code, forked
from runs import BASE, adapter, events, same, state_of

from pissa_cli.errors import Interrupted, PissaError, UsageError
from pissa_cli.files import write_json
from pissa_cli.initialize import initialize
from pissa_cli.merge import merge
from pissa_cli.run.reached import goes_on, require_step, resume_hint, sections_of, start_of
from pissa_cli.run.rundir import Run
from pissa_cli.schema.data_options import DataSection
from pissa_cli.schema.recipe import TrainSection
from pissa_cli.schema.recipe_file import dump
from pissa_cli.train import train
from pissa_cli.training.guards import schedule_change
from pissa_cli.training.prepare import check_inputs

Make = Callable[..., Any]


@pytest.mark.parametrize("optimizer", ["adamw", "paged-adamw-8bit"])
def test_ten_and_ten_resumed_are_twenty(
    optimizer: str, models: Callable[[str], Path], recipe: Make, rows: Path, tmp_path: Path
) -> None:
    sets = (*BASE, f"data.train={rows}", "train.schedule=constant", "train.warmup=0", f"train.optimizer={optimizer}")
    whole = recipe(models("llama"), *sets, "train.steps=20", f"output={tmp_path / 'whole'}")
    train(whole)
    train(recipe(models("llama"), *sets, "train.steps=10"))
    halves = recipe(models("llama"), *sets, "train.steps=20")
    frozen = state_of(Run(Path(halves.output)).init) | {
        "m": state_of(Path(halves.output))[str(Path(halves.output) / "manifest.json")]
    }
    notes: list[Any] = []
    train(halves, resume=True, watch=notes.append)
    assert same(adapter(whole), adapter(halves))
    assert not any("begun" in event.get("note", "") for event in notes)
    assert [e["loss"] for e in events(whole)] == [e["loss"] for e in events(halves)]
    after = state_of(Run(Path(halves.output)).init) | {
        "m": state_of(Path(halves.output))[str(Path(halves.output) / "manifest.json")]
    }
    assert frozen == after


def test_resume_says_where_there_is_no_checkpoint(models: Callable[[str], Path], recipe: Make, rows: Path) -> None:
    made, notes = recipe(models("llama"), *BASE, f"data.train={rows}", "train.steps=1"), []
    initialize(made)
    train(made, resume=True, watch=notes.append)
    assert any("begins with the first step" in event.get("note", "") for event in notes)
    assert not any("train.warmup" in event.get("note", "") for event in notes)


def test_a_warm_up_longer_than_the_training_is_named(models: Callable[[str], Path], recipe: Make, rows: Path) -> None:
    notes: list[Any] = []
    train(recipe(models("llama"), *BASE, f"data.train={rows}", "train.steps=1", "train.warmup=3"), watch=notes.append)
    said = "train.warmup: of 3 steps, and training has 1: the rate never reaches train.lr"
    assert said in [event.get("note") for event in notes]


def test_what_was_made_before_more_steps_is_named(models: Callable[[str], Path], recipe: Make, rows: Path) -> None:
    notes: list[Any] = []
    sets = (*BASE, f"data.train={rows}", "train.batch_size=100")
    made = recipe(models("llama"), *sets, "train.steps=1")
    train(made, watch=notes.append)
    Run(Path(made.output)).merged.mkdir()
    (Path(made.output) / "eval").mkdir()
    train(made, resume=True, watch=notes.append)
    assert not any("before these steps" in event.get("note", "") for event in notes)
    train(recipe(models("llama"), *sets, "train.steps=2"), resume=True, watch=notes.append)
    said = [event["note"] for event in notes if "note" in event]
    assert "merged, eval: of before these steps; make them again" in said
    assert "train.batch_size: a step of 100 has each example more than once" in said


@pytest.mark.parametrize(
    ("replaced", "call"),
    [
        ("m.restart_with_lean_heap", "m.main"),
        ("m.cli.app", "m.cli.run"),
        ("m.cli.app = pissa_cli.cli.edge._show", "m.main"),
    ],
)
def test_an_interrupt_at_any_time_is_said_and_ends_with_its_code(replaced: str, call: str, tmp_path: Path) -> None:
    """While modules are imported, in a command, and twice there: without a traceback; and `python -m`, where it met
    text that a library executes, does not end by SIGINT."""
    code = "import sys, pissa_cli.__main__ as m, pissa_cli.cli; m.cli = pissa_cli.cli\n"
    code += "def interrupted(*_, **__):\n    exec('raise KeyboardInterrupt')\n"
    code += f"{replaced} = interrupted; sys.argv = ['pissa', 'train']; {call}()"
    (tmp_path / "stopped.py").write_text(code)
    command = [sys.executable, "-m", "stopped"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "error: interrupted\n")


@pytest.fixture
def terminal() -> Iterator[None]:
    """The tests may themselves run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_and_resume_finishes_bit_for_bit(
    number: int, models: Callable[[str], Path], recipe: Make, rows: Path, tmp_path: Path
) -> None:
    """With dropout in the base (GPT-2), so that the random state matters, too."""
    sets = (*BASE, f"data.train={rows}", "train.steps=9")
    whole = recipe(models("gpt2"), *sets, f"output={tmp_path / 'whole'}")
    train(whole)
    stopped = recipe(models("gpt2"), *sets)

    def stop(event: dict[str, Any]) -> None:
        if event.get("step") == 4:
            os.kill(os.getpid(), number)

    with pytest.raises(Interrupted):
        train(stopped, watch=stop)
    assert [p.name for p in Run(Path(stopped.output)).checkpoints.iterdir()] == ["step-4"]
    with pytest.raises(UsageError, match="step-4"):
        train(stopped)
    with pytest.raises(UsageError, match="no trained adapter yet") as early:
        merge(stopped)
    assert "--checkpoint 4" in str(early.value.hint)
    train(stopped, resume=True)
    assert same(adapter(whole), adapter(stopped))


def test_nohup_outlives_the_terminal(models: Callable[[str], Path], recipe: Make, rows: Path) -> None:
    made = recipe(models("llama"), *BASE, f"data.train={rows}", "train.steps=2")
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert train(made, watch=lambda _: os.kill(os.getpid(), signal.SIGHUP))["steps"] == 2
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("closed", ["2>&-", "2> >(exit)", "0<&- 1>&- 2>&-"])
def test_nobody_has_to_watch(
    closed: str, models: Callable[[str], Path], recipe: Make, rows: Path, tmp_path: Path
) -> None:
    made = recipe(models("llama"), *BASE, f"data.train={rows}", "train.steps=3", f"output={tmp_path / 'out'}")
    (tmp_path / "recipe.yaml").write_text(dump(made))
    words = [sys.executable, "-m", "pissa_cli", "train", str(tmp_path / "recipe.yaml"), "--json"]
    done = subprocess.run(["bash", "-c", f"{shlex.join(words)} {closed}"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and (tmp_path / "out" / "adapter").is_dir()
    assert "1>&-" in closed or json.loads(done.stdout)["steps"] == 3


def test_a_file_gets_lines_and_no_bar(models: Callable[[str], Path], recipe: Make, rows: Path, tmp_path: Path) -> None:
    """Whatever the environment says of it; and a name with two dollar signs is no formula of the picture's."""
    made = recipe(models("llama"), *BASE, f"data.train={rows}", "train.steps=3", f"output={tmp_path / 'a$1_$2'}")
    (tmp_path / "recipe.yaml").write_text(dump(made))
    words = [sys.executable, "-m", "pissa_cli", "train", str(tmp_path / "recipe.yaml")]
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"FORCE_COLOR": "1"})
    assert done.returncode == 0, done.stderr
    assert "step 3/3" in re.sub(r"\x1b\[[\d;]*m", "", done.stderr) and "\x1b[2K" not in done.stderr


def test_a_run_that_is_moved_while_it_trains_is_not_trained_to_its_end(
    models: Callable[[str], Path], recipe: Make, rows: Path, tmp_path: Path
) -> None:
    """It could not write a result there; with the checkpoint that was saved, nothing is lost."""
    sets = (*BASE, f"data.train={rows}", "train.steps=8", "train.save_every=2")
    whole = recipe(models("llama"), *sets, f"output={tmp_path / 'whole'}")
    train(whole)
    made, moved = recipe(models("llama"), *sets), tmp_path / "moved"

    def move(event: dict[str, Any]) -> None:
        if event.get("step") == 3:
            Path(made.output).rename(moved)

    with pytest.raises(PissaError, match=r"out: moved or removed while it trained; .*/step-4 is saved"):
        train(made, watch=move)
    (Run(Path(made.output)).checkpoints / "step-4").rename(Run(moved).checkpoints / "step-4")
    there = recipe(models("llama"), *sets, f"output={moved}")
    assert train(there, resume=True)["steps_taken"] == 4
    assert same(adapter(there), adapter(whole)) and len(events(there)) == 8


@pytest.mark.parametrize("seed", [1, 2])
def test_kill_9_at_a_random_step_then_resume_is_bit_equal(
    seed: int, models: Callable[[str], Path], recipe: Make, rows: Path, tmp_path: Path
) -> None:
    sets = (*BASE, f"data.train={rows}", "train.steps=20", "train.save_every=3")
    whole = recipe(models("llama"), *sets, f"output={tmp_path / 'whole'}")
    train(whole)
    killed = recipe(models("llama"), *sets)
    run = Run(Path(killed.output))
    (tmp_path / "recipe.yaml").write_text(dump(killed))
    last_step = random.Random(seed).randint(5, 15)
    process = forked(entry("train", tmp_path / "recipe.yaml"), tmp_path / "said")
    await_that(lambda: run.metrics.is_file() and run.metrics.read_text().count("\n") >= last_step)
    os.kill(process, signal.SIGKILL)
    assert exit_code(process) == -signal.SIGKILL
    frozen = state_of(run.init), run.manifest.read_bytes()
    train(killed, resume=True)
    assert same(adapter(whole), adapter(killed))
    assert (state_of(run.init), run.manifest.read_bytes()) == frozen
    assert [e["loss"] for e in events(whole)] == [e["loss"] for e in events(killed)]
    assert not list(run.folder.rglob(".*tmp*"))


def test_changed_data_and_fewer_steps_are_refused_on_resume(
    models: Callable[[str], Path], recipe: Make, rows: Path
) -> None:
    sets = (*BASE, f"data.train={rows}")
    train(recipe(models("llama"), *sets, "train.steps=4"))
    for fewer in ("train.steps=2", "train.epochs=0.01"):
        with pytest.raises(UsageError, match="less than the run has taken"):
            train(recipe(models("llama"), *sets, fewer), resume=True)
        with pytest.raises(UsageError, match="less than the run has taken"):
            check_inputs(recipe(models("llama"), *sets, fewer), resume=True)
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[::-1]))
    longer = recipe(models("llama"), *sets, "train.steps=6")
    before = Run(Path(longer.output)).recipe.read_text()
    with pytest.raises(UsageError, match="other tokens"):
        train(longer, resume=True)
    assert Run(Path(longer.output)).recipe.read_text() == before


@pytest.mark.parametrize("bits", [16, 4])
def test_an_adapter_names_its_base_where_it_is_now(
    bits: int,
    models: Callable[[str], Path],
    recipe: Make,
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sets = (*BASE[1:], f"model.bits={bits}", f"data.train={rows}")
    base = tmp_path / "base"
    shutil.copytree(models("llama"), base)
    made = recipe(base, *sets, "train.steps=1")
    train(made)
    moved = tmp_path / "moved"
    Path(made.output).rename(moved)
    base = base.rename(tmp_path / "new")
    monkeypatch.chdir(tmp_path)
    train(recipe(base, *sets, "train.steps=2", "output=moved"), resume=True)
    named = json.loads((moved / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(moved / "base" if bits == 4 else base)


def test_a_checkpoint_of_an_older_pissa_goes_by_the_recipe(
    models: Callable[[str], Path], recipe: Make, rows: Path
) -> None:
    sets = (*BASE, f"data.train={rows}")
    made = recipe(models("llama"), *sets, "train.steps=1")
    train(made)
    state = Run(Path(made.output)).checkpoints / "step-1" / "state.json"
    content = json.loads(state.read_text())
    for old in ({}, {"sections": None, "missed": None}):
        state.write_text(json.dumps({"step": 1, "data": content["data"], "hashes": content["hashes"]} | old))
        with pytest.raises(UsageError, match=r"weight_decay was 0\.0 so far and is 0\.5 now"):
            train(recipe(models("llama"), *sets, "train.steps=2", "train.weight_decay=0.5"), resume=True)
    notes: list[Any] = []
    train(recipe(models("llama"), *sets, "train.steps=2"), resume=True, watch=notes.append)
    assert any("begun for 1 steps" in str(note) for note in notes)


def test_an_adapter_older_than_its_run_is_refused(models: Callable[[str], Path], recipe: Make, rows: Path) -> None:
    from pissa_cli.outputs.trained import read_adapter

    made = recipe(models("llama"), *BASE, f"data.train={rows}", "train.steps=2")
    train(made)
    longer = recipe(models("llama"), *BASE, f"data.train={rows}", "train.steps=8")
    notes = []

    def stop(event: dict[str, Any]) -> None:
        notes.append(event.get("note", ""))
        if event.get("step") == 4:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        train(longer, resume=True, watch=stop)
    assert "the run was begun for 2 steps and goes on for 8 steps: the cosine schedule is stretched to fit" in notes
    notes = []
    with pytest.raises(UsageError, match="1 steps are less than the run has taken"):
        train(recipe(models("llama"), *BASE, f"data.train={rows}", "train.steps=1"), resume=True, watch=stop)
    assert not any("stretched" in note for note in notes)
    for warmup, said in ((0.5, True), (0, False), (3, False)):
        even = recipe(models("llama"), *BASE, "train.schedule=constant", f"train.warmup={warmup}", "train.steps=9")
        assert (schedule_change(even) is not None) == said
    with pytest.raises(UsageError, match="holds step 2, but the run has gone on to step-4"):
        read_adapter(longer)


@pytest.fixture
def begun(recipe: Make, tmp_path: Path) -> Callable[..., Any]:
    """A recipe, and a made-up run in its folder that has reached step 10 by it; its step 9 was by another."""

    def make(*sets: str) -> Any:
        made = recipe(Path("user/name"), *sets)
        run = Run(Path(made.output))
        for step, sections in (("10", sections_of(made)), ("9", {"data": {"limit": 1}, "train": {"lr": 1}})):
            (run.checkpoints / f"step-{step}").mkdir(parents=True)
            write_json(run.checkpoints / f"step-{step}" / "state.json", {"sections": sections})
        write_json(run.manifest, {"start": start_of(made), "base": {"name": "user/name", "revision": None}})
        run.recipe.write_text(dump(made))
        return made

    return make


def test_what_may_change_when_a_run_goes_on_is_what_the_page_says(begun: Callable[..., Any], recipe: Make) -> None:
    page = (PACKAGE.parent / "docs" / "recipes.md").read_text().partition("What may change:")[2].partition("\n- ")[0]
    start = ("model.bits=4", "adapter.modules_to_save=[lm_head]", "train.lr=1e-4")
    sets = (*start, "train.steps=20")
    assert goes_on(begun(*sets), resume=True)
    others = {
        "data": {"train": "b.jsonl", "eval": "5%", "format": "prompt", "columns": {"input": "x"}, "max_length": 99}
        | {"template": "{instruction}{output}", "limit": 9, "packing": True},
        "train": {"lr": 1e-5, "head_lr": 1e-5, "steps": 21, "batch_size": 9, "micro_batch_size": 3, "keep": 5}
        | {"schedule": "linear", "warmup": 0.5, "weight_decay": 0.5, "max_grad_norm": 9, "precision": "fp32"}
        | {"optimizer": "paged-adamw-8bit", "gradient_checkpointing": True, "eval_every": 5, "save_every": 5}
        | {"spike": 5, "on_fault": "skip", "torch_compile": True, "use_liger_kernel": False, "shard": True},
    }
    for name, section in (("data", DataSection), ("train", TrainSection)):
        assert set(section.model_fields) - {"epochs"} == set(others[name])
        for key, other in others[name].items():
            changed = recipe(Path("user/name"), *sets, f"{name}.{key}={json.dumps(other)}")
            if key == "steps" or f"{name}.{key}" == "data.train" or f"`{key}`" in page or f"`{name}.{key}`" in page:
                assert goes_on(changed, resume=True)
            else:
                with pytest.raises(UsageError, match=f"{name}.{key} was .* so far and is .* now"):
                    goes_on(changed, resume=True)
    assert goes_on(recipe(Path("user/name"), *start, "train.epochs=2"), resume=True)


def test_what_a_recipe_leaves_to_a_default_has_not_changed(begun: Callable[..., Any], recipe: Make) -> None:
    start = ("model.bits=32", "adapter.modules_to_save=[lm_head]")
    rate = begun(*start).lr
    said = (f"train.lr={rate}", f"train.head_lr={rate}", "train.precision=fp32")
    made = recipe(Path("user/name"), *start, *said)
    assert goes_on(made, resume=True)
    state = Run(Path(made.output)).checkpoints / "step-10" / "state.json"
    content = json.loads(state.read_text())
    del content["sections"]["train"]["head_lr"]  # as of an older pissa, which had no such key
    write_json(state, content)
    assert goes_on(recipe(Path("user/name"), *start, "train.head_lr=9"), resume=True)


def test_a_run_of_another_start_is_not_asked_for_its_steps(begun: Callable[..., Any], recipe: Make) -> None:
    """`open_run` says then what is another, or missing."""
    made = begun("adapter.rank=4")
    with pytest.raises(UsageError, match="this run has reached step-10") as reached:
        require_step(made, resume=False)
    assert reached.value.hint is not None and " --resume (at its end" in reached.value.hint
    assert resume_hint("a run") == "go on with: pissa train 'a run' --resume"
    moved = recipe(Path("moved/name"), "adapter.rank=4", "model.revision=main")
    assert start_of(moved) == start_of(made), "a base is told by its weights"
    for other in ("adapter.rank=5", "seed=1", "model.bits=32", "model.revision=main", "model.name=user/other"):
        require_step(recipe(Path("user/name"), "adapter.rank=4", other), resume=False)
    whole = Run(Path(made.output)).read_manifest()
    for manifest in ({}, whole | {"start": [1]}, whole | {"base": "user/name"}):
        write_json(Run(Path(made.output)).manifest, manifest)
        require_step(made, resume=False)
    Run(Path(made.output)).manifest.unlink()
    require_step(made, resume=False)
