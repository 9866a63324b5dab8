"""The place where an edit works: for one job at a time, nobody else's, and nothing is replaced, whatever the moment."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_cka.editing.files import edit_files
from lit_cka.editing.lock import OutputLock
from lit_cka.editing.parameter import edit_parameter
from lit_cka.files import place_new

KINDS = ["safetensors", "state dict", "folder"]


def weights(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"{name}.weight": torch.randn(5, 7, generator=generator) for name in ("a", "b", "c")}


def paths(folder: Path, kind: str) -> tuple[Path, Path, Path]:
    """Two models, and where the edited one is to be."""
    suffix = {"safetensors": ".safetensors", "state dict": ".pt", "folder": ""}[kind]
    made = [folder / f"{name}{suffix}" for name in ("before", "after", "out")]
    for seed, path in enumerate(made[:2]):
        if kind == "state dict":
            torch.save(weights(seed), path)
        elif kind == "folder":
            path.mkdir()
            (path / "config.json").write_text("{}")
            save_file(weights(seed), path / "model.safetensors")
        else:
            save_file(weights(seed), path)
    return made[0], made[1], made[2]


def content(path: Path) -> Any:
    if path.is_dir():
        return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    return path.read_bytes()


def edit(*where: Path, **options: Any) -> Any:
    return edit_files(*where, progress=False, **options)


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


class Killed(BaseException):
    """The process is no more."""


CALLS = ["replace", "rename", "link", "unlink", "rmdir", "fsync", "mkdir"]


@contextmanager
def killed_before(call: int) -> Iterator[list[str]]:
    """From so manyth call on that changes files, none does anything: also not what would clean up."""
    made: list[str] = []

    def replaced(name: str, original: Any) -> Any:
        def function(*args: Any, **options: Any) -> Any:
            made.append(name)
            if len(made) >= call:
                raise Killed
            return original(*args, **options)

        return function

    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, replaced(name, getattr(os, name)))
        yield made


@pytest.mark.filterwarnings("ignore:What was in .* of another job")  # where not even the note was written
@pytest.mark.parametrize("deleted", [False, True], ids=["kept", "deleted"])
@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_any_step_and_started_again(tmp_path: Path, kind: str, deleted: bool) -> None:
    """At whatever step: the same bytes, also where the output was deleted before the second start; nothing is left."""
    before, after, out = paths(tmp_path, kind)
    edit(before, after, out, report=tmp_path / "report.json")
    wanted, told = content(out), content(tmp_path / "report.json")
    everything = names_in(tmp_path)
    call, is_through = 0, False
    while not is_through:
        call += 1
        for path in (out, tmp_path / "report.json", tmp_path / f"{out.name}.partial"):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        try:
            with killed_before(call):
                edit(before, after, out, report=tmp_path / "report.json")
            is_through = True
        except Killed:
            pass
        was_placed = os.path.lexists(out)
        if deleted and was_placed:
            shutil.rmtree(out) if out.is_dir() else out.unlink()
        try:
            edit(before, after, out, report=tmp_path / "report.json")
        except FileExistsError:  # an edit that is through, or all but: only its files are there
            assert was_placed, call
            assert content(tmp_path / "report.json") == told, call
            if deleted:
                continue
        assert content(out) == wanted, call
        assert content(tmp_path / "report.json") == told, call
        for path in tmp_path.glob(".*"):
            assert path.name.startswith((".partial-", ".out")), path  # what the "killed" process was writing, its lock
            path.unlink()
        assert names_in(tmp_path) - {f"{out.name}.partial"} == everything, call
        partial = tmp_path / f"{out.name}.partial"
        assert not partial.exists() or not any(partial.iterdir())
    assert call > 15


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("placed", [False, True])
def test_a_finished_edit_is_not_worked_on(
    tmp_path: Path, kind: str, placed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole, but not in its place yet, or there with the folder left to remove: the second start computes nothing."""
    before, after, out = paths(tmp_path, kind)
    records = edit(before, after, tmp_path / f"whole{out.suffix}")
    with monkeypatch.context() as patch:
        stops: Any = "lit_cka.editing.partial.PartialOutput." + ("discard" if placed else "place")
        original = edit_files.__globals__["PartialOutput"].discard

        def stop(partial: Any, *args: Any, **options: Any) -> None:
            if not placed or (partial.folder / "job.json").exists():
                raise Killed
            original(partial)

        patch.setattr(stops, stop)
        with pytest.raises(Killed):
            edit(before, after, out)
    assert out.exists() is placed
    monkeypatch.setattr("lit_cka.editing.files.edit_parameter", None)
    assert edit(before, after, out) == records
    assert content(out) == content(tmp_path / f"whole{out.suffix}")
    assert not list(tmp_path.glob("out*.partial"))


