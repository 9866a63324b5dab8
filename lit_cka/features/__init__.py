"""Pooled features of a model's layers: which layers, hooks, pooling, masks, and how a model is called.

What is compared with what, and over which samples, is not decided here.
"""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from lit_cka.features.extractor import FeatureExtractor
    from lit_cka.features.layers import named_layers, select_layers

__all__ = ["FeatureExtractor", "named_layers", "select_layers"]

# Imported when asked for: one name should not load what another needs.
__getattr__, __dir__, _ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "extractor": ["FeatureExtractor"],
        "layers": ["named_layers", "select_layers"],
    },
)
