"""Step 0: the adapted model is the base, for every architecture, method, SVD and store."""

from __future__ import annotations

import itertools
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONFIGS
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pissa_cli.adapters.methods import METHODS
from pissa_cli.base.attach import attach, lowrank_layers
from pissa_cli.base.integrity import sealed
from pissa_cli.base.loading import load_model
from pissa_cli.base.peft_files import read_peft
from pissa_cli.cli.init import layer_table
from pissa_cli.cli.show import print_table
from pissa_cli.errors import UsageError
from pissa_cli.files import write_json
from pissa_cli.initialize import initialize
from pissa_cli.matrices.quant import packed_weight, read
from pissa_cli.quantize import quantize
from pissa_cli.run.report import notes_of
from pissa_cli.run.rundir import Run
from pissa_cli.run.started import open_run, read_start, require_base
from pissa_cli.train import train

STARTS = [("lora", "fast"), ("pissa", "fast"), ("pissa", "exact")]


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    ids = torch.randint(2, 512, (2, 24), generator=torch.Generator().manual_seed(0))
    return model.cpu().eval()(input_ids=ids).logits.float()


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def started(recipe: Any) -> PreTrainedModel:
    """The model as training sees it before its first step, on the CPU."""
    run = Run(Path(recipe.output))
    manifest = initialize(recipe)
    folder = run.base if run.base.is_dir() else Path(manifest["base"]["folder"])
    model = load_model(folder, recipe).cpu()
    attach(model, read_start(run, manifest)[1], METHODS[recipe.adapter.method], recipe.model.bits != 4)
    return model


def options(method: str, svd: str) -> list[str]:
    return [f"adapter.method={method}", "adapter.rank=4", *([f"adapter.svd={svd}"] if method == "pissa" else [])]


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize(("method", "svd"), STARTS)
def test_dense_start_is_the_base(
    architecture: str, method: str, svd: str, models: Callable[[str], Path], recipe: Callable[..., Any]
) -> None:
    folder = models(architecture)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = started(recipe(folder, "model.bits=32", "adapter.alpha=6", *options(method, svd)))
    assert relative(logits(model), logits(base)) < 1e-5
    linears = [m for m in base.modules() if isinstance(m, nn.Linear | Conv1D) and m is not base.get_output_embeddings()]
    assert len(lowrank_layers(model)) == len(linears)
    assert isinstance(model.get_output_embeddings(), nn.Linear)


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize(("method", "svd"), STARTS)
@pytest.mark.parametrize("double_quant", [False, True])
def test_nf4_start_is_the_base_with_stored_weights(
    architecture: str,
    method: str,
    svd: str,
    double_quant: bool,
    models: Callable[[str], Path],
    recipe: Callable[..., Any],
) -> None:
    folder = models(architecture)
    sets = ["model.bits=4", "train.precision=fp32", f"model.double_quant={str(double_quant).lower()}"]
    model = started(recipe(folder, *sets, *options(method, svd)))
    oracle = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    modules = dict(oracle.named_modules())
    for name, layer in lowrank_layers(model).items():
        assert (packed_weight(layer.base) is None) == (layer.base.in_features % 64 != 0)  # type: ignore[operator]
        W = layer.base_weight(torch.float32) + layer.scale * layer.B.detach() @ layer.A.detach()
        modules[name].weight.data = W.T.contiguous() if isinstance(modules[name], Conv1D) else W
    assert relative(logits(model), logits(oracle)) < 1e-5
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert 1e-5 < relative(logits(model), logits(plain)) < 0.6


@pytest.mark.parametrize("method", ["lora", "pissa"])
def test_bf16_start_is_the_base_within_rounding(
    method: str, models: Callable[[str], Path], recipe: Callable[..., Any]
) -> None:
    folder = models("llama")
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model = started(recipe(folder, "model.bits=16", *options(method, "exact")))
    assert relative(logits(model), logits(base)) < 2e-2


def test_tied_embeddings_survive(models: Callable[[str], Path], recipe: Callable[..., Any]) -> None:
    model = started(recipe(models("qwen2"), "model.bits=4", "train.precision=fp32", "adapter.rank=4"))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_start_does_not_depend_on_the_global_generator_or_order(
    models: Callable[[str], Path], recipe: Callable[..., Any], tmp_path: Path
) -> None:
    found = []
    for number, targets in enumerate(("[q_proj, up_proj]", "[up_proj, q_proj]", "all-linear")):
        torch.manual_seed(number)
        made = recipe(
            models("llama"),
            "adapter.method=lora",
            "adapter.rank=4",
            f"adapter.targets={targets}",
            f"output={tmp_path / str(number)}",
        )
        initialize(made)
        found.append(read_peft(Run(Path(made.output)).init)[1].factors)
    for name, pair in found[0].items():
        for other in found[1:]:
            assert torch.equal(pair["A"], other[name]["A"]) and torch.equal(pair["B"], other[name]["B"])
    A, next_A = (found[2][f"model.layers.{number}.self_attn.q_proj"]["A"] for number in (0, 1))
    assert abs(float((A * next_A).sum() / (A.norm() * next_A.norm()))) < 0.3  # each layer draws its own
    assert float(A.abs().max()) <= 64**-0.5 and float(A.var()) == pytest.approx(1 / (3 * 64), rel=0.2)


