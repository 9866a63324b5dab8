"""The text side of CLIP in a model-soups file: edited like all else where it has changed, else counted as left."""

from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
import torch
from torch import Tensor

from lit_cka import MonoSoupEditor
from lit_cka.__main__ import run
from lit_cka.editing.artifacts import describe_edit
from lit_cka.editing.parameter import edit_parameter
from lit_cka.editing.settings import EditSettings
from lit_cka.models import CLIPImageClassifier
from tests import small_models

TEXT = ("positional_embedding", "text_projection", "logit_scale", "token_embedding", "ln_final", "transformer")


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """As model-soups names it: all of CLIP below `model.`, and a head."""
    small_models.tiny_clip(tmp_path_factory.mktemp("clip"))
    torch.manual_seed(0)
    clip = open_clip.create_model(small_models.CLIP_NAME, pretrained_image=False)
    head = {"classification_head.weight": torch.randn(5, 16), "classification_head.bias": torch.zeros(5)}
    return {**{f"model.{name}": value for name, value in clip.state_dict().items()}, **head}


def is_text(name: str) -> bool:
    return name.removeprefix("module.").removeprefix("model.").startswith(TEXT)


@pytest.mark.parametrize("has_transformer", [False, True])  # which model-soups deletes
@pytest.mark.parametrize("is_trained", [False, True])
def test_the_text_side(
    start: dict[str, Tensor], has_transformer: bool, is_trained: bool, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(1)
    before = {
        f"module.{name}": value
        for name, value in start.items()
        if has_transformer or not name.startswith("model.transformer")
    }
    after = {
        name: value + 0.1 * torch.randn(value.shape, generator=generator)
        if value.is_floating_point() and (is_trained or not is_text(name))
        else value
        for name, value in before.items()
    }
    torch.save(before, "model_0.pt")
    torch.save(after, "model_31.pt")
    capsys.readouterr()
    run(["edit", "--pretrained=model_0.pt", "--finetuned=model_31.pt", "--output=out.pt"])
    said, edited = capsys.readouterr().out, torch.load("out.pt")
    matrices = [name for name in before if before[name].ndim >= 2]
    of_text = [name for name in matrices if is_text(name)]
    assert len(of_text) == (7 if has_transformer else 3)
    changed = [name for name in matrices if is_trained or not is_text(name)]
    assert f"{len(changed)} of {len(before)} tensors edited" in said
    assert (f"{len(of_text)} (unchanged)" in said) == (not is_trained)
    assert f"{len(before) - len(matrices)} (fewer than two dimensions)" in said
    for name in of_text:
        wanted, _ = edit_parameter(name, before[name], after[name], EditSettings(), ["monosoup"])
        assert torch.equal(edited[name], wanted["monosoup"])
    # In memory there is no text side to edit: it is counted, and exported as fine-tuned.
    editor = MonoSoupEditor("model_0.pt", "model_31.pt", CLIPImageClassifier(small_models.CLIP_NAME, 5))
    assert f"{sum(map(is_text, before))} (no part of the model)" in describe_edit(editor.edited.records)
    editor.export("monosoup", "exported.pt")
    exported = torch.load("exported.pt")
    assert all(torch.equal(exported[name], after[name]) for name in before if is_text(name))
    assert all(torch.allclose(exported[name], edited[name], atol=1e-6) for name in before if not is_text(name))
