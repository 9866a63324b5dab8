"""Several test sets, of folders of tiny images and of tensors."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from torch.utils.data import TensorDataset

from lit_cka.data import ImageFolderTestsDataModule, TestSet, TestSetsDataModule
from lit_cka.data.test_sets import LabelledImages


class TwoSets(TestSetsDataModule):
    """Numbers 0, 1, 2, ..., each labelled with itself."""

    def __init__(self, names: tuple[str, ...], **arguments: Any) -> None:
        super().__init__(**arguments)
        self.names = names

    def read_test_sets(self) -> list[TestSet]:
        return [
            TestSet(name, TensorDataset(torch.arange(5 + i), torch.arange(5 + i))) for i, name in enumerate(self.names)
        ]


def write_image(path: Path, colour: tuple[int, int, int], size: int = 8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), colour).save(path)


def attach(data: TestSetsDataModule, **attributes: object) -> Any:
    """`data`, in the trainer of a module with some attributes."""
    module = LightningModule()
    for name, value in attributes.items():
        setattr(module, name, value)
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", enable_model_summary=False)
    trainer.strategy.connect(module)
    data.trainer = trainer
    return data


def red(image: Image.Image) -> torch.Tensor:
    """An image's first pixel's red (1,)."""
    return torch.tensor(image.getpixel((0, 0))[:1])


def test_sets_are_in_order_and_not_shuffled() -> None:
    data = TwoSets(("own", "shifted"), batch_size=4)
    assert data.test_names == []
    data.setup("test")
    assert data.test_names == ["own", "shifted"]
    batches = [[labels.tolist() for _, labels in loader] for loader in data.test_dataloader()]
    assert batches == [[[0, 1, 2, 3], [4]], [[0, 1, 2, 3], [4, 5]]]


def test_names_differ_and_there_is_a_set() -> None:
    with pytest.raises(ValueError, match=r"names of test sets to differ, but got \['a', 'b', 'a'\]"):
        TwoSets(("a", "b", "a")).setup("test")
    with pytest.raises(ValueError, match="at least one test set"):
        TwoSets(()).setup("test")


def test_a_set_brings_its_own_collate() -> None:
    class Joined(TwoSets):
        def read_test_sets(self) -> list[TestSet]:
            dataset = TensorDataset(torch.arange(3), torch.arange(3))
            return [TestSet("joined", dataset, collate=lambda items: [int(label) for _, label in items])]

    data = Joined(())
    data.setup("test")
    assert [list(loader) for loader in data.test_dataloader()] == [[[0, 1, 2]]]


def test_folders_are_labelled_by_the_first(tmp_path: Path) -> None:
    for number, name in enumerate(["ant", "bee", "cow", "dog"]):
        write_image(tmp_path / "own" / name / "0.png", (number, 0, 0))
    for number, name in [(1, "bee"), (3, "dog")]:  # alone, these would be 0 and 1
        write_image(tmp_path / "shifted" / name / "0.png", (number, 0, 0))
        write_image(tmp_path / "shifted" / name / "deep" / "1.png", (number, 0, 0))
    (tmp_path / "shifted" / ".cache").mkdir()
    (tmp_path / "shifted" / "LICENSE").write_text("")
    folders = {"own": str(tmp_path / "own"), "shifted": str(tmp_path / "shifted")}
    data = attach(ImageFolderTestsDataModule(folders, batch_size=3, num_workers=0), eval_transform=red, num_classes=4)
    data.setup("test")
    items = [[(int(image), label) for image, label in test_set.dataset] for test_set in data.test_sets]
    assert items == [[(0, 0), (1, 1), (2, 2), (3, 3)], [(1, 1), (1, 1), (3, 3), (3, 3)]]
    assert [test_set.to_classes for test_set in data.test_sets] == [None, None]


def test_folders_that_do_not_fit(tmp_path: Path) -> None:
    for name in ("ant", "bee"):
        write_image(tmp_path / "own" / name / "0.png", (0, 0, 0))
    write_image(tmp_path / "odd" / "cow" / "0.png", (0, 0, 0))
    own, odd, gone = (str(tmp_path / name) for name in ("own", "odd", "gone"))
    with pytest.raises(ValueError, match=r"classes of b to be among those of a, but got \['cow'\]"):
        attach(ImageFolderTestsDataModule({"a": own, "b": odd}), eval_transform=red).setup("test")
    with pytest.raises(FileNotFoundError, match=r"no b at .*gone, no c at .*gone"):
        ImageFolderTestsDataModule({"a": own, "b": gone, "c": gone}).setup("test")
    with pytest.raises(ValueError, match="at least one test set"):
        attach(ImageFolderTestsDataModule({}), eval_transform=red).setup("test")
    with pytest.raises(ValueError, match="test sets' 2 classes, but it has 3"):
        attach(ImageFolderTestsDataModule({"a": own}), eval_transform=red, num_classes=3).setup("test")
    with pytest.raises(ValueError, match="to have an `eval_transform`"):
        attach(ImageFolderTestsDataModule({"a": own})).setup("test")
    (tmp_path / "own" / "cow").mkdir()
    with pytest.raises(FileNotFoundError, match="classes cow"):
        attach(ImageFolderTestsDataModule({"a": own}), eval_transform=red).setup("test")


def test_images_reach_other_processes(tmp_path: Path) -> None:
    write_image(tmp_path / "a" / "0.png", (7, 0, 0))
    images = pickle.loads(pickle.dumps(LabelledImages(tmp_path, {"a": 5}, red, border=2)))
    assert len(images) == 1
    assert [(int(image), label) for image, label in images] == [(7, 5)]
