"""`compare` and `compare_features` against the textbook forms in NumPy, SciPy's RDMs and SciPy's Procrustes."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from scipy.linalg import orthogonal_procrustes
from scipy.spatial.distance import pdist
from scipy.stats import kendalltau, pearsonr, spearmanr
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lit_cka.analysis import Comparison, Settings, compare, compare_features
from lit_cka.analysis.features import Features
from lit_cka.analysis.settings import Measure
from lit_cka.commands.results import label, limits
from tests import oracles


def features(widths: list[int], n: int = 30, seed: int = 0, **named: Any) -> Features:
    """Off-centre features of the same samples, those of different seeds related to each other."""
    shared = np.random.default_rng(99).standard_normal((n, 3))
    rng = np.random.default_rng(seed)
    layers = {}
    for index, width in enumerate(widths):
        X = rng.standard_normal((n, width)) * rng.gamma(1.0, size=width)
        X += shared @ rng.standard_normal((3, width)) + 20 * rng.standard_normal(width)
        layers[f"blocks.{index}"] = torch.from_numpy(X)
    return Features(layers, [f"s{index}" for index in range(n)], **{"model": f"m{seed}", **named})


A, B = features([5, 40, 9], seed=0), features([7, 60], seed=1)  # of different widths and depths, narrow and wide
Oracle = Any


def expected(a: Features, b: Features, oracle: Oracle) -> np.ndarray:
    return np.array([[oracle(X.numpy(), Y.numpy()) for Y in b.layers.values()] for X in a.layers.values()])


def minibatch_oracle(X: np.ndarray, Y: np.ndarray, size: int) -> float:
    """Nguyen et al. 2021, eq. 2: the ratio of the sums of the batches' unbiased HSIC."""
    sums = np.zeros(3)
    for start in range(0, len(X), size):
        if len(X) - start >= 4:
            K, L = (oracles.linear_gram(each[start : start + size]) for each in (X, Y))
            sums += [oracles.unbiased_hsic(K, L), oracles.unbiased_hsic(K, K), oracles.unbiased_hsic(L, L)]
    return sums[0] / np.sqrt(sums[1] * sums[2])


def procrustes_oracle(X: np.ndarray, Y: np.ndarray) -> float:
    """What the best rotation leaves of two clouds of unit size, squared."""
    width = max(X.shape[1], Y.shape[1])
    X, Y = (np.pad(each - each.mean(0), ((0, 0), (0, width - each.shape[1]))) for each in (X, Y))
    X, Y = X / np.linalg.norm(X), Y / np.linalg.norm(Y)
    R, _ = orthogonal_procrustes(X, Y)
    return float(np.linalg.norm(X @ R - Y) ** 2)


@pytest.mark.parametrize("debiased", [False, True])
def test_cka(debiased: bool) -> None:
    found = compare_features(A, B, Settings("cka", debiased=debiased))
    oracle = expected(A, B, lambda X, Y: oracles.cka(oracles.linear_gram(X), oracles.linear_gram(Y), debiased))
    np.testing.assert_allclose(found.values, oracle, atol=1e-10)
    assert 0.05 < oracle.min() < oracle.max() < 0.95


def test_debiased_cka_is_the_default() -> None:
    assert Settings() == Settings("cka", debiased=True)
    np.testing.assert_array_equal(compare_features(A, B).values, compare_features(A, B, Settings()).values)


@pytest.mark.parametrize("size", [10, 13, 9, 64])  # no rest, a rest of 4, one of 3 that is left out, one batch
def test_minibatch_cka(size: int) -> None:
    found = compare_features(A, B, Settings("minibatch_cka", batch_size=size)).values
    np.testing.assert_allclose(found, expected(A, B, lambda X, Y: minibatch_oracle(X, Y, size)), atol=1e-10)


def test_minibatch_cka_leaves_out_a_small_rest_alone() -> None:
    found = compare_features(A, B, Settings("minibatch_cka", batch_size=9)).values
    front = [replace(each, layers={k: X[:27] for k, X in each.layers.items()}, ids=each.ids[:27]) for each in (A, B)]
    np.testing.assert_allclose(found, compare_features(*front, Settings("minibatch_cka", batch_size=9)).values)
    whole = compare_features(A, B).values
    assert np.abs(found - whole).max() > 1e-3
    np.testing.assert_allclose(compare_features(A, B, Settings("minibatch_cka")).values, whole, atol=1e-10)


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("bandwidth", [0.5, 1.0])
def test_rbf_cka(debiased: bool, bandwidth: float) -> None:
    found = compare_features(A, B, Settings("rbf_cka", debiased=debiased, bandwidth=bandwidth)).values
    oracle = expected(
        A, B, lambda X, Y: oracles.cka(oracles.rbf_gram(X, bandwidth), oracles.rbf_gram(Y, bandwidth), debiased)
    )
    np.testing.assert_allclose(found, oracle, atol=1e-8)


