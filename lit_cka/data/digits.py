"""The handwritten digits that ship with scikit-learn: data for a demo without any download."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from lit_cka.data.parts import PartsDataModule


class DigitsDataModule(PartsDataModule):
    """1,797 images (1, 8, 8) in [-1, 1] of the digits 0 to 9, of which `classes` are used. Labels stay 0 to 9.

    Alpaydin & Kaynak 1998, by `sklearn.datasets.load_digits`. Every class is split 60 : 20 : 20 into train, val and
    test, always in the same way.

    Args:
        classes: the digits to use.
        batch_size: images per batch.
    """

    def __init__(self, classes: Sequence[int] = tuple(range(10)), batch_size: int = 64) -> None:
        super().__init__()
        if not classes or not set(classes) <= set(range(10)):
            raise ValueError(f"Expected `classes` to be digits from 0 to 9, but got {list(classes)}.")
        self.classes = sorted(set(classes))
        self.batch_size = batch_size

    @override
    def setup(self, stage: str) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
        labels = torch.tensor(digits.target)
        parts: dict[str, list[torch.Tensor]] = {"train": [], "val": [], "test": []}
        generator = torch.Generator().manual_seed(0)
        for digit in self.classes:
            indices = (labels == digit).nonzero().flatten()
            indices = indices[torch.randperm(len(indices), generator=generator)]
            sizes = [round(0.6 * len(indices)), round(0.2 * len(indices))]
            for part, chosen in zip(parts.values(), indices.tensor_split([sizes[0], sum(sizes)]), strict=True):
                part.append(chosen)
        self._sets = {
            name: TensorDataset(images[torch.cat(part)], labels[torch.cat(part)]) for name, part in parts.items()
        }

    @override
    def loader(self, part: str) -> DataLoader[tuple[torch.Tensor, ...]]:
        train = part == "train"
        return DataLoader(self._sets[part], self.batch_size if train else 4 * self.batch_size, shuffle=train)
