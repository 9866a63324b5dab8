"""Folders of images, one subfolder a class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from typing_extensions import override

from lit_cka.data.from_model import attached_model, transform_of
from lit_cka.data.parts import NEEDED, PartsDataModule


class ImageFolderDataModule(PartsDataModule):
    """Images from `root/train`, `root/val` and `root/test`, each with a subfolder per class (torchvision's layout).

    The preprocessing is the model's: the LightningModule's `train_transform` and `eval_transform`, which
    `lit_cka.models` take from timm or open_clip.

    Args:
        root: the folder.
        batch_size: images per batch.
        num_workers: processes that load images.
        train: subfolder to train on.
        val: subfolder to validate on.
        test: subfolder to test and predict on.

    Raises:
        FileNotFoundError: if a subfolder that is needed is missing.
        ValueError: if the subfolders have different classes.

    Example:
        >>> data = ImageFolderDataModule("flowers", batch_size=32)  # of flowers/train/rose/1.jpg, flowers/val/..., ...
        >>> data.folders
        {'train': 'train', 'val': 'val', 'test': 'test'}
    """

    def __init__(
        self, root: str, batch_size: int = 64, num_workers: int = 4, train: str = "train", val: str = "val",
        test: str = "test",
    ) -> None:  # fmt: skip
        super().__init__()
        self.root = Path(root)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.folders = {"train": train, "val": val, "test": test}

    @override
    def setup(self, stage: str) -> None:
        needed = NEEDED[stage]
        missing = [
            str(self.root / self.folders[part]) for part in needed if not (self.root / self.folders[part]).is_dir()
        ]
        if missing:
            raise FileNotFoundError(
                f"Expected a folder of images, with a subfolder for each class, at {', '.join(missing)}."
            )
        self._sets = {part: self._read(part) for part in needed}
        lone = set.symmetric_difference(*(set(self._sets[part].classes) for part in (needed[0], needed[-1])))
        if lone:
            folders = " and ".join(repr(self.folders[part]) for part in needed)
            raise ValueError(f"Expected {folders} to have the same classes, but only one of them has {sorted(lone)}.")

    def _read(self, part: str) -> ImageFolder:
        transform = transform_of(attached_model(self), "train_transform" if part == "train" else "eval_transform")
        return ImageFolder(str(self.root / self.folders[part]), transform)

    @override
    def loader(self, part: str) -> DataLoader[Any]:
        return DataLoader(
            self._sets[part],
            self.batch_size,
            shuffle=part == "train",
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )
