"""The configs of `lit-cka monosoup` for models of the hubs, each on a small local model and local test sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from lit_cka import MonoSoupEditor
from lit_cka import __main__ as lit_cka_command
from lit_cka.models import CLIPImageClassifier, ImageClassifier
from tests import small_models
from tests.data.test_shifts import SYNSETS, colour, write_sets
from tests.data.test_test_sets import write_image
from tests.editing.test_evaluation import pair, write_rows

pytestmark = [
    pytest.mark.filterwarnings("ignore:ObjectNet has 18574 images"),
    pytest.mark.filterwarnings("ignore:CKA is biased upward:UserWarning"),
]
CONFIGS = Path(__file__).parents[2] / "configs"
VARIANTS = ["pretrained", "finetuned", "monosoup", "highonly", "lowonly"]
CONTROLS = ["shrink", "shrink_global", "dg_hard"]
SETS = ["ImageNet", "ImageNetV2", "ImageNetSketch", "ImageNetR", "ObjectNet", "ImageNetA"]


def run(config: str, folder: Path, *options: str) -> dict[str, Any]:
    """What the command writes; its pictures are there, too."""
    options = (*options, f"--output={folder / 'out'}", "--trainer.accelerator=cpu", "--trainer.devices=1")
    assert isinstance(lit_cka_command.run(["monosoup", "--config", str(CONFIGS / config), *options]), MonoSoupEditor)
    assert {"lambdas.pdf", "lambdas.png", "summary.json"} <= {path.name for path in (folder / "out").iterdir()}
    found: dict[str, Any] = json.loads((folder / "out" / "monosoup.json").read_text())
    return found


def image_sets(folder: Path) -> list[str]:
    """All six sets, each of some classes of several images, and the options that name them."""
    write_sets(folder)
    for synset, number in SYNSETS.items():  # CKA takes samples
        for index in range(1, 4):
            write_image(folder / "imagenet" / "val" / synset / f"{index}.png", colour(number * index % 1000))
    return [f"--data.init_args.root={folder}", "--data.init_args.batch_size=5", "--data.init_args.num_workers=0"]


@torch.no_grad()
def top1_of_v2(model: Any, root: Path) -> float:
    """One image at a time: V2's folders are the numbers of the classes."""
    files = sorted((root / "imagenetv2-matched-frequency-format-val").glob("*/*.png"))
    images = [model.eval_transform(Image.open(file).convert("RGB")) for file in files]
    guesses = [int(model.eval()(image[None]).argmax()) for image in images]
    return sum(guess == int(file.parent.name) for guess, file in zip(guesses, files, strict=True)) / len(files)


def know_some_classes(head: nn.Module) -> None:
    """Two classes far ahead of the others, so that accuracies are neither 0 nor 1."""
    with torch.no_grad():
        head.bias[[0, 2]] += 50.0


def disturbed(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.05 * torch.randn(value.shape, generator=generator))
    return model


def test_clip(tmp_path: Path) -> None:
    small_models.tiny_clip(tmp_path / "clip")
    model = CLIPImageClassifier(small_models.CLIP_NAME, 1000)
    know_some_classes(model.classification_head)
    for name in ("model_0.pt", "model_31.pt"):
        # As model-soups' files are: under DDP's name, with the rest of CLIP.
        held = {f"module.{key}": value.clone() for key, value in model.state_dict().items()}
        torch.save({**held, "module.model.logit_scale": torch.ones(())}, tmp_path / name)
        disturbed(model)
    model.load_state_dict({key.removeprefix("module."): value for key, value in held.items()})
    found = run(
        "monosoup_clip.yaml",
        tmp_path,
        *image_sets(tmp_path / "data"),
        f"--editor.pretrained={tmp_path / 'model_0.pt'}",
        f"--editor.finetuned={tmp_path / 'model_31.pt'}",
        f"--editor.model.init_args.model_name={small_models.CLIP_NAME}",
        f"--export={json.dumps({'monosoup': str(tmp_path / 'soup.pt')})}",
    )
    assert (tmp_path / "out" / "accuracy_plane.png").is_file()
    assert list(found["metrics"]) == [*VARIANTS, *CONTROLS, *(f"wise_ft_{alpha}" for alpha in (0.2, 0.4, 0.6, 0.8))]
    assert list(found["metrics"]["monosoup"])[: len(SETS)] == SETS
    assert found["metrics"]["finetuned"]["ImageNetV2"]["top1"] == pytest.approx(top1_of_v2(model, tmp_path / "data"))
    assert 0 < found["metrics"]["finetuned"]["ImageNetV2"]["top1"] < 1
    blocks = [f"model.visual.transformer.resblocks.{index}" for index in range(3)]
    assert list(found["cka"]["ImageNet"]["monosoup"]) == blocks
    assert all(0 < value < 1 for value in found["cka"]["ImageNet"]["monosoup"].values())
    exported = torch.load(tmp_path / "soup.pt", weights_only=True)
    assert exported.keys() == {*held, "module.model.logit_scale"}


@pytest.mark.slow
def test_convnext(tmp_path: Path) -> None:
    """W0 is a body without the fine-tuned head, which both take."""
    import timm

    name = small_models.tiny_convnext(tmp_path / "in12k")  # of 5 classes
    finetuned = disturbed(ImageClassifier(name, 1000, pretrained=True))
    know_some_classes(finetuned.model.head.fc)
    arguments = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}
    timm.models.save_for_hf(
        finetuned.model,
        tmp_path / "in1k",
        model_config={"input_size": [3, 32, 32]},
        model_args=arguments,
        safe_serialization=True,
    )
    found = run(
        "monosoup_convnext.yaml",
        tmp_path,
        *image_sets(tmp_path / "data"),
        f"--editor.pretrained.init_args.model_name={name}",
        f"--editor.finetuned.init_args.model_name=local-dir:{tmp_path / 'in1k'}",
        "--editor.min_rel_update=1e-6",
    )
    assert list(found["metrics"])[: len(VARIANTS)] == VARIANTS
    expected = top1_of_v2(finetuned, tmp_path / "data")
    assert found["metrics"]["finetuned"]["ImageNetV2"]["top1"] == pytest.approx(expected)
    records = {record["name"]: record for record in found["parameters"]}
    assert records["model.head.fc.weight"]["reason"] == "unchanged"
    assert records["model.stages.2.blocks.1.mlp.fc1.weight"]["k"] > 0
    assert len(found["cka"]["ImageNet"]["monosoup"]) == 5


def test_language(tmp_path: Path) -> None:
    pair(tmp_path, "llama")
    write_rows(tmp_path)
    files = {name: str(tmp_path / f"{name}.jsonl") for name in ("texts", "choices")}
    found = run(
        "monosoup_language.yaml",
        tmp_path,
        f"--editor.pretrained={tmp_path / 'pretrained'}",
        f"--editor.finetuned={tmp_path / 'finetuned'}",
        f"--data.init_args.files={json.dumps(files)}",
        "--data.init_args.max_length=64",
        "--trainer.precision=32-true",
        f"--export={json.dumps({'monosoup': str(tmp_path / 'soup')})}",
    )
    assert list(found["metrics"]) == VARIANTS
    assert found["metrics"]["monosoup"]["texts"]["perplexity"] > 1
    assert 0 <= found["metrics"]["monosoup"]["choices"]["choice_accuracy"] <= 1
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= {
        path.name for path in (tmp_path / "soup").iterdir()
    }
