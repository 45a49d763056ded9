"""The run folder: what lies where, how it is written whole or not at all, and adapters as PEFT files."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pissa_cli.adapters.start import Factors
from pissa_cli.errors import PissaError, UsageError
from pissa_cli.weights import load_tensors, save_tensors

PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
PROVENANCE = "pissa.json"
_PEFT_PREFIX = "base_model.model."
_PEFT_FACTORS = {"A": "lora_A.weight", "B": "lora_B.weight"}


@dataclass(frozen=True)
class Run:
    """The paths of a run folder."""

    folder: Path

    @property
    def recipe(self) -> Path:
        return self.folder / "recipe.yaml"

    @property
    def manifest(self) -> Path:
        return self.folder / "manifest.json"

    @property
    def init(self) -> Path:
        return self.folder / "init"

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    @property
    def merged(self) -> Path:
        return self.folder / "merged"

    @property
    def quantized(self) -> Path:
        return self.folder / "quantized"

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    def exists(self) -> bool:
        """Whether init finished here."""
        return self.manifest.is_file() and self.recipe.is_file()

    def read_manifest(self) -> dict[str, Any]:
        """The manifest; UsageError if there is none, or it is not one of ours."""
        if not self.exists():
            raise UsageError(f"{self.folder}: not a run folder", "run `pissa init` or `pissa train` first")
        return read_json(self.manifest)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; UsageError names a file that is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: missing or damaged ({error})") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path}: expected a JSON object")
    return content


def write_text(path: Path, text: str) -> None:
    """Write a small file under a temporary name, then rename it into place."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _disk_error(path, error) from None


def write_json(path: Path, content: Any) -> None:
    """`write_text` of indented JSON."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """A temporary folder that becomes `final` when the block ends well, and vanishes otherwise.

    `final` is replaced if it is there. What a killed process left is cleared first: half-made folders are removed, and
    a `final` that was set aside but not yet replaced is put back.
    """
    aside = final.parent / f".{final.name}.aside"
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        if aside.is_dir() and not final.exists():
            aside.rename(final)
        for leftover in (aside, *final.parent.glob(f".{final.name}.tmp-*")):
            shutil.rmtree(leftover, ignore_errors=True)
        temporary = final.parent / f".{final.name}.tmp-{secrets.token_hex(4)}"
        temporary.mkdir()
    except OSError as error:
        raise _disk_error(final, error) from None
    try:
        yield temporary
        _put_in_place(temporary, final, aside)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _put_in_place(temporary: Path, final: Path, aside: Path) -> None:
    try:
        _sync(temporary)
        if final.is_dir() and any(final.iterdir()):
            final.rename(aside)
        temporary.rename(final)
        shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise _disk_error(final, error) from None


def write_peft(folder: Path, factors: dict[str, Factors], config: dict[str, Any]) -> None:
    """A PEFT LoRA folder. factors: layer name -> {"A": (r, in), "B": (out, r)}; config: see `peft_config`."""
    tensors = {
        f"{_PEFT_PREFIX}{layer}.{_PEFT_FACTORS[key]}": tensor.detach().float().cpu().contiguous()
        for layer, layer_factors in factors.items()
        for key, tensor in layer_factors.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / PEFT_WEIGHTS, tensors)
    write_json(folder / PEFT_CONFIG, config)


def read_peft(folder: Path) -> tuple[dict[str, Any], dict[str, Factors]]:
    """The configuration and factors of a PEFT LoRA folder, fp32. UsageError for files that are not what they claim."""
    config = read_json(folder / PEFT_CONFIG)
    names = {suffix: key for key, suffix in _PEFT_FACTORS.items()}
    factors: dict[str, Factors] = {}
    for key, tensor in load_tensors(folder / PEFT_WEIGHTS).items():
        layer, _, suffix = key.removeprefix(_PEFT_PREFIX).rpartition(".lora_")
        if f"lora_{suffix}" not in names:
            raise UsageError(f"{folder / PEFT_WEIGHTS}: unexpected tensor {key}", "only LoRA A and B are understood")
        factors.setdefault(layer, {})[names[f"lora_{suffix}"]] = tensor.float()
    for layer, pair in factors.items():
        if set(pair) != {"A", "B"} or pair["A"].shape[0] != pair["B"].shape[1]:
            raise UsageError(f"{folder / PEFT_WEIGHTS}: A and B of {layer} do not belong together")
    return config, factors


def peft_scale(config: dict[str, Any]) -> float:
    """s of a PEFT LoRA folder."""
    return float(config["lora_alpha"] / config["r"])


def peft_config(base: str, rank: int, scale: float, targets: list[str], fan_in_fan_out: bool) -> dict[str, Any]:
    """PEFT's adapter_config.json of a LoRA adapter with s = lora_alpha / r.

    `init_lora_weights` is always true: any other value makes PEFT decompose the base again on loading.
    """
    alpha = scale * rank
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "target_modules": targets,
        "fan_in_fan_out": fan_in_fan_out,
        "bias": "none",
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "inference_mode": True,
    }


def _sync(folder: Path) -> None:
    """Bring a folder's files to the disk, so that the rename never outruns their content."""
    for path in [*(p for p in folder.rglob("*") if p.is_file()), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _disk_error(path: Path, error: OSError) -> PissaError:
    return PissaError(
        f"{path}: cannot write: {error.strerror or error}", "nothing was lost; what was saved before is intact"
    )
