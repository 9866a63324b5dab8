"""MonoSoup from files to files, without the model's code, one tensor at a time."""

from __future__ import annotations

import csv
import io
import math
import os
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from lit_cka.checkpoints.pickles import Weights, open_weights
from lit_cka.editing.checks import check_output, check_report
from lit_cka.editing.lock import OutputLock
from lit_cka.editing.pairs import Pairs
from lit_cka.editing.parameter import (
    EDITED,
    OTHER_SET,
    QUANTISED,
    EditSettings,
    ParameterRecord,
    edit_cost,
    edit_parameter,
    in_order,
    untouched,
)
from lit_cka.editing.partial import PartialOutput
from lit_cka.files import json_bytes, write_bytes
from lit_cka.parallel.devices import usable_device
from lit_cka.parallel.ranks import Ranks
from lit_cka.parallel.sharing import MemoryBudget, one_thread_each, share_out
from lit_cka.progress import progress_bar

_LEAST_MEMORY = 2**29  # bytes that tensors edited at once may take together even where the largest takes less


def edit_files(
    pretrained: str | os.PathLike[str],
    finetuned: str | os.PathLike[str],
    output: str | os.PathLike[str],
    settings: EditSettings | None = None,
    *,
    variant: str = "monosoup",
    device: torch.device | str | None = None,
    report: str | os.PathLike[str] | None = None,
    allow_differences: bool = False,
    trusted: bool = False,
    weights: str | None = None,
    progress: bool = True,
) -> list[ParameterRecord]:
    """Write the edited weights of a fine-tuned model, in the layout of its files.

    Takes about three times the memory of the largest tensor. The output appears whole or not at all: until then it is
    in `<output>.partial`, from where a killed job goes on when it is started again. One job at a time writes an output,
    and nothing is replaced. Where several processes run it (torchrun), they share the tensors out. The bytes written
    don't depend on any of this.

    Args:
        pretrained: a safetensors file, a folder with one or with shards of one and their index (`save_pretrained`), or
            a state dict of torch. The names of the tensors count, not which file they are in.
        finetuned: likewise.
        output: what to write: a folder if `finetuned` is one, with its configuration and tokenizer, else a file.
        settings: how to split; None for the defaults.
        variant: "monosoup", "highonly" or "lowonly".
        device: where to compute, such as "cuda"; None for the CPU.
        report: a new .json or .csv file to write the records to.
        allow_differences: let tensors that only one of the models has, or that have another shape, be. What the
            fine-tuned model has of them stays as it is.
        trusted: unpickle whatever objects the files hold, which runs code that their authors chose.
        weights: which of several sets of weights in a file, such as "state_dict_ema" or "teacher", see
            `lit_cka.checkpoints.weight_sets.find_weights`; the others stay as they are. None where there is one set.
        progress: show a progress bar.

    Returns:
        What was done to each tensor, in their order. Quantised weights are left alone, as are their scales and all else
        that their module holds.

    Raises:
        ValueError: if a file is damaged or needs `trusted`, the models differ, a weight holds NaN or infinity, or an
            argument is wrong.
        FileNotFoundError: if an input is missing.
        FileExistsError: if the output or the report exists, or comes into being meanwhile, or another job writes it.
        OSError: if there is no space for the output.
    """
    if variant not in EDITED:
        raise ValueError(f"Expected `variant` to be one of {', '.join(map(repr, EDITED))}, but got {variant!r}.")
    paths = Path(pretrained), Path(finetuned), Path(output)
    if not paths[2].name:
        raise ValueError(f"Expected `output` to name a file or a folder, but got {str(output)!r}.")
    with Ranks() as ranks, OutputLock(paths[2]) as lock:
        job = ranks.agree(lambda: _Job(*paths, settings or EditSettings(), variant, device, report, trusted, weights))
        ranks.agree(lambda: job.check(allow_differences, warn=ranks.rank == 0))
        (records, is_whole), *_ = ranks.gather(lambda: job.prepare(lock) if ranks.rank == 0 else ({}, False))
        names = job.share(set(records), ranks)
        try:
            for records_there in ranks.gather(lambda: job.edit(names, ranks.rank, progress and ranks.rank == 0)):
                records.update(records_there)
        except ValueError:
            if ranks.rank == 0:
                job.partial.discard()  # it would fail again
            raise
        all_records = in_order(job.W1.tied, records)
        ranks.agree(lambda: job.finish(all_records, is_whole) if ranks.rank == 0 else None)
    return all_records


