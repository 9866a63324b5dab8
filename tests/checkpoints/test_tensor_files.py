"""Files of tensors: what comes back is what was written, or nothing; found by name, and nowhere else."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec.core import url_to_fs

from lit_cka.checkpoints.tensor_files import TensorFile, find_tensors, read_tensors, write_tensors

NOTES: dict[str, Any] = {"id": "a", "layers": ["x", "y"], "gaps": [[0, 3]]}


def tensors() -> dict[str, torch.Tensor]:
    x = torch.arange(12.0).reshape(3, 4)
    return {
        "x": x,
        "its columns": x.T,
        "the same": x,
        "a view": x[1:],
        "bfloat16": x.bfloat16(),
        "keys": torch.tensor([[1, -1]]),
        "none": torch.empty(0, 2, dtype=torch.int64),
        "nan": torch.tensor([torch.nan, torch.inf]),
        "number": torch.tensor(2.0, dtype=torch.float64),
    }


def read(folder: Any, name: str = "a.safetensors") -> TensorFile | None:
    filesystem, root = url_to_fs(str(folder))
    return read_tensors(filesystem, f"{root}/{name}")


@pytest.mark.parametrize("remote", [False, True])
def test_there_and_back(tmp_path: Path, remote: bool) -> None:
    folder = f"memory://{tmp_path.name}/x" if remote else tmp_path / "x"
    write_tensors(folder, "a.safetensors", tensors(), NOTES)
    file = read(folder)
    assert file is not None
    assert file.notes == NOTES
    assert file.tensors.keys() == tensors().keys()
    for name, value in tensors().items():
        assert file.tensors[name].dtype == value.dtype
        torch.testing.assert_close(file.tensors[name], value, rtol=0, atol=0, equal_nan=True)
    filesystem, root = url_to_fs(str(folder))
    assert [Path(path).name for path in filesystem.ls(root, detail=False)] == ["a.safetensors"]


def test_no_damage_is_overlooked(tmp_path: Path) -> None:
    write_tensors(tmp_path, "a.safetensors", tensors(), NOTES)
    file = tmp_path / "a.safetensors"
    sound, chance = file.read_bytes(), random.Random(0)
    damaged = [sound[:length] for length in range(0, len(sound), max(len(sound) // 60, 1))]
    damaged += [bytes(len(sound)), b"torn", sound + b"\0"]
    damaged += [bytes(chance.randrange(256) for _ in range(chance.randrange(1, 300))) for _ in range(100)]
    for _ in range(300):
        flipped = bytearray(sound)
        flipped[chance.randrange(len(sound))] ^= 1 << chance.randrange(8)
        damaged.append(bytes(flipped))
    for content in damaged:
        file.write_bytes(content)
        found = read(tmp_path)
        if found is not None:  # a bit of the header that says nothing, such as a space
            assert found.notes == NOTES
            for name, value in tensors().items():
                torch.testing.assert_close(found.tensors[name], value, rtol=0, atol=0, equal_nan=True)
    assert read(tmp_path, "b.safetensors") is None


def test_a_sound_file_of_the_same_is_kept_and_any_other_replaced(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    write_tensors(tmp_path, "a.safetensors", tensors(), NOTES)
    first = file.stat().st_mtime_ns
    write_tensors(tmp_path, "a.safetensors", tensors(), NOTES)
    assert file.stat().st_mtime_ns == first
    for spoil in (lambda: file.write_bytes(b"torn"), lambda: write_tensors(tmp_path, file.name, {}, {"id": "b"})):
        spoil()
        write_tensors(tmp_path, "a.safetensors", tensors(), NOTES)
        found = read(tmp_path)
        assert found is not None
        assert found.notes == NOTES


def test_the_first_sound_file_that_says_the_same_is_found(tmp_path: Path) -> None:
    checkpoint, given = tmp_path / "run" / "checkpoints" / "last.ckpt", tmp_path / "given"
    beside, above = checkpoint.parent, checkpoint.parents[1]
    for number, folder in enumerate((beside, above, given)):
        write_tensors(folder, "a.safetensors", {"x": torch.tensor(number)}, {**NOTES, "number": number})

    def found(notes: dict[str, Any] = NOTES) -> int | None:
        file = find_tensors("a.safetensors", notes, checkpoint, [str(given)])
        return None if file is None else int(file.tensors["x"])

    assert found() == 0
    assert [found({"number": number}) for number in (0, 1, 2, 3)] == [0, 1, 2, None]
    assert found({"missing": None}) == 0
    (beside / "a.safetensors").write_bytes(b"torn")
    assert found() == 1
    (above / "a.safetensors").unlink()
    assert found() == 2
    (given / "a.safetensors").unlink()
    assert found() is None


@pytest.mark.parametrize(
    "name", ["", ".hidden", "../a.safetensors", "x/a.safetensors", "x\\a.safetensors", "memory://a"]
)
def test_names_that_are_paths_are_not_looked_for(tmp_path: Path, name: str) -> None:
    for place in (tmp_path, tmp_path / "x"):
        for existing in ("a.safetensors", ".hidden", "x\\a.safetensors"):
            write_tensors(place, existing, tensors(), NOTES)
    write_tensors("memory://", "a", tensors(), NOTES)
    assert find_tensors("a.safetensors", NOTES, tmp_path / "x" / "last.ckpt", []) is not None
    assert find_tensors(name, NOTES, tmp_path / "x" / "last.ckpt", []) is None
