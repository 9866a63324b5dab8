"""What is compiled is known; a copy is not; and compiled code runs as it is written for as long as anybody asks."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lit_cka.features.compiled import Uncompiled, forget_compiled_steps, is_compiled


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


def whole(net: nn.Module) -> nn.Module:
    return torch.compile(net, backend="eager")  # type: ignore[return-value]


def in_place(net: nn.Module) -> nn.Module:
    net.compile(backend="eager")
    return net


def part(net: Net) -> nn.Module:
    net.second = torch.compile(net.second, backend="eager")
    return net


def method(net: nn.Module) -> nn.Module:
    net.forward = torch.compile(net.forward, backend="eager")  # type: ignore[method-assign]
    return net


WAYS: list[Callable[[Net], nn.Module]] = [whole, in_place, part, method]


@pytest.mark.parametrize("way", WAYS)
def test_what_is_compiled_is_known(way: Callable[[Net], nn.Module]) -> None:
    assert not is_compiled(Net())
    assert is_compiled(way(Net()))


def test_a_copy_runs_uncompiled() -> None:
    net = in_place(Net())
    copied = copy.deepcopy(net)
    forget_compiled_steps(copied)
    assert is_compiled(net)
    assert not is_compiled(copied)


@pytest.mark.parametrize("first", [0, 1])
def test_hooks_fire_as_long_as_anybody_asks(first: int) -> None:
    net, fired = whole(Net()), []
    x = torch.ones(2, 3)
    net(x)  # compiled without a hook
    inner = net._orig_mod.first  # type: ignore[union-attr]
    inner.register_forward_hook(lambda *_: fired.append(1))
    asked = [Uncompiled(), Uncompiled()]
    for each in (*asked, asked[0]):  # twice is no more than once
        each.start()
    net(x)
    assert len(fired) == 1
    asked[first].stop()
    net(x)
    assert len(fired) == 2
    asked[1 - first].stop()
    assert torch._dynamo.eval_frame._stance.stance == "default"
