"""NumPy arrays in every public function that takes features, against the same numbers as tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lit_cka import LinearCKA, MinibatchCKA, functional
from lit_cka.analysis import Features, ProbeSettings, Settings, compare_features, probe_layers
from lit_cka.analysis.rsa import compare_rdms, pairwise_rsa, rsa
from lit_cka.functional.arrays import as_tensors
from lit_cka.functional.procrustes import orthogonal_alignment
from lit_cka.functional.signatures import component_label_correlation

RNG = np.random.default_rng(0)
X, Y = RNG.standard_normal((12, 5)) + 3, RNG.standard_normal((12, 4))
K, L = X @ X.T, Y @ Y.T


def updated(metric: Any, *features: Any) -> Any:
    metric.update(*features)
    return metric.compute()


FUNCTIONS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "linear_cka": (functional.linear_cka, (X, Y)),
    "cka_from_gram": (functional.cka_from_gram, (K, L)),
    "hsic": (lambda K, L: functional.hsic(K, L, unbiased=True), (K, L)),
    "pairwise_hsic": (lambda K, L: functional.pairwise_hsic(K, L, unbiased=True), (K[None], L[None])),
    "linear_gram": (functional.linear_gram, (X,)),
    "rbf_gram": (functional.rbf_gram, (X,)),
    "cka_matrix": (functional.cka_matrix, ([X, Y], (Y, X))),
    "paired_moments": (functional.paired_moments, (X, Y)),
    "add_samples": (lambda X, Y: functional.add_samples(functional.empty_moments(5, 4), X, Y), (X, Y)),
    "procrustes_distance": (functional.procrustes_distance, (X, Y)),
    "orthogonal_alignment": (orthogonal_alignment, (X, X[::-1])),
    "rdm": (functional.rdm, (X,)),
    "signature": (functional.signature, (X,)),
    "signature_gram": (functional.signature_gram, ([X, Y],)),
    "kernel_pca": (functional.kernel_pca, (K,)),
    "component_label_correlation": (lambda X: component_label_correlation(X, [0, 1] * 6), (X,)),
    "spectral_split": (functional.spectral_split, (X, X + 1)),
    "effective_rank": (functional.effective_rank, (np.array([3.0, 2.0]),)),
    "stable_rank": (functional.stable_rank, (np.array([3.0, 2.0]),)),
    "update_singular_values": (functional.update_singular_values, (X, X + Y[:, :1])),
    "update_products": (functional.update_products, (X, [X + 1, X * 2])),
    "low_rank_split": (lambda B, A: functional.low_rank_split(B, A, W0_norm=1.0), (X[:, :2], X[:2])),
    "rsa": (rsa, (X, Y)),
    "compare_rdms": (compare_rdms, (abs(K), abs(L))),
    "pairwise_rsa": (pairwise_rsa, (abs(K)[None], abs(L)[None])),
    "jackknife_cka": (functional.jackknife_cka, (K, L)),
    "linear_jackknife": (functional.linear_jackknife, (X, Y)),
    "cka_interval": (
        lambda cka, X: functional.cka_interval(cka, 12, functional.linear_jackknife(X, X[:, :2])),
        (np.array(0.5), X),
    ),
    "change_interval": (
        lambda now, before, X, Y: functional.change_interval(now, before, 12, (X.T, Y.T)),
        (X[0, :4], Y[0], X[:, :4], Y),
    ),
    "plan_samples": (functional.plan_samples, (X, Y)),
    "permutation_moments": (functional.permutation_moments, (K[None], L[None])),
    "permuted_products": (functional.permuted_products, (K[None], L[None], np.arange(12)[None, ::-1])),
    "mutual_knn": (lambda X, Y: functional.mutual_knn(X, Y, k=3), (X, Y)),
    "cknna": (lambda X, Y: functional.cknna(X, Y, k=3), (X, Y)),
    "svcca": (functional.svcca, (X, Y)),
    "pwcca": (functional.pwcca, (X, Y)),
    "rankme": (functional.rankme, (X,)),
    "rankme_from_gram": (functional.rankme_from_gram, (X.T @ X,)),
    "sampled_features_cka": (functional.sampled_features_cka, (X, Y)),
    "LinearCKA": (lambda X, Y: updated(LinearCKA(), X, Y), (X, Y)),
    "MinibatchCKA": (lambda X, Y: updated(MinibatchCKA(), X, Y), ([X, Y], {"a": Y})),
}


def flat(result: Any) -> list[Any]:
    if isinstance(result, (tuple, list)):
        return [item for part in result for item in flat(part)]
    assert not isinstance(result, np.ndarray)
    return [result]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_arrays_give_what_tensors_give(name: str) -> None:
    function, arrays = FUNCTIONS[name]
    tensors = [as_tensors(each) for each in arrays]
    for got, expected in zip(flat(function(*arrays)), flat(function(*tensors)), strict=True):
        if isinstance(expected, Tensor):
            assert torch.equal(got, expected)
        else:
            assert got == expected


def test_every_public_function_of_features_is_tried() -> None:
    others = {name for name in functional.__all__ if name not in FUNCTIONS}
    assert others == {
        "CKATerms", "Jackknife", "PairedMoments", "Rows", "SamplePlan", "UpdateProducts", "cheaper_in_sample_space",
        "cka_from_moments", "cka_from_terms", "empty_moments", "has_fast_float64", "merge_moments",
        "recentre_moments", "sample_space_terms",
    }  # fmt: skip


def read_only(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    array = array.copy()
    array.flags.writeable = False
    return array


LAYOUTS: dict[str, Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]] = {
    "backwards": lambda array: array[::-1].copy()[::-1],
    "columns first": np.asfortranarray,
    "read only": read_only,
    "bytes swapped": lambda array: array.astype(array.dtype.newbyteorder()),
    "long double": lambda array: array.astype(np.longdouble),
    "every second": lambda array: np.repeat(array, 2, axis=0)[::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_arrays_however_they_lie_in_memory(layout: str) -> None:
    array = LAYOUTS[layout](X)
    before = array.copy()
    assert functional.linear_cka(array, Y).item() == pytest.approx(functional.linear_cka(X, Y).item(), abs=1e-14)
    assert np.array_equal(array, before)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_any_floating_dtype(dtype: type) -> None:
    value = functional.linear_cka(X.astype(dtype), Y)
    assert value.dtype == torch.float64
    assert value.item() == functional.linear_cka(torch.from_numpy(X.astype(dtype)), torch.from_numpy(Y)).item()


@pytest.mark.parametrize("array", [X.astype(int), X > 3])
def test_integers_are_an_error_as_ever(array: np.ndarray[Any, Any]) -> None:
    with pytest.raises(ValueError, match="to be floating point, but got torch"):
        functional.linear_cka(array, Y)


@pytest.mark.parametrize("array", [X.astype(str), X.astype(object)])
def test_arrays_of_no_numbers_are_an_error(array: np.ndarray[Any, Any]) -> None:
    with pytest.raises(ValueError, match="Expected an array of numbers, but got one of dtype"):
        functional.linear_cka(array, Y)


def test_a_model_with_itself_is_still_known_to_be() -> None:
    layers = [X, Y]
    both = as_tensors((layers, layers))
    assert both[0] is both[1]
    tensors = [torch.zeros(2), torch.zeros(3)]
    assert as_tensors(tensors) is tensors
    assert functional.cka_matrix(layers, layers)[0, 1] == functional.cka_matrix(layers, layers)[1, 0]


def test_features_of_arrays(tmp_path: Any) -> None:
    ids = [str(index) for index in range(12)]
    features = Features({"a": X, "b": Y}, ids, labels=[0, 1] * 6)
    features.save(tmp_path / "features.safetensors")
    assert torch.equal(Features.load(tmp_path / "features.safetensors").layers["a"], torch.from_numpy(X))
    found = compare_features(features, features, Settings(debiased=False))
    assert found.values[0, 1] == pytest.approx(functional.linear_cka(X, Y).item())
    settings = ProbeSettings(C=1.0, standardize=False, num_folds=2)
    assert len(probe_layers(features, features, settings=settings, progress=False)) == 2
