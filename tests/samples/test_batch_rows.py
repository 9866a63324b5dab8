"""How many samples a batch holds, and how a layer's rows lie, by the shapes in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import zeros

from lit_cka.samples.batch_rows import rows_of


@dataclass
class Labelled:
    image: Any
    name: str


@pytest.mark.parametrize(
    ("batch", "num_samples"),
    [
        (zeros(8, 3, 4, 4), 8),
        ([zeros(16, 6), zeros(16)], 16),
        ([zeros(2, 6), zeros(2)], 2),
        ((zeros(4, 2), ["a"] * 4, None, 3), 4),
        ({"ids": zeros(5, 7), "names": ["a"] * 5, "scale": 2.0}, 5),
        ({"patches": zeros(48, 9), "sizes": zeros(3, 3), "label": zeros(3)}, 3),
        (Labelled(np.zeros((6, 2)), "b"), 6),
        ([[zeros(8, 3, 9, 9) for _ in range(5)], zeros(8)], 8),
        ([[zeros(8, 3, 9, 9), zeros(8, 3, 4, 4)], zeros(8)], 8),
        ([zeros(8, 3, 9, 9), zeros(8, 3, 4, 4)], 8),
        ((tuple(zeros(3, i + 4, 5) for i in range(6)), tuple({"boxes": zeros(4, 4)} for _ in range(6))), 6),
        ([zeros(3, i + 4, 5) for i in range(6)], 6),
        ([{"boxes": zeros(i, 4)} for i in range(6)], 6),
        (["a", "b", "c"], 3),
        ((([zeros(7, 2), zeros(7)]), 0, 1), 7),
        ({"a": [zeros(9, 6), zeros(9)], "b": [zeros(9, 2), zeros(9)]}, 9),
        (torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged), 2),
        (zeros(0, 3), 0),
        (zeros(()), None),
        ({}, None),
        ([], None),
        ("text", None),
        (object(), None),
    ],
)
def test_the_number_of_samples(batch: Any, num_samples: int | None) -> None:
    assert rows_of(batch).num_samples == num_samples


@pytest.mark.parametrize(
    ("batch", "num_rows", "order"),
    [
        ([zeros(8, 4, 3, 9, 9), zeros(8)], 32, "by sample"),
        ([zeros(8, 2, 5), zeros(8)], 16, "by sample"),
        ([[zeros(8, 3, 9, 9) for _ in range(5)], zeros(8)], 40, "by part"),
        ({"crops": [zeros(8, 1, 9, 9), zeros(8, 1, 4, 4)], "label": zeros(8)}, 16, "by part"),
        ([[zeros(8, 3, 9, 9) for _ in range(3)], zeros(8)], 24, None),  # crops, or channels?
        ([zeros(8, 4, 3, 9, 9), zeros(8)], 24, None),
        ([zeros(8, 4, 3, 9, 9), zeros(8)], 33, None),
        ([zeros(8, 4), zeros(8)], 4, None),
        (zeros(32, 3, 9, 9), 32, None),
    ],
)
def test_how_the_rows_lie(batch: Any, num_rows: int, order: str | None) -> None:
    assert rows_of(batch).order(8, num_rows) == order
