"""That files are those that were written, and weights finite."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from pissa_cli.base.weights import Weights, fingerprint, hash_file, load_tensors
from pissa_cli.errors import UsageError

COSMETIC = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
"""Keys of config.json that change nothing here."""
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "merges.txt", "vocab.txt")
SEAL = "seal"
LARGEST = 1e15
"""Of weights: sums of their squares have to fit into fp32."""
DISTRUST = "the run cannot be trusted; start again in a new folder"


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """Content for a JSON file, with a hash over itself."""
    return content | {SEAL: _hash(content)}


def require_sealed(content: dict[str, Any], path: Path, hint: str = DISTRUST) -> dict[str, Any]:
    """The content of a JSON file, if it is as `sealed` made it; else UsageError."""
    if content.get(SEAL) != _hash({key: value for key, value in content.items() if key != SEAL}):
        raise UsageError(f"{path}: not what was written (changed, damaged, or of another version of pissa)", hint)
    return content


def hashes(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Hashes of files by name."""
    return {name: hash_file(folder / name) for name in names}


def require_files(folder: Path, expected: Mapping[str, str], hint: str) -> None:
    """UsageError with this hint if a file is missing or has changed since `hashes`; it names the file, and the first
    tensor with NaN in it."""
    for name, known in expected.items():
        path = folder / name
        try:
            if hash_file(path) == known:
                continue
            tensors = load_tensors(path) if path.suffix == ".safetensors" else {}
        except UsageError as error:
            error.hint = hint
            raise
        spoilt = next((f"; {key} holds NaN or infinite values" for key, t in tensors.items() if not_finite(t)), "")
        raise UsageError(f"{path}: not what was written{spoilt}", hint)


def model_facts(folder: Path) -> dict[str, str]:
    """What `require_model` compares of a model folder: `fingerprint` of its weights, and `settings`."""
    return {"fingerprint": fingerprint(folder), "settings": settings_hash(folder)}


def settings_hash(folder: Path) -> str:
    """A hash over what config.json says and over the files of the vocabulary."""
    there = [name for name in VOCABULARIES if (folder / name).is_file()]
    said = {key: value for key, value in read_settings(folder).items() if key not in COSMETIC}
    return _hash([said, hashes(folder, there)])


def read_settings(folder: Path) -> dict[str, Any]:
    """What config.json says; UsageError if it is missing, damaged, or cannot be written down again."""
    path = folder / "config.json"
    try:
        settings = json.loads(path.read_bytes())
        json.dumps(settings, ensure_ascii=False).encode()
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: missing or damaged ({error})", "bring the model's own file back") from None
    if not isinstance(settings, dict):
        raise UsageError(f"{path}: expected a JSON object", "bring the model's own file back")
    return settings


def require_model(folder: Path, facts: Mapping[str, Any], prefix: str = "") -> Path:
    """The folder, if its weights, configuration and vocabulary are those of `facts`; else UsageError."""
    found, expected = fingerprint(folder), facts[f"{prefix}fingerprint"]
    if found != expected:
        raise UsageError(
            f"{folder}: not the model this run was made on (fingerprint {found}, expected {expected})",
            "the adapter is only valid on its own base; use that, or start a new run with another --output",
        )
    if settings_hash(folder) != facts[f"{prefix}settings"]:
        raise UsageError(
            f"{folder}: config.json or the tokenizer's vocabulary has changed since this run was made",
            "bring the old files back (of a model on the Hub: set model.revision), or start a new run",
        )
    return folder


def not_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds NaN or infinite values."""
    return tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all())


def require_finite(name: str, tensor: Tensor, weights: Weights) -> None:
    """Refuse a tensor that spoils everything after it; UsageError names it and its file."""
    if not tensor.is_floating_point() or not tensor.numel():
        return
    low, high = torch.aminmax(tensor if tensor.element_size() > 1 else tensor.float())
    largest = max(-float(low), float(high))
    if not largest <= LARGEST:
        found = f"values up to {largest:.1e}" if math.isfinite(largest) else "NaN or infinite values"
        raise UsageError(
            f"{weights.files[name]}: {name} holds {found}", "this checkpoint is damaged; download it again"
        )


def _hash(content: Any) -> str:
    return f"xxh3:{xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())}"
