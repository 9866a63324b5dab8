"""The indices that dataloaders read, noted in real trainings that are bit for bit the same as without."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lit_cka.samples.sampler_indices import LoopWatch
from lit_cka.samples.samples import EvaluationSamples
from tests.samples.sample_data import Items, Module, Noting, Stream, fitted, numbered
from tests.tracking.helpers import trainer

N = 21
# Fewer processors than workers, and what is asked for here: torch and Lightning say so.
pytestmark = pytest.mark.filterwarnings(
    "ignore:This DataLoader will create:UserWarning", "ignore:Your `.*_dataloader`'s sampler has shuffling enabled"
)


class Reused(Sampler[list[int]]):
    """Yields one list again and again."""

    def __iter__(self) -> Iterator[list[int]]:
        batch: list[int] = []
        for index in range(N):
            batch.append(index)
            if len(batch) == 4 or index == N - 1:
                yield batch
                batch.clear()

    def __len__(self) -> int:
        return 6


class Slotted:
    """A sampler of batches of tensors, without attributes."""

    __slots__ = ()

    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.randperm(N).split(5))

    def __len__(self) -> int:
        return 5


class Mapped(Dataset[Any]):
    """Has its samples by name."""

    def __getitem__(self, name: str) -> Tensor:
        return numbered(1, int(name[1:]))[0][0]


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(2)


def loader(**options: Any) -> DataLoader:
    return DataLoader(numbered(N), **{"batch_size": 4, **options})


def batches_of(**options: Any) -> DataLoader:
    return DataLoader(numbered(N), **options)


LOADERS: dict[str, Callable[[], DataLoader]] = {
    "plain": loader,
    "shuffled": lambda: loader(shuffle=True),
    "generator": lambda: loader(shuffle=True, generator=generator()),
    "dropping": lambda: loader(drop_last=True),
    "some": lambda: loader(sampler=SubsetRandomSampler(range(3, 17), generator=generator())),
    "weighted": lambda: loader(sampler=WeightedRandomSampler(torch.ones(N), 30)),
    "replacing": lambda: loader(sampler=RandomSampler(range(N), replacement=True, num_samples=70)),
    "list of indices": lambda: loader(sampler=[5, 3, 3, 1]),
    "batch sampler": lambda: batches_of(batch_sampler=BatchSampler(RandomSampler(range(N)), 4, False)),
    "list of batches": lambda: batches_of(batch_sampler=[[5, 3], [1], [2, 20, 4]]),
    "tuples": lambda: batches_of(batch_sampler=((5, 3), (1,), range(4, 8))),
    "reused": lambda: batches_of(batch_sampler=Reused()),
    "slotted": lambda: batches_of(batch_sampler=Slotted()),
    "workers": lambda: loader(shuffle=True, num_workers=2),
    "persistent": lambda: loader(shuffle=True, num_workers=2, persistent_workers=True),
    "persistent list": lambda: batches_of(batch_sampler=[[5, 3], [1], [2]], num_workers=1, persistent_workers=True),
    "items": lambda: DataLoader(Items(N), 4, shuffle=True),
    "by name": lambda: DataLoader(Mapped(), 2, sampler=["n3", "n1", "n4"]),
}


def outcome(module: Module, run: pl.Trainer) -> list[Any]:
    """All that a training has seen and left behind."""
    numpy_state = np.random.get_state()
    return [
        module.seen,
        [value.tolist() for value in module.state_dict().values()],
        torch.get_rng_state().tolist(),
        [numpy_state[1].tolist(), *numpy_state[2:]],
        random.getstate(),
    ]


@pytest.mark.parametrize("name", list(LOADERS))
def test_each_sample_has_the_key_of_its_index(tmp_path: Path, name: str) -> None:
    noting = Noting()
    unwatched = LOADERS[name]()
    plain = outcome(*fitted(tmp_path, unwatched))
    watched = LOADERS[name]()
    before = vars(watched).copy()
    module, run = fitted(tmp_path, watched, noting)
    assert outcome(module, run) == plain
    assert name != "items" or watched.dataset.read == unwatched.dataset.read
    assert len(noting.passes) == 2
    keys: dict[int, tuple[int, int]] = {}
    for noted in (each[0] for each in noting.passes):
        assert set(noted.kinds) == {"index"}
        assert len(noted.keys) == len(noted.numbers) > 2
        for number, key in zip(noted.numbers, noted.keys, strict=True):
            assert keys.setdefault(number, key) == key  # in both passes
            assert name == "by name" or key[0] == number
        assert sorted(noted.counts()) == sorted(set(noted.numbers))
    assert len(set(keys.values())) == len(keys)
    assert noting.changing == [[]] * len(noting.changing)
    # Everything is as it was: the dataloader, and the loops.
    assert vars(watched).keys() == before.keys()
    assert all(vars(watched)[key] is value for key, value in before.items() if key != "_iterator")
    for loop in (run.fit_loop.epoch_loop.val_loop, run.validate_loop, run.test_loop):
        assert "reset" not in vars(loop)


class Filtering(DataLoader):
    """Leaves out some batches."""

    def __iter__(self) -> Iterator[Any]:
        return (batch for batch in super().__iter__() if batch[0][0, 0] != 4)


class Wrapped:
    """An iterable of batches that is no dataloader."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)

    def __len__(self) -> int:
        return len(self.loader)


