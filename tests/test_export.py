"""`export`: LoRA files for the plain base, at any rank, for any server; by stock PEFT and NumPy."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from conftest import Outcome, save_model
from safetensors.torch import load_file, save_file
from test_contract import stored_base
from test_start import logits, relative
from torch import Tensor
from transformers import AutoModelForCausalLM

from pissa_cli.adapters.start import Adapter
from pissa_cli.base.model import Linear
from pissa_cli.base.peft_files import peft_config, write_peft
from pissa_cli.errors import UsageError
from pissa_cli.export import export_lora, recompress
from pissa_cli.files import read_json, write_json
from pissa_cli.matrices.block_scales import SCALE_GRID
from pissa_cli.merge import merge
from pissa_cli.outputs.int4 import group_size, pack
from pissa_cli.outputs.serving import SERVERS, check_served
from pissa_cli.outputs.trained import load_plain_base, load_result
from pissa_cli.run.rundir import Run
from pissa_cli.train import train

Make = Callable[..., Any]


def trained(recipe: Make, folder: Path, rows: Path, *sets: str) -> Any:
    steps = ("train.steps=4", "train.save_every=2", "train.batch_size=4", "train.warmup=0", f"data.train={rows}")
    made = recipe(folder, "train.lr=0.02", *steps, *sets)
    train(made)
    return made


def change(folder: Path) -> dict[str, Tensor]:
    """s B A of every layer, in fp64, from the files."""
    config = read_json(folder / "adapter_config.json")
    tensors = load_file(folder / "adapter_model.safetensors")
    layers = {name.rsplit(".lora_", 1)[0] for name in tensors}
    found = {}
    for layer in layers:
        A, B = (tensors[f"{layer}.lora_{x}.weight"].double() for x in "AB")
        name = layer.removeprefix("base_model.model.")
        alpha = config["alpha_pattern"].get(name, config["lora_alpha"])
        found[name] = alpha / config["rank_pattern"].get(name, config["r"]) * B @ A
    return found


def by_peft(base: Path, adapter: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return logits(peft.PeftModel.from_pretrained(model, adapter))


@pytest.mark.parametrize("method", ["lora", "pissa", "svfit", "vera"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_lora_at_full_rank_is_exact(
    method: str, architecture: str, models: Callable[[str], Path], recipe: Make, rows: Path
) -> None:
    folder = models(architecture)
    made = trained(recipe, folder, rows, "model.bits=32", f"adapter.method={method}", "adapter.rank=6", "train.lr=0.1")
    out = Run(Path(made.output)).folder / "exported"
    result = export_lora(made, out, check=True)
    wanted = logits(load_result(made, torch.device("cpu")))
    assert result["relative_error"] == 0 and result["rank"] == (12 if method == "pissa" else 6)
    assert relative(by_peft(folder, out), wanted) < 2e-6 and result["relative_logit_difference"] < 2e-6


@pytest.mark.parametrize("rank", [3, 6, 9])
def test_the_printed_error_of_recompression_is_the_true_one(
    rank: int, models: Callable[[str], Path], recipe: Make, rows: Path
) -> None:
    made = trained(recipe, models("llama"), rows, "model.bits=32", "adapter.rank=6", "adapter.alpha=4")
    run = Run(Path(made.output))
    result = export_lora(made, run.folder / "exported", rank=rank)
    whole, found = change(run.adapter), change(run.folder / "exported")
    lost = sum(float((whole[name] - found[name]).square().sum()) for name in whole)
    true = (lost / sum(float(delta.square().sum()) for delta in whole.values())) ** 0.5
    assert result["relative_error"] == pytest.approx(true, rel=1e-4) and true > 1e-4
    worst = max(float((whole[name] - found[name]).norm() / whole[name].norm()) for name in whole)
    assert result["worst_relative_error"] == pytest.approx(worst, rel=1e-4)
    best = sum(float(np.square(np.linalg.svd(d.numpy(), compute_uv=False)[rank:]).sum()) for d in whole.values())
    assert lost == pytest.approx(best, rel=1e-4)
    model = by_peft(models("llama"), run.folder / "exported")
    assert torch.isfinite(model).all()


def test_recompress_by_hand() -> None:
    A, B = torch.tensor([[3.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    best_A, best_B, lost, norm = recompress(A, B, 1)
    torch.testing.assert_close(best_B @ best_A, torch.diag(torch.tensor([3.0, 0.0, 0.0])))
    assert (lost, norm) == (pytest.approx(1.0), pytest.approx(10**0.5))


@pytest.mark.parametrize("method", ["lora", "pissa", "loftq", "svfit"])
def test_what_was_learned_over_nf4_is_all_of_it(
    method: str, models: Callable[[str], Path], recipe: Make, rows: Path
) -> None:
    """Not what 4 bits lost: the trained weights less those of step 0, both as stored."""
    sets = ("model.bits=4", "train.precision=fp32", f"adapter.method={method}", "adapter.rank=6", "train.lr=0.01")
    made = trained(recipe, models("llama"), rows, *sets)
    run = Run(Path(made.output))
    before, after = (
        dict(stored_base(models("llama"), model, torch.float64).named_parameters())
        for model in (load_plain_base(made, torch.device("cpu")), load_result(made, torch.device("cpu")))
    )
    own = 12 if method in ("pissa", "loftq") else 6
    for rank in (4, None, 64):
        result = export_lora(made, run.folder / "exported", rank=rank, check=True)
        found = change(run.folder / "exported")
        wanted = {name: after[f"{name}.weight"].double() - before[f"{name}.weight"].double() for name in found}
        lost = sum(float((wanted[name] - found[name]).square().sum()) for name in found)
        true = (lost / sum(float(target.square().sum()) for target in wanted.values())) ** 0.5
        assert result["relative_error"] == pytest.approx(true, rel=1e-3, abs=1e-5)
        assert result["rank"] == min(rank or own, own) and (true > 1e-3) == (rank == 4)
        assert 1e-4 < result["relative_logit_difference"] < 1, "that of 4 bits"


def test_an_expert_that_got_no_token_has_the_rank_of_the_others(
    models: Callable[[str], Path], recipe: Make, rows: Path, tmp_path: Path
) -> None:
    """PEFT stacks what they have. The first two have opposite logits, of which one is above the zeros of the others."""
    model = AutoModelForCausalLM.from_pretrained(models("qwen3_moe"))
    model.config.num_experts_per_tok = 1
    for layer in model.model.layers:
        layer.mlp.gate.weight.data[1:] = torch.stack([-layer.mlp.gate.weight[0], *torch.zeros(2, 64)])
    folder = save_model(model, tmp_path / "base")
    made = trained(recipe, folder, rows, "model.bits=4", "train.precision=fp32", "adapter.rank=4", "train.lr=0.01")
    run = Run(Path(made.output))
    start, end = change(run.init), change(run.adapter)
    assert any(".experts." in name and torch.equal(start[name], end[name]) for name in end)
    assert export_lora(made, run.exported)["ranks"] == [8, 8]
    tensors = load_file(folder / "model.safetensors")
    for name in end:
        tensors[f"{name}.weight"] += (end[name] - start[name]).float()
    found = by_peft(folder, run.exported)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    wanted = logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    assert relative(found, wanted) < 1e-5


def test_uniform_is_the_same_function_and_what_servers_want(
    models: Callable[[str], Path], recipe: Make, rows: Path, pissa: Callable[..., Outcome]
) -> None:
    patterns = ("adapter.rank_pattern={q_proj: 2}", "adapter.alpha_pattern={up_proj: 9}", "adapter.alpha=4")
    made = trained(recipe, models("llama"), rows, "model.bits=32", "adapter.rank=6", *patterns)
    for server in SERVERS:
        refused = pissa("export", made.output, "--for", server)
        assert refused.code == 2 and "_pattern" in refused.err and "--uniform" in refused.err
    assert not (Path(made.output) / "exported").exists()
    done = pissa("export", made.output, "--for", "vllm", "--uniform", "--check", "--json")
    assert done.code == 0, done.err
    assert done.json["relative_logit_difference"] < 1e-6 and "--max-lora-rank 16" in done.json["serve"]
    config = read_json(Path(done.json["path"]) / "adapter_config.json")
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (12, 12, {}, {})
    wanted = logits(load_result(made, torch.device("cpu")))
    assert relative(by_peft(models("llama"), Path(done.json["path"])), wanted) < 1e-6


def test_servers_refuse_what_they_cannot_serve(
    models: Callable[[str], Path], recipe: Make, rows: Path, pissa: Callable[..., Outcome], monkeypatch: Any
) -> None:
    from pissa_cli.outputs import serving

    made = trained(recipe, models("llama"), rows, "model.bits=32", "adapter.rank=6")
    monkeypatch.setattr(serving, "SERVERS", {"vllm": serving.Rules("vLLM", (1, 8), "x {base} {folder} {rank}")})
    refused = pissa("export", made.output, "--for", "vllm")
    assert refused.code == 2 and "ranks up to 8, this adapter has 12" in refused.err and "--rank 8" in refused.err
    done = pissa("export", made.output, "--for", "vllm", "--rank", "8", "--json")
    assert done.code == 0 and 0 < done.json["relative_error"] < 1 and done.json["serve"].endswith(" 8")
    quoted = pissa("export", made.output, "--for", "vllm", "--rank", "8", "-o", f"{made.output}/it's mine", "--json")
    assert shlex.split(quoted.json["serve"])[2] == f"{made.output}/it's mine"
    more = pissa("export", made.output, "--rank", "500")
    assert more.code == 0 and "--rank 500: there is no more to write than rank 12" in more.out + more.err
    assert pissa("export", made.output, "--for", "ollama", "--dry-run").code == 2
    assert pissa("export", made.output, "--as", "nf4", "--rank", "4").code == 2


def block(number: int, *kinds: str) -> list[str]:
    return [f"model.layers.{number}.{kind}" for kind in kinds]


ATTENTION = tuple(f"self_attn.{kind}_proj" for kind in "qkvo")
MLP = tuple(f"mlp.{kind}_proj" for kind in ("gate", "up", "down"))
LLAMA = [*block(0, *ATTENTION, *MLP), *block(1, *ATTENTION, *MLP)]
MIXTRAL = [f"model.layers.0.block_sparse_moe.experts.0.{kind}" for kind in ("w1", "w2", "w3")]
QWEN_MOE = [f"model.layers.0.mlp.experts.0.{kind}_proj" for kind in ("gate", "up", "down")]
MLA = tuple(f"self_attn.{kind}" for kind in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"))
TEXT = [f"model.language_model.layers.0.{kind}" for kind in (*ATTENTION, *MLP)]
TOWER = [f"model.vision_tower.encoder.layers.0.{kind}" for kind in ATTENTION]


def served(folder: Path, server: str, layers: list[str], output: str = "out", scale: float = 1.0, **base: Any) -> str:
    """The line for a made-up adapter of rank 8 of these layers, whose scale is 1 but for the last; a base of two blocks
    unless it says otherwise."""
    ranks, scales = dict.fromkeys(layers, 8), dict.fromkeys(layers, 1.0) | {layers[-1]: scale}
    config = peft_config("LORA", "user/name", "a b", ranks, scales, {"target_modules": layers}, False, 1)
    write_peft(folder, Adapter({name: {"A": torch.ones(8, 2), "B": torch.ones(2, 8)} for name in layers}, {}), config)
    write_json(folder / "config.json", {"model_type": "llama", "num_hidden_layers": 2} | base)
    return check_served(folder, server, Path(output), folder)


@pytest.mark.parametrize(
    ("server", "layers", "base", "message"),
    [
        ("tgi", MIXTRAL, {"model_type": "mixtral"}, "no LoRA for models of the type mixtral"),
        ("tgi", LLAMA, {"model_type": "qwen3"}, "no LoRA for models of the type qwen3"),
        ("tgi", TEXT, {"model_type": "gemma3", "text_config": {"num_hidden_layers": 1}}, "of the type gemma3"),
        ("tgi", [*LLAMA, *QWEN_MOE], {}, r"ignore the adapter of model.layers.0.mlp.experts.0.down_proj"),
        ("tgi", block(0, "mlp.gate_up_proj"), {"model_type": "phi3"}, "knows qkv_proj, o_proj, down_proj"),
        ("tgi", LLAMA, {"model_type": "qwen2"}, "ignore the adapter of model.layers.0.mlp.gate_proj"),
        ("tgi", LLAMA[:-1], {}, "ignore the adapters of down_proj, as layer 1 has none"),
        ("tgi", LLAMA, {"num_hidden_layers": 3}, "as layer 2 has none"),
        ("sglang", MIXTRAL, {}, "no LoRA for layers such as .*w1"),
        ("sglang", block(0, "mlp.fc1"), {}, "no LoRA for layers such as .*fc1"),
        ("sglang", block(0, "self_attn.q_proj", "self_attn.k_proj"), {}, "stacks .*q_proj with v_proj"),
        ("sglang", block(0, "self_attn.k_proj"), {}, "stacks .*k_proj with q_proj"),
        ("sglang", block(0, "self_attn.v_proj"), {}, "stacks .*v_proj with q_proj"),
        ("sglang", [*LLAMA, *block(2, *MLP[1:])], {}, r"stacks model.layers.2.mlp.up_proj with gate_proj"),
        ("sglang", block(0, *MLA[1:]), {}, "stacks .*kv_a_proj_with_mqa with q_a_proj"),
        ("sglang", block(0, *MLA[:2]), {}, "stacks .*q_a_proj with kv_a_proj_with_mqa"),
        ("sglang", [*TEXT, *TOWER], {}, "take it for a layer of the language model"),
        ("sglang", [*LLAMA, "audio_tower.layers.0.self_attn.o_proj"], {}, "take it for a layer of the language model"),
        ("sglang", [*LLAMA, "model.visual.layers.0.o_proj"], {}, "take it for a layer of the language model"),
        ("sglang", [*LLAMA, "image_encoder.layers.0.o_proj"], {}, "take it for a layer of the language model"),
        ("sglang", [*TEXT, "model.multi_modal_projector.o_proj"], {}, "would miss model.multi_modal_projector"),
        ("vllm", LLAMA, {"architectures": ["FalconForCausalLM"]}, "no LoRA for FalconForCausalLM"),
        ("vllm", LLAMA, {"architectures": ["StableLmForCausalLM"]}, "no LoRA for StableLmForCausalLM"),
        ("llama.cpp", LLAMA, {"architectures": ["OPTForCausalLM"]}, "does not know OPTForCausalLM"),
        ("llama.cpp", block(0, *MLA), {}, r"cannot convert the adapter of model.layers.0.self_attn.kv_b_proj"),
        ("vllm", LLAMA, {"scale": 2}, "before 0.32 ignores alpha_pattern, and would serve 1 layers"),
        *((server, LLAMA, {"scale": 2}, "ignores alpha_pattern") for server in ("sglang", "tgi", "llama.cpp")),
        ("tgi", LLAMA, {"output": "a@b"}, "'@' has a meaning"),
        ("tgi", LLAMA, {"output": "a=b"}, "'=' has a meaning"),
        ("tgi", LLAMA, {"output": "a,b"}, "',' has a meaning"),
        ("vllm", LLAMA, {"output": "a,b/out"}, "',' has a meaning"),
    ],
)
def test_what_a_server_refuses_or_ignores_is_refused(
    server: str, layers: list[str], base: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        served(tmp_path, server, layers, **base)


@pytest.mark.parametrize(
    ("server", "layers", "base"),
    [
        ("tgi", LLAMA, {}),
        ("tgi", [*block(0, *ATTENTION), *block(1, *ATTENTION)], {"model_type": "gemma3_text"}),
        ("tgi", block(0, "self_attn.qkv_proj", "mlp.down_proj"), {"model_type": "phi3", "num_hidden_layers": 1}),
        ("sglang", [*LLAMA, *QWEN_MOE, *TEXT], {"output": "a=b"}),
        ("sglang", block(0, "self_attn.q_proj", "self_attn.v_proj", "mlp.gate_proj", *MLA), {}),
        ("vllm", [*LLAMA, *MIXTRAL], {"architectures": ["MixtralForCausalLM"], "output": "a=b@c"}),
        ("llama.cpp", [*LLAMA, *QWEN_MOE], {"architectures": ["Qwen3MoeForCausalLM"]}),
    ],
)
def test_what_a_server_takes_is_not_refused(
    server: str, layers: list[str], base: dict[str, Any], tmp_path: Path
) -> None:
    line = served(tmp_path, server, layers, **base)
    assert "--max-lora-rank 8 " in line or server not in ("vllm", "sglang")


@pytest.mark.parametrize(
    ("server", "line"),
    [
        (
            "vllm",
            "vllm serve user/name --enable-lora --max-lora-rank 8 --lora-modules tuned='an out' --revision 'a b'",
        ),
        (
            "sglang",
            "python -m sglang.launch_server --model-path user/name --max-lora-rank 8 --lora-paths tuned='an out' "
            "--revision 'a b'",
        ),
        ("tgi", "text-generation-launcher --model-id user/name --lora-adapters tuned='an out' --revision 'a b'"),
        ("llama.cpp", "python convert_lora_to_gguf.py 'an out' --base '{folder}'"),
    ],
)
def test_the_line_of_a_base_on_the_hub(server: str, line: str, tmp_path: Path) -> None:
    """At its revision; llama.cpp's converter reads the folder that was downloaded."""
    folder = tmp_path / "of it"
    assert served(folder, server, LLAMA, "an out") == line.format(folder=folder)


