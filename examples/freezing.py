"""Freeze the first blocks once they change little beside the others, and save the time of their backward.

    python examples/freezing.py

trains a small vision transformer to read digits, and fine-tunes it to tell odd from even ones, twice: everything, and
with FreezeConverged, which also keeps what the frozen blocks return. Prints the accuracy and the FLOPs saved of both.
"""

import copy

import lightning.pytorch as pl
import timm
import torch
from torch import Tensor, nn

from lit_cka import FreezeConverged
from lit_cka.data import DigitsDataModule


class DigitClassifier(pl.LightningModule):
    def __init__(self, network: nn.Module, lr: float) -> None:
        super().__init__()
        self.network, self.lr = network, lr

    def loss_and_accuracy(self, batch: list[Tensor]) -> tuple[Tensor, Tensor]:
        logits, labels = self.network(batch[0]), batch[1] % self.network.num_classes
        return nn.functional.cross_entropy(logits, labels), (logits.argmax(1) == labels).float().mean()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss_and_accuracy(batch)[0]

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        loss, accuracy = self.loss_and_accuracy(batch)
        self.log_dict({"val_loss": loss, "val_acc": accuracy}, batch_size=len(batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), self.lr)


pl.seed_everything(0)
data, options = DigitsDataModule(), {"devices": 1, "logger": False, "enable_checkpointing": False}
# A pretrained one, without the training below: timm.create_model("vit_small_patch16_224", pretrained=True)
sizes = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 48, "depth": 4, "num_heads": 3}
pretrained = timm.create_model("vit_tiny_patch16_224", num_classes=10, class_token=False, global_pool="avg", **sizes)
pl.Trainer(max_epochs=6, **options).fit(DigitClassifier(pretrained, 3e-3), data)
pretrained.reset_classifier(2)

# With share=1, the default, nothing is frozen here: in a network of this size, trained for seconds, all has to learn.
freeze = FreezeConverged(share=2, cache="memory")
for name, callbacks in {"everything trained": [], "FreezeConverged": [freeze]}.items():
    module = DigitClassifier(copy.deepcopy(pretrained), 3e-4)
    trainer = pl.Trainer(max_epochs=6, callbacks=callbacks, **options)
    trainer.fit(module, data)
    print(f"{name}: val_acc {trainer.callback_metrics['val_acc']:.3f}")
print(f"{100 * freeze.flops_saved:.0f} % of the FLOPs saved, {freeze.num_frozen} of 4 blocks frozen in the end")
