"""What one pass over the data comes to: the oracle's value, however its samples come, from rows or from moments."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_cka.functional import linear_jackknife
from lit_cka.metrics import MinibatchCKA
from lit_cka.statistics.layer import (
    ExactStatistics,
    MinibatchStatistics,
    ReferenceTerms,
    Score,
    score_layers,
)
from lit_cka.statistics.sampled_layers import _alike, _Rows
from lit_cka.statistics.subsample import sample_hashes
from tests import oracles, sync_worker
from tests.oracles import paired_features
from tests.statistics import statistics_worker
from tests.statistics.statistics_worker import CASES
from tests.sync_worker import seen_by_ranks

CPU = torch.device("cpu")
ESTIMATORS = pytest.mark.parametrize("debiased", [False, True], ids=["plain", "debiased"])
WORLD_SIZES = pytest.mark.parametrize("world_size", [1, 2, 3])
HAS_PEAK = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read from Linux's /proc"
)
# Widths and batches: what is kept as rows, as they are and in float32, and what is added up, once and again.
PASSES = {
    "few rows": (12, 9, [16, 16, 12]),
    "rows, some of them empty": (40, 50, [0, 7, 0, 0, 30, 1, 0]),
    "one by one": (40, 50, [1] * 30),
    "rows in blocks": (700, 600, [37] * 8 + [4]),
    "few features": (3, 4, [16, 16, 12]),
    "moments at the end": (3, 4, [400, 400, 300]),
    "moments, and rows afterwards": (30, 20, [400, 700, 400, 7]),
    "moments several times": (3, 4, [1100, 1024, 60]),
}
PASS = pytest.mark.parametrize(("d_x", "d_y", "sizes"), PASSES.values(), ids=PASSES.keys())


def passed(X: Tensor, Y: Tensor, sizes: Sequence[int], **options: Any) -> ExactStatistics:
    """After a pass over the samples in batches of these sizes."""
    statistics = ExactStatistics(**options)
    for x, y in zip(X.split(list(sizes)), Y.split(list(sizes)), strict=True):
        statistics.add(x, y)
    return statistics


@ESTIMATORS
@PASS
@pytest.mark.parametrize(
    ("offset", "dtype", "accuracy"),
    [
        (1e4, torch.float32, 1e-10),
        (3.0, torch.bfloat16, 1e-10),
        (1e4, torch.float64, 2e-9),  # blocks of rows are rounded to float32
        (1e6, torch.float64, 2e-9),
    ],
    ids=["float32", "bfloat16", "float64", "float64 far off"],
)
def test_a_pass_has_the_oracle_s_value(
    d_x: int, d_y: int, sizes: list[int], offset: float, dtype: torch.dtype, accuracy: float, debiased: bool
) -> None:
    X, Y = paired_features(sum(sizes), d_x, d_y, related=False, offset=offset, dtype=dtype)
    score = passed(X, Y, sizes).score(CPU, debiased=debiased)
    assert (score.n, score.finite) == (sum(sizes), True)
    assert score.cka == pytest.approx(oracles.linear_cka(X, Y, debiased), abs=accuracy)


@ESTIMATORS
@pytest.mark.parametrize("offset", [1e4, 1e6])
def test_rounding_rows_costs_next_to_nothing_where_few_features_are_all(offset: float, debiased: bool) -> None:
    """The worst that can be: a first sample far from all others, and one feature a thousand times the others."""
    X, Y = paired_features(560, 500, 700, related=False, offset=offset)
    mean = X.mean(dim=0)
    X[:, 7] = mean[7] + 1000 * (X[:, 7] - mean[7])
    X[0] = mean + 30 * (X[0] - mean)
    statistics = passed(X, Y, [80] * 7)
    score = statistics.score(CPU, debiased=debiased)
    assert score.cka == pytest.approx(oracles.linear_cka(X, Y, debiased), abs=1e-7)
    assert score.cka != pytest.approx(oracles.linear_cka(X, Y, debiased), abs=1e-15)  # they were rounded


@ESTIMATORS
@pytest.mark.parametrize("related", [True, False], ids=["related", "unrelated"])
@pytest.mark.parametrize(
    ("n", "d", "space"), [(60, 1024, "samples"), (700, 256, "samples"), (1100, 256, "features"), (2100, 64, "features")]
)
def test_float32_products_keep_six_digits(n: int, d: int, space: str, related: bool, debiased: bool) -> None:
    X, Y = paired_features(n, d, d, related=related, offset=1e4, dtype=torch.float32)
    statistics = passed(X, Y, [min(100, n - start) for start in range(0, n, 100)], products="float32")
    error = statistics.score(CPU, debiased=debiased).cka - oracles.linear_cka(X, Y, debiased)
    assert statistics.space == space
    assert 1e-13 < abs(error) < 1e-6


@PASS
def test_neither_order_nor_batches_matter(d_x: int, d_y: int, sizes: list[int]) -> None:
    n = sum(sizes)
    X, Y = paired_features(n, d_x, d_y, related=False, dtype=torch.float32)
    value = passed(X, Y, sizes).score(CPU, debiased=True).cka
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    for other in (passed(X, Y, [n]), passed(X[order], Y[order], sizes[::-1]), passed(X, Y, [1] * n)):
        assert other.score(CPU, debiased=True).cka == pytest.approx(value, abs=1e-12)
    assert abs(passed(X[order], Y, sizes).score(CPU, debiased=True).cka - value) > 1e-5


@pytest.mark.parametrize(
    ("n", "d_x", "d_y", "space"),
    [(50, 20, 20, "samples"), (70, 20, 20, "features"), (1500, 600, 600, "samples"), (1500, 400, 400, "features")],
)
def test_the_way_follows_the_smaller_of_samples_and_features(n: int, d_x: int, d_y: int, space: str) -> None:
    statistics = passed(*paired_features(n, d_x, d_y, dtype=torch.float32), [n])
    assert statistics.space is None
    statistics.score(CPU, debiased=False)
    assert statistics.space == space


@ESTIMATORS
@PASS
@pytest.mark.parametrize("products", ["float64", "float32"])
def test_what_is_known_of_the_reference_changes_nothing(
    d_x: int, d_y: int, sizes: list[int], products: Any, debiased: bool
) -> None:
    """From a pass of another live model over the same samples in another order, and from the pass after that."""
    n = sum(sizes)
    X, Y = paired_features(n, d_x, d_y, related=False, offset=1e4, dtype=torch.float32)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    earlier = passed(X[order].square(), Y[order], [n], products=products)
    earlier.score(CPU, debiased=debiased)
    expected = passed(X, Y, sizes, products=products).score(CPU, debiased=debiased)
    known = earlier.reference_terms
    tolerance = 1e-12 if products == "float64" else 1e-7  # other sums have been rounded
    for _ in range(2):
        statistics = passed(X, Y, sizes, products=products, reference=known)
        score = statistics.score(CPU, debiased=debiased)
        assert (score.n, score.finite) == (expected.n, expected.finite)
        assert score.cka == pytest.approx(expected.cka, abs=tolerance)
        known = statistics.reference_terms


@PASS
def test_what_is_known_of_the_reference_is_used(d_x: int, d_y: int, sizes: list[int]) -> None:
    """Or the test above would show nothing."""
    X, Y = paired_features(sum(sizes), d_x, d_y)
    first = passed(X, Y, sizes)
    value = first.score(CPU, debiased=False).cka
    assert first.reference_terms is not None
    known = first.reference_terms._replace(yy=4 * first.reference_terms.yy)
    assert passed(X, Y, sizes, reference=known).score(CPU, debiased=False).cka == pytest.approx(value / 2, abs=1e-9)


@ESTIMATORS
@PASS
def test_a_reference_may_be_in_another_unit(d_x: int, d_y: int, sizes: list[int], debiased: bool) -> None:
    X, Y = paired_features(sum(sizes), d_x, d_y, related=False)
    first = passed(X, Y, sizes)
    value = first.score(CPU, debiased=debiased).cka
    assert first.reference_terms is not None
    n, yy, b, bb, exponent, _ = first.reference_terms
    known = ReferenceTerms(n, yy / 16**5, b / 4**5, bb / 16**5, exponent + 5)  # all y are 2^5 times as large
    assert passed(X, Y, sizes, reference=known).score(CPU, debiased=debiased).cka == pytest.approx(value, abs=1e-12)


@PASS
@pytest.mark.parametrize("which", ["fewer", "others"])
def test_a_reference_of_other_samples_is_an_error(d_x: int, d_y: int, sizes: list[int], which: str) -> None:
    X, Y = paired_features(sum(sizes), d_x, d_y)
    first = passed(X[1:] if which == "fewer" else X, Y[1:] if which == "fewer" else Y * 1.01, [sum(sizes)
        - (which == "fewer")])  # fmt: skip
    first.score(CPU, debiased=False)
    statistics = passed(X, Y, sizes, reference=first.reference_terms)
    with pytest.raises(ValueError, match=f"Expected `reference` to be of the {sum(sizes)} samples of this pass"):
        statistics.score(CPU, debiased=False)


@ESTIMATORS
@pytest.mark.parametrize("remembers", [False, True])
@pytest.mark.parametrize("sizes", [[], [0, 0]], ids=["no batches", "empty batches"])
def test_a_pass_without_samples(sizes: list[int], remembers: bool, debiased: bool) -> None:
    X, Y = paired_features(0, 3, 4)
    known = ReferenceTerms(30, 1.0, 2.0, 3.0) if remembers else None
    statistics = ExactStatistics(reference=known) if not sizes else passed(X, Y, sizes, reference=known)
    score = statistics.score(CPU, debiased=debiased)
    assert math.isnan(score.cka)
    assert score[1:3] == (0, True)
    assert statistics.space is None
    assert statistics.reference_terms == known


@pytest.mark.parametrize(("d_x", "d_y"), [(40, 50), (3, 2)])
def test_too_few_samples_are_nan_until_there_are_enough(d_x: int, d_y: int) -> None:
    X, Y = paired_features(5, d_x, d_y)
    statistics = ExactStatistics()
    for n in range(5):
        statistics.add(X[n : n + 1], Y[n : n + 1])
        for debiased, needed in ((False, 2), (True, 4)):
            assert math.isnan(statistics.score(CPU, debiased=debiased).cka) == (n + 1 < needed)


@PASS
def test_a_score_can_be_asked_for_again_and_on_the_way(d_x: int, d_y: int, sizes: list[int]) -> None:
    X, Y = paired_features(sum(sizes), d_x, d_y, dtype=torch.float32)
    statistics = ExactStatistics()
    seen = 0
    for x, y in zip(X.split(sizes), Y.split(sizes), strict=True):
        statistics.add(x, y)
        seen += len(x)
        score = statistics.score(CPU, debiased=False)
        assert str(statistics.score(CPU, debiased=False)) == str(score)
        assert score.n == seen
        if seen > 1:
            assert score.cka == pytest.approx(oracles.linear_cka(X[:seen], Y[:seen], False), abs=1e-10)


@ESTIMATORS
@PASS
@pytest.mark.parametrize("value", [0.0, 0.1, 1e6 + 0.1])
def test_constant_features_are_nan(d_x: int, d_y: int, sizes: list[int], value: float, debiased: bool) -> None:
    X, Y = paired_features(sum(sizes), d_x, d_y)
    for x, y in ((torch.full_like(X, value), Y), (X, torch.full_like(Y, value))):
        score = passed(x, y, sizes).score(CPU, debiased=debiased)
        assert math.isnan(score.cka)
        assert score.finite


@PASS
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["live", "reference"])
def test_non_finite_features_are_nan_and_said_to_be(
    d_x: int, d_y: int, sizes: list[int], where: str, value: float
) -> None:
    X, Y = paired_features(sum(sizes), d_x, d_y)
    (X if where == "live" else Y)[-2, 1] = value
    score = passed(X, Y, sizes).score(CPU, debiased=False)
    assert math.isnan(score.cka)
    assert score[1:3] == (sum(sizes), False)


@ESTIMATORS
@PASS
@pytest.mark.parametrize("scale", [1e-150, 1e-45, 1e45, 1e100])
def test_any_magnitude(d_x: int, d_y: int, sizes: list[int], scale: float, debiased: bool) -> None:
    """Of which float32 has no room for the features, nor float64 for their fourth powers."""
    X, Y = paired_features(sum(sizes), d_x, d_y, related=False)
    expected = passed(X, Y, sizes)
    expected.score(CPU, debiased=debiased)
    for x, y in ((X * scale, Y), (X, Y * scale)):
        score = passed(x, y, sizes).score(CPU, debiased=debiased)
        assert score.finite
        assert score.cka == pytest.approx(oracles.linear_cka(X, Y, debiased), abs=2e-9)
    known = expected.reference_terms
    score = passed(X * scale, Y, sizes, reference=known).score(CPU, debiased=debiased)
    assert score.cka == pytest.approx(oracles.linear_cka(X, Y, debiased), abs=2e-9)


@PASS
def test_other_widths_are_an_error_that_changes_nothing(d_x: int, d_y: int, sizes: list[int]) -> None:
    X, Y = paired_features(sum(sizes), d_x, d_y)
    statistics = passed(X, Y, sizes)
    wrong = [
        (torch.ones(5, d_x - 1), torch.ones(5, d_y), rf"were \({d_x}, {d_y}\) wide before, and now are \({d_x - 1},"),
        (torch.ones(5, d_x), torch.ones(5, d_y + 1), rf"were \({d_x}, {d_y}\) wide before, and now are \({d_x}, "),
        (torch.ones(5, d_x), torch.ones(6, d_y), "the live model gave features of 5 samples, the reference of 6"),
    ]
    for x, y, message in wrong:
        with pytest.raises(ValueError, match=message):
            statistics.add(x, y)
    assert statistics.score(CPU, debiased=True) == passed(X, Y, sizes).score(CPU, debiased=True)


def test_products_are_checked() -> None:
    with pytest.raises(ValueError, match="Expected `products` to be"):
        ExactStatistics(products="float16")  # type: ignore[arg-type]


@PASS
def test_inference_mode_and_autocast_may_come_and_go(d_x: int, d_y: int, sizes: list[int]) -> None:
    """Lightning validates under inference mode or without gradients only, and a user's step may keep them."""
    X, Y = paired_features(sum(sizes), d_x, d_y, dtype=torch.float32)
    statistics = ExactStatistics(products="float32")
    for index, (x, y) in enumerate(zip(X.split(sizes), Y.split(sizes), strict=True)):
        with torch.inference_mode(index % 2 == 0), torch.autocast("cpu", dtype=torch.bfloat16):
            statistics.add((x + 0).requires_grad_(index % 2 == 1), y + 0)
        if index % 3 == 0:
            statistics.score(CPU, debiased=False)
    expected = passed(X, Y, sizes, products="float32").score(CPU, debiased=True).cka
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert statistics.score(CPU, debiased=True).cka == pytest.approx(expected, abs=1e-9)
    assert statistics.score(CPU, debiased=True).cka == pytest.approx(expected, abs=1e-9)


