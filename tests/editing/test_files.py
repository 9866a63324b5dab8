"""Edits of files: the bytes are those of `edit_parameter`, whatever the format, the kills and the number of ranks."""

from __future__ import annotations

import csv
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lit_cka.editing.artifacts import describe_edit
from lit_cka.editing.files import edit_files
from lit_cka.editing.parameter import EDITED, edit_parameter
from lit_cka.editing.settings import EditSettings
from lit_cka.files import partial_name
from tests.sync_worker import run_to_end

WORKER = str(Path(__file__).with_name("files_worker.py"))
SETTINGS = EditSettings()


def weights(seed: int, start: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Tensors of many kinds; with `start`, small changes of those."""
    generator = torch.Generator().manual_seed(seed)

    def values(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        return noise.to(dtype) if start is None else (start[name].double() + 0.1 * noise).to(dtype)

    made = {f"layers.{i}.weight": values(f"layers.{i}.weight", 12, 20) for i in range(12)}
    made |= {
        "conv.weight": values("conv.weight", 8, 3, 3, 3),
        "half": values("half", 9, 30, dtype=torch.float16),
        "bfloat": values("bfloat", 30, 9, dtype=torch.bfloat16),
        "double": values("double", 7, 7, dtype=torch.float64),
        "bias": values("bias", 13),
        "scalar": values("scalar"),
        "empty": torch.zeros(0, 4),
        "same": torch.ones(3, 3),
        "counts": torch.arange(6).view(2, 3) + seed,
        "mask": torch.tensor([True, False]),
        "eight": values("eight", 4, 4).to(torch.float8_e4m3fn),
    }
    return made


W0 = weights(0)
W1 = weights(1, W0)


def expected(variant: str = "monosoup", settings: EditSettings = SETTINGS) -> dict[str, Tensor]:
    return {
        name: W1[name] if name == "eight" else edit_parameter(name, W0[name], W1[name], settings, [variant])[0][variant]
        for name in W1
    }


def folder(path: Path, tensors: dict[str, Tensor], num_shards: int) -> Path:
    """As `save_pretrained` writes it, with a shard for every so manyth tensor, and what else is in such folders."""
    path.mkdir(parents=True)
    (path / "config.json").write_text('{"a": 1}')
    (path / "tokenizer").mkdir()
    (path / "tokenizer" / "vocab.txt").write_text("word\n")
    for junk in ("pytorch_model.bin", "optimizer.pt", "pytorch_model.bin.index.json", ".hidden", "checkpoint-5/x.json"):
        (path / junk).parent.mkdir(exist_ok=True)
        (path / junk).write_text("{}")
    names, metadata = list(tensors), {"format": "pt", "of": path.name}
    if num_shards == 1:
        save_file(tensors, path / "model.safetensors", metadata)
        return path
    weight_map = {}
    for index in range(num_shards):
        shard = f"model-{index + 1:05}-of-{num_shards:05}.safetensors"
        save_file({name: tensors[name] for name in names[index::num_shards]}, path / shard, metadata)
        weight_map |= dict.fromkeys(names[index::num_shards], shard)
    index = {"metadata": {"total_size": 5, "from": path.name}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def contents(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def load_folder(path: Path) -> dict[str, Tensor]:
    return {name: value for file in path.glob("*.safetensors") for name, value in load_file(file).items()}


def assert_same(actual: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert actual.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (actual[name].dtype, actual[name].shape) == (value.dtype, value.shape), name
        own, other = (each.contiguous().reshape(-1).view(torch.uint8) for each in (actual[name], value))
        assert torch.equal(own, other), name


def edit(*paths: Path, **options: Any) -> Any:
    return edit_files(*paths, options.pop("settings", SETTINGS), progress=False, **options)


def names_in(path: Path) -> set[str]:
    return {file.name for file in path.iterdir()}


@pytest.mark.parametrize(("num_shards0", "num_shards1"), [(1, 1), (1, 3), (4, 1), (2, 5)])
def test_folders_keep_the_layout_of_the_finetuned_model(tmp_path: Path, num_shards0: int, num_shards1: int) -> None:
    a, b = folder(tmp_path / "a", W0, num_shards0), folder(tmp_path / "b", W1, num_shards1)
    records = edit(a, b, tmp_path / "out")
    assert_same(load_folder(tmp_path / "out"), expected())
    assert names_in(tmp_path) == {"a", "b", "out"}

    wanted = [file for file in contents(b) if file.endswith(("safetensors", "vocab.txt", "config.json"))]
    wanted += ["model.safetensors.index.json"] if num_shards1 > 1 else []
    assert sorted(contents(tmp_path / "out")) == sorted(wanted)
    for name in wanted:
        if not name.endswith(".safetensors"):
            assert contents(tmp_path / "out")[name] == contents(b)[name]
            continue
        with safe_open(tmp_path / "out" / name, "pt") as ours, safe_open(b / name, "pt") as theirs:
            assert ours.metadata() == theirs.metadata() == {"format": "pt", "of": "b"}
            assert ours.keys() == theirs.keys()

    of = {record["name"]: record for record in records}
    assert of.keys() == W1.keys()
    assert [name for name in of if name.startswith("layers")] == [f"layers.{i}.weight" for i in range(12)]
    for name in W1:
        if name != "eight":
            assert of[name] == edit_parameter(name, W0[name], W1[name], SETTINGS)[1]
    assert of["eight"]["reason"] == "stored as F8_E4M3"


@pytest.mark.parametrize("variant", EDITED)
def test_single_files_and_variants(tmp_path: Path, variant: str) -> None:
    save_file(W0, tmp_path / "a.safetensors")
    save_file(W1, tmp_path / "b.safetensors", {"format": "pt"})
    settings = EditSettings("energy", 0.6)
    edit(
        tmp_path / "a.safetensors",
        tmp_path / "b.safetensors",
        tmp_path / "c.safetensors",
        settings=settings,
        variant=variant,
    )
    assert_same(load_file(tmp_path / "c.safetensors"), expected(variant, settings))
    assert names_in(tmp_path) == {"a.safetensors", "b.safetensors", "c.safetensors"}


@pytest.mark.parametrize("wrap", ["plain", "nested", "ddp", "old format"])
def test_state_dicts(tmp_path: Path, wrap: str) -> None:
    a, b, out = (tmp_path / name for name in ("a.pt", "b.ckpt", "out.pt"))
    kept = {name: value for name, value in W1.items() if wrap != "old format" or name != "eight"}  # torch can't read it
    tied = {**kept, "tied": W1["conv.weight"]}
    torch.save({**{name: W0[name] for name in kept}, "tied": W0["conv.weight"]}, a)
    content: dict[str, Any] = {
        "plain": tied,
        "nested": {"state_dict": tied, "epoch": 3, "optimizer": [torch.ones(2)]},
        "ddp": {"model": {f"module.{name}": value for name, value in tied.items()}},
        "old format": tied,
    }[wrap]
    torch.save(content, b, _use_new_zipfile_serialization=wrap != "old format")
    records = edit(a, b, out)
    loaded = torch.load(out)
    assert list(loaded) == list(content)
    saved = loaded.get("state_dict") or loaded.get("model") or loaded
    assert list(saved) == list(content.get("state_dict") or content.get("model") or content)
    saved = {name.removeprefix("module."): value for name, value in saved.items()}
    assert saved["tied"].data_ptr() == saved["conv.weight"].data_ptr()
    assert_same({name: saved[name] for name in kept}, {name: expected()[name] for name in kept})
    if wrap == "nested":
        assert loaded["epoch"] == 3
        assert torch.equal(loaded["optimizer"][0], torch.ones(2))
    assert records[-1]["reason"] == "tied to conv.weight"
    assert names_in(tmp_path) == {"a.pt", "b.ckpt", "out.pt"}


def sets(first: str, second: str, seed: int) -> dict[str, Tensor]:
    """A network and a copy of it, in one mapping; what a training goes on with is beside them."""
    generator = torch.Generator().manual_seed(seed)
    copies = {
        f"{start}{name}": torch.randn(8, 12, generator=generator)
        for start in (first, second)
        for name in ("a.weight", "b.weight")
    }
    return {**copies, "center": torch.randn(3, 3, generator=generator)}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("plain", [False, True])
def test_one_of_several_sets_of_weights_is_edited(tmp_path: Path, suffix: str, plain: bool) -> None:
    before, after = sets("student.", "teacher.", 0), sets("student.", "teacher.", 1)
    names = ["teacher.a.weight", "teacher.b.weight"]
    if plain:
        before = {name.removeprefix("teacher."): before[name] for name in names}
    save, load = (save_file, load_file) if suffix == ".safetensors" else (torch.save, torch.load)
    paths = [tmp_path / f"{name}{suffix}" for name in "abc"]
    save(before, paths[0])
    save(after, paths[1])
    with pytest.raises(
        ValueError, match=r"b\.|a\..*holds 2: 'student' \(2 tensors\), 'teacher' \(2 tensors\)\. Name one"
    ):
        edit(*paths)
    assert len(list(tmp_path.iterdir())) == 2
    records = edit(*paths, weights="teacher", variant="lowonly")
    wanted = dict(after)
    for name in names:
        start = before[name.removeprefix("teacher.") if plain else name]
        wanted[name] = edit_parameter(name, start, after[name], SETTINGS, ["lowonly"])[0]["lowonly"]
        assert not torch.equal(wanted[name], after[name])
    assert_same(load(paths[2]), wanted)
    reasons = {record["name"]: record["reason"] for record in records}
    assert reasons == {name: None if name in names else "of another set of weights" for name in after}
    with pytest.raises(ValueError, match=r"'student' .2 tensors.|called 'ema'"):
        edit(*paths[:2], tmp_path / f"d{suffix}", weights="ema")


def test_one_of_several_sets_in_mappings_of_their_own(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    plain, first, second = ({"a.weight": torch.randn(8, 12, generator=generator)} for _ in range(3))
    torch.save(plain, tmp_path / "a.pt")
    torch.save({"state_dict": first, "state_dict_ema": second, "epoch": 2}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match=r"'state_dict_ema' \(1 tensor; timm would load this one\)"):
        edit(tmp_path / "a.pt", tmp_path / "b.pt", tmp_path / "c.pt")
    edit(tmp_path / "a.pt", tmp_path / "b.pt", tmp_path / "c.pt", weights="state_dict_ema", variant="lowonly")
    content = torch.load(tmp_path / "c.pt")
    assert content["epoch"] == 2
    assert torch.equal(content["state_dict"]["a.weight"], first["a.weight"])
    wanted = edit_parameter("a.weight", plain["a.weight"], second["a.weight"], SETTINGS)[0]["lowonly"]
    assert torch.equal(content["state_dict_ema"]["a.weight"], wanted)
    with pytest.raises(ValueError, match="called 'ema', but neither has one"):
        edit(tmp_path / "a.pt", tmp_path / "a.pt", tmp_path / "d.pt", weights="ema")


@pytest.mark.parametrize("names", [("head", "embed"), ("embed", "head")])
def test_a_tied_weight_is_edited_whichever_name_the_other_file_has(tmp_path: Path, names: tuple[str, str]) -> None:
    generator = torch.Generator().manual_seed(0)
    before, after, other = torch.randn(3, 8, 12, generator=generator)
    wanted = edit_parameter("", before, after, SETTINGS, ["lowonly"])[0]["lowonly"]
    torch.save({names[0]: after, names[1]: after, "other": other}, tmp_path / "b.pt")
    for held in names:
        save_file({held: before.clone(), "other": other}, tmp_path / "a.safetensors")
        records = edit(tmp_path / "a.safetensors", tmp_path / "b.pt", tmp_path / f"{held}.pt", variant="lowonly")
        assert [record["reason"] for record in records] == [None, f"tied to {names[0]}", "unchanged"]
        loaded = torch.load(tmp_path / f"{held}.pt")
        assert torch.equal(loaded[names[0]], wanted)
        assert loaded[names[0]].data_ptr() == loaded[names[1]].data_ptr()


def test_formats_mix_and_one_file_may_lack_the_second_name_of_a_tied_weight(tmp_path: Path) -> None:
    a = folder(tmp_path / "a", W0, 3)
    torch.save({"tied": W1["half"], **W1}, tmp_path / "b.pt")
    edit(a, tmp_path / "b.pt", tmp_path / "c.pt")
    assert_same(torch.load(tmp_path / "c.pt"), {"tied": expected()["half"], **expected()})
    edit(tmp_path / "b.pt", a, tmp_path / "d")  # the other way round
    assert load_folder(tmp_path / "d").keys() == W1.keys()


def test_transformers_loads_the_output(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=3, n_head=2)
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        GPT2LMHeadModel(config).save_pretrained(tmp_path / name, max_shard_size="12KB" if seed else "20KB")
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 2
    records = edit(tmp_path / "a", tmp_path / "b", tmp_path / "out")
    a, b, out = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("a", "b", "out"))
    assert sum(record["k"] is not None for record in records) == 2 + 3 * 4
    assert out.lm_head.weight is out.transformer.wte.weight
    before, after = a.state_dict(), b.state_dict()
    for name, value in out.state_dict().items():
        wanted, _ = edit_parameter(name, before[name], after[name], SETTINGS)
        assert torch.equal(value, wanted["monosoup"]), name


def quantised(W: Tensor, kind: str) -> dict[str, Tensor]:
    """A layer (64, 64) as a format stores it: what stands for the weights, and what belongs to it."""
    scale = W.reshape(4, 16, 4, 16).abs().amax((1, 3))
    grown = scale.repeat_interleave(16, 0).repeat_interleave(16, 1)
    if kind == "block FP8":
        return {"l.weight": (W / grown * 448).to(torch.float8_e4m3fn), "l.weight_scale_inv": scale / 448}
    if kind == "whole numbers":
        return {"l.qweight": (W / grown * 7).round().int(), "l.scales": (scale / 7).half(), "l.bias": W[0].clone()}
    nested = {"l.weight.absmax": scale.flatten(), "l.weight.quant_state.bitsandbytes__nf4": torch.ones(9).byte()}
    return {"l.weight": (W / grown).reshape(-1, 1).bfloat16(), **nested}


@pytest.mark.parametrize("kind", ["block FP8", "whole numbers", "numbers in bfloat16"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_quantised_weights_stay_as_they_are(tmp_path: Path, kind: str, suffix: str) -> None:
    generator = torch.Generator().manual_seed(0)
    before, after = torch.randn(2, 64, 64, generator=generator)
    models = [{**quantised(W, kind), "m.weight": W} for W in (before, before + 0.1 * after)]
    save = save_file if suffix == ".safetensors" else torch.save
    for name, tensors in zip("ab", models, strict=True):
        save(tensors, tmp_path / f"{name}{suffix}")
    records = edit(tmp_path / f"a{suffix}", tmp_path / f"b{suffix}", tmp_path / f"c{suffix}", variant="lowonly")
    wanted, _ = edit_parameter("m.weight", models[0]["m.weight"], models[1]["m.weight"], SETTINGS)
    load = load_file if suffix == ".safetensors" else torch.load
    assert_same(load(tmp_path / f"c{suffix}"), {**models[1], "m.weight": wanted["lowonly"]})
    reasons = {record["name"]: record["reason"] for record in records}
    assert reasons == {**dict.fromkeys(models[1], "part of quantised weights"), "m.weight": None}
    assert f"{len(models[1]) - 1} (part of quantised weights)" in describe_edit(records)


def test_report(tmp_path: Path) -> None:
    a, b = folder(tmp_path / "a", {**W0, "same": torch.zeros(3, 3)}, 1), folder(tmp_path / "b", W1, 2)
    records = edit(a, b, tmp_path / "out", report=tmp_path / "out" / "report.json")
    report = json.loads((tmp_path / "out" / "report.json").read_text(), parse_constant=pytest.fail)
    assert (report["variant"], report["rule"]) == ("monosoup", "effective_rank")
    for record, told in zip(records, report["parameters"], strict=True):
        assert told == {**record, **({"relative_change": None} if record["name"] == "same" else {})}
    edit(a, b, tmp_path / "again", report=tmp_path / "report.csv")
    with (tmp_path / "report.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [record["name"] for record in records]
    assert {row["shape"] for row in rows} >= {"8x3x3x3", "13"}


def test_differences_that_are_allowed_stay_as_they_are(tmp_path: Path) -> None:
    a = folder(tmp_path / "a", {**W0, "conv.weight": torch.ones(2, 2), "extra": torch.ones(2)}, 2)
    b = folder(tmp_path / "b", {**W1, "head": torch.ones(5, 3)}, 3)
    with pytest.warns(UserWarning, match="3 tensors in which the models differ are not edited"):
        records = edit(a, b, tmp_path / "out", allow_differences=True)
    wanted = {**expected(), "conv.weight": W1["conv.weight"], "head": torch.ones(5, 3)}
    assert_same(load_folder(tmp_path / "out"), wanted)
    reasons = {record["name"]: record["reason"] for record in records}
    assert reasons["head"] == "not in the pretrained model"
    assert reasons["conv.weight"] == "shape (2, 2) in the pretrained model"


def damaged(tmp_path: Path, what: str) -> tuple[Path, Path, dict[str, Any]]:
    """Inputs with one thing wrong, and options."""
    a, b = folder(tmp_path / "a", W0, 2), folder(tmp_path / "b", W1, 3)
    shard = b / "model-00002-of-00003.safetensors"
    content = shard.read_bytes()
    if what == "truncated":
        shard.write_bytes(content[:-7])
    elif what == "truncated header":
        shard.write_bytes(content[:20])
    elif what == "no safetensors":
        shard.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:1234\n")
    elif what == "header of garbage":
        shard.write_bytes((40).to_bytes(8, "little") + b"{" * 40)
    elif what == "missing shard":
        shard.unlink()
    elif what == "no index":
        (b / "model.safetensors.index.json").write_text("[]")
    elif what == "index of other tensors":
        index = json.loads((b / "model.safetensors.index.json").read_text())
        index["weight_map"]["ghost"] = shard.name
        (b / "model.safetensors.index.json").write_text(json.dumps(index))
    elif what == "no weights":
        shutil.rmtree(b)
        b.mkdir()
    elif what == "missing file":
        shutil.rmtree(a)
    elif what in ("not a number", "infinite"):
        bad = {**W1, "layers.7.weight": torch.full((12, 20), float("nan" if what == "not a number" else "inf"))}
        shutil.rmtree(b)
        folder(b, bad, 3)
    elif what == "shapes":
        shutil.rmtree(b)
        folder(b, {**W1, "conv.weight": torch.ones(4, 3)}, 3)
    elif what == "missing keys":
        shutil.rmtree(b)
        folder(b, {name: value for name, value in W1.items() if not name.startswith("layers")}, 3)
    elif what == "architecture":
        shutil.rmtree(b)
        folder(b, {f"other.{name}": value for name, value in W1.items()}, 3)
    elif what in ("pickle", "garbage"):
        b = tmp_path / "b.pt"
        torch.save({"model": nn.Linear(2, 2)}, b) if what == "pickle" else b.write_bytes(b"\x80garbage")
    elif what == "state dict of none":
        b = tmp_path / "b.pt"
        torch.save({"epoch": 3}, b)
    return a, b, {"device": "mps"} if what == "device" else {"variant": "mono"} if what == "variant" else {}


@pytest.mark.parametrize(
    ("what", "error", "message"),
    [
        ("truncated", ValueError, r"model-00002-of-00003.safetensors' is truncated, damaged or no safetensors file"),
        ("truncated header", ValueError, r"model-00002-of-00003.safetensors' is truncated"),
        ("no safetensors", ValueError, r"model-00002-of-00003.safetensors' is .* no safetensors file"),
        ("header of garbage", ValueError, r"model-00002-of-00003.safetensors' is .* damaged"),
        ("missing shard", ValueError, r"names shards that are not beside it: 'model-00002-of-00003.safetensors'"),
        ("no index", ValueError, r"index.json' is damaged or no index of shards"),
        ("index of other tensors", ValueError, r"lack 1 of its tensors, such as 'ghost'"),
        ("no weights", ValueError, r"Expected .* to hold model.safetensors"),
        ("missing file", FileNotFoundError, r"Expected a checkpoint file or folder at .*/a'"),
        ("not a number", ValueError, r"'layers.7.weight' of the fine-tuned model holds NaN"),
        ("infinite", ValueError, r"'layers.7.weight' of the fine-tuned model holds NaN or infinity"),
        (
            "shapes",
            ValueError,
            r"(?s)differ in 1 tensors.*tensor +pretrained +fine-tuned\n  conv.weight +\(8, 3, 3, 3\) +\(4, 3\)",
        ),
        (
            "missing keys",
            ValueError,
            r"(?s)differ in 12 tensors.*layers.\d+.weight +\(12, 20\) +missing.*and 2 more.*--allow",
        ),
        ("architecture", ValueError, r"(?s)no tensor has the same name and shape.*missing"),
        ("pickle", ValueError, r"pickled objects besides weights .* If you trust it, pass `trusted=True`"),
        ("garbage", ValueError, r"b.pt' is damaged or no checkpoint"),
        ("state dict of none", ValueError, r"to hold a state dict of tensors, but it holds keys \['epoch'\]"),
        ("device", ValueError, r"Expected `device` to be one that computes in float64 here, but got 'mps'"),
        ("variant", ValueError, r"Expected an edit \(monosoup, .*but got 'mono'\. Did you mean 'monosoup'\?"),
    ],
)
def test_bad_inputs_are_one_error_and_no_output(
    tmp_path: Path, what: str, error: type[Exception], message: str
) -> None:
    a, b, options = damaged(tmp_path, what)
    before = names_in(tmp_path)
    with pytest.raises(error, match=message):
        edit(a, b, tmp_path / ("out.pt" if b.suffix == ".pt" else "out"), **options)
    assert names_in(tmp_path) == before


def test_bad_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = folder(tmp_path / "a", W0, 2), folder(tmp_path / "b", W1, 3)
    (tmp_path / "link").symlink_to(b)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "mine.partial").mkdir()
    (tmp_path / "mine.partial" / "thesis.txt").touch()
    save_file(W1, tmp_path / "b.safetensors")
    wrong: list[tuple[Path, str, type[Exception]]] = [
        (a, "Expected `output` to be no input", ValueError),
        (b, "Expected `output` to be no input", ValueError),
        (tmp_path / "link", "Expected `output` to be no input", ValueError),
        (tmp_path / "x" / ".." / "b", "Expected `output` to be no input", ValueError),
        (b / "out", "Expected `output` beside the inputs", ValueError),
        (tmp_path, "Expected `output` beside the inputs", ValueError),
        (tmp_path / "full", "Expected `output` to be new", FileExistsError),
        (tmp_path / "mine", "Expected no folder .*mine.partial", ValueError),
    ]
    before = contents(tmp_path)
    for output, message, error in wrong:
        with pytest.raises(error, match=message):
            edit(a, b, output)
    with pytest.raises(
        ValueError, match=r"Expected `output` to be of the format of the fine-tuned model, .safetensors"
    ):
        edit(a, tmp_path / "b.safetensors", tmp_path / "out.pt")
    for report, message in [
        ("report.txt", "to end in .json or .csv"),
        ("b/config.json", "Expected `report` apart from the models"),
        ("none/report.csv", "Expected `report` to be a file in a folder that can be written to"),
    ]:
        with pytest.raises((ValueError, OSError), match=message):
            edit(a, b, tmp_path / "out", report=tmp_path / report)
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"Expected 0.0\d\d GB free in .*, but there are 0.000 GB"):
        edit(a, b, tmp_path / "out")
    assert contents(tmp_path) == before


def test_pickles_that_are_trusted(tmp_path: Path) -> None:
    models = [nn.Linear(6, 5) for _ in range(2)]
    for name, model in zip("ab", models, strict=True):
        torch.save({"model": model, "epoch": 2}, tmp_path / f"{name}.pt")
    edit(tmp_path / "a.pt", tmp_path / "b.pt", tmp_path / "c.pt", trusted=True)
    wanted, _ = edit_parameter("weight", models[0].weight.detach(), models[1].weight.detach(), SETTINGS)
    assert torch.equal(torch.load(tmp_path / "c.pt")["model"]["weight"], wanted["monosoup"])


class Stop(BaseException):
    """Like Ctrl-C."""


@pytest.mark.parametrize("kind", ["folder", "state dict"])
def test_an_interrupted_edit_goes_on_where_it_was(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "folder":
        paths = folder(tmp_path / "a", W0, 2), folder(tmp_path / "b", W1, 3)
    else:
        paths = tmp_path / "a.pt", tmp_path / "b.pt"
        torch.save(W0, paths[0]), torch.save(W1, paths[1])
    whole = edit(*paths, tmp_path / "whole.pt")
    seen: list[str] = []

    def stopping(name: str, *args: Any, **more: Any) -> Any:
        seen.append(name)
        if len(seen) == 9:
            raise Stop
        return edit_parameter(name, *args, **more)

    monkeypatch.setattr("lit_cka.editing.files.edit_parameter", stopping)
    with pytest.raises(Stop):
        edit(*paths, tmp_path / "out.pt")
    assert not (tmp_path / "out.pt").exists()
    journal = tmp_path / "out.pt.partial" / "journal-0.jsonl"
    journal.write_bytes(journal.read_bytes() + b'{"name": "bi')  # a line cut off
    shutil.copytree(tmp_path / "out.pt.partial", tmp_path / "other.pt.partial")
    assert edit(*paths, tmp_path / "out.pt") == whole
    assert contents(tmp_path / "out.pt") == contents(tmp_path / "whole.pt")
    assert set(seen) == set(W1)
    assert all(seen.count(name) == 1 for name in seen[:8])
    assert not (tmp_path / "out.pt.partial").exists()

    with pytest.warns(UserWarning, match="other.pt.partial was of another job"):
        edit(*paths, tmp_path / "other.pt", variant="lowonly")
    loaded = load_folder(tmp_path / "other.pt") if kind == "folder" else torch.load(tmp_path / "other.pt")
    assert_same(loaded, expected("lowonly"))


def test_killed_while_the_job_was_noted(tmp_path: Path) -> None:
    a, b = folder(tmp_path / "a", W0, 2), folder(tmp_path / "b", W1, 3)
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / partial_name("job.json")).write_text('{"half')
    with pytest.warns(UserWarning, match="it starts anew"):
        assert len(edit(a, b, tmp_path / "out")) == len(W1)
    assert names_in(tmp_path) == {"a", "b", "out"}


def many(path: Path, seed: int, num_tensors: int = 80) -> Path:
    generator = torch.Generator().manual_seed(seed)
    tensors = {f"layers.{i}.weight": torch.randn(96, 150, generator=generator) for i in range(num_tensors)}
    return folder(path, tensors, 3)


@pytest.mark.timeout(150)
def test_killed_and_resumed_is_byte_identical(tmp_path: Path) -> None:
    a, b = many(tmp_path / "a", 0), many(tmp_path / "b", 1)
    edit(a, b, tmp_path / "whole")
    run_to_end(WORKER, "kills", a, b, tmp_path / "out", 10, seconds=120)
    kills = json.loads((tmp_path / "out-kills.json").read_text())
    assert len(kills) >= 4
    assert kills[-1] > 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert names_in(tmp_path) == {"a", "b", "whole", "out", "out-kills.json"}


def run_ranks(*paths: Path, size: int, monkeypatch: pytest.MonkeyPatch, kill_after: str = "") -> list[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("LIT_CKA_PORT", str(free.getsockname()[1]))
    run_to_end(WORKER, "ranks", *paths, size, *kill_after.split(), seconds=90)
    return [Path(f"{paths[2]}-{rank}.txt").read_text() for rank in range(size)]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", ["folder", pytest.param("state dict", marks=pytest.mark.slow)])
def test_ranks_write_what_one_process_writes(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "folder":
        a, b = folder(tmp_path / "a", W0, 2), folder(tmp_path / "b", W1, 3)
    else:
        a, b = tmp_path / "a.pt", tmp_path / "b.pt"
        torch.save(W0, a), torch.save(W1, b)
    edit(a, b, tmp_path / "whole.pt")
    assert run_ranks(a, b, tmp_path / "out.pt", size=3, monkeypatch=monkeypatch) == ["no error"] * 3
    assert contents(tmp_path / "out.pt") == contents(tmp_path / "whole.pt")
    assert not (tmp_path / "out.pt.partial").exists()


@pytest.mark.timeout(150)
@pytest.mark.parametrize("kind", [pytest.param("folder", marks=pytest.mark.slow), "state dict"])
def test_ranks_that_are_killed_go_on(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = many(tmp_path / "a", 0), many(tmp_path / "b", 1)
    if kind == "state dict":
        for path in (a, b):
            tensors = {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}
            torch.save(dict(sorted(tensors.items())), path.with_suffix(".pt"))
        a, b = a.with_suffix(".pt"), b.with_suffix(".pt")
    out = tmp_path / f"out{a.suffix}"
    edit(a, b, tmp_path / f"whole{a.suffix}")
    assert run_ranks(a, b, out, size=2, monkeypatch=monkeypatch, kill_after="10") == ["no error"] * 2
    assert 10 <= int(Path(f"{out}-killed.txt").read_text()) < 80
    assert contents(out) == contents(tmp_path / f"whole{a.suffix}")
    assert not Path(f"{out}.partial").exists()


def test_a_report_in_the_place_of_a_file_of_the_model(tmp_path: Path) -> None:
    a, b = folder(tmp_path / "a", W0, 2), folder(tmp_path / "b", W1, 2)
    (b / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="a name of its own, but the model has"):
        edit(a, b, tmp_path / "out", report=tmp_path / "out" / "config.json")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_torchrun(tmp_path: Path) -> None:
    a, b = folder(tmp_path / "a", W0, 2), folder(tmp_path / "b", W1, 3)
    edit(a, b, tmp_path / "whole")
    script = Path(__file__).parents[2] / "analyze.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    command += ["edit", f"--pretrained={a}", f"--finetuned={b}", f"--output={tmp_path / 'out'}"]
    command += [f"--report={tmp_path / 'report.json'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"monosoup: {tmp_path / 'out'}") == 1  # the first rank alone speaks
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert len(json.loads((tmp_path / "report.json").read_text())["parameters"]) == len(W1)


@pytest.mark.timeout(120)
def test_an_error_on_one_rank_ends_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, _ = damaged(tmp_path, "not a number")
    told = run_ranks(a, b, tmp_path / "out", size=2, monkeypatch=monkeypatch)
    assert all("ValueError" in text and "'layers.7.weight'" in text for text in told)
    assert not {"out", "out.partial"} & names_in(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").touch()  # what the first rank alone looks for
    assert all("to be new" in text for text in run_ranks(a, b, tmp_path / "out", size=2, monkeypatch=monkeypatch))


def large(path: Path, seed: int) -> Path:
    """4 GB in nine shards, an embedding of 262 MB among them; written one by one."""
    path.mkdir()
    (path / "config.json").write_text("{}")
    weight_map = {}
    for index in range(9):
        generator = torch.Generator().manual_seed(10 * seed + index)
        shapes = (
            {"embedding": (64_000, 1024)} if index == 0 else {f"layers.{index}.{i}": (1024, 4096) for i in range(28)}
        )
        tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        save_file(tensors, path / f"model-{index}.safetensors", {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, f"model-{index}.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_four_gigabytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = large(tmp_path / "a", 0), large(tmp_path / "b", 1)
    assert sum(file.stat().st_size for file in b.glob("*.safetensors")) > 4e9
    run_to_end(WORKER, "memory", a, b, tmp_path / "whole", tmp_path / "memory.json", seconds=1200)
    measured = json.loads((tmp_path / "memory.json").read_text())
    print(measured)
    assert measured["bytes"] < 1.5e9
    assert measured["bytes"] < 3.2 * (64_000 * 1024 * 4)  # about three times the largest tensor

    monkeypatch.setenv("LIT_CKA_PAUSE", str(measured["seconds"] / 12))
    run_to_end(WORKER, "kills", a, b, tmp_path / "out", 10, seconds=1500)
    kills = json.loads((tmp_path / "out-kills.json").read_text())
    print(kills)
    assert len(kills) == 10
    for file in (tmp_path / "whole").iterdir():
        assert os.system(f"cmp '{file}' '{tmp_path / 'out' / file.name}'") == 0
    assert names_in(tmp_path / "out") == names_in(tmp_path / "whole")
