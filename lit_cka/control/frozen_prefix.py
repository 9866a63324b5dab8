"""The first blocks of a model, frozen and unfrozen: `FrozenPrefix`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lit_cka.control.plan import FreezePlan
from lit_cka.features.layers import named_layers
from lit_cka.features.sharded_modules import plain_name


class FrozenPrefix:
    """Holds the first blocks of a model frozen: no gradients for their parameters, and none through them.

    Args:
        model: the LightningModule.
        plan: what is frozen with each block.
        norm_in_eval: whether batch normalisation of what is frozen uses its running statistics, and leaves them.
        dropout_in_eval: whether all else that is frozen, dropout above all, is in eval mode.
        keep_optimizer_state: whether optimizers keep what they know of frozen parameters.

    Attributes:
        num_frozen: how many blocks are frozen.
    """

    def __init__(
        self, model: nn.Module, plan: FreezePlan, norm_in_eval: bool, dropout_in_eval: bool, keep_optimizer_state: bool
    ) -> None:
        self.num_frozen = 0
        self.plan = plan
        self._in_eval = norm_in_eval, dropout_in_eval
        self._keeps_state = keep_optimizer_state
        self._modules = named_layers(model)
        self._named = {plain_name(name): parameter for name, parameter in model.named_parameters()}
        self._parameters: list[nn.Parameter] = []  # those that were trained before
        self._evaluated: list[nn.Module] = []  # those that were in training mode before
        self._cut: RemovableHandle | None = None

    def block(self, number: int) -> nn.Module:
        """Returns the block of this number."""
        return self._modules[self.plan.blocks[number]]

    def freeze(self, num_frozen: int, optimizers: Sequence[Optimizer]) -> None:
        """Have so many blocks frozen from now on, and no more.

        Args:
            num_frozen: the number of blocks.
            optimizers: that may hold their parameters.
        """
        self.release()
        self.num_frozen = num_frozen
        if not num_frozen:
            return
        parts = self.plan.parts[:num_frozen]
        named = [self._named[name] for part in parts for name in part.parameters]
        self._parameters = [parameter for parameter in named if parameter.requires_grad]
        self._evaluated = [
            self._modules[name]
            for part in parts
            for name in part.modules
            if self._modules[name].training and self._in_eval[not isinstance(self._modules[name], _NormBase)]
        ]
        self._cut = self.block(num_frozen - 1).register_forward_hook(self._without_graph)
        self.hold()
        for parameter in self._parameters:
            parameter.grad = None  # of a step that is accumulated: nothing is left for an optimizer to apply
            for optimizer in () if self._keeps_state else optimizers:
                optimizer.state.pop(parameter, None)

    def hold(self) -> None:
        """Undo what others did to parameters and modes in the meantime, such as `model.train()`."""
        for parameter in self._parameters:
            if parameter.requires_grad:
                parameter.requires_grad_(False)
        for module in self._evaluated:
            module.training = False

    def release(self) -> None:
        """Freeze nothing: parameters and modes are as they were before."""
        for parameter in self._parameters:
            parameter.requires_grad_(True)
        for module in self._evaluated:
            module.training = True
        if self._cut is not None:
            self._cut.remove()
        self._parameters, self._evaluated, self._cut, self.num_frozen = [], [], None, 0

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters that are frozen."""
        return self._parameters

    def _without_graph(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Cut the graph behind the last frozen block: weights that later layers use too would keep it alive."""
        if not torch.is_grad_enabled():
            return output
        return _detached(output)


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach() if value.requires_grad else value
    if isinstance(value, dict):
        for key, item in value.items():  # in place: it may be of a class of the model's own
            value[key] = _detached(item)
        return value
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_detached(item) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(_detached(item) for item in value)
    return value
