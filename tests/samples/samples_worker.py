"""A script for `test_samples.py`: which samples count on several ranks, however they are shared out.

    python tests/samples/samples_worker.py FOLDER

writes what each rank has noted to `FOLDER/<job>-<world size>-<rank>.json`.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    Sampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lit_cka.samples import counting
from lit_cka.samples.data_checks import draws_differ
from tests.samples.sample_data import Items, Module, Noting, Stream, numbered
from tests.sync_worker import fork_ranks

SECONDS = 120
N = 21
BATCH_SIZE = 3


class Contiguous(DistributedSampler[Any]):
    """Shares one after the other; the last one begins anew where there are too few samples."""

    def __iter__(self) -> Iterator[int]:
        indices = [index % N for index in range(self.total_size)]
        return iter(indices[self.rank * self.num_samples : (self.rank + 1) * self.num_samples])


class ContiguousEarly(DistributedSampler[Any]):
    """The same, worked out for its own rank when it is made."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        start = self.rank * self.num_samples
        self.indices = [index % N for index in range(start, start + self.num_samples)]

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)


class InPlace(Contiguous):
    """Shuffles its list where it is, and counts how often."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.indices, self.times = [index % N for index in range(self.total_size)], 0

    def __iter__(self) -> Iterator[int]:
        random.Random(self.times).shuffle(self.indices)
        self.times += 1
        return iter(self.indices[self.rank :: self.num_replicas])


class AtRandom(DistributedSampler[Any]):
    """Some samples or other on each rank."""

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(N)[: self.num_samples].tolist())


class Asking(Contiguous):
    """Asks the first rank for the order."""

    def __iter__(self) -> Iterator[int]:
        order = torch.arange(N)
        dist.broadcast(order, 0)
        return iter(order[list(super().__iter__())].tolist())


class Sharding(Sampler[int]):
    """A sampler of the user's."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.indices = range(rank, N, world_size)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


class ByParity(BatchSampler):
    """First the even ones, then the odd ones."""

    def __iter__(self) -> Iterator[list[int]]:
        indices = list(self.sampler)
        for parity in (0, 1):
            some = [index for index in indices if index % 2 == parity]
            yield from (some[i : i + self.batch_size] for i in range(0, len(some), self.batch_size))

    def __len__(self) -> int:
        return sum(1 for _ in self)


class Filtering(DataLoader):
    """An iteration of its own."""

    def __iter__(self) -> Iterator[Any]:
        return (batch for batch in super().__iter__())


def twice(samples: list[Any]) -> Tensor:
    """Every item becomes two samples."""
    return torch.cat([torch.stack([x for (x,) in samples]), torch.stack([x for (x,) in samples]) + 100])


def loader(**options: Any) -> DataLoader:
    return DataLoader(numbered(N), **{"batch_size": BATCH_SIZE, **options})


Build = Callable[[int, int], Any]  # from the rank and the number of ranks


def sampled(kind: Any, **options: Any) -> Build:
    return lambda rank, world_size: loader(sampler=kind(numbered(N), world_size, rank, **options))


def part(rank: int, world_size: int) -> range:
    """A rank's own part, of another size than the others'."""
    starts = [0, *(5 * (each + 1) for each in range(world_size - 1)), N]
    return range(starts[rank], starts[rank + 1])


