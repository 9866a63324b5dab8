"""LinearCKA and MinibatchCKA: the functions' values from any stream of batches, in any precision, on any rank."""

from __future__ import annotations

import pickle
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchmetrics.aggregation import SumMetric

from lit_cka import LinearCKA, MinibatchCKA
from lit_cka.functional import linear_cka
from tests import oracles, sync_worker
from tests.oracles import float64, paired_features
from tests.sync_worker import seen_by_ranks

ESTIMATORS = pytest.mark.parametrize("debiased", [False, True], ids=["plain", "debiased"])
MINIMA = [(2, False), (4, True)]  # samples that each estimator takes
BEFORE_UPDATE = "ignore:The ``compute`` method of metric .* was called before the ``update`` method"


def updated(metric: LinearCKA, X: Tensor, Y: Tensor, sizes: list[int]) -> LinearCKA:
    for x, y in zip(X.split(sizes), Y.split(sizes), strict=True):
        metric.update(x, y)
    return metric


@ESTIMATORS
@pytest.mark.parametrize("widths", [(None, None), (3, 4), (3, None), (None, 4)], ids=str)
@pytest.mark.parametrize("sizes", [[30], [10, 1, 0, 19], [0, 0, 2, 28], [1] * 30], ids=str)
@pytest.mark.parametrize(("offset", "dtype"), [(3.0, torch.float64), (1e4, torch.float32)])
def test_a_stream_of_batches_has_the_value_of_all_samples_at_once(
    sizes: list[int], widths: tuple[int | None, int | None], offset: float, dtype: torch.dtype, debiased: bool
) -> None:
    X, Y = paired_features(30, 3, 4, related=False, offset=offset, dtype=dtype)
    metric = updated(LinearCKA(*widths, debiased=debiased), X, Y, sizes)
    assert metric.compute().dtype == torch.float64
    assert metric.compute().item() == pytest.approx(linear_cka(X, Y, debiased=debiased).item(), abs=1e-10)
    assert metric.compute().item() == pytest.approx(oracles.linear_cka(X, Y, debiased), abs=1e-9)


@ESTIMATORS
def test_products_can_be_in_float32(debiased: bool) -> None:
    X, Y = paired_features(300, 30, 40, related=False, offset=1e4, dtype=torch.float32)
    metric = updated(LinearCKA(debiased=debiased, products="float32"), X, Y, [100, 200])
    assert 1e-13 < abs(metric.compute().item() - oracles.linear_cka(X, Y, debiased)) < 1e-6
    with pytest.raises(ValueError, match="Expected `products` to be"):
        LinearCKA(products="float16")  # type: ignore[arg-type]


@ESTIMATORS
@pytest.mark.parametrize("widths", [(None, None), (3, 4)], ids=["lazy", "declared"])
def test_forward_returns_the_batch_and_keeps_the_total(widths: tuple[int | None, int | None], debiased: bool) -> None:
    X, Y = paired_features(30, 3, 4)
    metric = LinearCKA(*widths, debiased=debiased)
    for x, y in zip(X.split([10, 5, 15]), Y.split([10, 5, 15]), strict=True):
        assert metric(x, y).item() == pytest.approx(oracles.linear_cka(x, y, debiased), abs=1e-10)
    assert metric.compute().item() == pytest.approx(oracles.linear_cka(X, Y, debiased), abs=1e-10)
    assert metric.moments.n == 30


def test_forward_on_no_samples_changes_nothing() -> None:
    X, Y = paired_features(30, 3, 4)
    metric = updated(LinearCKA(), X, Y, [30])
    total = metric.compute()
    assert metric(X[:0], Y[:0]).isnan()
    assert torch.equal(metric.compute(), total)


def test_both_estimators_hold_the_same_state() -> None:
    X, Y = paired_features(30, 3, 4)
    metric = updated(LinearCKA(), X, Y, [20, 10])
    metric.debiased = True
    assert metric.compute().item() == pytest.approx(oracles.linear_cka(X, Y, True), abs=1e-10)


