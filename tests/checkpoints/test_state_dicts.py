"""Weights from files of every kind; files that are damaged, or that hold code, which must not run."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from lit_cka.checkpoints.state_dicts import load_into, load_state_dict, strip_wrappers

WEIGHTS = {
    "stem.weight": torch.arange(6.0).reshape(2, 3),
    "blocks.0.bias": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "norm.num_batches_tracked": torch.tensor(7),
}


class Settings:
    """What a training script may have pickled beside the weights."""


class Payload:
    """Unpickling this runs code: it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.folder),)


def assert_same(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor] = WEIGHTS) -> None:
    assert list(weights) == list(expected)
    for name, value in expected.items():
        assert weights[name].dtype == value.dtype
        assert weights[name].device.type == "cpu"
        assert torch.equal(weights[name], value)


def prefixed(prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{name}": value for name, value in WEIGHTS.items()}


CHECKPOINTS = {
    "plain": WEIGHTS,
    "Lightning": {
        "state_dict": WEIGHTS,
        "epoch": 3,
        "optimizer_states": [{"state": {0: torch.ones(2)}}],
        "loops": None,
    },
    "model_state_dict": {"model_state_dict": WEIGHTS, "step": torch.tensor(3)},
    "model": {"model": WEIGHTS, "args": ["--lr", 0.1]},
    "nested": {"model": {"state_dict": WEIGHTS}},
    "with other values": {**WEIGHTS, "version": 2, "note": "text"},
    "DDP": prefixed("module."),
    "compiled": prefixed("_orig_mod."),
    "DDP of compiled": prefixed("module._orig_mod."),
    "compiled DDP": prefixed("_orig_mod.module."),
    "open_clip": {"epoch": 3, "name": "run", "state_dict": prefixed("module.")},
}


@pytest.mark.parametrize("content", CHECKPOINTS.values(), ids=CHECKPOINTS)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_every_layout_of_a_checkpoint(content: Mapping[str, Any], zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "weights.ckpt"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert_same(load_state_dict(path))
    assert_same(load_state_dict(str(path)))


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_safetensors(prefix: str, tmp_path: Path) -> None:
    save_file(prefixed(prefix), tmp_path / "weights.safetensors")
    loaded = load_state_dict(tmp_path / "weights.safetensors")
    assert_same({name: loaded[name] for name in WEIGHTS})
    assert len(loaded) == len(WEIGHTS)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["module.a", "module.b.c"], ["a", "b.c"]),
        (["module.module.a"], ["a"]),
        (["module.a", "other.b"], ["module.a", "other.b"]),
        (["modules.a", "modules.b"], ["modules.a", "modules.b"]),
        (["blocks.0._orig_mod.weight", "head.weight"], ["blocks.0.weight", "head.weight"]),
        (["model.a", "model.b"], ["model.a", "model.b"]),
        ([], []),
    ],
)
def test_only_wrappers_around_all_names_are_stripped(names: list[str], expected: list[str]) -> None:
    assert list(strip_wrappers(dict.fromkeys(names, torch.ones(1)))) == expected


def test_the_compiled_model_s_own_names_are_recovered() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    assert list(strip_wrappers(torch.compile(model).state_dict())) == list(model.state_dict())


@pytest.mark.timeout(10)
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_a_file_without_tensors_is_an_error(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"empty{suffix}"
    if suffix == ".safetensors":
        save_file({}, path)
    else:
        torch.save({}, path)
    with pytest.raises(ValueError, match=rf"Expected '.*empty{suffix}' to hold a state dict of tensors, but it holds"):
        load_state_dict(path)


@pytest.mark.parametrize(
    ("content", "held"),
    [
        ({"epoch": 3, "loss": 0.1}, r"keys \['epoch', 'loss'\]"),
        ({"state_dict": {}}, r"keys \[\]"),
        ([torch.ones(2)], "a list"),
        (torch.ones(2), "a Tensor"),
        (None, "a NoneType"),
    ],
)
def test_a_file_that_holds_something_else_is_an_error(content: Any, held: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "else.pt")
    with pytest.raises(
        ValueError, match=rf"Expected '.*else\.pt' to hold a state dict of tensors, but it holds {held}"
    ):
        load_state_dict(tmp_path / "else.pt")


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"Expected a checkpoint file at '.*none\.ckpt', but there is none"):
        load_state_dict(tmp_path / "none.ckpt")
    with pytest.raises(FileNotFoundError, match="but there is none"):
        load_state_dict(tmp_path)


