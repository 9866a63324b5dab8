"""A shared mode is on while anybody holds it, whoever ends first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import permutations

import pytest
import torch

from lit_cka.features.shared_mode import SharedMode


class Light:
    """Knows how often it was switched on, and whether it is."""

    def __init__(self) -> None:
        self.times, self.on = 0, False

    @contextmanager
    def context(self) -> Iterator[None]:
        assert not self.on
        self.times, self.on = self.times + 1, True
        try:
            yield
        finally:
            self.on = False


@pytest.mark.parametrize("order", list(permutations("abc")))
def test_it_is_on_from_the_first_to_the_last(order: tuple[str, ...]) -> None:
    light = Light()
    mode: SharedMode[str] = SharedMode(light.context)
    assert not light.on
    for holder in "abc":
        mode.hold(holder)
        assert light.on
    assert mode.holders == ["a", "b", "c"]
    for number, holder in enumerate(order, start=1):
        mode.release(holder)
        assert holder not in mode.holders
        assert light.on is (number < 3)
    assert light.times == 1
    mode.hold("d")
    assert (light.on, light.times) == (True, 2)


def test_to_begin_or_to_end_twice_changes_nothing() -> None:
    light = Light()
    mode: SharedMode[str] = SharedMode(light.context)
    mode.release("a")
    mode.hold("a")
    mode.hold("a")
    assert mode.holders == ["a"]
    mode.release("a")
    mode.release("a")
    assert not light.on
    assert light.times == 1


def test_a_mode_that_cannot_be_entered_is_held_by_nobody() -> None:
    def fail() -> Light:
        raise RuntimeError("broken")

    mode: SharedMode[str] = SharedMode(fail)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="broken"):
        mode.hold("a")
    assert mode.holders == []


def test_a_mode_of_torch() -> None:
    mode: SharedMode[int] = SharedMode(torch.no_grad)
    mode.hold(1)
    mode.hold(2)
    mode.release(1)
    assert not torch.is_grad_enabled()
    mode.release(2)
    assert torch.is_grad_enabled()


def test_without_a_context_it_is_a_list_of_holders() -> None:
    mode: SharedMode[int] = SharedMode()
    mode.hold(1)
    mode.hold(2)
    mode.release(1)
    assert mode.holders == [2]
