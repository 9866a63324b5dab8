"""Are the data the same at every pass, which data are they, and are batches in the order of their indices?"""

from __future__ import annotations

import functools
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, Subset, TensorDataset, default_collate
from torchvision.transforms import v2

from lit_cka.samples.data_checks import dataset_fingerprint, draws_differ, keeps_order, root_of
from tests.samples.sample_data import Items, Module, Noting, Stream, numbered
from tests.tracking.helpers import trainer

N = 21
SHARED = np.random.default_rng(0)


class Changing(Dataset[Tensor]):
    """Samples with something added to each, by a function."""

    def __init__(self, noise: Callable[[], float], **attributes: Any) -> None:
        self.noise = noise
        self.__dict__.update(attributes)

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([float(index), self.noise()])

    def __len__(self) -> int:
        return N


class Counting(Changing):
    """The first time that a sample is read it is another one."""

    def __init__(self) -> None:
        super().__init__(lambda: 0.0)
        self.counts = [0] * N

    def __getitem__(self, index: int) -> Tensor:
        self.counts[index] += 1
        return torch.tensor([float(index), float(self.counts[index])])


class OfTheModule(Changing):
    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([float(index), SHARED.random()])


class Cropped(Dataset[Tensor]):
    def __init__(self) -> None:
        self.transform = v2.RandomCrop(4)

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(torch.arange(index, index + 64.0).view(1, 8, 8))

    def __len__(self) -> int:
        return N


class InBatches(Changing):
    """Read a batch at a time, as some hubs' datasets are."""

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        shift = self.noise()
        return [torch.tensor([float(index), shift]) for index in indices]

    def __getitem__(self, index: int) -> Tensor:
        raise AssertionError("read one by one")


class NoisyStream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return (torch.tensor([float(index), random.random()]) for index in range(N))


class ShuffledStream(Stream):
    def __iter__(self) -> Iterator[Tensor]:
        return (numbered(1, number)[0][0] for number in torch.randperm(8).tolist())


class FlippingStream(Stream):
    def __iter__(self) -> Iterator[Tensor]:
        return (sample if random.random() < 0.5 else -sample for sample in super().__iter__())


class Once(IterableDataset[Tensor]):
    """Reads on from where it was."""

    def __init__(self) -> None:
        self.source = iter(range(N))

    def __iter__(self) -> Iterator[Tensor]:
        return (torch.tensor([float(number), 0.0]) for number in self.source)


class Itself(IterableDataset[Tensor]):
    def __init__(self) -> None:
        self.number = 0

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        self.number += 1
        return torch.tensor([float(self.number), 0.0])


class Around:
    """An iterable around a dataloader."""

    def __init__(self, loader: DataLoader) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)


def collate_with_noise(generator: torch.Generator | None = None) -> Callable[[list[Tensor]], Tensor]:
    return lambda samples: torch.stack(samples) + torch.rand((), generator=generator)


def loader(dataset: Any, **options: Any) -> DataLoader:
    return DataLoader(dataset, **{"batch_size": 4, **options})


def numpy_generator() -> np.random.Generator:
    return np.random.default_rng(1)


def normal(generator: np.random.Generator | np.random.RandomState) -> Changing:
    return Changing(functools.partial(generator.normal, 0.0), generator=generator)


def of_torch(generator: torch.Generator) -> Changing:
    return Changing(lambda: torch.rand((), generator=generator).item())


def state_of(generator: random.Random) -> Changing:
    return Changing(lambda: random.Random(str(generator.getstate())).random())


def seed_of(generator: torch.Generator) -> Changing:
    return Changing(lambda: float(generator.initial_seed()))


