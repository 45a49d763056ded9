"""Steps that go wrong, damaged checkpoints, and two processes in one folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import break_training
import pytest
from runs import BASE, adapter, events, same

from pissa_cli import train as module
from pissa_cli.errors import PissaError, UsageError
from pissa_cli.files import locked, read_json, require_writable, set_aside, whole_folder, write_text
from pissa_cli.initialize import initialize
from pissa_cli.outputs.trained import read_checkpoint
from pissa_cli.run.rundir import Run, clear_leftovers, require_free
from pissa_cli.run.started import open_run
from pissa_cli.train import train
from pissa_cli.training.faults import IN_A_ROW, Faults

Make = Callable[..., Any]
STEADY = (*BASE, "train.schedule=constant", "train.warmup=0", "train.steps=12", "train.save_every=5")


def break_steps(monkeypatch: pytest.MonkeyPatch, wrong: dict[int, float]) -> None:
    """Make steps (from 1) report another loss."""
    original = module.form_gradients

    def broken(trainer: Any, step: int) -> tuple[float, float, int]:
        loss, norm, tokens = original(trainer, step)
        return wrong.get(step + 1, loss), norm, tokens

    monkeypatch.setattr(module, "form_gradients", broken)


def without_updates(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    original, count = module.update, iter(range(1, 100))
    monkeypatch.setattr(module, "update", lambda *args: None if next(count) in steps else original(*args))


@pytest.mark.usefixtures("rendered")
@pytest.mark.parametrize(("policy", "lost"), [("skip", {7}), ("rollback", {6, 7})])
def test_a_fault_is_left_out_or_taken_back(
    policy: str, lost: set[int], models: Callable[[str], Path], recipe: Make, rows: Path, tmp_path: Path
) -> None:
    """As if the steps that are lost had formed no update; those after it are as they would have been."""
    sets = (*STEADY, f"data.train={rows}")
    wanted = recipe(models("llama"), *sets, f"output={tmp_path / 'wanted'}")
    with pytest.MonkeyPatch.context() as patch:
        without_updates(patch, lost)
        train(wanted)
    found = recipe(models("llama"), *sets, f"train.on_fault={policy}")
    notes: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        break_steps(patch, {7: math.nan})
        train(found, watch=notes.append)
    assert same(adapter(wanted), adapter(found))
    seventh = events(found)[6]
    assert seventh["loss"] is None and seventh["fault"].startswith("loss nan")
    assert any("step 7: loss nan" in event.get("note", "") for event in notes)
    assert [e["step"] for e in events(found)] == list(range(1, 13))
    json.dumps(events(found), allow_nan=False)


def test_the_command_line_says_what_was_left_out(
    models: Callable[[str], Path],
    rows: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    pissa: Callable[..., Any],
) -> None:
    break_steps(monkeypatch, {1: math.nan})
    words = [word for one in (*STEADY, f"data.train={rows}", "train.on_fault=skip") for word in ("--set", one)]
    outcome = pissa("train", "--model", models("llama"), *words, "--output", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    assert "step 1: loss nan" in outcome.err and "step 1/12: left out, lr" in outcome.err and " left\n" in outcome.err


def test_faults_stop_a_run_by_default_and_when_there_is_no_way_back(
    models: Callable[[str], Path], recipe: Make, rows: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    break_steps(monkeypatch, {3: math.inf})
    for number, policy in enumerate(("stop", "rollback")):
        made = recipe(
            models("llama"),
            *STEADY,
            f"data.train={rows}",
            f"train.on_fault={policy}",
            f"output={tmp_path / str(number)}",
        )
        with pytest.raises(PissaError, match=r"step 3: training has diverged \(loss inf.*no checkpoint was saved yet"):
            train(made)


def test_what_counts_as_a_fault(models: Callable[[str], Path], recipe: Make) -> None:
    made = recipe(models("llama"), "train.spike=3", "train.on_fault=skip")
    with pytest.raises(PissaError, match="step 1: the gradient is zero"):
        Faults(made, []).judge(1, 2.0, 0.0, 0)
    faults = Faults(made, [(1.0, 0.5)] * 9)
    assert faults.judge(10, 100.0, 0.5, 0) is None  # too few to say what is usual
    assert faults.judge(11, 2.9, 1.4, 0) is None
    assert faults.judge(12, 3.1, 0.5, 0) == "loss 3.1 is 3.1 times the usual 1"
    assert faults.judge(13, 1.0, 1.6, 0) == "gradient norm 1.6 is 3.2 times the usual 0.5"
    assert faults.judge(14, 1.0, 0.5, 0) is None
    for step in range(1, IN_A_ROW):
        assert faults.judge(step, math.nan, 0.5, 0)
    with pytest.raises(PissaError, match="10 times in a row"):
        faults.judge(10, math.nan, 0.5, 0)
    known = Faults(made, [(1.0, 0.5)] * 10)
    assert known.judge(11, 3.1, 0.5, 0) and known.judge(12, 1.0, math.inf, 0) == "loss 1.0, gradient norm inf"
    assert known.judge(13, 3.0, 1.5, 0) is None and known.judge(14, 1.0, 0.0, 0) is None
    newest = Faults(made, [(1.0, 0.5)] * 40 + [(100.0, 0.5)] * 25)  # of which the last 50 count
    assert newest.judge(66, 160.0, 0.5, 0) == "loss 160 is 3.17 times the usual 50.5"
    assert Faults(recipe(models("llama"), "train.spike=null"), [(1.0, 0.5)] * 10).judge(11, 99.0, 9.0, 0) is None


def damage_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    "harm",
    [
        lambda folder: damage_byte(folder / "trained.safetensors"),
        lambda folder: damage_byte(folder / "optimizer.safetensors"),
        lambda folder: (folder / "optimizer.safetensors").unlink(),
        lambda folder: (folder / "state.json").write_text("{"),
        lambda folder: (folder / "state.json").write_text('{"hashes": []}'),
    ],
)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_taken(
    harm: Callable[[Path], Any], models: Callable[[str], Path], recipe: Make, rows: Path, tmp_path: Path
) -> None:
    sets = (*STEADY, f"data.train={rows}")
    whole = recipe(models("llama"), *sets, f"output={tmp_path / 'whole'}")
    train(whole)
    made = recipe(models("llama"), *sets)
    train(made)
    run, notes = Run(Path(made.output)), []
    assert sorted(p.name for p in run.checkpoints.iterdir()) == ["step-10", "step-12"]
    harm(run.checkpoints / "step-12")
    with pytest.raises(UsageError, match="step-12: damaged"):
        read_checkpoint(made, 12)
    train(made, resume=True, watch=notes.append)
    assert any("step-12 is damaged" in e.get("note", "") and "damaged-step-12" in e["note"] for e in notes)
    assert sorted(p.name for p in run.checkpoints.iterdir()) == ["damaged-step-12", "step-10", "step-12"]
    assert same(adapter(whole), adapter(made))
    assert [e["step"] for e in events(made)] == list(range(1, 13))


def test_with_no_whole_checkpoint_left_it_begins_again(models: Callable[[str], Path], recipe: Make, rows: Path) -> None:
    made = recipe(models("llama"), *STEADY, f"data.train={rows}")
    train(made)
    before, run = adapter(made), Run(Path(made.output))
    for folder in run.checkpoints.iterdir():
        damage_byte(folder / "trained.safetensors")
    run.metrics.write_bytes(b"\xff\x00 no json\n" + run.metrics.read_bytes())
    train(made, resume=True)
    assert same(before, adapter(made)) and len(events(made)) == 12


HOLD = """
import sys, time
from pathlib import Path
from pissa_cli.initialize import initialize
from pissa_cli.run.started import open_run
from pissa_cli.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_kept_out_and_a_killed_one_holds_nothing(
    models: Callable[[str], Path], recipe: Make, rows: Path, tmp_path: Path
) -> None:
    made = recipe(models("llama"), *STEADY, f"data.train={rows}")
    run = Run(Path(made.output))
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(run.checkpoints)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    try:
        with pytest.raises(UsageError, match=f"process {holder.pid} on .* is writing here"), locked(run.checkpoints):
            pass
    finally:
        holder.kill()
        holder.wait()
    assert (run.folder / ".checkpoints.lock").exists()
    with locked(run.checkpoints):
        pass
    assert not (run.folder / ".checkpoints.lock").exists()
    run.folder.rmdir()
    with whole_folder(run.folder), pytest.raises(UsageError, match="is writing here"):
        train(made)
    train(made)
    with locked(run.checkpoints), pytest.raises(UsageError, match="is writing here"):
        train(made, resume=True)
    assert [p.name for p in run.folder.rglob(".*")] == []


