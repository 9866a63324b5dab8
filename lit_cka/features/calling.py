"""How a network is called with a dataloader's batch: `call_model`; and `evaluating`, the mode that it runs in."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn


def call_model(model: nn.Module, batch: Any, through: nn.Module | None = None) -> Any:
    """Call `model` with the inputs in a batch: of a mapping those that `forward` takes by name, without labels; of a
    tuple or list the first element; anything else as it is.

    Args:
        model: the model.
        batch: as its dataloader gives it.
        through: a wrapper of the model that is to be called in its place; None to call the model itself.
    """
    call = model if through is None else through
    if isinstance(batch, Mapping):
        parameters = inspect.signature(model.forward).parameters
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        names = [name for name in batch if name in parameters or (takes_all and name not in ("labels", "label", "id"))]
        return call(**{name: batch[name] for name in names if name not in ("labels", "label")})
    return call(batch[0] if isinstance(batch, (tuple, list)) else batch)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Puts the module into eval mode, and in the end every module inside into the mode that it was in."""
    modes = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for child, training in modes:
            child.training = training
