"""Weights from and to files: safetensors, whole or in shards, what `torch.save` wrote; nothing is unpickled unasked.

What is done to the weights is `lit_cka.editing`; how a model is built from them is `lit_cka.models`.
"""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from lit_cka.checkpoints.state_dicts import load_state_dict

__all__ = ["load_state_dict"]

# Imported when asked for: one name should not load what another needs.
__getattr__, __dir__, _ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "state_dicts": ["load_state_dict"],
    },
)