@pytest.mark.parametrize(("name", "kind"), [("metrics.jsonl", "file"), ("merged", "folder")])
def test_a_link_to_itself_is_named(
    name: str, kind: str, models: Callable[[str], Path], recipe: Make, rows: Path
) -> None:
    made = recipe(models("llama"), *STEADY, f"data.train={rows}")
    initialize(made)
    (Path(made.output) / name).symlink_to(name)
    with pytest.raises(UsageError, match=f"{name}: not a {kind}"):
        train(made)


@pytest.mark.parametrize("place", ["link", "dangling", "mount", "here", "foreign", "a*"])
def test_folders_that_are_there_are_filled(
    place: str, models: Callable[[str], Path], recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Links, mounts (no folder can be renamed to those), the working directory, and those in a folder of others."""
    output, real = tmp_path / place, tmp_path / "real"
    other = tmp_path / ".abc.tmp-01234567"  # of another run
    other.mkdir()
    if place in ("link", "dangling"):
        output.symlink_to(real)
    if place != "dangling":
        (real if place == "link" else output).mkdir()
        (output / ".tmp-89abcdef").mkdir()  # of an init that was killed
    rename = Path.rename

    def move(path: Path, target: Path) -> Path:
        if target.resolve() == output and place in ("mount", "here"):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", move)
    if place == "here":
        monkeypatch.chdir(output)
    if place == "foreign":
        monkeypatch.setattr(os, "access", lambda path, _mode: path != tmp_path)
    made = recipe(models("llama"), "adapter.rank=2", f"output={'.' if place == 'here' else output}")
    initialize(made)
    assert open_run(made)[0].exists() and output.is_symlink() == (place in ("link", "dangling"))
    assert sorted(path.name for path in output.iterdir()) == ["init", "manifest.json", "recipe.yaml"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == [other.name]


def test_a_folder_has_its_name_when_all_of_it_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """New, in place of another, and within one that is empty, where what it is known by comes last."""
    final, synced, moved = tmp_path / "final", list[int](), list[Path]()
    rename, sync = Path.rename, os.fsync

    def move(path: Path, target: Path) -> Path:
        inside = [path, *path.rglob("*"), *([path.parent] if path.parent != tmp_path else [])]
        assert ".aside" in target.name or {one.stat().st_ino for one in inside} <= set(synced)
        moved.append(target)
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino) or sync(descriptor))
    monkeypatch.setattr(Path, "rename", move)
    for names in (["old"], ["config.json", "init/x", "manifest.json", "z"], ["manifest.json", "z"]):
        with whole_folder(final) as folder:
            (folder / "init").mkdir()
            for name in names:
                (folder / name).write_text(name)
        assert {path.name for path in final.iterdir()} == {"init", *(name for name in names if "/" not in name)}
        assert [path.name for path in tmp_path.iterdir()] == ["final"]
        if len(names) > 2:
            shutil.rmtree(final)
            final.mkdir()
            moved.clear()
    assert sorted(path.name for path in moved[:-1]) == ["init", "z"] and moved[-1].name == "manifest.json"
    monkeypatch.undo()
    final.rename(tmp_path / ".final.aside")  # as a process that is killed in between leaves it
    with pytest.raises(KeyboardInterrupt), whole_folder(final):
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["final"] and (final / "manifest.json").is_file()
    shutil.copytree(final, tmp_path / ".final.aside")  # and one that is killed right after
    with whole_folder(final) as folder:
        (folder / "new").touch()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["final", "new"]


def test_a_result_is_written_over_itself_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By whatever path it is named; another folder with something in it, or a file, stays."""
    monkeypatch.chdir(tmp_path)
    for name in ("merged", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").touch()
    (tmp_path / "file").touch()
    for free in ("merged", "new"):
        require_free(Path(free), tmp_path / "merged")
    for taken in ("other", "file"):
        with pytest.raises(UsageError, match=f"{taken}: exists already"):
            require_free(Path(taken), tmp_path / "merged")
    with pytest.raises(PissaError, match="file: cannot write"), whole_folder(tmp_path / "file"):
        pass
    assert (tmp_path / "file").is_file()


def test_a_lock_is_where_all_processes_look_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a folder that is not there yet, nor the one above it. Who has it may be unknown."""
    final = tmp_path / "new" / "run"
    with locked(final):
        assert (tmp_path / "new" / ".run.lock").write_text("") == 0 and not final.exists()
        with pytest.raises(UsageError, match="run: another process is writing here"), locked(final):
            pass

        def secret(_path: Path, encoding: str) -> str:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

        monkeypatch.setattr(Path, "read_text", secret)
        with pytest.raises(UsageError, match="run: another process is writing here"), locked(final):
            pass


def test_a_folder_that_may_not_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, _mode: path != tmp_path)
    with pytest.raises(PissaError, match="some/run: cannot write: Permission denied"):
        require_writable(tmp_path / "some" / "run")
    (tmp_path / "some").mkdir()
    require_writable(tmp_path / "some" / "run")


def test_a_file_is_as_before_where_it_cannot_be_written_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "x", "before \ud83d")  # half of a character

    def full(_path: Path, _target: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(PissaError, match="x: "):
        write_text(tmp_path / "x", "after")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("x", r"before \ud83d")]


def test_a_small_file_has_its_name_when_it_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without, a file system may have it empty after a power failure: a run without a recipe."""
    synced, replace = list[tuple[int, int]](), Path.replace

    def move(path: Path, target: Path) -> Path:
        assert (path.stat().st_ino, len("recipe")) in synced
        return replace(path, target)

    def sync(descriptor: int) -> None:
        synced.append((os.fstat(descriptor).st_ino, os.fstat(descriptor).st_size))

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "replace", move)
    write_text(tmp_path / "x", "recipe")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("x", "recipe")]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="a folder where no file can be made, by anyone")
