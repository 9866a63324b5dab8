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


@pytest.mark.parametrize("num_evaluations", [1, 2, 3])
def test_converged_blocks_by_numpy(num_evaluations: int) -> None:
    draw = np.random.default_rng(0)
    counts = set()
    for _ in range(50):
        scores = 1 - 0.03 * draw.random((4, 3)) * [0.4, 0.6, 1]
        margin = 0.001
        is_still = (1 - (scores - margin) <= 0.01)[-num_evaluations:].all(axis=0)
        expected = int(np.cumprod(is_still).sum())
        records = [record(row, margin) for row in scores]
        assert num_converged(records, BLOCKS, 0.01, num_evaluations) == expected
        counts.add(expected)
    assert counts == {0, 1, 2, 3} if num_evaluations < 3 else len(counts) > 1


def test_it_takes_the_lower_end_of_the_interval_and_enough_evaluations() -> None:
    still = record([0.995, 0.995, 0.995])
    assert num_converged([still], BLOCKS, 0.01, 1) == 3
    assert num_converged([still], BLOCKS, 0.01, 2) == 0
    assert num_converged([record([0.995] * 3, 0.006)], BLOCKS, 0.01, 1) == 0


def test_undefined_scores() -> None:
    assert num_converged([record([0.999, math.nan, 0.999])], BLOCKS, 0.01, 1) == 1
    without = record([0.999, 0.999, 0.999])
    del without["low"]["0"]
    assert num_converged([without], BLOCKS, 0.01, 1) == 0
    without["scores"]["0"] = 1.0
    assert num_converged([without], BLOCKS, 0.01, 1) == 3


def test_records_that_do_not_tell() -> None:
    with pytest.raises(ValueError, match=r"intervals=True"):
        num_converged([{"scores": {"0": 1.0}}], ["0"], 0.01, 1)
    with pytest.raises(ValueError, match=r"to track block 'net.0', but it tracks 0, 1, 2"):
        num_converged([record([1.0] * 3)], ["net.0"], 0.01, 1)
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
        "limit": 0.01, "num_evaluations": 1, "blocks": None, "max_frozen": None, "monitor": "val_loss", "mode": "min",
        "patience": 1, "min_delta": 0.0, "optimizer_state": "drop", "norm_in_eval": True, "dropout_in_eval": True,
        "cache": None, "cache_memory": 4.0, "policy": None, "prefix": "freeze",
    }  # fmt: skip
    return FreezeDecision(FreezeOptions(**{**defaults, **options}))


def test_blocks_that_are_frozen_stay_so_until_the_loss_turns() -> None:
    decide = decision()
    moving, still = record([0.999, 0.9, 0.9]), record([0.9, 0.9, 0.9])

    def seen(records: Any, loss: float) -> int:
        decide.target, decide.why = decide.update(records, BLOCKS, 2, loss)
        if decide.target != decide.num_frozen:
            decide.carried_out(0, 0, 0, BLOCKS)
        return decide.num_frozen

    assert seen([moving], 1.0) == 1
    assert seen([still] * 2, 0.9) == 1
    assert seen([record([1.0] * 3)] * 3, 0.9) == 2  # not all
    assert seen([still] * 4, 1.0) == 0
    assert seen([record([1.0] * 3)] * 5, 0.95) == 0
    assert seen([record([1.0] * 3)] * 6, 0.8) == 2
    assert [event["blocks"] for event in decide.history] == [["0"], ["1"], ["0", "1"], ["0", "1"]]
