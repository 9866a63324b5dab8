"""Ranks that agree: all get what each has found, and an error on one is an error on all."""

from __future__ import annotations

from pathlib import Path

import pytest

from lit_cka.parallel.ranks import Ranks, is_distributed, run_on_all_ranks
from tests import sync_worker
from tests.sync_worker import seen_by_ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the processes of `sync_worker.py` have left what they saw; all of them have ended, or been ended."""
    folder = tmp_path_factory.mktemp("sync")
    sync_worker.run_to_end(sync_worker.__file__, folder, "together")
    return folder


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_all_get_what_each_has_found(folder: Path, world_size: int) -> None:
    everything = [{"rank": rank} for rank in range(world_size)]
    for rank, seen in enumerate(seen_by_ranks(folder, "together", world_size)):
        assert seen["distributed"] is True
        assert seen["ranks"] == str(everything)
        assert seen["sizes"] == str((rank, world_size, list(range(world_size)), -rank))
        assert seen["group is left"] is True


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_an_error_on_the_last_rank_is_one_on_all(folder: Path, world_size: int) -> None:
    *others, last = seen_by_ranks(folder, "together", world_size)
    for name in ("value", "os", "key", "odd"):
        assert last[f"{name} is the very one"] is True
    for seen in (*others, last):
        assert seen["value"] == "ValueError: NaN"
        assert seen["os"] == "OSError: [Errno 28] full"
    for seen in others:
        assert seen["key"] == f"RuntimeError: Rank {world_size - 1} failed with KeyError: 'x'"
        assert seen["odd"] == f"RuntimeError: Rank {world_size - 1} failed with UnpicklableError: ab"


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_rank_that_fails_too_raises_its_error(folder: Path, world_size: int) -> None:
    assert [seen["all"] for seen in seen_by_ranks(folder, "together", world_size)] == ["IndexError"] * world_size


def test_a_process_that_is_alone() -> None:
    assert not is_distributed()
    assert run_on_all_ranks(lambda: 3) == [3]
    with pytest.raises(KeyError):
        run_on_all_ranks(lambda: {}["x"])
    with Ranks() as ranks:
        assert (ranks.rank, ranks.size, ranks.gather(lambda: "a"), ranks.agree(lambda: "b")) == (0, 1, ["a"], "b")
    assert not is_distributed()
