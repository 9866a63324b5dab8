"""`compare` next to pytorch-cka, on BERT, GPT-2 and DistilBERT in their published sizes with random weights."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

Models = dict[str, Any]


@pytest.fixture(scope="module")
def script() -> Iterator[Any]:
    """The benchmark that makes the table."""
    folder = str(Path(__file__).parents[2] / "benchmarks")
    sys.path.insert(0, folder)
    try:
        import language_models

        yield language_models
    finally:
        sys.path.remove(folder)


@pytest.fixture(scope="module")
def models(script: Any) -> Models:
    found: Models = script.random_models(1000)
    return found


@pytest.mark.parametrize(
    "pair",
    [
        pytest.param(("BERT", "GPT-2"), marks=pytest.mark.slow),
        pytest.param(("BERT", "BERT"), marks=pytest.mark.slow),
        pytest.param(("BERT", "DistilBERT"), marks=pytest.mark.slow),
    ],
    ids="-".join,
)
def test_the_minibatch_matrix_is_theirs_and_the_exact_one_keeps_its_value(
    script: Any, models: Models, pair: tuple[str, str]
) -> None:
    tokens = torch.randint(0, 1000, (16, 6), generator=torch.Generator().manual_seed(3))
    methods = script.matrices_by(models[pair[0]], models[pair[1]], tokens)
    by_size: dict[str, list[Any]] = {name: [] for name in methods}
    for batch_size in (4, 16):
        for name, method in methods.items():
            by_size[name].append(method(batch_size))
    theirs, minibatch = by_size["pytorch-cka, model in float64"], by_size["minibatch_cka"]
    num_blocks = {"BERT": 12, "GPT-2": 12, "DistilBERT": 6}
    for their, our in zip(theirs, minibatch, strict=True):
        assert our.shape == (num_blocks[pair[0]], num_blocks[pair[1]])
        assert np.isfinite(our).all()
        # The model runs in float32 for ours, and they cut off what is below 0.
        np.testing.assert_allclose(our.clip(0, 1), their, atol=1e-4, rtol=0)
    assert np.ptp(np.stack(theirs), axis=0).max() > 0.02
    assert np.ptp(np.stack(by_size["cka, debiased"]), axis=0).max() < 1e-5
