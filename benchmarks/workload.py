"""The training whose validations are measured: a classifier on random data, in Lightning."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from peers import pytorch_cka
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lit_cka import CKACallback
from lit_cka.features.extractor import FeatureExtractor

NUM_CLASSES = 10
NUM_TOKENS = 128  # of the language model's samples
# timm's names and the images' sizes.
IMAGE_MODELS = {
    "vit_tiny": ("vit_tiny_patch16_224", 64),
    "vit_b32": ("vit_base_patch32_224", 224),
    "vit_l14": ("vit_large_patch14_224", 224),
}
# Sizes of Llamas.
LANGUAGE_MODELS = {
    "llama_1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
                 "num_key_value_heads": 8, "vocab_size": 128256},
    "llama_tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
                   "num_key_value_heads": 2, "vocab_size": 1000},
}  # fmt: skip
MODELS = (*IMAGE_MODELS, *LANGUAGE_MODELS)


def new_network(name: str) -> nn.Module:
    """The network of this name, with random weights."""
    if name in IMAGE_MODELS:
        import timm

        timm_name, size = IMAGE_MODELS[name]
        return timm.create_model(timm_name, num_classes=NUM_CLASSES, img_size=size)
    from transformers import LlamaConfig, LlamaForSequenceClassification

    config = LlamaConfig(**LANGUAGE_MODELS[name], num_labels=NUM_CLASSES, pad_token_id=0)
    return LlamaForSequenceClassification(config)


def new_loader(name: str, num_samples: int, batch_size: int) -> DataLoader[tuple[Tensor, ...]]:
    """Random images (or tokens) with labels, in a fixed order."""
    generator = torch.Generator().manual_seed(0)
    if name in IMAGE_MODELS:
        size = IMAGE_MODELS[name][1]
        inputs = torch.randn(num_samples, 3, size, size, generator=generator)
    else:
        inputs = torch.randint(1, LANGUAGE_MODELS[name]["vocab_size"], (num_samples, NUM_TOKENS), generator=generator)
    labels = torch.randint(NUM_CLASSES, (num_samples,), generator=generator)
    return DataLoader(TensorDataset(inputs, labels), batch_size)


class Classifier(pl.LightningModule):
    """A classifier with a validation like any other, and a training step that changes nothing and costs nothing."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: Tensor) -> Tensor:
        output = self.network(inputs)
        return output if isinstance(output, Tensor) else output.logits

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        return 0 * next(self.parameters()).sum()

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        logits = self(batch[0])
        accuracy = (logits.argmax(dim=1) == batch[1]).float().mean()
        self.log_dict({"val_loss": cross_entropy(logits, batch[1]), "val_acc": accuracy})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class PeerAtEpochEnd(pl.Callback):
    """pytorch-cka as its users have it in Lightning: the live model against a frozen copy, when validation ends."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Classifier) -> None:
        self.frozen = copy.deepcopy(pl_module.network).requires_grad_(False).eval()
        self.layer_names = FeatureExtractor(pl_module.network).layer_names

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: Classifier) -> None:
        matrix = pytorch_cka(pl_module.network, self.frozen, trainer.val_dataloaders, self.layer_names)
        values = matrix.diagonal().tolist()
        self.log_dict({f"cka/{name}": value for name, value in zip(self.layer_names, values, strict=True)})


VARIANTS = {
    "bare": "bare",
    "tracked": "tracked",
    "no_intervals": "tracked, without intervals",
    "figures": "tracked, with figures",
    "in_file": "tracked, recording in a file",
    "peer": "pytorch-cka at epoch end",
}


RECORDING = {"tracked", "no_intervals", "figures", "in_file"}  # the variants that record before the first batch


def new_callbacks(variant: str) -> list[pl.Callback]:
    """The callbacks of one of `VARIANTS`."""
    if variant == "tracked":
        return [CKACallback(log_figures=False)]
    if variant == "no_intervals":
        return [CKACallback(log_figures=False, intervals=False)]
    if variant == "figures":
        return [CKACallback()]
    if variant == "in_file":
        return [CKACallback(log_figures=False, cache_memory=0)]
    return [PeerAtEpochEnd()] if variant == "peer" else []


def fit(
    network: nn.Module,
    loader: DataLoader[tuple[Tensor, ...]],
    callbacks: list[pl.Callback],
    epochs: int,
    folder: Path,
    around_pass: Callable[[Callable[[], Any]], Any],
    before_step: Callable[[], None] = lambda: None,
    device: str = "cpu",
    precision: Any = "32-true",
    devices: int = 1,
    strategy: Any = "auto",
) -> None:
    """A `fit` with one validation an epoch.

    Args:
        network: in the classifier.
        loader: of the training, one batch an epoch, and of the validation.
        callbacks: of the trainer.
        epochs: how many validations.
        folder: for logs.
        around_pass: called as `around_pass(run)` for each validation, all of it, its logging included; before these
            for the recording, if one of the callbacks records.
        before_step: called before each of their steps.
        device: "cpu" or "cuda".
        precision: of the trainer.
        devices: of the trainer.
        strategy: of the trainer.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    trainer = pl.Trainer(
        accelerator="gpu" if device == "cuda" else device,
        devices=devices,
        strategy=strategy,
        max_epochs=epochs,
        precision=precision,
        limit_train_batches=1,
        num_sanity_val_steps=0,
        callbacks=callbacks,
        logger=TensorBoardLogger(folder),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    fit_loop: Any = trainer.fit_loop
    loop = fit_loop.epoch_loop.val_loop
    start, step = fit_loop.on_run_start, loop._evaluation_step
    records = any(isinstance(callback, CKACallback) for callback in callbacks)

    def paced_start() -> None:  # the hooks `on_train_start`, in which the reference is recorded
        around_pass(start) if records else start()
        run = loop.run  # as the callbacks have it by now
        loop.run = lambda: around_pass(run)

    def paced_step(*args: Any) -> Any:
        before_step()
        return step(*args)

    fit_loop.on_run_start, loop._evaluation_step = paced_start, paced_step
    trainer.fit(Classifier(network), loader, loader)