def test_features_are_left_alone_and_what_they_are_a_part_of_is_not_kept() -> None:
    X, Y = paired_features(20, 30, 40)
    hidden = X[:, None].repeat(1, 50, 1)
    before = hidden.clone(), Y.clone()
    statistics = passed(hidden[:, 0], Y, [20])
    statistics.score(CPU, debiased=False)
    assert torch.equal(hidden, before[0])
    assert torch.equal(Y, before[1])
    kept = [block.untyped_storage().nbytes() for rows in statistics.samples.rows() for block in rows.blocks]
    assert kept == [X.nbytes, Y.nbytes]


def test_layers_in_any_order_have_their_own_values() -> None:
    pairs = {name: paired_features(40, d, d + 1, seed=d) for name, d in (("b", 3), ("a", 60), ("c", 7), ("d", 50))}
    layers: dict[str, ExactStatistics | MinibatchStatistics] = {
        name: passed(X, Y, [25, 15]) for name, (X, Y) in pairs.items()
    }
    layers["a minibatch"] = MinibatchStatistics()
    layers["a minibatch"].add(*pairs["a"])
    scores = score_layers(dict(sorted(layers.items())), CPU, debiased=True)
    assert list(scores) == sorted(layers)
    for name, (X, Y) in pairs.items():
        assert scores[name].cka == pytest.approx(oracles.linear_cka(X, Y, True), abs=1e-10)
    assert scores["a minibatch"].cka == pytest.approx(scores["a"].cka, abs=1e-12)  # of one batch they are the same
    assert score_layers({}, CPU, debiased=False) == {}