@ESTIMATORS
@pytest.mark.parametrize("as_dict", [False, True], ids=["metric", "dict"])
def test_merged_metrics_have_the_value_of_all_samples(as_dict: bool, debiased: bool) -> None:
    X, Y = paired_features(30, 3, 4, offset=1e4)
    mine = updated(LinearCKA(debiased=debiased), X[:12], Y[:12], [5, 7])
    other = updated(LinearCKA(debiased=debiased), X[12:], Y[12:], [18])
    mine.compute()  # a value that must not be kept
    mine.merge_state(other.metric_state if as_dict else other)
    assert mine.compute().item() == pytest.approx(oracles.linear_cka(X, Y, debiased), abs=1e-9)
    assert other.compute().item() == pytest.approx(oracles.linear_cka(X[12:], Y[12:], debiased), abs=1e-9)


@pytest.mark.parametrize("as_dict", [False, True], ids=["metric", "dict"])
@pytest.mark.parametrize("widths", [(None, None), (3, 4), (3, None)], ids=["lazy", "declared", "half declared"])
def test_merging_with_an_empty_metric(as_dict: bool, widths: tuple[int | None, int | None]) -> None:
    X, Y = paired_features(30, 3, 4)
    mine, empty = updated(LinearCKA(), X, Y, [30]), LinearCKA(*widths)
    total = mine.compute()
    mine.merge_state(empty.metric_state if as_dict else empty)
    assert torch.equal(mine.compute(), total)
    empty.merge_state(mine.metric_state if as_dict else mine)
    assert torch.equal(empty.compute(), total)  # and without the warning that it was never updated


def test_only_its_own_kind_can_be_merged() -> None:
    metric = LinearCKA()
    with pytest.raises(ValueError, match="Expected a LinearCKA or a dict of its states, but got SumMetric"):
        metric.merge_state(SumMetric())
    updated(metric, *paired_features(5, 3, 4), [5])
    with pytest.raises(ValueError, match="Expected `Y` to have 4 features per sample, but got 2"):
        metric.merge_state(updated(LinearCKA(), *paired_features(5, 3, 2), [5]))


@pytest.mark.parametrize("duplicate", [LinearCKA.clone, deepcopy, lambda metric: pickle.loads(pickle.dumps(metric))])
def test_copies_go_their_own_way(duplicate: type) -> None:
    X, Y = paired_features(30, 3, 4)
    metric = updated(LinearCKA(debiased=True), X[:20], Y[:20], [20])
    copy = duplicate(metric)
    updated(copy, X[20:], Y[20:], [10])
    assert copy.compute().item() == pytest.approx(oracles.linear_cka(X, Y, True), abs=1e-10)
    assert metric.compute().item() == pytest.approx(oracles.linear_cka(X[:20], Y[:20], True), abs=1e-10)


@pytest.mark.parametrize("widths", [(None, None), (3, 4)], ids=["lazy", "declared"])
def test_reset_forgets_all_samples(widths: tuple[int | None, int | None]) -> None:
    X, Y = paired_features(30, 3, 4)
    metric = updated(LinearCKA(*widths), 7 * X + 1, X @ torch.ones(3, 4).double(), [30])
    metric.compute()
    metric.reset()
    assert metric.moments.n == 0
    assert updated(metric, X, Y, [10, 20]).compute().item() == pytest.approx(oracles.linear_cka(X, Y, False), abs=1e-10)


def test_a_lazy_metric_takes_other_widths_after_reset() -> None:
    metric = updated(LinearCKA(), *paired_features(5, 3, 4), [5])
    metric.reset()
    X, Y = paired_features(30, 6, 2)
    assert updated(metric, X, Y, [30]).compute().item() == pytest.approx(oracles.linear_cka(X, Y, False), abs=1e-10)


