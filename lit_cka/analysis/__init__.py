"""Two or more models and a dataset in, named arrays out, with intervals: comparisons, probes, projections.

Drawing them is `lit_cka.plots`; one model against its past is `lit_cka.tracking`.
"""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from lit_cka.analysis.calibration import BestPair, Calibration
    from lit_cka.analysis.comparison import Comparison, compare, compare_features
    from lit_cka.analysis.extraction import extract
    from lit_cka.analysis.features import Features
    from lit_cka.analysis.image_model import Digits, ImageFiles, ImageModel
    from lit_cka.analysis.linear_probe import ProbeSettings
    from lit_cka.analysis.probes import advice, probe_layers
    from lit_cka.analysis.projection import project
    from lit_cka.analysis.settings import Settings
    from lit_cka.analysis.text_file import TextFile
    from lit_cka.analysis.text_model import TextModel

__all__ = [
    "BestPair",
    "Calibration",
    "Comparison",
    "Digits",
    "Features",
    "ImageFiles",
    "ImageModel",
    "ProbeSettings",
    "Settings",
    "TextFile",
    "TextModel",
    "advice",
    "compare",
    "compare_features",
    "extract",
    "probe_layers",
    "project",
]

# Imported when asked for: one name should not load what another needs.
__getattr__, __dir__, _ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "calibration": ["BestPair", "Calibration"],
        "comparison": ["Comparison", "compare", "compare_features"],
        "extraction": ["extract"],
        "features": ["Features"],
        "image_model": ["Digits", "ImageFiles", "ImageModel"],
        "linear_probe": ["ProbeSettings"],
        "probes": ["advice", "probe_layers"],
        "projection": ["project"],
        "settings": ["Settings"],
        "text_file": ["TextFile"],
        "text_model": ["TextModel"],
    },
)