# Pickled objects


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_pickled_code_is_not_run(zipped: bool, tmp_path: Path) -> None:
    path, folder = tmp_path / "untrusted.ckpt", tmp_path / "made by unpickling"
    torch.save({"state_dict": WEIGHTS, "extra": Payload(folder)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"untrusted\.ckpt"):
        load_state_dict(path)
    assert not folder.exists()
    with pytest.raises(ValueError, match=r"'.*untrusted\.ckpt' holds pickled objects .* weights_only=False"):
        load_state_dict(path)
    assert_same(load_state_dict(path, weights_only=False))
    assert folder.exists()  # so that the test would notice


def test_pickled_objects_are_read_where_the_file_is_trusted(tmp_path: Path) -> None:
    torch.save({"state_dict": WEIGHTS, "args": Settings()}, tmp_path / "own.pt")
    with pytest.raises(ValueError, match=r"runs code of the file's author.*weights_only=False"):
        load_state_dict(tmp_path / "own.pt")
    assert_same(load_state_dict(tmp_path / "own.pt", weights_only=False))


def test_the_error_names_what_is_pickled(tmp_path: Path) -> None:
    torch.save({"state_dict": WEIGHTS, "args": Settings()}, tmp_path / "own.pt")
    with pytest.raises(ValueError, match=r"test_state_dicts\.Settings") as error:
        load_state_dict(tmp_path / "own.pt")
    assert str(error.value).isprintable()  # no escape sequences, which torch uses for bold


@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: {"model": model, "epoch": 3}])
def test_a_whole_pickled_module_is_read_where_the_file_is_trusted(
    wrap: Callable[[nn.Module], Any], tmp_path: Path
) -> None:
    model = nn.BatchNorm1d(3)
    torch.save(wrap(model), tmp_path / "model.pt")
    with pytest.raises(ValueError, match="weights_only=False"):
        load_state_dict(tmp_path / "model.pt")
    assert_same(load_state_dict(tmp_path / "model.pt", weights_only=False), model.state_dict())


# Damaged files

DAMAGED = r"is damaged or no (checkpoint|safetensors file)"


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize(
    "content",
    [b"", b"no weights", b"<!DOCTYPE html>", bytes(100), b"PK\x03\x04" + b"x" * 50],
    ids=["nothing", "text", "HTML", "zeros", "zip header"],
)
def test_garbage_is_called_damaged_and_not_to_be_unpickled(content: bytes, suffix: str, tmp_path: Path) -> None:
    """A failed download, say. Advice to read it with `weights_only=False` would be bad advice."""
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=DAMAGED) as error:
        load_state_dict(path)
    assert "weights_only" not in str(error.value).replace(str(path), "")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@settings(max_examples=100, deadline=None)
@given(content=st.binary(max_size=60))
@example(content=b"\x85")  # pops from an empty stack
@example(content=b"r")  # a number of four bytes that are not there
@example(content=b"\x80\x02q\x00.")
def test_no_bytes_raise_anything_else(content: bytes, suffix: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / f"bytes{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        load_state_dict(path)


@pytest.fixture(scope="module", params=["safetensors", "zip", "legacy"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / (
        "weights.safetensors" if request.param == "safetensors" else "weights.pt"
    )
    if request.param == "safetensors":
        save_file(WEIGHTS, path)
    else:
        torch.save(WEIGHTS, path, _use_new_zipfile_serialization=request.param == "zip")
    return path


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9, 0.99])
def test_a_truncated_file_is_an_error(whole: Path, share: float, tmp_path: Path) -> None:
    content = whole.read_bytes()
    path = tmp_path / whole.name
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=rf"'{re.escape(str(path))}' {DAMAGED}"):
        load_state_dict(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_byte_gone_wrong_raises_nothing_else(whole: Path, data: st.DataObject) -> None:
    content = bytearray(whole.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = whole.with_stem("changed")
    path.write_bytes(content)
    with suppress(ValueError):  # none, where the byte is a number's or one that is never read
        load_state_dict(path)


# Into a module


def small_model() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))


@pytest.mark.parametrize("prefix", ["", "net."])
@pytest.mark.parametrize("compiled", [False, True])
def test_weights_are_copied_by_name_whatever_the_wrapper(prefix: str, compiled: bool) -> None:
    source, target = small_model(), small_model().double()
    source(torch.randn(5, 2))
    weights = {f"{prefix}{name}": value for name, value in source.state_dict().items()}
    before = list(target.parameters())
    assert load_into(torch.compile(target) if compiled else target, {**weights, "text.weight": torch.ones(2)}) == []
    for name, value in target.state_dict().items():
        assert torch.equal(value, source.state_dict()[name].to(value.dtype)), name
    assert all(mine is parameter for mine, parameter in zip(target.parameters(), before, strict=True))
    assert target[0].weight.dtype == torch.float64


def test_weights_of_another_architecture_are_an_error_that_changes_nothing() -> None:
    target = small_model()
    before = {name: value.clone() for name, value in target.state_dict().items()}
    weights = {**small_model().state_dict(), "2.weight": torch.ones(5, 3), "2.bias": torch.ones(5)}
    message = (
        r"another architecture: 2 of the 8 tensors needed are missing .* Expected 2\.weight \(2, 3\), 2\.bias \(2,\)"
    )
    with pytest.raises(ValueError, match=message):
        load_into(target, weights)
    assert_same(target.state_dict(), before)
    assert load_into(target, weights, optional=("2.",)) == ["2.weight", "2.bias"]
    assert torch.equal(target[0].weight, weights["0.weight"])
    assert torch.equal(target[2].weight, before["2.weight"])