def test_the_statistics_stay_out_of_the_model_s_state_dict() -> None:
    model = nn.ModuleDict({"net": nn.Linear(2, 2), "cka": updated(LinearCKA(), *paired_features(5, 3, 4), [5])})
    assert set(model.state_dict()) == {"net.weight", "net.bias"}


@pytest.mark.parametrize(
    "convert",
    [
        lambda model: model.to(torch.bfloat16),
        lambda model: model.to("cpu", torch.float16),
        nn.Module.half,
        nn.Module.bfloat16,
        nn.Module.double,
        nn.Module.float,
        lambda model: model.type(torch.float32),
    ],
    ids=["to(bfloat16)", "to(cpu, float16)", "half", "bfloat16", "double", "float", "type(float32)"],
)
@pytest.mark.parametrize("directly", [False, True], ids=["by its parent", "directly"])
def test_converting_the_model_leaves_the_statistics_alone(convert: type, directly: bool) -> None:
    X, Y = paired_features(30, 3, 4, offset=1e4)
    metrics = {
        "linear": updated(LinearCKA(), X[:20], Y[:20], [20]),
        "declared": updated(LinearCKA(3, 4), X[:20], Y[:20], [20]),
        "unused": LinearCKA(3, 4),
    }
    minibatch = MinibatchCKA()
    minibatch.update([X[:20]], [Y[:20]])
    model = nn.ModuleDict({"net": nn.Linear(2, 2), **metrics, "minibatch": minibatch})
    for converted in model.values() if directly else [model]:
        convert(converted)
    for metric in metrics.values():
        assert {value.dtype for value in metric.metric_state.values()} == {torch.float64}
        updated(metric, X[20:], Y[20:], [10])
    for name in ("linear", "declared"):
        assert metrics[name].compute().item() == pytest.approx(oracles.linear_cka(X, Y, False), abs=1e-9)
        metrics[name].reset()
        assert {value.dtype for value in metrics[name].metric_state.values()} == {torch.float64}
    assert metrics["unused"].compute().item() == pytest.approx(oracles.linear_cka(X[20:], Y[20:], False), abs=1e-9)
    minibatch.update([X[20:]], [Y[20:]])
    assert {value.dtype for value in minibatch.metric_state.values()} == {torch.float64}
    expected = minibatch_cka([([X[:20]], [Y[:20]]), ([X[20:]], [Y[20:]])])
    np.testing.assert_allclose(minibatch.compute(), expected, atol=1e-9)


def test_moving_the_model_moves_the_statistics() -> None:
    model = nn.ModuleDict({"cka": LinearCKA(3, 4), "minibatch": MinibatchCKA()}).to("meta")
    assert {value.device.type for metric in model.values() for value in metric.metric_state.values()} == {"meta"}
    assert {value.dtype for metric in model.values() for value in metric.metric_state.values()} == {torch.float64}


def test_autocast_does_not_reach_the_statistics() -> None:
    X, Y = paired_features(30, 3, 4, dtype=torch.float32, offset=1e3)
    linear, minibatch = LinearCKA(debiased=True), MinibatchCKA()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        updated(linear, X, Y, [20, 10])
        value = linear.compute()
        minibatch.update([X], [Y])
        matrix = minibatch.compute()
    assert value.item() == pytest.approx(oracles.linear_cka(X, Y, True), abs=1e-9)
    assert matrix.item() == pytest.approx(oracles.linear_cka(X, Y, True), abs=1e-9)


def test_reduced_matmul_precision_does_not_reach_the_statistics() -> None:
    X, Y = paired_features(30, 3, 4, dtype=torch.float32, offset=1e3)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        value = updated(LinearCKA(), X, Y, [20, 10]).compute()
    finally:
        torch.set_float32_matmul_precision(before)
    assert value.item() == pytest.approx(oracles.linear_cka(X, Y, False), abs=1e-9)


