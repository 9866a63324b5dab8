"""What one pass over the data comes to: the same with the reference's own sums known from an earlier one or not."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from lit_cka.functional import linear_cka
from lit_cka.metrics import MinibatchCKA
from lit_cka.reference.cache import Batch
from lit_cka.tracking.statistics import ExactStatistics, MinibatchStatistics, Recall, ReferenceSums, Score
from tests import oracles
from tests.oracles import paired_features

CPU = torch.device("cpu")
ESTIMATORS = pytest.mark.parametrize("debiased", [False, True], ids=["plain", "debiased"])
# Rows are added up when there are 1,024: never, after the third batch, and at every one.
SIZES = {
    "never full": [16, 16, 12],
    "full in between": [400, 400, 400, 400, 400, 7],
    "full each time": [1100, 1024, 1300],
    "with empty ones": [0, 600, 0, 500, 0, 0, 300, 0],
}
SPLITS = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())


def batch(index: int) -> Batch:
    return Batch("validate", 0, index)


def recall_from(Y: Sequence[Tensor]) -> Recall:
    """A cache that holds these batches."""
    return lambda batch, num_samples: Y[batch.batch_idx][:num_samples]


def no_recall(batch: Batch, num_samples: int) -> Tensor:
    pytest.fail(f"asked the cache for {batch}")


def samples(sizes: Sequence[int], seed: int = 0, offset: float = 3.0) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Features by batch: of the live model (3) and the reference (4)."""
    X, Y = paired_features(sum(sizes), 3, 4, seed=seed, offset=offset)
    return X.split(list(sizes)), Y.split(list(sizes))


def passed(
    X: Sequence[Tensor], Y: Sequence[Tensor], known: ReferenceSums | None = None, start: int = 0
) -> ExactStatistics:
    """After a pass over the batches."""
    statistics = ExactStatistics(known)
    for index, (x, y) in enumerate(zip(X, Y, strict=True), start):
        statistics.add(batch(index), x, y)
    return statistics


def sums_of(Y: Sequence[Tensor]) -> ReferenceSums:
    """The reference's sums after a pass with another live model."""
    statistics = passed([y[:, :2].square() for y in Y], Y)
    statistics.score(no_recall, CPU, debiased=False)
    sums = statistics.reference_sums()
    assert sums is not None
    return sums


def assert_same(
    one: ExactStatistics, other: ExactStatistics, recall: Recall, *, debiased: bool, bitwise: bool = False
) -> Score:
    """The scores of both, and what a next pass would know from them."""
    score, expected = one.score(recall, CPU, debiased=debiased), other.score(no_recall, CPU, debiased=debiased)
    assert (score.n, score.finite) == (expected.n, expected.finite)
    assert score.cka == pytest.approx(expected.cka, abs=0 if bitwise else 1e-12, nan_ok=True)
    sums, expected_sums = one.reference_sums(), other.reference_sums()
    assert sums is not None
    assert expected_sums is not None
    assert sums.batches == expected_sums.batches
    for name in ("yy", "bb", "by"):
        value, wanted = getattr(sums, name), getattr(expected_sums, name)
        scale = float(wanted.abs().max())
        torch.testing.assert_close(value, wanted, rtol=0, atol=0 if bitwise else 1e-12 * max(scale, 1))
    return score


@ESTIMATORS
@SPLITS
@pytest.mark.parametrize("offset", [3.0, 1e4])
def test_a_pass_has_the_value_of_all_samples_at_once(sizes: list[int], offset: float, debiased: bool) -> None:
    X, Y = samples(sizes, offset=offset)
    score = passed(X, Y).score(no_recall, CPU, debiased=debiased)
    assert score.n == sum(sizes)
    assert score.finite
    assert score.cka == pytest.approx(linear_cka(torch.cat(X), torch.cat(Y), debiased=debiased).item(), abs=1e-10)
    if sum(sizes) < 100:
        assert score.cka == pytest.approx(oracles.linear_cka(torch.cat(X), torch.cat(Y), debiased), abs=1e-9)


