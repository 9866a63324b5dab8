"""The report: verdicts, the table, the files, the heatmap, and what importing the package costs."""

from __future__ import annotations

import csv
import itertools
import json
import math
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_cka import CKACallback
from lit_cka.files import file_name
from lit_cka.plots import figure_pixels
from lit_cka.tracking.history import first_series, is_doubtful, verdict
from lit_cka.tracking.report import curves, heatmap, write_report
from lit_cka.tracking.table import print_table
from tests.tracking.helpers import BLOCKS, Classifier, loader, train_loader, trainer

NAN = math.nan


def record(step: int, scores: dict[str, float], stage: str = "validate", dataloader: int = 0) -> dict[str, Any]:
    return {"step": step, "epoch": step // 10, "stage": stage, "dataloader": dataloader, "n": 50, "scores": scores}


def fading(num_layers: int, num_times: int) -> list[dict[str, Any]]:
    """Later layers fade more, from 1 on."""
    return [
        record(
            100 * time,
            {f"model.blocks.{layer}": 1 - (layer * time) / (num_layers * num_times) for layer in range(num_layers)},
        )
        for time in range(num_times)
    ]


@pytest.mark.parametrize(
    ("cka", "word"),
    [
        (1.0, "untouched"),
        (0.99, "untouched"),
        (0.98999, "refined"),
        (0.9, "refined"),
        (0.89999, "rewritten"),
        (0.0, "rewritten"),
        (-0.02, "rewritten"),
        (NAN, "undefined"),
    ],
)
def test_verdicts(cka: float, word: str) -> None:
    assert verdict(cka, (0.99, 0.9)) == word


AWKWARD = [
    "[/INST]", "[red]bold[/]", "$\\frac{x$", "<b>&amp;</b>", "a/b", "tab\tand\nline", "\x1b[31mred", "x" * 300,
    "\u05e9\u05dc\u05d5\u05dd", "\u202eevil", "\u65e5\u672c\u8a9e", "ends in \\", "",
]  # fmt: skip


def test_names_are_shown_as_they_are(tmp_path: Path) -> None:
    """Whatever they would mean to a terminal, a figure or a spreadsheet."""
    history: list[Any] = [record(step, dict.fromkeys(AWKWARD, 1 - step / 10)) for step in range(3)]
    with (tmp_path / "table").open("w") as file:
        print_table(history, (0.99, 0.9), Console(file=file, width=400), reference="weights of [/x]")
    printed = (tmp_path / "table").read_text()
    for name in (*AWKWARD[:5], "tab\\tand\\nline", "\\x1b[31mred", *AWKWARD[7:9], "\\u202eevil", *AWKWARD[10:12]):
        assert f" {name} " in printed
    assert "reference: weights of [/x]" in printed
    write_report(tmp_path / "report", history, (0.99, 0.9))
    with (tmp_path / "report/cka_history.csv").open(newline="") as file:
        assert [row["layer"] for row in csv.DictReader(file)] == 3 * AWKWARD
    assert list(json.loads((tmp_path / "report/cka_history.json").read_text())[0]["scores"]) == AWKWARD
    figure = heatmap(history)
    pixels = figure_pixels(figure)
    assert pixels.shape[1] < 1500  # not as wide as the longest name
    figure.savefig(tmp_path / "by_hand.png")  # by the user, that is
    shown = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert shown[:5] == AWKWARD[:5]
    assert shown[7] == f"{'x' * 29}\u2026{'x' * 29}"


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_a_training_with_awkward_layer_names(tmp_path: Path) -> None:
    names = [name for name in AWKWARD if name and "." not in name]

    class Awkward(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.parts = torch.nn.ModuleDict({name: torch.nn.Linear(3, 3) for name in names})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for part in self.parts.values():
                part(x[:, :3])
            return super().forward(x)

    callback = CKACallback(layers=re.compile(r"parts\..*", re.DOTALL))
    logger = TensorBoardLogger(tmp_path)
    trainer(tmp_path, callback, max_epochs=2, logger=logger).fit(Awkward(), train_loader(), loader())
    assert [*callback.scores] == [f"parts.{name}" for name in names]
    callback.save(tmp_path / "report")
    tags = EventAccumulator(logger.log_dir).Reload().Tags()
    assert {f"cka/parts.{name}" for name in names} <= {*tags["scalars"]}


def test_verdicts_follow_the_thresholds() -> None:
    assert [verdict(0.95, thresholds) for thresholds in ((0.95, 0.5), (0.96, 0.95), (0.99, 0.96))] == [
        "untouched",
        "refined",
        "rewritten",
    ]


def test_the_first_series() -> None:
    history = [
        record(1, {"a": 0.5}, dataloader=1),
        record(1, {"a": 0.6}, stage="test"),
        record(2, {"a": 0.4}, dataloader=1),
        record(2, {"a": 0.3}, dataloader=2),
    ]
    assert first_series(history) == [history[0], history[2]]
    assert first_series([history[1]]) == [history[1]]
    assert first_series([]) == []


# The table.


def table(history: Sequence[dict[str, Any]], thresholds: tuple[float, float] = (0.99, 0.9), width: int = 80) -> str:
    console = Console(width=width, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    print_table(history, thresholds, console)
    console.file.close()
    return console.export_text()


def rows(text: str) -> dict[str, list[str]]:
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    return {row[0]: row[1:] for row in cells}


def test_the_table() -> None:
    history = [
        record(4, {"a": 1.0, "b": 0.98, "c": 0.5, "d": NAN}),
        record(8, {"a": 0.999, "b": 0.85, "c": 0.4, "d": 0.7}),
        record(12, {"a": 0.995, "b": 0.93, "c": 0.45, "d": NAN}),
    ]
    text = table(history)
    assert "n = 50 samples" in text
    assert "step 4" in text
    assert "step 12" in text
    assert "untouched >= 0.99 > refined >= 0.9 > rewritten" in text
    assert rows(text) == {
        "a": ["1.0000", "0.9950", "0.9950", "untouched"],
        "b": ["0.9800", "0.8500", "0.9300", "refined"],
        "c": ["0.5000", "0.4000", "0.4500", "rewritten"],
        "d": ["nan", "0.7000", "nan", "undefined"],
    }


def test_the_table_in_a_narrow_terminal_shows_the_verdicts() -> None:
    name = "base_model.model.distilbert.transformer.layer.11"
    shown = rows(table([record(4, {name: 0.97}), record(123456, {name: 0.8})], width=80))
    assert "".join(shown) == name  # folded over several lines
    assert next(iter(shown.values())) == ["0.9700", "0.8000", "0.8000", "rewritten"]


def test_the_table_at_the_end_of_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    callback = CKACallback(thresholds=(0.95, 0.7))
    trainer(tmp_path, callback).fit(Classifier(), train_loader(), loader())
    text = capsys.readouterr().out
    assert text.count("CKA with the reference, n = 44 samples") == 1
    assert "logged as cka/net.<layer>" in text
    shown = rows(text)
    assert [f"net.{name}" for name in shown] == BLOCKS
    for name, cells in shown.items():
        series = [record["scores"][f"net.{name}"] for record in callback.history]
        word = "untouched" if series[-1] >= 0.95 else "refined" if series[-1] >= 0.7 else "rewritten"
        last, layer = callback.history[-1], f"net.{name}"
        low, high = last["low"][layer], last["high"][layer]
        low_change, high_change = last["change_low"][layer], last["change_high"][layer]
        mark = "\u2193" if high_change < 0 else "\u2191" if low_change > 0 else "="
        is_sure = (low >= 0.95) == (high >= 0.95) and (low >= 0.7) == (high >= 0.7)
        assert is_doubtful(last, layer, (0.95, 0.7)) is not is_sure
        assert cells == [
            f"{series[0]:.4f}", f"{min(series):.4f}", f"{series[-1]:.4f} {mark}", f"{low:.4f}-{high:.4f}",
            word if is_sure else f"{word} ?",
        ]  # fmt: skip
    assert "changed since the last evaluation" in text
    assert "too few samples for this verdict" in text


# The files.


def test_the_files(tmp_path: Path) -> None:
    history = [record(10, {"a": 0.999, "b": 0.1}), record(20, {"a": 0.95, "b": NAN}, stage="test", dataloader=1)]
    folder = tmp_path / "new" / "folder"
    write_report(folder, history, (0.99, 0.9))
    assert sorted(path.name for path in folder.iterdir()) == [
        "cka_curves.png",
        "cka_heatmap.png",
        "cka_history.csv",
        "cka_history.json",
    ]
    loaded = json.loads((folder / "cka_history.json").read_text(), parse_constant=pytest.fail)  # no NaN in JSON
    assert loaded == [history[0], {**history[1], "scores": {"a": 0.95, "b": None}}]
    with open(folder / "cka_history.csv", newline="") as file:
        read = list(csv.DictReader(file))
    assert [(row["layer"], float(row["cka"]), row["verdict"]) for row in read[:3]] == [
        ("a", 0.999, "untouched"),
        ("b", 0.1, "rewritten"),
        ("a", 0.95, "refined"),
    ]
    assert math.isnan(float(read[3]["cka"]))
    assert read[3]["verdict"] == "undefined"
    assert [tuple(row[key] for key in ("step", "epoch", "stage", "dataloader", "n")) for row in read[1:3]] == [
        ("10", "1", "validate", "0", "50"),
        ("20", "2", "test", "1", "50"),
    ]
    assert matplotlib.image.imread(folder / "cka_heatmap.png").ndim == 3


def test_files_are_replaced_and_exact(tmp_path: Path) -> None:
    torch.manual_seed(0)
    callback = CKACallback()
    with pytest.raises(ValueError, match="Expected a tracked validation or test to report"):
        callback.save(tmp_path)
    trainer(tmp_path, callback, max_epochs=1).fit(Classifier(), train_loader(), loader())
    callback.save(tmp_path / "report")
    callback.history.append({**callback.history[0], "step": 9})
    callback.save(tmp_path / "report")
    assert json.loads((tmp_path / "report" / "cka_history.json").read_text()) == callback.history
    assert not list((tmp_path / "report").glob("*partial*"))


# The heatmap.


def drawn(history: Sequence[dict[str, Any]]) -> np.ndarray:
    """The values behind the picture."""
    (image,) = heatmap(history).axes[0].images
    return np.ma.filled(image.get_array(), np.nan)


def test_the_heatmap_shows_layers_by_time() -> None:
    history = fading(5, 4)
    figure = heatmap(history)
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [f"blocks.{i}" for i in range(5)]
    words = [verdict(history[-1]["scores"][f"model.blocks.{i}"]) for i in range(5)]
    (beside,) = axes.child_axes
    assert [label.get_text() for label in beside.get_yticklabels()] == words
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "100", "200", "300"]
    expected = [[entry["scores"][f"model.blocks.{i}"] for entry in history] for i in range(5)]
    np.testing.assert_allclose(drawn(history), expected)
    assert axes.images[0].get_clim() == (0, 1)
    assert {text.get_text() for text in axes.texts} >= {"1.000", "0.850"}
    bottom, top = axes.get_ylim()
    assert bottom < top  # the first layer is at the bottom


def test_undefined_and_negative_values_in_the_heatmap() -> None:
    history = [record(1, {"a": NAN, "b": -0.1}), record(2, {"a": 0.5, "b": 1.0})]
    np.testing.assert_array_equal(drawn(history), [[NAN, 0.5], [0, 1]])
    figure = heatmap(history)
    assert {text.get_text() for text in figure.axes[0].texts} == {"-0.100", "0.500", "1.000"}


@pytest.mark.parametrize(("num_layers", "num_times"), [(1, 1), (3, 2), (12, 12), (48, 60), (200, 1000)])
def test_heatmaps_of_any_size_have_labels_that_do_not_overlap(num_layers: int, num_times: int) -> None:
    figure = heatmap(fading(num_layers, num_times))
    pixels = figure_pixels(figure)
    assert pixels.dtype == np.uint8
    assert pixels.shape[2] == 3
    assert max(pixels.shape) < 2600
    axes = figure.axes[0]
    for labels, low, high in ((axes.get_xticklabels(), "x0", "x1"), (axes.get_yticklabels(), "y0", "y1")):
        boxes = [label.get_window_extent() for label in labels]
        assert all(getattr(a, high) <= getattr(b, low) for a, b in itertools.pairwise(boxes))
        assert min(box.x0 for box in boxes) >= 0
        assert max(box.y1 for box in boxes) <= pixels.shape[0]
    title = axes.title.get_window_extent()
    assert title.x0 >= 0
    assert title.x1 <= pixels.shape[1]


# The import.


def test_import_is_light() -> None:
    """Neither models nor pictures are needed to define a callback.

    torchmetrics, and thus Lightning, import matplotlib and transformers themselves where they are installed.
    """
    code = (
        "import sys, torchmetrics, lightning.pytorch; before = set(sys.modules); from lit_cka import CKACallback; "
        "heavy = {'transformers', 'open_clip', 'timm', 'matplotlib', 'tensorboard', 'datasets', 'sklearn', 'peft'}; "
        "added = {name.partition('.')[0] for name in set(sys.modules) - before}; "
        "print(sorted(heavy & added | {'open_clip', 'timm', 'datasets', 'peft'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert ran.stdout.strip() == "[]"


def test_the_package_alone_imports_nothing_heavy() -> None:
    code = "import sys, lit_cka; print({'transformers', 'open_clip', 'timm', 'matplotlib', 'torch'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert ran.stdout.strip() == "set()"


# What a run leaves.


def test_a_run_leaves_its_report_in_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    callbacks = [CKACallback(), CKACallback(prefix="a/b", layers="net.blocks.0")]
    callbacks.append(CKACallback(prefix="c", log_figures=False))
    logger = CSVLogger(tmp_path, name="run", version="")
    trainer(tmp_path, *callbacks, logger=logger).fit(Classifier(), train_loader(), loader())
    left = sorted(path.relative_to(tmp_path / "run") for path in (tmp_path / "run").glob("*/cka_*"))
    names = ["cka_curves.png", "cka_heatmap.png", "cka_history.csv", "cka_history.json"]
    assert left == sorted(Path(folder) / name for folder in (file_name("a/b"), "cka") for name in names)
    history = json.loads((tmp_path / "run" / "cka" / "cka_history.json").read_text())
    assert history == callbacks[0].history
    assert f"CKA of each layer over time: {tmp_path / 'run' / 'cka' / 'cka_heatmap.png'}" in capsys.readouterr().out


def test_a_run_that_can_not_write_ends_well(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="run", version="")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "cka").write_text("in the way")
    run = trainer(tmp_path, CKACallback(), logger=logger)
    with pytest.warns(UserWarning, match="The report on CKA could not be written to .*run/cka"):
        run.fit(Classifier(), train_loader(), loader())
    assert run.state.finished
    assert (tmp_path / "run" / "cka").read_text() == "in the way"


def test_curves_are_drawn_of_every_layer() -> None:
    history = [record(10, {"a": 0.999, "b": 0.1}), record(20, {"a": 0.95, "b": NAN})]
    (axes,) = curves(history).axes
    assert [list(line.get_xdata()) for line in axes.lines] == [[10, 20]] * 2
    assert [line.get_ydata()[0] for line in axes.lines] == [0.999, 0.1]