@pytest.mark.parametrize("distance", ["cosine", "correlation", "euclidean"])
@pytest.mark.parametrize("comparison", ["spearman", "pearson", "kendall"])
def test_rsa(distance: Any, comparison: Any) -> None:
    found = compare_features(A, B, Settings("rsa", distance=distance, comparison=comparison)).values
    correlation = {"spearman": spearmanr, "pearson": pearsonr, "kendall": kendalltau}[comparison]
    oracle = expected(A, B, lambda X, Y: correlation(pdist(X, distance), pdist(Y, distance)).statistic)
    np.testing.assert_allclose(found, oracle, atol=1e-8)


def test_procrustes_is_the_squared_distance() -> None:
    found = compare_features(A, B, Settings("procrustes"))
    np.testing.assert_allclose(found.values, expected(A, B, procrustes_oracle), atol=1e-10)
    assert limits(found) == (0.0, 2.0)
    # 2 - 2 nuclear norm; features in orthogonal directions of the sample space are as far apart as the colours go.
    X, Y = np.eye(4)[:, :1] - np.eye(4)[:, 1:2], np.eye(4)[:, 2:3] - np.eye(4)[:, 3:]
    far = [Features({"0": torch.from_numpy(each)}, list("abcd")) for each in (X, Y)]
    assert compare_features(*far, Settings("procrustes")).values.item() == pytest.approx(2.0)


@pytest.mark.parametrize("measure", get_args(Measure))
def test_a_model_with_itself(measure: Any) -> None:
    settings = Settings(measure)
    found = compare_features(A, A, settings)
    copied = compare_features(A, replace(A, model="copy"), settings)
    np.testing.assert_allclose(found.values, copied.values, atol=1e-12)
    is_symmetric = measure != "pwcca"  # whose weights are those of the rows
    if is_symmetric:
        np.testing.assert_allclose(found.values, found.values.T, atol=1e-12)
    same = 0.0 if measure == "procrustes" else 1.0
    np.testing.assert_allclose(np.diagonal(found.values), same, atol=1e-12)
    assert found.is_with_itself == is_symmetric
    assert not copied.is_with_itself
    assert label(found)


@pytest.mark.parametrize("measure", get_args(Measure))
def test_constant_layers_are_undefined(measure: Any) -> None:
    constant = replace(A, layers={**A.layers, "head": torch.full((30, 4), 0.1, dtype=torch.float64) * 3e4})
    values = compare_features(constant, B, Settings(measure)).values
    assert np.isnan(values[3]).all()
    np.testing.assert_allclose(values[:3], compare_features(A, B, Settings(measure)).values, atol=1e-12)


@pytest.mark.parametrize("measure", ["cka", "rbf_cka"])
def test_p_values(measure: Any) -> None:
    settings = Settings(measure, num_permutations=99, seed=3)
    found = compare_features(A, B, settings)
    assert found.calibration is not None
    assert found.calibration.p_values.shape == found.values.shape == (3, 2)
    np.testing.assert_allclose(found.calibration.p_values, 0.01)  # as small as 99 permutations allow
    again = compare_features(A, B, settings)
    assert again.calibration is not None
    np.testing.assert_array_equal(found.calibration.p_values, again.calibration.p_values)
    assert compare_features(A, B, replace(settings, num_permutations=0)).calibration is None


def test_unrelated_features_are_not_significant() -> None:
    rng = np.random.default_rng(0)
    one, other = (
        Features({str(i): torch.from_numpy(rng.standard_normal((30, 6)) + 9) for i in range(4)}, A.ids)
        for _ in range(2)
    )
    found = compare_features(one, other, Settings(num_permutations=99))
    assert found.calibration is not None
    assert found.low is not None
    assert np.median(found.calibration.p_values) > 0.2
    assert found.calibration.best is not None
    assert found.calibration.best.p_value > 0.05
    assert (found.low < 0.05).all()


