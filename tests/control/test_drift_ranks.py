"""DriftBudget on two ranks: what it does on one, on the same batches, under DDP and with sharded parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import sync_worker
from tests.control import drift_worker
from tests.control.helpers import Adam, fit, weights
from tests.control.test_layer_events import written

ACTIONS = {"stop": ["stop", "sharded_stop"], "slow": ["slow", "resumed_slow", "sharded_slow"]}
ACTIONS |= {"roll_back": ["roll_back", "resumed_roll_back"]}
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the ranks have left what they saw."""
    folder = tmp_path_factory.mktemp("drift")
    sync_worker.run_to_end(drift_worker.__file__, folder, *drift_worker.JOBS, seconds=500)
    return folder


def seen(folder: Path, job: str) -> list[Any]:
    return [torch.load(folder / f"{job}-{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("action", list(ACTIONS))
def test_ranks_do_what_one_process_does(folder: Path, tmp_path: Path, action: str) -> None:
    torch.manual_seed(0)
    module, budget = Adam(lr=0.1), drift_worker.budget(action)
    run = fit(tmp_path, module, budget, max_epochs=drift_worker.MAX_EPOCHS)
    assert len(budget.history) == {"stop": 1}.get(action, drift_worker.MAX_EPOCHS)
    for job in ACTIONS[action]:
        first, second = seen(folder, job)
        assert first["is_sharded"] is job.startswith("sharded")
        assert first["history"] == second["history"]
        assert first["epochs"] == second["epochs"] == run.current_epoch
        for ours, expected in zip(first["history"], budget.history, strict=True):
            assert ours["cka"] == pytest.approx(expected["cka"], abs=1e-9)
            assert {**ours, "cka": []} == {**expected, "cka": []}
        for name, value in weights(module).items():
            torch.testing.assert_close(first["weights"][name], value, rtol=0, atol=1e-10, msg=f"{job} {name}")
            assert torch.equal(first["weights"][name], second["weights"][name])


def test_fsdp_does_what_one_process_does(folder: Path, tmp_path: Path) -> None:
    """In float32, so that the weights of 16 steps are not the same to all digits."""
    torch.manual_seed(0)
    budget = drift_worker.budget("slow", torch.float32)
    fit(tmp_path, drift_worker.Single(lr=0.1), budget, max_epochs=drift_worker.MAX_EPOCHS)
    for of_rank in seen(folder, "flat_slow"):
        for ours, expected in zip(of_rank["history"], budget.history, strict=True):
            assert (ours["step"], ours["layers"]) == (expected["step"], expected["layers"])
            assert ours["cka"] == pytest.approx(expected["cka"], abs=1e-3)


def test_one_rank_writes_what_was_done(folder: Path) -> None:
    texts = written(folder / "events", "drift/layers")
    assert [len({event.step for event in text.events}) for text in texts] == [1, 2, 3, 4]


def test_what_can_not_be_done_to_sharded_weights_is_one_error(folder: Path) -> None:
    for of_rank in seen(folder, "sharded_roll_back"):
        assert "Expected DriftBudget to find whole parameters, but Sharding is sharded" in of_rank["error"]
    for of_rank in seen(folder, "merged_slow"):
        assert "but got FlatStrategy" in of_rank["error"]
        assert "action='stop'" in of_rank["error"]
