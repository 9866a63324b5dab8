"""Layers that learn more slowly than the optimizer has it: `SlowedLayers`."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lit_cka.features.layers import named_layers


class SlowedLayers:
    """Goes back a part of the way after each optimizer step: W <- W_before + factor (W_after - W_before).

    That is a step with `factor` times the learning rate, for any optimizer whose step is proportional to it, with its
    weight decay, whatever parameter groups and schedulers there are.

    Attributes:
        factors: by layer.
    """

    def __init__(self) -> None:
        self.factors: dict[str, float] = {}
        self._before: list[tuple[nn.Parameter, Tensor, float]] = []

    def slow(self, layers: Iterable[str], factor: float) -> None:
        """Have these layers learn so much more slowly than they did so far."""
        for layer in layers:
            self.factors[layer] = factor * self.factors.get(layer, 1.0)

    def before_step(self, module: nn.Module) -> None:
        """Keep the weights of slowed layers, of which a step follows."""
        self.after_step()
        if not self.factors:
            return
        seen: set[int] = set()
        modules = named_layers(module)
        for layer, factor in self.factors.items():
            for parameter in modules[layer].parameters():
                if parameter.grad is not None and id(parameter) not in seen:
                    seen.add(id(parameter))
                    self._before.append((parameter, parameter.detach().clone(), factor))

    @torch.no_grad()
    def after_step(self) -> None:
        """Go back a part of the way that the step took."""
        for parameter, before, factor in self._before:
            parameter.copy_(before.lerp(parameter, factor))
        self._before = []
