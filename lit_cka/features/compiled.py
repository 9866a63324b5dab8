"""What `torch.compile` and Lightning put in place of a module's own methods."""

from __future__ import annotations

from contextlib import ExitStack
from typing import ClassVar

import torch
from torch import nn
from torch._dynamo import OptimizedModule

# What Lightning replaces on a module when it is given `torch.compile(module)`.
_REPLACED = ("forward", "training_step", "validation_step", "test_step", "predict_step")


def is_compiled(model: nn.Module) -> bool:
    """Whether the model, or a part of it, is compiled: by `torch.compile(module)` or `module.compile()`.

    Compiled code does not notice hooks that come later.
    """
    return any(
        isinstance(module, OptimizedModule)
        or getattr(module, "_compiled_call_impl", None) is not None
        or getattr(module, "_compiler_ctx", None) is not None
        for module in model.modules()
    )


def forget_compiled_steps(copied: nn.Module) -> None:
    """Give a deep copy its own methods back: what is compiled of a LightningModule belongs to the original."""
    for module in copied.modules():
        vars(module).pop("_compiled_call_impl", None)
        if vars(module).pop("_compiler_ctx", None) is not None:
            for name in _REPLACED:
                vars(module).pop(name, None)


def is_redirected(module: nn.Module) -> bool:
    """Whether a call of a LightningModule is its step's, which Lightning sends through DDP in place of `forward`."""
    forward = vars(module).get("forward")
    return str(getattr(forward, "__qualname__", "")).startswith("_ForwardRedirection.")


class Uncompiled:
    """While active, compiled code runs as it is written. Several may be active, and end in any order."""

    _active: ClassVar[set[Uncompiled]] = set()
    _stance: ClassVar[ExitStack] = ExitStack()

    def start(self) -> None:
        """Begin, if not active already."""
        if not Uncompiled._active:
            Uncompiled._stance.enter_context(torch.compiler.set_stance("force_eager"))
        Uncompiled._active.add(self)

    def stop(self) -> None:
        """End, if active. The last one leaves everything as it was before the first."""
        if self in Uncompiled._active:
            Uncompiled._active.remove(self)
            if not Uncompiled._active:
                Uncompiled._stance.close()
