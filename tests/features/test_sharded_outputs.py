"""Outputs of which each process has a part: pooled part by part, and found out where a layer returns plain tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lit_cka.features.pooling import pool
from tests import sync_worker
from tests.features import shards_worker
from tests.features.shards_worker import (
    LAYERS,
    MASK,
    METHODS,
    PLANS,
    SECONDS,
    SIZES,
    cases,
    extracted,
    first_token,
    network,
    values,
)

pytestmark = [
    pytest.mark.slow,  # tracked models of shards are among the others
    pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="the processes talk over gloo"),
]
WORLD_SIZES = pytest.mark.parametrize("world_size", [2, 3])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    sync_worker.run_to_end(shards_worker.__file__, folder, seconds=3 * SECONDS)
    return folder


@pytest.mark.parametrize("world_size", [3, 4])
def test_shards_are_pooled_to_the_features_of_the_whole(folder: Path, world_size: int) -> None:
    ranks = sync_worker.seen_by_ranks(folder, "pooling", world_size)
    for number, case in enumerate(cases(world_size)):
        expected = pool(values(case.layout), case.method, case.layout, MASK if case.with_mask else None)
        for seen in ranks:
            features = seen[str(number)]
            torch.testing.assert_close(
                features, expected, rtol=1e-6, atol=1e-6, equal_nan=True, check_dtype=False, msg=str(case)
            )
            assert case.method != "mean" or case.layout.strip("C") == "N" or features.dtype == torch.float64


@pytest.mark.parametrize("world_size", [3, 4])
def test_what_is_sent_is_what_pooling_leaves(folder: Path, world_size: int) -> None:
    # Shards of uneven sizes are sent as large as the largest.
    parts = 3 if world_size == 3 else 2
    rows, columns = (-(-SIZES[letter] // parts) * parts for letter in "NC")
    for seen in sync_worker.seen_by_ranks(folder, "pooling", world_size):
        for number, case in enumerate(cases(world_size)):
            is_simple = not any(way.is_partial("max") for way in case.placements)
            if case.method == "flatten" or not is_simple:
                continue
            assert seen[f"{number} sent"] <= rows * columns < values("NTC").numel() / 2, case


@WORLD_SIZES
@pytest.mark.parametrize("pooling", METHODS)
@pytest.mark.parametrize("plan", PLANS)
def test_features_are_those_of_the_whole_model(folder: Path, world_size: int, plan: str, pooling: str) -> None:
    expected = extracted(network(), pooling)
    for seen in sync_worker.seen_by_ranks(folder, "layers", world_size):
        for layer in LAYERS:
            features = seen[f"{plan} {pooling} {layer}"]
            torch.testing.assert_close(features, expected[layer], rtol=1e-12, atol=1e-12)


@WORLD_SIZES
def test_a_column_parallel_layer_is_known_by_its_weight(folder: Path, world_size: int) -> None:
    for seen in sync_worker.seen_by_ranks(folder, "layers", world_size):
        expected = extracted(network(), "mean")["blocks.0.ffn.up"]
        torch.testing.assert_close(seen["alone"], expected, rtol=1e-12, atol=1e-12)


@WORLD_SIZES
def test_a_callable_gets_the_whole_output(folder: Path, world_size: int) -> None:
    for seen in sync_worker.seen_by_ranks(folder, "layers", world_size):
        expected = extracted(network(), first_token)["blocks.1.ffn.up"]
        torch.testing.assert_close(seen["callable"], expected, rtol=1e-12, atol=1e-12)


@WORLD_SIZES
@pytest.mark.parametrize("what", ["opaque", "two axes"])
def test_what_can_not_be_told_is_an_error_on_all(folder: Path, world_size: int, what: str) -> None:
    for seen in sync_worker.seen_by_ranks(folder, "layers", world_size):
        assert "can't be told whether these are shards of its features or of its tokens" in str(seen[what])
        assert "Take the block around it" in str(seen[what])


@WORLD_SIZES
def test_an_output_of_zeros_is_whole(folder: Path, world_size: int) -> None:
    for seen in sync_worker.seen_by_ranks(folder, "layers", world_size):
        assert seen["dead"] == "no problem"


@pytest.mark.parametrize("layer", ["0.0", "0"])
def test_a_norm_is_as_wide_as_all_processes_have_it(folder: Path, layer: str) -> None:
    """Half of its weights are as many as there are tokens, which would then be taken for the features."""
    for seen in sync_worker.seen_by_ranks(folder, "flat", 2):
        torch.testing.assert_close(seen[layer], shards_worker.tokens().mean(dim=1))
