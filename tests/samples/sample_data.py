"""Data that say which samples they are, and a callback that notes what `EvaluationSamples` says of them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lit_cka.samples.samples import EvaluationSamples
from tests.tracking.helpers import trainer


def numbered(n: int, start: int = 0) -> TensorDataset:
    """Samples (2,), of which the first value is the sample's number."""
    numbers = torch.arange(start, start + n).float()
    return TensorDataset(torch.stack([numbers, numbers.sin()], dim=1))


class Items(Dataset[Any]):
    """The same samples from a dataset of Python, that notes what is read of it."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.read: list[int] = []

    def __getitem__(self, index: int) -> Tensor:
        self.read.append(index)
        return numbered(1, index)[0][0]

    def __len__(self) -> int:
        return self.n


class Stream(IterableDataset[Tensor]):
    """The same samples without indices."""

    def __init__(self, numbers: Sequence[int]) -> None:
        self.numbers = numbers

    def __iter__(self) -> Iterator[Tensor]:
        for number in self.numbers:
            yield numbered(1, number)[0][0]


class Module(pl.LightningModule):
    """A module whose steps draw random numbers, as dropout does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.seen: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x,) = batch
        return self.layer(x * torch.rand(())).sum()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        drawn = torch.rand(()).item(), random.random(), np.random.rand()
        self.seen.append((batch_idx, dataloader_idx, plain(batch), drawn))

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def plain(batch: Any) -> Any:
    """The batch in lists, tuples and dictionaries of numbers."""
    if isinstance(batch, dict):
        return {key: plain(value) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return [plain(value) for value in batch]
    return batch.tolist() if isinstance(batch, Tensor) else batch


class Noted(NamedTuple):
    """What is said of all samples of one dataloader in one pass."""

    numbers: list[int]  # which samples they are, by what they hold
    keys: list[tuple[int, int]]
    counted: list[bool]
    kinds: list[str]  # of each batch
    was_open: bool

    def counts(self) -> list[int]:
        """The numbers of the samples that count."""
        return [number for number, counted in zip(self.numbers, self.counted, strict=True) if counted]


def numbers_in(batch: Any) -> list[int]:
    """Which samples a batch holds, of one dataloader or of the first of several."""
    while not isinstance(batch, Tensor):
        batch = next(iter(batch.values())) if isinstance(batch, dict) else batch[0]
    return [int(number) for number in batch.reshape(-1, batch.shape[-1])[:, 0].tolist()]


class Noting(pl.Callback):
    """Notes what is said of every pass but the sanity check's, in the way in which `CKACallback` is to ask."""

    def __init__(self, num_dataloaders: int = 1, max_batches: int | None = None, key: str = "") -> None:
        self.num_dataloaders = num_dataloaders
        self.max_batches = max_batches
        self.key = key
        self.passes: list[dict[int, Noted]] = []
        self.changing: list[list[int]] = []
        self.num_samples: list[int | None] = []

    @property
    def state_key(self) -> str:
        return self._generate_state_key(key=self.key)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.samples = EvaluationSamples(trainer)
        self.samples.watch()
        self.samples.watch()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        tracked = range(self.num_dataloaders)
        self.samples.begin(tracked, self.max_batches)
        self.batches: dict[int, list[Any]] = {dataloader: [] for dataloader in tracked}
        self.changing.append(self.samples.changing(tracked))
        self.num_samples = [self.samples.num_samples(dataloader) for dataloader in tracked]

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if not self.samples.step_takes_batches:
            noted = self.samples.of_batch(dataloader_idx, batch_idx, batch)
            self.batches[dataloader_idx].append((numbers_in(batch), noted))

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self.samples.step_takes_batches:
            noted = self.samples.of_batch(dataloader_idx, batch_idx, batch)
            self.batches[dataloader_idx].append((numbers_in(batch), noted))

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        noted = {}
        for dataloader, batches in self.batches.items():
            mask = self.samples.resolve(dataloader)
            numbers = [number for of_batch, _ in batches for number in of_batch]
            keys = [tuple(key) for _, batch in batches for key in batch.keys.tolist()]
            counted = [value for _, batch in batches for value in batch.counted.tolist()]
            assert mask is None or mask.tolist() == counted
            assert not any(tensor.is_inference() for _, batch in batches for tensor in (batch.keys, batch.counted))
            noted[dataloader] = Noted(numbers, keys, counted, [batch.kind for _, batch in batches], mask is not None)
        if not trainer.sanity_checking:
            self.passes.append(noted)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.samples.close()

    on_test_start, on_test_batch_start = on_validation_start, on_validation_batch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end


def fitted(folder: Path, val: Any, noting: Noting | None = None, **options: Any) -> tuple[Module, pl.Trainer]:
    """A module that was trained for two epochs, with a validation after each."""
    pl.seed_everything(5, verbose=False)
    module = Module()
    run = trainer(folder, *([] if noting is None else [noting]), **options)
    run.fit(module, DataLoader(numbered(12), 4, shuffle=True), val)
    return module, run