# The minibatch estimator.


def test_minibatches_come_to_the_metric_s_value() -> None:
    X, Y = paired_features(44, 3, 4)
    statistics, metric = MinibatchStatistics(), MinibatchCKA()
    for x, y in zip(X.split([16, 16, 12]), Y.split([16, 16, 12]), strict=True):
        statistics.add(x, y)
        metric.update([x], [y])
    for _ in range(2):
        score = statistics.score(CPU, debiased=False)
        assert score.cka == pytest.approx(metric.compute().item(), abs=1e-14)
        assert score[1:3] == (44, True)


def test_degenerate_minibatches() -> None:
    assert str(MinibatchStatistics().score(CPU, debiased=False)) == str(Score(math.nan, 0, True, math.nan))
    X, Y = paired_features(28, 3, 4)
    X[18, 1] = torch.nan
    statistics = MinibatchStatistics()
    for rows in (slice(0, 16), slice(16, 28)):
        statistics.add(X[rows], Y[rows])
    assert str(statistics.score(CPU, debiased=False)) == str(Score(math.nan, 28, False, math.nan))
    with pytest.raises(ValueError, match="Expected at least 4 samples"):
        statistics.add(X[:3], Y[:3])
    with pytest.raises(ValueError, match="Expected `X` and `Y` to hold the same samples"):
        statistics.add(X[:5], Y[:6])