DIFFERENT: dict[str, Callable[[], Any]] = {
    "python": lambda: loader(Changing(random.random)),
    "numpy": lambda: loader(Changing(lambda: np.random.rand())),
    "torch": lambda: loader(Changing(lambda: torch.rand(()).item())),
    "own torch": lambda: loader(of_torch(torch.Generator().manual_seed(1))),
    "own numpy": lambda: loader(normal(numpy_generator())),
    "old numpy": lambda: loader(normal(np.random.RandomState(1))),
    "own python": lambda: loader(Changing(random.Random(1).random)),
    "of the module": lambda: loader(OfTheModule(lambda: 0.0)),
    "operating system": lambda: loader(Changing(lambda: float(os.urandom(2)[0]))),
    "rarely": lambda: loader(Changing(lambda: float(random.random() < 0.15)), batch_size=1),
    "state of python": lambda: loader(Changing(lambda: float(random.getstate()[1][1]))),
    "state of numpy": lambda: loader(Changing(lambda: float(np.random.get_state()[1][0]))),  # type: ignore[index]
    "seed of workers": lambda: loader(Changing(lambda: float(torch.initial_seed()))),
    "own state": lambda: loader(state_of(random.Random(1))),
    "counter": lambda: loader(Counting()),
    "crops": lambda: loader(Cropped()),
    "subset": lambda: loader(Subset(Changing(random.random), range(5))),
    "batches": lambda: loader(InBatches(random.random)),
    "workers": lambda: loader(Changing(random.random), num_workers=2),
    "shuffled": lambda: loader(Changing(random.random), shuffle=True),
    "collate": lambda: loader(numbered(N), collate_fn=lambda samples: torch.rand(len(samples))),
    "collate's own": lambda: loader(Items(N), collate_fn=collate_with_noise(torch.Generator())),
    "whole batches": lambda: loader(Changing(random.random), batch_size=None),
    "stream": lambda: loader(NoisyStream()),
    "single stream": lambda: loader(NoisyStream(), batch_size=None),
    "stream now and then": lambda: loader(FlippingStream(range(N))),
    "list": lambda: CombinedLoader([loader(Items(N)), loader(Changing(random.random))], "min_size"),
    "around": lambda: Around(loader(Changing(random.random))),
}
SAME: dict[str, Callable[[], Any]] = {
    "tensors": lambda: loader(numbered(N)),
    "items": lambda: loader(Items(N)),
    "shuffled": lambda: loader(Items(N), shuffle=True),
    "batches": lambda: loader(InBatches(lambda: 1.0)),
    "batch sampler": lambda: DataLoader(Items(N), batch_sampler=[[3, 1], [2]]),
    "whole batches": lambda: DataLoader(
        numbered(N), batch_size=None, sampler=BatchSampler(torch.utils.data.RandomSampler(range(N)), 4, False)
    ),
    "seeded": lambda: loader(Changing(lambda: random.Random(5).random())),
    "own seed": lambda: loader(seed_of(torch.Generator().manual_seed(1))),
    "unused": lambda: loader(Changing(lambda: 0.0, generator=numpy_generator())),
    "stream": lambda: loader(Stream(range(N))),
    "shuffled stream": lambda: loader(ShuffledStream(range(N))),
    "workers": lambda: loader(Items(N), num_workers=2),
    "around": lambda: Around(loader(Items(N), shuffle=True)),
    "dict": lambda: CombinedLoader({"a": loader(Items(N)), "b": loader(numbered(N))}, "max_size"),
}
UNKNOWN: dict[str, Callable[[], Any]] = {
    "once": lambda: loader(Once()),
    "itself": lambda: loader(Itself()),
    "iterator": lambda: iter([torch.ones(2)]),
    "objects": lambda: loader(Items(N), collate_fn=lambda samples: object()),
    "failing": lambda: loader(Changing(lambda: 1 / 0)),
}


def test_what_a_dataset_keeps_is_not_changed() -> None:
    kept = [torch.ones(2) * number for number in range(20)]
    read = loader(kept, collate_fn=lambda samples: torch.stack([sample.add_(1) for sample in samples]))
    dataset_fingerprint(kept), keeps_order(read), draws_differ(read)
    assert [sample[0] for sample in kept] == list(range(20))


def states() -> list[Any]:
    numpy_state = np.random.get_state()
    return [torch.get_rng_state().tolist(), [numpy_state[1].tolist(), *numpy_state[2:]], random.getstate()]


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        *(pytest.param(build, True, id=f"different {name}") for name, build in DIFFERENT.items()),
        *(pytest.param(build, False, id=f"same {name}") for name, build in SAME.items()),
        *(pytest.param(build, None, id=f"unknown {name}") for name, build in UNKNOWN.items()),
    ],
)
def test_whether_the_data_are_the_same_at_every_pass(build: Callable[[], Any], expected: bool | None) -> None:
    before, passed = states(), build()
    assert draws_differ(passed) is expected
    assert states() == before


@pytest.mark.parametrize("name", [name for name in (*DIFFERENT, *SAME) if name not in ("operating system", "workers")])
def test_what_was_drawn_is_not_noticed_later(name: str) -> None:
    """The dataloader returns what it would have returned: own generators, counters and streams are where they were."""
    build = DIFFERENT.get(name) or SAME[name]
    passes = []
    for check in (False, True):
        torch.manual_seed(1), np.random.seed(1), random.seed(1)
        state = SHARED.bit_generator.state
        read = build()
        if check:
            draws_differ(read)
        batches = [batch for batch, *_ in read] if isinstance(read, CombinedLoader) else list(read)
        passes.append(str([[str(part) for part in batch] for batch in batches]))
        SHARED.bit_generator.state = state
    assert passes[0] == passes[1]


def test_a_stream_is_not_used_up() -> None:
    for build in (Once, Itself):
        read = loader(build(), batch_size=None)
        draws_differ(read)
        assert next(iter(read))[0] == (0 if build is Once else 1)


class File:
    """Is open as long as somebody has it."""

    num_open = 0

    def __init__(self) -> None:
        File.num_open += 1

    def __del__(self) -> None:
        File.num_open -= 1


