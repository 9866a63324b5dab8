"""Data modules on real files."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from lit_cka.data import DigitsDataModule, ImageFolderDataModule, TextDataModule
from lit_cka.data.text import read_labelled_text
from tests import small_models


class Attached(LightningModule):
    """Just enough of a module for data to take its preprocessing from."""

    def __init__(self, **attributes: object) -> None:
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)


def attach(data, **attributes: object):
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", enable_model_summary=False)
    trainer.strategy.connect(Attached(**attributes))
    data.trainer = trainer
    return data


def test_digits_are_split_without_overlap_and_keep_their_labels() -> None:
    data = DigitsDataModule(classes=[5, 7], batch_size=32)
    data.setup("fit")
    loaders = [data.train_dataloader(), data.val_dataloader(), data.test_dataloader()]
    parts = [
        [(image, int(label)) for images, labels in loader for image, label in zip(images, labels, strict=True)]
        for loader in loaders
    ]
    assert [len(part) for part in parts] == [216, 72, 73]
    keys = [tuple(image.flatten().tolist()) for part in parts for image, _ in part]
    assert len(set(keys)) == len(keys) == 361
    assert {label for part in parts for _, label in part} == {5, 7}
    images = torch.stack([image for image, _ in parts[0]])
    assert images.shape[1:] == (1, 8, 8)
    assert images.min() == -1
    assert images.max() == 1


def test_digits_refuse_other_classes() -> None:
    with pytest.raises(ValueError, match="digits from 0 to 9"):
        DigitsDataModule(classes=[10])


def test_image_folder_takes_the_models_preprocessing(tmp_path: Path) -> None:
    root = small_models.image_folder(tmp_path)
    data = attach(
        ImageFolderDataModule(str(root), batch_size=5, num_workers=0),
        train_transform=lambda image: torch.zeros(3, 4, 4),
        eval_transform=lambda image: torch.ones(3, image.height, image.width),
    )
    data.setup("fit")
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (5, 3, 4, 4)
    assert not images.any()
    images, labels = next(iter(data.val_dataloader()))
    assert images.shape == (5, 3, 36, 40)
    assert labels.tolist() == [0, 0, 0, 0, 1]


def test_image_folder_missing_part_and_missing_transform(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"subfolder for each class, at .*train, .*val"):
        ImageFolderDataModule(str(tmp_path / "no")).setup("fit")
    root = small_models.image_folder(tmp_path / "yes")
    with pytest.raises(ValueError, match="to have an `eval_transform`"):
        attach(ImageFolderDataModule(str(root))).setup("test")


def test_image_folder_with_different_classes(tmp_path: Path) -> None:
    root = small_models.image_folder(tmp_path)
    (root / "val" / "emu").rename(root / "val" / "fox")
    data = attach(ImageFolderDataModule(str(root)), train_transform=lambda i: i, eval_transform=lambda i: i)
    with pytest.raises(ValueError, match=r"only one of them has \['emu', 'fox'\]"):
        data.setup("fit")


@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_all_text_formats_hold_the_same_rows(tmp_path: Path, part: str) -> None:
    files = small_models.text_files(tmp_path)
    expected = [(row["text"], row["label"]) for row in small_models.text_rows()]
    assert read_labelled_text(files[part], "text", "label") == expected


def test_text_is_tokenized_and_padded_by_batch(tmp_path: Path) -> None:
    folder = small_models.tiny_distilbert(tmp_path / "model")
    files = small_models.text_files(tmp_path)
    data = attach(TextDataModule(**files, batch_size=4, max_length=6), tokenizer_name=str(folder))
    data.setup("fit")
    batch = next(iter(data.val_dataloader()))
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert batch["labels"].tolist() == [0, 1, 0, 1]
    assert batch["input_ids"].shape[1] <= 6
    assert torch.equal(batch["attention_mask"] == 0, batch["input_ids"] == 0)
    assert (batch["input_ids"][:, 0] == small_models.WORDS.index("[CLS]")).all()


def test_text_validates_on_a_fixed_random_draw(tmp_path: Path) -> None:
    folder = small_models.tiny_distilbert(tmp_path / "model")
    files = small_models.text_files(tmp_path)
    draws = []
    for _ in range(2):
        data = attach(TextDataModule(**files, val_samples=10, tokenizer=str(folder)))
        data.setup("validate")
        draws.append([batch["input_ids"].tolist() for batch in data.val_dataloader()])
    assert draws[0] == draws[1]
    assert sum(map(len, draws[0])) == 10


def test_load_dataset_reads_a_local_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    pytest.importorskip("datasets", reason="the extra `hub` is not installed")
    folder = small_models.tiny_distilbert(tmp_path / "model")
    small_models.text_files(tmp_path / "set")
    (tmp_path / "set" / "val.jsonl").unlink()
    (tmp_path / "set" / "test.parquet").unlink()
    data = attach(TextDataModule(str(tmp_path / "set"), train="train", val="train[:25%]", tokenizer=str(folder)))
    data.setup("fit")
    assert len(data.train_dataloader().dataset) == 24
    assert len(data.val_dataloader().dataset) == 6


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("review,label\ngood,1\n", "have a column 'text'"),
        ("text,label\ngood,fine\n", "whole numbers from 0 on, but row 0 .* has 'fine'"),
        ("text,label\n", "has no rows"),
    ],
)
def test_text_errors(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_labelled_text(tmp_path / "a.csv", "text", "label")


def test_text_missing_files_and_parts(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="labelled text at"):
        read_labelled_text(tmp_path / "a.csv", "text", "label")
    with pytest.raises(ValueError, match=r"of type \.csv"):
        read_labelled_text(tmp_path / "a.txt", "text", "label")
    with pytest.raises(ValueError, match="`train` and `val` to name a file"):
        TextDataModule().setup("fit")