def test_no_server_takes_transposed_layers(
    models: Callable[[str], Path], recipe: Make, rows: Path, pissa: Callable[..., Outcome]
) -> None:
    made = trained(recipe, models("gpt2"), rows, "model.bits=32", "adapter.rank=2")
    for server in SERVERS:
        refused = pissa("export", made.output, "--for", server)
        assert refused.code == 2 and "Conv1D" in refused.err and "--as merged" in refused.err


def test_vllm_counts_the_rank_that_peft_gives_to_stacked_experts(
    models: Callable[[str], Path], recipe: Make, rows: Path, pissa: Callable[..., Outcome], monkeypatch: Any
) -> None:
    from pissa_cli.outputs import serving

    made = trained(recipe, models("qwen2_moe"), rows, "model.bits=32", "adapter.rank=6")
    done = pissa("export", made.output, "--for", "vllm", "--json")
    config = read_json(Path(done.json["path"]) / "adapter_config.json")
    assert config["r"] == 12 and config["rank_pattern"] == {"gate_up_proj": 24}
    assert "--max-lora-rank 32" in done.json["serve"]
    served_by_sglang = pissa("export", made.output, "--for", "sglang", "--json").json["serve"]
    assert "--max-lora-rank 12" in served_by_sglang
    monkeypatch.setattr(serving, "SERVERS", {"vllm": serving.Rules("vLLM", (1, 8, 16), "{rank}")})
    refused = pissa("export", made.output, "--for", "vllm")
    assert refused.code == 2 and "ranks up to 16, this adapter has 24" in refused.err and "--rank 8" in refused.err
    assert pissa("export", made.output, "--for", "vllm", "--rank", "8", "--json").json["serve"] == "16"