OWN: dict[str, Any] = {"use_distributed_sampler": False}
# How the data are shared out, and options for the trainer and the callback.
KINDS: dict[str, tuple[Build, dict[str, Any], dict[str, Any]]] = {
    "injected": (lambda *_: loader(), {}, {}),
    "shuffled": (lambda *_: loader(shuffle=True), {}, {}),
    "workers": (lambda *_: loader(num_workers=1), {}, {}),
    "dropping": (sampled(DistributedSampler, drop_last=True), {}, {}),
    "contiguous": (sampled(Contiguous, shuffle=False), {}, {}),
    "contiguous early": (sampled(ContiguousEarly, shuffle=False), {}, {}),
    "in place": (sampled(InPlace), {}, {}),
    "at random": (sampled(AtRandom), {}, {}),
    "asking": (sampled(Asking), {}, {}),
    "wrapped": (lambda *_: loader(sampler=SubsetRandomSampler(range(2, 16))), {}, {}),
    "wrapped in order": (lambda *_: loader(sampler=range(2, 16)), {}, {}),
    "weighted": (lambda *_: loader(sampler=WeightedRandomSampler(torch.ones(N), 30)), {}, {}),
    "batch sampler": (
        lambda *_: DataLoader(numbered(N), batch_sampler=ByParity(range(N), BATCH_SIZE, False)),
        {},
        {},
    ),
    "own sampler": (lambda rank, size: loader(sampler=Sharding(rank, size)), OWN, {}),
    "own list of batches": (
        lambda rank, size: DataLoader(numbered(N), batch_sampler=[[i, (i + 1) % N] for i in range(rank, N, size)]),
        OWN,
        {},
    ),
    "the same everywhere": (lambda *_: loader(shuffle=True), OWN, {}),
    "the same items": (lambda *_: DataLoader(Items(N), 4), OWN, {}),
    "own subsets": (lambda rank, size: DataLoader(Subset(numbered(N), part(rank, size)), 4), OWN, {}),
    "own tensors": (
        lambda rank, size: DataLoader(TensorDataset(numbered(N).tensors[0][list(part(rank, size))]), 4),
        OWN,
        {},
    ),
    "streams": (lambda rank, size: DataLoader(Stream(range(rank, N, size)), BATCH_SIZE), {}, {}),
    "streams with doubles": (
        lambda rank, size: DataLoader(Stream([i // 2 * 2 for i in range(N)][rank * 4 :: size * 9]), 2),
        {},
        {},
    ),
    "the same stream": (lambda *_: DataLoader(Stream(range(N)), BATCH_SIZE), {}, {}),
    "streams that overlap": (
        lambda rank, size: DataLoader(Stream([i % N for i in range(rank * 10, rank * 10 + 12)]), 4),
        {},
        {},
    ),
    "iteration of its own": (
        lambda rank, size: Filtering(numbered(N), 4, sampler=DistributedSampler(numbered(N), size, rank)),
        {},
        {},
    ),
    "twice": (lambda *_: loader(collate_fn=twice), {}, {}),
    "side by side": (lambda *_: CombinedLoader([loader(), loader()], "max_size"), {}, {}),
    "limited": (lambda *_: loader(), {"limit_val_batches": 2}, {}),
    "limited contiguous": (sampled(Contiguous, shuffle=False), {"limit_val_batches": 2}, {}),
    "limited own": (lambda rank, size: loader(sampler=Sharding(rank, size)), {"limit_val_batches": 2, **OWN}, {}),
    "most": (lambda *_: loader(), {}, {"max_batches": 4}),
    "most shuffled": (sampled(DistributedSampler, seed=3), {}, {"max_batches": 4}),
    "most contiguous": (sampled(Contiguous, shuffle=False), {}, {"max_batches": 2}),
    "most of a stream": (lambda rank, size: DataLoader(Stream(range(rank, N, size)), 2), {}, {"max_batches": 2}),
    "nested": (
        lambda *_: [loader(), {"a": loader(), "b": [loader(batch_size=5)]}],
        {},
        {"num_dataloaders": 3},
    ),
    "none on the last": (
        lambda rank, size: [loader(), loader(sampler=range(N) if rank < size - 1 or size == 1 else [])],
        OWN,
        {"num_dataloaders": 2},
    ),
}


class Allowing(Module):
    def __init__(self) -> None:
        super().__init__()
        self.allow_zero_length_dataloader_with_multiple_devices = True


def trainer(folder: Path, world_size: int, noting: Noting, **options: Any) -> pl.Trainer:
    return pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        devices=world_size,
        callbacks=[noting],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"strategy": "ddp", **options},
    )


def validated(rank: int, world_size: int, folder: Path) -> Any:
    """One validation of every kind."""
    noted = {}
    for kind, (build, options, of_callback) in KINDS.items():
        pl.seed_everything(rank if kind in ("at random", "weighted", "wrapped") else 0, verbose=False)
        noting = Noting(**of_callback)
        run = trainer(folder, world_size, noting, **options)
        run.validate(Allowing(), build(rank, world_size), verbose=False)
        noted[kind] = [[each[dataloader]._asdict() for dataloader in each] for each in noting.passes]
    return noted


def fitted(rank: int, world_size: int, folder: Path) -> Any:
    """Shuffled anew in every epoch: samples come to other ranks."""
    pl.seed_everything(0, verbose=False)
    noting = Noting()
    run = trainer(folder, world_size, noting, max_epochs=3)
    data = numbered(N)
    run.fit(Module(), loader(shuffle=True), DataLoader(data, 4, sampler=DistributedSampler(data, world_size, rank)))
    if rank == 0:  # without the others, who would be waited for
        assert draws_differ(loader(sampler=Asking(data, world_size, rank))) is False
    return {"fitted": [[each[0]._asdict()] for each in noting.passes]}


def in_parts(rank: int, world_size: int, folder: Path) -> Any:
    """Two ranks have each part of the model: those hold the same samples."""
    pl.seed_everything(0, verbose=False)

    class Parted(Module):
        def configure_model(self) -> None:
            pass

    noted = {}
    for kind in ("injected", "own sampler"):
        noting = Noting()
        strategy = ModelParallelStrategy(world_size // 2, 2, process_group_backend="gloo")
        run = trainer(folder, world_size, noting, strategy=strategy, use_distributed_sampler=kind == "injected")
        data = loader() if kind == "injected" else loader(sampler=Sharding(rank // 2, world_size // 2))
        run.validate(Parted(), data, verbose=False)
        noted[kind] = [[each[0]._asdict()] for each in noting.passes]
        assert (noting.samples.ranks.rank, noting.samples.ranks.size) == (rank // 2, world_size // 2)
    return noted


def work(job: Callable[[int, int, Path], Any], rank: int, world_size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    counting._MOST_AT_ONCE = 8  # so few samples take several exchanges
    os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0")  # for Lightning, which takes it that all ranks are started
    meeting = f"file://{folder}/{job.__name__}-{world_size}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world_size)
    noted = job(rank, world_size, folder)
    (folder / f"{job.__name__}-{world_size}-{rank}.json").write_text(json.dumps(noted))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for job, world_size in [*product((validated, fitted), (1, 2, 3)), (in_parts, 4)]:
        fork_ranks(work, job, world_size, folder, SECONDS)
