"""`adapter.rank: auto`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Outcome
from safetensors.torch import load_file
from test_start import logits, relative
from transformers import AutoModelForCausalLM

from pissa_cli.base.model import Linear
from pissa_cli.base.plan import _ranks, make_plan
from pissa_cli.base.ranks import allot
from pissa_cli.cli.init import layer_table
from pissa_cli.errors import UsageError
from pissa_cli.files import read_json, write_json
from pissa_cli.initialize import initialize
from pissa_cli.outputs.trained import load_result
from pissa_cli.run.report import summarize
from pissa_cli.run.rundir import Run
from pissa_cli.train import train

peft = pytest.importorskip("peft")
Make = Callable[..., Any]


def test_allot_by_hand() -> None:
    spectra = {"a": torch.tensor([9.0, 4.0, 1.0]), "b": torch.tensor([6.0, 5.0, 0.1])}
    costs = {"a": 1, "b": 2}  # per number: a 9, 4, 1; b 3, 2.5, 0.05
    assert allot(spectra, costs, 3, None) == {"a": 1, "b": 1}
    assert allot(spectra, costs, 4, None) == {"a": 2, "b": 1}
    assert allot(spectra, costs, 5, None) == {"a": 3, "b": 1}  # b's next costs 2 and does not fit
    assert allot(spectra, costs, 6, None) == {"a": 2, "b": 2}
    assert allot(spectra, costs, 100, None) == {"a": 3, "b": 3}
    # E = 25.1; rank 1 keeps 15, then a's 4 and b's 5
    assert allot(spectra, costs, None, 0.6) == {"a": 2, "b": 1}  # 1 - 0.36 = 64 % is 16.06
    assert allot(spectra, costs, None, 0.4) == {"a": 2, "b": 2}  # 84 % is 21.1
    assert allot(spectra, costs, None, 1e-6) == {"a": 3, "b": 3}


@pytest.mark.parametrize("method", ["pissa", "lora"])
def test_a_budget_of_parameters(
    method: str, models: Callable[[str], Path], recipe: Make, rows: Path, pissa: Callable[..., Outcome]
) -> None:
    sets = [f"adapter.method={method}", "model.bits=32", f"data.train={rows}", "train.steps=2", "train.lr=0.01"]
    made = recipe(models("llama"), *sets, "adapter.rank=auto", "adapter.max_parameters=9000")
    train(made)
    run = Run(Path(made.output))
    manifest = run.read_manifest()
    weights = load_file(models("llama") / "model.safetensors")
    used = sum(layer["rank"] * sum(layer["shape"]) for layer in manifest["layers"])
    assert manifest["trainable"] == used and 8700 < used <= 9000
    assert len({layer["rank"] for layer in manifest["layers"]}) > 1

    def energy(ranks: dict[str, int]) -> float:
        squares = {name: torch.linalg.svdvals(weights[f"{name}.weight"]).square() for name in ranks}
        return sum(float(squares[name][:rank].sum()) for name, rank in ranks.items())

    auto = {layer["name"]: layer["rank"] for layer in manifest["layers"]}
    cost = sum(sum(layer["shape"]) for layer in manifest["layers"])
    planned = pissa("init", made.output, "--dry-run", "--json").json
    assert (planned["ranks"], planned["trainable"]) == ("final", manifest["trainable"])
    planned = pissa("init", made.output, "--set", "adapter.max_parameters=4000", "--dry-run", "--json").json
    assert planned["ranks"].startswith("chosen at init") and planned["trainable"] <= 4000, "init would refuse that"
    assert energy(auto) > energy(dict.fromkeys(auto, 9000 // cost))
    base = AutoModelForCausalLM.from_pretrained(models("llama"), dtype=torch.float32)
    theirs = logits(peft.PeftModel.from_pretrained(base, run.adapter))
    assert relative(theirs, logits(load_result(made, torch.device("cpu")))) < 1e-5
    assert read_json(run.adapter / "adapter_config.json")["rank_pattern"]
    manifest["layers"][0]["rank"] += 1
    write_json(run.manifest, manifest)
    edited = pissa("init", made.output, "--dry-run")
    assert edited.code == 2 and "manifest.json: not what was written" in edited.err


def test_where_a_full_fine_tuning_is_ranks_are_not_read(
    models: Callable[[str], Path], recipe: Make, pissa: Callable[..., Outcome]
) -> None:
    made = recipe(models("llama"), "adapter.method=full", "model.bits=32")
    initialize(made)
    words = ("--output", made.output, "--method", "lora", "--rank", "auto", "--set", "adapter.max_parameters=9000")
    shown = pissa("init", "--model", models("llama"), *words, "--dry-run", "--json")
    assert shown.code == 0 and shown.json["ranks"].startswith("chosen at init")


@pytest.mark.parametrize("budget", [2048, 2144, 50_000, 70_000, 100_000])  # the first two are spent to the last
def test_what_a_budget_pays_for_is_counted_where_small_layers_have_no_more_rank(
    budget: int, models: Callable[[str], Path], recipe: Make
) -> None:
    made = recipe(models("llama"), "adapter.rank=auto", f"adapter.max_parameters={budget}")
    plan = make_plan(made, models("llama"))
    most = {layer.name: min(layer.num_out, layer.num_in) for layer in plan.targets}
    least = min(layer.num_out + layer.num_in for layer in plan.targets if plan.ranks[layer.name] < most[layer.name])
    assert all(1 <= rank <= most[name] for name, rank in plan.ranks.items())
    assert 0 <= budget - plan.num_trainable(made) < least


def test_a_rank_above_what_the_narrowest_of_a_kind_takes(recipe: Make) -> None:
    targets = [Linear(f"{width}.q", f"{width}.q.weight", width, 64, False) for width in (8, 64)]
    with pytest.raises(UsageError, match=r"33 is above the smallest dimension of 8\.q \(8 x 64\)") as refused:
        _ranks(recipe(Path("x"), "adapter.rank=33").adapter, targets)
    assert "adapter.rank_pattern: {q: 8}, or use at most 8, which" in str(refused.value.hint)


def test_the_table_has_the_mean_of_ranks_that_differ() -> None:
    layers = [{"kind": kind, "rank": rank, "start_error": 0.0} for kind, rank in (("q", 4), ("q", 9), ("k", 4))]
    rows = summarize({"layers": layers})
    assert {row["kind"]: row["rank"] for row in rows} == {"q": 6.5, "k": 4, "all": pytest.approx(17 / 3)}
    shown = [str(cell) for cell in layer_table(rows).columns[2].cells]
    assert shown == ["6.5", "4", "5.66667"]


@pytest.mark.parametrize("share", [0.7, 0.4])
def test_a_budget_of_error_is_met(share: float, models: Callable[[str], Path], recipe: Make) -> None:
    made = recipe(models("llama"), "model.bits=4", "adapter.rank=auto", f"adapter.max_error={share}")
    layers = initialize(made)["layers"]
    found = sum(layer["frobenius"] ** 2 for layer in layers) ** 0.5
    plain = sum(layer["plain_frobenius"] ** 2 for layer in layers) ** 0.5
    assert 0.5 * share < found / plain <= share


def test_impossible_budgets(
    models: Callable[[str], Path], recipe: Make, pissa: Callable[..., Outcome], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"100 is less than rank 1 in every layer takes \(2,048\)"):
        initialize(recipe(models("llama"), "adapter.rank=auto", "adapter.max_parameters=100"))
    assert not (tmp_path / "out").exists()
    budget = ["adapter.rank=auto", "adapter.max_parameters=9000"]
    for sets, message in (
        (["adapter.rank=auto"], "needs one budget"),
        (["adapter.max_parameters=100"], "budgets of rank: auto"),
        (["adapter.rank=auto", "adapter.max_error=0.5"], "set model.bits to 4"),
        (["adapter.method=lora", "model.bits=4", "adapter.rank=auto", "adapter.max_error=0.5"], "is for pissa"),
        ([*budget, "adapter.rank_pattern={q_proj: 3}"], "remove rank_pattern"),
    ):
        with pytest.raises(UsageError, match=message):
            recipe(models("llama"), *sets)
    shown = pissa("init", "--model", models("llama"), "--rank", "auto", "--set", budget[1], "--dry-run")
    assert shown.code == 0 and "ranks are chosen at init" in shown.out
    assert "counted here: all of adapter.max_parameters\n" in shown.out
    counted = int(shown.out.partition(" parameters train")[0].split()[-1].replace(",", ""))
    assert 8900 < counted <= 9000
    too_little = ["--rank", "auto", "--set", "adapter.max_parameters=100"]
    shown = pissa("init", "--model", models("llama"), *too_little, "--dry-run")
    assert shown.code == 2 and "100 is less than rank 1" in shown.err
    assert pissa("init", "--model", models("llama"), "--rank", "many").code == 2
