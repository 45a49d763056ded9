"""Tiny encoders, texts with labels, and recipes of classifiers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_model
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, BertConfig, DebertaV2Config, GPT2Config, LlamaConfig, RobertaConfig

SHAPE = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 130,
}


CONFIGS: dict[str, Callable[[], Any]] = {
    "bert": lambda: BertConfig(**SHAPE),
    "roberta": lambda: RobertaConfig(**SHAPE, pad_token_id=1),
    "deberta": lambda: DebertaV2Config(
        **SHAPE, type_vocab_size=0, relative_attention=True, pos_att_type=["p2c", "c2p"], pooler_hidden_size=64
    ),
    "llama": lambda: LlamaConfig(**SHAPE, bos_token_id=None, eos_token_id=1),
    "gpt2": lambda: GPT2Config(
        vocab_size=512, n_embd=64, n_layer=2, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=1
    ),
}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny backbone without a head, made once."""
    made: dict[str, Path] = {}

    def folder(architecture: str) -> Path:
        if architecture not in made:
            torch.manual_seed(0)
            model = AutoModel.from_config(CONFIGS[architecture]())
            made[architecture] = save_model(model, tmp_path_factory.mktemp("encoders") / architecture)
        return made[architecture]

    return folder


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Sixty pairs of texts in MRPC's columns; the label is whether Anna has the apples."""
    path = tmp_path / "pairs.tsv"
    names = ["Anna", "Tom", "Mia"]
    lines = ["sentence1\tsentence2\tlabel"]
    for number in range(60):
        one, other = names[number % 3], names[(number // 3) % 3]
        lines.append(f'{one} has "{number} apples.\t{other} had some fruit.\t{int(number % 3 == 0)}')
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def classifier(recipe: Callable[..., Any], texts: Path) -> Callable[..., Any]:
    def make(folder: Path, *sets: str) -> Any:
        return recipe(
            folder,
            "model.task=sequence-classification",
            f"data.train={texts}",
            "data.format=glue/mrpc",
            *(() if "adapter.method=full" in sets else ("adapter.rank=4",)),
            "train.steps=4",
            "train.batch_size=8",
            "train.lr=0.01",
            *sets,
        )

    return make


@torch.no_grad()
def logits(model: Any, folder: Path) -> Tensor:
    """Of two pairs of texts of different length, padded as transformers pads them."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token_id = model.config.pad_token_id
    pairs = ["Anna has 7 apples.", "Tom ate."], ["Tom had some fruit, and more.", "Tom."]
    batch = tokenizer(*pairs, padding=True, return_tensors="pt", return_token_type_ids=False)
    return model.cpu().eval()(**batch).logits.float()


def close(found: Tensor, wanted: Tensor) -> None:
    assert float((found - wanted).norm() / wanted.norm()) < 1e-4