@ESTIMATORS
def test_features_wider_than_the_rows_that_are_gathered(debiased: bool) -> None:
    X, Y = paired_features(40, 1200, 3)
    statistics = passed(X.split(15), Y.split(15))
    score = statistics.score(no_recall, CPU, debiased=debiased)
    assert score.cka == pytest.approx(oracles.linear_cka(X, Y, debiased), abs=1e-9)


@ESTIMATORS
@SPLITS
@pytest.mark.parametrize("offset", [3.0, 1e4])
def test_known_sums_change_no_bit(sizes: list[int], offset: float, debiased: bool) -> None:
    X, Y = samples(sizes, offset=offset)
    known = sums_of(Y)
    score = assert_same(passed(X, Y, known), passed(X, Y), no_recall, debiased=debiased, bitwise=True)
    assert score.n == sum(sizes)


def test_known_sums_are_used() -> None:
    """Or the tests here would show nothing: with those of other data the value is another."""
    X, Y = samples([16, 16, 12])
    known = sums_of([3 * y.square() for y in Y])
    right = passed(X, Y).score(no_recall, CPU, debiased=False).cka
    assert abs(passed(X, Y, known).score(no_recall, CPU, debiased=False).cka - right) > 0.01


@ESTIMATORS
@SPLITS
def test_a_third_pass_knows_what_the_second_knew(sizes: list[int], debiased: bool) -> None:
    X, Y = samples(sizes)
    second = passed(X, Y, sums_of(Y))
    second.score(no_recall, CPU, debiased=debiased)
    assert_same(passed(X, Y, second.reference_sums()), passed(X, Y), no_recall, debiased=debiased, bitwise=True)


