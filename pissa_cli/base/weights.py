"""Safetensors checkpoints, tensor by tensor: read, fingerprint and write without ever holding the model."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pissa_cli.errors import UsageError, cannot_write
from pissa_cli.paths import is_lfs_pointer, kind_of

SHARD_BYTES = 256 * 2**20
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPE_NAMES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Dtypes by the names that safetensors gives them."""


@dataclass(frozen=True)
class Weights:
    """The tensors of a checkpoint folder: name -> file, in the order of the files, and where each lies in it."""

    folder: Path
    files: dict[str, Path]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    places: dict[str, tuple[int, int]]

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU, in memory of its own: mappings of files would pile up, and are limited in number."""
        begin, end = self.places[name]
        content = bytearray(end - begin)
        try:
            with self.files[name].open("rb") as file:
                file.seek(begin)
                if file.readinto(content) < len(content):
                    raise OSError("the file ends before the tensor does")
        except OSError as error:
            raise UsageError(
                f"{self.files[name]}: cannot read {name}: {error}",
                "the file is cut short or the disk fails; download the model again",
            ) from None
        if not content:
            return torch.empty(self.shapes[name], dtype=self.dtypes[name])
        return torch.frombuffer(content, dtype=self.dtypes[name]).view(self.shapes[name])

    def is_packed(self, name: str) -> bool:
        """Whether a weight is in NF4: its scales are beside it."""
        return f"{name}.absmax" in self.files

    def num_bytes(self) -> int:
        """The size of the files together."""
        return sum(file.stat().st_size for file in set(self.files.values()))


def open_weights(folder: Path) -> Weights:
    """Read the headers of all shards of `folder` and check them against each other.

    Raises UsageError for a folder without safetensors, a shard that is missing, cut short or not safetensors,
    and tensors of the index that their shard does not hold.
    """
    index: dict[str, str] = {}
    if (folder / INDEX).is_file():
        index = _read_index(folder / INDEX)
        shards = list(dict.fromkeys(index.values()))
    elif (folder / SINGLE).is_file():
        shards = [SINGLE]
    else:
        raise UsageError(
            f"{folder}: no {SINGLE} or {INDEX}",
            "pissa reads safetensors only; they are written by transformers.CLASS.from_pretrained(FOLDER)"
            ".save_pretrained(NEW), CLASS as config.json has it (architectures): another loses a head. The tokenizer's "
            "files belong there, too; on the Hub a revision may have them: --set model.revision=refs/pr/N",
        )
    files: dict[str, Path] = {}
    weights = Weights(folder, files, {}, {}, {})
    for shard in shards:
        path = folder / shard
        if path.parent != folder or kind_of(path) != "file":
            raise UsageError(f"{path}: this shard of the index is missing", "download the model again")
        try:
            with safe_open(path, framework="pt"):
                _read_header(path, weights)
        except (SafetensorError, OSError) as error:
            if is_lfs_pointer(path):
                raise UsageError(f"{path}: a pointer of Git LFS, not the weights", "fetch them: git lfs pull") from None
            raise UsageError(f"{path}: truncated or damaged safetensors file ({error})", "download it again") from None
    missing = [name for name, shard in index.items() if files.get(name) != folder / shard]
    if missing:
        raise UsageError(
            f"{folder / index[missing[0]]}: tensor {missing[0]} of the index is not in this shard",
            "index and shards do not belong together; download the model again",
        )
    return weights


def _read_index(path: Path) -> dict[str, str]:
    try:
        index = json.loads(path.read_bytes())["weight_map"]
        if isinstance(index, dict) and all(isinstance(shard, str) and shard.isprintable() for shard in index.values()):
            return index
        reason = "weight_map has to name the file of every tensor"
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = repr(error)
    raise UsageError(f"{path}: damaged index ({reason})", "download the model again")


def _read_header(path: Path, weights: Weights) -> None:
    """Add the tensors of a file that safetensors accepts. UsageError for a dtype that torch lacks."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if entry["dtype"] not in DTYPE_NAMES:
            raise UsageError(
                f"{path}: {name} has dtype {entry['dtype']}, which is not understood",
                "convert the checkpoint to bf16, fp16 or fp32",
            )
        begin, end = entry["data_offsets"]
        weights.files[name] = path
        weights.shapes[name] = tuple(entry["shape"])
        weights.dtypes[name] = DTYPE_NAMES[entry["dtype"]]
        weights.places[name] = 8 + length + begin, 8 + length + end


