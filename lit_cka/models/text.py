"""Text classifiers to fine-tune: any transformers model for sequence classification."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lit_cka.checkpoints.model_folders import reading_model
from lit_cka.models.classifier import Classifier


class TextClassifier(Classifier):
    """A transformers model for sequence classification, named after transformers below `model.`.

    Args:
        model_name: a name on the hub ("distilbert-base-uncased") or a local folder in `save_pretrained` format.
        num_classes: number of classes.
        learning_rate: the highest, after warm-up.
        weight_decay: of AdamW, for weights of two or more dimensions.
        warmup: the part of the training that warm-up takes.
        trust_remote_code: run code that comes with the model and its tokenizer; only for a model that you trust. It is
            not stored in checkpoints.

    Raises:
        ValueError: if a folder is damaged, or names something outside of it.
    """

    def __init__(
        self,
        model_name: str,
        num_classes: int,
        learning_rate: float = 2e-5,
        weight_decay: float = 0.01,
        warmup: float = 0.1,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__(num_classes, learning_rate, weight_decay, warmup)
        self.save_hyperparameters(ignore="trust_remote_code")
        self.trust_remote_code = trust_remote_code
        from transformers import AutoModelForSequenceClassification

        with reading_model(model_name):
            model = AutoModelForSequenceClassification.from_pretrained(
                model_name, num_labels=num_classes, trust_remote_code=trust_remote_code
            )
        self.model = model.train()  # which comes in eval mode, and Lightning leaves modes as they are

    @property
    def tokenizer_name(self) -> str:
        """Where the model's tokenizer is, for the data."""
        name: str = self.hparams["model_name"]
        return name

    def split(self, batch: Any) -> tuple[Any, Tensor]:
        """Returns the tokenizer's output and the labels of a batch, a mapping that holds both."""
        return {key: value for key, value in batch.items() if key != "labels"}, batch["labels"]

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """Returns logits (n, num_classes) of tokenized text: `input_ids` and `attention_mask` (n, tokens)."""
        logits: Tensor = self.model(**inputs).logits
        return logits
