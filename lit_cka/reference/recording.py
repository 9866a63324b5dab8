"""What the reference returned for every sample of every dataloader: `Recording`."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lit_cka.checkpoints.tensor_files import TensorFile
from lit_cka.parallel.warning import warn
from lit_cka.reference.feature_store import MappedFile
from lit_cka.reference.recorded_dataloader import RecordedDataloader
from lit_cka.samples.sample_keys import BatchSamples

CacheDtype = Literal["auto", "float64", "bfloat16"]
_FLOAT64_BYTES = 2**28  # up to which features are kept as they are, where the type is left open
_log = logging.getLogger(__name__)


class Dataloader(NamedTuple):
    """Which dataloader: of which stage, and its number there."""

    stage: str
    number: int


class Recording:
    """The reference's features of every sample of every dataloader, of all layers.

    Args:
        layer_names: the layers.
        max_bytes: how much of it to hold in memory; what is beyond goes into a file without a name.
        dtype: of the features, as offsets from about their mean: "auto" is float64 as long as they are few, then
            float32, which changes a score by less than 1e-7; "bfloat16" where it does no harm.
        folder: where that file would be.
        pooled: how a layer's output became a row, in words that differ where that does.
    """

    def __init__(
        self, layer_names: list[str], max_bytes: float, dtype: CacheDtype, folder: str | Path, pooled: str = ""
    ) -> None:
        self.layer_names = layer_names
        self.pooled = pooled
        self.dtype: CacheDtype = dtype
        self.dataloaders: dict[Dataloader, RecordedDataloader] = {}
        # In bfloat16 only once it is known to do no harm.
        self._kept_in = torch.float32 if dtype == "bfloat16" else torch.float64
        self._max_bytes = max_bytes
        self._folder = Path(folder)
        self._file: MappedFile | None = None

    def start(self, dataloader: Dataloader) -> None:
        """Record this dataloader anew."""
        self.dataloaders[dataloader] = RecordedDataloader(self.layer_names, self._kept_in)

    def add(self, dataloader: Dataloader, samples: BatchSamples, features: Mapping[str, Tensor]) -> dict[str, str]:
        """Add a batch's features (rows, d) by layer; return, by layer, why something could not be added."""
        if self.dtype == "auto" and self._kept_in == torch.float64 and self.nbytes > _FLOAT64_BYTES:
            self._kept_in = torch.float32
            for recorded in self.dataloaders.values():
                recorded.round_to(torch.float32)
        if self._file is None and self.nbytes > self._max_bytes:
            self._file = self._open_file()
        return self.dataloaders[dataloader].add(samples, features, self._file)

    def _open_file(self) -> MappedFile | None:
        try:
            file = MappedFile(self._folder)
        except OSError as error:
            self._max_bytes = float("inf")
            warn(
                f"The recorded features take more than `cache_memory`, and no file could be made for them in "
                f"{str(self._folder)!r} ({error}): they stay in memory."
            )
            return None
        _log.debug("The recorded features take more than `cache_memory`: the rest goes into a file in %s", self._folder)
        return file

    @property
    def nbytes(self) -> int:
        """What all features take, in memory and in the file."""
        return sum(recorded.nbytes for recorded in self.dataloaders.values())

    @property
    def is_empty(self) -> bool:
        """Whether nothing was recorded, by any process: of a dataloader, some may have no samples."""
        return not self.dataloaders

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return everything, for a file: tensors by name, and what they are, JSON."""
        tensors: dict[str, Tensor] = {}
        described = []
        for number, (dataloader, recorded) in enumerate(self.dataloaders.items()):
            held, about = recorded.tensors()
            tensors.update({f"{number}.{name}": value for name, value in held.items()})
            described.append({"stage": dataloader.stage, "number": dataloader.number, **about})
        return tensors, {
            "layers": self.layer_names, "pooled": self.pooled, "dtype": self.dtype, "dataloaders": described,
        }  # fmt: skip

    def expect(self, dataloaders: Iterable[Dataloader]) -> None:
        """Take these dataloaders as recorded, on other processes at least."""
        for dataloader in dataloaders:
            if dataloader not in self.dataloaders:
                self.start(Dataloader(*dataloader))
                self.dataloaders[dataloader].is_complete = True

    def fits(self, notes: Mapping[str, Any]) -> bool:
        """Whether these notes are of a recording of the same layers, pooled in the same way."""
        return notes.get("layers") == self.layer_names and notes.get("pooled") == self.pooled

    def fill(self, files: Sequence[TensorFile]) -> bool:
        """Add what `tensors` has returned, from files; return whether a recording has such notes; else it is empty."""
        try:
            for file in files:
                self.load(file.tensors, file.notes)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError, OverflowError):
            self.dataloaders.clear()  # sound files, but of notes that no recording has
            return False
        return True

    def load(self, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
        """Add what `tensors` has returned, of one rank or of several, one after the other."""
        for number, about in enumerate(notes["dataloaders"]):
            dataloader = Dataloader(about["stage"], about["number"])
            if dataloader not in self.dataloaders:
                self.start(dataloader)
            start = f"{number}."
            held = {name[len(start) :]: value for name, value in tensors.items() if name.startswith(start)}
            self.dataloaders[dataloader].load(held, about)