def foreign(folder: Path, what: str) -> None:
    """Something of the user's at the place where the edit works."""
    if what in ("note", "other program's note", "old note", "note of bytes"):
        folder.mkdir()
        (folder / "results.npz").write_text("precious")
        notes = {"note": b'{"my": "slurm job"}', "other program's note": b'{"format": "tool 1", "job": {}}'}
        (folder / "job.json").write_bytes(notes.get(what, b"\xff\x00[" if what == "note of bytes" else b"{}"))
    elif what == "note that is a pipe":
        folder.mkdir()
        os.mkfifo(folder / "job.json")
    elif what == "names like ours":
        folder.mkdir()
        (folder / "output").write_text("precious")
        (folder / "journal-0.jsonl").write_text("precious")
    elif what == "file":
        folder.write_text("precious")
    elif what == "link":
        (folder.parent / "elsewhere").mkdir()
        (folder.parent / "elsewhere" / "x").write_text("precious")
        folder.symlink_to(folder.parent / "elsewhere")
    elif what == "link to nothing":
        folder.symlink_to(folder.parent / "nowhere")
    elif what == "pipe":
        os.mkfifo(folder)


FOREIGN = [
    "note", "other program's note", "old note", "note of bytes", "note that is a pipe", "names like ours", "file",
    "link", "link to nothing", "pipe",
]  # fmt: skip


@pytest.mark.parametrize("what", FOREIGN)
def test_a_folder_of_the_user_s_is_left_alone(tmp_path: Path, what: str) -> None:
    before, after, out = paths(tmp_path, "safetensors")
    foreign(tmp_path / "out.safetensors.partial", what)
    held = {path: (path.lstat().st_ino, path.lstat().st_mtime_ns) for path in tmp_path.rglob("*")}
    with pytest.raises(ValueError, match=r"Expected no folder .*out.safetensors.partial"):
        edit(before, after, out)
    assert {path: (path.lstat().st_ino, path.lstat().st_mtime_ns) for path in tmp_path.rglob("*")} == held


def test_what_a_user_puts_beside_an_edit_outlives_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, after, out = paths(tmp_path, "safetensors")
    with monkeypatch.context() as patch:
        patch.setattr("lit_cka.editing.files._Job._edit", None)
        with pytest.raises(TypeError):
            edit(before, after, out)
    (tmp_path / "out.safetensors.partial" / "notes.txt").write_text("mine")
    edit(before, after, out)
    assert content(tmp_path / "out.safetensors.partial") == {"notes.txt": b"mine"}


APPEARED = ["file", "empty file", "folder", "empty folder", "link to nothing", "pipe"]


def appear(path: Path, what: str) -> None:
    if what == "folder":
        path.mkdir()
        (path / "x").write_text("someone else's")
    elif what == "empty folder":
        path.mkdir()
    elif what == "link to nothing":
        path.symlink_to(path.parent / "nowhere")
    elif what == "pipe":
        os.mkfifo(path)
    else:
        path.write_text("someone else's" if what == "file" else "")


def kept(path: Path) -> Any:
    return (path.lstat().st_ino, path.lstat().st_mode, names_in(path) if path.is_dir() else path.lstat().st_size)


