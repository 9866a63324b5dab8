"""LightningModules to fine-tune: timm and open_clip image classifiers, transformers text models.

Any other LightningModule works as well: nothing in the package asks for these.
"""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from lit_cka.models.classifier import Classifier
    from lit_cka.models.images import CLIPImageClassifier, ImageClassifier
    from lit_cka.models.language import CausalLanguageModel
    from lit_cka.models.text import TextClassifier

__all__ = [
    "CLIPImageClassifier",
    "CausalLanguageModel",
    "Classifier",
    "ImageClassifier",
    "TextClassifier",
]

# Imported when asked for: one name should not load what another needs.
__getattr__, __dir__, _ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "classifier": ["Classifier"],
        "images": ["CLIPImageClassifier", "ImageClassifier"],
        "language": ["CausalLanguageModel"],
        "text": ["TextClassifier"],
    },
)
