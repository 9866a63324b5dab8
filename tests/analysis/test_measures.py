"""The measures of `compare` where a feature is the same for all samples but for rounding."""

from typing import get_args

import pytest
import torch
from torch import Tensor

from lit_cka.analysis.measures import similarity
from lit_cka.analysis.settings import Measure, Settings
from lit_cka.functional import linear_gram
from lit_cka.functional.rsa import Distance

CASES = [(measure, distance) for measure in get_args(Measure) for distance in get_args(Distance)]


def constant_but_for_rounding() -> Tensor:
    """Features far from the origin that differ between samples by two units in their last place at most."""
    mean = torch.randn(32, dtype=torch.float64) * 3 + 7
    return mean + 2**-52 * mean.abs() * torch.randint(-2, 3, (16, 32))


@pytest.mark.parametrize(("measure", "distance"), [case for case in CASES if case[0] == "rsa" or case[1] == "cosine"])
@pytest.mark.parametrize("debiased", [False, True])
def test_what_rounding_leaves_is_no_value(measure: Measure, distance: Distance, debiased: bool) -> None:
    torch.manual_seed(0)
    X, Y = constant_but_for_rounding(), torch.randn(16, 20, dtype=torch.float64) + 5
    settings = Settings(measure=measure, distance=distance, debiased=debiased, batch_size=16)
    values = similarity([X, Y], [X, Y], settings)
    assert values[0].isnan().all()
    assert values[1, 0].isnan()
    assert values[1, 1].item() == pytest.approx(0 if measure == "procrustes" else 1)


def test_a_constant_matrix_among_others_is_zero_by_itself() -> None:
    torch.manual_seed(0)
    X = torch.stack([constant_but_for_rounding(), constant_but_for_rounding() + torch.randn(16, 32)])
    grams = linear_gram(X)
    assert not grams[0].any()
    torch.testing.assert_close(grams[1], linear_gram(X[1]), rtol=0, atol=0)
    assert grams[1].diagonal().min() > 0
