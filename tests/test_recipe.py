"""The recipe's layers, the source of each value, and YAML read by the rules people expect."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pissa_cli.errors import UsageError
from pissa_cli.schema.other_tools import ABSENT, SYNONYMS
from pissa_cli.schema.recipe_errors import SECTIONS, _keys
from pissa_cli.schema.recipe_file import dump, listing, load
from pissa_cli.schema.yamlfile import parse_scalar, read_flat, write_yaml


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


def test_order_and_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "configs/train/mine.yaml", "lr: 1e-5\nbatch_size: 4\nwarmup: 0.2\nkeep: 9\n")
    file = write(
        tmp_path / "r.yaml", "use: {train: mine}\nmodel: {name: x}\ntrain:\n  batch_size: 5\n  warmup: 0.3\nseed: 1\n"
    )
    loaded = load(file, {("seed",): ("--seed", 2)}, ["train.warmup=0.4"])
    recipe, source = loaded.recipe, {key: place for key, _, place in listing(loaded)}
    assert (recipe.train.lr, recipe.train.batch_size, recipe.train.warmup, recipe.seed) == (1e-5, 5, 0.4, 2)
    assert source["train.lr"] == "configs/train/mine.yaml:1"
    assert source["train.batch_size"] == f"{file}:4"
    assert source["seed"] == "--seed" and source["train.warmup"] == "--set train.warmup"
    assert source["train.max_grad_norm"] == "default"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1e5", 1e5),
        ("2.0e-5", 2e-5),
        (".5", 0.5),
        ("-1E+3", -1000.0),
        ("7", 7),
        ("1_000", 1000),
        ("010", 10),
    ],
)
def test_numbers(text: str, value: float) -> None:
    assert parse_scalar(text, "--set x") == value and type(parse_scalar(text, "--set x")) is type(value)


TEXTS = ["e5", "1e", "v1.2", "openai/gsm8k", "1e5x", "1:30", "no", "Yes", "off", "2026-01-01", "<<"]


def test_text_stays_text() -> None:
    assert [parse_scalar(text, "--set x") for text in TEXTS] == TEXTS
    assert parse_scalar(f"[{', '.join(TEXTS)}]", "--set x") == TEXTS
    for read in (yaml.safe_load, lambda text: parse_scalar(text, "--set x")):
        assert read(write_yaml(TEXTS)) == TEXTS  # by other readers as well


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a: 1\na: 2\n", r":2: duplicate key 'a', first given in line 1"),
        ("a: {b: 1, b: 2}", r"duplicate key 'a\.b'"),
        ("a: [1\nb: 2", r"not valid YAML"),
        ("- 1\n- 2\n", "expected keys and values, found a list"),
        ("a: &x 1\nb: *x\n", "aliases"),
        ("1: 2", "a key must be plain text"),
        ("a: !!python/object:os.system x", "tags"),
        ("a: \x00", "not valid YAML"),
    ],
)
def test_yaml_that_is_refused(text: str, wanted: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=wanted):
        read_flat(Path(write(tmp_path / "r.yaml", text)))


def test_other_files_that_are_refused(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"a: \xff\xfe")
    (tmp_path / "huge.yaml").write_text("a: " + "x" * 1_000_001)
    (tmp_path / "deep.yaml").write_text("{a: " * 3000 + "1" + "}" * 3000)
    for name in ("binary", "huge", "deep", "absent"):
        with pytest.raises(UsageError, match=name):
            read_flat(tmp_path / f"{name}.yaml")


def test_steps_put_epochs_of_a_lower_layer_aside() -> None:
    assert load("gsm8k", {}, ["train.steps=20"]).recipe.train.epochs is None
    with pytest.raises(UsageError, match="not both"):
        load("gsm8k", {}, ["train.steps=20", "train.epochs=1"])


def test_an_alias_is_a_block_and_a_folder_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    flag = {("model", "name"): ("--model", "mistral-7b-nf4")}
    assert load(None, flag).recipe.model.model_dump(include={"name", "bits"}) == {
        "name": "mistralai/Mistral-7B-v0.1",
        "bits": 4,
    }
    assert load(None, flag, ["model.bits=32"]).recipe.model.bits == 32
    (tmp_path / "mistral-7b-nf4").mkdir()
    assert load(None, flag).recipe.model.name == str(tmp_path / "mistral-7b-nf4")


def test_the_lines_of_the_readme() -> None:
    flags = {
        ("model", "name"): ("--model", "mistral-7b"),
        ("adapter", "rank"): ("--rank", 128),
        ("adapter", "svd"): ("--svd", "fast"),
    }
    recipe = load(None, flags).recipe
    assert (recipe.adapter.method, recipe.lr, recipe.adapter.dropout) == ("pissa", 2e-5, 0.0)  # type: ignore[union-attr]
    assert recipe.adapter.layer_scale("x", 128) == 1.0 and recipe.passes == 1  # type: ignore[union-attr]
    paper = load("recipes/gsm8k.yaml", {}).recipe
    assert (paper.train.batch_size, paper.train.lr, paper.train.warmup, paper.data.limit) == (128, 2e-5, 0.03, 100_000)


def test_a_resolved_recipe_loads_as_itself(tmp_path: Path) -> None:
    recipe = load("gsm8k-qpissa", {}).recipe
    assert load(write(tmp_path / "again.yaml", dump(recipe)), {}).recipe == recipe


def test_data_paths_count_from_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "sub/rows.jsonl", "")
    file = write(tmp_path / "sub/r.yaml", "model: {name: x}\ndata: {train: rows.jsonl}\n")
    assert load(file, {}).recipe.data.train == str(tmp_path / "sub" / "rows.jsonl")
    write(tmp_path / "rows.jsonl", "")
    assert load(file, {}).recipe.data.train == str(tmp_path / "rows.jsonl")


def test_keys_of_other_tools_are_translated() -> None:
    for text, wanted in {
        "train.learning_rate=1": "train.lr",
        "lora_r=8": "adapter.rank",
        "adapter.target_modules=[x]": "adapter.targets",
        "data.cutoff_len=5": "data.max_length",
        "model_revision=main": "model.revision",
        "disable_gradient_checkpointing=true": "train.gradient_checkpointing",
        "embedding_learning_rate=1e-5": "train.head_lr",
        "loss_watchdog_threshold=5": "train.spike",
        "train.bfloat16=true": "train.precision",
        "chat_template_jinja=x": "data.template",
    }.items():
        with pytest.raises(UsageError, match=f"unknown key; here it is {wanted}"):
            load(None, {("model", "name"): ("--model", "x")}, [text])


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("adapter.targets=q_proj,v_proj", r"should be a list, \[q_proj,v_proj\]"),
        ("adapter.method=qpissa", "QPiSSA is pissa with --bits 4"),
        ("train.gradient_checkpointing=yes", "should be true or false"),
        ("train.seed=1", "belongs at the top"),
        ("train=3", "is a section with keys"),
        ("data.template=Q: {instruction} A: {output}", "quotes that the shell leaves"),
        ("adapter.targets=[1, 2]", r"should be a valid string \(found \[1, 2\]\)$"),
    ],
)
def test_values_of_another_kind(text: str, wanted: str) -> None:
    with pytest.raises(UsageError) as raised:
        load(None, {("model", "name"): ("--model", "x")}, [text])
    assert re.search(wanted, f"{raised.value.message}{raised.value.hint or ''}")


def test_flat_keys_of_another_tool_are_translated_before_a_model_is_asked_for(tmp_path: Path) -> None:
    file = write(tmp_path / "r.yaml", "model_name_or_path: x\nlora_rank: 8\n")
    with pytest.raises(UsageError, match=r"here it is model\.name(.|\n)*here it is adapter\.rank"):
        load(file, {})


def test_every_translation_names_a_key_of_ours() -> None:
    for ours in SYNONYMS.values():
        *section, key = ours.split(" ")[0].split(".")
        assert any(key in _keys(tuple(section), {"adapter": {"method": method}}) for method in ("lora", "pissa"))


def test_what_is_not_here_is_said(tmp_path: Path) -> None:
    for key in ABSENT:
        for method in ("lora", "pissa", "full"):
            assert not any(key in _keys(s, {"adapter": {"method": method}}) for s in ((), *((n,) for n in SECTIONS)))
    file = write(
        tmp_path / "r.yaml", "report_to: wandb\nuse_dora: true\ntrain: {flash_attn: fa2, group_by_length: true}\n"
    )
    with pytest.raises(UsageError) as raised:
        load(file, {})
    assert f"{file}:1: report_to: unknown key; the figures of every step are in" in raised.value.message
    assert "r.yaml:3: train.flash_attn: unknown key; this is chosen here" in raised.value.message
    for key, word in {
        "early_stopping_steps": "the lowest held-out loss is kept",
        "wandb_mode": "metrics.jsonl",
        "hf_hub_token": "HF_TOKEN",
        "default_system": "a system message",
        "cache_dir": "HF_HOME",
        "shuffle_dataset": "the seed",
        "predict_with_generate": "pissa eval",
    }.items():
        with pytest.raises(UsageError, match=f"{key}: unknown key; .*{word}"):
            load(None, {}, [f"{key}=1"])


def test_a_key_of_another_section_is_misplaced_whatever_is_like_it() -> None:
    vera = "d_initial=0.1"  # of another method than that of the recipe
    for given, section in (("alpha_pattern={q_proj: 8}", "adapter"), ("data.epochs=3", "train"), (vera, "adapter")):
        with pytest.raises(UsageError, match=f"misplaced key; it belongs under '{section}'"):
            load(None, {}, ["model.name=m", given])


def test_a_folder_has_no_revision(tmp_path: Path) -> None:
    flags = {("model", "name"): ("--model", str(tmp_path))}
    with pytest.raises(UsageError, match=r"model: revision: .* is a folder"):
        load(None, flags, ["model.revision=v2"])
    assert load(None, flags, ["model.revision=null"]).recipe.model.revision is None
    assert load(None, {("model", "name"): ("--model", "a/b")}, ["model.revision=v2"]).recipe.model.revision == "v2"


def test_several_sources_are_found_from_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("")
    data = "data: {train: [a.jsonl, some/data:main], eval: 2.5%}"
    section = load(write(tmp_path / "r.yaml", f"model: {{name: m}}\n{data}\n"), {}).recipe.data
    assert section.train == [str(tmp_path / "a.jsonl"), "some/data:main"] and section.held_out_share == 0.025
    for wrong, reason in (
        ("train=[]", "names nothing"),
        ("train=[a, 3]", "valid string"),
        ("train=5%", "a share is for data.eval"),
        ("eval=100%", "between 0% and 100%"),
        ("eval=0%", "between 0% and 100%"),
        ("eval='5,5%'", "between 0% and 100%"),
        ("eval=[5%, a.jsonl]", "either a share"),
        ("eval=0.05", "written as 5%"),
        ('train=[a.jsonl, "b\\u0007"]', "printed"),
    ):
        with pytest.raises(UsageError, match=reason):
            load(None, {("model", "name"): ("--model", "x")}, [f"data.{wrong}"])


def test_set_takes_a_value_back(tmp_path: Path) -> None:
    path = write(
        tmp_path / "r.yaml", "model: {name: m, bits: 32}\nadapter: {rank: 8, passes: 1}\ntrain: {batch_size: 8}\n"
    )
    with pytest.raises(UsageError, match=r"method full has no such option.*--set adapter\.rank=null"):
        load(path, {("adapter", "method"): ("--method", "full")})
    sets = ["adapter.rank=null", "adapter.passes=null", "train.batch_size=null"]
    loaded = load(path, {("adapter", "method"): ("--method", "full")}, sets)
    assert loaded.recipe.adapter.method == "full" and loaded.recipe.train.batch_size == 32
    assert ("train.batch_size", "32", "--set train.batch_size") in listing(loaded)
    with pytest.raises(UsageError, match=r"train\.batch_size: input should be"):
        load(write(tmp_path / "n.yaml", "model: {name: m}\ntrain: {batch_size: }\n"), {})


def test_set_takes_a_mapping_and_a_block_back(tmp_path: Path) -> None:
    text = "use: {data: demo}\nmodel: {name: m}\nadapter: {rank_pattern: {q_proj: 8}}\n"
    path = write(tmp_path / "r.yaml", text)
    recipe = load(path, {}, ["data.columns=null", "adapter.rank_pattern=null"]).recipe
    assert recipe.data.columns == recipe.adapter.rank_pattern == {}  # type: ignore[union-attr]
    assert recipe.data.max_length == 128
    one = load(path, {}, ["data.columns=null", "data.columns.output=x"]).recipe
    assert one.data.columns == {"output": "x"}
    assert load(path, {}, ["use.data=null"]).recipe.data.train is None
    with pytest.raises(UsageError, match="--set use: use: expected"):  # and no block is left out unsaid
        load(path, {}, ["use=null"])


def test_set_takes_mappings_key_by_key(tmp_path: Path) -> None:
    block, path = tmp_path / "block.yaml", tmp_path / "r.yaml"
    block.write_text("columns: {}\n")
    path.write_text(
        f"use: {{data: {block}}}\nmodel: {{name: m}}\nadapter: {{method: lora, rank: 4}}\n"
        "train: {lr: 1e-3, batch_size: 8}\ndata: {columns: {instruction: q, output: a}}\n"
    )
    sets = ["train={lr: 2e-3}", "adapter={rank: 8}", "data.columns={instruction: other}"]
    loaded = load(str(path), {}, sets)
    recipe, sources = loaded.recipe, loaded.sources
    assert (recipe.train.lr, recipe.train.batch_size) == (2e-3, 8)
    assert (recipe.adapter.method, recipe.adapter.rank) == ("lora", 8)
    assert recipe.data.columns == {"instruction": "other", "output": "a"}
    assert sources[("data", "columns", "instruction")] == "--set data.columns"
    assert sources[("train", "lr")] == "--set train" and sources[("train", "batch_size")] == f"{path}:4"
    emptied = load(str(path), {}, ["data.columns={}", "train={}"]).recipe
    assert emptied.data.columns == {} and emptied.train.batch_size == 8
    assert load(str(path), {}, ["data.columns={}", "data.columns.output=x"]).recipe.data.columns == {"output": "x"}


def test_set_takes_names_of_layers_with_dots() -> None:
    sets = ["model.name=m", r"adapter.rank_pattern.layers.0..*_proj=8", "adapter.rank_pattern.q_proj=4"]
    assert load(None, {}, sets).recipe.adapter.rank_pattern == {"layers.0..*_proj": 8, "q_proj": 4}  # type: ignore[union-attr]


@pytest.mark.parametrize("svd", ["exact", "fast", "1%", "0.01%"])
def test_accuracy_of_the_svd(svd: str) -> None:
    assert load(None, {}, ["model.name=m", f"adapter.svd={svd}"]).recipe.adapter.svd == svd  # type: ignore[union-attr]


@pytest.mark.parametrize("svd", ["1", "0%", "100%", "slow", "-1%"])
def test_impossible_accuracy_of_the_svd(svd: str) -> None:
    with pytest.raises(UsageError, match="expected fast, exact, or a share such as 1%"):
        load(None, {}, ["model.name=m", f"adapter.svd={svd}"])


def test_a_mapping_without_spaces_is_explained() -> None:
    with pytest.raises(UsageError, match="YAML wants a space after the colon"):
        load(None, {}, ["model.name=m", "adapter.rank_pattern={q_proj:8}"])


@pytest.mark.parametrize(
    ("flag", "key"),
    [
        ("--lr=1", "train.lr=VALUE"),
        ("--learning-rate", "train.lr=VALUE"),
        ("--packing", "data.packing=VALUE"),
        (
            "--gradient-accumulation-steps=3",
            "train.batch_size=VALUE (examples in one step, over all micro-batches)",
        ),
        ("--train.lr=1", "train.lr=VALUE"),
        ("--data=rows.jsonl", "data.train=VALUE"),
        ("--dataset-name", "data.train=VALUE (a file or id:subset:split)"),
        ("--nonsense", None),
        ("--train.nonsense", None),
    ],
)
def test_flags_that_are_keys_of_a_recipe(flag: str, key: str | None, pissa: Callable[..., Any]) -> None:
    outcome = pissa("train", flag, "--json")
    hint = f"keys of a recipe are set like this: --set {key}" if key else None
    assert outcome.code == 2 and json.loads(outcome.out)["hint"] == hint
    assert (f"next:  {hint}" in outcome.err) == (key is not None)
    assert "next:  the figures of every step" in pissa("train", "--report-to", "wandb").err


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["train", "--config", "r.yaml"], "a recipe needs no flag: pissa train RECIPE"),
        (["--config=[/b]"], "a recipe needs no flag: pissa train RECIPE"),
        (["train", "demo/pissa", "learning_rate=1e-4"], "--set train.lr=VALUE"),
        (["train", "demo/pissa", "train.lr=1e-4"], "--set train.lr=VALUE"),
        (["eval", "--batch_size", "4"], "--set eval.batch_size=VALUE"),
        (["eval", "--data"], "--set eval.data=VALUE"),
        (["train", "--batch_size", "4"], "--set train.batch_size=VALUE"),
        (["train", "--num_processes", "4"], "--processes N trains in N processes on this machine"),
        (["eval", "--tasks", "mmlu"], "those of EleutherAI's harness as lm_eval:<task>"),
        (["merge", "--model", "out"], "as in pissa merge RUN; init and train take --model"),
        (["export", "--format", "gguf"], "--for which server has to take it"),
        (["quantize", "--method", "gptq"], "in the form that vLLM reads: pissa export"),
        (["quantize", "out", "--bits", "4"], "in the form that vLLM reads: pissa export"),
        (["quantize", "out", "--checkpoint", "4"], "pissa export RUN --as nf4 --checkpoint N"),
        (["merge", "out", "--checkpoint", "4"], "pissa export RUN --as merged --checkpoint N"),
        (["eval", "out", "--rank", "4"], "a run has what it was made with; leave it out"),
        (["train", "--hub-token", "x"], "or HF_TOKEN"),
    ],
)
def test_other_tools_command_lines(words: list[str], hint: str, pissa: Callable[..., Any]) -> None:
    outcome = pissa(*words)
    assert outcome.code == 2 and outcome.err.rstrip().endswith(hint)


def test_other_tools_names_of_a_method(tmp_path: Path) -> None:
    for name, wanted in (("pissa_niter_16", r"adapter\.svd"), ("dora", "there is no DoRA here"), ("qlora", "--bits 4")):
        with pytest.raises(UsageError, match=f"adapter.method: unknown method; .*{wanted}"):
            load(write(tmp_path / "r.yaml", f"model: {{name: x}}\nadapter: {{method: {name}}}\n"), {})
    with pytest.raises(UsageError, match=r"adapter: is a section with keys, as in adapter: \{method: VALUE\}"):
        load(write(tmp_path / "r.yaml", "model: {name: x}\nadapter: qlora\n"), {})