class Fingerprint:
    """A hash over names, dtypes, shapes and bytes of tensors; the same whatever the order or the sharding."""

    def __init__(self) -> None:
        self._parts: dict[str, str] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        raw = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data
        self._parts[name] = f"{tensor.dtype} {tuple(tensor.shape)} {xxhash.xxh3_128_hexdigest(raw)}"

    def digest(self) -> str:
        lines = "\n".join(f"{name} {part}" for name, part in sorted(self._parts.items()))
        return f"xxh3:{xxhash.xxh3_128_hexdigest(lines.encode())}"


def fingerprint(folder: Path) -> str:
    """The fingerprint of the checkpoint in a folder; its bytes are read once a process unless a file changes."""
    stats = [(file, file.stat()) for file in sorted(set(open_weights(folder).files.values()))]
    return _fingerprint(folder, tuple((str(file), stat.st_size, stat.st_mtime_ns) for file, stat in stats))


@functools.lru_cache(maxsize=4)
def _fingerprint(folder: Path, _files: tuple[tuple[str, int, int], ...]) -> str:
    weights, whole = open_weights(folder), Fingerprint()
    for name in weights.files:
        whole.add(name, weights.read(name))
    return whole.digest()


def hash_file(path: Path) -> str:
    """A hash of a file's bytes; UsageError if it is missing, or no file but something that would be waited for."""
    _require_file(path)
    whole = xxhash.xxh3_128()
    try:
        with path.open("rb") as file:
            while chunk := file.read(2**24):
                whole.update(chunk)
    except OSError as error:
        raise UsageError(
            f"{path}: {error.strerror or error}", "bring the file back, or make the folder that holds it again"
        ) from None
    return f"xxh3:{whole.hexdigest()}"


class ShardWriter:
    """Writes tensors as they come to `folder`, in shards of about 256 MB; `close` writes the index."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._pending: dict[str, Tensor] = {}
        self._shards: list[list[str]] = []
        self.total_bytes = 0
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, name: str, tensor: Tensor) -> None:
        self._pending[name] = tensor.detach().contiguous().cpu()
        self.total_bytes += tensor.numel() * tensor.element_size()
        if sum(t.numel() * t.element_size() for t in self._pending.values()) >= SHARD_BYTES:
            self._flush()

    def close(self) -> None:
        if self._pending:
            self._flush()
        total = len(self._shards)
        if total == 1:
            self._temporary(0).rename(self.folder / SINGLE)
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._shards):
            final = f"model-{number + 1:05d}-of-{total:05d}.safetensors"
            self._temporary(number).rename(self.folder / final)
            weight_map |= dict.fromkeys(names, final)
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
        (self.folder / INDEX).write_text(json.dumps(index, indent=2))

    def _flush(self) -> None:
        save_tensors(self._temporary(len(self._shards)), self._pending)
        self._shards.append(list(self._pending))
        self._pending = {}

    def _temporary(self, number: int) -> Path:
        return self.folder / f"shard-{number}.part"


class StreamWriter:
    """Writes fp32 tensors of known shapes into one safetensors file as they come, in any order, keeping none."""

    def __init__(self, path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
        self._path, self._left = path, dict(shapes)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, shape in shapes.items():
            begin, end = end, end + 4 * math.prod(shape)
            header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._begins = {name: 8 + len(text) + header[name]["data_offsets"][0] for name in shapes}
        with self._failures():
            self._file = path.open("wb")
            self._file.write(len(text).to_bytes(8, "little") + text)

    def add(self, name: str, tensor: Tensor) -> None:
        if self._left.pop(name) != tuple(tensor.shape):
            raise ValueError(f"{name}: announced with another shape than {tuple(tensor.shape)}")
        with self._failures():
            self._file.seek(self._begins[name])
            self._file.write(tensor.detach().float().contiguous().cpu().numpy().data)

    def close(self) -> None:
        if self._left:
            raise ValueError(f"never written: {', '.join(self._left)}")
        with self._failures():
            self._file.close()

    @contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise cannot_write(self._path, error) from None


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write one safetensors file; a failing disk is a PissaError that names the file."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
        let_read(path)
    except (OSError, SafetensorError) as error:
        raise cannot_write(path, error) from None


def let_read(path: Path) -> None:
    """Have a file that safetensors wrote, which gives it 0600, read by whoever may read its folder."""
    path.chmod(path.parent.stat().st_mode & 0o666)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read one safetensors file whole; a missing or damaged file is a UsageError that names it."""
    _require_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.offset_keys()}
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path}: missing or damaged ({error})", "bring the file back, or make it again") from None


def _require_file(path: Path) -> None:
    if kind_of(path) != "file":
        raise UsageError(f"{path}: missing, or not a file", "bring the file back, or make it again")
