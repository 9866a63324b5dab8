"""See what fine-tuning does to a model's representations: per-layer CKA for PyTorch Lightning."""

from lit_cka.callback import CKACallback
from lit_cka.metrics import LinearCKA, MinibatchCKA

__all__ = ["CKACallback", "LinearCKA", "MinibatchCKA"]
