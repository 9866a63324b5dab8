"""Image models and images for a comparison: `ImageModel`, `ImageFiles`, `Digits`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lit_cka.analysis.extraction import extract
from lit_cka.analysis.features import Features
from lit_cka.analysis.texts import Samples
from lit_cka.data.from_model import transform_of
from lit_cka.features.layers import Layers
from lit_cka.features.pooling import Pooling


class ImageModel:
    """A network for images, with its preprocessing.

    Args:
        model: the network, such as a `lit_cka.models.ImageClassifier`. Its `eval_transform` is the preprocessing.
        name: for tables and figures; None for the class's.
        layers: see `lit_cka.features.select_layers`; None for the repeated blocks.
        pooling: as in `FeatureExtractor`.
        batch_size: images per batch.
        num_workers: processes that load images.
        device: where to run; None for where the model is.

    Example:
        >>> from lit_cka.models import ImageClassifier
        >>> size = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "in_chans": 1}
        >>> model = ImageModel(ImageClassifier("vit_tiny_patch16_224", 10, model_kwargs=size), name="vit")
        >>> model.name
        'vit'
    """

    def __init__(
        self,
        model: nn.Module,
        name: str | None = None,
        layers: str | list[str] | None = None,
        pooling: str = "mean",
        batch_size: int = 64,
        num_workers: int = 0,
        device: str | None = None,
    ) -> None:
        self.model = model
        self.name = name or type(model).__name__
        self.layers: Layers | None = layers
        self.pooling: Pooling = pooling
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.device = device

    def features(self, samples: Samples, *, progress: bool = True, distributed: bool = False) -> Features:
        """Returns the features of all images, which are tensors, or paths of files; on several ranks if `distributed`.

        Raises:
            ValueError: if there are files to read, and the model has no `eval_transform`.
        """
        transform = None
        if not all(isinstance(item, Tensor) for item in samples.items):
            transform = transform_of(self.model, "eval_transform", whose=repr(self.name))
        loader: DataLoader[Any] = DataLoader(
            _Images(samples, transform),  # type: ignore[arg-type]  # with a length and items it is a dataset
            self.batch_size,
            num_workers=self.num_workers,
            collate_fn=_collate,
        )
        return extract(
            self.model, loader, layers=self.layers, pooling=self.pooling, device=self.device,
            ids=samples.ids, name=self.name, data=samples.name, progress=progress, distributed=distributed,
        )  # fmt: skip


class _Images:
    def __init__(self, samples: Samples, transform: Callable[[Any], Tensor] | None) -> None:
        self.samples = samples
        self.transform = transform

    def __len__(self) -> int:
        return len(self.samples.ids)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        item = self.samples.items[index]
        if not isinstance(item, Tensor):
            from PIL import Image

            assert self.transform is not None
            with Image.open(item) as image:
                item = self.transform(image.convert("RGB"))
        return item, self.samples.labels[index] if self.samples.labels else None


def _collate(items: Sequence[tuple[Tensor, Any]]) -> tuple[Tensor, list[Any]]:
    images, labels = zip(*items, strict=True)
    return torch.stack(images), [label for label in labels if label is not None]


class ImageFiles:
    """The images below a folder; labels are the names of its subfolders, ids the paths below it.

    Args:
        root: the folder.
        num_samples: so many of them, drawn at random but always the same; None for all.
        name: for tables and figures; None for the folder's.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from PIL import Image
        >>> with TemporaryDirectory() as folder:
        ...     Image.new("RGB", (8, 8)).save(f"{folder}/one.png")
        ...     images = ImageFiles(folder, name="mine").read()
        >>> images.name
        'mine'
    """

    def __init__(self, root: str, num_samples: int | None = None, name: str | None = None) -> None:
        self.root = Path(root)
        if num_samples is not None and num_samples < 1:
            raise ValueError(f"Expected `num_samples` of 1 or more, but got {num_samples}.")
        self.num_samples = num_samples
        self.name = name or self.root.resolve().name

    def read(self) -> Samples:
        """Returns the files as samples.

        Raises:
            FileNotFoundError: if there is no such folder, or there are no images in it.
        """
        from torchvision.datasets.folder import IMG_EXTENSIONS

        files = sorted(path for path in self.root.rglob("*") if path.suffix.lower() in IMG_EXTENSIONS)
        if not files:
            raise FileNotFoundError(f"Expected images below {str(self.root)!r}, but found none.")
        if self.num_samples is not None and self.num_samples < len(files):
            order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0))[: self.num_samples]
            files = [files[index] for index in sorted(order.tolist())]
        ids = [path.relative_to(self.root).as_posix() for path in files]
        return Samples(ids, files, [path.parent.name for path in files], self.name)


class Digits:
    """The digits that ship with scikit-learn, as tensors (1, 8, 8) in [-1, 1]; see `DigitShiftsDataModule`.

    Args:
        classes: the digits to use.
        shift: "digits" for them as they are, or "rotated", "noisy", "blurred".
        name: for tables and figures; None for the shift's.

    Example:
        >>> Digits(classes=[3, 8], shift="noisy").name
        'noisy'
    """

    def __init__(
        self, classes: Sequence[int] = tuple(range(10)), shift: str = "digits", name: str | None = None
    ) -> None:
        self.classes = tuple(classes)
        self.shift = shift
        self.name = name or shift

    def read(self) -> Samples:
        """Returns the test part.

        Raises:
            ValueError: if there is no such shift.
        """
        from lit_cka.data.digit_shifts import DigitShiftsDataModule

        data = DigitShiftsDataModule(classes=list(self.classes))
        data.setup("test")
        if self.shift not in data.test_names:
            raise ValueError(f"Expected `shift` to be one of {', '.join(data.test_names)}, but got {self.shift!r}.")
        dataset: Any = data.test_sets[data.test_names.index(self.shift)].dataset
        images, labels = zip(*(dataset[index] for index in range(len(dataset))), strict=True)
        ids = [f"{','.join(map(str, sorted(set(self.classes))))} {index}" for index in range(len(images))]
        return Samples(ids, list(images), [int(y) for y in labels], self.name)
