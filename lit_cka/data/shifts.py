"""ImageNet and five shifts of it: ImageNetV2, Sketch, ImageNet-R, ObjectNet, ImageNet-A."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from typing_extensions import override

from lit_cka.data.imagenet_classes import (
    NUM_CLASSES,
    OBJECTNET_FILES,
    MaxOverClasses,
    guessed_labels,
    imagenet_synsets,
    labels_by_index,
    labels_by_synset,
    objectnet_classes,
    subset_synsets,
)
from lit_cka.data.test_sets import LabelledImages, TestSet, TestSetsDataModule, class_folders
from lit_cka.parallel.warning import warn

# The first of them that has subfolders is read. model-soups and wise-ft have the same, but for the second of Sketch.
FOLDERS = {
    "ImageNet": ("imagenet/val", "imagenet/val_in_folder"),
    "ImageNetV2": ("imagenetv2-matched-frequency-format-val",),
    "ImageNetSketch": ("sketch/val", "sketch", "imagenet-sketch"),
    "ImageNetR": ("imagenet-r",),
    "ObjectNet": ("objectnet-1.0/images",),
    "ImageNetA": ("imagenet-a",),
}
_MAPPINGS = "objectnet-1.0/mappings"
_OBJECTNET_IMAGES = 18_574


class ImageNetShiftsDataModule(TestSetsDataModule):
    """ImageNet's validation set and shifts of it, for models of ImageNet's 1000 classes.

    Below `root`, as for model-soups and wise-ft, are folders with a subfolder per class:

    | set | folder | subfolders | scored among |
    |---|---|---|---|
    | ImageNet | `imagenet/val` | synsets | 1000 classes |
    | ImageNetV2 | `imagenetv2-matched-frequency-format-val` | class indices | 1000 |
    | ImageNetSketch | `sketch`, `sketch/val` or `imagenet-sketch` | synsets | 1000 |
    | ImageNetR, ImageNetA | `imagenet-r`, `imagenet-a` | synsets | their 200 |
    | ObjectNet | `objectnet-1.0/images` | objects | the 113 that both have |

    ObjectNet also takes the folder `objectnet-1.0/mappings` of its download. Its other classes are left out, and so is
    the border of 2 pixels around each image; a class's logit is the largest among the ImageNet classes that it means.
    Labels follow from the names of subfolders, so part of a set will do. The preprocessing is the LightningModule's
    `eval_transform`.

    Args:
        root: the folder.
        sets: which sets, the one in-distribution first.
        extra: further shifted sets by name, each a folder of images. Subfolders are named by synset or class index; or
            they are 1000 whose sorted order is that of the classes.
        batch_size: images per batch.
        num_workers: processes that load images.

    Raises:
        FileNotFoundError: if folders or files are missing; it names them all.
        ValueError: if a set is unknown, a subfolder is no class, or the model has other than 1000 classes.

    Example:
        >>> data = ImageNetShiftsDataModule("data", sets=["ImageNet", "ImageNetR"])
        >>> data.sets
        ('ImageNet', 'ImageNetR')
    """

    def __init__(
        self,
        root: str,
        sets: Sequence[str] = tuple(FOLDERS),
        extra: dict[str, str] | None = None,
        batch_size: int = 64,
        num_workers: int = 4,
    ) -> None:
        super().__init__(batch_size, num_workers)
        unknown = [name for name in sets if name not in FOLDERS]
        if unknown:
            raise ValueError(f"Expected `sets` to be among {', '.join(FOLDERS)}, but got {unknown}.")
        self.root = Path(root).expanduser()
        self.sets = tuple(sets)
        self.extra = {name: Path(folder).expanduser() for name, folder in (extra or {}).items()}

    @override
    def read_test_sets(self) -> list[TestSet]:
        folders = self._find()
        transform = self._eval_transform(NUM_CLASSES)
        test_sets = [self._read(name, folder, transform) for name, folder in zip(self.sets, folders, strict=True)]
        for name, folder in self.extra.items():
            labels = guessed_labels(name, class_folders(folder), imagenet_synsets())
            test_sets.append(TestSet(name, LabelledImages(folder, labels, transform)))
        return test_sets

    def _find(self) -> list[Path]:
        """Returns the folder of each of `sets`; raises a FileNotFoundError that names all that is missing."""
        candidates = [(name, [self.root / folder for folder in FOLDERS[name]]) for name in self.sets]
        candidates += [(name, [folder]) for name, folder in self.extra.items()]
        found = [next((folder for folder in places if class_folders(folder)), None) for _, places in candidates]
        missing = [
            f"{name}: {' or '.join(map(str, places))}"
            for (name, places), folder in zip(candidates, found, strict=True)
            if folder is None
        ]
        if "ObjectNet" in self.sets:
            mappings = [self.root / _MAPPINGS / file for file in OBJECTNET_FILES]
            missing += [f"ObjectNet's mapping: {file}" for file in mappings if not file.is_file()]
        if missing:
            raise FileNotFoundError(
                "Expected folders of images, with a subfolder for each class, but these are missing:\n  "
                + "\n  ".join(missing)
                + "\nName the sets that are there by `sets=` to leave the others out."
            )
        return [folder for folder in found[: len(self.sets)] if folder is not None]

    def _read(self, name: str, folder: Path, transform: Callable[[Any], Any]) -> TestSet:
        names = class_folders(folder)
        if name == "ObjectNet":
            return self._read_objectnet(folder, transform)
        if name == "ImageNetV2":
            return TestSet(name, LabelledImages(folder, labels_by_index(name, names), transform))
        synsets = imagenet_synsets()
        if name not in ("ImageNetA", "ImageNetR"):
            return TestSet(name, LabelledImages(folder, labels_by_synset(name, names, synsets), transform))
        subset = subset_synsets(name, names)
        images = LabelledImages(folder, labels_by_synset(name, names, subset), transform)
        columns = labels_by_synset(name, subset, synsets)
        return TestSet(name, images, MaxOverClasses(tuple((columns[synset],) for synset in subset)))

    def _read_objectnet(self, folder: Path, transform: Callable[[Any], Any]) -> TestSet:
        classes = objectnet_classes(self.root / _MAPPINGS)
        labels = {name: label for label, name in enumerate(classes) if (folder / name).is_dir()}
        if not labels:
            raise ValueError(
                f"Expected {folder} to have folders that ImageNet has, too, such as {next(iter(classes))}."
            )
        images = LabelledImages(folder, labels, transform, border=2)
        if len(images) != _OBJECTNET_IMAGES:
            warn(
                f"ObjectNet has {_OBJECTNET_IMAGES} images of classes that ImageNet has, but {folder} has "
                f"{len(images)}: incomplete download?"
            )
        return TestSet("ObjectNet", images, MaxOverClasses(tuple(classes.values())))
