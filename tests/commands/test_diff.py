"""`lit-cka diff` from the command line to the files and the page."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_cka import __main__ as lit_cka_command
from lit_cka.editing import Diff, diff_files
from tests.browser import CHROMIUM, browser_page

MARKUP = "<img src=x onerror=alert(1)> [/bold] $\\frac{1}{2}$"
LONG = "a.very.long.name." + "x" * 300


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def files(in_folder: None) -> list[str]:
    """A base and two others, with names that look like markup, formulas and walls of text."""
    generator = torch.Generator().manual_seed(0)

    def values(*shape: int) -> Tensor:
        return 3 + torch.randn(shape, generator=generator)

    W0 = {f"layers.{index}.weight": values(6, 8) for index in range(3)} | {
        "bias": values(6),
        "steps": torch.ones(2).long(),
    }
    W0 |= {MARKUP: values(5, 4), LONG: values(4, 5), "gone": values(2)}
    W1, W2 = (
        {name: W + scale * values(*W.shape) if W.is_floating_point() else W for name, W in W0.items() if name != "gone"}
        for scale in (0.1, 0.01)
    )
    W1["layers.1.weight"][0, 0] = torch.nan
    W2["bias"] = W0["bias"].clone()
    save_file(W0, "a.safetensors")
    torch.save(W1, "b.pt")
    save_file(W2 | {"new": torch.ones(2)}, "c.safetensors")
    return ["a.safetensors", "b.pt", "c.safetensors"]


def run(*args: str) -> Any:
    return lit_cka_command.run(["diff", *args])


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[object, str]:
    with pytest.raises(SystemExit) as ended:
        run(*args)
    captured = capsys.readouterr()
    assert captured.out == ""
    return ended.value.code, captured.err


def read_json(path: str) -> Any:
    def fail(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(Path(path).read_text(), parse_constant=fail)


def test_two_files(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    found = run(*files[:2], "--output=out [b]", "--num_threads=1")
    assert isinstance(found, Diff)
    expected = diff_files(*files[:2], progress=False)
    assert found.tensors == expected.tensors
    said = capsys.readouterr().out
    assert (
        "B (b.pt): 8 tensors: 5 changed, 1 unchanged, 1 missing, 1 not finite; relative change of all together" in said
    )
    assert "  missing: gone\n  not finite: layers.1.weight\n" in said
    assert "The 5 tensors that changed most, of 5" in said
    assert MARKUP[:20] in said
    assert said.endswith("Report: out [b]/index.html\n")
    assert {path.name for path in Path("out [b]").iterdir()} == {
        "index.html", "diff.json", "diff.csv", "spectra_B.safetensors", "layers_B.svg", "layers_B.png", "layers_B.pdf",
        "spectra_B.svg", "spectra_B.png", "spectra_B.pdf",
    }  # fmt: skip
    written = read_json("out [b]/diff.json")
    (side,) = written["checkpoints"]
    assert written["base"] == "a.safetensors"
    assert (side["label"], side["path"], side["identical"]) == ("B", "b.pt", False)
    assert side["tensors"] == found.tensors[0]
    assert side["relative_change"] == found.relative_change()
    assert written["config"]["checkpoints"] == files[:2]
    assert written["versions"]["torch"]
    with Path("out [b]/diff.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [each["name"] for each in found.tensors[0]]
    by_name = {row["name"]: row for row in rows}
    assert by_name[MARKUP]["shape"] == "5x4"
    assert float(by_name[MARKUP]["effective_rank"]) == next(
        each["effective_rank"] for each in found.tensors[0] if each["name"] == MARKUP
    )
    assert by_name["gone"]["kind"] == "missing"
    spectra = load_file("out [b]/spectra_B.safetensors")
    assert spectra.keys() == {"layers.0.weight", "layers.2.weight", MARKUP, LONG}
    assert torch.equal(spectra[LONG], found.spectra[0][LONG])
    page = Path("out [b]/index.html").read_text()
    assert MARKUP not in page
    assert "http://" not in page


def test_three_files(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    found = run(*files, "--output=out")
    written = read_json("out/diff.json")
    assert written["cosine"] == found.cosine()
    assert written["cosines"] == found.cosines
    assert [side["label"] for side in written["checkpoints"]] == ["B", "C"]
    assert {"layers_B.png", "layers_C.png", "spectra_C.pdf"} < {path.name for path in Path("out").iterdir()}
    with Path("out/diff.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["name"] == "layers.0.weight"]
    assert [row["checkpoint"] for row in rows] == ["B", "C"]
    assert {float(row["cosine"]) for row in rows} == {found.cosines["layers.0.weight"]}
    said = capsys.readouterr().out
    assert f"Cosine of the whole updates of B and C: {found.cosine():.4f}." in said
    assert "C (c.safetensors): 9 tensors: 5 changed, 2 unchanged, 1 added, 1 missing" in said


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_the_page(files: list[str], tmp_path: Path) -> None:
    found = run(*files, "--output=out")
    with browser_page(tmp_path / "profile") as page:
        page.open(tmp_path / "out" / "index.html", width=600)
        names = page.evaluate("[...document.querySelectorAll('#rows th')].map((cell) => cell.textContent)")
        changes = {each["name"]: each["relative_change"] for each in found.tensors[0]}
        measured = [name for name in names if changes.get(name) is not None]
        assert measured == sorted(measured, key=lambda name: -changes[name])
        assert {MARKUP, LONG, "gone", "new"} < set(names)
        heads = page.evaluate("[...document.querySelectorAll('#head th')].map((cell) => cell.textContent)")
        assert heads[:3] == ["tensor", "kind, B", "relative change, B"]
        assert "cosine" in heads
        row = "[...document.querySelectorAll('#rows tr')].find((row) => row.textContent.startsWith('layers.1.weight'))"
        assert "B: 1 of its elements in B are NaN or infinite" in page.evaluate(f"{row}.textContent")
        assert page.evaluate("document.querySelectorAll('figure img').length") == 4
        assert page.errors == []


def test_the_same_file_twice(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(files[0], files[0], "--output=out").is_identical()
    said = capsys.readouterr().out
    assert said.startswith("B (a.safetensors) is identical with A: 8 tensors of the same values.\n")
    assert {path.name for path in Path("out").iterdir()} == {"index.html", "diff.json", "diff.csv"}


def test_without_output_nothing_is_written(files: list[str]) -> None:
    before = set(Path().iterdir())
    run(*files[:2], "--spectra=false")
    assert set(Path().iterdir()) == before


def test_options_from_a_config(files: list[str]) -> None:
    Path("options.yaml").write_text("checkpoints: [a.safetensors, b.pt]\noutput: out\nspectra: false\n")
    assert run("--config=options.yaml").tensors == diff_files(*files[:2], spectra=False, progress=False).tensors
    assert Path("out/index.html").exists()


@pytest.mark.parametrize("number", [0, 1, 4])
def test_another_number_of_files(number: int, files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, said = refused(capsys, *(["a.safetensors"] * number))
    assert code == 2
    assert said.startswith(f"error: Expected two checkpoints, or a base and two others, but got {number}.\n")
    assert "For example: lit-cka diff base.safetensors" in said


def test_mistakes_are_one_line(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("text.safetensors").write_text("no weights")
    Path("folder").mkdir()
    torch.save({"w": torch.ones(2), "path": Path("a")}, "pickle.pt")
    torch.save({"model": {"w": torch.ones(2)}, "ema": {"w": torch.ones(2)}}, "two.pt")
    for args, words in {
        ("missing.pt",): "Expected a checkpoint file or folder at 'missing.pt'",
        ("text.safetensors",): "'text.safetensors' is truncated, damaged or no safetensors file",
        ("folder",): "Expected 'folder' to hold model.safetensors",
        ("pickle.pt",): "--trusted true",
        ("two.pt",): "Name one by `weights=` (`--weights`)",
        ("b.pt", "--device=nowhere"): "Expected `device` to be one that computes in float64 here, but got 'nowhere'",
        ("b.pt", "--output=b.pt"): "Expected `output` to be a folder that can be written to, but got 'b.pt'",
        ("b.pt", "--outptu=x"): "did you mean `--output`?",
    }.items():  # fmt: skip
        code, said = refused(capsys, "a.safetensors", *args)
        assert code in (1, 2)
        assert words in said
        assert said.count("\n") == 1
    for output in ("folder", "folder/inside"):
        save_file({"w": torch.ones(2)}, "folder/model.safetensors")
        code, said = refused(capsys, "a.safetensors", "folder", f"--output={output}")
        assert (code, "Expected `output` apart from the checkpoints" in said) == (1, True)
