"""What `torch.compile` and Lightning put in place of a module's own methods."""

from __future__ import annotations

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
    """Give a deep copy of a module its own steps back: those that Lightning has compiled belong to the original."""
    if vars(copied).pop("_compiler_ctx", None) is not None:
        for name in _REPLACED:
            vars(copied).pop(name, None)


def is_redirected(module: nn.Module) -> bool:
    """Whether a call of a LightningModule is its step's, which Lightning sends through DDP in place of `forward`."""
    forward = vars(module).get("forward")
    return str(getattr(forward, "__qualname__", "")).startswith("_ForwardRedirection.")
