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


@pytest.fixture(scope="module", params=["bert", "distilbert"])
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(getattr(small_models, f"tiny_{request.param}")(tmp_path_factory.mktemp(request.param)))


def test_the_head_alone_is_trained_on_features_without_dropout(encoder: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = TextClassifier(encoder, 2, head_only=True, learning_rate=0.1)
    body = module.model.base_model
    assert {name.partition(".")[0] for name, each in module.model.named_parameters() if each.requires_grad} == {
        name for name, _ in module.model.named_children() if name not in ("bert", "distilbert", "dropout")
    }
    before = {name: value.clone() for name, value in module.model.state_dict().items()}
    modes: list[tuple[bool, bool]] = []

    def note(*_: object) -> None:
        modes.append((module.model.training, any(each.training for each in body.modules())))

    module.on_train_batch_start = note  # type: ignore[method-assign]
    rows = [{"input_ids": torch.tensor([[2, 5 + n % 2, 7, 3]]), "labels": torch.tensor([n % 2])} for n in range(6)]
    trainer = pl.Trainer(
        max_epochs=2, logger=False, enable_checkpointing=False, accelerator="cpu", default_root_dir=tmp_path
    )
    loader = torch.utils.data.DataLoader(rows, batch_size=None)  # type: ignore[arg-type]
    trainer.fit(module, loader, loader)
    assert modes == [(True, False)] * 12  # after a validation, too
    moved = {name for name, value in module.model.state_dict().items() if not torch.equal(value, before[name])}
    assert {"classifier.weight", "classifier.bias"} <= moved
    assert not any(name.startswith(("bert", "distilbert")) for name in moved)
    # And then all of it from there: what such weights are for.
    trainer.save_checkpoint(tmp_path / "head.ckpt", weights_only=True)
    whole = TextClassifier(encoder, 2, checkpoint=str(tmp_path / "head.ckpt"))
    assert same(whole.model, module.model)
    assert all(parameter.requires_grad for parameter in whole.parameters())
    assert all(child.training for child in whole.model.modules())
    other = TextClassifier(encoder, 5, checkpoint=str(tmp_path / "head.ckpt"))
    assert same(other.model.base_model, module.model.base_model)
    assert other.model.classifier.out_features == 5


def test_a_checkpoint_of_another_encoder_is_an_error(tmp_path: Path) -> None:
    bert, distilbert = small_models.tiny_bert(tmp_path / "a"), small_models.tiny_distilbert(tmp_path / "b")
    torch.save(TextClassifier(str(bert), 2).state_dict(), tmp_path / "bert.pt")
    with pytest.raises(ValueError, match="missing"):
        TextClassifier(str(distilbert), 2, checkpoint=str(tmp_path / "bert.pt"))
    with pytest.raises(FileNotFoundError, match="checkpoint file at"):
        TextClassifier(str(distilbert), 2, checkpoint=str(tmp_path / "none.pt"))


def test_a_model_without_a_head_of_its_own_has_none_to_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import DistilBertForSequenceClassification

    monkeypatch.setattr(DistilBertForSequenceClassification, "base_model_prefix", "")
    folder = small_models.tiny_distilbert(tmp_path)
    with pytest.raises(ValueError, match=r"for `head_only`, but DistilBertForSequenceClassification has none"):
        TextClassifier(str(folder), 2, head_only=True)


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


def test_each_block_learns_slower_than_the_one_above(tmp_path: Path) -> None:
    """The head by `learning_rate`, block i of d and what is beside it by that times `layer_decay ** (d - i)`."""
    module = ImageClassifier("vit_tiny_patch16_224", 4, model_kwargs=VIT, learning_rate=0.1, layer_decay=0.5)
    module.model.blocks[0].attn.requires_grad_(False)
    groups = module.parameter_groups()
    rate = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    decay = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(rate)
    factors = {
        "model.head": 1,
        "model.norm": 0.5,
        "model.blocks.1": 0.5,
        "model.blocks.0": 0.25,
        "model.patch_embed": 0.125,
    }
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            assert id(parameter) not in rate
            continue
        for start, factor in factors.items():
            if name.startswith(start):
                assert rate[id(parameter)] == pytest.approx(0.1 * factor), name
        if parameter.ndim == 1:
            assert decay[id(parameter)] == 0
    trainer = pl.Trainer(max_steps=1, logger=False, accelerator="cpu", default_root_dir=tmp_path,
                         enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    before = {name: value.clone() for name, value in module.named_parameters()}
    images = [(torch.randn(3, 16, 16), label) for label in range(4)]
    loader = torch.utils.data.DataLoader(images, batch_size=4)
    trainer.fit(module, loader, loader)
    moved = {name: (value - before[name]).abs().max().item() for name, value in module.named_parameters()}
    # The first step of AdamW is the learning rate: the warm-up's, alike for all.
    assert moved["model.blocks.1.mlp.fc2.bias"] == pytest.approx(2 * moved["model.blocks.0.mlp.fc2.bias"], rel=1e-3)
    assert moved["model.blocks.0.attn.proj.weight"] == 0


def test_layer_decay_out_of_range() -> None:
    for layer_decay in (0, -0.5, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"Expected `layer_decay` to be in \(0, 1\], but got"):
            ImageClassifier("vit_tiny_patch16_224", 4, model_kwargs=VIT, layer_decay=layer_decay)
