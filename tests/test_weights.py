"""Reading checkpoints tensor by tensor, against safetensors itself."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pissa_cli import weights as module
from pissa_cli.errors import UsageError
from pissa_cli.weights import DTYPE_NAMES, ShardWriter, open_weights


def saved(folder: Path) -> dict[str, Tensor]:
    torch.manual_seed(0)
    tensors = {name: (torch.randn(3, 5) * 9).abs().to(dtype) for name, dtype in DTYPE_NAMES.items()}
    tensors |= {"empty": torch.empty(0, 4), "number": torch.tensor(3.5), "cube": torch.randn(2, 3, 4).bfloat16()}
    save_file(tensors, folder / "model.safetensors")
    return tensors


def test_reads_what_safetensors_reads(tmp_path: Path) -> None:
    tensors, weights = saved(tmp_path), open_weights(tmp_path)
    theirs = load_file(tmp_path / "model.safetensors")
    assert set(weights.files) == set(theirs) == set(tensors)
    for name, tensor in theirs.items():
        found = weights.read(name)
        assert found.dtype == tensor.dtype and found.shape == tensor.shape == weights.shapes[name]
        assert torch.equal(found.view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8))


@pytest.mark.skipif(sys.platform != "linux", reason="counts mappings in /proc")
def test_tensors_that_are_kept_hold_no_mapping(tmp_path: Path) -> None:
    """A process may have 65,530; a mixture of experts in NF4 has more tensors."""
    save_file({f"t{i}": torch.full((4,), float(i)) for i in range(500)}, tmp_path / "model.safetensors")
    weights = open_weights(tmp_path)

    def mappings() -> int:
        return Path("/proc/self/maps").read_text().count(str(tmp_path))

    kept = [weights.read(name) for name in weights.files]
    assert mappings() == 0
    assert sorted(float(tensor[0]) for tensor in kept) == list(range(500))


def test_a_file_that_is_cut_meanwhile(tmp_path: Path) -> None:
    saved(tmp_path)
    weights = open_weights(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    last = max(weights.places, key=lambda name: weights.places[name][1])
    with pytest.raises(UsageError, match="the file ends before the tensor does"):
        weights.read(last)


@pytest.mark.parametrize(("shard_bytes", "shards"), [(24, ["a b", "c", "d"]), (25, ["a b c", "d"]), (100, ["a b c d"])])
def test_shards_are_closed_once_they_are_large(
    shard_bytes: int, shards: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SHARD_BYTES", shard_bytes)
    sizes, writer = {"a": 4, "b": 2, "c": 6, "d": 1}, ShardWriter(tmp_path / "made")
    tensors = {name: torch.full((size,), float(size)) for name, size in sizes.items()}
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.close()
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else ["model.safetensors"]
    index = {"model.safetensors.index.json"} if len(shards) > 1 else set()
    assert {path.name for path in (tmp_path / "made").iterdir()} == {*names, *index}
    found = {name: load_file(tmp_path / "made" / name) for name in names}
    assert [" ".join(sorted(part)) for part in found.values()] == shards
    torch.testing.assert_close({key: t for part in found.values() for key, t in part.items()}, tensors)
    for path in index:
        said = json.loads((tmp_path / "made" / path).read_text())
        assert said["weight_map"] == {key: name for name, part in found.items() for key in part}
        assert said["metadata"] == {"total_size": 4 * sum(sizes.values())}
    assert writer.total_bytes == 52 and set(open_weights(tmp_path / "made").files) == set(tensors)