UNKNOWN: dict[str, Callable[[], Any]] = {
    "filtering": lambda: Filtering(numbered(N), 4),
    "wrapped": lambda: Wrapped(loader()),
    "out of order": lambda: loader(num_workers=2, in_order=False),
    "stream": lambda: DataLoader(Stream(range(N)), 4),
    "stream of workers": lambda: DataLoader(Stream(range(N)), 4, num_workers=1),
    "whole batches": lambda: batches_of(batch_size=None, sampler=BatchSampler(SequentialSampler(range(N)), 4, False)),
    "batches": lambda: Wrapped([loader().dataset[i : i + 4] for i in range(0, N, 4)]),
    "generators of indices": lambda: batches_of(batch_sampler=[(i for i in (5, 3)), map(int, "12")]),
}


@pytest.mark.parametrize("name", list(UNKNOWN))
def test_where_the_indices_cannot_be_told_samples_have_the_keys_of_their_content(tmp_path: Path, name: str) -> None:
    noting = Noting()
    options = {"max_epochs": 1, "num_sanity_val_steps": 0}
    plain = outcome(*fitted(tmp_path, UNKNOWN[name](), **options))
    watched = UNKNOWN[name]()
    module, run = fitted(tmp_path, watched, noting, **options)
    assert outcome(module, run) == plain or name == "out of order"
    noted = noting.passes[0][0]
    assert set(noted.kinds) == {"hash"}
    assert len(set(noted.keys)) == len(noted.numbers) == len(set(noted.numbers)) > 3
    assert noted.counts() == noted.numbers


def test_a_dataloader_for_training_and_validation_at_once(tmp_path: Path) -> None:
    """Validations in the middle of an epoch, and the same dataloader twice: each iteration has its own indices."""
    shared = loader(shuffle=True, num_workers=1)
    noting = Noting(num_dataloaders=2)
    run = trainer(tmp_path, noting, val_check_interval=2)
    run.fit(Module(), shared, [shared, shared])
    assert len(noting.passes) == 6
    for noted in (each[dataloader] for each in noting.passes for dataloader in (0, 1)):
        assert [key[0] for key in noted.keys] == noted.numbers
        assert sorted(noted.numbers) == list(range(N))


class Reloading(pl.LightningDataModule):
    def __init__(self, build: Callable[[int], Any]) -> None:
        super().__init__()
        self.build = build
        self.num_built = 0

    def train_dataloader(self) -> DataLoader:
        return loader()

    def val_dataloader(self) -> Any:
        self.num_built += 1
        return self.build(self.num_built)


def test_dataloaders_that_are_made_anew(tmp_path: Path) -> None:
    noting, data = Noting(), Reloading(lambda number: loader(shuffle=True, batch_size=2 + number))
    trainer(tmp_path, noting, reload_dataloaders_every_n_epochs=1, max_epochs=3).fit(Module(), data)
    assert data.num_built >= 3
    keys = [dict(zip(each[0].numbers, each[0].keys, strict=True)) for each in noting.passes]
    assert keys[0] == keys[1] == keys[2]
    assert list(keys[0]) != list(keys[1])


def test_other_data_have_other_keys(tmp_path: Path) -> None:
    """By the fingerprint of the dataset, also where they are as many."""
    noting, data = Noting(), Reloading(lambda number: DataLoader(numbered(N, start=number), 4))
    trainer(tmp_path, noting, reload_dataloaders_every_n_epochs=1, num_sanity_val_steps=0).fit(Module(), data)
    first, second = (each[0] for each in noting.passes)
    assert set(first.kinds) == set(second.kinds) == {"index"}
    assert not set(first.keys) & set(second.keys)


