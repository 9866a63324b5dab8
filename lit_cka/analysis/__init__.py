"""Compare models: features of whole datasets, and what they have in common."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_cka.analysis.comparison import Comparison, compare, compare_features
    from lit_cka.analysis.extraction import extract
    from lit_cka.analysis.features import Features
    from lit_cka.analysis.image_model import Digits, ImageFiles, ImageModel
    from lit_cka.analysis.measures import Settings
    from lit_cka.analysis.probes import advice, probe_layers
    from lit_cka.analysis.projection import project
    from lit_cka.analysis.text_file import TextFile
    from lit_cka.analysis.text_model import TextModel

__all__ = [
    "Comparison", "Digits", "Features", "ImageFiles", "ImageModel", "Settings", "TextFile", "TextModel", "advice",
    "compare", "compare_features", "extract", "probe_layers", "project",
]  # fmt: skip

_MODULES = {
    "Comparison": "comparison",
    "Digits": "image_model",
    "Features": "features",
    "ImageFiles": "image_model",
    "ImageModel": "image_model",
    "Settings": "measures",
    "TextFile": "text_file",
    "TextModel": "text_model",
    "advice": "probes",
    "compare": "comparison",
    "compare_features": "comparison",
    "extract": "extraction",
    "probe_layers": "probes",
    "project": "projection",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for: one measure should not load all libraries."""
    if name not in _MODULES:
        raise AttributeError(f"module 'lit_cka.analysis' has no attribute {name!r}")
    return getattr(import_module(f"lit_cka.analysis.{_MODULES[name]}"), name)