@pytest.mark.parametrize("widths", [(None, None), (3, 4)], ids=["lazy", "declared"])
def test_inference_mode_may_come_and_go(widths: tuple[int | None, int | None]) -> None:
    """Lightning validates under inference mode and sanity checks without: states made in one are used in the other."""
    X, Y = paired_features(30, 3, 4)
    metric, minibatch = LinearCKA(*widths), MinibatchCKA()
    with torch.inference_mode():
        updated(metric, Y[:, :3], X[:, [0, 1, 2, 0]], [30])
        minibatch.update([X], [X])
        metric.reset()
        minibatch.reset()
    updated(metric, X[:10], Y[:10], [10])
    minibatch.update([X[:10]], [Y[:10]])
    with torch.inference_mode():
        updated(metric, X[10:20], Y[10:20], [10])
        minibatch.update([X[10:20]], [Y[10:20]])
    updated(metric, X[20:], Y[20:], [10])
    minibatch.update([X[20:]], [Y[20:]])
    assert metric.compute().item() == pytest.approx(oracles.linear_cka(X, Y, False), abs=1e-10)
    batches = [([x], [y]) for x, y in zip(X.split(10), Y.split(10), strict=True)]
    np.testing.assert_allclose(minibatch.compute(), minibatch_cka(batches), atol=1e-10)


def test_features_with_a_graph_leave_none_in_the_statistics() -> None:
    X, Y = paired_features(10, 3, 4)
    metric, minibatch = updated(LinearCKA(), X.requires_grad_(), Y, [10]), MinibatchCKA()
    minibatch.update([X], [Y])
    for value in (*metric.metric_state.values(), *minibatch.metric_state.values()):
        assert not value.requires_grad


@ESTIMATORS
def test_too_few_samples_are_nan_until_there_are_enough(debiased: bool) -> None:
    X, Y = paired_features(5, 3, 4)
    metric = LinearCKA(debiased=debiased)
    for n in range(5):
        metric.update(X[n : n + 1], Y[n : n + 1])
        assert metric.compute().isnan() == (n + 1 < (4 if debiased else 2))


@pytest.mark.filterwarnings(BEFORE_UPDATE)
@ESTIMATORS
@pytest.mark.parametrize("widths", [(None, None), (3, 4)], ids=["lazy", "declared"])
def test_no_update_at_all_is_nan(widths: tuple[int | None, int | None], debiased: bool) -> None:
    assert LinearCKA(*widths, debiased=debiased).compute().isnan()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_non_finite_features_are_nan(value: float) -> None:
    X, Y = paired_features(10, 3, 4)
    X[3, 1] = value
    assert updated(LinearCKA(), X, Y, [5, 5]).compute().isnan()


@pytest.mark.parametrize(
    ("metric", "shape_x", "shape_y", "message"),
    [
        (LinearCKA(3, 4), (5, 2), (5, 4), "Expected `X` to have 3 features per sample, but got 2"),
        (LinearCKA(3, 4), (5, 3), (5, 7), "Expected `Y` to have 4 features per sample, but got 7"),
        (LinearCKA(), (5, 3), (4, 4), "Expected `X` and `Y` to hold the same samples .* got 5 and 4 samples"),
        (LinearCKA(), (5,), (5, 4), r"Expected `X` to be of shape \(samples, features\), but got \(5,\)"),
    ],
)
def test_wrong_features_are_an_error(
    metric: LinearCKA, shape_x: tuple[int, ...], shape_y: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        metric.update(torch.ones(shape_x), torch.ones(shape_y))


def test_other_widths_than_the_first_batch_s_are_an_error_that_changes_nothing() -> None:
    X, Y = paired_features(10, 3, 4)
    metric = updated(LinearCKA(), X, Y, [10])
    with pytest.raises(ValueError, match="Expected `Y` to have 4 features per sample, but got 3"):
        metric.update(X, X)
    assert metric.compute().item() == pytest.approx(oracles.linear_cka(X, Y, False), abs=1e-10)


def test_integer_features_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"Expected `Y` to be floating point, but got torch.int64\. Are these token"):
        LinearCKA().update(torch.ones(5, 3), torch.ones(5, 3).long())


