"""Moments against sums over the raw features, and the order of merging, which must not matter."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lit_cka.functional import (
    PairedMoments,
    add_samples,
    cka_from_moments,
    empty_moments,
    merge_moments,
    paired_moments,
    recentre_moments,
)
from tests import oracles
from tests.oracles import float64, paired_features


def sums_about(X: Tensor, Y: Tensor, mean_x: np.ndarray, mean_y: np.ndarray) -> dict[str, np.ndarray]:
    """Every field of `PairedMoments`, sample by sample, with x and y measured from the given points."""
    x, y = float64(X) - mean_x, float64(Y) - mean_y
    a, b = [row @ row for row in x], [row @ row for row in y]
    return {
        "n": len(x),
        "mean_x": mean_x,
        "mean_y": mean_y,
        "xx": sum(np.outer(row, row) for row in x),
        "yy": sum(np.outer(row, row) for row in y),
        "xy": sum(np.outer(row_x, row_y) for row_x, row_y in zip(x, y, strict=True)),
        "a": sum(a),
        "b": sum(b),
        "aa": sum(value * value for value in a),
        "bb": sum(value * value for value in b),
        "ab": sum(first * second for first, second in zip(a, b, strict=True)),
        "ax": sum(value * row for value, row in zip(a, x, strict=True)),
        "ay": sum(value * row for value, row in zip(a, y, strict=True)),
        "bx": sum(value * row for value, row in zip(b, x, strict=True)),
        "by": sum(value * row for value, row in zip(b, y, strict=True)),
    }


def assert_equal(moments: PairedMoments, expected: dict[str, np.ndarray], rtol: float = 1e-11) -> None:
    for name, value in moments._asdict().items():
        assert value.dtype == torch.float64, name
        scale = np.abs(expected[name]).max()
        np.testing.assert_allclose(value, expected[name], rtol=rtol, atol=rtol * scale, err_msg=name)


def merged(X: Tensor, Y: Tensor, sizes: list[int], with_yy: bool = True) -> PairedMoments:
    """Every batch's own moments, merged from the first on."""
    batches = zip(X.split(sizes), Y.split(sizes), strict=True)
    return reduce(merge_moments, [paired_moments(x, y, with_yy=with_yy) for x, y in batches])


def added(X: Tensor, Y: Tensor, sizes: list[int], with_yy: bool = True) -> PairedMoments:
    """Batch after batch added to the moments so far."""
    moments = paired_moments(X[:0], Y[:0], with_yy=with_yy)
    for x, y in zip(X.split(sizes), Y.split(sizes), strict=True):
        moments = add_samples(moments, x, y)
    return moments


BOTH_WAYS = pytest.mark.parametrize("union", [merged, added])
Union = Callable[..., PairedMoments]


@pytest.mark.parametrize("related", [True, False], ids=["related", "unrelated"])
@pytest.mark.parametrize(
    ("offset", "dtype"),
    [(0.0, torch.float64), (3.0, torch.float32), (1e4, torch.float32), (3.0, torch.float16), (3.0, torch.bfloat16)],
)
@pytest.mark.parametrize(("n", "d_x", "d_y"), [(20, 3, 4), (5, 9, 2), (1, 3, 4)])
def test_every_field_is_the_sum_it_says(
    n: int, d_x: int, d_y: int, offset: float, dtype: torch.dtype, related: bool
) -> None:
    X, Y = paired_features(n, d_x, d_y, related=related, offset=offset, dtype=dtype)
    expected = sums_about(X, Y, float64(X).mean(0), float64(Y).mean(0))
    moments = paired_moments(X, Y)
    for name, value in moments._asdict().items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-8, atol=1e-8, err_msg=name)


@pytest.mark.parametrize("field", PairedMoments._fields)
@pytest.mark.parametrize(("n", "d_x", "d_y"), [(20, 3, 4), (5, 9, 2), (1, 3, 4)])
def test_recentred_sums_are_those_about_the_new_point(field: str, n: int, d_x: int, d_y: int) -> None:
    X, Y = paired_features(n, d_x, d_y)
    rng = np.random.default_rng(1)
    point_x, point_y = rng.standard_normal(d_x) * 2, rng.standard_normal(d_y) * 2 + 1
    recentred = recentre_moments(paired_moments(X, Y), torch.from_numpy(point_x), torch.from_numpy(point_y))
    expected = sums_about(X, Y, point_x, point_y)[field]
    np.testing.assert_allclose(getattr(recentred, field), expected, rtol=1e-11, atol=1e-11 * np.abs(expected).max())