class Counting(nn.Module):
    """A small network that counts the samples it is called with."""

    def __init__(self, widths: list[int], seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.blocks = nn.ModuleList(nn.Linear(a, b) for a, b in zip([4, *widths], widths, strict=False))
        self.seen: list[float] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += x[:, 0].tolist()
        for block in self.blocks:
            x = block(x).tanh()
        return x


INPUTS = torch.randn(22, 4, generator=torch.Generator().manual_seed(5)) + 1


def loader(inputs: torch.Tensor = INPUTS, **options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(inputs, torch.arange(len(inputs)) % 2), **{"batch_size": 8, **options})


def outputs(model: Counting, inputs: torch.Tensor = INPUTS) -> list[np.ndarray]:
    found = []
    x = inputs
    with torch.no_grad():
        for block in model.blocks:
            x = block(x)
            found.append(x.double().numpy())
            x = x.tanh()
    return found


def test_models_of_different_depths_are_each_run_once() -> None:
    a, b = Counting([6, 50, 5], 0), Counting([3, 12], 1)
    found = compare(a, b, loader(), names=("deep", "shallow"), data="noise", progress=False)
    assert a.seen == b.seen == INPUTS[:, 0].tolist()
    assert (found.layers_a, found.layers_b) == (["blocks.0", "blocks.1", "blocks.2"], ["blocks.0", "blocks.1"])
    assert (found.model_a, found.model_b, found.data, found.num_samples) == ("deep", "shallow", "noise", 22)
    oracle = [
        [oracles.cka(oracles.linear_gram(X), oracles.linear_gram(Y), True) for Y in outputs(b)] for X in outputs(a)
    ]
    np.testing.assert_allclose(found.values, oracle, atol=1e-6)


@pytest.mark.parametrize("size", [1, 5, 22])
def test_batch_size_does_not_matter(size: int) -> None:
    a, b = Counting([6, 5], 0), Counting([3, 12], 1)
    whole = compare(a, b, [INPUTS], progress=False).values
    np.testing.assert_allclose(compare(a, b, loader(batch_size=size), progress=False).values, whole, atol=1e-6)


def test_one_model_is_run_once() -> None:
    a = Counting([6, 5], 0).train()
    found = compare(a, None, loader(), layers=["blocks.1"], progress=False)
    assert a.seen == INPUTS[:, 0].tolist()
    assert a.training
    assert found.values.shape == (1, 1)
    assert found.is_with_itself


def test_layers_and_loaders_of_each() -> None:
    a, b = Counting([6, 5], 0), Counting([6, 5], 0)
    found = compare(
        a,
        b,
        loader(),
        loader(INPUTS[:, :4] * 2, batch_size=3),
        layers="blocks.0",
        layers_b=["blocks.1"],
        progress=False,
    )
    assert (found.layers_a, found.layers_b) == (["blocks.0"], ["blocks.1"])
    assert b.seen == (INPUTS[:, 0] * 2).tolist()
    X, Y = outputs(a)[0], outputs(b, INPUTS * 2)[1]
    expected = oracles.cka(oracles.linear_gram(X), oracles.linear_gram(Y), True)
    assert found.values.item() == pytest.approx(expected, abs=1e-6)


def test_a_shuffling_loader() -> None:
    """From the global generator, it has one order for both models; from its own another for each."""
    a = Counting([6, 5], 0)
    b = copy.deepcopy(a)
    found = compare(a, b, loader(shuffle=True), progress=False)
    assert a.seen == b.seen != INPUTS[:, 0].tolist()
    np.testing.assert_allclose(np.diagonal(found.values), 1, atol=1e-9)
    compare(a, None, loader(shuffle=True, generator=torch.Generator()), progress=False)


ORDERS: dict[str, Any] = {
    "shuffle": lambda generator: {"shuffle": True, "generator": generator},
    "subset": lambda generator: {"sampler": SubsetRandomSampler(range(5, 20), generator)},
    "batches": lambda generator: {
        "batch_sampler": BatchSampler(RandomSampler(range(22), generator=generator), 4, drop_last=False)
    },
}


@pytest.mark.filterwarnings("ignore:1 of 15 samples of data have the features")  # they have, and this says so
@pytest.mark.parametrize("order", ORDERS)
def test_samples_are_matched_in_any_order(order: str) -> None:
    """Also of sets of which some samples are equal."""
    inputs = INPUTS.clone()
    inputs[7] = inputs[9]
    options = ORDERS[order](torch.Generator().manual_seed(1))
    several = {} if order == "batches" else {"batch_size": 4}
    data = DataLoader(TensorDataset(inputs, torch.arange(22) % 3), **several, **options)
    a, b = Counting([6, 5], 0), Counting([6, 5], 1)
    found = compare(a, b, data, progress=False)
    assert a.seen != b.seen
    read = inputs[5:20] if order == "subset" else inputs
    X, Y = outputs(a, read)[0], outputs(b, read)[1]
    expected = oracles.cka(oracles.linear_gram(X), oracles.linear_gram(Y), True)
    assert found.values[0, 1] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("num_drawn", [3, 64])
def test_samples_that_do_not_come_again_are_refused(num_drawn: int) -> None:
    """Also where none of them does."""
    many = torch.randn(1000, 4, generator=torch.Generator().manual_seed(5))
    sampler = WeightedRandomSampler(torch.ones(1000), num_drawn, generator=torch.Generator().manual_seed(1))
    a = Counting([6, 5], 0)
    with pytest.raises(ValueError, match=r"\d+ of \d+ that a has read are not among those of b\. Use a loader"):
        compare(a, copy.deepcopy(a), DataLoader(TensorDataset(many), 4, sampler=sampler), progress=False)


def test_labels_tell_that_samples_are_others() -> None:
    """Of two loaders with inputs in other forms, the order can't be checked but by that."""
    a, labels = Counting([6, 5], 0), torch.arange(22) % 3
    first = DataLoader(TensorDataset(INPUTS, labels), 4)
    compare(a, a, first, DataLoader(TensorDataset(INPUTS * 2, labels), 4), progress=False)
    with pytest.raises(ValueError, match="sample 1 has the label 1 for a and 2 for b"):
        compare(a, a, first, DataLoader(TensorDataset(INPUTS * 2, labels.flip(0)), 4), progress=False)


def named(ids: list[Any], inputs: torch.Tensor = INPUTS) -> list[dict[str, Any]]:
    return [{"x": inputs, "id": ids}]


def test_samples_have_to_match() -> None:
    a, ids = Counting([6], 0), list(range(22))
    for other in (named(ids), named(ids[::-1], INPUTS.flip(0))):
        assert compare(a, a, named(ids), other, progress=False).values.item() == pytest.approx(1)
    for other, message in [
        (named([*ids[:21], 99]), "sample 21 is '21' for a and '99' for b"),
        (named(ids[:20], INPUTS[:20]), "a has 22 and b 20"),
    ]:
        with pytest.raises(ValueError, match=message):
            compare(a, a, named(ids), other, progress=False)
    with pytest.raises(ValueError, match="gave none"):
        compare(a, a, iter([INPUTS]), progress=False)  # all taken by the first


@pytest.mark.parametrize("measure", get_args(Measure))
def test_one_sample_is_too_few(measure: Any) -> None:
    one = Features({"0": torch.ones(1, 3, dtype=torch.float64)}, ["only"])
    for debiased in (True, False):
        with pytest.raises(ValueError, match=r"Expected at least [234] samples.*, but got 1"):
            compare_features(one, one, Settings(measure, debiased=debiased))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"measure": "cca"}, "`measure` to be one of cka, minibatch_cka, rbf_cka, .*, cknna, but got 'cca'"),
        ({"distance": "manhattan"}, "`distance` to be one of"),
        ({"comparison": "tau"}, "`comparison` to be one of"),
        ({"batch_size": 3}, "`batch_size` to be at least 4, but got 3"),
        ({"bandwidth": 0.0}, "`bandwidth` to be positive"),
        ({"num_permutations": -1}, "`num_permutations` to be at least 0"),
        ({"level": 1.0}, r"`level` to be in \(0, 1\)"),
        ({"measure": "rsa", "null": "moments"}, "for the moments of the null, but got 'rsa': set `null` to"),
        ({"null": "bootstrap"}, "`null` to be one of permutations, moments, but got 'bootstrap'"),
        ({"num_neighbours": 0}, "`num_neighbours` to be at least 1"),
        ({"variance": 0.0}, r"`variance` to be in \(0, 1\], but got 0"),
    ],
)
def test_unknown_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**options)


