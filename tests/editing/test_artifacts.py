"""What an evaluation leaves in a folder, whatever the test sets are called and whatever the numbers are."""

from __future__ import annotations

import json
import math
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from lit_cka import MonoSoupEditor
from lit_cka.editing.artifacts import (
    accuracy_figure,
    cka_heatmap,
    describe_edit,
    half_widths,
    print_results,
    save_results,
    write_json,
)
from lit_cka.editing.parameter import ParameterRecord
from lit_cka.editing.results import EvaluationResults
from tests.editing.evaluation_worker import Sets, models
from tests.tracking.helpers import trainer

WEIRD = [
    "a/b/../../c",
    "<script>alert(1)</script>",
    "$\\frac{1$",
    "数据 é \N{GRINNING FACE}",
    "[red]bold[/blue]",
    "x" * 400,
]


@pytest.fixture(scope="module")
def editor(tmp_path_factory: pytest.TempPathFactory) -> MonoSoupEditor:
    editor = MonoSoupEditor(*models(), wise_ft=(0.2, 0.5), lines=(0.3, 0.6))
    trainer(tmp_path_factory.mktemp("run")).test(editor, Sets(), verbose=False)
    return editor


def results(names: list[str], value: float = 0.5, cka: float = 0.9) -> EvaluationResults:
    variants = ["pretrained", "finetuned", "monosoup"]
    return EvaluationResults(
        {variant: {name: {"top1": value, "loss": value} for name in names} for variant in variants},
        {variant: {"top1": value, "loss": value} if names[1:] else {} for variant in variants},
        {name: {variant: {"blocks.0": cka, "blocks.1": cka} for variant in variants[1:]} for name in names},
        dict.fromkeys(names, 10),
        dict.fromkeys(names, 10),
    )


def record(name: str = "head.weight", **values: Any) -> ParameterRecord:
    empty = dict.fromkeys(ParameterRecord.__annotations__)
    numbers = {"k": 2, "rank": 4, "energy": 0.9, "rho": 0.1, "lambda_high": 0.6, "lambda_low": 0.4}
    return ParameterRecord(**{**empty, **numbers, "relative_change": 0.2, "name": name, "shape": [4, 6], **values})


def strictly(path: Path) -> Any:
    """The content of a JSON file, without the NaN that Python alone reads."""

    def fail(constant: str) -> None:
        raise AssertionError(f"{constant} in {path}")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=fail)


def printed(found: EvaluationResults, records: list[ParameterRecord]) -> str:
    console = Console(file=StringIO(), width=200)
    print_results(found, records, console)
    return console.file.getvalue()


def test_files(editor: MonoSoupEditor, tmp_path: Path) -> None:
    written = save_results(
        tmp_path / "new" / "folder", editor.results, editor.edited.records, {"seed": 3, "x": Path("y")}
    )
    pictures = ["accuracy_plane", "cka_0_clean", "cka_1_chosen", "cka_2_few", "lambdas"]
    names = [
        "monosoup.json",
        "summary.json",
        *(f"{name}{suffix}" for name in pictures for suffix in (".svg", ".png", ".pdf")),
    ]
    names.append("index.html")
    assert [path.name for path in written] == names
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == sorted(names)
    for path in written:
        magic = {".svg": b"<?xml", ".png": b"\x89PNG\r\n", ".pdf": b"%PDF-", ".json": b"{", ".html": b"<!DOCTYPE"}[
            path.suffix
        ]
        assert path.read_bytes().startswith(magic)


def test_json_holds_all_numbers(editor: MonoSoupEditor, tmp_path: Path) -> None:
    config = {"seed": 3, "trainer": {"devices": 1}, "path": Path("y"), "tuple": (1, 2)}
    save_results(tmp_path, editor.results, editor.edited.records, config)
    full, summary = (strictly(tmp_path / name) for name in ("monosoup.json", "summary.json"))
    for content in (full, summary):
        assert content["config"] == {"seed": 3, "trainer": {"devices": 1}, "path": "y", "tuple": [1, 2]}
        assert {"python", "torch", "lightning", "torchmetrics", "lit-cka"} <= set(content["versions"])
    found = editor.results
    assert full["metrics"] == found.metrics
    assert full["shifted_average"] == found.shifted_average
    assert full["cka"] == found.cka
    assert full["num_samples"] == found.num_samples == {"clean": 37, "chosen": 41, "few": 10}
    assert full["num_cka_samples"] == found.num_cka_samples
    assert full["parameters"] == editor.edited.records
    assert set(full["parameters"][0]) == set(ParameterRecord.__annotations__)
    assert summary["test_sets"] == found.num_samples
    for variant, each in summary["variants"].items():
        assert each["in_distribution"] == found.metrics[variant]["clean"]
        assert each["shifted_average"] == found.shifted_average[variant]
        scores = found.cka["few"].get(variant)
        assert each["cka_mean"].get("few") == (scores and pytest.approx(np.mean(list(scores.values()))))
    assert summary["edit"].startswith("4 of 23 tensors edited")


def test_pictures_show_the_numbers(editor: MonoSoupEditor) -> None:
    _, axes = cka_heatmap(editor.results, "chosen")
    shown = axes.images[0].get_array().filled(np.nan)
    scores = editor.results.cka["chosen"]
    assert np.allclose(shown, [[1.0] * 3, *(list(row.values()) for row in scores.values())])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["pretrained", *scores]
    axes = accuracy_figure(editor.results).axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("top1 on clean", "mean top1 on chosen, few")
    places = {points.get_label(): tuple(points.get_offsets()[0]) for points in axes.collections}
    for variant in ("pretrained", "finetuned", "monosoup", "highonly", "lowonly", "lines"):
        x, y = editor.results.metrics[variant]["clean"]["top1"], editor.results.shifted_average[variant]["top1"]
        assert places[variant] == pytest.approx((x, y))
    (curve,) = [line for line in axes.lines if line.get_label() == "WiSE-FT"]
    order = ["pretrained", "wise_ft_0.2", "wise_ft_0.5", "finetuned"]
    assert curve.get_xdata() == pytest.approx([editor.results.metrics[name]["clean"]["top1"] for name in order])
    assert curve.get_ydata() == pytest.approx([editor.results.shifted_average[name]["top1"] for name in order])