def test_vllm_of_old_ignores_patterns(
    models: Callable[[str], Path], recipe: Make, rows: Path, pissa: Callable[..., Outcome]
) -> None:
    made = trained(recipe, models("llama"), rows, "model.bits=32", "adapter.rank_pattern={q_proj: 2}")
    refused = pissa("export", made.output, "--for", "vllm")
    assert refused.code == 2 and "vLLM before 0.32 ignores rank_pattern" in refused.err and "--uniform" in refused.err


def test_the_line_names_the_recipe_s_template(models: Callable[[str], Path], recipe: Make, rows: Path) -> None:
    made = trained(recipe, models("llama"), rows, "model.bits=32", "adapter.rank=2")
    template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    data = made.data.model_copy(update={"format": "chat", "template": template})
    made, out = made.model_copy(update={"data": data}), Path(made.output) / "exported"
    servers = ("vllm", "sglang", "tgi", "llama.cpp")
    lines = {server: export_lora(made, out, server=server)["serve"] for server in servers}
    assert lines["vllm"].endswith(f" --chat-template {out}/chat_template.jinja")
    assert lines["sglang"].endswith(f" --chat-template {out}/chat_template.jinja")
    assert lines["tgi"].endswith(f" --tokenizer-config-path {out}/tokenizer_config.json")
    assert lines["llama.cpp"].startswith("python convert_lora_to_gguf.py") and "template" not in lines["llama.cpp"]
    assert read_json(out / "tokenizer_config.json")["chat_template"] == template