def test_the_diagonal() -> None:
    after = replace(A, layers={k: X + i * torch.randn(X.shape, generator=torch.Generator().manual_seed(0))
                               for i, (k, X) in enumerate(A.layers.items())}, model="after")  # fmt: skip
    found = compare_features(A, after, Settings(num_permutations=19))
    rows = found.diagonal()
    assert [row["layer"] for row in rows] == list(A.layers)
    assert [row["value"] for row in rows] == np.diagonal(found.values).tolist()
    assert rows[0]["verdict"] == "untouched"
    assert rows[2]["verdict"] == "rewritten"
    assert list(rows[0]) == ["layer", "value", "low", "high", "p", "p_best", "excess", "verdict"]
    assert list(compare_features(A, after, Settings("rsa")).diagonal()[0]) == ["layer", "value"]
    assert not compare_features(A, B).has_counterparts
    with pytest.raises(ValueError, match="same layers, but m0 and m1 differ"):
        compare_features(A, B).diagonal()


def test_one_model_on_two_datasets_is_not_a_model_with_itself() -> None:
    other = features([5, 40, 9], seed=7, model="m0", data="noisy")
    found = compare_features(A, other)
    assert isinstance(found, Comparison)
    assert not found.is_with_itself
    assert found.data == "data and noisy"
