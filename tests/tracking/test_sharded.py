"""Models of which each process holds a part: scores are those of the whole model in one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch.distributed as dist

from tests import sync_worker
from tests.tracking import sharded_worker
from tests.tracking.every_way import (  # noqa: F401  # the tests
    same,
    seen_by_ranks,
    test_a_model_that_is_not_trained_has_a_cka_of_1,
    test_a_probe,
    test_a_process_without_batches_is_an_error_on_all,
    test_a_resumed_training_goes_on_with_its_reference,
    test_a_test_of_a_checkpoint_finds_the_initial_weights,
    test_a_training_is_the_same_with_and_without,
    test_damaged_weights_of_one_process_are_an_error_on_all,
    test_other_weights_of_the_same_architecture,
    test_scores_are_those_of_the_whole_model,
    test_the_blocks_are_found,
    ways_of,
    whole,
)
from tests.tracking.sharded_memory_worker import FULLY_SHARDED
from tests.tracking.sharded_memory_worker import LAYERS as BLOCKS
from tests.tracking.sharded_worker import FSDP2, GROWN, LAYERS, NUM_TEST, NUM_VAL, SECONDS, WAYS

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="the processes talk over gloo"
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    ways_of(metafunc, WAYS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the processes of `sharded_worker.py` have left what they saw; all of them have ended, or been ended."""
    folder = tmp_path_factory.mktemp("sharded")
    sync_worker.run_to_end(sharded_worker.__file__, folder, seconds=3 * SECONDS)
    return folder


def test_a_whole_model_moves_in_every_layer(folder: Path) -> None:
    history = whole(folder, "fitted")["history"]
    assert [(record["stage"], record["n"]) for record in history] == [
        ("validate", NUM_VAL),
        ("validate", NUM_VAL),
        ("test", NUM_TEST),
    ]
    for record in history:
        assert list(record["scores"]) == LAYERS
        scores = record["scores"].values()
        assert min(scores) < 0.999
        assert max(scores) < 1 - 1e-7  # ten times what sharding may change


def test_shards_of_another_way_are_refused(folder: Path) -> None:
    for seen in seen_by_ranks(folder, FSDP2, "resumed"):
        assert "written by processes that shared the model out in another way" in seen["shared out again"]


def test_more_processes_go_on_with_the_recording(folder: Path) -> None:
    """Not with the initial weights, which are in files of other shards."""
    (first,) = same(whole(folder, "resumed")["history of a test"][:1])
    for seen in seen_by_ranks(folder, GROWN, "grown"):
        assert [record["n"] for record in seen["history"]] == [NUM_VAL, NUM_VAL]
        assert [record["scores"] for record in seen["history"]] == [first["scores"], first["scores"]]
        assert "written by processes that shared the model out in another way" in seen["tested"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells what a process takes")
@pytest.mark.parametrize("name", [way.name for way in FULLY_SHARDED])
def test_no_process_holds_the_whole_model(folder: Path, name: str) -> None:
    for rank in range(2):
        seen = json.loads((folder / f"memory-{name}-{rank}.json").read_text())
        assert seen["bare"]["largest"] <= seen["whole"] / 4  # a block at a time
        assert list(seen["scores"][0]) == BLOCKS
        assert min(seen["scores"][0].values()) == pytest.approx(1.0, abs=1e-12)
        assert max(seen["scores"][1].values()) < 0.9995
        for reference, share in (("initial", 0.1), ("path", 0.6)):  # its own half is kept while the others are in place
            assert seen[reference]["largest"] == seen["bare"]["largest"]
            assert seen[reference]["growth"] - seen["bare"]["growth"] < share * seen["whole"]