def test_where_answers_end_and_the_base_goes_on_is_said(
    models: Callable[[str], Path], tmp_path: Path, pissa: Callable[..., Outcome]
) -> None:
    """At a token of its own, in text, and where the base ends as well."""
    rows, begin = tmp_path / "chat.jsonl", "{% for m in messages %}{{ m.role }}:{{ m.content }}"
    said = [{"role": "user", "content": "2"}, {"role": "assistant", "content": "four"}]
    rows.write_text(json.dumps({"messages": said}) + "\n")
    ends = (("<pad>", "'<pad>' (token 0), where"), ("</a>", "'</a>', where"), ("{{ eos_token }}", None))
    for number, (end, words) in enumerate(ends):
        template = f"{begin}{end}{{% endfor %}}{{% if add_generation_prompt %}}assistant:{{% endif %}}"
        sets = ["model.bits=32", "adapter.rank=2", "data.format=chat", f"data.template='{template}'", "train.steps=1"]
        out = ["--model", models("llama"), "-o", tmp_path / str(number), "--set", f"data.train={rows}"]
        done = pissa("train", *out, *(word for one in sets for word in ("--set", one)))
        assert done.code == 0, done.err
        lines = pissa("export", tmp_path / str(number), "--for", "vllm").out
        assert (f"answers end with {words} this base goes on" in lines) if words else "answers end" not in lines


