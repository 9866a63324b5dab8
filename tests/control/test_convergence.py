"""When blocks count as converged, when a loss has turned, when layers have drifted: by numbers alone."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from lit_cka.control.convergence import LossWatch, num_converged
from lit_cka.control.drift import layers_beyond
from lit_cka.control.freeze_decision import FreezeDecision
from lit_cka.control.freeze_options import FreezeOptions

BLOCKS = ["0", "1", "2"]


def record(scores: Any, margin: float = 0.0) -> dict[str, Any]:
    named = dict(zip(BLOCKS, scores, strict=True))
    low = {name: score - margin for name, score in named.items() if not math.isnan(score)}
    high = {name: score + margin for name, score in named.items() if not math.isnan(score)}
    return {"n": 60, "scores": named, "low": low, "high": high}


def moved(draw: np.random.Generator, n: int, sizes: Any) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Features before and after, (n, 5) each, moved by about so much."""
    before = [draw.normal(size=(n, 5)) for _ in sizes]
    return before, [each + size * draw.normal(size=(n, 5)) for each, size in zip(before, sizes, strict=True)]


def gram_distance(x: np.ndarray, y: np.ndarray) -> float:
    """Between the centred Gram matrices of unit norm."""
    grams = [(each - each.mean(0)) @ (each - each.mean(0)).T for each in (x, y)]
    grams = [gram / np.linalg.norm(gram) for gram in grams]
    return float(np.linalg.norm(grams[0] - grams[1]))


@pytest.mark.parametrize("num_evaluations", [1, 2])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_converged_blocks_by_distances_of_gram_matrices(num_evaluations: int, share: float) -> None:
    draw = np.random.default_rng(0)
    counts = set()
    for _ in range(60):
        expected, records = 3, []
        for _ in range(num_evaluations):
            pairs = list(zip(*moved(draw, 30, 0.5 * draw.random(3) * [0.2, 0.6, 1.5]), strict=True))
            distances = np.array([gram_distance(*pair) for pair in pairs])
            is_below = distances[:2] <= share * np.array([1, 2]) / 3 * distances[2]
            is_below = np.append(is_below, share >= 1)
            expected = min(expected, int(np.cumprod(is_below).sum()))
            records.append(record([linear_cka_by_numpy(*pair) for pair in pairs]))
        moving = record([0.1, 0.1, 0.1])
        assert num_converged([moving, *records], BLOCKS, share, num_evaluations) == expected
        counts.add(expected)
    assert {0, 1} < counts