@pytest.mark.parametrize("width", [0, -1])
def test_declared_widths_are_positive(width: int) -> None:
    with pytest.raises(ValueError, match=f"Expected `num_features_x` to be a positive number .* but got {width}"):
        LinearCKA(width, 3)
    with pytest.raises(ValueError, match=f"Expected `num_features_y` to be a positive number .* but got {width}"):
        LinearCKA(3, width)


# MinibatchCKA


def minibatch_cka(
    batches: list[tuple[list[Tensor], list[Tensor]]], kernel: str = "linear", **kwargs: float
) -> np.ndarray:
    """Nguyen et al. 2021, eq. 2: the batches' unbiased HSIC, averaged before the ratio is taken."""
    gram = {"linear": oracles.linear_gram, "rbf": oracles.rbf_gram}[kernel]

    def mean_hsic(pick_first: tuple[int, int], pick_second: tuple[int, int]) -> float:
        pairs = [
            [gram(float64(batch[model][layer]), **kwargs) for model, layer in (pick_first, pick_second)]
            for batch in batches
        ]
        return float(np.mean([oracles.unbiased_hsic(K, L) for K, L in pairs]))

    return np.array(
        [
            [
                mean_hsic((0, i), (1, j)) / np.sqrt(mean_hsic((0, i), (0, i)) * mean_hsic((1, j), (1, j)))
                for j in range(len(batches[0][1]))
            ]
            for i in range(len(batches[0][0]))
        ]
    )


