"""Reading checkpoints tensor by tensor, against safetensors itself."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pissa_cli.base import weights as module
from pissa_cli.base.integrity import model_facts, require_finite, require_model
from pissa_cli.base.weights import DTYPE_NAMES, ShardWriter, fingerprint, open_weights
from pissa_cli.errors import UsageError


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


def test_only_floating_point_numbers_can_be_damaged(tmp_path: Path) -> None:
    """A large identifier is none, and where nothing is there is no largest."""
    tensors, weights = saved(tmp_path), open_weights(tmp_path)
    for name, tensor in (tensors | {"identifier": torch.tensor([2**62])}).items():
        require_finite(name, tensor, weights)


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


def test_a_model_is_known_by_names_types_shapes_and_bytes_and_not_by_its_files(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {name: torch.randn(4, 6).bfloat16() for name in ("a.weight", "b.weight", "c.weight")}
    a, b = tensors["a.weight"], tensors["b.weight"]

    def known(*files: dict[str, Tensor]) -> str:
        folder = tmp_path / f"model{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        if len(files) == 1:
            save_file(files[0], folder / "model.safetensors")
            return fingerprint(folder)
        for number, part in enumerate(files):
            save_file(part, folder / f"{number}.safetensors")
        places = {name: f"{number}.safetensors" for number, part in enumerate(files) for name in part}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
        return fingerprint(folder)

    one = known(tensors)
    assert one == known({"c.weight": tensors["c.weight"]}, {"b.weight": b, "a.weight": a})
    flipped = a.clone()
    flipped.view(torch.int16)[3, 5] ^= 1
    changed = [
        tensors | {"a.weight": flipped},
        tensors | {"a.weight": b, "b.weight": a},
        tensors | {"a.weight": a.view(6, 4)},
        tensors | {"a.weight": a.view(torch.float16)},
        {"a.weight": a, "b.weight": b, "d.weight": tensors["c.weight"]},
        {"a.weight": a, "b.weight": b},
    ]
    others = {known(change) for change in changed}
    assert len(others) == 6 and one not in others


def test_a_base_is_refused_whose_settings_or_vocabulary_changed(models: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(models("llama"), folder)
    for name in ("tokenizer.model", "spiece.model", "vocab.json", "merges.txt", "vocab.txt"):
        (folder / name).write_text("a b")
    config, facts = folder / "config.json", model_facts(folder)
    settings = json.loads(config.read_text())
    config.write_text(json.dumps(settings | {"_name_or_path": "elsewhere", "transformers_version": "4.0.0"}))
    (folder / "README.md").write_text("new")
    assert require_model(folder, facts) == folder
    for name in ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "merges.txt", "vocab.txt"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content + b" ")
        with pytest.raises(UsageError, match="vocabulary has changed"):
            require_model(folder, facts)
        (folder / name).write_bytes(content)
    assert require_model(folder, facts) == folder
    config.write_text(json.dumps(settings | {"rope_theta": 5e5, "rms_norm_eps": 1e-5}))
    with pytest.raises(UsageError, match="vocabulary has changed"):
        require_model(folder, facts)