class _Job:
    """One edit: what goes in, what comes out, and how."""

    def __init__(
        self, pretrained: Path, finetuned: Path, output: Path, settings: EditSettings, variant: str,
        device: torch.device | str | None, report: str | os.PathLike[str] | None, trusted: bool,
        weights: str | None,
    ) -> None:  # fmt: skip
        self.output, self.settings, self.variant = output, settings, variant
        self.report = None if report is None else Path(report)
        self.device = usable_device("cpu" if device is None else device, torch.float64)
        self.W0, self.W1 = (open_weights(path, trusted=trusted, weights=weights) for path in (pretrained, finetuned))
        if weights is not None and not (self.W0.was_named or self.W1.was_named):
            raise ValueError(f"Expected a file with a set of weights called {weights!r}, but neither has one.")
        described = {"settings": asdict(settings), "variant": variant, "device": self.device.type, "weights": weights}
        files = {name: _stamps(weights) for name, weights in (("pretrained", self.W0), ("finetuned", self.W1))}
        self.partial, self._onto_empty = PartialOutput(output, {**described, **files}), False
        self._pairs = Pairs(self.W0, self.W1)
        self._quantised = self._pairs.quantised()

    def check(self, allow_differences: bool, warn: bool) -> None:
        """Raise a ValueError if the models or the paths don't fit each other."""
        check_output(self.output, self.W0, self.W1)
        if self.report is not None:
            check_report(self.report, self.output, self.W0, self.W1)
        differing = self._pairs.check(allow_differences=allow_differences)
        if differing and warn:
            warnings.warn(f"{differing} tensors in which the models differ are not edited.", stacklevel=4)

    def prepare(self, lock: OutputLock) -> tuple[dict[str, ParameterRecord], bool]:
        """Make room for the output, or find it begun: what is done, and whether the output is whole."""
        lock.take()
        partial = self.partial
        partial.require_own()
        is_folder = self.W1.path.is_dir() and self.output.is_dir() and not self.output.is_symlink()
        self._onto_empty = is_folder and not any(self.output.iterdir())
        whole = partial.whole_records()
        if whole is not None:
            return whole, True  # killed when the output was left to be put in its place, or the folder to be removed
        if os.path.lexists(self.output) and not self._onto_empty:
            raise FileExistsError(f"Expected `output` to be new, but {str(self.output)!r} exists.")
        if self.report is not None and os.path.lexists(self.report):
            raise FileExistsError(f"Expected `report` to be new, but {str(self.report)!r} exists.")
        goes_on = partial.is_being_made() and self.W1.is_created(partial.staged)
        needed, folder = self.W1.needed_bytes(partial.staged), self.output.parent
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise OSError(f"Expected {needed / 1e9:.3f} GB free in {str(folder)!r}, but there are {free / 1e9:.3f} GB.")
        if goes_on:
            return partial.records(), False
        is_other = partial.exists() and not partial.is_of_this_job()
        partial.start()
        if is_other:
            warnings.warn(f"What was in {partial.folder} was of another job; it starts anew.", stacklevel=6)
        self.W1.create(partial.staged)
        return {}, False

    def share(self, done: set[str], ranks: Ranks) -> list[str]:
        """Returns the names of the tensors that this rank edits, those that take longest first."""
        costs = {name: self._cost(name) for name in self._names() if name not in done}
        owners = share_out(list(costs.values()), ranks.size)
        names_here = [name for name, owner in zip(costs, owners, strict=True) if owner == ranks.rank]
        return sorted(names_here, key=lambda name: -costs[name])

    def edit(self, names: Sequence[str], rank: int, progress: bool) -> dict[str, ParameterRecord]:
        """Edit and write tensors; returns their records. On a CPU several are edited at once, with one thread for each,
        so that the result doesn't depend on their number.
        """
        memory = MemoryBudget(max([_LEAST_MEMORY, *map(self._memory, self._names())]))

        def edit(name: str) -> ParameterRecord:
            with memory.taking(self._memory(name)):
                return self._edit(name)

        records = {}
        on_cpu = self.device.type == "cpu"
        with progress_bar("Editing", len(names), enabled=progress) as advance:
            for record in one_thread_each(edit, names, enabled=on_cpu):
                self.partial.add(record, rank)
                records[record["name"]] = record
                advance(1)
        return records

    def _edit(self, name: str) -> ParameterRecord:
        info, name_before = self.W1.tensors[name], self._pairs.before(name)
        before = None if name_before is None else self.W0.tensors[name_before]
        if name in self._quantised or self._pairs.is_of_another_set(name):
            self.W1.write(self.partial.staged, name, None)
            return untouched(name, info.shape, QUANTISED if name in self._quantised else OTHER_SET)
        if info.dtype is None or (before is not None and before.dtype is None):
            unread = torch.empty(info.shape, dtype=torch.int8, device="meta")
            record = edit_parameter(name, None, unread, self.settings)[1]
            kind = info.kind if info.dtype is None or before is None else f"{before.kind} in the pretrained model"
            if kind.startswith(("F", "float", "sparse")):
                record["reason"] = f"stored as {kind}"
            self.W1.write(self.partial.staged, name, None)
            return record
        W0 = None if name_before is None else self.W0.read(name_before).to(self.device)
        W1 = self.W1.read(name).to(self.device)
        values, record = edit_parameter(name, W0, W1, self.settings, [self.variant], overwrite=True)
        edited: Tensor | None = values[self.variant].cpu() if record["reason"] is None else None
        self.W1.write(self.partial.staged, name, edited)
        return record

    def finish(self, records: list[ParameterRecord], is_whole: bool) -> None:
        """Put the output in its place once it is whole, and the report; remove what it was made in."""
        partial, report = self.partial, self.report
        if not is_whole:
            self.W1.finish(partial.staged, {record["name"] for record in records if record["reason"] is None})
            if report is not None and os.path.realpath(report.parent) == os.path.realpath(self.output):
                self._write_report(partial.staged / report.name, records)
            partial.note_whole(records)
        partial.place(onto_empty=self._onto_empty)
        if report is not None:
            self._write_report(report, records)
        partial.discard()

    def _write_report(self, path: Path, records: list[ParameterRecord]) -> None:
        content = _report(path, records, self.settings, self.variant)
        if path.is_file() and path.read_bytes() == content:
            return  # written before the job was killed
        try:
            write_bytes(path, content, durable=True, new=True)
        except FileExistsError as error:
            raise FileExistsError(
                f"Expected `report` to be new, but {str(path)!r} has come into being meanwhile, and was left as it is. "
                f"The edited weights are in {str(self.output)!r}. Name another report, and run the same edit again, "
                "which writes it."
            ) from error

    def _names(self) -> list[str]:
        return list(dict.fromkeys(self.W1.tied.values()))

    def _cost(self, name: str) -> float:
        info = self.W1.tensors[name]
        return info.nbytes + (0.0 if info.dtype is None else edit_cost(info.shape))

    def _memory(self, name: str) -> int:
        """Returns the bytes that an edit takes: the weights, the result in place of one, and the eigenvectors."""
        info = self.W1.tensors[name]
        if info.dtype is None:
            return 0
        small = min(info.shape[0], math.prod(info.shape[1:])) if len(info.shape) > 1 else 0
        return 2 * info.nbytes + 40 * small**2


def _stamps(weights: Weights) -> list[list[str | int]]:
    """Returns what tells the files from others, or from what they were before a change."""
    return [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in weights.files]


def _report(path: Path, records: list[ParameterRecord], settings: EditSettings, variant: str) -> bytes:
    if path.suffix != ".csv":  # JSON has no infinity, the relative change of weights that were 0: null there
        return json_bytes({"variant": variant, **asdict(settings), "parameters": records})
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(ParameterRecord.__annotations__))
    writer.writeheader()
    writer.writerows({**record, "shape": "x".join(map(str, record["shape"]))} for record in records)
    return text.getvalue().encode()
