"""Each sample counts once, on any number of ranks, however the data are shared out; and has one key everywhere."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, DistributedSampler

from tests import sync_worker
from tests.samples import samples_worker
from tests.samples.sample_data import Items, Module, Noted, Noting, Stream, fitted, numbered
from tests.samples.samples_worker import BATCH_SIZE, KINDS, N, part
from tests.tracking.helpers import trainer

WORLD_SIZES = pytest.mark.parametrize("world_size", [1, 2, 3])
# Kinds of which some samples are never read, by the sampler's choice: all that are read count.
CHOSEN = {"at random", "wrapped", "weighted"}
# Where the ranks need not tell each other.
KNOWN = {
    "injected", "shuffled", "workers", "dropping", "contiguous", "in place", "wrapped in order", "limited",
    "limited contiguous", "most", "most shuffled", "most contiguous", "nested",
}  # fmt: skip
BY_HASH = {
    "streams", "streams with doubles", "the same stream", "streams that overlap", "iteration of its own", "twice",
    "most of a stream",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the processes of `samples_worker.py` have left what they noted; all of them have ended, or been ended."""
    folder = tmp_path_factory.mktemp("samples")
    sync_worker.run_to_end(samples_worker.__file__, folder, seconds=280)
    return folder


def noted_by_ranks(folder: Path, job: str, world_size: int) -> list[dict[str, list[list[Noted]]]]:
    files = [folder / f"{job}-{world_size}-{rank}.json" for rank in range(world_size)]
    assert [file.name for file in files if not file.exists()] == []
    return [
        {
            kind: [[Noted(**noted) for noted in of_pass] for of_pass in passes]
            for kind, passes in json.loads(file.read_text()).items()
        }
        for file in files
    ]


