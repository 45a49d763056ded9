"""Bad input: exit 2, one clear message, nothing written. And a disk that fails: exit 1, what was saved is intact."""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import itertools
import json
import math
import os
import resource
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import Outcome, make_model, save_model
from forks import entry, exit_code, forked
from runs import state_of
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BartConfig,
    LlamaForCausalLM,
    ReformerConfig,
    T5Config,
    ViTConfig,
    XmodConfig,
    XmodForCausalLM,
)

from pissa_cli.base.weights import load_tensors
from pissa_cli.cli import edge
from pissa_cli.data import columns
from pissa_cli.data.rows import read_rows
from pissa_cli.errors import LAUNCHED, UsageError
from pissa_cli.initialize import initialize
from pissa_cli.run.rundir import Run, require_free
from pissa_cli.schema import recipe_file
from pissa_cli.train import train

Pissa = Callable[..., Outcome]


MAPPED = "data.columns={instruction: question, output: answer}"


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*")}


@pytest.fixture
def refused(pissa: Pissa, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Run a command that must be refused; returns its message, on one line."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: Any) -> str:
        before = tree(tmp_path)
        outcome = pissa(*arguments)
        assert outcome.code == 2, outcome
        assert tree(tmp_path) == before
        assert outcome.out == "" and "Traceback" not in outcome.err and outcome.err.count("error:") == 1
        return " ".join(outcome.err.split())

    return run


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize("launched", [False, True])
def test_one_of_several_processes_says_a_failure_as_json(
    launched: bool, pissa: Pissa, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    words = ("train", "--model", "./none", "--set", "data.train=x.jsonl", "--json")
    alone = pissa(*words)
    assert alone.code == 2 and alone.json["exit_code"] == 2
    monkeypatch.setenv("RANK", "1")
    assert pissa(*words).json == alone.json  # it is no launcher's, where there is no WORLD_SIZE
    file = tmp_path / "failure.json"
    monkeypatch.setenv(*(LAUNCHED, str(file)) if launched else ("WORLD_SIZE", "2"))
    silent = pissa(*words)
    assert silent.code == 2 and silent.out == "" and silent.err == alone.err
    assert not launched or json.loads(file.read_text())["error"] == alone.json["error"]


@pytest.mark.parametrize("lines", range(40))
def test_a_failure_is_told_whole_or_not_at_all(lines: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The launcher stops the other processes of one that failed, while they tell of their own failures, too."""
    count = itertools.count()

    def trace(_frame: Any, event: str, _argument: Any) -> Any:
        if event == "line" and next(count) == lines:
            sys.settrace(None)
            raise KeyboardInterrupt
        return trace

    def fail() -> None:
        raise RuntimeError

    monkeypatch.setenv(LAUNCHED, str(tmp_path / "failure.json"))
    before = sys.gettrace()
    sys.settrace(lambda frame, *_: trace if frame.f_code.co_filename == edge.__file__ else None)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            edge.run_guarded(fail, ["train"])
    finally:
        sys.settrace(before)
    left = [path.read_text() for path in tmp_path.glob("failure.json")]
    assert len(left) == 1 or next(count) > lines
    assert all("error" in json.loads(text) for text in left)


def test_another_process_is_gone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def lose() -> None:
        raise RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:8848")

    for processes, said in (("1", "unexpected RuntimeError"), ("2", "another process is gone")):
        monkeypatch.setenv("WORLD_SIZE", processes)  # by torchrun or Accelerate, be it not of `--processes`
        assert edge.run_guarded(lose, ["train"]) == 1
        assert said in capsys.readouterr().err


def test_packages_that_are_not_installed(
    pissa: Pissa, models: Callable[[str], Path], rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = importlib.metadata.version

    def version(package: str) -> str:
        if package in ("bitsandbytes", "datasets"):
            raise importlib.metadata.PackageNotFoundError(package)
        return there(package)

    monkeypatch.setattr(importlib.metadata, "version", version)
    for package in ("bitsandbytes", "datasets"):
        monkeypatch.setitem(sys.modules, package, None)
    sets = [f"data.train={rows}", "adapter.rank=4", "train.steps=1", "train.batch_size=4"]
    words = ["--model", models("llama"), *(word for one in sets for word in ("--set", one))]
    words += ["--output", tmp_path / "out"]
    assert pissa("train", *words, "--set", "model.bits=16").code == 0  # needs neither
    assert "bitsandbytes" not in Run(tmp_path / "out").read_manifest()["versions"]
    assert pissa("merge", tmp_path / "out").code == 0
    for needs, command in (
        ("bitsandbytes", ("quantize", tmp_path / "out")),
        ("bitsandbytes", ("init", *words[:-1], tmp_path / "4", "--set", "model.bits=4")),
        ("datasets", ("train", *words[:-1], tmp_path / "hub", "--set", "data.train=some/rows")),
    ):
        outcome = pissa(*command)
        assert outcome.code == 2 and f"error: the package {needs} is not installed" in outcome.err
        assert f"next:  pip install {needs}" in outcome.err

    def load(*_: Any, **__: Any) -> None:
        raise ImportError("4 bits need bitsandbytes: `pip install bitsandbytes`")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    asked = pissa("eval", tmp_path / "out", "--bench", "loss", "--set", f"data.eval={rows}")
    assert asked.code == 2 and "4 bits need bitsandbytes" in asked.err and "next:  install what it" in asked.err


def test_unknown_key(refused: Callable[..., str], tmp_path: Path) -> None:
    file = write(tmp_path / "r.yaml", "model: {name: x}\ntrain:\n  learning_rat: 3e-4\n  batchsize: 3\n")
    message = refused("train", file)
    assert f"{file}:4: train.batchsize: unknown key; did you mean 'train.batch_size'?" in message
    assert f"{file}:3: train.learning_rat: unknown key" in message
    assert "belongs under 'adapter'" in refused(
        "train", write(tmp_path / "s.yaml", "model: {name: x}\ntrain: {rank: 3}\n")
    )
    assert "method lora has no such option" in refused("init", "--model", "x", "--method", "lora", "--svd", "exact")


def test_duplicate_key(refused: Callable[..., str], tmp_path: Path) -> None:
    file = write(tmp_path / "r.yaml", "model: {name: x}\ntrain:\n  lr: 1\n  lr: 2\n")
    assert f"{file}:4: duplicate key 'train.lr', first given in line 3" in refused("train", file)


def test_wrong_types_and_combinations(refused: Callable[..., str], tmp_path: Path) -> None:
    for sets, wanted in [
        (["train.lr=fast"], "train.lr: input should be a valid number (found 'fast')"),
        (["train.lr='1e-4'"], "should be a valid number (found '1e-4'; without the quotes it is a number)"),
        (["model.bits='4'"], "should be 4, 16 or 32 (found '4'; without the quotes it is a number)"),
        (["adapter.rank=2.5"], "adapter.rank"),
        (["model.bits=8"], "model.bits: input should be 4, 16 or 32 (found 8)"),
        (["adapter.method=pisa"], "adapter.method: unknown method"),
        (["adapter.dropout=0.1"], "pissa needs dropout 0"),
        (["adapter.passes=5"], "set model.bits to 4"),
        (["train.epochs=1", "train.steps=1"], "--set train.epochs: train: epochs: give epochs or steps, not both"),
        (["train.steps=0"], "train.steps"),
        (["model.bits=4", "adapter.method=full"], "full needs model.bits 32"),
        (["train.lr=.inf"], "train.lr"),
        (["train.schedule='3'"], "(found '3')"),
        (["data.format=sharegpt"], "(found 'sharegpt'); here it is chat"),
        (["data.columns={imput: x}"], "format alpaca has no field 'imput'"),
        (["data.columns={instruction: output}"], "'output' is instruction and output; each field has its own column"),
        (["data.columns={instruction: a, output: b, input: a}"], "columns: 'a' is instruction and input"),
        (["data.format=chat", "data.columns={messages: prompt, completion: prompt}"], "is messages and completion"),
        (["train.precision=fp32"], "set model.bits to 32"),
        (["train=3"], "train"),
        (["nothing"], "expected key=value"),
        (["adapter.targets=[]"], "name at least one layer"),
        (["hub.repo=a b"], "--set hub.repo: hub.repo: repo id must use alphanumeric chars"),
        (["hub.repo=a/b/c"], "must be in the form 'repo_name' or 'namespace/repo_name'"),
    ]:
        message = refused("init", "--model", "x", *(part for text in sets for part in ("--set", text)))
        assert wanted in message


def test_rank(refused: Callable[..., str], pissa: Pissa, models: Callable[[str], Path]) -> None:
    assert "adapter.rank" in refused("init", "--model", models("llama"), "--rank", 0)
    message = refused("init", "--model", models("llama"), "--rank", 33)
    assert "33 is above the smallest dimension of model.layers.0.self_attn.k_proj (32 x 64)" in message
    assert "use at most 32" in message and "adapter.rank_pattern: {k_proj: 32, v_proj: 32}" in message
    own = ("--rank", 33, "--set", "adapter.rank_pattern={k_proj: 32, v_proj: 32}")
    assert pissa("init", "--model", models("llama"), *own, "--dry-run").code == 0
    message = refused("init", "--model", models("llama"), "--rank", 4, "--set", "adapter.rank_pattern={k_proj: 40}")
    assert "adapter.rank_pattern: 40" in message and "use at most 32" in message


def test_targets(refused: Callable[..., str], models: Callable[[str], Path]) -> None:
    message = refused("init", "--model", models("llama"), "--set", "adapter.targets=[q_proj, c_attn]")
    assert "'c_attn' matches no linear layer" in message
    assert "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in message


def test_a_tilde_that_no_shell_has_written_out(
    refused: Callable[..., str], models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # as shells leave it in `--output=~/out` and `--set output=~/out`, and yaml in a recipe: the folder `~` here
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "recipe.yaml", "model: {name: ~/base}")
    base, out = str(models("llama")), f"write it out: {Path.home()}/"
    for command in (
        ("init", "--model", base, "--output=~/out"),
        ("init", "--model", base, "--set", "output=~/out"),
        ("init", "--model", base, "--set", "output='~'"),
        ("init", "--model=~/base"),
        ("init", "recipe.yaml"),
        ("train", "--model", base, "--set", "data.train=[~/a.jsonl, ~/b.jsonl]"),
        ("eval", "--data", "gsm8k=~/rows.jsonl", "--set", f"model.name={base}"),
        ("eval", "~/run"),
        ("quantize", base, "--output=~/out"),
    ):
        message = refused(*command)
        assert "~ stands for a folder in a shell alone" in message and out.rstrip("/") in message
    with pytest.raises(UsageError, match="~ stands for"):  # of export, whose output is no key of the recipe
        require_free(Path("~/out"), tmp_path / "exported")
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]
    (tmp_path / "~").mkdir()  # but a file may be called so
    write(tmp_path / "~" / "a.jsonl", "")
    assert "no usable row" in refused("train", "--model", base, "--set", "data.train=./~/a.jsonl")


def test_files_that_are_not_there(refused: Callable[..., str], models: Callable[[str], Path], tmp_path: Path) -> None:
    assert "no such recipe or run folder" in refused("train", "nothing.yaml")
    assert "did you mean 'gsm8k'" in refused("train", "gsm8")
    (tmp_path / "first").mkdir()
    write(tmp_path / "first" / "recipe.yaml", "{}")
    for near in ("frist", "frist/"):
        assert f"did you mean '{tmp_path}/first'" in refused("eval", f"{tmp_path}/{near}")
    assert "no such folder" in refused("init", "--model", "./nothing")
    message = refused("train", "--model", models("llama"), "--set", "data.train=nothing.jsonl")
    assert "nothing.jsonl: no such data file" in message
    for name in ("a", "b", "c", "d"):
        write(tmp_path / f"{name}.jsonl", "{}")
    listed = f"take a list: [{tmp_path}/a.jsonl, {tmp_path}/b.jsonl"
    for names, advice in (
        (f"{tmp_path}/*.jsonl", f"{listed}, {tmp_path}/c.jsonl, ...]"),
        (f"{tmp_path}/a.jsonl,{tmp_path}/b.jsonl", f"{listed}]"),
        (f"{tmp_path}/a.jsonl {tmp_path}/b.jsonl", f"{listed}]"),
        (f"{tmp_path}/a b.jsonl", "check the path"),
        (f"{tmp_path}/*.x", "check the path"),
        (f"{tmp_path}/a.jsonl:train", f"name the whole file, {tmp_path}/a.jsonl; data.limit takes"),
        (f"{tmp_path}/a.jsonl[:100]", f"name the whole file, {tmp_path}/a.jsonl; data.limit takes"),
        ("user/name[:100]", "id:subset:split; data.limit takes the first of its examples"),
        ("user/name,", "check the path"),
        ("https://host/rows.jsonl", "download it, and name the file"),
        ("https://host/datasets/user/name", "download it, and name the file"),
        ("~nobody-here/rows.jsonl", "check the path"),
    ):
        assert advice in refused("train", "--model", models("llama"), "--set", f"data.train={names}")
    train = ("train", "--model", models("llama"), "--set")
    assert f"{tmp_path}/a.jsonl:train: no such" in refused(*train, f"data.train={tmp_path}/a.jsonl:train")
    write(tmp_path / "rows.ndjson", "{}")
    for suffix, advice in (
        ("txt", "set data.format to text"),
        ("xlsx", "as csv"),
        ("gz", "unpack"),
        ("bin", "use one of"),
    ):
        write(tmp_path / f"rows.{suffix}", "{}")
        message = refused("train", "--model", models("llama"), "--set", f"data.train={tmp_path}/rows.{suffix}")
        assert "unknown kind of data file" in message and advice in message
    message = refused("train", "--model", models("llama"), "--set", f"data.train={tmp_path}/rows.ndjson")
    assert "rename it to rows.jsonl, which is the same" in message
    assert "data.train: no training data given" in refused("train", "--model", models("llama"))
    assert "not a run folder" in refused("merge", tmp_path)
    assert "no model given" in refused("init")


def test_what_is_no_run_or_no_model_is_called_what_it_is(
    refused: Callable[..., str], models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("run/recipe.yaml", "run/manifest.json", "run/adapter/x", "run/checkpoints/step-3/x"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / name, "")
    (tmp_path / "run" / "merged").mkdir()
    assert "(eval and export take --checkpoint N); to train it on: --model run/merged --output NEW" in refused(
        "train", "run/merged"
    )
    for folder in ("run/adapter", "run/checkpoints/step-3"):
        assert f"name that, {tmp_path}/run (eval and export take --checkpoint N)" in refused("merge", folder)
        assert "a run, not a model next: pissa merge" in refused("init", "--model", folder)
    with contextlib.chdir(tmp_path / "run" / "adapter"):
        assert f"name that, {tmp_path}/run (eval" in refused("merge", ".")
    write(tmp_path / "run" / "adapter" / "adapter_config.json", "{}")
    for file in ("run/manifest.json", "run/adapter/adapter_config.json"):
        assert f"{file}: a file of a run, no recipe next: name the run: {tmp_path}/run" in refused("merge", file)
    write(tmp_path / "rows.jsonl", "{}\n{}\n")
    said = "rows.jsonl: rows of data, no recipe next: they go with one: --set data.train=rows.jsonl"
    assert said in refused("train", "rows.jsonl")
    assert "it is a model: init and train take it by --model" in refused("eval", models("llama"))
    assert "model.safetensors: a file, not a model folder" in refused(
        "init", "--model", models("llama") / "model.safetensors"
    )
    (tmp_path / "other").mkdir()
    write(tmp_path / "other" / "adapter_config.json", "{}")
    assert "it is an adapter: name the run that it comes from" in refused("merge", "other")
    assert "other: an adapter, not a model next: merge it into its base" in refused("train", "--model", "other")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "there is the alias mistral-7b" in refused("init", "--model", "mistral-8b")


def test_a_pointer_of_git_lfs(refused: Callable[..., str], models: Callable[[str], Path], tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    base = tmp_path / "base"
    shutil.copytree(models("llama"), base)
    write(base / "model.safetensors", pointer)
    assert "model.safetensors: a pointer of Git LFS, not the weights next: fetch" in refused("init", "--model", base)
    for name in ("rows.jsonl", "rows.parquet"):
        words = ("train", "--model", models("llama"), "--set", f"data.train={write(tmp_path / name, pointer)}")
        assert f"{name}: a pointer of Git LFS, not the rows" in refused(*words)


@pytest.mark.skipif(sys.platform != "linux", reason="the file is one of Linux's /proc")
def test_a_shard_that_fails(refused: Callable[..., str], models: Callable[[str], Path], tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(models("llama"), base)
    (base / "model.safetensors").unlink()
    (base / "model.safetensors").symlink_to("/proc/self/mem")  # a file whose first byte is an input/output error
    assert "model.safetensors: truncated or damaged safetensors file" in refused("init", "--model", base)


def test_what_is_wrong_with_the_adapter_costs_no_tokenization(
    refused: Callable[..., str], models: Callable[[str], Path], rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pissa_cli.training.prepare.load_sets", lambda *_: pytest.fail("tokenized"))
    words = ["train", "--model", models("llama"), "--set", f"data.train={rows}"]
    assert "adapter.rank" in refused(*words, "--rank", "4096")
    assert "adapter.targets" in refused(*words, "--set", "adapter.targets=[q_prj]")


def test_data(refused: Callable[..., str], models: Callable[[str], Path], tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", '{"question": "a", "answer": "b"}\n')
    message = refused("train", "--model", models("llama"), "--set", f"data.train={file}")
    assert "no column 'instruction'" in message and "it has: question, answer" in message
    assert "--set 'data.columns={instruction: question, output: answer}'" in message
    other = write(tmp_path / "other.jsonl", '{"task": "a", "solution": "b", "reply": "c"}\n')
    message = refused("train", "--model", models("llama"), "--set", f"data.train={other}")
    assert "--set 'data.columns={instruction: <column>, output: solution}'" in message
    half = ["--set", "data.columns={output: reply}"]
    message = refused("train", "--model", models("llama"), "--set", f"data.train={other}", *half)
    assert "--set 'data.columns={output: reply, instruction: <column>}'" in message
    taken = write(tmp_path / "taken.jsonl", '{"question": "a", "problem": "b", "answer": "c"}\n')
    message = refused(
        "train", "--model", models("llama"), "--set", f"data.train={taken}", "--set", "data.columns={input: question}"
    )
    assert "--set 'data.columns={input: question, instruction: problem, output: answer}'" in message
    mapped = ["--set", "data.columns={instruction: query, output: answer}"]
    message = refused("train", "--model", models("llama"), "--set", f"data.train={file}", *mapped)
    assert "no column 'query'" in message and "data.columns maps 'instruction' to it; map 'instruction'" in message
    empty = write(tmp_path / "empty.jsonl", "")
    assert "no usable row (it is empty)" in refused("train", "--model", models("llama"), "--set", f"data.train={empty}")
    blank = write(tmp_path / "blank.jsonl", "{}\n{}\n")
    assert "(its rows are empty)" in refused("train", "--model", models("llama"), "--set", f"data.train={blank}")
    long = write(tmp_path / "long.jsonl", json.dumps({"instruction": "1" * 300, "output": "b"}) + "\n")
    message = refused("train", "--model", models("llama"), "--set", f"data.train={long}")
    assert "tokens, the model sees 256" in message and "set data.max_length to 256" in message
    odd = write(tmp_path / "rows.txt", "")
    assert "unknown kind of data file" in refused("train", "--model", models("llama"), "--set", f"data.train={odd}")


def test_what_a_dry_run_finds(refused: Callable[..., str], models: Callable[[str], Path], tmp_path: Path) -> None:
    def dry(*sets: str) -> str:
        return refused(
            "train", "--model", models("llama"), "--dry-run", *(word for one in sets for word in ("--set", one))
        )

    file = write(tmp_path / "rows.jsonl", '{"question": "a", "answer": "b"}\n')
    assert "no.jsonl: no such data file" in dry("data.train=no.jsonl")
    assert "no.csv: no such data file" in dry(f"data.train={file}", MAPPED, "data.eval=no.csv")
    assert "no column 'instruction'" in dry(f"data.train={file}")
    chats = write(tmp_path / "chats.jsonl", json.dumps({"messages": [{"role": "user", "content": "a"}]}))
    assert "this tokenizer has no chat template" in dry(f"data.train={chats}", "data.format=chat")
    if not torch.cuda.is_available():
        assert "Liger's kernels need a GPU" in dry(f"data.train={file}", MAPPED, "train.use_liger_kernel=true")
    for bench, message in (
        ("gsm8k", "row 1 is no row of gsm8k: 'answer' is not text"),
        ("humaneval", "it has no prompt, test, entry_point"),
        ("loss", "no column 'instruction'"),
    ):
        words = ("--set", f"model.name={models('llama')}", "--dry-run", "--bench", bench)
        numbers = write(tmp_path / "numbers.jsonl", '{"question": "a", "answer": [1]}\n')
        assert message in refused("eval", *words, "--data", f"{bench}={numbers}")
        assert "no.jsonl: no such data file" in refused("eval", *words, "--data", f"{bench}=no.jsonl")
    assert "--repo and --force are about an upload" in refused(
        "merge", "--set", f"model.name={models('llama')}", "--repo", "a/b", "--dry-run"
    )


def test_truncated_shard(refused: Callable[..., str], tmp_path: Path) -> None:
    folder = save_model(make_model("llama"), tmp_path / "model", max_shard_size="100KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    content = shards[1].read_bytes()
    for damaged in (content[:-100], content[:6], b""):
        shards[1].write_bytes(damaged)
        assert f"{shards[1]}: truncated or damaged" in refused("init", "--model", folder)
    shards[1].unlink()
    assert "shard of the index is missing" in refused("init", "--model", folder)


@pytest.mark.parametrize(
    ("dtype", "value", "found"),
    [
        (torch.bfloat16, math.nan, "NaN or infinite values"),
        (torch.float16, -math.inf, "NaN or infinite values"),
        (torch.float32, -1e16, "values up to 1.0e+16"),
    ],
)
def test_spoiled_numbers(
    dtype: torch.dtype, value: float, found: str, refused: Callable[..., str], tmp_path: Path
) -> None:
    model = make_model("llama").to(dtype)
    for name in ("model.layers.1.mlp.up_proj.weight", "model.norm.weight"):  # one that is split, one that is not
        tensor = model.get_parameter(name).data
        kept, tensor.view(-1)[-3] = tensor.view(-1)[-3].clone(), value
        folder = save_model(model, tmp_path / "model")
        message = refused("init", "--model", folder, "--rank", 4)
        assert f"{name} holds {found}" in message and "download it again" in message
        tensor.view(-1)[-3] = kept


def test_bases_that_cannot_be_split(
    refused: Callable[..., str],
    models: Callable[[str], Path],
    pissa: Pissa,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(LlamaForCausalLM, "supports_gradient_checkpointing", False)  # as of JetMoe
        words = ("--model", models("llama"), "--rank", 4, "--set", "train.gradient_checkpointing=true")
        assert "transformers has none for LlamaForCausalLM" in refused("init", *words)
    assert pissa("quantize", models("llama"), "--output", tmp_path / "nf4").code == 0
    for method in ("pissa", "lora"):
        assert "quantized already" in refused("init", "--model", tmp_path / "nf4", "--method", method, "--rank", 4)
    shutil.copytree(models("llama"), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "intermediate_size": 96}))
    message = refused("init", "--model", tmp_path / "model", "--rank", 4)
    assert "is (128, 64), config.json makes it (96, 64)" in message


def test_adapter_on_the_wrong_base(
    refused: Callable[..., str],
    pissa: Pissa,
    models: Callable[[str], Path],
    recipe: Callable[..., Any],
    rows: Path,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(models("llama"), folder)
    made = recipe(folder, "adapter.rank=4", f"data.train={rows}", "train.steps=1", "train.batch_size=2")
    train(made)
    second = shutil.copytree(made.output, tmp_path / "second")
    for command in ("merge", "eval"):
        said = f"{made.output} is the run, --output names another, {second} next: leave --output out"
        assert said in refused(command, made.output, "--output", second)
    for command in ("merge", "eval", "quantize", "export"):
        for target in (made.output, f"{made.output}/recipe.yaml"):
            said = f"{target} is the run, --set output names another, {second} next: leave --set output out"
            assert said in refused(command, target, "--set", f"output={second}")
    save_model(make_model("llama", seed=1), folder)
    for command in (["eval", "--bench", "loss", "--data", rows], ["merge"], ["quantize"], ["train", "--resume"]):
        message = refused(command[0], made.output, *command[1:])
        assert "not the model this run was made on" in message and str(folder) in message
    other = save_model(make_model("llama", seed=2), tmp_path / "other")
    message = refused("merge", made.output, "--set", f"model.name={other}")
    assert "not the model this run was made on" in message
    assert "adapter.rank = 4, the recipe says 5" in refused("merge", made.output, "--set", "adapter.rank=5")
    folder.rename(tmp_path / "moved")
    for folder in (made.output, f"{made.output}/init"):
        assert f"a run, not a model next: pissa merge {made.output}" in refused("init", "--model", folder)
    assert "no such folder" in refused("merge", made.output)
    save_model(make_model("llama"), tmp_path / "moved")
    assert pissa("merge", made.output, "--set", f"model.name={tmp_path / 'moved'}").code == 0


@pytest.mark.parametrize("sets", [(), ("adapter.method=full", "model.bits=32")])
def test_a_copy_without_the_manifest_is_not_taken_for_the_run_that_it_came_from(
    sets: tuple[str, ...],
    refused: Callable[..., str],
    models: Callable[[str], Path],
    recipe: Callable[..., Any],
    rows: Path,
    tmp_path: Path,
) -> None:
    made = recipe(models("llama"), *sets, f"data.train={rows}", "train.steps=1", "train.batch_size=2")
    train(made)
    copy = shutil.copytree(made.output, tmp_path / "copy", ignore=shutil.ignore_patterns("manifest.json"))
    before = state_of(Path(made.output))
    for command in ("merge", "export", "quantize", "eval", "train", "init"):
        for target in (copy, copy / "recipe.yaml"):
            assert f"{copy}: a run without its manifest.json next: copy that there" in refused(command, target)
    assert state_of(Path(made.output)) == before
    alone = shutil.copy(copy / "recipe.yaml", tmp_path / "recipe.yaml")
    assert recipe_file.load(str(alone), {}).recipe.output == made.output


def test_run_folder_of_another_recipe(
    refused: Callable[..., str],
    models: Callable[[str], Path],
    pissa: Pissa,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert pissa("init", "--model", models("llama"), "--rank", 4, "--output", tmp_path / "out").code == 0
    message = refused("init", "--model", models("llama"), "--rank", 8, "--output", tmp_path / "out")
    made = "this run was made with adapter.rank = 4, the recipe says 8 next: set it as it was; for a new run name"
    assert made in message and "to begin from the weights of this one: pissa merge" in message
    message = refused("init", "--model", models("gpt2"), "--rank", 4, "--output", tmp_path / "out")
    assert "not the model this run was made on" in message
    assert "out: the run there, which --output names" in pissa("train", "--output", tmp_path / "out", "--dry-run").err
    monkeypatch.chdir(tmp_path)
    assert "out: the run there, as none was named" in pissa("train", "--dry-run").err
    taken = "by the recipe there: adapter.method pissa, adapter.rank 4; for a new run name another --output"
    again = ("--output", tmp_path / "out", "--dry-run", "--set", "train.lr=1e-3")
    assert taken in pissa("init", "--model", models("llama"), *again).err
    assert "by the recipe there" not in pissa("init", *again).err
    given = ("--model", models("llama"), "--method", "pissa", "--rank", 4)
    assert "by the recipe there" not in pissa("init", *given, *again).err
    message = pissa("train", "--method", "vera", "--output", tmp_path / "out").err
    assert "method vera has no such option" in message and "holds a run, whose recipe was taken" in message
    for model in ((), ("--model", models("llama"))):
        message = refused("train", *model, "--set", "adapter.r=8", "--output", tmp_path / "out")
        assert "here it is adapter.rank" in message and "holds a run" not in message
    (tmp_path / "mine").mkdir()
    write(tmp_path / "mine" / "notes.txt", "x")
    assert "exists and is not a run folder" in refused(
        "init", "--model", models("llama"), "--output", tmp_path / "mine"
    )


def test_resume_with_another_recipe(
    refused: Callable[..., str], models: Callable[[str], Path], recipe: Callable[..., Any], rows: Path
) -> None:
    made = recipe(models("llama"), "adapter.rank=4", f"data.train={rows}", "train.steps=1", "train.batch_size=2")
    train(made)
    assert "train.batch_size was 2 so far and is 3 now" in refused(
        "train", made.output, "--resume", "--set", "train.batch_size=3"
    )
    assert f"go on with: pissa train {made.output} --resume" in refused("train", made.output)
    assert "train.lr was 2e-05 so far and is 0.1 now" in refused(
        "train", made.output, "--resume", "--set", "train.lr=1e-1"
    )
    assert "train.batch_size was 2" in refused(
        "train", made.output, "--resume", "--dry-run", "--set", "train.batch_size=3"
    )
    run = Run(Path(made.output))
    run.recipe.write_text(run.recipe.read_text().replace("batch_size: 2", "batch_size: 3"))
    assert "train.batch_size was 2 so far and is 3 now" in refused("train", made.output, "--resume")
    later = run.checkpoints / "step-2"
    shutil.copytree(run.checkpoints / "step-1", later)
    (later / "state.json").write_text("{")
    assert "train.batch_size was 2 so far and is 3 now" in refused("train", made.output, "--resume")


def test_unreachable_hub(
    refused: Callable[..., str], models: Callable[[str], Path], recipe: Callable[..., Any]
) -> None:
    message = refused("init", "--model", "mistral-7b", "--rank", 128, "--svd", "fast")
    assert "mistralai/Mistral-7B-v0.1: cannot get this model from the Hub" in message
    assert "give a local folder" in message
    message = refused("train", "--model", models("llama"), "--set", "data.train=some/data")
    assert "some/data: cannot get this data set from the Hub" in message and "local" in message
    made = recipe(models("llama"), "adapter.rank=4")
    initialize(made)
    message = refused("eval", made.output, "--bench", "gsm8k", "--compare-base")
    assert "openai/gsm8k: cannot get this data set" in message and "local file: --data gsm8k=FILE" in message


def test_benchmarks(refused: Callable[..., str]) -> None:
    message = refused("eval", "demo/pissa", "--bench", "nothing")
    assert "--bench: eval.bench: unknown benchmark 'nothing' next: a task" in message
    assert "known: gsm8k, math, humaneval, mbpp" in message
    for typed in ("mmlu", "MMLU", "lm_eval/mmlu", "lm-eval:mmlu"):
        assert "harness is lm_eval:mmlu; known" in refused("eval", "gsm8k", "--bench", typed)
    near = [("gsm9k", "gsm8k"), ("GSM8K", "gsm8k"), ("MT-Bench", "mt_bench"), ("lm_eval", "lm_eval:<task>")]
    for typed, meant in (*near, ("cola", "glue/cola"), ("glue/colla", "glue/cola"), ("qnl", "glue/qnli")):
        assert f"unknown benchmark '{typed}' next: did you mean '{meant}'?" in refused(
            "eval", "gsm8k", "--bench", typed
        )
    message = refused("eval", "gsm8k", "--data", "glue/col=rows.tsv")
    assert "--data: eval.data: unknown benchmark 'glue/col' next: did you mean 'glue/cola'?" in message
    assert "glue/mrpc scores texts with labels" in refused("eval", "gsm8k", "--bench", "gsm8k,glue/mrpc")
    for command in ("init", "train"):  # not after hours of training
        message = refused(command, "gsm8k", "--set", "eval.bench=[gsm8kk]")
        assert "--set eval.bench: eval.bench: unknown benchmark 'gsm8kk' next: did you mean 'gsm8k'?" in message
        message = refused(command, "gsm8k", "--dry-run", "--set", "eval.data={gsm9k: rows.jsonl}")
        assert "eval.data: unknown benchmark 'gsm9k' next: did you mean 'gsm8k'?" in message
        assert "glue/mrpc scores texts with labels" in refused(command, "gsm8k", "--set", "eval.bench=[glue/mrpc]")
    message = refused("eval", "--set", "model.name=demo", "--compare-base", "--bench", "gsm8k")
    assert "out: not a run folder" in message
    assert "`pissa init` with the same recipe or --set, then eval --compare-base" in message


def test_what_no_benchmark_uses_is_refused(refused: Callable[..., str]) -> None:
    words = ["eval", "gsm8k", "--bench"]
    for key in ("max_new_tokens=9", "temperature=0.5", "stop=[x]"):
        assert f"--set eval.{key.partition('=')[0]}: loss does not use it" in refused(
            *words, "loss", "--set", f"eval.{key}"
        )
        assert "not a run folder" in refused(*words, "gsm8k", "--set", f"eval.{key}")
    judge = ["--judge-url", "http://localhost:1/v1", "--judge-model", "x", "--set", "eval.temperature=0.5"]
    assert "not a run folder" in refused(*words, "mt_bench", *judge)
    assert "eval.samples: mt_bench does not use it" in refused(*words, "mt_bench", *judge, "--set", "eval.samples=3")


def test_push_without_token(refused: Callable[..., str], pissa: Pissa, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert pissa("init", "demo/pissa").code == 0
    Path("demo-out/pissa/adapter").mkdir()  # as if it were trained
    assert "no token for the Hub" in refused("merge", "demo/pissa", "--push")


def test_parser_errors(refused: Callable[..., str], pissa: Pissa) -> None:
    assert pissa("init", "--no-such-flag").code == 2
    assert pissa("no-such-command").code == 2
    assert pissa("init", "--rank", "many").code == 2


def test_json_errors_are_json(pissa: Pissa) -> None:
    assert pissa("init", "--rank", "many", "--json").json["exit_code"] == 2
    outcome = pissa("init", "--model", "x", "--rank", 0, "--json")
    assert outcome.code == 2 and outcome.json["exit_code"] == 2 and "adapter.rank" in outcome.json["error"]


@pytest.mark.parametrize("words", [["init", "--rank", "0"], ["init", "--dry-run"]])
def test_json_is_alone_on_stdout(words: list[str]) -> None:
    """Libraries print there too, and so do the programs that they start."""
    code = (
        "import os, sys; import pissa_cli.cli as cli; from pissa_cli.cli import edge; before = edge.run_guarded\n"
        "def noisy(*given):\n    print('chatter'); os.system('echo chatter'); return before(*given)\n"
        "cli.run_guarded = noisy; cli.run()"
    )
    command = [sys.executable, "-c", code, *words, "--json", "--model", str(Path(__file__).parents[1] / "none")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and json.loads(done.stdout)["exit_code"] == 2 and done.stderr.count("chatter") == 2


def test_an_interrupt_is_said(pissa: Pissa, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(recipe_file, "load", interrupted)
    outcome = pissa("init", "--json")
    assert outcome.code == outcome.json["exit_code"] == 130 and "error: interrupted" in outcome.err


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_output_for_readers_that_know_ascii_alone_or_are_gone(
    flags: list[str], models: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "auß"
    command = [sys.executable, "-m", "pissa_cli", "init", "--model", str(models("llama")), "--rank", "2"]
    command += ["--output", str(folder), *flags]
    done = subprocess.run(command, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and (folder / "manifest.json").is_file()
    assert "auß" in json.loads(done.stdout)["path"] if flags else b"au\\xdf: ready" in done.stdout
    done = subprocess.run(["bash", "-c", f"{shlex.join(command)} | true; exit ${{PIPESTATUS[0]}}"], capture_output=True)
    assert done.returncode == 0


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a folder that is in use may not be removable")
def test_a_working_directory_that_is_gone(
    pissa: Pissa, models: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    outcome = pissa("init", "--model", models("llama"), "--rank", 2, "--json")
    assert outcome.code == 2 and "the working directory is gone" in outcome.json["error"]


def test_python_without_docstrings(models: Callable[[str], Path], tmp_path: Path) -> None:
    words = ["init", "--model", str(models("llama")), "--rank", "2", "--json", "--output", str(tmp_path / "out")]
    command = [sys.executable, "-m", "pissa_cli", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONOPTIMIZE": "2"})
    assert done.returncode == 2 and "python -OO" in json.loads(done.stdout)["error"]


def test_a_model_with_an_adapter_beside_it(refused: Callable[..., str], tmp_path: Path) -> None:
    """transformers adds such an adapter to the model, whatever is asked for."""
    model = save_model(make_model("llama"), tmp_path / "base")
    adapted = peft.get_peft_model(make_model("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "other")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(tmp_path / "other" / name, model)
    assert "a model and an adapter in one folder" in refused("init", "--model", model)


def test_what_may_not_be_looked_up(capsys: pytest.CaptureFixture[str]) -> None:
    def look() -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "a/model/config.json")

    assert edge.run_guarded(look, ["init"]) == 2
    assert "error: a/model/config.json: no access (Permission denied)" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_file_of_a_model_that_may_not_be_read(
    name: str, refused: Callable[..., str], models: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which safetensors takes for one that is not there, and so for damage."""
    granted = os.access  # what chmod takes away is still granted to root
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != name and granted(path, mode))
    assert f"{name}: cannot be read" in refused("init", "--model", models("llama"), "--rank", 2)


@pytest.mark.parametrize("text", ["### Q {instruction}", "Q {instruction} # x", "#1.jsonl"])
def test_a_comment_in_set_is_no_value(text: str, refused: Callable[..., str]) -> None:
    assert "what follows # is a comment" in refused("init", "--model", "x", "--set", f"data.template={text}")


def test_a_column_that_comes_late(pissa: Pissa, models: Callable[[str], Path], tmp_path: Path) -> None:
    """Rows without it cannot be used; those after them can."""
    lines = ['{"instruction": "a"}'] * 500 + ['{"instruction": "a", "output": "b"}'] * 8
    words = ["--set", f"data.train={write(tmp_path / 'late.jsonl', chr(10).join(lines))}", "--set", "train.steps=1"]
    outcome = pissa("train", "--model", models("llama"), "--rank", 4, "--output", tmp_path / "out", *words)
    assert outcome.code == 0 and "500" in outcome.err, outcome.err


def test_files_are_looked_at_once(
    pissa: Pissa, models: Callable[[str], Path], rows: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A json file has to be read in whole for it: not again by each of the processes that a command starts."""
    looked: list[Any] = []
    monkeypatch.setattr(columns, "read_rows", lambda *words: looked.append(words) or read_rows(*words))
    words = ["--model", models("llama"), "--rank", 4, "--set", f"data.train={rows}", "--set", "train.steps=1"]
    assert pissa("train", *words, "--output", tmp_path / "one").code == 0 and len(looked) == 1
    monkeypatch.setenv(LAUNCHED, str(tmp_path / "failure.json"))
    assert pissa("train", *words, "--output", tmp_path / "other").code == 0 and len(looked) == 1


def test_a_column_mapped_in_vain(refused: Callable[..., str], models: Callable[[str], Path], rows: Path) -> None:
    words = ["--set", f"data.train={rows}", "--set", "data.columns={input: contxt}"]
    assert "no column 'contxt' for 'input' (format alpaca)" in refused("train", "--model", models("llama"), *words)
    assert "no column 'contxt'" in refused("train", "--model", models("llama"), *words, "--dry-run")


def test_a_quotation_mark_that_swallows_the_rest(
    refused: Callable[..., str], models: Callable[[str], Path], tmp_path: Path
) -> None:
    file = write(tmp_path / "rows.csv", 'instruction,output\nfirst,one\nsecond,"two\nthird,three\n')
    message = refused("train", "--model", models("llama"), "--set", f"data.train={file}")
    assert "rows.csv: after line 2: unexpected end of data" in message


def test_errors_of_a_section_name_the_line_of_the_key(refused: Callable[..., str], tmp_path: Path) -> None:
    file = write(tmp_path / "one.yaml", "model: {name: x}\ndata:\n  train: rows.jsonl\n  columns: {query: q}\n")
    assert "one.yaml:4: data: columns: format alpaca has no field 'query'" in refused("train", file)


def test_a_misspelt_name_of_the_model_is_an_unknown_key(refused: Callable[..., str], tmp_path: Path) -> None:
    file = write(tmp_path / "one.yaml", "model:\n  name_or_path: x\n")
    assert "one.yaml:2: model.name_or_path: unknown key" in refused("init", file)


def test_models_that_do_not_go_on_with_a_text(refused: Callable[..., str], tmp_path: Path) -> None:
    sizes: dict[str, int] = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 512}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    for config, said in (
        (T5Config(vocab_size=512, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2), "a decoder (t5)"),
        (BartConfig(**sizes, **heads), "a decoder (bart)"),
        (ReformerConfig(vocab_size=512), "a Reformer trains on whole chunks"),
        (
            ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2),
            "kind of AutoModel: AutoModelForCausalLM.)",
        ),
    ):
        folder = save_model(AutoModel.from_config(config), tmp_path / config.model_type)
        assert said in refused("init", "--model", folder)
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        message = refused("init", "--model", folder)
        assert "transformers.CLASS.from_pretrained(FOLDER).save_pretrained(NEW), CLASS as config.json has it" in message


def test_a_model_whose_code_wants_more_than_a_text(pissa: Pissa, rows: Path, tmp_path: Path) -> None:
    """XMOD a language, which its config.json may name."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = XmodForCausalLM(XmodConfig(vocab_size=512, is_decoder=True, languages=["en_XX", "de_DE"], **sizes))
    sets = ("--set", f"data.train={rows}", "--set", "model.bits=32", "--rank", "4")
    arguments = ("train", "--model", save_model(model, tmp_path / "model"), "--output", tmp_path / "out", *sets)
    outcome = pissa(*arguments)
    said = "error: the model's own code fails (modeling_xmod.py, ValueError: Input language unknown"
    assert outcome.code == 1 and said in outcome.err and "Traceback" not in outcome.err


@pytest.mark.parametrize(
    ("called", "said"),
    [
        (
            ["transformers/models/a/modeling_a.py", "transformers/cache_utils.py"],
            "the model's own code fails (modeling_a",
        ),
        (["transformers_modules/a/modeling_a.py", "torch/nn/linear.py"], "the model's own code fails (modeling_a"),
        (["transformers/models/a/modeling_a.py", "python3.11/functools.py"], "the model's own code fails (modeling_a"),
        (["transformers/generation/utils.py", "transformers/a.py", "<frozen abc>"], "the model's own code fails"),
        (["transformers/generation/utils.py", "pissa_cli/evals/generate.py"], "unexpected"),
        (["transformers/models/a/modeling_a.py", "python3.11/site-packages/b/c.py"], "unexpected"),
        (["transformers/models/a/modeling_a.py", "torch/nn/module.py", "pissa_cli/adapters/lowrank.py"], "unexpected"),
        (["transformers/generic.py", "torch/nn/module.py"], "unexpected"),
    ],
)
def test_whose_code_fails(called: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """That of the last file that is not torch's, transformers' or Python's own; `called` is each by the one before."""
    run: Callable[[], Any] | None = None
    for file in reversed(called):
        names: dict[str, Any] = {"then": run}
        path = file if file.startswith("<") else f"/lib/{file}"
        exec(compile("def run(): then() if then else int('x')", path, "exec"), names)
        run = names["run"]
    assert edge.run_guarded(run, ["train"]) == 1
    assert f"error: {said}" in capsys.readouterr().err


def test_a_result_whose_checkpoints_are_gone_is_not_replaced(
    refused: Callable[..., str], models: Callable[[str], Path], recipe: Callable[..., Any], rows: Path, tmp_path: Path
) -> None:
    made = recipe(models("llama"), "adapter.rank=4", f"data.train={rows}", "train.steps=1", "train.batch_size=2")
    train(made)
    shutil.rmtree(Run(Path(made.output)).checkpoints)
    for flags in ([], ["--resume"]):
        assert "adapter/ is there, the checkpoints that it came from are gone" in refused("train", made.output, *flags)


def test_a_full_disk_costs_only_the_new_checkpoint(
    models: Callable[[str], Path], recipe: Callable[..., Any], rows: Path, tmp_path: Path
) -> None:
    """A real failing write: the process may not make files larger than the next optimizer state."""
    made = recipe(
        models("llama"), "model.bits=32", "adapter.rank=4", f"data.train={rows}", "train.steps=2", "train.batch_size=2"
    )
    train(made)
    run = Run(Path(made.output))
    before = {p.name: p.read_bytes() for p in (run.checkpoints / "step-2").iterdir()}
    limit = len(before["optimizer.safetensors"]) - 1000

    said = tmp_path / "said"
    process = forked(entry("train", made.output, "--resume", "--set", "train.steps=4"), said)
    resource.prlimit(process, resource.RLIMIT_FSIZE, (limit, limit))
    assert exit_code(process) == 1, said.read_text()
    assert "optimizer.safetensors: cannot write" in said.read_text() and "Traceback" not in said.read_text()
    assert {p.name: p.read_bytes() for p in (run.checkpoints / "step-2").iterdir()} == before
    assert [p.name for p in run.checkpoints.iterdir()] == ["step-2"]
    assert load_tensors(run.adapter / "adapter_model.safetensors")


@pytest.mark.parametrize(("file", "place"), [("rows.jsonl", "rows.jsonl: "), (None, "")])
def test_a_disk_that_fails_may_have_been_read(file: str | None, place: str, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise OSError(errno.EIO, "Input/output error", file)

    assert edge.run_guarded(fail, ["train"]) == 1
    assert f"error: {place}the disk fails: Input/output error\nnext:  check it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "advice"), [("train", "train.micro_batch_size"), ("eval", "eval.batch_size"), ("merge", "free memory")]
)
def test_advice_on_memory_is_that_of_the_command(command: str, advice: str, capsys: pytest.CaptureFixture[str]) -> None:
    def run() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert edge.run_guarded(run, [command]) == 1
    said = capsys.readouterr().err
    assert "error: out of memory" in said and advice in said


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation'",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "NCCL error: unhandled cuda error\nCuda failure 2 'out of memory'",
    ],
)
def test_memory_that_others_hold_of_a_gpu(
    text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> None:
        raise RuntimeError(text)  # of the driver and the libraries, not of torch's own allocator

    monkeypatch.setenv("WORLD_SIZE", "2")
    assert edge.run_guarded(run, ["init"]) == 1
    said = capsys.readouterr().err
    assert "error: out of memory" in said and "free memory that other programs hold" in said
