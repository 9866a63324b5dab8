"""An output in the making: beside its place, with a journal of what is finished, so that a killed job can go on."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, cast

from lit_cka.editing.parameter import ParameterRecord
from lit_cka.files import is_partial, sync, written_whole


class PartialOutput:
    """The folder `<output>.partial`: the job, a journal per process, and the output as far as it is.

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
        self._job = json.dumps(job, sort_keys=True)

    def exists(self) -> bool:
        return self.folder.exists()

    def is_of_this_job(self) -> bool:
        path = self.folder / "job.json"
        return path.is_file() and path.read_text() == self._job

    def start(self) -> None:
        """Begin anew.

        Raises:
            ValueError: if there is a folder of this name that is no unfinished output.
        """
        if self.exists() and any(path.name != "job.json" and not is_partial(path) for path in self.folder.iterdir()):
            if not (self.folder / "job.json").is_file():
                raise ValueError(
                    f"Expected no folder {str(self.folder)!r}, where the output is made, but there is one."
                )
            self.discard()
        with written_whole(self.folder / "job.json", durable=True) as partial:
            partial.write_text(self._job)

    def add(self, record: ParameterRecord, rank: int) -> None:
        """Note that a tensor is in its place."""
        with (self.folder / f"journal-{rank}.jsonl").open("a+b") as file:
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
        for journal in self.folder.glob("journal-*.jsonl"):
            for line in journal.read_bytes().splitlines():
                try:
                    record = cast(ParameterRecord, json.loads(line))
                except ValueError:
                    continue  # the line that was being written when the process was killed
                records[record["name"]] = record
        return records

    def finish(self) -> None:
        """Put the output in its place, at once."""
        if self.staged.is_dir():
            sync(self.staged)
        os.replace(self.staged, self.output)
        sync(self.output.parent)
        self.discard()

    def discard(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
