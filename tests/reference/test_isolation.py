"""Where tensors come from, watched by several at once; random states; the guard against live weights."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from lit_cka.reference.isolation import FollowsLiveWeightsError, LiveWeightGuard, WeightTaint
from lit_cka.samples.random_states import preserved_rng


def test_what_comes_from_trained_weights_is_known_by_name() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).requires_grad_(False)
    model[1].bias.requires_grad_(True)
    taint, x = WeightTaint(model), torch.randn(2, 3)
    with torch.no_grad():
        taint.watch(True)
        frozen = model[0](x) * 2
        trained = model[1](frozen).reshape(-1)[1:] + 1
        taint.watch(False)
        after = model[1](x)
    assert taint.trained_origin((x, {"x": [frozen]})) is None
    assert taint.trained_origin((x, {"x": [trained]})) == "1.bias"
    assert taint.origins((x, {"x": [frozen]})) == {"0.weight", "0.bias"}
    assert taint.origins(trained) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert taint.origins(x) == taint.origins(after) == frozenset()


def test_watchers_may_stop_in_any_order() -> None:
    models = [nn.Linear(2, 2), nn.Linear(2, 2)]
    first, second = map(WeightTaint, models)
    with torch.no_grad():
        first.watch(True)
        second.watch(True)
        first.watch(False)
        output = models[1](torch.randn(1, 2))
        second.watch(False)
    assert second.trained_origin(output) in ("weight", "bias")
    assert first.trained_origin(output) is None
    assert _get_current_dispatch_mode_stack() == []


def test_random_states_are_left_as_they_were() -> None:
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(1)
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    with preserved_rng():
        random.random()
        np.random.rand()
        torch.rand(3)
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected


def test_the_guard_sees_views_and_buffers() -> None:
    model = nn.BatchNorm1d(2)
    other = nn.BatchNorm1d(2)
    with LiveWeightGuard(model):
        other.eval()(torch.randn(3, 2))
        with pytest.raises(FollowsLiveWeightsError, match="'running_mean'"):
            model.running_mean[1:] + 1
