"""Compiled modules: which are, how a copy gets rid of it, and how compiled code is run as it is written."""

from __future__ import annotations

from types import FunctionType
from typing import ClassVar

import torch
from torch import nn

from lit_cka.features.lightning_private import drop_compiled_steps, has_compiled_steps
from lit_cka.features.shared_mode import SharedMode


def is_compiled(model: nn.Module) -> bool:
    """Returns whether the model or a part of it, a module or a method, is compiled.

    Compiled code does not notice hooks that come later.
    """
    from torch._dynamo import OptimizedModule

    return any(
        isinstance(module, OptimizedModule)
        or getattr(module, "_compiled_call_impl", None) is not None
        or has_compiled_steps(module)
        or any(
            isinstance(value, FunctionType) and hasattr(value, "_torchdynamo_orig_callable")
            for value in vars(module).values()
        )
        for module in model.modules()
    )


def forget_compiled_steps(copied: nn.Module) -> None:
    """Make a deep copy run uncompiled: what is compiled of a LightningModule belongs to the original."""
    for module in copied.modules():
        vars(module).pop("_compiled_call_impl", None)
        drop_compiled_steps(module)


class Uncompiled:
    """While active, compiled code runs as it is written. Several may be active, and end in any order."""

    _eager: ClassVar[SharedMode[Uncompiled]] = SharedMode(lambda: torch.compiler.set_stance("force_eager"))

    def start(self) -> None:
        """Begin, if not active already."""
        Uncompiled._eager.hold(self)

    def stop(self) -> None:
        """End, if active. The last one leaves everything as it was before the first."""
        Uncompiled._eager.release(self)
