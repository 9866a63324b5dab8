"""See what fine-tuning does to a model's representations: per-layer CKA for PyTorch Lightning."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_cka.callback import CKACallback
    from lit_cka.editing.editor import MonoSoupEditor
    from lit_cka.metrics import LinearCKA, MinibatchCKA

__all__ = ["CKACallback", "LinearCKA", "MinibatchCKA", "MonoSoupEditor"]

_MODULES = {
    "CKACallback": "callback",
    "LinearCKA": "metrics",
    "MinibatchCKA": "metrics",
    "MonoSoupEditor": "editing.editor",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for: torchmetrics alone loads matplotlib and transformers."""
    if name not in _MODULES:
        raise AttributeError(f"module 'lit_cka' has no attribute {name!r}")
    return getattr(import_module(f"lit_cka.{_MODULES[name]}"), name)
