"""Every measure and every column of a table has a sentence."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch

from lit_cka.analysis import explanations
from lit_cka.analysis.comparison import compare_features
from lit_cka.analysis.features import Features
from lit_cka.analysis.layer_ranges import layer_ranges, whole_short_names
from lit_cka.analysis.linear_probe import ProbeSettings
from lit_cka.analysis.settings import Measure, Settings

NAMES = [f"model.blocks.{number}" for number in range(12)]


def features(model: str, seed: int) -> Features:
    generator = torch.Generator().manual_seed(seed)
    layers = {name: torch.randn(12, 3, generator=generator).double() for name in ("m.a", "m.b")}
    return Features(layers, [str(index) for index in range(12)], model, "data", labels=[0, 0, 0, 1] * 3)


@pytest.mark.parametrize("measure", get_args(Measure))
def test_each_measure_and_each_column_of_a_comparison(measure: str) -> None:
    errors = {"num_permutations": 99} if measure in ("cka", "rbf_cka") else {}
    comparison = compare_features(features("a", 0), features("b", 1), Settings(measure=measure, **errors))  # type: ignore[arg-type]
    columns = explanations.comparison_columns(comparison, "m.")
    for row in comparison.diagonal():
        assert row.keys() <= columns.keys()
    assert explanations.MEASURES[measure] in columns["value"]
    assert "n = 12" in columns["value"]
    assert '"m."' in columns["layer"]
    for sentence in columns.values():
        assert sentence[0].isupper()
        assert sentence.endswith(".")
        assert not {"{", "}"} & set(sentence)
    if errors:
        assert "below 0.01)" in columns["p"]  # 1 / (1 + 99)
        assert "95 %" in columns["low"]
        assert "plain" not in columns["low"]
        plain = replace(comparison, settings=replace(comparison.settings, debiased=False))
        assert "the plain one may be outside." in explanations.comparison_columns(plain)["high"]


def test_the_estimator_is_said_where_there_are_two() -> None:
    plain, debiased = (explanations.describe_measure("cka", debiased=value) for value in (False, True))
    assert "near 1 for few samples" in plain
    assert "0 on average" in debiased
    assert explanations.describe_measure("rsa", debiased=True) == explanations.MEASURES["rsa"]


def test_the_columns_of_a_probe() -> None:
    columns = explanations.probe_columns(
        features("a{n}", 0), features("b", 1), ProbeSettings(num_folds=3), debiased=True
    )
    assert list(columns) == ["layer", "CKA", "accuracy, a{n}", "accuracy, b", "difference", "verdict"]
    assert "3 folds of 12 samples" in columns["accuracy, a{n}"]
    assert "largest class has 0.750" in columns["accuracy, a{n}"]


@pytest.mark.parametrize(
    ("chosen", "text"),
    [
        (range(12), "blocks.0 to blocks.11"),
        ([4], "blocks.4"),
        ([4, 5], "blocks.4 and blocks.5"),
        ([11, 0, 2, 1, 6, 8, 9, 10], "blocks.0 to blocks.2, blocks.6 and blocks.8 to blocks.11"),
    ],
)
def test_neighbours_are_a_range(chosen: list[int], text: str) -> None:
    assert layer_ranges([NAMES[number] for number in chosen], NAMES) == text


def test_one_layer_keeps_its_name() -> None:
    assert layer_ranges(["model.head"], ["model.head"]) == "model.head"
    assert explanations.common_beginning(NAMES, whole_short_names(NAMES)) == "model."
    assert explanations.common_beginning(["a.b"], ["a.b"]) == ""
