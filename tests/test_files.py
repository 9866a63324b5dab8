"""Files appear whole or not at all, under names that are nobody else's, and hold what any reader of JSON takes."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from lit_cka.files import (
    file_name,
    is_partial,
    partial_name,
    sync,
    versions,
    write_bytes,
    write_json,
    write_text,
    written_whole,
)


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def write_half(path: Path, error: BaseException) -> None:
    with written_whole(path) as partial:
        partial.write_text("half")
        raise error


def write_half_a_folder(path: Path, error: BaseException) -> None:
    with written_whole(path) as partial:
        partial.mkdir()
        (partial / "config.json").write_text("{}")
        raise error


@pytest.mark.parametrize("durable", [False, True])
def test_a_file_appears_when_the_block_ends(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "new" / "folder" / "table.csv"
    with written_whole(path, durable=durable) as partial:
        assert partial.parent == path.parent  # or it could not be moved at once
        assert partial.suffix == ".csv"
        partial.write_text("half")
        assert not path.exists()
        partial.write_text("whole")
    assert path.read_text() == "whole"
    assert names_in(path.parent) == {"table.csv"}


def test_a_durable_file_is_on_the_disk_before_it_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, fsync, seen = tmp_path / "a.txt", os.fsync, []

    def note(descriptor: int) -> None:
        seen.append(path.exists())
        fsync(descriptor)

    monkeypatch.setattr("os.fsync", note)
    write_bytes(path, b"a")
    assert seen == []
    path.unlink()
    write_bytes(path, b"a", durable=True)
    assert seen == [False]


def test_a_file_that_was_there_stays_until_the_block_ends(tmp_path: Path) -> None:
    path = write_text(tmp_path / "a.txt", "old")
    with written_whole(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_block_that_fails_leaves_what_was_there(tmp_path: Path, error: type[BaseException]) -> None:
    path = write_text(tmp_path / "a.txt", "old")
    with pytest.raises(error):
        write_half(path, error())
    assert names_in(tmp_path) == {"a.txt"}
    assert path.read_text() == "old"


def test_a_folder_is_written_whole_too(tmp_path: Path) -> None:
    with written_whole(tmp_path / "model") as partial:
        partial.mkdir()
        (partial / "config.json").write_text("{}")
        assert not (tmp_path / "model").exists()
    assert names_in(tmp_path / "model") == {"config.json"}
    with pytest.raises(RuntimeError, match="full"):
        write_half_a_folder(tmp_path / "other", RuntimeError("full"))
    assert names_in(tmp_path) == {"model"}


def test_writers_of_the_same_file_do_not_meet(tmp_path: Path) -> None:
    """Threads of one process as little as several processes: the file is always the whole of one of them."""
    path = tmp_path / "shared.txt"
    contents = [letter * 100_000 for letter in "abcdefgh"]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda content: write_text(path, content), contents * 5))
    assert path.read_text() in contents
    assert names_in(tmp_path) == {"shared.txt"}


def test_a_name_in_the_making(tmp_path: Path) -> None:
    names = {partial_name("weights.safetensors") for _ in range(100)}
    assert len(names) == 100
    assert all(name.startswith(".") and name.endswith("weights.safetensors") for name in names)
    assert all(str(os.getpid()) in name and is_partial(tmp_path / name) for name in names)
    assert not is_partial(tmp_path / "weights.safetensors")
    write_text(tmp_path / f"{'ü' * 120}.txt", "fits")  # 244 of the 255 bytes that a name may have
    assert len(names_in(tmp_path)) == 1


def test_no_random_number_is_drawn(tmp_path: Path) -> None:
    """A training that writes a report draws the same numbers as one that does not."""
    states = random.getstate(), np.random.get_state()
    write_text(tmp_path / "a.txt", "a")
    assert random.getstate() == states[0]
    assert all(map(np.array_equal, np.random.get_state(), states[1]))


def test_bytes_and_text_are_as_they_were_given(tmp_path: Path) -> None:
    assert write_bytes(tmp_path / "a.bin", b"\x00\r\n\xff").read_bytes() == b"\x00\r\n\xff"
    assert write_text(str(tmp_path / "a.txt"), "λ\n").read_bytes() == "λ\n".encode()
    sync(tmp_path)
    sync(tmp_path / "a.txt")


def test_json_has_no_number_that_is_not_finite(tmp_path: Path) -> None:
    content = {"a": [np.float64("nan"), float("inf"), 1.5], 3: np.arange(2), "path": Path("x"), "none": None}
    read = json.loads(write_json(tmp_path / "a.json", content, durable=True).read_text(), parse_constant=pytest.fail)
    assert read == {"a": [None, None, 1.5], "3": [0, 1], "path": "x", "none": None}


def test_names_of_files() -> None:
    assert file_name("google/vit-base_patch16 224.in1k") == "google_vit-base_patch16_224_in1k"
    assert file_name("../..") == "_____"
    assert file_name("") == "_"
    assert len(file_name("ü" * 100).encode()) <= 60


def test_versions() -> None:
    found = versions()
    assert {"python", "torch", "lightning", "lit-cka"} <= set(found)


def test_nothing_heavy_is_imported() -> None:
    code = "import sys, lit_cka.files; print(sorted({'torch', 'numpy', 'lightning'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "[]\n"
