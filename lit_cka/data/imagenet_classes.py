"""Which of ImageNet's 1000 classes a folder of images means: by synset, by index, or by ObjectNet's mapping."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor

NUM_CLASSES = 1000
OBJECTNET_FILES = (
    "folder_to_objectnet_label.json",
    "objectnet_to_imagenet_1k.json",
    "pytorch_to_imagenet_2012_id.json",
    "imagenet_to_label_2012_v2",
)
_SUBSETS = {"ImageNetA": "imagenet_a_synsets.txt", "ImageNetR": "imagenet_r_synsets.txt"}


@dataclass(frozen=True)
class MaxOverClasses:
    """From logits of ImageNet's classes (n, 1000) to (n, k): entry j is the largest logit of the classes `ids[j]`."""

    ids: tuple[tuple[int, ...], ...]

    def __call__(self, logits: Tensor) -> Tensor:
        if logits.shape[-1] != NUM_CLASSES:
            raise ValueError(f"Expected logits of ImageNet's {NUM_CLASSES} classes, but got {logits.shape[-1]}.")
        longest = max(map(len, self.ids))
        # Repeating a class leaves a maximum as it is, and makes all rows as long.
        rows = [ids + ids[:1] * (longest - len(ids)) for ids in self.ids]
        return logits[:, torch.tensor(rows, device=logits.device)].amax(dim=-1)


def imagenet_synsets() -> list[str]:
    """Returns the 1000 synsets ("n01440764"), sorted, which is the order of every ImageNet classifier's logits."""
    from timm.data import ImageNetInfo

    synsets: list[str] = ImageNetInfo("imagenet-1k").label_names()
    return synsets


def subset_synsets(name: str, folders: Sequence[str]) -> list[str]:
    """Returns the 200 synsets of ImageNet-A or ImageNet-R, sorted.

    timm ships the lists, but as files that its code does not read and that may go. Without them the 200
    folders of the complete set are the list.

    Raises:
        FileNotFoundError: if timm has no list and the folders are not 200.
    """
    path = files("timm.data") / "_info" / _SUBSETS[name]
    if path.is_file():
        return sorted(path.read_text().split())
    if len(folders) != 200:
        raise FileNotFoundError(
            f"Expected all 200 class folders of {name}, but got {len(folders)}, and this version of timm has no list "
            "of its classes to make up for it."
        )
    return sorted(folders)


def labels_by_synset(source: str, folders: Iterable[str], synsets: Sequence[str]) -> dict[str, int]:
    """Returns the label of each folder: its place among `synsets`.

    Raises:
        ValueError: if a folder is none of them.
    """
    labels = {synset: label for label, synset in enumerate(synsets)}
    unknown = sorted(set(folders) - set(labels))
    if unknown:
        raise ValueError(
            f"Expected the folders of {source} to be named by its {len(synsets)} synsets (n01440764, ...), but got "
            f"{unknown[:5]}."
        )
    return {folder: labels[folder] for folder in folders}


def labels_by_index(source: str, folders: Iterable[str]) -> dict[str, int]:
    """Returns the label of each folder: the number that it is named by. "10" is class 10, though it sorts before "2".

    Raises:
        ValueError: if a folder is no number from 0 to 999.
    """
    unknown = [folder for folder in folders if not folder.isdecimal() or int(folder) >= NUM_CLASSES]
    if unknown:
        raise ValueError(f"Expected the folders of {source} to be named 0 to {NUM_CLASSES - 1}, but got {unknown[:5]}.")
    return {folder: int(folder) for folder in folders}


def guessed_labels(source: str, folders: Sequence[str], synsets: Sequence[str]) -> dict[str, int]:
    """Returns the label of each folder by synset or by index, if any is named so; else, of 1000, its place.

    Raises:
        ValueError: if none of it fits.
    """
    if set(folders) & set(synsets):
        return labels_by_synset(source, folders, synsets)
    if any(folder.isdecimal() for folder in folders):
        return labels_by_index(source, folders)
    if len(folders) == NUM_CLASSES:
        return {folder: label for label, folder in enumerate(sorted(folders))}
    raise ValueError(
        f"Expected the folders of {source} to be named by synset (n01440764, ...) or by class index (0, 1, ...), or to "
        f"be {NUM_CLASSES} in the classes' order, but got {len(folders)}: {', '.join(folders[:3])}, ..."
    )


def objectnet_classes(mappings: Path) -> dict[str, tuple[int, ...]]:
    """Returns the ImageNet classes that each of ObjectNet's folders means, sorted by folder; only those that mean some.

    `mappings` is a folder of ObjectNet's download. `objectnet_to_imagenet_1k.json` maps a label ("Alarm clock") to the
    names of classes ("analog clock; digital clock"), `folder_to_objectnet_label.json` a folder ("alarm_clock") to its
    label. A name's line in `imagenet_to_label_2012_v2`, counted from 0, is its id in another order, and
    `pytorch_to_imagenet_2012_id.json` maps the index of a classifier's logit to that id.

    Barbu et al. 2019, ObjectNet.

    Raises:
        ValueError: if a label has no folder, or a name not exactly one class.
    """
    folder_labels, imagenet_names, ids = (
        json.loads((mappings / file).read_text(encoding="utf-8")) for file in OBJECTNET_FILES[:3]
    )
    lines = (mappings / OBJECTNET_FILES[3]).read_text(encoding="utf-8").splitlines()
    classes: dict[str, list[int]] = {}
    for index, line in ids.items():
        if line < len(lines):
            classes.setdefault(lines[line].strip(), []).append(int(index))
    folders = {label: folder for folder, label in folder_labels.items()}
    meant: dict[str, tuple[int, ...]] = {}
    for label, joined in imagenet_names.items():
        names = joined.split("; ")
        # Two names are those of two classes each ("crane", "maillot"). ObjectNet has neither.
        unclear = [name for name in names if len(classes.get(name, [])) != 1]
        if label not in folders or unclear:
            what = f"one class for each of {unclear}" if unclear else f"a folder for {label!r}"
            raise ValueError(f"Expected ObjectNet's mappings at {mappings} to have {what}, but they have not.")
        meant[folders[label]] = tuple(classes[name][0] for name in names)
    return dict(sorted(meant.items()))
