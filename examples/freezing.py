"""Freeze what fine-tuning leaves untouched, as CKA says, and fine-tune again.

    python examples/freezing.py

trains a small vision transformer to read digits, fine-tunes it to tell odd from even ones, and does so again with the
first blocks frozen that kept a CKA of 0.99. Prints the accuracy and how many parameters were trained in each.
"""

import copy
from itertools import takewhile

import lightning.pytorch as pl
import timm
import torch
from torch import Tensor, nn

from lit_cka import CKACallback
from lit_cka.data import DigitsDataModule


class DigitClassifier(pl.LightningModule):
    def __init__(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        super().__init__()
        self.network, self.optimizer = network, optimizer

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1] % self.network.num_classes)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        accuracy = (self.network(batch[0]).argmax(1) == batch[1] % self.network.num_classes).float().mean()
        self.log("val_acc", accuracy, batch_size=len(batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer


def fine_tune(network: nn.Module, *callbacks: pl.Callback) -> None:
    """Train what is not frozen to tell odd from even digits, and print how that went."""
    trained = [p for p in network.parameters() if p.requires_grad]
    trainer = pl.Trainer(max_epochs=2, callbacks=list(callbacks), **options)
    trainer.fit(DigitClassifier(network, torch.optim.SGD(trained, 1e-3, momentum=0.9)), data)
    print(f"val_acc {trainer.callback_metrics['val_acc']:.3f}, {sum(p.numel() for p in trained)} parameters trained")


pl.seed_everything(0)
data, options = DigitsDataModule(), {"devices": 1, "logger": False, "enable_checkpointing": False}
# A pretrained one, without the training below: timm.create_model("vit_small_patch16_224", pretrained=True)
sizes = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 48, "depth": 4, "num_heads": 3}
pretrained = timm.create_model("vit_tiny_patch16_224", num_classes=10, class_token=False, global_pool="avg", **sizes)
optimizer = torch.optim.AdamW(pretrained.parameters(), 3e-3)
pl.Trainer(max_epochs=6, **options).fit(DigitClassifier(pretrained, optimizer), data)
pretrained.reset_classifier(2)

fine_tune(copy.deepcopy(pretrained), callback := CKACallback("network.blocks.*"))
num_untouched = len(list(takewhile(lambda score: score >= 0.99, callback.scores.values())))
print(f"{num_untouched} of {len(callback.scores)} blocks stayed untouched")
frozen = copy.deepcopy(pretrained)
for part in (frozen.patch_embed, frozen.pos_embed, *frozen.blocks[:num_untouched]) if num_untouched else ():
    part.requires_grad_(False)
fine_tune(frozen)