@pytest.mark.parametrize("moved", ["x", "y"])
def test_recentring_one_side_alone(moved: str) -> None:
    """So that no term in `d` makes up for one in `e`."""
    X, Y = paired_features(8, 3, 4)
    point_x, point_y = float64(X).mean(0), float64(Y).mean(0)
    if moved == "x":
        point_x = point_x + np.array([1.0, -2.0, 0.5])
    else:
        point_y = point_y + np.array([1.0, -2.0, 0.5, 3.0])
    recentred = recentre_moments(paired_moments(X, Y), torch.from_numpy(point_x), torch.from_numpy(point_y))
    for name, value in sums_about(X, Y, point_x, point_y).items():
        np.testing.assert_allclose(getattr(recentred, name), value, rtol=1e-11, atol=1e-10, err_msg=name)


@BOTH_WAYS
def test_without_the_sums_of_y_alone_all_others_are_the_same(union: Union) -> None:
    """As for a frozen reference, whose own sums are known from the first pass."""
    X, Y = paired_features(20, 3, 4)
    full, part = (union(X, Y, [7, 0, 13], with_yy) for with_yy in (True, False))
    for name, value in part._asdict().items():
        if name in ("yy", "by"):
            assert not value.numel()
        elif name != "bb":
            assert torch.equal(value, getattr(full, name)), name
    known = paired_moments(Y, Y)
    assert_equal(
        part._replace(yy=known.xx, bb=known.aa, by=known.ax),
        {name: float64(value) for name, value in full._asdict().items()},
    )


def test_merging_and_adding_leave_their_parts_alone() -> None:
    X, Y = paired_features(20, 3, 4)
    for with_yy in (True, False):
        parts = [paired_moments(x, y, with_yy=with_yy) for x, y in ((X[:13], Y[:13]), (X[13:], Y[13:]))]
        before = [[value.clone() for value in part] for part in parts]
        merge_moments(*parts)
        add_samples(parts[0], X[13:], Y[13:])
        assert all(map(torch.equal, [*before[0], *before[1]], [*parts[0], *parts[1]]))


@BOTH_WAYS
def test_moments_of_parts_are_those_of_the_union(union: Union) -> None:
    X, Y = paired_features(20, 3, 4)
    moments = union(X, Y, [13, 7])
    assert_equal(moments, {name: float64(value) for name, value in paired_moments(X, Y)._asdict().items()})
    np.testing.assert_allclose(moments.mean_x, float64(X).mean(0), rtol=1e-14)
    np.testing.assert_allclose(moments.mean_y, float64(Y).mean(0), rtol=1e-14)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_split_into_batches_matters(data: st.DataObject) -> None:
    """Any sizes (0 and 1 among them), any order of the samples, any order of merging: the same CKA to 1e-10."""
    sizes = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(lambda sizes: sum(sizes) >= 4))
    offset = data.draw(st.sampled_from([0.0, 3.0, 1e4]))
    related = data.draw(st.booleans())
    d_x, d_y = data.draw(st.sampled_from([(3, 2), (1, 5), (8, 8)]))
    n = sum(sizes)
    X, Y = paired_features(n, d_x, d_y, related=related, offset=offset, seed=data.draw(st.integers(0, 20)))
    order = torch.tensor(data.draw(st.permutations(range(n))))
    parts = [paired_moments(x, y) for x, y in zip(X[order].split(sizes), Y[order].split(sizes), strict=True)]
    while len(parts) > 1:  # a random merge tree, of random sides
        first = parts.pop(data.draw(st.integers(0, len(parts) - 1)))
        second = parts.pop(data.draw(st.integers(0, len(parts) - 1)))
        parts.append(merge_moments(first, second))
    assert parts[0].n == n
    whole = paired_moments(X, Y)
    in_turn = added(X[order], Y[order], sizes)
    for moments, debiased in product((parts[0], in_turn), (False, True)):
        value = cka_from_moments(moments, debiased=debiased).item()
        if np.isnan(value):  # at n = 4 or in one dimension an unbiased self-term may vanish
            assert cka_from_moments(whole, debiased=debiased).isnan()
            continue
        assert value == pytest.approx(cka_from_moments(whole, debiased=debiased).item(), abs=1e-10)
        assert value == pytest.approx(oracles.linear_cka(X, Y, debiased), abs=1e-9)


