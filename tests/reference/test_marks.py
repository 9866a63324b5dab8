"""Whether a tensor was changed, by its mark: never missed, whatever address its values have."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

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


CHANGES: list[Callable[[nn.Parameter], None]] = [replaced, rounded, written]


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_seen_at_any_address(change: Callable[[nn.Parameter], None]) -> None:
    for _ in range(300):
        values = parameter()
        mark = Mark(values)
        change(values)
        assert mark != Mark(values)


def test_the_same_address_again_is_another_memory() -> None:
    """What the allocator may do: the values move out, others in, and the address is that of before."""
    values, elsewhere = parameter(), torch.zeros(6, 6)
    mark, address = Mark(values), values.data_ptr()
    kept: list[Tensor] = []
    for _ in range(2000):
        values.data = elsewhere
        gc.collect(0)
        values.data = torch.ones(6, 6)
        if values.data_ptr() == address:
            break
        kept.append(torch.empty(5, 5))
    assert mark != Mark(values)