@pytest.mark.parametrize("what", APPEARED)
@pytest.mark.parametrize("kind", KINDS)
def test_what_has_come_into_being_at_the_output_is_kept(
    tmp_path: Path, kind: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after, out = paths(tmp_path, kind)
    records = edit(before, after, tmp_path / f"whole{out.suffix}")
    found: list[Any] = []

    def appearing(*args: Any, **options: Any) -> Any:
        if not found:
            appear(out, what)
            found.append(kept(out))
        return edit_parameter(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr("lit_cka.editing.files.edit_parameter", appearing)
        with pytest.raises(FileExistsError, match=r"come into being meanwhile.*finished, in '.*out\S*.partial/output'"):
            edit(before, after, out)
    assert kept(out) == found[0]
    if what != "empty folder" or kind != "folder":  # which may be there at the start
        with pytest.raises(FileExistsError, match=r"come into being meanwhile"):
            edit(before, after, out)
        assert kept(out) == found[0]
        out.rename(tmp_path / "moved")
    monkeypatch.setattr("lit_cka.editing.files.edit_parameter", None)  # nothing is computed again
    assert edit(before, after, out) == records
    assert content(out) == content(tmp_path / f"whole{out.suffix}")
    assert not list(tmp_path.glob("out*.partial"))


@pytest.mark.parametrize("what", ["file", "link to nothing", "pipe", "folder"])
def test_what_has_come_into_being_at_the_report_is_kept(
    tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after, out = paths(tmp_path, "safetensors")
    report, found = tmp_path / "report.csv", []

    def appearing(*args: Any, **options: Any) -> Any:
        if not found:
            appear(report, what)
            found.append(kept(report))
        return edit_parameter(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr("lit_cka.editing.files.edit_parameter", appearing)
        with pytest.raises(FileExistsError, match=r"Expected `report` to be new.*weights are in '.*out.safetensors'"):
            edit(before, after, out, report=report)
    assert kept(report) == found[0]
    assert set(load_file(out)) == set(weights(0))
    with pytest.raises(OSError, match=r"Expected `report` to be"):
        edit(before, after, out, report=report)
    edit(before, after, out, report=tmp_path / "other.csv")
    assert kept(report) == found[0]
    assert len((tmp_path / "other.csv").read_text().splitlines()) == 4
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("what", [*APPEARED, "link to an empty folder", "link in a circle"])
@pytest.mark.parametrize("which", ["output", "report"])
def test_what_is_there_at_the_start_is_an_error_before_the_work(
    tmp_path: Path, which: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after, out = paths(tmp_path, "folder")
    target = out if which == "output" else tmp_path / "report.json"
    if what == "link to an empty folder":
        (tmp_path / "empty").mkdir()
        target.symlink_to(tmp_path / "empty")
    elif what == "link in a circle":
        target.symlink_to(target)
    else:
        appear(target, what)
    if (which, what) == ("output", "empty folder"):
        edit(before, after, out)
        assert names_in(out) == {"config.json", "model.safetensors"}
        return
    held = kept(target)
    monkeypatch.setattr("lit_cka.editing.files.edit_parameter", None)
    with pytest.raises(OSError, match=f"Expected `{which}` to be"):
        edit(before, after, out, report=tmp_path / "report.json")
    assert kept(target) == held
    assert not {"out.partial", ".out.lit_cka-lock"} & names_in(tmp_path)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
@pytest.mark.parametrize("where", ["pretrained", "finetuned", "only shard", "tokenizer"])
def test_what_is_no_file_is_an_error_and_no_waiting(tmp_path: Path, where: str, kind: str) -> None:
    before, after, out = paths(tmp_path, "folder" if where in ("only shard", "tokenizer") else "safetensors")
    place = {
        "pretrained": before,
        "finetuned": after,
        "only shard": before / "model.safetensors",
        "tokenizer": after / "tokenizer.json",
    }[where]
    place.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as bound:
        if kind == "socket":
            here = Path.cwd()
            os.chdir(place.parent)  # the path of a socket may have 108 bytes
            bound.bind(place.name)
            os.chdir(here)
        elif kind == "pipe":
            os.mkfifo(place)
        else:
            place.symlink_to("/dev/zero")
        with pytest.raises(ValueError, match=f"Expected .*({place.name}|{place.parent.name})"):
            edit(before, after, out)
    assert not {path.name for path in tmp_path.iterdir()} & {out.name, f"{out.name}.partial"}


@pytest.mark.parametrize("what", ["file in the way", "link to nothing in the way", "no right"])
def test_folders_that_can_not_be_written_to(tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before, after, _ = paths(tmp_path, "safetensors")
    folder = tmp_path / "folder"
    if what == "file in the way":
        folder.write_text("")
    elif what == "link to nothing in the way":
        folder.symlink_to(tmp_path / "nowhere")
    else:
        folder.mkdir()
        access = os.access
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != folder and access(path, mode))
    told = "Permission denied" if what == "no right" else "Expected `output` to be a folder that can be written to"
    with pytest.raises((ValueError, PermissionError), match=told):
        edit(before, after, folder / "below" / "out.safetensors")


class TestLock:
    def test_one_job_at_a_time(self, tmp_path: Path) -> None:
        before, after, out = paths(tmp_path, "safetensors")
        with OutputLock(out) as lock:
            lock.take()
            held = names_in(tmp_path)
            for same in (out, tmp_path / "." / out.name, Path(os.path.relpath(out))):
                with pytest.raises(
                    FileExistsError, match=rf"process {os.getpid()} on \S+ is writing .*out.safetensors"
                ):
                    edit(before, after, same)
            assert names_in(tmp_path) == held
            edit(before, after, tmp_path / "other.safetensors")
        edit(before, after, out)
        assert not list(tmp_path.glob(".*"))

    def test_a_killed_job_leaves_no_lock(self, tmp_path: Path) -> None:
        before, after, out = paths(tmp_path, "safetensors")
        code = (
            "import os, sys; from pathlib import Path; from lit_cka.editing.lock import OutputLock\n"
            "with OutputLock(Path(sys.argv[1])) as lock:\n"
            "    lock.take()\n    print('held', flush=True)\n    sys.stdin.read()"
        )
        root = str(Path(__file__).parents[2])
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(out)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": root},
        )  # fmt: skip
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(FileExistsError, match=f"process {process.pid} on"):
            edit(before, after, out)
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()
        assert (tmp_path / ".out.safetensors.lit_cka-lock").exists()
        edit(before, after, out)
        assert not list(tmp_path.glob(".*"))

    def test_a_file_that_was_removed_is_no_lock(self, tmp_path: Path) -> None:
        with OutputLock(tmp_path / "out") as first, OutputLock(tmp_path / "out") as second:
            first.take()
            (tmp_path / ".out.lit_cka-lock").unlink()
            second.take()  # of a new file
            assert (tmp_path / ".out.lit_cka-lock").exists()

    def test_a_file_system_without_locks_is_said(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        before, after, out = paths(tmp_path, "safetensors")

        def refuse(*args: Any) -> None:
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr("fcntl.flock", refuse)
        with pytest.warns(UserWarning, match=r"Nothing keeps a second job from writing .*No locks available"):
            edit(before, after, out)
        assert out.exists()

    def test_a_system_without_locks_is_said(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "fcntl", None)
        with pytest.warns(UserWarning, match="this system has no such locks"):
            edit(*paths(tmp_path, "safetensors"))

    def test_a_pipe_in_its_place(self, tmp_path: Path) -> None:
        before, after, out = paths(tmp_path, "safetensors")
        os.mkfifo(tmp_path / ".out.safetensors.lit_cka-lock")
        with pytest.raises(FileExistsError, match="the file of a lock"):
            edit(before, after, out)


class TestPlaceNew:
    @pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
    def test_a_file(self, tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*args: Any) -> None:
            raise PermissionError(errno.EPERM, "Operation not permitted")

        if not links:
            monkeypatch.setattr(os, "link", refuse)
        for name in ("a", "b"):
            (tmp_path / name).write_text(name)
        with pytest.raises(FileExistsError, match=r"'.*b' exists already"):
            place_new(tmp_path / "a", tmp_path / "b")
        place_new(tmp_path / "a", tmp_path / "c")
        assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"b": "b", "c": "a"}

    def test_other_errors_come_through(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            place_new(tmp_path / "a", tmp_path / "c")
        assert not names_in(tmp_path)


def test_a_journal_with_strange_lines_counts_what_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, after, out = paths(tmp_path, "safetensors")
    edit(before, after, tmp_path / "whole.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr("lit_cka.editing.partial.PartialOutput.note_whole", None)
        with pytest.raises(TypeError):
            edit(before, after, out)
    journal = tmp_path / "out.safetensors.partial" / "journal-0.jsonl"
    lines = journal.read_text().splitlines()
    journal.write_bytes("\n".join([lines[0], "3", "{}", '"x"', "[1]", lines[1]]).encode() + b"\n\xff\xfe\n")
    assert len(json.loads(lines[2])) == 11
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        edit(before, after, out)
    assert content(out) == content(tmp_path / "whole.safetensors")
