"""Which weights of a file are meant: of one set, of several in mappings of their own, of several in one mapping."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lit_cka.checkpoints.state_dicts import load_into, load_state_dict, with_tied
from lit_cka.checkpoints.weight_sets import find_weights

SOURCE = Path("file.pt")
SHAPES = {"stem.weight": (4, 3), "stem.bias": (4,), "blocks.0.weight": (4, 4), "norm.running_mean": (4,)}


def values(seed: float, prefix: str = "") -> dict[str, Tensor]:
    return {f"{prefix}{name}": torch.full(shape, float(seed)) for name, shape in SHAPES.items()}


ONE, TWO = values(1), values(2)
RIVALS: dict[
    str, tuple[dict[str, Any], dict[str, float], str | None]
] = {  # content, value of each set, which timm loads
    "timm": ({"state_dict": ONE, "state_dict_ema": TWO}, {"state_dict": 1, "state_dict_ema": 2}, "state_dict_ema"),
    "DeiT": ({"model": ONE, "model_ema": TWO, "epoch": 3}, {"model": 1, "model_ema": 2}, "model_ema"),
    "model and ema": ({"ema": TWO, "model": ONE}, {"model": 1, "ema": 2}, "model"),
    "ema in a mapping": (
        {"state_dict": ONE, "ema": {"decay": 0.9, "shadow": values(2, "module.")}},
        {"state_dict": 1, "ema.shadow": 2},
        "state_dict",
    ),
    "averaged by Lightning": (
        {"state_dict": ONE, "current_model_state": TWO, "averaging_state": {"n_averaged": torch.tensor(3)}},
        {"state_dict": 1, "current_model_state": 2},
        "state_dict",
    ),
    "averaged by torch": (
        {"model": ONE, "swa": {"n_averaged": torch.tensor(3), **values(2, "module.")}},
        {"model": 1, "swa": 2},
        "model",
    ),
    "BasicSR": ({"params": ONE, "params_ema": TWO}, {"params": 1, "params_ema": 2}, None),
    "student and teacher": ({"student": ONE, "teacher": TWO, "args": {}}, {"student": 1, "teacher": 2}, None),
    "within the model": (
        {"model": {"student": ONE, "teacher": TWO}},
        {"model.student": 1, "model.teacher": 2},
        None,
    ),
    "parameters alone": (
        {"state_dict": ONE, "ema": {name: TWO[name] for name in list(TWO)[:3]}},
        {"state_dict": 1, "ema": 2},
        "state_dict",
    ),
    "beside the root": ({**ONE, "ema": TWO}, {".": 1, "ema": 2}, None),
    "another network": (
        {"generator": ONE, "discriminator": {"head.weight": torch.full((2, 2), 2.0)}},
        {"generator": 1, "discriminator": 2},
        None,
    ),
    "one, under a key of its own": ({"net": ONE, "epoch": 3}, {"net": 1}, None),
}


@pytest.mark.parametrize("case", RIVALS)
def test_several_sets_are_an_error_until_one_is_named(case: str, tmp_path: Path) -> None:
    content, sets, of_timm = RIVALS[case]
    path = tmp_path / "weights.pt"
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"Expected '.*weights\.pt' to hold .*Name one by `weights=`") as error:
        load_state_dict(path)
    assert all(f"{name!r}" in str(error.value) for name in sets)
    assert ("timm would load this one" in str(error.value)) == (of_timm is not None)
    if of_timm is not None:
        number = len(SHAPES)
        assert f"{of_timm!r} ({number} tensors; timm would load this one)" in str(error.value)
    for name, value in sets.items():
        loaded = load_state_dict(path, weights=name)
        assert {each.flatten()[0].item() for key, each in loaded.items() if key != "n_averaged"} == {value}
        if "discriminator" not in name:
            assert set(loaded) - {"n_averaged"} <= SHAPES.keys()
    with pytest.raises(ValueError, match=r"weights\.pt' to hold .*Name one"):
        load_state_dict(path, weights="other")


@pytest.mark.parametrize(
    "content",
    [
        {"state_dict": ONE, "optimizer": {"state": {0: {"exp_avg": torch.ones(4, 3)}}, "param_groups": [{"lr": 0.1}]}},
        {"model": ONE, "criterion": {"weight": torch.ones(4)}, "scaler": {"scale": torch.tensor(2.0)}},
        {"state_dict": ONE, "state_dict_ema": None},
        {"state_dict": ONE, "head": {"stem.weight": torch.ones(5, 3), "fc.weight": torch.ones(2, 2)}},
        {"state_dict": ONE, "optimizer": {"state": {"stem.weight": {"exp_avg": torch.ones(4, 3)}}}},
        ONE,
    ],
)
def test_other_tensors_in_a_file_are_no_rivals(content: dict[str, Any]) -> None:
    found = find_weights(content, SOURCE)
    assert found.keys in ((), ("state_dict",), ("model",))
    assert set(found.names) == set(SHAPES)


def test_a_name_that_there_is_not() -> None:
    with pytest.raises(ValueError, match=r"'file\.pt' to hold a set of weights called 'ema', but it does not\."):
        find_weights({"state_dict": ONE}, SOURCE, "ema")
    assert not find_weights({"state_dict": ONE}, SOURCE, "ema", optional=True).was_named
    with pytest.raises(ValueError, match="to hold one set of weights, but it holds 2"):
        find_weights({"state_dict": ONE, "average": TWO}, SOURCE, "ema", optional=True)


# In one mapping

COPIES: dict[str, tuple[str, str]] = {  # what the names of two sets begin with
    "DINO": ("student.", "teacher."),
    "wrapped DINO": ("module.student.backbone.", "module.teacher.backbone."),
    "a LightningModule": ("model.", "ema_model."),
    "timm's in a LightningModule": ("model.", "model_ema.module."),
    "BYOL": ("online_network.", "target_network."),
    "MoCo": ("encoder_q.", "encoder_k."),
    "I-JEPA": ("encoder.", "target_encoder."),
    "ALBEF": ("visual_encoder.", "visual_encoder_m_ema."),
    "deeper": ("net.student.", "net.teacher."),
    "the rest": ("", "ema."),
}


@pytest.mark.parametrize("case", COPIES)
def test_copies_in_one_mapping_are_told_by_their_names(case: str) -> None:
    first, second = COPIES[case]
    content = {**values(1, first), **values(2, second)}
    assert set(find_weights(content, SOURCE).names.values()) == set(content)  # all, for whoever has a model
    with pytest.raises(ValueError, match=r"but it holds 2: .* Name one by") as error:
        find_weights(content, SOURCE, by_names=True)
    assert set(find_weights(content, SOURCE, "*", by_names=True).names.values()) == set(content)
    for start in (first, second):
        plain = start.removeprefix("module.").removesuffix("module.").removesuffix("backbone.")
        name = plain[:-1] or "."
        assert f"{name!r}" in str(error.value)
        found = find_weights(content, SOURCE, name, by_names=True)
        assert found.was_named
        assert set(found.names.values()) == {f"{start}{name}" for name in SHAPES}
        assert {each.removeprefix("backbone.") for each in found.names} == set(SHAPES)


@pytest.mark.parametrize(
    "starts",
    [
        ("vision_model.encoder.", "text_model.encoder."),
        ("encoder.block.0.", "decoder.block.0."),
        ("attn.to_q.", "attn.to_k."),
        ("layers.0.", "layers.1."),
        ("question_encoder.", "ctx_encoder."),
        ("source_embed.", "target_embed."),
        ("netG_A.", "netG_B."),
        ("0.", "1."),
    ],
)
def test_parts_of_one_model_are_no_copies(starts: tuple[str, str]) -> None:
    content = {**values(1, starts[0]), **values(2, starts[1])}
    assert set(find_weights(content, SOURCE, by_names=True).names) == set(content)


def test_a_copy_of_another_kind_of_network_is_a_part() -> None:
    content = {**values(1, "model."), "teacher.embed.weight": torch.ones(9, 9), "teacher.head.bias": torch.ones(9)}
    assert set(find_weights(content, SOURCE, by_names=True).names) == set(content)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_one_of_two_in_one_mapping(suffix: str, tmp_path: Path) -> None:
    content = {**values(1, "student."), **values(2, "teacher.")}
    path = tmp_path / f"dino{suffix}"
    save_file(content, path) if suffix == ".safetensors" else torch.save(content, path)
    for name, value in (("student", 1), ("teacher", 2)):
        loaded = load_state_dict(path, weights=name)
        assert {key: each.flatten()[0].item() for key, each in loaded.items()} == dict.fromkeys(SHAPES, value)


# Into a module


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 4)
        self.blocks = nn.ModuleList([nn.Linear(4, 4, bias=False)])


def parts(start: str, seed: float) -> dict[str, Tensor]:
    return {name: value for name, value in values(seed, start).items() if "norm" not in name}


def test_two_sets_that_fit_a_module_are_an_error() -> None:
    both = {**parts("student.", 1), **parts("teacher.", 2)}
    with pytest.raises(ValueError, match=r"begin with 'student\.' and with 'teacher\.' do, and differ"):
        load_into(Net(), both)
    model = nn.ModuleDict({"student": Net(), "teacher": Net()})
    load_into(model, both)  # which is a model with places for both
    assert model["teacher"].stem.weight.unique().tolist() == [2]


@pytest.mark.parametrize(
    ("other", "value"),
    [
        (parts("teacher.", 1), 1),  # the same values
        (parts("", 3), 3),  # the very names
        ({"teacher.stem.weight": torch.ones(4, 3)}, 1),  # fits less
        ({**parts("teacher.", 2), "teacher.stem.bias": torch.ones(5)}, 1),
    ],
)
def test_one_set_that_fits_best_is_taken(other: dict[str, Tensor], value: float) -> None:
    model = Net()
    load_into(model, {**parts("student.", 1), **other})
    assert {each.flatten()[0].item() for each in model.parameters()} == {value}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner, self.head = nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight


@pytest.mark.parametrize("held", ["embed.weight", "head.weight"])
def test_a_tied_weight_under_one_of_its_names_is_enough(held: str) -> None:
    source, target = Tied(), Tied()
    weights = {name: value for name, value in source.state_dict().items() if not name.endswith("d.weight")}
    load_into(target, {**weights, held: source.embed.weight.detach()})
    assert torch.equal(target.embed.weight, source.embed.weight)
    assert target.head.weight is target.embed.weight
    untied = {**weights, "embed.weight": torch.ones(5, 4), "head.weight": torch.zeros(5, 4)}
    before = target.embed.weight.clone()
    with pytest.raises(
        ValueError, match=r"Expected one value for 'embed\.weight' and 'head\.weight', .* the same tensor"
    ):
        load_into(target, untied)
    assert torch.equal(target.embed.weight, before)
    load_into(target, {**untied, "head.weight": torch.ones(5, 4).double()})
    assert with_tied({}, {"a": "a"}) == {}
