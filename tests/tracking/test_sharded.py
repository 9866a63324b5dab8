"""Models of which each process holds a part: features and scores are those of the whole model in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests import oracles, sync_worker
from tests.tracking import sharded_worker
from tests.tracking.sharded_worker import LAYERS, NUM_SAMPLES, WORLD_SIZE, extracted, inputs, network

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="the processes talk over gloo"
)
SECONDS = 100


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank has left behind; all of them have ended, or been ended."""
    folder = tmp_path_factory.mktemp("sharded")
    sync_worker.run_to_end(sharded_worker.__file__, folder, seconds=SECONDS)
    files = [folder / f"{rank}.pt" for rank in range(WORLD_SIZE)]
    assert [file.name for file in files if not file.exists()] == []
    return [torch.load(file) for file in files]


def test_the_model_is_sharded(seen: list[dict[str, Any]]) -> None:
    sizes = [weight.numel() for weight in network(0).parameters()]
    for rank in seen:
        assert rank["is sharded"] == [True] * 4
        assert len(rank["local"]) == len(sizes)
    assert [sum(parts) for parts in zip(*(rank["local"] for rank in seen), strict=True)] == sizes
    assert max(rank["local"][1] for rank in seen) < sizes[1]  # and no rank holds all of a weight


def test_features_are_those_of_the_whole_model(seen: list[dict[str, Any]]) -> None:
    expected = extracted(network(0), inputs())
    half = NUM_SAMPLES // WORLD_SIZE
    for number, rank in enumerate(seen):
        assert list(rank["features"]) == LAYERS
        for layer in LAYERS:
            torch.testing.assert_close(rank["features"][layer], expected[layer], rtol=1e-5, atol=1e-6)
            mine = expected[layer][number * half : (number + 1) * half]
            torch.testing.assert_close(rank["features of mine"][layer], mine, rtol=1e-5, atol=1e-6)


def test_the_model_runs_as_without_and_keeps_its_own_hooks_alone(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        assert torch.equal(rank["before"], rank["after"])
        assert rank["hooks"] == [rank["hooks"][0]] * 4
        assert rank["hooks"][0] > 0  # those that gather the weights


@pytest.mark.parametrize(("name", "debiased"), [("cka", False), ("debiased", True)])
def test_cka_over_the_ranks_is_that_of_all_samples(seen: list[dict[str, Any]], name: str, debiased: bool) -> None:
    for layer in LAYERS:
        X, Y = (torch.cat([rank[key][layer] for rank in seen]) for key in ("features of mine", "others of mine"))
        assert len(X) == NUM_SAMPLES
        expected = oracles.linear_cka(X, Y, debiased)
        assert 0 < expected < 0.99
        for rank in seen:
            assert rank[name][layer].item() == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("what", ["snapshot", "initial"])
def test_a_sharded_model_can_not_be_copied_for_the_reference(seen: list[dict[str, Any]], what: str) -> None:
    for rank in seen:
        assert "could not be copied to keep its weights as the reference" in rank[what]
        assert "Pass `reference=` a module or the path of a checkpoint" in rank[what]


@pytest.mark.parametrize("kind", ["whole", "sharded"])
def test_a_module_of_one_s_own_is_the_way_out(seen: list[dict[str, Any]], kind: str) -> None:
    X, Y = extracted(network(0), inputs()), extracted(network(1), inputs())
    expected = {f"net.{layer}": oracles.linear_cka(X[layer], Y[layer], False) for layer in LAYERS}
    for rank in seen:
        assert rank[f"tracked, {kind}"] == pytest.approx(expected, abs=1e-5)


def test_no_warning_comes_of_the_search_for_data(seen: list[dict[str, Any]]) -> None:
    """It looks into what the model holds, which of a sharded one is all of `torch.distributed`."""
    for rank in seen:
        assert rank["warnings"] == []
