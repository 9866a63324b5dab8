"""How far does each block of a timm model move while it is trained?

    python examples/first.py

trains a small vision transformer on scikit-learn's digits with `CKACallback`, and prints its table and the accuracy.
The CKA of each block over time is in TensorBoard's tab CKA: `tensorboard --logdir lightning_logs`.
"""

import lightning.pytorch as pl
import timm
import torch
from torch import Tensor, nn

from lit_cka import CKACallback
from lit_cka.data import DigitsDataModule


class ImageClassifier(pl.LightningModule):
    """A network and how it is trained; nothing here knows of CKA."""

    def __init__(self, network: nn.Module, lr: float) -> None:
        super().__init__()
        self.network, self.lr = network, lr

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.network(images), labels)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, labels = batch
        accuracy = (self.network(images).argmax(1) == labels).float().mean()
        self.log("val_acc", accuracy, batch_size=len(labels))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), self.lr)


pl.seed_everything(0)
# Random weights, so that nothing is downloaded. Pretrained ones, which take images of their size:
# timm.create_model("vit_small_patch16_224", pretrained=True, num_classes=10)
sizes = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 48, "depth": 4, "num_heads": 3}
network = timm.create_model("vit_tiny_patch16_224", num_classes=10, class_token=False, global_pool="avg", **sizes)
module = ImageClassifier(network, lr=3e-3)
data = DigitsDataModule()  # or your LightningDataModule

callback = CKACallback()  # finds the blocks, and compares them with what they were before the first step
trainer = pl.Trainer(max_epochs=4, devices=1, callbacks=[callback], log_every_n_steps=10, enable_checkpointing=False)
trainer.fit(module, data)

print(f"val_acc: {trainer.callback_metrics['val_acc']:.3f}")