class Lazy(Items):
    file: Any = None

    def __getitem__(self, index: int) -> Tensor:
        if self.file is None:
            self.file = File()
        return super().__getitem__(index)


def test_files_that_are_opened_at_first_use_are_closed_again() -> None:
    """Worker processes that are forked later would share their position."""
    data = Lazy(N)
    assert draws_differ(loader(data)) is False
    assert dataset_fingerprint(data) == dataset_fingerprint(Items(N))
    assert (data.file, data.read, File.num_open) == (None, [], 0)
    data[0]
    opened = data.file
    assert draws_differ(loader(data)) is False
    assert data.file is opened


class Augmenting(Module):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] + torch.rand(())] if dataloader_idx == 1 else batch


def test_what_hooks_do_to_a_batch_counts(tmp_path: Path) -> None:
    noting = Noting(num_dataloaders=2)
    trainer(tmp_path, noting).fit(Augmenting(), loader(numbered(N)), [loader(numbered(N)), loader(numbered(N))])
    assert noting.changing == [[1]] * 3


def test_fingerprints_of_datasets() -> None:
    others = [
        Items(N),
        Items(N + 1),
        numbered(N),
        numbered(N + 1),
        TensorDataset(torch.stack([x for (x,) in numbered(N)]).double()),
        InBatches(lambda: 1.0),
        InBatches(lambda: 2.0),
        default_collate([1, 2]),
        [1, 3],
    ]
    fingerprints = [dataset_fingerprint(other) for other in others]
    assert len(set(fingerprints)) == len(others)
    assert fingerprints[0] == dataset_fingerprint(Items(N))
    assert fingerprints[2] == dataset_fingerprint(numbered(N))
    one = numbered(1000)
    fingerprint = dataset_fingerprint(one)
    one.tensors[0][517, 1] += 1  # all of it counts
    assert dataset_fingerprint(one) != fingerprint
    # Of what changes, or can't be read in this way, there is none.
    unknown = [Changing(random.random), Changing(lambda: 1 / 0), {"a": 1}, [], Stream(range(3)), [object()] * 3]
    assert {dataset_fingerprint(each) for each in unknown} == {0}
    # What is known of a dataset is found again by drawing it once, and what is not, without.
    drawn: list[int] = []
    counted = InBatches(lambda: drawn.append(1) or 1.0)
    assert dataset_fingerprint(counted) == fingerprints[5]
    num_drawn = len(drawn)
    assert dataset_fingerprint(counted, fingerprints[5]) == fingerprints[5]
    assert len(drawn) == 1.5 * num_drawn
    assert dataset_fingerprint(counted, fingerprints[6]) == fingerprints[5]
    num_drawn = len(drawn)
    assert dataset_fingerprint(counted, 0) == 0
    assert len(drawn) == num_drawn


def test_the_last_sample_counts_for_the_fingerprint() -> None:
    class Last(Items):
        def __getitem__(self, index: int) -> Tensor:
            return super().__getitem__(index) + (index == N - 1)

    assert dataset_fingerprint(Last(N)) != dataset_fingerprint(Items(N))


def test_the_root_of_subsets() -> None:
    data = numbered(N)
    assert root_of(data) == (data, None)
    root, indices = root_of(Subset(Subset(data, torch.tensor([4, 7, 2])), [2, 0]))
    assert root is data
    assert indices.tolist() == [2, 4]
    by_name = Subset({"a": 1}, ["a"])  # type: ignore[arg-type]
    assert root_of(by_name) == (by_name, None)


class Words(Dataset[Tensor]):
    """Of several lengths."""

    def __getitem__(self, index: int) -> Tensor:
        return torch.arange(1 + index * 7 % 5) + index

    def __len__(self) -> int:
        return N


def padded(samples: list[Tensor]) -> dict[str, Tensor]:
    return {"tokens": pad_sequence(samples, batch_first=True), "length": torch.tensor([len(x) for x in samples])}


@pytest.mark.parametrize(
    ("collate", "expected"),
    [
        (padded, True),
        (lambda samples: padded(sorted(samples, key=len, reverse=True)), False),
        (lambda samples: padded(samples[::-1]), True),
        (lambda samples: [padded(samples), [str(len(x)) for x in samples]], True),
        (lambda samples: [str(x) for x in sorted(samples, key=len)], False),
        (lambda samples: torch.cat(samples), True),  # can't be told
        (lambda samples: object(), True),
        (lambda samples: 1 / 0, True),
        (lambda samples: torch.stack([sample.resize_(1).zero_() for sample in samples]), True),
    ],
    ids=["padded", "sorted", "reversed", "texts", "sorted texts", "packed", "object", "failing", "in place"],
)
def test_whether_batches_keep_the_order(collate: Callable[[Any], Any], expected: bool) -> None:
    before = states()
    assert keeps_order(loader(Words(), collate_fn=collate)) is expected
    assert states() == before
    assert keeps_order(loader(Words()))
    assert keeps_order(loader(Changing(random.random), collate_fn=torch.stack))
