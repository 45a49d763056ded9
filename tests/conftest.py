"""Tiny real models made on the spot, rows, and a way to call the command line in this process."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DeepseekV3Config,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

import pissa_cli.outputs.layer_report  # before anything is put in the place of what it takes from report
import pissa_cli.run.report
from pissa_cli.schema.recipe_file import load

pytest_plugins = ["classifiers"]

PACKAGE = Path(__file__).resolve().parents[1] / "pissa_cli"
DEMO = PACKAGE / "demo"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
_SHAPE = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**_SHAPE),
    "mistral": lambda: MistralConfig(**_SHAPE, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**_SHAPE, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**_SHAPE, head_dim=32),
    "gemma": lambda: GemmaConfig(**_SHAPE, head_dim=32),
    "gemma2": lambda: Gemma2Config(**_SHAPE, head_dim=32, sliding_window=128),
    "uneven": lambda: LlamaConfig(**{**_SHAPE, "hidden_size": 96}),
    "gpt2": lambda: GPT2Config(
        vocab_size=512, n_embd=64, n_layer=2, n_head=4, n_positions=256, bos_token_id=1, eos_token_id=1
    ),
}
MOE_CONFIGS: dict[str, Callable[[], Any]] = {
    "mixtral": lambda: MixtralConfig(**_SHAPE, num_local_experts=4, num_experts_per_tok=2),
    "qwen2_moe": lambda: Qwen2MoeConfig(  # shared experts, and a layer without experts
        **_SHAPE,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=128,
        mlp_only_layers=[0],
    ),
    "deepseek_v3": lambda: DeepseekV3Config(  # the same, and attention of low rank
        **{**_SHAPE, "num_key_value_heads": 4},
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        first_k_dense_replace=1,
        q_lora_rank=64,
        kv_lora_rank=64,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=16,
        n_group=1,
        topk_group=1,
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **_SHAPE, head_dim=32, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, decoder_sparse_step=1
    ),
}


def make_model(architecture: str, seed: int = 0) -> PreTrainedModel:
    """A tiny model whose weights have decaying spectra and whose biases are not zero."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config({**CONFIGS, **MOE_CONFIGS}[architecture]())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim in (2, 3) and "embed" not in name and "wte" not in name and "wpe" not in name:
                U, _, Vh = torch.linalg.svd(parameter, full_matrices=False)
                spectrum = 0.8 ** torch.arange(min(parameter.shape[-2:]), dtype=torch.float32) + 0.05
                parameter.copy_((U * spectrum) @ Vh)
            elif name.endswith("bias"):
                parameter.normal_(std=0.02)
        model.get_output_embeddings().weight.mul_(8)  # or the loss hardly depends on anything
    return model.eval()


def exact_scales(model: nn.Module) -> nn.Module:
    """`model`, kept from the repacking in place for AVX512-BF16 CPUs in bitsandbytes, which rounds the scales."""
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model


def save_model(model: PreTrainedModel, folder: Path, max_shard_size: str = "50GB") -> Path:
    """Save with the demo's tokenizer."""
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    for name in TOKENIZER_FILES:
        (folder / name).write_bytes((DEMO / "base" / name).read_bytes())
    return folder


def pytest_collection_finish() -> None:
    """What is imported stays: each of the many `gc.collect()` of the tests would take a quarter of a second over it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep the token cache of the tests out of the user's."""
    import pissa_cli.data.sets

    pytest.MonkeyPatch().setattr(pissa_cli.data.sets, "HF_HOME", str(tmp_path_factory.mktemp("hf_home")))


@pytest.fixture(autouse=True)
def _unrendered(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a training draws is put together and not rendered, a fifth of its time, but in tests that use `rendered`."""
    if "rendered" not in request.fixturenames:

        def save(figure: Any, picture: Path) -> None:
            pissa_cli.run.report.drawing().close(figure)
            picture.touch()

        monkeypatch.setattr(pissa_cli.run.report, "save_picture", save)


@pytest.fixture
def rendered() -> None:
    """Of a test that needs pictures as they are."""


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny model of an architecture, made once."""
    made: dict[str, Path] = {}

    def folder(architecture: str) -> Path:
        if architecture not in made:
            made[architecture] = save_model(make_model(architecture), tmp_path_factory.mktemp("models") / architecture)
        return made[architecture]

    return folder


@pytest.fixture
def tokenizer(models: Callable[[str], Path]) -> PreTrainedTokenizerBase:
    """That of the tiny models."""
    return AutoTokenizer.from_pretrained(models("llama"))


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Forty prompt/completion-like rows of the demo's task, as alpaca columns."""
    lines = (DEMO / "train.jsonl").read_text().splitlines()[:40]
    path = tmp_path / "rows.jsonl"
    content = [json.loads(line) for line in lines]
    path.write_text("".join(json.dumps({"instruction": r["question"], "output": r["answer"]}) + "\n" for r in content))
    return path


@dataclass
class Outcome:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(self.out)
        return content


@pytest.fixture
def pissa(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run `pissa ARGUMENTS` in this process, as its entry point would."""
    from pissa_cli.cli import app
    from pissa_cli.cli.edge import run_guarded

    def run(*arguments: Any) -> Outcome:
        words = [str(argument) for argument in arguments]
        capsys.readouterr()
        code = run_guarded(lambda: app(words, standalone_mode=False), words)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Any]:
    """A recipe from `key=value` texts, writing into tmp_path/out unless told otherwise."""

    def make(model: Path, *sets: str) -> Any:
        return load(None, {("model", "name"): ("--model", str(model))}, [f"output={tmp_path / 'out'}", *sets]).recipe

    return make


@pytest.fixture(scope="session")
def real_matrices() -> dict[str, Tensor]:
    """The trained linear weights of the demo's base, fp32; and those of the files in PISSA_TEST_MATRICES, if set."""
    files = [DEMO / "base" / "model.safetensors"]
    files += [Path(name) for name in os.environ.get("PISSA_TEST_MATRICES", "").split(":") if name]
    matrices = {}
    for file in files:
        for name, tensor in load_file(file).items():
            if tensor.ndim == 2 and "embed" not in name and min(tensor.shape) >= 64:
                matrices[f"{file.parent.name}/{name}"] = tensor.float()
    return matrices
