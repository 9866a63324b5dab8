"""The handwritten digits that ship with scikit-learn: data for a demo without any download."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from lit_cka.data.digit_versions import AtRandom
from lit_cka.data.parts import PartsDataModule


class DigitsDataModule(PartsDataModule):
    """1,797 images (1, 8, 8) in [-1, 1] of the digits 0 to 9, of which `classes` are used. Labels stay 0 to 9.

    Alpaydin & Kaynak 1998, by `sklearn.datasets.load_digits`. Every class is split 60 : 20 : 20 into train, val and
    test, always in the same way.

    Args:
        classes: the digits to use.
        batch_size: images per batch.
        num_train: so many images of each class to train on at most; None for all.
        shifted: train on images of which each is, another one each time, as it is, rotated, noisy or blurred.
        seed: of which images of the training part those are, and of how they are shifted.

    Example:
        >>> data = DigitsDataModule(classes=[3, 8], batch_size=16)
        >>> data.setup("fit")
        >>> images, labels = next(iter(data.train_dataloader()))
        >>> images.shape, sorted(set(labels.tolist()))
        (torch.Size([16, 1, 8, 8]), [3, 8])
    """

    def __init__(
        self,
        classes: Sequence[int] = tuple(range(10)),
        batch_size: int = 64,
        num_train: int | None = None,
        shifted: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if num_train is not None and num_train < 1:
            raise ValueError(f"Expected `num_train` to be at least 1, or None, but got {num_train}.")
        if not classes or not set(classes) <= set(range(10)):
            raise ValueError(f"Expected `classes` to be digits from 0 to 9, but got {list(classes)}.")
        self.classes = sorted(set(classes))
        self.batch_size = batch_size
        self.num_train = num_train
        self.shifted = shifted
        self.seed = seed

    @override
    def setup(self, stage: str) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
        labels = torch.tensor(digits.target)
        parts: dict[str, list[torch.Tensor]] = {"train": [], "val": [], "test": []}
        generator = torch.Generator().manual_seed(0)
        of_train = torch.Generator().manual_seed(self.seed)
        for digit in self.classes:
            indices = (labels == digit).nonzero().flatten()
            indices = indices[torch.randperm(len(indices), generator=generator)]
            sizes = [round(0.6 * len(indices)), round(0.2 * len(indices))]
            for part, chosen in zip(parts.values(), indices.tensor_split([sizes[0], sum(sizes)]), strict=True):
                part.append(chosen)
            if self.num_train is not None:
                train = parts["train"].pop()
                parts["train"].append(train[torch.randperm(len(train), generator=of_train)[: self.num_train]])
        self._sets = {
            name: TensorDataset(images[torch.cat(part)], labels[torch.cat(part)]) for name, part in parts.items()
        }

    @override
    def loader(self, part: str) -> DataLoader[tuple[torch.Tensor, ...]]:
        train = part == "train"
        return DataLoader(
            self._sets[part],
            self.batch_size if train else 4 * self.batch_size,
            shuffle=train,
            collate_fn=AtRandom(self.seed) if train and self.shifted else None,
        )