# Several ranks.


@cache
def expected_of_case(name: str, debiased: bool) -> float:
    return oracles.linear_cka(*statistics_worker.features(CASES[name]), debiased)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the processes of `statistics_worker.py` have left what they saw; all of them have ended, or been ended."""
    folder = tmp_path_factory.mktemp("statistics")
    sync_worker.run_to_end(statistics_worker.__file__, folder, seconds=250)
    return folder


@ESTIMATORS
@WORLD_SIZES
@pytest.mark.parametrize("name", CASES)
def test_all_ranks_have_the_value_of_all_samples(folder: Path, name: str, world_size: int, debiased: bool) -> None:
    case = CASES[name]
    for seen in seen_by_ranks(folder, "scored", world_size):
        cka, n, finite, unbiased, alone, in_float32, with_known = seen[f"{name} {debiased}"].tolist()
        assert (n, finite) == (case.n, True)
        if case.n < (4 if debiased else 2):
            assert all(map(math.isnan, (cka, alone, in_float32, with_known)))
            continue
        expected = expected_of_case(name, debiased)
        exact = case.dtype != torch.float64 or case.n * (case.d_x + case.d_y) < 2**17
        assert cka == pytest.approx(expected, abs=1e-10 if exact else 2e-9)
        if case.n >= 4:
            assert unbiased == pytest.approx(expected_of_case(name, True), abs=1e-10 if exact else 2e-9)
        assert alone == pytest.approx(cka, abs=1e-12)
        assert with_known == pytest.approx(cka, abs=1e-12)
        assert in_float32 == pytest.approx(expected, abs=1e-6)


@WORLD_SIZES
@pytest.mark.parametrize("name", CASES)
def test_all_ranks_draw_the_same_samples_whoever_has_them(folder: Path, name: str, world_size: int) -> None:
    case = CASES[name]
    X, Y = statistics_worker.features(case)
    (alone,) = seen_by_ranks(folder, "subsamples", 1)
    for seen in seen_by_ranks(folder, "subsamples", world_size):
        if case.n < 8:
            assert f"{name} known" not in seen
            continue
        keys = torch.stack([torch.arange(case.n), torch.full((case.n,), 7)], dim=1)
        drawn = sample_hashes(keys).argsort()[:256]
        assert torch.equal(seen[f"{name} known hashes"], sample_hashes(keys)[drawn])
        expected = linear_jackknife(X[drawn], Y[drawn])
        found = seen[f"{name} known"]
        assert torch.equal(found, alone[f"{name} known"])  # to the bit, on any number of ranks
        torch.testing.assert_close(found[0], expected.value, rtol=0, atol=1e-9)
        torch.testing.assert_close(found[1:], expected.without, rtol=0, atol=1e-9)
        assert len(seen[f"{name} unknown"]) == 1 + min(case.n, 256)


@WORLD_SIZES
def test_ranks_go_the_same_way_to_the_same_bits(folder: Path, world_size: int) -> None:
    ranks = seen_by_ranks(folder, "scored", world_size)
    for seen in ranks:
        for name, value in ranks[0].items():
            assert str(seen[name]) == str(value), name
    wide = {name for name, case in CASES.items() if 0 < case.n < 3 * max(case.d_x, case.d_y)}
    assert {name for name in CASES if ranks[0][f"{name} space"] == "samples"} == wide
    assert ranks[0]["none space"] == "None"


@ESTIMATORS
@WORLD_SIZES
def test_degenerate_features_on_some_ranks(folder: Path, world_size: int, debiased: bool) -> None:
    for seen in seen_by_ranks(folder, "degenerate", world_size):
        for width in (50, 3):
            values = {
                name: seen[f"{name} {width} {debiased}"].tolist() for name in ("constant", "broken", "right", "tiny")
            }
            assert math.isnan(values["constant"][0])
            assert values["constant"][2]
            assert math.isnan(values["broken"][0])
            assert not values["broken"][2]
            X, Y = paired_features((20 if width == 50 else 400) * world_size, width, width)
            assert values["right"][0] == pytest.approx(oracles.linear_cka(X, Y, debiased), abs=1e-10)
            assert values["tiny"][0] == pytest.approx(values["right"][0], abs=1e-10)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_that_differ_all_say_so(folder: Path, world_size: int) -> None:
    for seen in seen_by_ranks(folder, "unequal", world_size):
        between = "on all ranks, but got from [5, 5] to [6, 5]."
        assert (
            seen["widths 20"] == seen["widths 0"] == f"Expected the same numbers of features of layer 'odd' {between}"
        )
        assert seen["alone"] == f"Expected the same numbers of features {between}"
        assert seen["reference"] == "Expected `reference` on all ranks or on none, but only some have it."
        assert "to be of the " in str(seen["others"])
        assert not math.isnan(float(seen["after"]))


@WORLD_SIZES
def test_minibatches_of_all_ranks(folder: Path, world_size: int) -> None:
    X, Y = paired_features(80, 6, 5)
    metric = MinibatchCKA()
    for x, y in zip(X.split(8), Y.split(8), strict=True):
        metric.update([x], [y])
    for seen in seen_by_ranks(folder, "minibatches", world_size):
        assert seen["one"][:3].tolist() == pytest.approx([metric.compute().item(), 80, 1], abs=1e-14)
        assert str(seen["none"][:3].tolist()) == str([math.nan, 0.0, 1.0])


def test_only_the_ranks_of_a_group_count(folder: Path) -> None:
    X, Y = paired_features(60, 30, 40)
    parts = [slice(0, 20), slice(20, 60), slice(20, 60)]
    for seen, rows in zip(seen_by_ranks(folder, "groups", 3), parts, strict=True):
        assert seen["cka"] == pytest.approx(oracles.linear_cka(X[rows], Y[rows], False), abs=1e-10)


def test_many_layers_take_few_collectives(folder: Path) -> None:
    """Of 100 layers, half in either space: sizes, means, moments, the rows of each rank, and what they come to."""
    assert {seen["calls"] for seen in seen_by_ranks(folder, "collectives", 1)} == {0}
    assert {seen["calls"] for seen in seen_by_ranks(folder, "collectives", 3)} == {1 + 1 + 1 + 3 + 1}


@HAS_PEAK
@pytest.mark.parametrize("world_size", [2, 3])
def test_scoring_wide_layers_on_ranks_takes_blocks_alone(folder: Path, world_size: int) -> None:
    """The moments of one of these layers would be 402 MiB, and twice that while they are added up."""
    for seen in seen_by_ranks(folder, "memory", world_size):
        assert 10 < float(seen["mebibytes"]) < 90  # less would not have been measured


MEMORY = """
import sys, torch
from pathlib import Path
from lit_cka.statistics.layer import ExactStatistics, score_layers

