"""What the classifiers of images and of text share: loss, accuracy, optimiser."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import override

from lit_cka.checkpoints.state_dicts import load_into, load_state_dict


def start_from(model: nn.Module, checkpoint: str, weights: str | None, heads: tuple[str, ...]) -> None:
    """Load a checkpoint's weights into a model; where it has none of their shape, the `heads` stay as they are.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged or of another architecture.
    """
    left = load_into(model, load_state_dict(checkpoint, weights=weights), optional=tuple(f"{name}." for name in heads))
    if left:
        rank_zero_info(f"{checkpoint} has no head of this shape, so it starts at random: {', '.join(left)}.")


class Classifier(pl.LightningModule):
    """Trains with cross-entropy and AdamW, linear warm-up and cosine decay; logs `<stage>_loss` and `<stage>_acc`.

    A subclass has `forward`, and `split` to tell inputs from labels. `fit` must know its number of steps, for the
    schedule; give LightningCLI an `optimizer` and `lr_scheduler` of your own to replace both.

    Args:
        num_classes: number of classes.
        learning_rate: the highest, after warm-up.
        weight_decay: of AdamW, for weights of two or more dimensions.
        warmup: the part of the training that warm-up takes, in [0, 1).

    Example:
        >>> class Linear(Classifier):
        ...     def __init__(self):
        ...         super().__init__(num_classes=3, learning_rate=1e-3, weight_decay=0.01, warmup=0.1)
        ...         self.head = nn.Linear(4, 3)
        ...
        ...     def forward(self, x):
        ...         return self.head(x)
        >>> Linear()(torch.zeros(2, 4)).shape
        torch.Size([2, 3])
    """

    def __init__(self, num_classes: int, learning_rate: float, weight_decay: float, warmup: float) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"Expected `num_classes` to be at least 2, but got {num_classes}.")
        if not 0 <= warmup < 1:
            raise ValueError(f"Expected `warmup` to be in [0, 1), but got {warmup}.")
        self.num_classes = num_classes
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup = warmup
        self.val_acc = MulticlassAccuracy(num_classes, average="micro")
        self.test_acc = MulticlassAccuracy(num_classes, average="micro")

    def split(self, batch: Any) -> tuple[Any, Tensor]:
        """Returns the batch's inputs, as `forward` takes them, and its labels (n,)."""
        inputs, labels = batch
        return inputs, labels

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, labels = self.split(batch)
        loss = cross_entropy(self(inputs), labels)
        self.log("train_loss", loss, batch_size=len(labels))
        return loss

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate("val", self.val_acc, batch)

    @override
    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate("test", self.test_acc, batch)

    def _evaluate(self, stage: str, accuracy: MulticlassAccuracy, batch: Any) -> None:
        inputs, labels = self.split(batch)
        logits = self(inputs)
        accuracy.update(logits, labels)
        self.log(f"{stage}_loss", cross_entropy(logits, labels), batch_size=len(labels), sync_dist=True)
        self.log(f"{stage}_acc", accuracy, prog_bar=True, batch_size=len(labels))

    @override
    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns class probabilities (n, num_classes)."""
        inputs, _ = self.split(batch)
        logits: Tensor = self(inputs)
        return logits.softmax(dim=-1)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Returns what is trained, as AdamW takes it: parameters with their weight decay, and with their learning rate
        where it is not `learning_rate`.
        """
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return [
            {"params": [parameter for parameter in trained if parameter.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [parameter for parameter in trained if parameter.ndim <= 1], "weight_decay": 0.0},
        ]

    @override
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameter_groups(), lr=self.learning_rate)
        total = max(1, int(self.trainer.estimated_stepping_batches))
        warmup = math.ceil(self.warmup * total)

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / (warmup + 1)
            return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
