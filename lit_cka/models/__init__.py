"""LightningModules to fine-tune: timm and open_clip image classifiers, transformers text models.

Any other LightningModule works as well: nothing in the package asks for these.
"""

from lit_cka.models.classifier import Classifier
from lit_cka.models.images import CLIPImageClassifier, ImageClassifier
from lit_cka.models.language import CausalLanguageModel
from lit_cka.models.text import TextClassifier

__all__ = ["CLIPImageClassifier", "CausalLanguageModel", "Classifier", "ImageClassifier", "TextClassifier"]
