"""A recording finds what was recorded of a sample, by its key or its content, in any order; budgets and files."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lit_cka.reference import recording as module
from lit_cka.reference.recorded_dataloader import GAP
from lit_cka.reference.recording import Dataloader, Recording
from lit_cka.reference.sample_index import UNKNOWN
from lit_cka.samples.batch_rows import BatchRows
from lit_cka.samples.sample_keys import BatchSamples

CPU = torch.device("cpu")
HERE = Dataloader("validate", 0)


def samples(indices: list[int], content: list[int] | None = None) -> BatchSamples:
    keys = torch.tensor([[index, 1] for index in indices], dtype=torch.int64).reshape(-1, 2)
    batch = BatchSamples("index", keys, torch.ones(len(keys), dtype=torch.bool), BatchRows(Counter(), set(), set()))
    if content is not None:
        batch.content = torch.tensor([[each, 4] for each in content], dtype=torch.int64).reshape(-1, 2)
    return batch


def features(n: int = 6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(n)
    return {name: torch.randn(n, width, generator=generator, dtype=torch.float64) + 5 for name, width in WIDTHS.items()}


WIDTHS = {"a": 3, "b": 2}


def recorded(tmp_path: Path, max_bytes: float = 1e9, **options: str) -> Recording:
    recording = Recording(list(WIDTHS), max_bytes, options.get("dtype", "auto"), tmp_path)  # type: ignore[arg-type]
    recording.start(HERE)
    X = features()
    for part in ([0, 1, 2, 3], [4, 5]):
        batch = samples(part, [100 + index for index in part])
        assert recording.add(HERE, batch, {name: value[part] for name, value in X.items()}) == {}
    return recording


def found(recording: Recording, name: str, keys: Tensor) -> Tensor:
    dataloader = recording.dataloaders[HERE]
    return dataloader.stores[name].rows(dataloader.find_keys(name, keys), CPU)


@pytest.mark.parametrize("max_bytes", [0, 100, 1e9])
def test_in_any_order_and_composition(tmp_path: Path, max_bytes: float) -> None:
    recording = recorded(tmp_path, max_bytes)
    for indices in ([5, 0, 3], [2], [4, 5], [0, 1, 2, 3, 4, 5]):
        for name, value in features().items():
            torch.testing.assert_close(found(recording, name, samples(indices).keys), value[indices])
    assert not list(tmp_path.iterdir())


def test_what_was_not_recorded_is_unknown(tmp_path: Path) -> None:
    recording = recorded(tmp_path)
    keys = samples([7, 2, -1]).keys
    assert recording.dataloaders[HERE].find_keys("a", keys).tolist() == [UNKNOWN, 2, UNKNOWN]
    assert recording.dataloaders[HERE].find_keys("c", keys).tolist() == [UNKNOWN] * 3
    other = keys.clone()
    other[:, 1] = 9  # of another dataset
    assert recording.dataloaders[HERE].find_keys("a", other).tolist() == [UNKNOWN] * 3


def test_samples_of_another_dataset_are_found_by_their_content(tmp_path: Path) -> None:
    recording = recorded(tmp_path)
    asked = samples([50, 51, 52], [103, 7, 100])
    asked.keys[:, 1] = 9
    assert asked.content is not None
    keys = torch.cat([asked.keys, asked.content], dim=1)
    assert recording.dataloaders[HERE].find_keys("a", keys).tolist() == [3, UNKNOWN, 0]


def test_a_layer_that_misses_a_batch_has_a_gap(tmp_path: Path) -> None:
    recording, X = Recording(list(WIDTHS), 1e9, "auto", tmp_path), features()
    recording.start(HERE)
    for part, names in (([0, 1], "ab"), ([2, 3], "b"), ([4, 5], "ab")):
        recording.add(HERE, samples(part), {name: X[name][part] for name in names})
    assert recording.dataloaders[HERE].find_keys("a", samples([1, 2, 4]).keys).tolist() == [1, GAP, 4]
    torch.testing.assert_close(found(recording, "a", samples([5, 1]).keys), X["a"][[5, 1]])
    torch.testing.assert_close(found(recording, "b", samples([5, 2]).keys), X["b"][[5, 2]])


def test_through_a_file_and_back(tmp_path: Path) -> None:
    recording = recorded(tmp_path)
    tensors, notes = recording.tensors()
    again = Recording(list(WIDTHS), 1e9, "auto", tmp_path)
    assert again.fits(notes)
    assert not Recording(["a"], 1e9, "auto", tmp_path).fits(notes)
    again.load(tensors, notes)
    for name, value in features().items():
        torch.testing.assert_close(found(again, name, samples([4, 0]).keys), value[[4, 0]])
    assert again.dataloaders[HERE].knows(samples([5, 1]))
    assert not again.dataloaders[HERE].knows(samples([5, 9]))


def test_shares_of_two_ranks_are_put_together(tmp_path: Path) -> None:
    X, shares = features(), [[0, 2, 4], [1, 3, 5]]
    together = Recording(list(WIDTHS), 1e9, "auto", tmp_path)
    for share in shares:
        one = Recording(list(WIDTHS), 1e9, "auto", tmp_path)
        one.start(HERE)
        one.add(HERE, samples(share), {name: value[share] for name, value in X.items()})
        together.load(*one.tensors())
    for name, value in X.items():
        torch.testing.assert_close(found(together, name, samples([3, 4, 0]).keys), value[[3, 4, 0]])


def test_many_features_are_kept_in_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FLOAT64_BYTES", 100)
    recording = recorded(tmp_path)
    assert {block.dtype for block in recording.dataloaders[HERE].stores["a"].blocks} == {torch.float32}
    exact = recorded(tmp_path, dtype="float64")
    assert {block.dtype for block in exact.dataloaders[HERE].stores["a"].blocks} == {torch.float64}
    for name, value in features().items():
        torch.testing.assert_close(found(recording, name, samples([4, 0]).keys), value[[4, 0]], rtol=0, atol=1e-6)


def test_which_dataset_was_recorded(tmp_path: Path) -> None:
    dataloader = recorded(tmp_path).dataloaders[HERE]
    assert dataloader.is_of({1})
    assert dataloader.is_of(set())  # that isn't known
    assert not dataloader.is_of({9})