def test_intervals_of_accuracies() -> None:
    """95 % by the normal approximation: 0.2 of 100 samples, and the mean of two sets with 0.5 and 0.9 of 50 each."""
    shares = {"a": 0.2, "b": 0.5, "c": 0.9}
    metrics = {"monosoup": {name: {"top1": share} for name, share in shares.items()}}
    found = EvaluationResults(metrics, {"monosoup": {"top1": 0.7}}, {}, {"a": 100, "b": 50, "c": 50}, {})
    x, y = half_widths(found, "monosoup", "top1")
    assert x == pytest.approx(1.96 * 0.04, rel=1e-3)
    assert y == pytest.approx(1.96 * math.sqrt((0.25 + 0.09) / 50) / 2, rel=1e-3)


def test_written_again_it_is_replaced(tmp_path: Path) -> None:
    save_results(tmp_path, results(["a", "b"]), [record()], {"seed": 0})
    save_results(tmp_path, results(["a", "b"]), [record()], {"seed": 1})
    assert strictly(tmp_path / "summary.json")["config"] == {"seed": 1}
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, id=str(i), marks=[pytest.mark.slow] if i > 2 else []) for i, name in enumerate(WEIRD)],
)
def test_names_of_any_kind(tmp_path: Path, name: str) -> None:
    found = results([name, f"{name}2"])
    written = save_results(tmp_path / "folder", found, [record()], {})
    assert {path.parent for path in written} == {tmp_path / "folder"}
    assert list(tmp_path.iterdir()) == [tmp_path / "folder"]
    assert len(written) == len({path.name for path in written}) == 3 + 3 * 4
    assert not any(letter in path.name for path in written for letter in "/\\<>:$[]() ")
    assert list(strictly(tmp_path / "folder" / "monosoup.json")["num_samples"]) == [name, f"{name}2"]
    assert "0.5000" in printed(found, [record()])


def test_names_that_differ_in_unsafe_letters_alone(tmp_path: Path) -> None:
    written = save_results(tmp_path, results(["a/b", "a:b", "A/b"]), [record()], {})
    assert len(written) == len({path.name.lower() for path in written})


@pytest.mark.parametrize(
    "value", [math.nan, *(pytest.param(value, marks=pytest.mark.slow) for value in (math.inf, -math.inf))]
)
def test_numbers_that_json_has_not(tmp_path: Path, value: float) -> None:
    found = results(["a", "b"], value, math.nan)
    records = [record(relative_change=value), record("other", lambda_low=None, lambda_high=None, reason="unchanged")]
    save_results(tmp_path, found, records, {"value": value})
    full = strictly(tmp_path / "monosoup.json")
    assert full["metrics"]["monosoup"]["a"]["top1"] is None
    assert full["cka"]["a"]["monosoup"]["blocks.0"] is None
    assert full["parameters"][0]["relative_change"] is None
    assert full["config"] == {"value": None}
    strictly(tmp_path / "summary.json")
    printed(found, records)


def test_of_one_set_without_cka(tmp_path: Path) -> None:
    found = EvaluationResults({"pretrained": {"a": {"nll": 2.0}}}, {"pretrained": {}}, {"a": {}}, {"a": 3}, {"a": 0})
    written = save_results(tmp_path, found, [record(reason="unchanged")], {})
    assert [path.name for path in written] == ["monosoup.json", "summary.json", "index.html"]
    printed(found, [record(reason="unchanged")])


def test_failed_json_leaves_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(tmp_path / "a.json", {"old": 1})

    def fail(*args: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="no space left"):
        write_json(tmp_path / "a.json", {"new": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert strictly(tmp_path / "a.json") == {"old": 1}


def test_table(editor: MonoSoupEditor) -> None:
    text = printed(editor.results, editor.edited.records)
    lines = {line.split()[1]: line for line in text.splitlines() if line.startswith("│")}
    for variant, by_set in editor.results.metrics.items():
        for name in ("clean", "chosen", "few"):
            assert f"{by_set[name]['top1']:.4f}" in lines[variant]
        assert f"{editor.results.shifted_average[variant]['top1']:.4f}" in lines[variant]
    assert f"{np.mean(list(editor.results.cka['clean']['lowonly'].values())):.4f}" in lines["lowonly"]
    assert "1.0000" in lines["pretrained"]
    assert describe_edit(editor.edited.records) in text.replace("\n", " ")


def test_description_of_an_edit() -> None:
    records = [
        record("a", lambda_low=0.25), record("b", lambda_low=0.5), record("c", lambda_low=0.75),
        record("d", reason="unchanged"), record("e", reason="not a parameter"), record("f", reason="unchanged"),
    ]  # fmt: skip
    assert describe_edit(records) == (
        "3 of 6 tensors edited; lambda_low from 0.250 to 0.750, median 0.500. "
        "Left as fine-tuned: 2 (unchanged), 1 (not a parameter)."
    )
    for k, each in zip((1, 2, 8), records, strict=False):
        each.update(k=k, rank=8)
    assert describe_edit(records[:3], "highonly") == (
        "3 of 3 tensors edited; k from 12% to 100% of the singular values, median 25%."
    )
    assert describe_edit([]) == describe_edit([], "lowonly") == "0 of 0 tensors edited."
