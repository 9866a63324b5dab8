"""MonoSoup from files to files, without the model's code, one tensor at a time."""

from __future__ import annotations

import csv
import math
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from threading import Condition

import torch
from torch import Tensor

from lit_cka.checkpoints.pickles import Weights, open_weights
from lit_cka.editing.checks import check_output, check_report
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
from lit_cka.files import write_json, written_whole
from lit_cka.parallel.devices import usable_device
from lit_cka.parallel.ranks import Ranks
from lit_cka.parallel.sharing import one_thread_each, share_out
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
    in `<output>.partial`, from where a killed job goes on when it is started again. Where several processes run it
    (torchrun), they share the tensors out. The bytes written don't depend on any of this.

    Args:
        pretrained: a safetensors file, a folder with one or with shards of one and their index (`save_pretrained`), or
            a state dict of torch. The names of the tensors count, not which file they are in.
        finetuned: likewise.
        output: what to write: a folder if `finetuned` is one, with its configuration and tokenizer, else a file.
        settings: how to split; None for the defaults.
        variant: "monosoup", "highonly" or "lowonly".
        device: where to compute, such as "cuda"; None for the CPU.
        report: a .json or .csv file to write the records to.
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
        FileExistsError: if the output exists.
        OSError: if there is no space for the output.
    """
    if variant not in EDITED:
        raise ValueError(f"Expected `variant` to be one of {', '.join(map(repr, EDITED))}, but got {variant!r}.")
    paths = Path(pretrained), Path(finetuned), Path(output)
    with Ranks() as ranks:
        job = ranks.agree(lambda: _Job(*paths, settings or EditSettings(), variant, device, report, trusted, weights))
        ranks.agree(lambda: job.check(allow_differences, warn=ranks.rank == 0))
        (records, finished), *_ = ranks.gather(lambda: job.prepare() if ranks.rank == 0 else ({}, False))
        names = job.share(set(records), ranks)
        try:
            for records_there in ranks.gather(lambda: job.edit(names, ranks.rank, progress and ranks.rank == 0)):
                records.update(records_there)
        except ValueError:
            if ranks.rank == 0:
                job.partial.discard()  # it would fail again
            raise
        all_records = in_order(job.W1.tied, records)
        ranks.agree(lambda: job.finish(all_records, finished) if ranks.rank == 0 else None)
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
        self.partial = PartialOutput(output, {**described, **files})
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

    def prepare(self) -> tuple[dict[str, ParameterRecord], bool]:
        """Make room for the output, or find it begun: what is done, and whether all is."""
        partial, done = self.partial, {}
        if partial.is_of_this_job():
            done = partial.records()
            if len(done) == len(self._names()) and not partial.staged.exists() and self.output.exists():
                return done, True  # killed when only the partial folder was left to remove
        is_empty = self.output.is_dir() and self.W1.path.is_dir() and not any(self.output.iterdir())
        if self.output.exists() and not is_empty:
            raise FileExistsError(f"Expected `output` to be new, but {str(self.output)!r} exists.")
        goes_on = partial.is_of_this_job() and self.W1.is_created(partial.staged)
        needed, folder = self.W1.needed_bytes(partial.staged), _existing(self.output.parent)
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise OSError(f"Expected {needed / 1e9:.3f} GB free in {str(folder)!r}, but there are {free / 1e9:.3f} GB.")
        if not goes_on:
            is_other = partial.exists() and not partial.is_of_this_job()
            partial.start()
            if is_other:
                warnings.warn(f"What was in {partial.folder} was of another job; it starts anew.", stacklevel=6)
            self.W1.create(partial.staged)
        return (done if goes_on else {}), False

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
        memory = _Memory(max([_LEAST_MEMORY, *map(self._memory, self._names())]))

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

    def finish(self, records: list[ParameterRecord], finished: bool) -> None:
        if finished:
            self.partial.discard()
            return
        self.W1.finish(self.partial.staged, {record["name"] for record in records if record["reason"] is None})
        if self.report is not None:
            inside = self.report.resolve().parent == self.output.resolve()
            path = self.partial.staged / self.report.name if inside else self.report
            _write_report(path, records, self.settings, self.variant)
        self.partial.finish()

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


class _Memory:
    """So many bytes, taken and given back by several threads."""

    def __init__(self, nbytes: int) -> None:
        self._free, self._given_back = nbytes, Condition()

    @contextmanager
    def taking(self, nbytes: int) -> Iterator[None]:
        with self._given_back:
            self._given_back.wait_for(lambda: self._free >= nbytes)
            self._free -= nbytes
        try:
            yield
        finally:
            with self._given_back:
                self._free += nbytes
                self._given_back.notify_all()


def _stamps(weights: Weights) -> list[list[str | int]]:
    """Returns what tells the files from others, or from what they were before a change."""
    return [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in weights.files]


def _existing(folder: Path) -> Path:
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def _write_report(path: Path, records: list[ParameterRecord], settings: EditSettings, variant: str) -> None:
    if path.suffix == ".csv":
        with written_whole(path, durable=True) as partial, partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(ParameterRecord.__annotations__))
            writer.writeheader()
            writer.writerows({**record, "shape": "x".join(map(str, record["shape"]))} for record in records)
    else:  # which has no infinity, the relative change of weights that were 0: null there
        write_json(path, {"variant": variant, **asdict(settings), "parameters": records}, durable=True)
