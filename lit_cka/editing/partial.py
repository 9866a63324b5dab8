"""An output in the making: beside its place, with a journal of what is finished, so that a killed job can go on."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from lit_cka.editing.parameter import ParameterRecord
from lit_cka.files import is_partial, place_new, sync, write_bytes

_FORMAT = "lit_cka unfinished edit 1"  # by which a folder is known as ours
_NOTE, _JOURNAL = "job.json", "journal-"


class PartialOutput:
    """The folder `<output>.partial`: a note of the job, a journal per process, and the output as far as it is.

    Once all of it is whole, the note says so, with the records and what tells the output from other files: from then on
    it is put in its place, and not worked on.

    Attributes:
        folder: all of it.
        staged: the output itself, a file or a folder.

    Args:
        output: where the output will be.
        job: what it is made of and how, JSON; what was begun for another job is of no use.
    """

    def __init__(self, output: Path, job: dict[str, Any]) -> None:
        self.output, self.folder = output, output.with_name(f"{output.name}.partial")
        self.staged = self.folder / "output"
        self._job = json.loads(json.dumps(job))

    def exists(self) -> bool:
        return os.path.lexists(self.folder)

    def require_own(self) -> None:
        """Raise a ValueError if something of this name is there that is no unfinished output."""
        if not self.exists() or self._note():
            return
        is_folder = self.folder.is_dir() and not self.folder.is_symlink()
        if not is_folder or not all(is_partial(path) for path in self.folder.iterdir()):
            raise ValueError(
                f"Expected no folder {str(self.folder)!r}, where the output is made, but there is one that holds "
                "something else. Move it away, or name another output."
            )

    def is_of_this_job(self) -> bool:
        return bool(self._note().get("job") == self._job)

    def is_being_made(self) -> bool:
        """Whether this job was at it, and more than to put the output in its place is left to do."""
        return self.is_of_this_job() and self._note().get("whole") is None

    def whole_records(self) -> dict[str, ParameterRecord] | None:
        """Returns the records of an output of this job that is whole, in its place or not yet; None if it is gone."""
        whole = self._note().get("whole") if self.is_of_this_job() else None
        if whole is None or whole["identity"] not in (_identity(self.staged), _identity(self.output)):
            return None
        return {record["name"]: record for record in whole["records"]}

    def start(self) -> None:
        """Begin anew; see `require_own` for what must not be there."""
        self.require_own()
        self.discard()
        self._write_note(None)

    def add(self, record: ParameterRecord, rank: int) -> None:
        """Note that a tensor is in its place."""
        with (self.folder / f"{_JOURNAL}{rank}.jsonl").open("a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read() != b"\n":
                    file.write(b"\n")  # ends a line that a killed process left
            file.write(json.dumps(record).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def records(self) -> dict[str, ParameterRecord]:
        """Returns the records of the tensors that are in their place."""
        records: dict[str, ParameterRecord] = {}
        for journal in self.folder.glob(f"{_JOURNAL}*.jsonl"):
            for line in journal.read_bytes().splitlines():
                try:
                    record = cast(ParameterRecord, json.loads(line))
                    records[record["name"]] = record
                except (ValueError, TypeError, KeyError, RecursionError):
                    continue  # the line that was being written when the process was killed
        return records

    def note_whole(self, records: Sequence[ParameterRecord]) -> None:
        """Note that all of the output is in `staged`."""
        if self.staged.is_dir():
            sync(self.staged)
        self._write_note({"identity": _identity(self.staged), "records": list(records)})

    def place(self, *, onto_empty: bool) -> None:
        """Put the whole output in its place, at once.

        Args:
            onto_empty: an empty folder was there at the start.

        Raises:
            FileExistsError: if something has come into being there meanwhile; it stays as it is.
        """
        if (self._note().get("whole") or {}).get("identity") != _identity(self.output):
            try:
                if os.path.lexists(self.output) and not onto_empty:  # else it may be an empty folder
                    raise FileExistsError
                place_new(self.staged, self.output)
            except FileExistsError as error:
                raise FileExistsError(
                    f"Expected `output` to be new, but {str(self.output)!r} has come into being meanwhile, and was "
                    f"left as it is. The edit is finished, in {str(self.staged)!r}: move the other away, and run the "
                    "same edit again, which puts it in its place."
                ) from error
        sync(self.output.parent)

    def discard(self) -> None:
        """Remove the folder with all that a job puts there, the note last: what is left by a kill is known as ours."""
        if not self.folder.is_dir():
            return
        ours = [path for path in self.folder.iterdir() if path.name in ("output", "tensors", _NOTE)]
        ours += [path for path in self.folder.iterdir() if path.name.startswith(_JOURNAL) or is_partial(path)]
        for path in sorted(ours, key=lambda path: path.name == _NOTE):
            with suppress(OSError):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        with suppress(OSError):
            self.folder.rmdir()

    def _note(self) -> dict[str, Any]:
        """Returns what stands in the note; nothing if there is none of ours."""
        path = self.folder / _NOTE
        try:
            note = json.loads(path.read_bytes()) if path.is_file() and not self.folder.is_symlink() else None
        except (OSError, ValueError, RecursionError):
            return {}
        if not isinstance(note, dict) or note.get("format") != _FORMAT or not _is_of_whole(note.get("whole")):
            return {}
        return note

    def _write_note(self, whole: Mapping[str, Any] | None) -> None:
        note = {"format": _FORMAT, "job": self._job, "whole": whole}
        write_bytes(self.folder / _NOTE, json.dumps(note).encode(), durable=True)


def _is_of_whole(value: Any) -> bool:
    if value is None:
        return True
    records = value.get("records") if isinstance(value, dict) and isinstance(value.get("identity"), list) else None
    return isinstance(records, list) and all(
        isinstance(each, dict) and isinstance(each.get("name"), str) for each in records
    )


def _identity(path: Path) -> list[int] | None:
    """Returns what a file or folder keeps when it is moved, and others have not."""
    try:
        stat = path.lstat()
    except OSError:
        return None
    return [stat.st_ino, stat.st_mtime_ns]
