"""Products in float32 keep six digits whatever the process is set to, and leave its settings as they were."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from lit_cka.functional import add_samples, cka_from_moments, empty_moments
from lit_cka.functional.precision import (
    FullFloat32,
    Products,
    add_product,
    capability_has_fast_float64,
    chosen_products,
    has_fast_float64,
    rounded,
)
from tests import oracles
from tests.oracles import float64, paired_features

CPU = torch.device("cpu")
ESTIMATORS = pytest.mark.parametrize("debiased", [False, True], ids=["plain", "debiased"])
SETTINGS = [("generic", "all"), ("cuda", "all"), ("mkldnn", "all"), ("cuda", "matmul"), ("mkldnn", "matmul")]


def effective() -> list[str]:
    return [torch._C._get_fp32_precision_getter(*setting) for setting in SETTINGS]


@pytest.fixture(autouse=True)
def _untouched_settings() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")
    for setting in SETTINGS:
        torch._C._set_fp32_precision_setter(*setting, "none")


def test_gpus_for_computing_centres_are_fast_at_float64() -> None:
    assert all(capability_has_fast_float64(major, 0) for major in (6, 7, 8, 9, 10))
    slow = [(5, 0), (6, 1), (7, 5), (8, 6), (8, 9), (10, 3), (11, 0), (12, 0), (12, 1)]
    assert not any(capability_has_fast_float64(*capability) for capability in slow)


@pytest.mark.parametrize(("device", "is_fast"), [("cpu", True), ("mps", False), ("xpu", False), ("meta", False)])
def test_of_other_devices_the_cpu_alone_is_fast_at_float64(device: str, is_fast: bool) -> None:
    assert has_fast_float64(device) == is_fast
    assert chosen_products(None, torch.device(device)) == ("float64" if is_fast else "float32")


def test_products_can_be_chosen() -> None:
    assert chosen_products("float32", CPU) == "float32"
    assert chosen_products("float64", torch.device("mps")) == "float64"
    with pytest.raises(ValueError, match='Expected `products` to be "float64", "float32" or None, but got \'half\''):
        chosen_products("half", CPU)  # type: ignore[arg-type]


@pytest.mark.parametrize(("products", "accuracy"), [("float64", 1e-15), ("float32", 1e-7)])
@pytest.mark.parametrize(("scale_x", "scale_y"), [(1.0, 1.0), (1e30, 1e-30), (1e-60, 1e60)], ids=str)
@pytest.mark.parametrize("shape", [(1500, 30, 20), (3, 30, 20), (0, 3, 2), (600, 3000, 1500)], ids=str)
def test_a_product_is_added(
    products: Products, accuracy: float, scale_x: float, scale_y: float, shape: tuple[int, int, int]
) -> None:
    """Of more rows than float32 sums up, wider than what is computed at a time, and of no size float32 has room for."""
    X, Y = paired_features(*shape, offset=0.0)
    X, Y = X * scale_x, Y * scale_y
    total = torch.full(shape[1:], scale_x * scale_y, dtype=torch.float64)
    expected = scale_x * scale_y + float64(X).T @ float64(Y)
    (left, scale_left), (right, scale_right) = rounded(X, products, CPU), rounded(Y, products, CPU)
    add_product(total, left, right, scale_left * scale_right)
    norms = np.linalg.norm(float64(X)) * np.linalg.norm(float64(Y)) + scale_x * scale_y
    assert np.abs(total.numpy() - expected).max() <= accuracy * norms
    has_rounded = np.abs(total.numpy() - expected).max() > 1e-12 * norms
    assert has_rounded == (products == "float32" and shape[0] > 0)  # or nothing was shown of float32


@pytest.mark.parametrize("width", [1, 191, 192, 193, 500])  # one block, and several, of which some are uneven
def test_a_product_with_itself_is_that_of_two_and_symmetric(width: int) -> None:
    X, Y = paired_features(40, width, 3, offset=10.0)
    start = Y.repeat(1, width)[:1, :width].T @ Y.repeat(1, width)[:1, :width]
    total, expected = start.clone(), float64(start) + float64(X).T @ float64(X)
    add_product(total, X, X)
    np.testing.assert_allclose(total, expected, rtol=1e-13, atol=1e-13 * np.abs(expected).max())
    np.testing.assert_allclose(total, total.T, rtol=1e-14, atol=1e-14 * np.abs(expected).max())


@ESTIMATORS
@pytest.mark.parametrize("related", [True, False], ids=["related", "unrelated"])
@pytest.mark.parametrize("shape", [(1500, 64, 48), (1100, 256, 1024), (40, 256, 64)], ids=str)
def test_moments_of_float32_products_have_six_digits(
    shape: tuple[int, int, int], related: bool, debiased: bool
) -> None:
    X, Y = paired_features(*shape, related=related, offset=1e4, dtype=torch.float32)
    moments = empty_moments(*shape[1:])
    for x, y in zip(X.split(700), Y.split(700), strict=True):
        moments = add_samples(moments, x, y, products="float32")
    value = cka_from_moments(moments, debiased=debiased).item()
    assert value == pytest.approx(oracles.linear_cka(X, Y, debiased), abs=1e-6)
    assert value != pytest.approx(oracles.linear_cka(X, Y, debiased), abs=1e-13)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_a_lower_precision_of_matrix_products_is_lifted_and_put_back(precision: str) -> None:
    torch.set_float32_matmul_precision(precision)
    before = effective()
    with FullFloat32("cpu"):
        assert torch.backends.cuda.matmul.fp32_precision == torch.backends.mkldnn.matmul.fp32_precision == "ieee"
    assert effective() == before
    assert torch.get_float32_matmul_precision() == precision  # raises where the old and the new settings differ
    assert torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("own", SETTINGS, ids=lambda setting: ".".join(setting))
@pytest.mark.parametrize("then", ["ieee", "tf32"])
def test_what_follows_the_setting_of_all_does_so_afterwards(own: tuple[str, str], then: str, fails: bool) -> None:
    """For each setting that may be the process's own while the others follow: what a later change of another does."""

    def later() -> list[list[str]]:
        seen = []
        for setting in SETTINGS[:3]:
            torch._C._set_fp32_precision_setter(*setting, then)
            seen.append(effective())
        return seen

    def settle() -> None:
        for setting in SETTINGS:
            torch._C._set_fp32_precision_setter(*setting, "none")
        torch._C._set_fp32_precision_setter("generic", "all", "tf32")
        torch._C._set_fp32_precision_setter(*own, "tf32")

    settle()
    expected = later()
    settle()
    before = effective()
    try:
        with FullFloat32("cpu"):
            assert effective()[3:] == ["ieee", "ieee"]
            if fails:
                raise RuntimeError
    except RuntimeError:
        pass
    assert effective() == before
    assert later() == expected


def test_the_default_is_not_touched() -> None:
    with FullFloat32("cpu"):
        assert effective() == ["none"] * 5


@ESTIMATORS
def test_autocast_does_not_reach_float32_products(debiased: bool) -> None:
    X, Y = paired_features(60, 8, 5, offset=1e4, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        moments = add_samples(empty_moments(8, 5), X, Y, products="float32")
        assert torch.is_autocast_enabled("cpu")
        assert (X[:2].T @ Y[:2]).dtype == torch.bfloat16
    value = cka_from_moments(moments, debiased=debiased).item()
    assert value == pytest.approx(oracles.linear_cka(X, Y, debiased), abs=1e-6)