def expected(kind: str, world_size: int, held: set[int]) -> Counter[int]:
    """How often each sample is to count."""
    everything = range(N)
    if kind == "dropping":
        assert len(held) == N // world_size * world_size
        return Counter(held)
    if kind == "streams with doubles":
        shares = [[i // 2 * 2 for i in range(N)][rank * 4 :: world_size * 9] for rank in range(world_size)]
        counts: Counter[int] = Counter()
        for share in shares:
            counts |= Counter(share)  # as often as on the rank that has it most often
        return counts
    if kind == "wrapped in order":
        return Counter(range(2, 16))
    if kind == "twice":
        return Counter([*everything, *(number + 100 for number in everything)])
    if kind == "most":
        return Counter(range(4 * BATCH_SIZE))
    if kind == "most shuffled":
        return Counter(list(DistributedSampler(numbered(N), 1, 0, seed=3))[: 4 * BATCH_SIZE])
    if kind == "most of a stream":
        return Counter([number for rank in range(world_size) for number in range(rank, N, world_size)[:4]])
    if kind == "most contiguous":
        size = math.ceil(N / world_size)
        return Counter({number for rank in range(world_size) for number in range(rank * size, min(rank * size + 6, N))})
    return Counter(held if kind in CHOSEN or "limited" in kind or "overlap" in kind else everything)


@WORLD_SIZES
@pytest.mark.parametrize("kind", list(KINDS))
def test_each_sample_counts_once(folder: Path, kind: str, world_size: int) -> None:
    ranks = [noted[kind] for noted in noted_by_ranks(folder, "validated", world_size)]
    keys: dict[int, tuple[int, int]] = {}
    for dataloader in range(len(ranks[0][0])):
        noted = [passes[0][dataloader] for passes in ranks]
        counts: Counter[int] = Counter()
        for each in noted:
            counts.update(each.counts())
        held = {number for each in noted for number in each.numbers}
        assert counts == expected(kind, world_size, held)
        assert {each.was_open for each in noted} == {world_size > 1 and kind not in KNOWN}
        assert {name for each in noted for name in each.kinds} == {"hash" if kind in BY_HASH else "index"}
        for each in noted:
            for sample, key in zip(each.numbers, each.keys, strict=True):
                assert keys.setdefault(sample, key) == key
    assert len(set(map(tuple, keys.values()))) == len(keys)


def test_keys_are_the_same_on_any_number_of_ranks(folder: Path) -> None:
    """But where each rank has a dataset of its own that nothing is known of."""
    keys: dict[tuple[str, int], Any] = {}
    for world_size in (1, 2, 3):
        for noted in noted_by_ranks(folder, "validated", world_size):
            for kind in KINDS.keys() - {"own tensors", "side by side"}:
                for sample, key in zip(noted[kind][0][0].numbers, noted[kind][0][0].keys, strict=True):
                    assert keys.setdefault((kind, sample), key) == key
    assert len({tuple(key) for (kind, _), key in keys.items() if kind not in BY_HASH}) == 2 * N  # tensors and items
    assert [len(part(rank, 3)) for rank in range(3)] == [5, 5, 11]


@WORLD_SIZES
def test_a_fit_with_samples_that_come_to_other_ranks(folder: Path, world_size: int) -> None:
    keys: dict[int, Any] = {}
    ranks = [noted["fitted"] for noted in noted_by_ranks(folder, "fitted", world_size)]
    orders = []
    for number in range(3):
        noted = [passes[number][0] for passes in ranks]
        assert sorted(sample for each in noted for sample in each.counts()) == list(range(N))
        for each in noted:
            assert not each.was_open
            for sample, key in zip(each.numbers, each.keys, strict=True):
                assert keys.setdefault(sample, key) == key
        orders.append(noted[0].numbers)
    assert orders[0] != orders[1] != orders[2]


@pytest.mark.parametrize("kind", ["injected", "own sampler"])
def test_ranks_that_have_parts_of_one_model_count_as_one(folder: Path, kind: str) -> None:
    ranks = [noted[kind][0][0] for noted in noted_by_ranks(folder, "in_parts", 4)]
    assert ranks[0] == ranks[1] != ranks[2] == ranks[3]
    assert sorted([*ranks[0].counts(), *ranks[2].counts()]) == list(range(N))


def padded(samples: list[Tensor]) -> Tensor:
    return pad_sequence(sorted(samples, key=len, reverse=True), batch_first=True)


class Words(Items):
    """Of several lengths."""

    def __getitem__(self, index: int) -> Tensor:
        return torch.full((1 + index * 5 % 7, 2), float(index))


def named(samples: list[Any]) -> dict[str, Tensor]:
    return {"x": torch.stack(samples)}


def corrupt(samples: list[Any]) -> Tensor:
    """Leaves out every fifth sample."""
    return torch.stack([sample for sample in samples if sample[0] % 5])


@pytest.mark.parametrize(
    ("build", "kind"),
    [
        (lambda: DataLoader(Words(N), 4, shuffle=True, collate_fn=padded), "hash"),
        (lambda: DataLoader(Items(N), 7, shuffle=True, collate_fn=corrupt), "hash"),
        (lambda: DataLoader(Items(N), 4, shuffle=True, collate_fn=named), "index"),
        (lambda: DataLoader(Stream(range(N)), 4, collate_fn=lambda samples: [named(samples), object()]), "unknown"),
    ],
    ids=["sorted", "filtered", "dict", "objects"],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Your `.*_dataloader`'s sampler has shuffling enabled")
def test_keys_are_those_of_the_rows_of_the_batch(tmp_path: Path, build: Callable[[], Any], kind: str) -> None:
    """Also where the rows are not in the order of the indices, or fewer."""
    noting = Noting()
    fitted(tmp_path, build(), noting)
    noted = noting.passes[0][0]
    assert kind in noted.kinds
    if kind == "unknown":
        assert noted.keys == []
    elif kind == "index":
        assert [key[0] for key in noted.keys] == noted.numbers
    else:
        assert "index" not in noted.kinds or noted.kinds.count("index") == 1  # a batch where nothing was left out


@pytest.mark.parametrize("max_batches", [None, 2])
def test_repeated_samples_count_once_in_one_process(tmp_path: Path, max_batches: int | None) -> None:
    noting = Noting(max_batches=max_batches)
    data = DataLoader(numbered(N), batch_sampler=[[1, 2, 1], [3, 2, 4], [5, 1]])
    trainer(tmp_path, noting).validate(Module(), data, verbose=False)
    noted = noting.passes[0][0]
    assert noted.numbers == [1, 2, 1, 3, 2, 4, 5, 1]
    assert noted.counted == [True, True, False, True, False, True, max_batches is None, False]
    assert noted.keys[0] == noted.keys[2] == noted.keys[7]


def test_samples_of_a_stream_count_as_often_as_they_come(tmp_path: Path) -> None:
    noting = Noting()
    trainer(tmp_path, noting).validate(Module(), DataLoader(Stream([1, 2, 1, 1]), 3), verbose=False)
    noted = noting.passes[0][0]
    assert noted.counted == [True] * 4
    assert noted.keys[0] == noted.keys[2] == noted.keys[3] != noted.keys[1]


def test_the_number_of_samples(tmp_path: Path) -> None:
    noting = Noting(num_dataloaders=3)
    data = [DataLoader(numbered(N), 4), DataLoader(Stream(range(3))), CombinedLoader([DataLoader(numbered(3))])]
    trainer(tmp_path, noting).validate(Module(), data, verbose=False)
    assert noting.num_samples == [N, None, None]
