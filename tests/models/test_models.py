"""Modules to fine-tune, on small weights in the formats that the hubs use."""

from pathlib import Path

import lightning.pytorch as pl
import open_clip
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from lit_cka.models import CLIPImageClassifier, ImageClassifier, TextClassifier
from tests import small_models

VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}


def same(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    other = second.state_dict()
    return all(torch.equal(value, other[name]) for name, value in first.state_dict().items())


def test_timm_weights_load_from_a_local_folder_with_another_head(tmp_path: Path) -> None:
    name = small_models.tiny_convnext(tmp_path)
    module = ImageClassifier(name, num_classes=3, pretrained=True)
    saved = load_file(tmp_path / "model.safetensors")
    assert torch.equal(module.model.stages[2].blocks[1].mlp.fc1.weight, saved["stages.2.blocks.1.mlp.fc1.weight"])
    assert module(torch.randn(2, 3, 32, 32)).shape == (2, 3)


@pytest.mark.parametrize("source", ["lightning", "timm", "safetensors"])
def test_checkpoint_of_the_same_architecture_loads_whatever_wrote_it(tmp_path: Path, source: str) -> None:
    trained = ImageClassifier("vit_tiny_patch16_224", 4, model_kwargs=VIT)
    path = tmp_path / ("weights.safetensors" if source == "safetensors" else "weights.ckpt")
    if source == "lightning":
        trainer = pl.Trainer(logger=False, accelerator="cpu", default_root_dir=tmp_path)
        trainer.strategy.connect(trained)
        trainer.save_checkpoint(path)
    elif source == "timm":
        torch.save({"state_dict": trained.model.state_dict(), "epoch": 3}, path)
    else:
        save_file(trained.model.state_dict(), path)
    assert same(ImageClassifier("vit_tiny_patch16_224", 4, checkpoint=str(path), model_kwargs=VIT).model, trained.model)


def test_checkpoint_with_another_head_leaves_the_head_new(tmp_path: Path) -> None:
    trained = ImageClassifier("vit_tiny_patch16_224", 4, model_kwargs=VIT)
    torch.save(trained.model.state_dict(), tmp_path / "w.pt")
    module = ImageClassifier("vit_tiny_patch16_224", 7, checkpoint=str(tmp_path / "w.pt"), model_kwargs=VIT)
    assert same(module.model.blocks, trained.model.blocks)
    assert module.model.head.weight.shape == (7, 16)


def test_checkpoint_of_another_architecture_is_refused_by_name_and_shape(tmp_path: Path) -> None:
    other = timm.create_model("vit_tiny_patch16_224", **{**VIT, "embed_dim": 32})
    torch.save(other.state_dict(), tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"another architecture.*Expected cls_token \(1, 1, 16\)"):
        ImageClassifier("vit_tiny_patch16_224", 4, checkpoint=str(tmp_path / "w.pt"), model_kwargs=VIT)


def test_clip_takes_open_clip_weights_and_normalises_before_the_head(tmp_path: Path) -> None:
    weights = small_models.tiny_clip(tmp_path)
    module = CLIPImageClassifier(small_models.CLIP_NAME, 3, pretrained=str(weights)).eval()
    images = torch.randn(2, 3, 32, 32)
    clip = open_clip.create_model(small_models.CLIP_NAME, pretrained=str(weights)).eval()
    features = clip.encode_image(images, normalize=True)
    head = module.classification_head
    torch.testing.assert_close(module(images), features @ head.weight.T + head.bias)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_clip_state_dict_is_that_of_model_soups(tmp_path: Path, prefix: str) -> None:
    weights = small_models.tiny_clip(tmp_path)
    visual = open_clip.create_model(small_models.CLIP_NAME, pretrained=str(weights)).visual.state_dict()
    # As model-soups writes it: image encoder and leftovers of CLIP below `model.`, and the head.
    soup = {f"{prefix}model.visual.{name}": value + 1 for name, value in visual.items()}
    soup[f"{prefix}model.logit_scale"] = torch.tensor(4.6)
    soup[f"{prefix}classification_head.weight"] = torch.randn(3, 16)
    soup[f"{prefix}classification_head.bias"] = torch.randn(3)
    torch.save(soup, tmp_path / "model_1.pt")
    module = CLIPImageClassifier(small_models.CLIP_NAME, 3, checkpoint=str(tmp_path / "model_1.pt"))
    own = module.state_dict()
    assert set(own) == {name.removeprefix(prefix) for name in soup} - {"model.logit_scale"}
    assert all(torch.equal(own[name], soup[prefix + name]) for name in own)


def test_text_classifier_loads_a_folder_and_trains_in_train_mode(tmp_path: Path) -> None:
    folder = small_models.tiny_distilbert(tmp_path)
    module = TextClassifier(str(folder), 2)
    saved = load_file(folder / "model.safetensors")
    assert torch.equal(
        module.model.distilbert.embeddings.word_embeddings.weight, saved["embeddings.word_embeddings.weight"]
    )
    assert module.training
    assert all(child.training for child in module.modules())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"num_classes": 1}, "`num_classes` to be at least 2"), ({"warmup": 1.0}, r"`warmup` to be in \[0, 1\)")],
)
def test_bad_options(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageClassifier("vit_tiny_patch16_224", **{"num_classes": 2, "model_kwargs": VIT, **arguments})


def test_learning_rate_warms_up_and_decays_and_biases_do_not_decay(tmp_path: Path) -> None:
    module = ImageClassifier("vit_tiny_patch16_224", 2, model_kwargs=VIT, learning_rate=1.0, warmup=0.25)
    data = [(torch.randn(2, 3, 16, 16), torch.tensor([0, 1]))] * 8
    trainer = pl.Trainer(max_epochs=1, logger=False, enable_checkpointing=False, accelerator="cpu")
    rates: list[float] = []
    module.on_train_batch_start = lambda *_: rates.append(trainer.optimizers[0].param_groups[0]["lr"])  # type: ignore
    loader = torch.utils.data.DataLoader(data, batch_size=None)
    trainer.fit(module, loader, loader)
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert rates[2:] == sorted(rates[2:], reverse=True)
    decayed, free = trainer.optimizers[0].param_groups
    assert all(parameter.ndim > 1 for parameter in decayed["params"])
    assert free["weight_decay"] == 0
