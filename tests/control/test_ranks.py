"""FreezeConverged under DDP: the weights of one process on the same batches, on every rank, and nothing hangs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import sync_worker
from tests.control import freezing_worker
from tests.control.helpers import Adam, by_hand, weights

EPOCHS = {"plain": [0, 0, 1, 3], "with_views": [0, 0, 1, 3], "cached": [0, 0, 1, 3], "turning": [0, 2, 2, 2]}
EPOCHS |= {"accumulated": [0, 0, 1, 3], "resumed": [0, 0, 1, 3], "measured": [0, 1, 1, 1]}


FEW = ["plain", "turning"]
JOBS = [job if job in FEW else pytest.param(job, marks=pytest.mark.slow) for job in freezing_worker.JOBS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """Where the ranks have left what they saw: of few jobs, unless slow tests are asked for."""
    folder = tmp_path_factory.mktemp("freezing")
    chosen = [item.callspec.params.get("job") for item in request.session.items if hasattr(item, "callspec")]
    jobs = [job for job in freezing_worker.JOBS if job in FEW or job in chosen]
    sync_worker.run_to_end(freezing_worker.__file__, folder, *jobs, seconds=300)
    return folder


def seen(folder: Path, job: str) -> list[Any]:
    files = [folder / f"{job}-{rank}.pt" for rank in range(2)]
    assert [file.name for file in files if not file.exists()] == []
    return [torch.load(file) for file in files]


@pytest.mark.parametrize("job", JOBS)
def test_weights_are_those_of_one_process(folder: Path, job: str) -> None:
    torch.manual_seed(0)
    expected = Adam()
    by_hand(expected, EPOCHS[job], 2 if job == "accumulated" else 1)
    first, second = seen(folder, job)
    assert first["history"] == second["history"]
    assert [event["num_frozen"] for event in first["history"]] == sorted(set(EPOCHS[job]) - {0})
    for name, value in weights(expected).items():
        torch.testing.assert_close(first["weights"][name], value, rtol=0, atol=1e-10, msg=name)
        assert torch.equal(first["weights"][name], second["weights"][name])


def test_frozen_parameters_have_no_gradients_on_any_rank(folder: Path) -> None:
    for of_rank in seen(folder, "plain"):
        frozen = [{name.split(".")[2] for name in names if "blocks" in name} for names in of_rank["graded"]]
        assert frozen == [set("0123")] * 8 + [set("123")] * 4 + [set("3")] * 4


@pytest.mark.slow
@pytest.mark.parametrize("job", ["cached"])
def test_each_rank_leaves_out_the_blocks_for_samples_that_it_has_seen(folder: Path, job: str) -> None:
    for of_rank in seen(folder, job):
        assert of_rank["steps"][1, 0] == 4
        assert (3, 3) in of_rank["steps"] or of_rank["steps"][3, 1] + of_rank["steps"].get((3, 0), 0) == 4