def layered_batches(sizes: list[int], offset: float = 3.0) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Batches of the features of 2 and of 3 layers, some of them related."""
    X0, Y0 = paired_features(sum(sizes), 6, 4, offset=offset)
    X1, Y1 = paired_features(sum(sizes), 3, 9, offset=offset, seed=1)
    Y2 = X1 @ torch.ones(3, 2, dtype=torch.float64) + Y0[:, :2]
    splits = [features.split(sizes) for features in (X0, X1, Y0, Y1, Y2)]
    return [([x0, x1], [y0, y1, y2]) for x0, x1, y0, y1, y2 in zip(*splits, strict=True)]


# Numbers of pairs that are odd, for which all definitions of the median agree.
@pytest.mark.parametrize("sizes", [[7], [7, 6, 11, 10]], ids=str)
@pytest.mark.parametrize("kernel", ["linear", "rbf"])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_minibatch_cka_is_the_ratio_of_mean_unbiased_hsics(sizes: list[int], kernel: str, offset: float) -> None:
    batches = layered_batches(sizes, offset)
    metric = MinibatchCKA(kernel)
    for X, Y in batches:
        metric.update(X, Y)
    value = metric.compute()
    assert value.shape == (2, 3)
    assert value.dtype == torch.float64
    np.testing.assert_allclose(value, minibatch_cka(batches, kernel), atol=1e-9)


def test_minibatch_cka_of_one_batch_is_debiased_cka() -> None:
    ((X, Y),) = layered_batches([20])
    metric = MinibatchCKA()
    metric.update(X, Y)
    expected = [[oracles.linear_cka(x, y, True) for y in Y] for x in X]
    np.testing.assert_allclose(metric.compute(), expected, atol=1e-10)


def test_minibatch_cka_with_another_bandwidth() -> None:
    batches = layered_batches([7, 7])
    metric = MinibatchCKA("rbf", bandwidth=0.4)
    for X, Y in batches:
        metric.update(X, Y)
    np.testing.assert_allclose(metric.compute(), minibatch_cka(batches, "rbf", bandwidth=0.4), atol=1e-9)


def test_minibatch_cka_takes_mappings_in_their_order() -> None:
    ((X, Y),) = layered_batches([20])
    metric, mapped = MinibatchCKA(), MinibatchCKA()
    metric.update(X, Y)
    mapped.update({"z": X[0], "a": X[1]}, {"2": Y[0], "1": Y[1], "0": Y[2]})
    assert torch.equal(metric.compute(), mapped.compute())


def test_minibatch_forward_returns_the_batch_and_keeps_the_total() -> None:
    batches = layered_batches([10, 8])
    metric = MinibatchCKA()
    for X, Y in batches:
        np.testing.assert_allclose(metric(X, Y), minibatch_cka([(X, Y)]), atol=1e-9)
    np.testing.assert_allclose(metric.compute(), minibatch_cka(batches), atol=1e-9)
    metric.reset()
    metric.update(*batches[0])
    np.testing.assert_allclose(metric.compute(), minibatch_cka(batches[:1]), atol=1e-9)


@pytest.mark.parametrize("duplicate", [MinibatchCKA.clone, lambda metric: pickle.loads(pickle.dumps(metric))])
def test_minibatch_copies_go_their_own_way(duplicate: type) -> None:
    batches = layered_batches([10, 8])
    metric = MinibatchCKA()
    metric.update(*batches[0])
    copy = duplicate(metric)
    copy.update(*batches[1])
    np.testing.assert_allclose(copy.compute(), minibatch_cka(batches), atol=1e-9)
    np.testing.assert_allclose(metric.compute(), minibatch_cka(batches[:1]), atol=1e-9)


@pytest.mark.parametrize("as_dict", [False, True], ids=["metric", "dict"])
def test_merged_minibatch_metrics_have_the_value_of_all_batches(as_dict: bool) -> None:
    batches = layered_batches([10, 8])
    mine, other, empty = MinibatchCKA(), MinibatchCKA(), MinibatchCKA()
    mine.update(*batches[0])
    other.update(*batches[1])
    mine.compute()  # a value that must not be kept
    for metric in (other, empty):
        mine.merge_state(metric.metric_state if as_dict else metric)
    np.testing.assert_allclose(mine.compute(), minibatch_cka(batches), atol=1e-9)
    empty.merge_state(mine.metric_state if as_dict else mine)
    np.testing.assert_allclose(empty.compute(), minibatch_cka(batches), atol=1e-9)


def test_minibatch_metrics_of_other_layers_cannot_be_merged() -> None:
    ((X, Y),) = layered_batches([10])
    mine, other = MinibatchCKA(), MinibatchCKA()
    mine.update(X, Y)
    other.update(X[:1], Y[:1])
    with pytest.raises(ValueError, match=r"Expected \(2, 3\) layers as before, but got \(1, 1\)"):
        mine.merge_state(other)


def test_a_constant_layer_is_nan_and_spares_the_others() -> None:
    ((X, Y),) = layered_batches([10])
    for kernel in ("linear", "rbf"):
        metric = MinibatchCKA(kernel)
        metric.update([X[0], torch.full((10, 5), 0.1), X[1]], Y)
        value = metric.compute()
        assert value[1].isnan().all()
        assert value[[0, 2]].isfinite().all()


def test_a_layer_of_non_finite_features_is_nan_and_spares_the_others() -> None:
    ((X, Y),) = layered_batches([10])
    Y[1][4, 2] = torch.nan
    metric = MinibatchCKA()
    metric.update(X, Y)
    assert metric.compute()[:, 1].isnan().all()
    assert metric.compute()[:, [0, 2]].isfinite().all()


@pytest.mark.filterwarnings(BEFORE_UPDATE)
def test_no_batch_is_an_empty_matrix() -> None:
    assert MinibatchCKA().compute().shape == (0, 0)


@pytest.mark.parametrize(
    ("X", "Y", "message"),
    [
        ([torch.ones(3, 2)], [torch.ones(3, 2)], "at least 4 samples in a batch .* but got 3.*drop_last=True"),
        ([], [torch.ones(5, 2)], "Expected `X` to hold the features of at least one layer, but got none"),
        ([torch.ones(5, 2)], {}, "Expected `Y` to hold the features of at least one layer, but got none"),
        ([torch.ones(5, 2)], [torch.ones(6, 2)], "the same samples in the same order, but got 5 and 6 samples"),
        ([torch.ones(5, 2), torch.ones(6, 2)], [torch.ones(5, 2)], "the same samples .* but got 5 and 6 samples"),
        ([torch.ones(5, 2).long()], [torch.ones(5, 2)], "to be floating point, but got torch.int64"),
        ([torch.ones(5, 2)], [torch.ones(5)], r"to be of shape \(samples, features\), but got \(5,\)"),
    ],
)
@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_wrong_batches_are_an_error(X: list[Tensor], Y: list[Tensor], message: str, kernel: str) -> None:
    with pytest.raises(ValueError, match=message):
        MinibatchCKA(kernel).update(X, Y)


def test_another_number_of_layers_is_an_error_that_changes_nothing() -> None:
    ((X, Y),) = layered_batches([10])
    metric = MinibatchCKA()
    metric.update(X, Y)
    for other in ((X[:1], Y), (X, Y[:1]), (Y, X)):
        with pytest.raises(ValueError, match=r"Expected \(2, 3\) layers as before, but got"):
            metric.update(*other)
    np.testing.assert_allclose(metric.compute(), minibatch_cka([(X, Y)]), atol=1e-9)


def test_wrong_kernels_are_an_error() -> None:
    with pytest.raises(ValueError, match="""Expected `kernel` to be "linear" or "rbf", but got 'cosine'"""):
        MinibatchCKA("cosine")
    with pytest.raises(ValueError, match="Expected `bandwidth` to be positive, but got 0"):
        MinibatchCKA("rbf", bandwidth=0)


# Several processes

MAX_RANKS = 4


@st.composite
def shared_samples(draw: st.DrawFn) -> tuple[Tensor, Tensor, list[list[Tensor]]]:
    """Samples, and the batches of indices that the ranks take: any share, any order, for some perhaps none."""
    n, batch_size = draw(st.integers(1, 200)), draw(st.integers(1, 64))
    ranks = draw(st.lists(st.integers(0, MAX_RANKS - 1), min_size=1, max_size=MAX_RANKS, unique=True))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    owners, order = torch.from_numpy(rng.choice(ranks, n)), torch.from_numpy(rng.permutation(n))
    X, Y = paired_features(n, draw(st.integers(1, 6)), draw(st.integers(1, 6)), seed=int(rng.integers(2**32)))
    return X, Y, [list(order[owners[order] == rank].split(batch_size)) for rank in range(MAX_RANKS)]


@pytest.mark.filterwarnings(BEFORE_UPDATE)
@ESTIMATORS
@given(data=shared_samples())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_share_out_over_ranks_has_the_value_of_all_samples(
    data: tuple[Tensor, Tensor, list[list[Tensor]]], debiased: bool
) -> None:
    X, Y, shares = data
    metrics = [LinearCKA(debiased=debiased) for _ in shares]
    for metric, batches in zip(metrics, shares, strict=True):
        for rows in batches:
            metric.update(X[rows], Y[rows])
    total = LinearCKA(debiased=debiased)
    for metric in metrics:
        total.merge_state(metric)
    assert total.moments.n == len(X)
    if len(X) < (4 if debiased else 2):
        assert total.compute().isnan()
        return
    expected = linear_cka(X, Y, debiased=debiased).item()
    assert total.compute().item() == pytest.approx(expected, abs=1e-8, nan_ok=True)
    if expected == expected:
        assert total.compute().item() == pytest.approx(oracles.linear_cka(X, Y, debiased), abs=1e-8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the processes of `sync_worker.py` have left what they saw; all of them have ended, or been ended."""
    folder = tmp_path_factory.mktemp("sync")
    sync_worker.run_to_end(sync_worker.__file__, folder, "synchronised", "nothing_new", "shared_out", "unequal")
    return folder


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("case", range(len(sync_worker.CASES)), ids=lambda case: str(sync_worker.CASES[case]))
def test_samples_shared_out_at_random_have_the_value_of_one_process(folder: Path, case: int, world_size: int) -> None:
    X, Y = sync_worker.case_features(case)
    n = len(X)
    batches = [rows for shares in sync_worker.shares(case, world_size) for rows in shares]
    assert sorted(torch.cat(batches).tolist()) == list(range(n))
    expected = [linear_cka(X, Y, debiased=debiased).item() if n >= k else torch.nan for k, debiased in MINIMA]
    for seen in seen_by_ranks(folder, "shared_out", world_size):
        assert seen["values"][case].tolist() == pytest.approx([*expected, n], abs=1e-10, nan_ok=True)