@ESTIMATORS
@SPLITS
@pytest.mark.parametrize("which", ["fewer", "none of the first", "shorter ones"])
def test_other_batches_than_in_the_earlier_pass(sizes: list[int], which: str, debiased: bool) -> None:
    """`limit_val_batches` or the number of ranks has changed: their own sums are computed from the cache."""
    X, Y = samples(sizes)
    known = sums_of(Y)
    if which == "fewer":
        x, y, start = X[:2], Y[:2], 0
    elif which == "none of the first":
        x, y, start = X[1:], Y[1:], 1
    else:
        x, y, start = [x[: len(x) // 2 + 1] for x in X], [y[: len(y) // 2 + 1] for y in Y], 0
    score = assert_same(passed(x, y, known, start), passed(x, y, None, start), recall_from(Y), debiased=debiased)
    assert score.n == sum(map(len, x))


@ESTIMATORS
@SPLITS
def test_data_that_change_in_the_middle_of_a_pass(sizes: list[int], debiased: bool) -> None:
    """Known sums are of no use then; the cache has the features of the batches until there."""
    X, before = samples(sizes)
    known = sums_of(before)
    for changed_from in range(len(sizes)):
        Y = [y if index < changed_from else y.square() + 1 for index, y in enumerate(before)]
        statistics = ExactStatistics(known)
        for index, (x, y) in enumerate(zip(X, Y, strict=True)):
            if index >= changed_from:  # as the tracker does at every batch that does not come from the cache
                statistics.forget_known(recall_from(before[:changed_from]))
            statistics.add(batch(index), x, y)
        assert_same(statistics, passed(X, Y), no_recall, debiased=debiased)


def test_known_sums_may_be_forgotten_where_there_are_none() -> None:
    X, Y = samples([1100, 50])
    statistics = ExactStatistics()
    statistics.forget_known(no_recall)
    for index, (x, y) in enumerate(zip(X, Y, strict=True)):
        statistics.add(batch(index), x, y)
        statistics.forget_known(no_recall)
    assert_same(statistics, passed(X, Y), no_recall, debiased=True, bitwise=True)


@ESTIMATORS
@pytest.mark.parametrize("remembers", [False, True])
def test_a_pass_of_empty_batches_alone(debiased: bool, remembers: bool) -> None:
    """Of repeated samples alone, say, on a rank with none of its own."""
    X, Y = samples([0, 0])
    statistics = passed(X, Y, sums_of(Y) if remembers else None)
    score = statistics.score(no_recall, CPU, debiased=debiased)
    assert score.cka != score.cka
    assert (score.n, score.finite) == (0, True)
    sums = statistics.reference_sums()
    assert sums is not None
    assert not sums.yy.any()


def test_a_pass_without_batches() -> None:
    statistics = ExactStatistics()
    score = statistics.score(no_recall, CPU, debiased=False)
    assert score.cka != score.cka
    assert (score.n, score.finite) == (0, True)
    assert statistics.reference_sums() is None
    known = sums_of(samples([16, 16])[1])
    assert ExactStatistics(known).score(no_recall, CPU, debiased=False).n == 0


def test_a_score_can_be_asked_for_again_and_on_the_way() -> None:
    X, Y = samples([16, 16, 12])
    statistics = ExactStatistics(sums_of(Y[:2]))
    for index in range(3):
        if index == 2:
            first = statistics.score(no_recall, CPU, debiased=False)
            assert statistics.score(no_recall, CPU, debiased=False) == first
            assert first.cka == pytest.approx(linear_cka(torch.cat(X[:2]), torch.cat(Y[:2])).item(), abs=1e-12)
        statistics.add(batch(index), X[index], Y[index])
    last = statistics.score(no_recall, CPU, debiased=False)
    assert last.n == 44
    assert last.cka == pytest.approx(linear_cka(torch.cat(X), torch.cat(Y)).item(), abs=1e-12)


@pytest.mark.parametrize("sizes", [[16, 16], [1100, 16]], ids=str)
@pytest.mark.parametrize("remembers", [False, True])
def test_other_widths_are_an_error_that_changes_nothing(sizes: list[int], remembers: bool) -> None:
    X, Y = samples(sizes)
    statistics = passed(X, Y, sums_of(Y) if remembers else None)
    wrong = [
        (torch.ones(5, 2), torch.ones(5, 4), r"were \(3, 4\) wide before, and now are \(2, 4\)"),
        (torch.ones(5, 3), torch.ones(5, 5), r"were \(3, 4\) wide before, and now are \(3, 5\)"),
        (torch.ones(5, 3), torch.ones(6, 4), "the live model gave features of 5 samples, the reference of 6"),
    ]
    for x, y, message in wrong:
        with pytest.raises(ValueError, match=message):
            statistics.add(batch(2), x.double(), y.double())
    assert_same(statistics, passed(X, Y), no_recall, debiased=True, bitwise=True)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["live", "reference"])
def test_non_finite_features_are_nan_and_said_to_be(where: str, value: float) -> None:
    X, Y = samples([16, 12])
    (X if where == "live" else Y)[1][3, 1] = value
    score = passed(X, Y).score(no_recall, CPU, debiased=False)
    assert score.cka != score.cka
    assert (score.n, score.finite) == (28, False)


# The minibatch estimator.


def test_minibatches_come_to_the_metric_s_value() -> None:
    X, Y = samples([16, 16, 12])
    statistics, metric = MinibatchStatistics(), MinibatchCKA()
    for index, (x, y) in enumerate(zip(X, Y, strict=True)):
        statistics.forget_known(no_recall)
        statistics.add(batch(index), x, y)
        metric.update([x], [y])
    for _ in range(2):
        score = statistics.score(no_recall, CPU, debiased=False)
        assert score.cka == metric.compute().item()
        assert (score.n, score.finite) == (44, True)
    assert statistics.reference_sums() is None


def test_no_minibatch_is_nan() -> None:
    score = MinibatchStatistics().score(no_recall, CPU, debiased=False)
    assert score.cka != score.cka
    assert (score.n, score.finite) == (0, True)


def test_minibatches_of_non_finite_features_are_said_to_be() -> None:
    X, Y = samples([16, 12])
    X[1][3, 1] = torch.nan
    statistics = MinibatchStatistics()
    for index, (x, y) in enumerate(zip(X, Y, strict=True)):
        statistics.add(batch(index), x, y)
    score = statistics.score(no_recall, CPU, debiased=False)
    assert score.cka != score.cka
    assert (score.n, score.finite) == (28, False)