def linear_cka_by_numpy(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x - x.mean(0), y - y.mean(0)
    return float(np.linalg.norm(x.T @ y) ** 2 / np.linalg.norm(x.T @ x) / np.linalg.norm(y.T @ y))


def test_neither_the_learning_rate_nor_the_time_between_evaluations_matters() -> None:
    change = np.array([0.002, 0.05, 0.1])
    assert [num_converged([record(1 - size * change)], BLOCKS) for size in (0.001, 0.1, 1, 5)] == [1] * 4


def test_it_takes_the_lower_end_of_the_interval_and_enough_evaluations() -> None:
    still = record([0.99, 0.98, 0.91])  # 0.1 <= 0.3 / 3, and 0.14 <= 0.3 * 2 / 3
    assert num_converged([record([0.991, 0.98, 0.91])], BLOCKS) == 3
    assert num_converged([still], BLOCKS, 1.01) == 3
    assert num_converged([still], BLOCKS, 0.99) == 0
    assert num_converged([still], BLOCKS, 1.01, 2) == 0
    assert num_converged([record([0.991, 0.98, 0.91], 0.002)], BLOCKS) == 0


def test_undefined_scores() -> None:
    assert num_converged([record([0.999, math.nan, 0.9])], BLOCKS) == 1
    assert num_converged([record([0.999, 0.99, math.nan])], BLOCKS) == 0
    without = record([0.999, 0.99, 0.9])
    del without["low"]["0"]
    assert num_converged([without], BLOCKS) == 0
    without["scores"]["0"] = 1.0
    assert num_converged([without], BLOCKS) == 3
    assert num_converged([record([1.0, 1.0, 1.0])], BLOCKS) == 3
    assert num_converged([record([1.0, 1.0, 1.0 + 1e-4])], BLOCKS) == 3  # debiased


def test_records_that_do_not_tell() -> None:
    with pytest.raises(ValueError, match=r"intervals=True"):
        num_converged([{"scores": {"0": 1.0}}], ["0"])
    with pytest.raises(ValueError, match=r"to track block 'net.0', but it tracks 0, 1, 2"):
        num_converged([record([1.0] * 3)], ["net.0"])
    with pytest.raises(ValueError, match=r"have intervals, to know which layers have drifted"):
        layers_beyond({"scores": {"0": 0.1}}, 0.2)


def test_a_loss_that_turns() -> None:
    watch = LossWatch(patience=2, min_delta=0.1, mode="min")
    seen = [watch.update(value) for value in (3.0, 2.0, 2.05, 2.2, 2.05, 2.2, 2.3, 1.9, math.nan, math.nan)]
    assert seen == [False] * 6 + [True, False, False, True]
    assert watch.best == 1.9
    watch = LossWatch(patience=1, min_delta=0.0, mode="max")
    assert [watch.update(value) for value in (0.5, 0.6, 0.6, 0.59)] == [False, False, False, True]
    again = LossWatch(patience=2, min_delta=0.0, mode="max")
    again.load(watch.state())
    assert again.update(0.5)


def test_a_drift_is_beyond_with_its_whole_interval() -> None:
    assert layers_beyond(record([0.95, 0.85, 0.79], 0.04), 0.1) == ["1", "2"]
    assert layers_beyond(record([0.95, 0.85, 0.79], 0.06), 0.1) == ["2"]
    assert layers_beyond(record([0.95, math.nan, 0.97]), 0.1) == []


def decision(**options: Any) -> FreezeDecision:
    defaults = {
        "share": 1.0, "num_evaluations": 1, "blocks": None, "max_frozen": None, "monitor": "val_loss", "mode": "min",
        "patience": 1, "min_delta": 0.0, "optimizer_state": "drop", "norm_in_eval": True, "dropout_in_eval": True,
        "cache": None, "cache_memory": 4.0, "policy": None, "prefix": "freeze",
    }  # fmt: skip
    return FreezeDecision(FreezeOptions(**{**defaults, **options}))


def seen(decide: FreezeDecision, records: Any, loss: float) -> int:
    """How many are frozen after an evaluation, and the step that follows."""
    decide.target, decide.why = decide.update(records, BLOCKS, 2, loss)
    if decide.target != decide.num_frozen:
        decide.carried_out(0, 0, 0, BLOCKS)
    return decide.num_frozen


def test_blocks_that_are_frozen_stay_so_until_the_loss_turns_and_those_behind_them_are_trained() -> None:
    decide = decision()
    moving, first, all_still = record([0.9, 0.9, 0.9]), record([0.999, 0.9, 0.9]), record([1.0] * 3)
    assert seen(decide, [moving], 1.1) == 0
    assert seen(decide, [first] * 2, 1.0) == 1
    assert seen(decide, [moving] * 3, 0.9) == 1
    assert seen(decide, [all_still] * 4, 0.9) == 1
    assert seen(decide, [moving] * 5, 1.0) == 0
    assert seen(decide, [all_still] * 6, 0.95) == 0
    assert seen(decide, [all_still] * 7, 0.8) == 2  # not all
    assert [event["blocks"] for event in decide.history] == [["0"], ["0"], ["0", "1"]]


def test_what_was_measured_while_others_were_frozen_does_not_count() -> None:
    decide = decision(num_evaluations=2)
    first, moving = record([0.999, 0.9, 0.9]), record([0.9] * 3)
    assert seen(decide, [first] * 2, 1.0) == 1
    assert seen(decide, [first] * 3, 1.1) == 0
    older = {name: value for name, value in decide.state().items() if name != "num_before"}
    for state in (decide.state(), older):  # checkpoints of 0.2.0 before its release have no `num_before`
        again = decision(num_evaluations=2)
        again.load(state)
        assert seen(again, [first] * 4, 0.9) == 0
        assert seen(again, [*[moving] * 4, first], 0.9) == 0
        assert seen(again, [*[moving] * 4, first, first], 0.9) == 1
