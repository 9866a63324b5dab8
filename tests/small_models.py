"""Small models and data in the formats that the hubs use, written to local folders."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow
import pyarrow.parquet
import timm
import torch
from PIL import Image

CLIP_NAME = "lit-cka-tiny"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "very", "plot", "not", "the", "a", "was"]


def image_folder(root: Path, classes: tuple[str, ...] = ("cat", "dog", "emu"), per_class: int = 4) -> Path:
    """`root/{train,val,test}/CLASS/*.png`, noise around a colour per class, 40 x 36 pixels."""
    rng = np.random.default_rng(0)
    for part in ("train", "val", "test"):
        for index, name in enumerate(classes):
            folder = root / part / name
            folder.mkdir(parents=True)
            for number in range(per_class):
                pixels = rng.integers(0, 120, (36, 40, 3)) + np.eye(3)[index % 3] * 120
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    return root


def tiny_clip(folder: Path) -> Path:
    """Register a tiny open_clip architecture under `CLIP_NAME`, and write weights for it to a file."""
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 3, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{CLIP_NAME}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / f"{CLIP_NAME}.json")
    torch.manual_seed(1)
    torch.save(open_clip.create_model(CLIP_NAME, pretrained_image=False).state_dict(), folder / "clip.pt")
    return folder / "clip.pt"


def tiny_convnext(folder: Path) -> str:
    """A two-stage-sized ConvNeXt in timm's hub format; returns the name that `timm.create_model` takes."""
    torch.manual_seed(2)
    model = timm.create_model("convnext_atto", depths=(1, 1, 2, 1), dims=(8, 16, 24, 32), num_classes=5)
    arguments = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}
    timm.models.save_for_hf(
        model, folder, model_config={"input_size": [3, 32, 32]}, model_args=arguments, safe_serialization=True
    )
    return f"local-dir:{folder}"


def tiny_distilbert(folder: Path, words: Sequence[str] = WORDS) -> Path:
    """A DistilBERT without a classification head, and its tokenizer, as `save_pretrained` writes them."""
    from transformers import DistilBertConfig, DistilBertModel, DistilBertTokenizerFast

    torch.manual_seed(3)
    config = DistilBertConfig(
        vocab_size=len(words), dim=32, n_layers=3, n_heads=2, hidden_dim=64, max_position_embeddings=32
    )
    return _saved(folder, DistilBertModel(config), DistilBertTokenizerFast, words)


def tiny_bert(folder: Path, words: Sequence[str] = WORDS) -> Path:
    """The same for a BERT, whose blocks have other names, and whose body ends in a pooler."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    torch.manual_seed(4)
    config = BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=32,
    )  # fmt: skip
    return _saved(folder, BertModel(config), BertTokenizerFast, words)


def _saved(folder: Path, model: Any, tokenizer: Any, words: Sequence[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(words))
    tokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def text_rows(num_rows: int = 24) -> list[dict[str, str | int]]:
    """Reviews of varying length, label 1 for good."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(num_rows):
        filler = rng.choice(WORDS[7:], rng.integers(2, 9)).tolist()
        rows.append({"text": " ".join(["good" if number % 2 else "bad", *filler]), "label": number % 2})
    return rows


def text_files(folder: Path) -> dict[str, str]:
    """The same kind of rows as csv (train), json lines (val) and parquet (test)."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = text_rows()
    with (folder / "train.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(rows)
    (folder / "val.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "test.parquet")
    return {"train": f"{folder}/train.csv", "val": f"{folder}/val.jsonl", "test": f"{folder}/test.parquet"}
