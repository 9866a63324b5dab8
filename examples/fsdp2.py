"""A model whose weights two processes share by FSDP2, tracked as one process would track it whole.

    python examples/fsdp2.py

takes two GPUs where there are two, else two processes on the CPU. Lightning starts the second process. The first prints
the table of `CKACallback`: each validation image counts once, whichever process has it.
"""

import lightning.pytorch as pl
import timm
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from lit_cka import CKACallback
from lit_cka.data import DigitsDataModule


class ShardedClassifier(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        # A pretrained one: timm.create_model("vit_small_patch16_224", pretrained=True, num_classes=10)
        sizes = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 48, "depth": 4, "num_heads": 3}
        options = {"num_classes": 10, "class_token": False, "global_pool": "avg", **sizes}
        self.network = timm.create_model("vit_tiny_patch16_224", **options)

    def configure_model(self) -> None:
        """Shards each block, and what is left as one more; Lightning calls it again for a test, hence the check."""
        if not isinstance(self.network, FSDPModule):
            for part in (*self.network.blocks, self.network):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.network(images), labels)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, labels = batch
        accuracy = (self.network(images).argmax(1) == labels).float().mean()
        self.log("val_acc", accuracy, batch_size=len(labels), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 3e-3)


pl.seed_everything(0)
trainer = pl.Trainer(
    max_epochs=6,
    accelerator="gpu" if torch.cuda.device_count() >= 2 else "cpu",
    devices=2,
    strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
    callbacks=[CKACallback()],
    logger=False,
    enable_checkpointing=False,
)
trainer.fit(ShardedClassifier(), DigitsDataModule())
if trainer.is_global_zero:
    print(f"val_acc: {trainer.callback_metrics['val_acc']:.3f}")