def test_parts_of_a_dataset_have_its_keys(tmp_path: Path) -> None:
    data = Items(N)
    one, other = torch.utils.data.Subset(data, [4, 2, 7, 9]), torch.utils.data.Subset(data, range(3, 12))
    inner = torch.utils.data.Subset(other, [1, 3, 4])  # 4, 6, 7
    noting = Noting(num_dataloaders=4)
    run = trainer(tmp_path, noting, num_sanity_val_steps=0, max_epochs=1)
    run.fit(Module(), loader(), [DataLoader(part, 2) for part in (data, one, other, inner)])
    whole = dict(zip(noting.passes[0][0].numbers, noting.passes[0][0].keys, strict=True))
    assert len(whole) == N
    for dataloader in (1, 2, 3):
        noted = noting.passes[0][dataloader]
        assert noted.keys == [whole[number] for number in noted.numbers]
    assert data.read[-3:] == [4, 6, 7]


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda: [loader(), [loader(shuffle=True), loader(batch_size=5)]], 3),
        (lambda: {"a": [loader(), loader()], "b": loader(batch_size=3)}, 3),
        (lambda: [loader(), CombinedLoader([loader(), loader(batch_size=4)], "min_size")], 2),
        (lambda: CombinedLoader({"a": loader(), "b": [loader(batch_size=2)]}, "sequential"), 2),
    ],
    ids=["list", "dict", "side by side within", "sequential"],
)
def test_nested_dataloaders(tmp_path: Path, build: Callable[[], Any], expected: int) -> None:
    noting = Noting(num_dataloaders=expected)
    module = Module()
    trainer(tmp_path, noting, max_epochs=1).fit(module, loader(), build())
    assert {seen[1] for seen in module.seen} == set(range(expected))
    for noted in noting.passes[0].values():
        assert set(noted.kinds) == {"index"}
        assert sorted(noted.numbers) == list(range(N))
        assert noted.counts() == noted.numbers
        assert len(set(noted.keys)) == N


@pytest.mark.parametrize("mode", ["min_size", "max_size", "max_size_cycle"])
def test_dataloaders_side_by_side(tmp_path: Path, mode: str) -> None:
    """A sample is a pair: the same numbers in another pair are another sample."""
    noting = Noting()
    module = Module()
    val = CombinedLoader({"a": DataLoader(numbered(20), 4), "b": DataLoader(numbered(8), 4)}, mode)
    trainer(tmp_path, noting, num_sanity_val_steps=1).fit(module, loader(), val)
    first, second = (each[0] for each in noting.passes)
    assert first == second
    batches = [batch for _, _, batch, _ in module.seen[1 : 1 + len(first.kinds)]]
    pairs = [
        (a[0], None if batch["b"] is None else batch["b"][0][row][0])
        for batch in batches
        for row, a in enumerate(batch["a"][0])
    ]
    assert len(pairs) == len(first.keys) == {"min_size": 8, "max_size": 20, "max_size_cycle": 20}[mode]
    assert set(first.kinds) == {"index"}
    assert len(set(first.keys)) == len(set(pairs)) == len(pairs)
    assert all(first.counted)


def test_a_dataloader_that_starts_again_beside_a_longer_one(tmp_path: Path) -> None:
    """Its samples are those of one that is read once and repeats them."""
    passes = []
    for mode, sampler in (("max_size_cycle", range(8)), ("max_size", [*range(8), *range(8), *range(4)])):
        noting = Noting()
        val = CombinedLoader([DataLoader(numbered(20), 4), DataLoader(numbered(8), 4, sampler=sampler)], mode)
        trainer(tmp_path, noting, num_sanity_val_steps=0).fit(Module(), loader(), val)
        passes.append(noting.passes)
    assert passes[0] == passes[1]


class Announcing(DataLoader):
    """Does something else before it is read."""

    num_read = 0

    def __iter__(self) -> Iterator[Any]:
        self.num_read += 1
        return super().__iter__()


class Skipping(DataLoader):
    def __iter__(self) -> Iterator[Any]:
        iterator = super().__iter__()
        next(iterator)
        return iterator


@pytest.mark.parametrize(("kind", "known_by"), [(Announcing, "index"), (Skipping, "hash")])
def test_dataloaders_that_iterate_in_their_own_way(tmp_path: Path, kind: Any, known_by: str) -> None:
    noting = Noting()
    fitted(tmp_path, kind(numbered(N), 4), noting, num_sanity_val_steps=0)
    noted = noting.passes[0][0]
    assert set(noted.kinds) == {known_by}
    assert noted.numbers == list(range(N))[4 if kind is Skipping else 0 :]


