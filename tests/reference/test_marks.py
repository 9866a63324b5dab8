"""Whether a tensor was changed, by its mark: never missed, whatever address its values have."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

from lit_cka.reference.places import Mark


def parameter() -> nn.Parameter:
    return nn.Parameter(torch.arange(36.0).reshape(6, 6))


def test_nothing_happened() -> None:
    values = parameter()
    mark = Mark(values)
    gc.collect()
    assert mark == Mark(values) == copy.deepcopy(mark)
    assert mark != Mark(parameter())
    assert mark != (values.data_ptr(), values._version)
    assert mark != pickle.loads(pickle.dumps(mark))
    with torch.inference_mode():
        inside = torch.ones(3)
    assert Mark(inside) == Mark(inside)


def replaced(values: nn.Parameter) -> None:
    values.data = values.data.clone()


def rounded(values: nn.Parameter) -> None:
    values.data = values.data.half()
    values.data = values.data.float()


def written(values: nn.Parameter) -> None:
    with torch.no_grad():
        values.mul_(1)


ELSEWHERE = torch.zeros(6, 6)


def out_and_others_in(values: nn.Parameter) -> None:
    """The allocator may give the new values the address of the old ones."""
    values.data = ELSEWHERE
    values.data = torch.zeros(6, 6)


CHANGES: list[Callable[[nn.Parameter], None]] = [replaced, rounded, written, out_and_others_in]


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_seen_at_any_address(change: Callable[[nn.Parameter], None]) -> None:
    for _ in range(300):
        values = parameter()
        mark = Mark(values)
        change(values)
        assert mark != Mark(values)
