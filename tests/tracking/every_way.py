"""Tests of every way to share a model out: `test_sharded.py` and `test_deepspeed.py` run them on their ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lit_cka.tracking.history import BOUNDS
from tests.tracking.sharded_worker import LAYERS, NUM_TEST, NUM_VAL, WHOLE, Way


def ways_of(metafunc: pytest.Metafunc, ways: list[Way]) -> None:
    if "way" in metafunc.fixturenames:
        metafunc.parametrize("way", ways, ids=lambda way: way.name)


def seen_by_ranks(folder: Path, way: Way, job: str) -> list[Any]:
    files = [folder / f"{way.name}-{rank}.json" for rank in range(way.world_size)]
    assert [file.name for file in files if not file.exists()] == []
    seen = [json.loads(file.read_text()) for file in files]
    assert [way.name for each in seen if job not in each] == []
    return [each[job] for each in seen]


def whole(folder: Path, job: str, way: Way = WHOLE) -> Any:
    (seen,) = seen_by_ranks(folder, way.whole, job)
    return seen


def same(history: list[dict[str, Any]], tolerance: float = 1e-6) -> list[dict[str, Any]]:
    """The same entries, with scores that are as close, and bounds of them that are nearly so."""
    return [
        {
            **record,
            "scores": pytest.approx(record["scores"], abs=tolerance),
            **{key: pytest.approx(record[key], abs=100 * tolerance) for key in BOUNDS if key in record},
        }
        for record in history
    ]


def done(history: list[dict[str, Any]], way: Way) -> list[dict[str, Any]]:
    """What a way can do of a history."""
    return [record for record in history if way.tests_again or record["stage"] != "test"]


def test_scores_are_those_of_the_whole_model(folder: Path, way: Way) -> None:
    expected = whole(folder, "fitted", way)
    ranks = seen_by_ranks(folder, way, "fitted")
    for seen in ranks:
        assert seen["history"] == same(done(expected["history"], way), way.tolerance)
        assert seen["history"] == ranks[0]["history"]  # no process differs by a bit
        for key, value in seen["logged"].items():
            # Lightning's mean counts the repeated samples.
            assert value == pytest.approx(expected["logged"][key], abs=way.tolerance if key != "val_loss" else 0.1)
        assert seen["logged"] == ranks[0]["logged"]


def test_a_training_is_the_same_with_and_without(folder: Path, way: Way) -> None:
    for seen in seen_by_ranks(folder, way, "fitted"):
        assert seen["weights"] == seen["weights of bare"] == seen["weights tested"]
        assert seen["hooks"] == seen["hooks of bare"]  # what shards the model is there, and nothing else


def test_the_blocks_are_found(folder: Path, way: Way) -> None:
    for seen in seen_by_ranks(folder, way, "fitted"):
        assert seen["layers"] == ["net.blocks.0", "net.blocks.1"]


def test_a_model_that_is_not_trained_has_a_cka_of_1(folder: Path, way: Way) -> None:
    for seen in seen_by_ranks(folder, way, "still"):
        assert [record["n"] for record in seen] == [NUM_VAL, NUM_TEST][: 2 if way.tests_again else 1]
        for record in seen:
            assert record["scores"] == pytest.approx(dict.fromkeys(LAYERS, 1.0), abs=1e-14)


@pytest.mark.parametrize("reference", ["state dict", "path", "module"])
def test_other_weights_of_the_same_architecture(folder: Path, way: Way, reference: str) -> None:
    expected = whole(folder, "compared", way)
    assert expected[reference] == same(expected["state dict"], 1e-12)
    assert min(expected["state dict"][0]["scores"].values()) < 0.9
    for seen in seen_by_ranks(folder, way, "compared"):
        if way.variant == "without names" and reference != "module":
            assert seen[f"message, {reference}"].startswith("Expected FSDP to leave the model's parameters their names")
            continue
        assert seen[reference] == same(expected[reference], way.tolerance)
        assert seen[f"beside, {reference}"] is (way.variant == "without names")
        assert seen[f"weights, {reference}"] == seen["weights of bare"]  # the model got its own ones back


def test_a_resumed_training_goes_on_with_its_reference(folder: Path, way: Way) -> None:
    """Also in a test of data that were not there before: their recording takes the initial weights."""
    if not way.saves:
        pytest.skip("no checkpoints")
    expected = whole(folder, "resumed", way)["history"]
    assert expected == same(whole(folder, "fitted", way)["history"], 1e-12)
    for seen in seen_by_ranks(folder, way, "resumed"):
        assert seen["history"] == same(done(expected, way), way.tolerance)


def test_a_test_of_a_checkpoint_finds_the_initial_weights(folder: Path, way: Way) -> None:
    if not way.tests_checkpoints or not way.saves:
        pytest.skip("no tests of checkpoints")
    expected = whole(folder, "resumed", way)["history of a test"]
    assert [record["stage"] for record in expected] == ["validate", "test"]
    assert min(expected[1]["scores"].values()) < 0.999
    for seen in seen_by_ranks(folder, way, "resumed"):
        assert seen["history of a test"] == same(expected, way.tolerance)


def test_damaged_weights_of_one_process_are_an_error_on_all(folder: Path, way: Way) -> None:
    if not way.tests_checkpoints or not way.saves:
        pytest.skip("no tests of checkpoints")
    for seen in seen_by_ranks(folder, way, "resumed"):
        assert seen["damaged"].startswith("These data have not been recorded, and the weights that the training began")


def test_a_probe(folder: Path, way: Way) -> None:
    """Of three batches after every third step, and of one, which is given to `predict_step`."""
    expected = whole(folder, "probed", way)
    assert [record["n"] for record in expected["several"]] == [NUM_TEST]
    assert [record["n"] for record in expected["one"]] == [8]
    bare = seen_by_ranks(folder, way, "compared")
    for seen, compared in zip(seen_by_ranks(folder, way, "probed"), bare, strict=True):
        for name in ("several", "one"):
            assert min(expected[name][0]["scores"].values()) < 0.999
            assert seen[name] == same(expected[name], way.tolerance)
            assert seen[f"weights, {name}"] == compared["weights of bare"]
        is_split = not way.kind.startswith(("zero1", "zero2"))
        assert ("is empty on some of them" in seen["empty"]) is is_split


def test_a_process_without_batches_is_an_error_on_all(folder: Path, way: Way) -> None:
    for seen in seen_by_ranks(folder, way, "without"):
        assert seen.startswith("Expected every rank to have batches to validate on, or none, but only some have")
