"""MonoSoup from files to files, without the model's code, one tensor at a time."""

from __future__ import annotations

import math
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lit_cka.checkpoints.pickles import Weights, open_weights
from lit_cka.editing.checks import check_output, check_report
from lit_cka.editing.depths import depths_by_number
from lit_cka.editing.edit_report import write_report
from lit_cka.editing.edits import Edit, Place
from lit_cka.editing.lock import OutputLock
from lit_cka.editing.pairs import Pairs
from lit_cka.editing.parameter import (
    EDITED,
    OTHER_SET,
    QUANTISED,
    ParameterRecord,
    edit_cost,
    edit_parameter,
    in_order,
    is_changed,
    untouched,
)
from lit_cka.editing.partial import PartialOutput
from lit_cka.editing.settings import EditSettings
from lit_cka.editing.shrinking import norms_of_update, shrink_factor
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
    options: Mapping[str, Any] | None = None,
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
        variant: "monosoup", "highonly", "lowonly", or another edit of `lit_cka.editing.edits.EDITS`, or the import path
            of one's own.
        options: of that other edit, such as `{"alpha": 0.5}` of "wise_ft".
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

    Example:
        >>> import torch
        >>> from tempfile import TemporaryDirectory
        >>> from safetensors.torch import save_file
        >>> with TemporaryDirectory() as folder:
        ...     for name, scale in (("base", 1.0), ("tuned", 1.1)):
        ...         save_file({"fc.weight": scale * torch.eye(4)}, f"{folder}/{name}.safetensors")
        ...     records = edit_files(*(f"{folder}/{name}.safetensors" for name in ("base", "tuned", "edited")))
        >>> [record["name"] for record in records]
        ['fc.weight']
    """
    edit = None if variant in EDITED else Edit(variant, options or {})
    if edit is None and options:
        raise ValueError(f"Expected no `options` of {variant!r}, which `settings` are for, but got {dict(options)}.")
    if edit is not None and edit.wants("others"):
        raise ValueError(f"Expected an edit of two checkpoints, but {variant!r} is of several: use MonoSoupEditor.")
    paths = Path(pretrained), Path(finetuned), Path(output)
    if not paths[2].name:
        raise ValueError(f"Expected `output` to name a file or a folder, but got {str(output)!r}.")
    with Ranks() as ranks, OutputLock(paths[2]) as lock:
        job = ranks.agree(
            lambda: _Job(*paths, settings or EditSettings(), variant, edit, device, report, trusted, weights)
        )
        ranks.agree(lambda: job.check(allow_differences, warn=ranks.rank == 0))
        (records, is_whole), *_ = ranks.gather(lambda: job.prepare(lock) if ranks.rank == 0 else ({}, False))
        names = job.share(set(records), ranks)
        try:
            if edit is not None and edit.wants("factor"):
                all_norms = ranks.gather(lambda: job.norms(job.share(set(), ranks)))
                job.factor = shrink_factor([each for norms in all_norms for each in norms])
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
        edit: Edit | None, device: torch.device | str | None, report: str | os.PathLike[str] | None, trusted: bool,
        weights: str | None,
    ) -> None:  # fmt: skip
        self.output, self.settings, self.variant, self.edit_function = output, settings, variant, edit
        self.factor = 1.0  # see `shrink_factor`
        self.report = None if report is None else Path(report)
        self.device = usable_device("cpu" if device is None else device, torch.float64)
        self.W0, self.W1 = (open_weights(path, trusted=trusted, weights=weights) for path in (pretrained, finetuned))
        if weights is not None and not (self.W0.was_named or self.W1.was_named):
            raise ValueError(f"Expected a file with a set of weights called {weights!r}, but neither has one.")
        described = {"settings": asdict(settings), "variant": variant, "device": self.device.type, "weights": weights,
                     "options": {} if edit is None else dict(edit.options)}  # fmt: skip
        files = {name: _stamps(weights) for name, weights in (("pretrained", self.W0), ("finetuned", self.W1))}
        self.partial, self._onto_empty = PartialOutput(output, {**described, **files}), False
        self._pairs = Pairs(self.W0, self.W1)
        self._quantised = self._pairs.quantised()
        by_depth = edit is not None and edit.wants("depth")
        self._depths = depths_by_number(list(self.W1.tensors)) if by_depth else {}

    def check(self, allow_differences: bool, warn: bool) -> None:
        """Raise a ValueError if the models or the paths don't fit each other."""
        check_output(self.output, self.W0, self.W1)
        self.settings.check_patterns(self.W1.tensors)
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

    def norms(self, names: Sequence[str]) -> list[tuple[float, float]]:
        """Returns `norms_of_update` of the tensors that are edited."""
        found = []
        for name in names:
            before, dtypes = self._pairs.before(name), [self.W1.tensors[name].dtype]
            if before is None or name in self._quantised or self.settings.fate(name) is not None:
                continue
            if None not in [*dtypes, self.W0.tensors[before].dtype]:
                W0, W1 = self.W0.read(before).to(self.device), self.W1.read(name).to(self.device)
                found.append(norms_of_update(W0, W1, self.settings))
        return found

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
        if self.edit_function is None:
            values, record = edit_parameter(name, W0, W1, self.settings, [self.variant], overwrite=True)
            value = values[self.variant]
        else:
            place = Place(name, self._depths.get(name), factor=self.factor)
            value, record = self.edit_function.of_parameter(W0, W1, place, self.settings)
        self.W1.write(self.partial.staged, name, value.cpu() if is_changed(record) else None)
        return record

    def finish(self, records: list[ParameterRecord], is_whole: bool) -> None:
        """Put the output in its place once it is whole, and the report; remove what it was made in."""
        partial, report = self.partial, self.report
        if not is_whole:
            self.W1.finish(partial.staged, {record["name"] for record in records if is_changed(record)})
            if report is not None and os.path.realpath(report.parent) == os.path.realpath(self.output):
                self._report(partial.staged / report.name, records)
            partial.note_whole(records)
        partial.place(onto_empty=self._onto_empty)
        if report is not None:
            self._report(report, records)
        partial.discard()

    def _report(self, path: Path, records: list[ParameterRecord]) -> None:
        write_report(path, records, {"variant": self.variant, **asdict(self.settings)}, self.output)

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
