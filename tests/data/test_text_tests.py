"""`TextTestsDataModule`: labelled text files as test sets of a transformers classifier."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from lit_cka import MonoSoupEditor
from lit_cka.data import TextTestsDataModule
from tests.small_models import tiny_distilbert

TEXTS = [("the good film", 1), ("a bad film", 0), ("good", 1), ("bad bad bad", 0), ("the the", 1)]


def write(folder: Path) -> dict[str, str]:
    with (folder / "in.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *TEXTS])
    rows = [json.dumps({"text": text, "label": 1 - label}) for text, label in TEXTS[:3]]
    (folder / "out.jsonl").write_text("\n".join(rows))
    return {"reviews": str(folder / "in.csv"), "inverted": str(folder / "out.jsonl")}


def test_two_folders_of_text_classifiers(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "tuned")):
        folder = tiny_distilbert(tmp_path / name)
        torch.manual_seed(seed)
        config = AutoConfig.from_pretrained(folder, num_labels=2)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    editor = MonoSoupEditor(tmp_path / "base", tmp_path / "tuned")
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.test(editor, TextTestsDataModule(write(tmp_path), batch_size=2), verbose=False)
    assert editor.results is not None
    assert editor.results.num_samples == {"reviews": 5, "inverted": 3}
    tuned = editor.model
    data = TextTestsDataModule(write(tmp_path), tokenizer=str(tmp_path / "tuned"), batch_size=1)
    data.setup("test")
    for name, loader in zip(data.test_names, data.test_dataloader(), strict=True):
        with torch.no_grad():
            right = [
                bool(tuned({key: value for key, value in batch.items() if key != "labels"}).argmax() == batch["labels"])
                for batch in loader
            ]
        assert editor.results.metrics["finetuned"][name]["top1"] == pytest.approx(sum(right) / len(right))


def test_missing_files_are_named_together(tmp_path: Path) -> None:
    files = write(tmp_path)
    data = TextTestsDataModule({**files, "a": "nowhere.csv", "b": "neither.csv"}, tokenizer="unused")
    with pytest.raises(FileNotFoundError, match=r"a: nowhere\.csv, b: neither\.csv"):
        data.setup("test")


def test_a_module_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Expected `tokenizer` to name a tokenizer"):
        TextTestsDataModule(write(tmp_path)).setup("test")
