"""Random generators and attributes of datasets, transforms, functions and modules: found, and left as they were."""

from __future__ import annotations

import functools
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, RandomSampler, Subset, TensorDataset

from lit_cka.samples.generators import advance, generators_in, preserved_attributes, preserved_generators

OF_THE_MODULE = np.random.default_rng(0)


class Noise:
    """A transform."""

    def __init__(self, generator: Any) -> None:
        self.generator = generator
        self.calls = 0

    def __call__(self, x: Any) -> Any:
        self.calls += 1
        return x


class Noisy(Dataset[Any]):
    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)

    def __getitem__(self, index: int) -> Any:
        return index

    def __len__(self) -> int:
        return 4


class OfTheModule(Noisy):
    def __getitem__(self, index: int) -> Any:
        return index + OF_THE_MODULE.random()


class Model(nn.Module):
    def __init__(self, generator: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 2), nn.Identity()])
        self.layers[1].options = {"generator": generator}


def collate_with(generator: Any) -> Any:
    def collate(samples: list[Any]) -> Any:
        generator.random()
        return samples

    return collate


GENERATORS = {
    "torch": lambda: torch.Generator().manual_seed(3),
    "numpy": lambda: np.random.default_rng(3),
    "philox": lambda: np.random.Generator(np.random.Philox(3)),
    "old numpy": lambda: np.random.RandomState(3),
    "python": lambda: random.Random(3),
}
HOLDERS = {
    "attribute": lambda generator: Noisy(rng=generator),
    "transform": lambda generator: Noisy(transform=Noise(generator)),
    "transforms": lambda generator: Noisy(transforms=[Noise(None), Noise(generator)]),
    "by name": lambda generator: Noisy(transforms={"train": Noise(generator)}),
    "subset": lambda generator: Subset(Noisy(transform=Noise(generator)), [0]),
    "several": lambda generator: ConcatDataset([Noisy(), Noisy(rng=generator)]),
    "sampler": lambda generator: RandomSampler(range(4), generator=generator),
    "loader": lambda generator: DataLoader(Noisy(rng=generator)),
    "function": collate_with,
    "partial": lambda generator: functools.partial(print, rng=generator),
    "method of it": lambda generator: generator.random if hasattr(generator, "random") else generator.manual_seed,
    "method": lambda generator: Noise(generator).__call__,
    "module": Model,
}


def draw(generator: Any) -> float:
    if isinstance(generator, torch.Generator):
        return torch.rand((), generator=generator).item()
    return float(generator.random())


@pytest.mark.parametrize("kind", list(GENERATORS))
@pytest.mark.parametrize("where", list(HOLDERS))
def test_generators_are_found_and_left_as_they_were(kind: str, where: str) -> None:
    generator, twin = GENERATORS[kind](), GENERATORS[kind]()
    holder = HOLDERS[where](generator)
    assert [id(found) for found in generators_in([holder, holder])] == [id(generator)]
    with preserved_generators([holder]):
        first = draw(generator)
        advance(generator, 3)
        fifth = draw(generator)
    drawn = [draw(generator) for _ in range(5)]
    assert drawn == [draw(twin) for _ in range(5)]
    assert (first, fifth) == (drawn[0], drawn[4])


def test_a_generator_of_the_module_that_a_dataset_uses() -> None:
    assert generators_in([OfTheModule()]) == [OF_THE_MODULE]
    assert generators_in([Noisy()]) == []
    with preserved_generators([OfTheModule()]):
        first = OfTheModule()[0]
    assert OfTheModule()[0] == first


def test_generators_of_the_operating_system_have_no_state() -> None:
    with preserved_generators([Noisy(rng=random.SystemRandom())]):
        pass


def test_attributes_are_left_as_they_were() -> None:
    transform = Noise(None)
    cache: dict[int, int] = {0: 1}
    seen = [5]
    table = [torch.ones(2), torch.ones(3)]
    dataset = Noisy(file=None, transform=transform, cache=cache, seen=seen, count=0, table=table)
    kept = dict(vars(dataset))
    with preserved_attributes([Subset(dataset, [0])]):
        dataset.file = object()
        dataset.count += 1
        dataset.more = 1
        del dataset.table
        transform(0)
        cache[0], cache[1] = 2, 3
        seen.append(6)
        table[0] = torch.zeros(2)
    assert vars(dataset) == kept
    assert torch.equal(table[0], torch.ones(2))
    assert dataset.cache is cache
    assert (cache, seen, transform.calls) == ({0: 1}, [5], 0)


def test_what_does_not_change_is_not_touched() -> None:
    class Counting(Noisy):
        def __setattr__(self, name: str, value: Any) -> None:
            raise AssertionError(name)

    dataset = Counting(a=[1])
    with preserved_attributes([dataset, TensorDataset(torch.ones(2))]):
        assert dataset[0] == 0
