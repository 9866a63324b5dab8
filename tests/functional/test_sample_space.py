"""The way through Gram matrices, tile by tile: the oracle's values, however the samples are cut, at little memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lit_cka.functional import linear_cka
from lit_cka.functional.cka import cka_from_terms
from lit_cka.functional.moments import paired_moments
from lit_cka.functional.precision import Products
from lit_cka.functional.rows import Rows
from lit_cka.functional.sample_space import (
    PairedRows,
    cheaper_in_sample_space,
    diagonal_sums,
    gram_sums,
    sample_space_terms,
)
from lit_cka.functional.terms import terms_from_moments
from tests import oracles
from tests.oracles import float64, paired_features

ESTIMATORS = pytest.mark.parametrize("debiased", [False, True], ids=["plain", "debiased"])
# One tile, several, and a last one that is not full; fewer features than are taken at a time, and more.
SHAPES = pytest.mark.parametrize("shape", [(5, 3, 4), (40, 700, 30), (300, 20, 600), (600, 64, 32)], ids=str)


def cka(X: Tensor, Y: Tensor, size: int, products: Products, debiased: bool) -> float:
    terms = sample_space_terms(Rows(X.split(size)), Rows(Y.split(size)), products=products)
    return cka_from_terms(terms, debiased=debiased).item()


@ESTIMATORS
@SHAPES
@pytest.mark.parametrize("related", [True, False], ids=["related", "unrelated"])
@pytest.mark.parametrize(("offset", "dtype"), [(3.0, torch.float64), (1e4, torch.float32)])
def test_the_value_is_the_oracle_s(
    shape: tuple[int, int, int], related: bool, offset: float, dtype: torch.dtype, debiased: bool
) -> None:
    X, Y = paired_features(*shape, related=related, offset=offset, dtype=dtype)
    value = cka(X, Y, 17, "float64", debiased)
    assert value == pytest.approx(oracles.linear_cka(X, Y, debiased), abs=1e-10)
    assert value == pytest.approx(linear_cka(X, Y, debiased=debiased).item(), abs=1e-12)


@SHAPES
def test_every_term_is_that_of_the_moments(shape: tuple[int, int, int]) -> None:
    X, Y = paired_features(*shape)
    expected = terms_from_moments(paired_moments(X, Y))
    for name, value in sample_space_terms(Rows(X.split(7)), Rows(Y.split(7)))._asdict().items():
        np.testing.assert_allclose(value, getattr(expected, name), rtol=1e-12, err_msg=name)


@ESTIMATORS
@pytest.mark.parametrize("related", [True, False], ids=["related", "unrelated"])
@pytest.mark.parametrize("shape", [(30, 1024, 700), (300, 1024, 256), (1100, 1024, 64)], ids=str)
def test_products_in_float32_have_six_digits(shape: tuple[int, int, int], related: bool, debiased: bool) -> None:
    X, Y = paired_features(*shape, related=related, offset=1e4, dtype=torch.float32)
    error = cka(X, Y, 50, "float32", debiased) - oracles.linear_cka(X, Y, debiased)
    assert 1e-14 < abs(error) < 1e-6  # or they were not in float32


@pytest.mark.parametrize("tile", [1, 3, 8, 100])
@pytest.mark.parametrize("sizes", [[20], [9, 11], [0, 7, 13], [3, 0, 4, 13]], ids=str)
def test_processes_compute_every_pair_once(sizes: list[int], tile: int) -> None:
    """Tiles are numbered through over all processes, each of which has its own samples on the left."""
    X, Y = (features - features.mean(dim=0) for features in paired_features(20, 5, 4))
    K, L = (float64(features) @ float64(features).T for features in (X, Y))
    np.fill_diagonal(K, 0)
    np.fill_diagonal(L, 0)
    shares = [PairedRows(Rows([x]), Rows([y])) for x, y in zip(X.split(sizes), Y.split(sizes), strict=True)]
    tiles = [-(-size // tile) for size in sizes]
    first = [sum(tiles[:rank]) for rank in range(len(sizes))]
    total = torch.stack(
        [
            gram_sums(left, right, tile, first[i], first[j])
            for i, left in enumerate(shares)
            for j, right in enumerate(shares)
        ]
    ).sum(dim=0)
    np.testing.assert_allclose(total, [(K * L).sum(), (K * K).sum(), (L * L).sum()], rtol=1e-12)


def test_processes_have_about_the_same_to_do() -> None:
    """Of 2 with 16 tiles each: counted are the pairs of samples, by features that are 1 everywhere."""
    share = PairedRows(Rows([torch.ones(16, 1)]), Rows([torch.ones(16, 1)]))
    work = [sum(gram_sums(share, share, 1, 16 * i, 16 * j)[0].item() for j in range(2)) for i in range(2)]
    assert sum(work) == 32 * 31
    assert abs(work[0] - work[1]) <= 0.1 * sum(work)


def test_sums_over_y_alone_may_be_left_out() -> None:
    X, Y = paired_features(20, 5, 4)
    rows = PairedRows(Rows([X]), Rows([Y]))
    sums, all_sums = gram_sums(rows, rows, 8, with_yy=False), gram_sums(rows, rows, 8)
    assert torch.equal(sums[:2], all_sums[:2])
    assert sums[2] == 0 < all_sums[2]


def test_the_diagonal() -> None:
    X, Y = paired_features(20, 5, 4)
    a, b = (float64(X) ** 2).sum(axis=1), (float64(Y) ** 2).sum(axis=1)
    sums = diagonal_sums(PairedRows(Rows([X]), Rows([Y])), X[0].double(), Y[0].double())
    np.testing.assert_allclose(sums, [a.sum(), b.sum(), a @ a, b @ b, a @ b, 1, 1])
    constant = diagonal_sums(PairedRows(Rows([X]), Rows([Y * 1e-20])), X[0].double(), Y[0].double())
    assert constant[-2:].tolist() == [1, 0]


@ESTIMATORS
@pytest.mark.parametrize("products", ["float64", "float32"])
@pytest.mark.parametrize("scale", [1e-200, 1e-100, 1e-30, 1e30, 1e100, 1e150])
def test_any_magnitude(scale: float, products: Products, debiased: bool) -> None:
    X, Y = paired_features(30, 40, 50)
    expected = oracles.linear_cka(X, Y, debiased)
    assert cka(X * scale, Y, 30, products, debiased) == pytest.approx(expected, abs=1e-6)
    assert cka(X, Y * scale, 30, products, debiased) == pytest.approx(expected, abs=1e-6)


@ESTIMATORS
@pytest.mark.parametrize("products", ["float64", "float32"])
@pytest.mark.parametrize("value", [0.0, 0.1, 1e6 + 0.1])
def test_constant_features_are_nan(value: float, products: Products, debiased: bool) -> None:
    X, Y = paired_features(30, 40, 50)
    constant = torch.full_like(X, value)
    assert np.isnan(cka(constant, Y, 7, products, debiased))
    assert np.isnan(cka(Y, constant, 7, products, debiased))


@pytest.mark.parametrize(("products", "rounding"), [("float64", 0.0), ("float32", 1e-7)])
def test_equidistant_samples_are_nan_when_debiased(products: Products, rounding: float) -> None:
    """No pair is closer than another, so that the unbiased HSIC is 0; rounding must not take its place."""
    _, Y = paired_features(50, 5, 80)
    for seed in range(10):
        turn = torch.linalg.qr(torch.randn(50, 50, generator=torch.Generator().manual_seed(seed)).double()).Q
        X = 0.3 * turn + 7
        terms = sample_space_terms(Rows([X]), Rows([Y]), products=products)
        assert cka_from_terms(terms, debiased=True, rounding=rounding).isnan()
        plain = cka_from_terms(terms, rounding=rounding).item()
        assert plain == pytest.approx(oracles.linear_cka(X, Y, False), abs=1e-6)


def test_few_samples_of_wide_features_are_cheaper_as_rows() -> None:
    for d in (16, 768, 4096):
        assert cheaper_in_sample_space(3 * d - 1, d, d)
        assert not cheaper_in_sample_space(3 * d, d, d)
        assert not cheaper_in_sample_space(2 * d, d, d, with_yy=False)
    assert cheaper_in_sample_space(1000, 4096, 8)
    assert not cheaper_in_sample_space(10000, 4096, 8)


MEMORY = """
import sys, time, torch
from pathlib import Path
from lit_cka.functional.rows import Rows
from lit_cka.functional.sample_space import sample_space_terms

def peak_kilobytes():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

def features(n):
    return [Rows(torch.randn(n, 4096).split(16)) for _ in range(2)]

torch.set_num_threads(1)
sample_space_terms(*features(32))  # what is loaded and kept once
for n in map(int, sys.argv[1:]):
    rows = features(n)
    Path("/proc/self/clear_refs").write_text("5")
    before, start = peak_kilobytes(), time.perf_counter()
    sample_space_terms(*rows)
    print((peak_kilobytes() - before) / 1024, time.perf_counter() - start)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read from Linux's /proc")
def test_memory_grows_with_neither_the_samples_nor_the_width() -> None:
    """Features of 4 and 16 MiB in float32, of which moments would take 402."""
    root = Path(__file__).parents[2]
    environment = {"PYTHONPATH": str(root), "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", MEMORY, "128", "512"]
    output = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True).stdout
    for mebibytes, seconds in (map(float, line.split()) for line in output.splitlines()):
        assert 0.1 < mebibytes < 16  # less would not have been measured
        assert seconds < 2  # 0.02 and 0.1 where nothing else is to do
