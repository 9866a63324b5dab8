"""Models of which each process holds a part: scores are those of the whole model in one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests import sync_worker
from tests.tracking import sharded_worker
from tests.tracking.sharded_worker import LAYERS, NUM_TEST, NUM_VAL, SECONDS, WAYS, WHOLE, Way

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="the processes talk over gloo"
)
EVERY_WAY = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the processes of `sharded_worker.py` have left what they saw; all of them have ended, or been ended."""
    folder = tmp_path_factory.mktemp("sharded")
    sync_worker.run_to_end(sharded_worker.__file__, folder, seconds=3 * SECONDS)
    return folder


def seen_by_ranks(folder: Path, way: Way, job: str) -> list[Any]:
    files = [folder / f"{way.name}-{rank}.json" for rank in range(way.world_size)]
    assert [file.name for file in files if not file.exists()] == []
    seen = [json.loads(file.read_text()) for file in files]
    assert [way.name for each in seen if job not in each] == []
    return [each[job] for each in seen]


def whole(folder: Path, job: str) -> Any:
    (seen,) = seen_by_ranks(folder, WHOLE, job)
    return seen


def same(history: list[dict[str, Any]], tolerance: float = 1e-6) -> list[dict[str, Any]]:
    """The same entries, with scores that are as close."""
    return [{**record, "scores": pytest.approx(record["scores"], abs=tolerance)} for record in history]


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


@EVERY_WAY
def test_scores_are_those_of_the_whole_model(folder: Path, way: Way) -> None:
    expected = whole(folder, "fitted")
    ranks = seen_by_ranks(folder, way, "fitted")
    for seen in ranks:
        assert seen["history"] == same(expected["history"])
        assert seen["history"] == ranks[0]["history"]  # no process differs by a bit
        for key, value in seen["logged"].items():
            # Lightning's mean counts the repeated samples.
            assert value == pytest.approx(expected["logged"][key], abs=1e-6 if key != "val_loss" else 0.1)
        assert seen["logged"] == ranks[0]["logged"]


@EVERY_WAY
def test_a_training_is_the_same_with_and_without(folder: Path, way: Way) -> None:
    for seen in seen_by_ranks(folder, way, "fitted"):
        assert seen["weights"] == seen["weights of bare"] == seen["weights tested"]
        assert seen["hooks"] == seen["hooks of bare"]  # what shards the model is there, and nothing else


@EVERY_WAY
def test_the_blocks_are_found(folder: Path, way: Way) -> None:
    for seen in seen_by_ranks(folder, way, "fitted"):
        assert seen["layers"] == ["net.blocks.0", "net.blocks.1"]


@EVERY_WAY
def test_a_model_that_is_not_trained_has_a_cka_of_1(folder: Path, way: Way) -> None:
    for seen in seen_by_ranks(folder, way, "still"):
        assert [record["n"] for record in seen] == [NUM_VAL, NUM_TEST]
        for record in seen:
            assert record["scores"] == pytest.approx(dict.fromkeys(LAYERS, 1.0), abs=1e-14)


@EVERY_WAY
@pytest.mark.parametrize("reference", ["state dict", "path", "module"])
def test_other_weights_of_the_same_architecture(folder: Path, way: Way, reference: str) -> None:
    expected = whole(folder, "compared")
    assert expected[reference] == same(expected["state dict"], 1e-12)
    assert min(expected["state dict"][0]["scores"].values()) < 0.9
    alone = seen_by_ranks(folder, way, "resumed")
    for seen, resumed in zip(seen_by_ranks(folder, way, "compared"), alone, strict=True):
        assert seen[reference] == same(expected[reference])
        assert seen[f"weights, {reference}"] == resumed["weights of one epoch"]  # the model got its own ones back


@EVERY_WAY
def test_a_resumed_training_goes_on_with_its_reference(folder: Path, way: Way) -> None:
    """Also in a test of data that were not there before: their recording takes the initial weights."""
    expected = whole(folder, "resumed")["history"]
    assert expected == same(whole(folder, "fitted")["history"], 1e-12)
    for seen in seen_by_ranks(folder, way, "resumed"):
        assert seen["history"] == same(expected)


@EVERY_WAY
def test_a_probe_is_refused(folder: Path, way: Way) -> None:
    assert whole(folder, "probed") == "no error"
    for seen in seen_by_ranks(folder, way, "probed"):
        assert seen.startswith("Expected a module that every rank holds for `probe`")
