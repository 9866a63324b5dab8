"""Handwritten digits that no training sees, and the same images rotated, noisy and blurred."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch.utils.data import TensorDataset
from typing_extensions import override

from lit_cka.data.digit_versions import SHIFTS, shifted_versions
from lit_cka.data.digits import DigitsDataModule
from lit_cka.data.test_sets import TestSet, TestSetsDataModule


class DigitShiftsDataModule(TestSetsDataModule):
    """The test part of `DigitsDataModule` as "digits", and three shifts of it: "rotated", "noisy" and "blurred".

    Images (1, 8, 8) stay in [-1, 1], and are the same every time; see `shifted_versions`. All versions of an image have
    the same number in the test sets' `groups`: an interval that is to hold for other images draws images, not versions.

    Args:
        classes: the digits to use.
        batch_size: images per batch.
        parts: of `DigitsDataModule`; "val" in addition doubles the images, where no training has looked at it.
        draws: how often each image is rotated, by another angle, and made noisy.

    Raises:
        ValueError: if `draws` is below 1, or a part is none.

    Example:
        >>> data = DigitShiftsDataModule(classes=[3, 8])
        >>> data.setup("test")
        >>> data.test_names
        ['digits', 'rotated', 'noisy', 'blurred']
    """

    def __init__(
        self,
        classes: Sequence[int] = tuple(range(10)),
        batch_size: int = 256,
        parts: Sequence[str] = ("test",),
        draws: int = 1,
    ) -> None:
        super().__init__(batch_size)
        if draws < 1:
            raise ValueError(f"Expected `draws` to be at least 1, but got {draws}.")
        if not parts or not set(parts) <= {"train", "val", "test"} or len(set(parts)) < len(parts):
            raise ValueError(f"Expected `parts` to be some of train, val and test, each once, but got {list(parts)}.")
        self.digits = DigitsDataModule(classes)
        self.parts = tuple(parts)
        self.draws = draws

    @override
    def read_test_sets(self) -> list[TestSet]:
        self.digits.setup("test")
        sets = [cast(TensorDataset, self.digits.loader(part).dataset).tensors for part in self.parts]
        images, labels = (torch.cat(each) for each in zip(*sets, strict=True))
        generator = torch.Generator().manual_seed(0)
        draws = [shifted_versions(images, generator) for _ in range(self.draws)]
        groups = torch.arange(len(images))
        found = [TestSet("digits", TensorDataset(images, labels), groups=groups)]
        for name in SHIFTS:
            drawn = [versions[name] for versions in draws[: 1 if name == "blurred" else None]]  # which is always alike
            several = TensorDataset(torch.cat(drawn), labels.repeat(len(drawn)))
            found.append(TestSet(name, several, groups=groups.repeat(len(drawn))))
        return found
