"""CKA of features at any scale, by every way there is, against the same features at scale 1."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor

from lit_cka import LinearCKA, MinibatchCKA
from lit_cka.analysis.measures import gram_matrices, similarity
from lit_cka.analysis.settings import Measure, Settings
from lit_cka.functional import cka_from_gram, linear_cka, linear_gram, rbf_gram, signature
from lit_cka.functional.minibatch import add_batch, empty_hsic_sums
from lit_cka.functional.units import exponents_of, in_usual_unit, unit_exponent
from tests.oracles import paired_features

SCALES = [1e-300, 1e-100, 1e-78, 1e-40, 1.0, 1e40, 1e78, 1e100, 1e150]
N, SIZES = 60, (20, 8, 32)


def sides(n: int = N) -> tuple[Tensor, Tensor]:
    X, Y = paired_features(n, 12, 9, offset=3.0)
    return X.double(), Y.double()


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("scale", SCALES)
def test_the_metric_is_the_same_at_any_scale(scale: float, debiased: bool) -> None:
    """Also merged with another, in any order, where the features did not vary at first."""
    X, Y = sides()
    expected = linear_cka(X, Y, debiased=debiased).item()
    metrics = [LinearCKA(debiased=debiased) for _ in range(2)]
    constant = X[:1].expand(5, -1)
    metrics[0].update(constant * scale, Y[:1].expand(5, -1))
    for x, y in zip(X.split(SIZES), Y.split(SIZES), strict=True):
        metrics[1].update(x * scale, y)
    assert metrics[0].compute().isnan()
    assert metrics[1].compute().item() == pytest.approx(expected, abs=1e-10)
    both = torch.cat([X, constant]), torch.cat([Y, Y[:1].expand(5, -1)])
    expected = linear_cka(*both, debiased=debiased).item()
    for first, second in (metrics, metrics[::-1]):
        merged = LinearCKA(debiased=debiased)
        merged.merge_state(first)
        merged.merge_state(second)
        assert merged.compute().item() == pytest.approx(expected, abs=1e-10)
    metrics[0].update(X * scale, Y)  # after features that did not vary
    assert metrics[0].compute().item() == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
@pytest.mark.parametrize("scale", SCALES)
def test_the_minibatch_metric_is_the_same_at_any_scale(scale: float, kernel: str) -> None:
    X, Y = sides()
    reference, metrics = MinibatchCKA(kernel), [MinibatchCKA(kernel) for _ in range(2)]
    for index, (x, y) in enumerate(zip(X.split(20), Y.split(20), strict=True)):
        reference.update([x, y], [y])
        metrics[index % 2].update([x * scale, y], [y])
    for first, second in (metrics, metrics[::-1]):
        merged = MinibatchCKA(kernel)
        merged.merge_state(first)
        merged.merge_state(second)
        torch.testing.assert_close(merged.compute(), reference.compute(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("measure", get_args(Measure))
@pytest.mark.parametrize("scale", [1e-100, 1e-40, 1e40, 1e100])
def test_every_measure_is_the_same_at_any_scale(scale: float, measure: Measure) -> None:
    X, Y = sides()
    settings = Settings(measure=measure, batch_size=20)
    expected, got = similarity([X], [Y, X], settings), similarity([X * scale], [Y, X * scale], settings)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("scale", [1e-100, 1e100])
def test_gram_matrices_and_signatures_at_any_scale(scale: float) -> None:
    X, Y = sides()
    for debiased in (False, True):
        for gram in (linear_gram, rbf_gram):
            expected = cka_from_gram(gram(X), gram(Y), debiased=debiased).item()
            got = cka_from_gram(gram(X * scale), gram(Y), debiased=debiased).item()
            assert got == pytest.approx(expected, abs=1e-10)
    assert (signature(X * scale) @ signature(Y)).item() == pytest.approx(linear_cka(X, Y).item(), abs=1e-10)
    grams = gram_matrices([X * scale, Y], Settings())
    assert 1e-6 < grams.abs().amax() < 1e20


def test_a_constant_feature_of_1e15_changes_nothing() -> None:
    X, Y = sides()
    huge = torch.cat([X, torch.full((N, 1), 1e15, dtype=torch.float64)], dim=1)
    metric, expected = LinearCKA(), linear_cka(X, Y).item()
    for x, y in zip(huge.split(SIZES), Y.split(SIZES), strict=True):
        metric.update(x, y)
    for value in (linear_cka(huge, Y), linear_cka(huge.repeat(1, 30), Y), metric.compute()):
        assert value.item() == pytest.approx(expected, abs=1e-12)
    assert similarity([huge], [Y], Settings(debiased=False)).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_at_the_ends_of_its_range(dtype: torch.dtype) -> None:
    X, Y = sides()
    top = torch.finfo(dtype).max / 16
    for scale in (top, torch.finfo(dtype).smallest_normal):
        x = (X * scale).to(dtype)
        expected = linear_cka(x.double() / scale, Y).item()
        metric = LinearCKA()
        metric.update(x, Y)
        for value in (linear_cka(x, Y), metric.compute(), cka_from_gram(linear_gram(x), linear_gram(Y))):
            assert value.item() == pytest.approx(expected, abs=1e-10)


def test_denormal_features() -> None:
    X, Y = sides()
    x = X * 1e-310
    assert 0 < x.abs().max() < torch.finfo(torch.float64).smallest_normal
    expected = linear_cka(x * 2.0**1000, Y).item()
    assert linear_cka(x, Y).item() == pytest.approx(expected, abs=1e-10)
    assert expected == pytest.approx(linear_cka(X, Y).item(), abs=1e-10)


def test_exponents_follow_what_varies() -> None:
    X, _ = sides()
    assert exponents_of(X) == 0
    assert exponents_of(X * 2.0**300) == 300 + torch.frexp((X - X[0]).abs().max()).exponent
    assert exponents_of(X + 2.0**300 * 0) == 0
    huge = torch.cat([X, torch.full((N, 1), 1e200, dtype=torch.float64)], dim=1)
    assert exponents_of(huge) == 0
    assert exponents_of(huge[:1]) == unit_exponent(1e200) == 665
    assert exponents_of(X[:0]) == exponents_of(X[:, :0]) == 0
    assert in_usual_unit(X * 1e200).std() == pytest.approx(1, abs=0.9)
    stacked = torch.stack([X, X * 1e200])
    torch.testing.assert_close(in_usual_unit(stacked)[1], in_usual_unit(X * 1e200))


def test_sums_over_no_batch_take_any_unit() -> None:
    X, Y = sides()
    sums = add_batch(empty_hsic_sums(1, 1), [X * 1e100], [Y])
    assert (sums.exponents_x > 300).all()
    assert sums.exponents_y == 0
    assert sums.n == N