@pytest.mark.parametrize(
    ("sets", "folder"),
    [
        (("model.bits=4", "adapter.rank=2"), "base"),
        (("model.bits=32", "adapter={method: full}"), "merged"),
        (("model.bits=32", "adapter.rank=2"), "merged"),
    ],
)
def test_every_model_that_is_written_ends_its_answers(
    sets: tuple[str, ...],
    folder: str,
    models: Callable[[str], Path],
    recipe: Make,
    tmp_path: Path,
    pissa: Callable[..., Outcome],
) -> None:
    """Other programs ask generation_config.json; 0 is <pad>, 1 the base's own end."""
    said = [{"role": "user", "content": "2"}, {"role": "assistant", "content": "four"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": said}) + "\n")
    template = "{% for m in messages %}{{ m.role }}:{{ m.content }}<pad>{% endfor %}"
    chat = ("data.format=chat", f"data.template='{template}'", f"data.train={tmp_path / 'chat.jsonl'}")
    made = recipe(models("llama"), *sets, *chat, "train.steps=1")
    train(made)
    if not (Path(made.output) / folder).exists():
        assert pissa("merge", made.output).code == 0
    ends = json.loads((Path(made.output) / folder / "generation_config.json").read_text())["eos_token_id"]
    assert ends == [1, 0]


def test_any_checkpoint_can_be_exported(
    models: Callable[[str], Path], recipe: Make, rows: Path, pissa: Callable[..., Outcome]
) -> None:
    made = trained(recipe, models("llama"), rows, "model.bits=32", "adapter.rank=6", "train.schedule=constant")
    short = recipe(
        models("llama"), "model.bits=32", "adapter.rank=6", "train.schedule=constant", "train.lr=0.02",
        "train.steps=2", "train.batch_size=4", "train.warmup=0", f"data.train={rows}", f"output={made.output}2",
    )  # fmt: skip
    train(short)
    wanted = logits(load_result(short, torch.device("cpu")))
    result = export_lora(made, Path(made.output) / "exported", step=2)
    assert relative(by_peft(models("llama"), Path(result["path"])), wanted) < 1e-6
    merged = pissa("export", made.output, "--as", "merged", "--checkpoint", "2", "-o", f"{made.output}-m", "--json")
    assert merged.code == 0, merged.err
    assert relative(logits(AutoModelForCausalLM.from_pretrained(f"{made.output}-m")), wanted) < 1e-5
    nf4 = pissa("export", made.output, "--as", "nf4", "--checkpoint", "2", "--json")
    assert nf4.code == 0 and 0 < nf4.json["relative_logit_difference"] < 0.5
    (Path(made.output) / "checkpoints" / "step-2-old").mkdir()  # a copy of someone's
    with pytest.raises(UsageError, match="no such checkpoint") as refused:
        export_lora(made, Path(made.output) / "x", step=3)
    assert refused.value.hint == "there are: step-2, step-4"
    for folder in (rows.parent, made.output):  # the run itself, which nobody should be told to remove
        taken = pissa("export", made.output, "-o", folder)
        assert taken.code == 2 and taken.err.endswith("exists already\nnext:  name another with --output\n")


@pytest.mark.parametrize("bits", [32, 4])
def test_compressed_tensors_by_stock_transformers(
    bits: int, models: Callable[[str], Path], recipe: Make, rows: Path, pissa: Callable[..., Outcome]
) -> None:
    pytest.importorskip("compressed_tensors")
    made = trained(recipe, models("llama"), rows, f"model.bits={bits}", "train.precision=fp32", "adapter.rank=6")
    done = pissa("export", made.output, "--as", "compressed-tensors", "--check", "--json")
    assert done.code == 0, done.err
    folder = Path(done.json["path"])
    assert folder == Run(Path(made.output)).int4  # beside what quantize writes
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    dense = load_file(Path(merge(made)["path"]) / "model.safetensors")
    stored = load_file(folder / "model.safetensors")
    lost, norm, read_back = 0.0, 0.0, {}
    for name, W in dense.items():
        prefix = name.removesuffix(".weight")
        if f"{prefix}.weight_packed" in stored:
            packed, scale = stored[f"{prefix}.weight_packed"], stored[f"{prefix}.weight_scale"]
            codes = torch.stack([(packed >> (4 * i)) & 15 for i in range(8)], -1).flatten(1) - 8
            back = (codes.view(len(W), scale.shape[1], -1) * scale[:, :, None]).flatten(1)
            read_back[name] = back
            lost, norm = lost + float((back - W).square().sum()), norm + float(W.square().sum())
            largest = W.view(len(W), scale.shape[1], -1).abs().amax(2, keepdim=True) / 7.5
            plain = (W.view(len(W), scale.shape[1], -1) / largest).round().clamp(-8, 7) * largest
            assert float((back - W).norm()) < float((plain.flatten(1) - W).norm())
        else:
            assert torch.equal(stored[name], W)
    assert done.json["relative_error"] == pytest.approx((lost / norm) ** 0.5, rel=1e-4) and norm > 0
    oracle = AutoModelForCausalLM.from_pretrained(Run(Path(made.output)).merged, dtype=torch.float32)
    oracle.load_state_dict(read_back, strict=False)
    assert relative(logits(model), logits(oracle)) < 1e-5
    difference = relative(logits(model), logits(load_result(made, torch.device("cpu"))))
    assert 0 < done.json["relative_logit_difference"] < 5 * difference


def test_int4_codes_are_the_nearest_under_the_scales_that_are_kept() -> None:
    pytest.importorskip("compressed_tensors")
    W = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    W[0], W[1, :32], W[2, :32] = 0, 0, -1
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        tensors, back = pack("x.weight", W, dtype, 32)
        scale = tensors["x.weight_scale"]
        codes = torch.stack([(tensors["x.weight_packed"] >> (4 * i)) & 15 for i in range(8)], -1).view(4, 2, 32) - 8
        assert scale.dtype == dtype and scale.shape == (4, 2) and tensors["x.weight_shape"].tolist() == [4, 64]
        assert torch.equal(back.view(4, 2, 32), codes * scale.float()[..., None])
        assert torch.equal(codes, (W.view(4, 2, 32) / scale.float()[..., None]).round().clamp(-8, 7).int())
        assert not back[0].any() and (codes[2, 0] == -8).all()
    groups, (_, back) = W.view(8, 32), pack("x.weight", W, torch.float32, 32)
    units = groups / groups.abs().amax(1, keepdim=True).clamp_min(1e-30)
    tried = [(units * 7.5 / share).round().clamp(-8, 7) for share in SCALE_GRID]
    lost = [(q * ((q * groups).sum(1) / q.square().sum(1).clamp_min(1))[:, None] - groups).norm(dim=1) for q in tried]
    assert ((back.view(8, 32) - groups).norm(dim=1) <= torch.stack(lost).amin(0) + 1e-6).all()


def test_the_group_of_int4_is_the_largest_that_most_layers_take() -> None:
    assert group_size([Linear("x", "x.weight", 8, 128, False)]) == 128
    assert group_size([Linear("x", "x.weight", 8, n, False) for n in (128, 64, 192)]) == 64
    fits = Linear("x", "x.weight", 8, 128, False)
    odd = ({"num_in": 48}, {"num_out": 1}, {"transposed": True}, {"bypassed": True}, {"dense": True})
    with pytest.raises(UsageError, match="no linear layer of this model fits"):
        group_size([replace(fits, **other) for other in odd])


def test_a_lora_of_nf4_where_a_layer_is_small(
    models: Callable[[str], Path], recipe: Make, rows: Path, pissa: Callable[..., Outcome]
) -> None:
    made = trained(recipe, models("llama"), rows, "model.bits=4", "train.precision=fp32", "adapter.rank=20")
    done = pissa("export", made.output, "--for", "vllm", "--json")  # k_proj is 32 x 64
    assert done.code == 0 and done.json["rank"] == 40, done.err
    assert torch.isfinite(by_peft(models("llama"), Path(done.json["path"]))).all()


def test_a_checkpoint_s_card_has_its_own_figures(models: Callable[[str], Path], recipe: Make, rows: Path) -> None:
    made = trained(recipe, models("llama"), rows, "model.bits=32", "adapter.rank=4")
    card = (Path(export_lora(made, Path(made.output) / "exported", step=2)["path"]) / "README.md").read_text()
    assert "| steps | 2 |" in card and str(rows.parent) not in card
