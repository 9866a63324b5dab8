"""Which scalars are CKA, whatever the prefix, and in which order layers come."""

from __future__ import annotations

import math

import pytest

from lit_cka.tensorboard.series import Series, find_series, natural_key, table

TAGS = ["cka/blocks.10", "cka/blocks.2", "cka/embed", "cka/mean", "cka/num_samples", "val_loss", "cka_of_mine/other"]


def test_a_callbacks_scalars_are_one_series() -> None:
    (series,) = find_series(TAGS)
    assert series.name == series.prefix == "cka"
    assert list(series.layers.items()) == [
        ("blocks.2", "cka/blocks.2"),
        ("blocks.10", "cka/blocks.10"),
        ("embed", "cka/embed"),
    ]
    assert series.num_samples == "cka/num_samples"
    assert set(series.tags) == set(TAGS) - {"cka/mean", "val_loss", "cka_of_mine/other"}


def test_layers_come_in_the_order_of_depth_where_it_is_known() -> None:
    (series,) = find_series(TAGS, order=["cka/embed", "cka/blocks.2", "cka/blocks.10", "cka/mean"])
    assert list(series.layers) == ["embed", "blocks.2", "blocks.10"]


def test_dataloaders_and_prefixes_are_series_of_their_own() -> None:
    tags = [f"{prefix}/{name}" for prefix in ("cka", "runs/pretrained") for name in ("a", "mean", "num_samples")]
    tags += [f"two/{name}/dataloader_idx_{index}" for name in ("a", "b", "mean", "num_samples") for index in (0, 1)]
    found = find_series(tags)
    assert [series.name for series in found] == ["cka", "runs/pretrained", "two, dataloader 0", "two, dataloader 1"]
    assert found[3].layers == {"a": "two/a/dataloader_idx_1", "b": "two/b/dataloader_idx_1"}
    assert found[3].num_samples == "two/num_samples/dataloader_idx_1"


def test_intervals_belong_to_their_series() -> None:
    tags = ["cka/a", "cka/b", "cka/mean", "cka/num_samples", "cka_low/a", "cka_low/b", "cka_low/mean", "cka_high/a"]
    (series,) = find_series(tags, last=dict.fromkeys(tags, 0.5))
    assert series.low == {"a": "cka_low/a", "b": "cka_low/b"}
    assert series.high == {"a": "cka_high/a"}


@pytest.mark.parametrize(
    ("last", "is_one"),
    [
        ({"x/a": 0.2, "x/b": 0.4, "x/mean": 0.3}, True),
        ({"x/a": 0.2, "x/b": math.nan, "x/mean": 0.2}, True),
        ({"x/a": 0.2, "x/b": 0.4, "x/mean": 0.35}, False),  # somebody else's mean
        ({"x/a": 2.0, "x/b": 4.0, "x/mean": 3.0}, False),  # no CKA
        ({"x/a": math.nan, "x/b": math.nan, "x/mean": math.nan}, False),
        ({}, False),
    ],
)
def test_without_a_number_of_samples_the_mean_tells(last: dict[str, float], is_one: bool) -> None:
    assert bool(find_series(["x/a", "x/b", "x/mean"], last=last)) is is_one


@pytest.mark.parametrize("tags", [[], ["loss"], ["mean"], ["/mean"], ["x/mean"], ["x/mean", "x/num_samples"]])
def test_what_is_no_series(tags: list[str]) -> None:
    assert find_series(tags) == []


def test_names_are_sorted_by_the_numbers_in_them() -> None:
    names = ["a.10.b", "a.2.b", "a.2", "b", "10", "9"]
    assert sorted(names, key=natural_key) == ["9", "10", "a.2", "a.2.b", "a.10.b", "b"]


def test_a_table_has_a_place_for_every_layer_and_step() -> None:
    series = Series(
        "cka", None, {"a": "cka/a", "b": "cka/b"}, {"a": "cka_low/a"}, {"a": "cka_high/a"}, "cka/num_samples"
    )
    values = {
        "cka/a": {3: 1.0, 10: 0.25},
        "cka/b": {10: math.nan, 20: -0.01},
        "cka_low/a": {10: 0.2},
        "cka_high/a": {10: 0.3},
        "cka/num_samples": {3: 7.0, 20: 9.0},
    }
    assert table(series, values) == {
        "name": "cka",
        "layers": ["a", "b"],
        "steps": [3, 10, 20],
        "values": [[1.0, 0.25, None], [None, None, -0.01]],
        "low": [[None, 0.2, None], [None, None, None]],
        "high": [[None, 0.3, None], [None, None, None]],
        "num_samples": [7.0, None, 9.0],
    }