@pytest.mark.parametrize("damage", ["", "longer", None])
@pytest.mark.parametrize("bits", [16, 4])
def test_a_damaged_start_is_refused_and_can_be_made_again(
    damage: str | None,
    bits: int,
    models: Callable[[str], Path],
    recipe: Callable[..., Any],
    pissa: Callable[..., Any],
    tmp_path: Path,
) -> None:
    made = recipe(models("llama"), "adapter.rank=4", f"model.bits={bits}")
    initialize(made)
    file = Run(Path(made.output)).init / "adapter_model.safetensors"
    if damage is None:
        file.unlink()
    else:
        file.write_bytes((file.read_bytes() + damage.encode()) if damage else b"")
    outcome = pissa("init", made.output)
    again = f"or make it again: pissa init {made.output} --output NEW, and copy it from NEW/init"
    assert outcome.code == 2 and f"error: {file}: " in outcome.err and again in " ".join(outcome.err.split())
    assert pissa("init", made.output, "--output", tmp_path / "new").code == 0
    shutil.copy(tmp_path / "new" / "init" / file.name, file)
    assert pissa("init", made.output).code == 0


@pytest.mark.parametrize("damage", ["gone", "weights", "config.json"])
def test_a_damaged_base_of_a_run_is_refused_and_can_be_made_again(
    damage: str, models: Callable[[str], Path], recipe: Callable[..., Any], pissa: Callable[..., Any], tmp_path: Path
) -> None:
    made = recipe(models("llama"), "adapter.rank=4", "model.bits=4")
    manifest, run = initialize(made), Run(Path(made.output))
    assert require_base(manifest, made) == run.base
    if damage == "weights":
        content = bytearray((run.base / "model.safetensors").read_bytes())
        content[-100] ^= 1
        (run.base / "model.safetensors").write_bytes(content)
    elif damage == "config.json":
        (run.base / damage).write_text((run.base / damage).read_text().replace("silu", "gelu"))
    else:
        shutil.rmtree(run.base)
    with pytest.raises(UsageError, match=f"^{run.base}: ") as refused:
        require_base(manifest, made)
    again = f"pissa init {made.output} --output NEW, and copy it from NEW/base"
    assert refused.value.hint == f"bring the file back, or make it again: {again}"
    assert pissa("init", made.output, "--output", tmp_path / "new").code == 0
    shutil.copytree(tmp_path / "new" / "base", run.base, dirs_exist_ok=True)
    assert require_base(manifest, made) == run.base


def test_a_run_of_another_format_is_refused(models: Callable[[str], Path], recipe: Callable[..., Any]) -> None:
    made = recipe(models("llama"), "adapter.rank=4")
    manifest = {key: value for key, value in initialize(made).items() if key != "seal"}
    write_json(Run(Path(made.output)).manifest, sealed(manifest | {"format": 3}))
    with pytest.raises(UsageError, match="of format 3, this version of pissa reads 2"):
        open_run(made)


