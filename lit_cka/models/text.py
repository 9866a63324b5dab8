"""Text classifiers to fine-tune: any transformers model for sequence classification."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from typing_extensions import override

from lit_cka.checkpoints.model_folders import reading_model
from lit_cka.models.classifier import Classifier, start_from


class TextClassifier(Classifier):
    """A transformers model for sequence classification, named after transformers below `model.`.

    Args:
        model_name: a name on the hub ("distilbert-base-uncased") or a local folder in `save_pretrained` format.
        num_classes: number of classes.
        checkpoint: a file of weights to start from instead, see `lit_cka.checkpoints.load_state_dict`; all but the
            head's must fit.
        head_only: train the head on frozen features, without dropout in them: linear probing, which a fine-tuning of
            all weights may start from (Kumar et al. 2022, arXiv 2202.10054). The head is what transformers puts on the
            base model.
        learning_rate: the highest, after warm-up.
        weight_decay: of AdamW, for weights of two or more dimensions.
        warmup: the part of the training that warm-up takes.
        trust_remote_code: run code that comes with the model and its tokenizer; only for a model that you trust. It is
            not stored in checkpoints.
        weights: which of several sets of weights in the checkpoint.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        ValueError: if a folder is damaged, or names something outside of it, the checkpoint has another architecture,
            or there is no head to train alone.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from transformers import BertConfig, BertModel
        >>> sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        >>> with TemporaryDirectory() as folder:  # a name on the hub does as well
        ...     BertModel(BertConfig(vocab_size=50, **sizes)).save_pretrained(folder)
        ...     model = TextClassifier(folder, num_classes=2)
        >>> model.num_classes
        2
    """

    def __init__(
        self,
        model_name: str,
        num_classes: int,
        checkpoint: str | None = None,
        head_only: bool = False,
        learning_rate: float = 2e-5,
        weight_decay: float = 0.01,
        warmup: float = 0.1,
        trust_remote_code: bool = False,
        weights: str | None = None,
    ) -> None:
        super().__init__(num_classes, learning_rate, weight_decay, warmup)
        self.save_hyperparameters(ignore="trust_remote_code")
        self.trust_remote_code = trust_remote_code
        from transformers import AutoModelForSequenceClassification

        with reading_model(model_name):
            model = AutoModelForSequenceClassification.from_pretrained(
                model_name, num_labels=num_classes, trust_remote_code=trust_remote_code
            )
        self.model = model
        self.head_only = head_only
        heads = tuple(name for name, child in model.named_children() if child is not model.base_model)
        if checkpoint is not None:
            start_from(model, checkpoint, weights, heads)
        if head_only:
            if model.base_model is model or not heads:
                raise ValueError(
                    f"Expected a head on a base model for `head_only`, but {type(model).__name__} has none that is "
                    "told apart from it. Train all of it, or another architecture."
                )
            model.base_model.requires_grad_(False)
        self.model.train()  # it comes in eval mode, and Lightning leaves modes as they are

    @override
    def on_train_start(self) -> None:
        if self.head_only:
            # Here, since Lightning warns of modules that are in eval mode before; it keeps modes across validations.
            self.model.base_model.eval()

    def save_pretrained(self, folder: str | os.PathLike[str], *, weights: Mapping[str, Tensor] | None = None) -> None:
        """Write the model to a folder that transformers reads; its tokenizer belongs there, too, and is the data's.

        Args:
            folder: to write to.
            weights: a state dict of this module to write in place of its own weights.
        """
        below = None
        if weights is not None:
            below = {name.removeprefix("model."): value for name, value in weights.items() if name.startswith("model.")}
        self.model.save_pretrained(folder, state_dict=below)

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