@pytest.mark.parametrize("debiased", [False, True], ids=["plain", "debiased"])
@pytest.mark.parametrize("offset", [0.0, 1e4, 1e6])
@BOTH_WAYS
def test_one_sample_at_a_time(offset: float, debiased: bool, union: Union) -> None:
    X, Y = paired_features(300, 6, 4, offset=offset, related=False)
    singles = union(X, Y, [1] * 300)
    value = cka_from_moments(singles, debiased=debiased).item()
    assert value == pytest.approx(cka_from_moments(paired_moments(X, Y), debiased=debiased).item(), abs=1e-10)
    assert value == pytest.approx(oracles.linear_cka(X, Y, debiased), abs=1e-8)


@BOTH_WAYS
def test_batches_with_means_of_their_own(union: Union) -> None:
    """Sorted by class, say: most of the variance is between the batches, and none within some of them."""
    X, Y = paired_features(40, 3, 4)
    shift = torch.arange(4.0).repeat_interleave(10)[:, None] * 100
    X, Y = X + shift, Y - shift**2
    X[:10] = X[0]
    value = cka_from_moments(union(X, Y, [10] * 4))
    assert value.item() == pytest.approx(oracles.linear_cka(X, Y, False), abs=1e-10)


@pytest.mark.parametrize("value", [0.1, 1e6 + 0.1])
@BOTH_WAYS
def test_constants_stay_constant_when_merged(value: float, union: Union) -> None:
    X = torch.full((30, 7), value)
    _, Y = paired_features(30, 7, 7)
    moments = union(X, Y, [7, 1, 0, 22])
    for debiased in (False, True):
        assert cka_from_moments(moments, debiased=debiased).isnan()


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e6 + 0.1])
@BOTH_WAYS
def test_a_constant_column_has_a_variance_of_exactly_zero(value: float, union: Union) -> None:
    """The mean of thirty times 0.1 is not 0.1 in floating point."""
    X, Y = paired_features(30, 3, 4)
    X[:, 1] = value
    moments = union(X, Y, [19, 11])
    assert not moments.xx[1].any()
    assert not moments.xy[1].any()
    assert moments.mean_x[1] == value


def test_no_samples_change_nothing() -> None:
    X, Y = paired_features(9, 3, 4, offset=1e4)
    moments, nothing = paired_moments(X, Y), empty_moments(3, 4)
    for union in (
        merge_moments(moments, nothing),
        merge_moments(nothing, moments),
        merge_moments(moments, paired_moments(X[:0], Y[:0])),
        add_samples(moments, X[:0], Y[:0]),
    ):
        for name, value in union._asdict().items():
            assert torch.equal(value, getattr(moments, name)), name
    both = merge_moments(nothing, empty_moments(3, 4))
    assert all(torch.equal(value, getattr(nothing, name)) for name, value in both._asdict().items())
    assert cka_from_moments(both).isnan()
    assert cka_from_moments(both, debiased=True).isnan()


def test_the_moments_of_no_samples_have_the_shapes_of_any() -> None:
    X, Y = paired_features(9, 3, 4)
    for moments in (empty_moments(3, 4), paired_moments(X[:0], Y[:0])):
        for name, value in moments._asdict().items():
            assert value.shape == getattr(paired_moments(X, Y), name).shape, name
            assert value.dtype == torch.float64
            assert not value.any()


def test_features_keep_no_graph_and_are_not_changed() -> None:
    X, Y = paired_features(9, 3, 4)
    before = X.clone()
    moments = paired_moments(X.requires_grad_(), Y)
    assert not any(value.requires_grad for value in moments)
    assert torch.equal(X, before)