@pytest.mark.parametrize("environment", [{"COLUMNS": "40"}, {"TERM": "dumb", "FORCE_COLOR": "1"}, {}])
def test_no_figure_is_cut_off(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a narrow terminal, in one that says nothing of itself and in a file, which rich takes for 80 columns."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    figures = {"layers": 32, "rank": 128, "energy": 0.123, "start_error": 1.4e-3}
    figures |= {"plain_nuclear": 1233.5, "nuclear": 1111.25, "nuclear_reduction": 9.9}
    print_table(layer_table([{"kind": "attention.query_key_value", **figures}]))
    row = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    said = "attention.query_key_value │ 32 │ 128 │ 12.3% │ 1.4e-03 │ 1233.50 │ 1111.25 │ 9.9 %"
    assert [" ".join(words) for words in row] == [f"│ {said} │"]


def test_seconds_do_not_go_by_a_clock_that_is_set(
    models: Callable[[str], Path], recipe: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    back = itertools.count(2e9, -3600)
    monkeypatch.setattr(time, "time", lambda: next(back))
    assert 0 <= initialize(recipe(models("llama"), "adapter.rank=4"))["seconds"] < 3600


def test_manifest_records_the_start(models: Callable[[str], Path], recipe: Callable[..., Any]) -> None:
    made = recipe(models("llama"), "model.bits=4", "adapter.rank=8", "adapter.targets=[q_proj]")
    manifest = initialize(made)
    assert [layer["name"] for layer in manifest["layers"]] == [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    from safetensors.torch import load_file

    weights = load_file(models("llama") / "model.safetensors")
    factors = read_peft(Run(Path(made.output)).init)[1].factors
    base = AutoModelForCausalLM.from_pretrained(Run(Path(made.output)).base, dtype=torch.float32)
    for layer in manifest["layers"]:
        W = weights[f"{layer['name']}.weight"]
        stored = read(packed_weight(base.get_submodule(layer["name"]))).cpu()  # type: ignore[arg-type]
        error = W - stored - factors[layer["name"]]["B"] @ factors[layer["name"]]["A"]
        s = torch.linalg.svdvals(W.double())
        assert layer["nuclear"] == pytest.approx(float(torch.linalg.svdvals(error.double()).sum()), rel=1e-5)
        assert layer["frobenius"] == pytest.approx(float(error.double().norm()), rel=1e-5)
        assert layer["energy"] == pytest.approx(float(s[:8].square().sum() / s.square().sum()), rel=1e-4)
        assert layer["nuclear"] < layer["plain_nuclear"]
    assert initialize(made) == manifest


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn])
def test_weights_of_64_and_8_bits_are_refused(
    dtype: torch.dtype, models: Callable[[str], Path], recipe: Callable[..., Any], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(models("llama"), folder)
    name, tensors = "model.layers.1.mlp.up_proj.weight", load_file(folder / "model.safetensors")
    save_file(tensors | {name: tensors[name].to(dtype)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match=f"{name} is {str(dtype).removeprefix('torch.')}"):
        initialize(recipe(folder, "adapter.rank=4"))


def edited(base: Path, folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """A copy of a base with other tensors in its file."""
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("sets", [["model.bits=4"], ["model.bits=16"], ["model.bits=32", "adapter.method=full"]])
@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight"])
def test_tensors_that_a_base_lacks_are_named_before_it_is_split(
    name: str, sets: list[str], models: Callable[[str], Path], recipe: Callable[..., Any], tmp_path: Path
) -> None:
    base = edited(models("llama"), tmp_path / "base", lambda tensors: tensors.__delitem__(name))
    made, text = recipe(base, *sets), rf"^{base}: 1 tensors of the model are not in its files \({name}\)$"
    with pytest.raises(UsageError, match=text):
        initialize(made)
    with pytest.raises(UsageError, match=text):
        quantize(made, base, tmp_path / "nf4")
    assert not Path(made.output).exists()


@pytest.mark.parametrize("bits", [4, 16])
def test_tensors_of_a_base_that_have_no_place_are_named(
    bits: int, models: Callable[[str], Path], recipe: Callable[..., Any], tmp_path: Path
) -> None:
    """A config.json of fewer layers: transformers leaves the last ones out."""
    base = edited(models("llama"), tmp_path / "base", lambda _: None)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    last = sorted(name for name in load_file(base / "model.safetensors") if name.startswith("model.layers.1."))
    manifest = initialize(recipe(base, "adapter.rank=4", f"model.bits={bits}"))
    assert manifest["unused"] == last and len(last) == 9
    note = next(note for note in notes_of(manifest) if "config.json" in note)
    assert note.endswith(f": {last[0]}, ... (9 in all)")
    labels = ["model.task=sequence-classification", "data.format=classification", "model.labels=[a, b]"]
    for number, sets in enumerate(([], labels)):  # a classifier has no use for the head that writes
        whole = recipe(models("llama"), "adapter.rank=4", *sets, f"output={tmp_path / str(number)}")
        assert initialize(whole)["unused"] == [] == notes_of(open_run(whole)[1])


def test_why_layers_stay_dense_is_said_by_reason(models: Callable[[str], Path], recipe: Callable[..., Any]) -> None:
    """A hidden size of 96 and an inner one of 128: only the rows of down_proj are whole blocks."""
    manifest = initialize(recipe(models("uneven"), "adapter.rank=4", "model.bits=4"))
    parts = [f"self_attn.{kind}_proj" for kind in "qkvo"] + ["mlp.gate_proj", "mlp.up_proj"]
    names = [f"model.layers.{number}.{part}" for number in range(2) for part in parts]
    assert manifest["kept_dense"] == dict.fromkeys(names, "rows of no whole blocks of 64")
    said = notes_of({"kept_dense": {"router": "one output, as of gates", **manifest["kept_dense"]}})
    assert said == [
        "1 linear layer stays dense (one output, as of gates): router\n"
        f"12 linear layers stay dense (rows of no whole blocks of 64): {names[0]}, ..."
    ]
    said = notes_of({"kept_dense": names})
    assert said == [f"12 linear layers stay dense (the run does not say why): {names[0]}, ..."]


def test_what_is_wrong_with_the_adapter_costs_no_download_of_weights(
    models: Callable[[str], Path], recipe: Callable[..., Any], rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def snapshot(_name: str, allow_patterns: list[str], **_: Any) -> str:
        asked.append(allow_patterns)
        return str(models("llama"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    wrong = recipe(Path("some/base"), "adapter.rank=65", f"data.train={rows}")
    for begin in (initialize, train):
        with pytest.raises(UsageError, match=r"adapter\.rank: 65 is above"):
            begin(wrong)
    assert len(asked) == 2 and not any("safetensors" in part for parts in asked for part in parts)
    initialize(recipe(Path("some/base"), "adapter.rank=4"))
    assert any("safetensors" in pattern for pattern in asked[-1])
