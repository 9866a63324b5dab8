"""Learn new digits without forgetting the old ones: roll back layers that drift too far on images of the old ones.

    python examples/forgetting.py

trains a small vision transformer on the digits 0 to 4, then on 5 to 9: once as it is, and once with DriftBudget. Prints
the accuracy on both, among the five digits of each task.
"""

import copy

import lightning.pytorch as pl
import timm
import torch
from torch import Tensor, nn

from lit_cka import DriftBudget
from lit_cka.data import DigitsDataModule

OLD, NEW = (0, 1, 2, 3, 4), (5, 6, 7, 8, 9)


class DigitClassifier(pl.LightningModule):
    """Told which five digits there are: a task has its own half of the logits."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        digits = NEW if int(batch[1][0]) in NEW else OLD
        return nn.functional.cross_entropy(self(batch[0])[:, digits], batch[1] - digits[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-3)

    @torch.no_grad()
    def accuracy(self, digits: tuple[int, ...]) -> float:
        images, labels = next(iter(data[digits].val_dataloader()))
        return float((self.eval()(images)[:, digits].argmax(1) + digits[0] == labels).float().mean())


pl.seed_everything(0)
data = {digits: DigitsDataModule(classes=digits) for digits in (OLD, NEW)}
for module in data.values():
    module.setup("fit")
options = {"devices": 1, "logger": False, "enable_checkpointing": False}
sizes = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 48, "depth": 4, "num_heads": 3}
network = timm.create_model("vit_tiny_patch16_224", num_classes=10, class_token=False, global_pool="avg", **sizes)
old = DigitClassifier(network)
pl.Trainer(max_epochs=8, **options).fit(old, data[OLD].train_dataloader())

budget = DriftBudget(0.1, action="roll_back", probe=[images for images, _ in data[OLD].train_dataloader()])
for name, callbacks in {"fine-tuned": [], "with DriftBudget": [budget]}.items():
    module = copy.deepcopy(old)
    pl.Trainer(max_epochs=6, callbacks=callbacks, **options).fit(module, data[NEW].train_dataloader())
    print(f"{name}: old digits {module.accuracy(OLD):.3f}, new digits {module.accuracy(NEW):.3f}")