def peak_kilobytes():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

torch.set_num_threads(1)
num_layers, num_batches = map(int, sys.argv[1:])
def pass_over(layers):
    for _ in range(num_batches):
        for each in layers.values():
            each.add(*torch.randn(2, 16, 4096, dtype=torch.float64))
    return score_layers(layers, torch.device("cpu"), debiased=True)

pass_over({"": ExactStatistics()})  # what is loaded and kept once
Path("/proc/self/clear_refs").write_text("5")
before = peak_kilobytes()
pass_over({str(index): ExactStatistics() for index in range(num_layers)})
print((peak_kilobytes() - before) / 1024)
"""


@HAS_PEAK
def test_memory_of_wide_layers_is_that_of_their_rows() -> None:
    """4 layers of 128 samples take 4 MiB each in float32, and some more for what is new or being read."""
    root = Path(__file__).parents[2]
    environment = {"PYTHONPATH": str(root), "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", MEMORY, "4", "8"]
    output = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True).stdout
    assert 16 < float(output) < 32


def test_layers_of_as_many_samples_go_together() -> None:
    """On an accelerator, in stacks of matrices of one size."""
    empty = torch.zeros(0, 0)
    layers = [_Rows(str(number), torch.zeros(m), empty, empty) for number, m in enumerate([9, 9, 9, 5, 9, 9])]
    assert [[each.name for each in some] for some in _alike(layers, 2)] == [["0", "1"], ["2"], ["3"], ["4", "5"]]
