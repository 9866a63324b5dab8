"""Sums of all ranks' moments: every field, at a fixed cost in memory, whatever some ranks lack."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lit_cka.functional.moments import PairedMoments, paired_moments
from tests import sync_worker
from tests.sync_worker import seen_by_ranks

pytestmark = pytest.mark.slow  # those of layers and of the metric, of as many ranks, are among the others


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the processes of `sync_worker.py` have left what they saw; all of them have ended, or been ended."""
    folder = tmp_path_factory.mktemp("sync")
    sync_worker.run_to_end(sync_worker.__file__, folder, "moments", "sizes", "memory")
    return folder


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_moments_of_all_ranks_are_those_of_all_samples(folder: Path, world_size: int) -> None:
    ranks = seen_by_ranks(folder, "moments", world_size)
    for case, (num_samples, _) in enumerate(sync_worker.CASES):
        expected = paired_moments(*sync_worker.case_features(case))._asdict()
        assert expected["n"] == num_samples
        for name, value in expected.items():
            scale = max(float(value.abs().max()), 1)
            for seen in ranks:
                torch.testing.assert_close(seen[f"{case} {name}"], value, rtol=0, atol=1e-10 * scale, msg=name)
                assert torch.equal(seen[f"{case} {name}"], ranks[0][f"{case} {name}"])  # no rank differs by a bit


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_moments_of_a_rank_are_left_alone(folder: Path, world_size: int) -> None:
    for seen in seen_by_ranks(folder, "moments", world_size):
        assert all(seen[f"{case} alone"] for case in range(len(sync_worker.CASES)))
    assert set(PairedMoments._fields) <= {name.split()[1] for name in seen}


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_agree_on_sizes_that_some_do_not_know(folder: Path, world_size: int) -> None:
    for seen in seen_by_ranks(folder, "sizes", world_size):
        for start in range(len(sync_worker.SIZES)):
            known = [sync_worker.SIZES[(start + rank) % len(sync_worker.SIZES)] for rank in range(world_size)]
            assert seen[f"agreed {start}"].tolist() == [max(sizes) for sizes in zip(*known, strict=True)]
        assert seen["none"].tolist() == [0, 0]


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_that_differ_all_say_so(folder: Path, world_size: int) -> None:
    for seen in seen_by_ranks(folder, "sizes", world_size):
        assert seen["differ 0"] == "Expected the same sizes on all ranks, but got from [5, 4] to [6, 4]."
        assert seen["differ 1"] == "Expected the same sizes on all ranks, but got from [5, 4] to [5, 5]."


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read from Linux's /proc")
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_synchronising_takes_twice_the_memory_of_the_state_on_any_number_of_ranks(
    folder: Path, world_size: int
) -> None:
    for seen in seen_by_ranks(folder, "memory", world_size):
        assert 0.5 < seen["share"] < 2  # less than 0.5 would not have been measured