def test_a_folder_where_no_file_can_be_made_is_no_other_process_at_work() -> None:
    with pytest.raises(PissaError, match="/proc/nothing: cannot write"), locked(Path("/proc/nothing")):
        pass


def test_a_run_that_cannot_be_written_is_told_before_rows_are_read(
    models: Callable[[str], Path], recipe: Make, rows: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    notes: list[Any] = []
    made = recipe(models("llama"), f"output={tmp_path / 'file' / 'run'}", f"data.train={rows}")
    with pytest.raises(PissaError, match="file: cannot write: Not a directory"):
        train(made, watch=notes.append)
    assert not notes


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EIO])
def test_a_file_system_without_locks_keeps_nobody_out(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(_descriptor: int, _operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    final = tmp_path / "final"
    fails = pytest.raises(PissaError, match="final: cannot write: Input/output error")
    with fails if number == errno.EIO else contextlib.nullcontext(), locked(final), whole_folder(final) as folder:
        (folder / "manifest.json").touch()
    assert (final / "manifest.json").is_file() == (number != errno.EIO)


def test_a_folder_that_cannot_be_made_or_named_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was there before stays."""
    (tmp_path / "file").touch()
    with pytest.raises(PissaError, match="x: cannot write: File exists"), whole_folder(tmp_path / "file" / "x"):
        pass
    final = tmp_path / "final"
    with whole_folder(final) as folder:
        (folder / "old").touch()
    for name, does in (("mkdir", Path.mkdir), ("rename", Path.rename)):

        def busy(path: Path, *words: Any, does: Any = does, **more: Any) -> None:
            if path != tmp_path:
                raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
            does(path, *words, **more)

        with monkeypatch.context() as patch, pytest.raises(PissaError, match="final: cannot write: Device or resource"):
            patch.setattr(Path, name, busy)
            with whole_folder(final):
                pass
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "final", "old"]


@pytest.mark.parametrize(
    ("content", "said"), [(b"[1]", "expected a JSON object"), (b"{", "damaged"), (b'"\xff"', "da")]
)
def test_json_that_is_not_what_was_written_is_named(content: bytes, said: str, tmp_path: Path) -> None:
    file = tmp_path / "manifest.json"
    with pytest.raises(UsageError, match=f"{file}: missing or damaged"):
        read_json(file)
    file.write_bytes(content)
    with pytest.raises(UsageError, match=f"{file}: .*{said}"):
        read_json(file)


def test_what_a_killed_process_left_is_cleared_and_held_locks_stay(
    models: Callable[[str], Path], recipe: Make, rows: Path
) -> None:
    made = recipe(models("llama"), *BASE, "train.steps=1", f"data.train={rows}")
    run = Run(Path(made.output))
    train(made)
    left = [run.folder.with_name(f".{run.folder.name}.lock"), run.folder / ".adapter.lock", run.folder / ".merged.lock"]
    half = [run.checkpoints / ".step-2.tmp-01234567" / "x", run.base / ".generation_config.json.0123.tmp"]
    half += [run.folder / f".{name}.0123.tmp" for name in ("recipe.yaml", "metrics.jsonl", "loss.png")]
    for path in (*left, *half):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    with locked(run.merged):
        train(made, resume=True)
        assert [path for path in left if path.exists()] == left[2:]
    assert not left[2].exists() and not list(run.folder.rglob(".*"))


def test_what_is_damaged_is_kept_in_place_of_an_older_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("older", "newer"):
        (tmp_path / "step-2").mkdir()
        (tmp_path / "step-2" / name).touch()
        assert set_aside(tmp_path / "step-2") == tmp_path / "damaged-step-2"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["damaged-step-2", "newer"]

    def fixed(_path: Path, _target: Path) -> Path:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "rename", fixed)
    with pytest.raises(PissaError, match="damaged-step-3: cannot write: Read-only"):
        set_aside(tmp_path / "step-3")


def test_what_is_left_in_the_working_directory_is_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose lock lies beside it. What cannot be removed stops nobody."""
    folder = tmp_path / "run"
    folder.mkdir()
    written = ("adapter", "merged", "quantized", "int4", "exported")
    locks = [tmp_path / ".run.lock", *(folder / f".{name}.lock" for name in written)]
    for left in (*locks, folder / ".recipe.yaml.0123.tmp"):
        left.touch()
    monkeypatch.chdir(folder)

    def stuck(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(errno.EACCES, f"{path} {missing_ok}")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", stuck)
        clear_leftovers(Run(Path()))
    assert (folder / ".recipe.yaml.0123.tmp").exists()
    clear_leftovers(Run(Path()))
    assert [path.name for path in tmp_path.rglob("*")] == ["run"]


@pytest.mark.usefixtures("rendered")
@pytest.mark.parametrize(
    ("way", "lines"),
    [
        (lambda root: break_training.kills(root, 10, 7), "10 kills"),
        (lambda root: break_training.points(root, 23), "killed before change"),
        (lambda root: break_training.disk(root, 23), "disk full"),
    ],
)
def test_trainings_that_are_broken_off_end_with_the_same_bits(
    way: Callable[[Path], Iterator[str]], lines: str, tmp_path: Path
) -> None:
    """A few of those that the script tries; their number depends on the numbers of files, ten kills on nothing."""
    assert lines in list(way(tmp_path))[-1]