@pytest.mark.parametrize("world_size", [2, 3])
def test_other_widths_on_another_rank_are_an_error_on_every_rank(folder: Path, world_size: int) -> None:
    X, Y = sync_worker.features()
    linear = linear_cka(torch.cat([X[0], X[0]]), torch.cat([Y[0], Y[0]])).item()
    for seen in seen_by_ranks(folder, "unequal", world_size):
        for attempt in range(2):
            text = "Expected the same numbers of features on all ranks, but got from [5, 4] to [5, 6]."
            assert seen[f"linear {attempt}"] == text
            text = "Expected the same numbers of layers on all ranks, but got from [2, 2] to [2, 3]."
            assert seen[f"minibatch {attempt}"] == text
        assert seen["linear after"].item() == pytest.approx(linear, abs=1e-10)
        assert seen["minibatch after"].shape == (2, 3)


@pytest.mark.parametrize("world_size", [2, 3])
def test_linear_cka_on_every_rank_is_that_of_all_samples(folder: Path, world_size: int) -> None:
    X, Y = sync_worker.features()
    for name, debiased in (("lazy", False), ("declared", False), ("debiased", True), ("tiny", False), ("huge", True)):
        total = 0
        for number, batches in enumerate(sync_worker.ROUNDS[world_size]):
            total += sync_worker.num_samples(batches)
            expected = linear_cka(X[0][:total], Y[0][:total], debiased=debiased).item()
            assert expected == pytest.approx(oracles.linear_cka(X[0][:total], Y[0][:total], debiased), abs=1e-8)
            for seen in seen_by_ranks(folder, "synchronised", world_size):
                assert seen[f"{name} {number}"].item() == pytest.approx(expected, abs=1e-10)
                assert seen[f"{name} {number} restored"]


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_minibatch_cka_on_every_rank_is_that_of_all_batches(folder: Path, kernel: str, world_size: int) -> None:
    X, Y = sync_worker.features()
    metric = MinibatchCKA(kernel)
    size = sync_worker.BATCH_SIZE
    for start in range(0, sync_worker.NUM_SAMPLES, size):
        metric.update([x[start : start + size] for x in X], [y[start : start + size] for y in Y])
    for seen in seen_by_ranks(folder, "synchronised", world_size):
        torch.testing.assert_close(seen[kernel], metric.compute(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("world_size", [2, 3])
def test_no_samples_on_any_rank(folder: Path, world_size: int) -> None:
    for seen in seen_by_ranks(folder, "synchronised", world_size):
        assert seen["nothing"].isnan()
        assert seen["no layers"].shape == (0, 0)


def test_a_rank_without_a_new_batch_still_takes_part(folder: Path) -> None:
    """torchmetrics keeps the last value, and would skip the collectives that the other ranks then wait in."""
    X, Y = sync_worker.features()
    expected = linear_cka(X[0][:30], Y[0][:30]).item()
    for seen in seen_by_ranks(folder, "nothing_new", 2):
        assert seen["value"].item() == pytest.approx(expected, abs=1e-10)