def test_pairs_of_other_numbers_of_samples_are_known_by_the_whole_batch(tmp_path: Path) -> None:
    noting = Noting()
    val = CombinedLoader([DataLoader(numbered(12), 4), DataLoader(numbered(6), 2)], "min_size")
    trainer(tmp_path, noting).fit(Module(), loader(), val)
    first, second = (each[0] for each in noting.passes)
    assert first.keys == second.keys
    assert set(first.kinds) == {"hash"}


def test_users_may_come_and_go_in_any_order(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    loops = [run.fit_loop.epoch_loop.val_loop, run.validate_loop, run.test_loop]
    users = [EvaluationSamples(run) for _ in range(3)]
    for user in users:
        user.watch()
    for user in (users[1], users[0]):
        user.close()
        user.close()
        assert all(isinstance(vars(loop)["reset"], LoopWatch) for loop in loops)
    users[2].close()
    assert all("reset" not in vars(loop) for loop in loops)
    # What another one has put there stays, before and after.
    calls: list[int] = []
    loops[0].reset = lambda: calls.append(1)
    replaced = loops[0].reset
    users[0].watch()
    loops[0].reset()
    assert calls == [1]
    users[0].close()
    assert loops[0].reset is replaced
    users[0].watch()
    watch = loops[1].reset
    loops[1].reset = lambda: watch()
    users[0].close()
    assert not watch.users
    assert vars(loops[1])["reset"] is not watch


def test_two_callbacks_and_an_exception(tmp_path: Path) -> None:
    class Failing(Module):
        def validation_step(self, *args: Any) -> None:
            raise KeyError("a step that fails")

    one, two = Noting(key="one"), Noting(key="two")
    run = trainer(tmp_path, one, two)
    val = loader(num_workers=1)
    with pytest.raises(KeyError, match="a step that fails"):
        run.fit(Failing(), loader(), val)
    assert type(val.batch_sampler) is BatchSampler
    for noting in (one, two):
        noting.samples.close()
    assert "reset" not in vars(run.fit_loop.epoch_loop.val_loop)
    run = trainer(tmp_path, one, two)
    run.fit(Module(), loader(), val)
    assert one.passes == two.passes
    assert len(one.passes) == 2


def test_dataloaders_can_be_copied_and_pickled_meanwhile(tmp_path: Path) -> None:
    class Copying(Module):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            for copied in (copy.deepcopy(val), pickle.loads(pickle.dumps(val))):
                assert [len(each[0]) for each in copied] == [4] * 5 + [1]

    val = loader()
    noting = Noting()
    trainer(tmp_path, noting).fit(Copying(), loader(), val)
    assert [key[0] for key in noting.passes[0][0].keys] == list(range(N))


def test_workers_that_are_used_again_have_the_dataloaders_own_sampler(tmp_path: Path) -> None:
    class Looking(Module):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.seen.append(val._iterator._index_sampler is val.batch_sampler)

    val = loader(num_workers=1, persistent_workers=True)
    module = Looking()
    trainer(tmp_path, Noting()).fit(module, loader(), val)
    assert module.seen == [True] * 14


class Taking(Module):
    """Takes its batches from the iterator."""

    def validation_step(self, dataloader_iter: Iterator[Any]) -> None:
        self.seen.append(next(dataloader_iter))


@pytest.mark.filterwarnings(
    "ignore:Found `dataloader_iter` argument in the `validation_step`",
    "ignore:You are using the `dataloader_iter` step",
)
def test_a_step_that_takes_its_batches_itself(tmp_path: Path) -> None:
    noting = Noting()
    trainer(tmp_path, noting).validate(Taking(), loader(shuffle=True), verbose=False)
    noted = noting.passes[0][0]
    assert [key[0] for key in noted.keys] == noted.numbers
    assert sorted(noted.counts()) == list(range(N))


def test_validate_and_test_of_their_own(tmp_path: Path) -> None:
    noting = Noting()
    run = trainer(tmp_path, noting)
    run.validate(Module(), loader(shuffle=True), verbose=False)
    run.test(Module(), loader(batch_size=6, shuffle=True), verbose=False)
    first, second = (dict(zip(each[0].numbers, each[0].keys, strict=True)) for each in noting.passes)
    assert first == second
    assert noting.num_samples == [N]
    assert len(first) == N
