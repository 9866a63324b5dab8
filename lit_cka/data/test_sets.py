"""Several test sets for one model: the first like its training data, the others shifted."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from lit_cka.data.from_model import attached_model, transform_of


@dataclass(frozen=True)
class TestSet:
    """A test set, and how to read a model's logits on it.

    Attributes:
        name: for tables and files.
        dataset: of items `(input, label)`.
        to_classes: from the model's logits (n, model classes) to logits (n, classes of this set), which the labels
            count; None: as they are.
        collate: from a list of items to a batch; None for torch's default.
        groups: of each item, in order, what it was made from, such as the number of an image that is there in several
            versions, here or in other sets: items of a group are not independent. None: each is.

    Example:
        >>> import torch
        >>> dataset = [(torch.zeros(3), 0), (torch.ones(3), 1)]
        >>> half = TestSet("two of three classes", dataset, to_classes=lambda logits: logits[:, :2])
        >>> half.to_classes(torch.zeros(5, 3)).shape
        torch.Size([5, 2])
    """

    __test__: ClassVar[bool] = False  # for pytest, which takes every class Test... for a test

    name: str
    dataset: Dataset[Any]
    to_classes: Callable[[Tensor], Tensor] | None = None
    collate: Callable[[list[Any]], Any] | None = None
    groups: Tensor | None = None


class TestSetsDataModule(pl.LightningDataModule):
    """Test sets, the first in-distribution, all others shifted. A subclass has `read_test_sets`.

    Args:
        batch_size: inputs per batch.
        num_workers: processes that load inputs.

    Attributes:
        test_sets: after `setup`, in the order of the dataloaders.

    Example:
        >>> class Squares(TestSetsDataModule):
        ...     def read_test_sets(self):
        ...         return [TestSet("squares", [(torch.tensor([2.0]), 4), (torch.tensor([3.0]), 9)])]
        >>> data = Squares(batch_size=2)
        >>> data.setup("test")
        >>> data.test_names
        ['squares']
    """

    __test__: ClassVar[bool] = False

    def __init__(self, batch_size: int = 64, num_workers: int = 0) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.test_sets: list[TestSet] = []

    @abstractmethod
    def read_test_sets(self) -> list[TestSet]:
        """Returns the test sets, the one in-distribution first."""

    @property
    def test_names(self) -> list[str]:
        """The names of the test sets, in order."""
        return [test_set.name for test_set in self.test_sets]

    @override
    def setup(self, stage: str) -> None:
        """Read the test sets.

        Raises:
            ValueError: if there is none, or two have the same name.
        """
        test_sets = self.read_test_sets()
        names = [test_set.name for test_set in test_sets]
        if not names:
            raise ValueError("Expected at least one test set, but got none.")
        if len(set(names)) < len(names):
            raise ValueError(f"Expected the names of test sets to differ, but got {names}.")
        self.test_sets = test_sets

    @override
    def test_dataloader(self) -> list[DataLoader[Any]]:
        """Returns a DataLoader for each test set, in order; none is shuffled."""
        return [
            DataLoader(
                test_set.dataset,
                self.batch_size,
                num_workers=self.num_workers,
                collate_fn=test_set.collate,
                pin_memory=torch.cuda.is_available(),
            )
            for test_set in self.test_sets
        ]

    def _eval_transform(self, num_classes: int) -> Callable[[Any], Any]:
        """Returns the LightningModule's preprocessing. A head of other than `num_classes` classes is an error: it would
        be scored by labels that mean other classes.
        """
        model = attached_model(self)
        transform = transform_of(model, "eval_transform")
        classes = getattr(model, "num_classes", num_classes)
        if classes != num_classes:
            raise ValueError(f"Expected a model of the test sets' {num_classes} classes, but it has {classes}.")
        return transform


class LabelledImages(Dataset[tuple[Any, int]]):
    """The images below some subfolders of a folder, each with its subfolder's label.

    Unlike with torchvision's `ImageFolder`, labels do not follow from which subfolders there are and how they sort.

    Args:
        folder: where the subfolders are.
        labels: of each subfolder to read.
        transform: the preprocessing of an image.
        border: so many pixels are cut off at each side of an image before its preprocessing.

    Raises:
        FileNotFoundError: if a subfolder has no images.
    """

    def __init__(
        self, folder: Path, labels: Mapping[str, int], transform: Callable[[Any], Any], border: int = 0
    ) -> None:
        from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

        self.samples: list[tuple[str, int]] = make_dataset(str(folder), dict(labels), IMG_EXTENSIONS)
        self.transform = transform
        self.border = border

    def __len__(self) -> int:
        return len(self.samples)

    @override
    def __getitem__(self, index: int) -> tuple[Any, int]:
        from torchvision.datasets.folder import default_loader

        path, label = self.samples[index]
        image = default_loader(path)
        if self.border:
            image = image.crop((self.border, self.border, image.width - self.border, image.height - self.border))
        return self.transform(image), label


def class_folders(folder: Path) -> list[str]:
    """Returns the sorted names of the subfolders, without hidden ones; none if there is no such folder."""
    if not folder.is_dir():
        return []
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


class ImageFolderTestsDataModule(TestSetsDataModule):
    """Any folders of images as test sets, each with a subfolder per class; the first is in-distribution.

    A class's label is its place among the sorted classes of the first folder, in all folders, so the first needs the
    classes that the model was trained on. The others may have fewer. The preprocessing is the LightningModule's
    `eval_transform`.

    Args:
        folders: the folder of each test set by its name.
        batch_size: images per batch.
        num_workers: processes that load images.

    Raises:
        FileNotFoundError: if folders are missing or have no subfolders.
        ValueError: if a folder has classes that the first has not, or the model has another number of classes.

    Example:
        >>> data = ImageFolderTestsDataModule({"clean": "test", "sketches": "sketch"})  # of test/rose/1.jpg, ...
        >>> list(data.folders)
        ['clean', 'sketches']
    """

    def __init__(self, folders: dict[str, str], batch_size: int = 64, num_workers: int = 4) -> None:
        super().__init__(batch_size, num_workers)
        self.folders = {name: Path(folder).expanduser() for name, folder in folders.items()}

    @override
    def read_test_sets(self) -> list[TestSet]:
        classes = {name: class_folders(folder) for name, folder in self.folders.items()}
        missing = [f"{name} at {self.folders[name]}" for name, found in classes.items() if not found]
        if missing:
            raise FileNotFoundError(
                f"Expected folders of images, with a subfolder for each class, but there is no {', no '.join(missing)}."
            )
        labels = {name: label for label, name in enumerate(next(iter(classes.values()), []))}
        for name, found in classes.items():
            unknown = sorted(set(found) - set(labels))
            if unknown:
                first = next(iter(self.folders))
                raise ValueError(f"Expected all classes of {name} to be among those of {first}, but got {unknown}.")
        transform = self._eval_transform(len(labels))
        return [
            TestSet(name, LabelledImages(folder, {found: labels[found] for found in classes[name]}, transform))
            for name, folder in self.folders.items()
        ]
