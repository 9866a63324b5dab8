"""What all data modules share: three parts, of which each stage needs some."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import lightning.pytorch as pl
from torch.utils.data import DataLoader
from typing_extensions import override

NEEDED = {"fit": ["train", "val"], "validate": ["val"], "test": ["test"], "predict": ["test"]}


class PartsDataModule(pl.LightningDataModule):
    """Data in the parts "train", "val" and "test"; the last is for `predict`, too."""

    @abstractmethod
    def loader(self, part: str) -> DataLoader[Any]:
        """Returns the DataLoader of a part, shuffled if it is "train"."""

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        return self.loader("train")

    @override
    def val_dataloader(self) -> DataLoader[Any]:
        return self.loader("val")

    @override
    def test_dataloader(self) -> DataLoader[Any]:
        return self.loader("test")

    @override
    def predict_dataloader(self) -> DataLoader[Any]:
        return self.loader("test")
