"""`lit-cka compare`, `probe` and `project` from the command line to the files, on tiny networks and digits."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html import unescape
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file

from lit_cka import __main__ as lit_cka_command
from lit_cka import plots
from lit_cka.analysis.comparison import Comparison, compare_features
from lit_cka.analysis.features import Features
from lit_cka.analysis.linear_probe import ProbeSettings
from lit_cka.analysis.probes import ProbeRow, advice, probe_layers
from lit_cka.analysis.projection import Projection, project
from lit_cka.commands import project as project_command
from lit_cka.functional import plan_samples
from lit_cka.models import ImageClassifier
from tests import oracles
from tests.browser import CHROMIUM, Page, browser_page

ROOT = Path(__file__).parents[2]
VIT = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 2, "num_heads": 2}
DIGITS: dict[str, Any] = {"class_path": "lit_cka.analysis.image_model.Digits", "init_args": {"classes": [3, 8]}}
NOISY = {**DIGITS, "init_args": {"classes": [3, 8], "shift": "noisy"}}


def arguments(checkpoint: str, **kwargs: int) -> dict[str, Any]:
    model_kwargs = {**VIT, **kwargs}
    return {
        "model_name": "vit_tiny_patch16_224",
        "num_classes": 2,
        "checkpoint": checkpoint,
        "model_kwargs": model_kwargs,
    }


def entry(name: str, checkpoints: Path, file: str | None = None, **kwargs: int) -> dict[str, Any]:
    init_args = arguments(str(checkpoints / f"{file or name}.ckpt"), **kwargs)
    model = {"class_path": "lit_cka.models.ImageClassifier", "init_args": init_args}
    return {"class_path": "lit_cka.analysis.image_model.ImageModel", "init_args": {"name": name, "model": model}}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`before`, `after` not far from it, and the deeper and wider `other`."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def weights(seed: int, **kwargs: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        return ImageClassifier(**{**arguments("", **kwargs), "checkpoint": None}).state_dict()

    before, far = weights(0), weights(1)
    after = {name: value + 0.3 * (far[name] - value) for name, value in before.items()}
    for name, states in (("before", before), ("after", after), ("other", weights(2, depth=3, embed_dim=24))):
        torch.save(states, folder / f"{name}.ckpt")
    return folder


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(command: str, *more: str, **options: Any) -> Any:
    Path("options.yaml").write_text(yaml.safe_dump(options))
    return lit_cka_command.run([command, "--config=options.yaml", *more])


def read_json(path: str) -> Any:
    def fail(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(Path(path).read_text(), parse_constant=fail)


def names(folder: str = "out") -> set[str]:
    return {path.name for path in Path(folder).iterdir()}


def with_formats(*figures: str) -> set[str]:
    return {f"{name}.{suffix}" for name in figures for suffix in ("png", "pdf", "svg")}


def check_page(folder: str = "out") -> str:
    """Every file is linked, every image and link is there, and nothing is loaded from elsewhere."""
    html = Path(folder, "index.html").read_text()
    targets = {unquote(unescape(target)) for target in re.findall(r'(?:href|src)="([^"]*)"', html)}
    assert targets == names(folder) - {"index.html"}
    assert "<script" not in html
    return html


def table_columns(html: str) -> set[str]:
    return {unescape(name) for name in re.findall(r'<th scope="col"[^>]*>([^<]*)</th>', html)}


def explained(html: str) -> set[str]:
    """What has a sentence below a table."""
    assert "<dd></dd>" not in html
    assert not re.search(r"<dd>[^<]*[{}]", html)  # a place that nothing was filled into
    return {unescape(name) for name in re.findall(r"<dt>([^<]*)</dt>", html)}


def features(model: str, data: str = "digits") -> Features:
    return Features.load(f"out/features_{model}_{data}.safetensors")


def test_compare_two_models(checkpoints: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(
        "compare", "--settings.num_permutations=19", "--settings.seed=1",
        models=[entry("before", checkpoints), entry("after", checkpoints)], data=DIGITS, output="out",
    )  # fmt: skip
    (comparison,) = found
    assert isinstance(comparison, Comparison)
    name = "0_before_after_digits"
    stored = {"features_before_digits.safetensors", "features_after_digits.safetensors", f"{name}.safetensors"}
    figures = with_formats(name, f"{name}_diagonal", f"{name}_excess")
    assert names() == {"index.html", "comparison.json", *stored, *figures}
    a, b = features("before"), features("after")
    assert list(a.layers) == ["model.blocks.0", "model.blocks.1"] == comparison.layers_a == comparison.layers_b
    expected = [[oracles.linear_cka(X, Y, True) for Y in b.layers.values()] for X in a.layers.values()]
    np.testing.assert_allclose(comparison.values, expected, atol=1e-9)
    arrays = load_file(f"out/{name}.safetensors")
    written = read_json("out/comparison.json")
    (said,) = written["comparisons"]
    numbers = comparison.arrays()
    assert arrays.keys() == numbers.keys() == {"values", "low", "high", "p", "p_best", "excess", "threshold"}
    best = comparison.calibration.best if comparison.calibration else None
    assert best is not None
    assert said["best"]["layer_a"] == comparison.layers_a[best.row]
    assert said["best"]["p"] == best.p_value == 0.05
    for key, held in numbers.items():
        np.testing.assert_array_equal(arrays[key], held)
        np.testing.assert_array_equal(said[key], held)
    assert (said["model_a"], said["model_b"], said["data"], said["num_samples"]) == ("before", "after", "digits", 71)
    assert (said["settings"]["intervals"], said["settings"]["num_permutations"]) == (True, 19)
    assert said["settings"]["seed"] == written["config"]["settings"]["seed"] == 1
    assert written["versions"]["torch"]
    html = check_page()
    assert "before and after on digits" in html
    assert "How often the best of all pairs of layers does, at random" in html
    assert f"Best of all pairs: {comparison.layers_a[best.row]} with {comparison.layers_b[best.column]}, " in html
    assert f"<td>{comparison.values[0, 0]:.4f}</td>" in html
    for said_of_it in (
        "on average, whatever n", "95 % interval", "(jackknife)", "19 permutations, so that", "below 0.05"
    ):  # fmt: skip
        assert said_of_it in html
    columns = {"layer", "value", "low", "high", "p", "p_best", "excess", "verdict"}
    assert table_columns(html) == columns == explained(html)
    output = capsys.readouterr().out
    assert "before and after on digits: CKA, debiased, n = 71" in output
    assert "Report: out/index.html" in output
    # Later, from the stored features, without models or data.
    paths = [f"out/features_{model}_digits.safetensors" for model in ("before", "after")]
    (again,) = run("compare", features=paths, output="again", settings={"measure": "rsa"})
    assert again.settings.measure == "rsa"
    np.testing.assert_array_equal(again.values, compare_features(a, b, again.settings).values)
    assert names("again") == names() - {Path(path).name for path in paths} - with_formats(f"{name}_excess")
    (typed,) = lit_cka_command.run(["compare", "--features", *paths, "--settings.measure=rsa", "--output=typed"])
    np.testing.assert_array_equal(typed.values, again.values)
    check_page("again")


def test_plan(checkpoints: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = [entry("before", checkpoints), entry("after", checkpoints)]
    rows = run("plan", models=models, data=DIGITS, width=0.1, output="out")
    a, b = features("before"), features("after")
    assert [row["layer"] for row in rows] == list(a.layers)
    for row in rows:
        plan = plan_samples(a.layers[row["layer"]], b.layers[row["layer"]], width=0.1)
        assert [row[key] for key in ("CKA", "low", "high", "n", "plain at n")] == [*plan[1:4], plan.n, plan.plain]
    most = max(rows, key=lambda row: row["n"])
    said = f"{most['n']:,} samples give every layer an interval of at most 0.1: {most['layer']} takes so many."
    assert said in capsys.readouterr().out
    assert read_json("out/plan.json")["layers"] == rows
    html = Path("out/index.html").read_text()
    assert said in html
    assert table_columns(html) == set(rows[0]) == explained(html)


def test_plan_for_other_layers_and_undefined_ones(checkpoints: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A layer goes with the most similar one; of a dead one nothing is known."""
    x = torch.randn(60, 9, dtype=torch.float64)
    ids = [str(index) for index in range(60)]
    Features({"a": x, "dead": torch.ones(60, 4, dtype=torch.float64)}, ids, model="one").save("one.safetensors")
    reverse = list(reversed(range(60)))
    others = {"x": torch.randn(60, 9, dtype=torch.float64), "y": x + 0.1 * torch.randn(60, 9, dtype=torch.float64)}
    Features({name: each[reverse] for name, each in others.items()}, ids[::-1], model="two").save("two.safetensors")
    rows = run("plan", features=["one.safetensors", "two.safetensors"], width=0.05, output="out")
    assert rows[0]["layer"] == "a with y"
    assert rows[0]["CKA"] > 0.9
    assert rows[1]["n"] is None
    assert "whose CKA is undefined" in capsys.readouterr().out
    _, said = refused(capsys, "plan", features=["one.safetensors"])
    assert "Expected two models to plan a comparison of" in said


def test_compare_another_architecture_on_two_sets(checkpoints: Path) -> None:
    models = [entry("before", checkpoints), entry("other", checkpoints, depth=3, embed_dim=24)]
    found = run("compare", models=models, data=[DIGITS, NOISY], output="out", title="<b>Both</b>")
    assert [(each.data, each.values.shape) for each in found] == [("digits", (2, 3)), ("noisy", (2, 3))]
    pictures = ("0_before_other_digits", "1_before_other_noisy", "all_datasets")
    assert {name for name in names() if name.endswith("g") or name.endswith("pdf")} == with_formats(*pictures)
    html = check_page()
    assert "<h1>&lt;b&gt;Both&lt;/b&gt;</h1>" in html
    assert "<table" not in html  # no counterparts, no diagonal


def test_compare_one_model_on_two_datasets(checkpoints: Path) -> None:
    found = run("compare", models=[entry("before", checkpoints)], data=[DIGITS, NOISY], output="out")
    for each in found:
        np.testing.assert_allclose(np.diagonal(each.values), 1)
    pictures = ("0_before_before_digits", "1_before_before_noisy", "all_datasets")
    assert {name for name in names() if name.endswith("g") or name.endswith("pdf")} == with_formats(*pictures)
    check_page()
    # One dataset with the other: the matrix is not symmetric, so none of it is hidden.
    paths = [f"out/features_before_{data}.safetensors" for data in ("digits", "noisy")]
    (other,) = run("compare", features=paths, output="again")
    assert other.data == "digits and noisy"
    assert not other.is_with_itself
    assert "0_before_before_digits_and_noisy_diagonal.png" in names("again")
    check_page("again")


def test_the_options_of_the_heatmap_reach_the_pictures(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: dict[str, Any] = {}

    def keep(figure: Any, path: Any, formats: Any = ()) -> list[Path]:
        figures[Path(path).name] = figure
        return save(figure, path, formats)

    save = plots.save_figure
    monkeypatch.setattr(plots, "save_figure", keep)
    models = [entry("before", checkpoints), entry("after", checkpoints)]
    heatmap = {"mask_upper": True, "annot_fmt": ".1f", "cmap": "magma", "figsize": [5, 3], "layer_name_depth": 1}
    run("compare", "--heatmap.ncols=1", models=models, data=[DIGITS, NOISY], heatmap=heatmap, output="out")
    written = read_json("out/comparison.json")["config"]["heatmap"]
    assert written == {**heatmap, "ncols": 1}
    one = figures["0_before_after_digits"]
    assert tuple(one.get_size_inches()) == (5, 3)
    for figure, num in ((one, 1), (figures["all_datasets"], 2)):
        drawn = [ax for ax in figure.axes if ax.texts]
        assert len(drawn) == num
        for ax in drawn:
            assert [tick.get_text() for tick in ax.get_yticklabels()] == ["0", "1"]
            assert len(ax.texts) == 3  # of four cells, without the one above the diagonal
            assert all(re.fullmatch(r"[01]\.\d", text.get_text()) for text in ax.texts)
            assert ax.images[0].get_cmap().name == "magma"
    places = [ax.get_position().y0 for ax in figures["all_datasets"].axes if ax.texts]
    assert places[0] != places[1]  # one below the other
    assert "all_datasets.svg" in check_page()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cmap": "magmaa"}, "did you mean magma"),
        ({"annot_fmt": ".2q"}, "`annot_fmt` to be a number's format"),
        ({"layer_name_depth": 0}, "`layer_name_depth` to be at least 1, but got 0"),
        ({"figsize": [0, 3]}, "`figsize` of a width and a height in inches"),
        ({"ncols": 0}, "`ncols` to be at least 1, but got 0"),
    ],
)
def test_options_of_the_heatmap_are_checked_before_a_model_runs(
    options: dict[str, Any], message: str, checkpoints: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, said = refused(capsys, "compare", models=[entry("before", checkpoints)], data=DIGITS, heatmap=options)
    assert message in said
    assert not Path("out").exists()


def test_half_of_a_matrix_that_is_not_square(checkpoints: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = [entry("before", checkpoints), entry("other", checkpoints, depth=3, embed_dim=24)]
    _, said = refused(capsys, "compare", models=models, data=DIGITS, heatmap={"mask_upper": True})
    assert "as many layers for `mask_upper`, but before has 2 and other 3" in said


def test_undefined_values_are_null() -> None:
    dead = Features({"0": torch.randn(9, 2).double(), "1": torch.ones(9, 2).double()}, list("abcdefghi"), "<i>", "x")
    dead.save("dead.safetensors")
    (found,) = run("compare", features=["dead.safetensors"], output="out")
    assert np.isnan(found.values[1]).all()
    assert read_json("out/comparison.json")["comparisons"][0]["values"][1] == [None, None]
    assert "&lt;i&gt; and &lt;i&gt;" in check_page()
    run("project", features=["dead.safetensors"], output="map")
    assert read_json("map/projection.json")["cka"][1] == [None, None]


def test_probe(checkpoints: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = run(
        "probe", "--num_folds=3", "--seed=2", before=entry("before", checkpoints), after=entry("after", checkpoints),
        data=DIGITS, output="out",
    )  # fmt: skip
    assert all(isinstance(row, ProbeRow) for row in rows)
    stored = {"features_before_digits.safetensors", "features_after_digits.safetensors", "matrix.safetensors"}
    assert names() == {"index.html", "probe.json", *stored, *with_formats("probe", "matrix", "matrix_diagonal")}
    settings = ProbeSettings(num_folds=3, seed=2)
    assert rows == probe_layers(features("before"), features("after"), settings=settings, progress=False)
    written = read_json("out/probe.json")
    assert [row["cka"] for row in written["layers"]] == [row.cka for row in rows]
    assert [row["accuracy_after"] for row in written["layers"]] == [row.accuracy_after for row in rows]
    assert written["advice"] == advice(rows)
    assert written["comparison"]["values"][1][1] == pytest.approx(rows[1].cka)
    html = check_page()
    assert advice(rows) in html
    assert "3 folds of 71 samples" in html
    assert table_columns(html) == {
        "layer", "CKA", "accuracy, before", "accuracy, after", "difference", "verdict",
    } == explained(html)  # fmt: skip
    assert "Its whole name begins with &quot;model.&quot;." in html
    assert "<td>model.blocks" not in html
    assert advice(rows) in capsys.readouterr().out
    assert f"<td>{rows[1].difference:+.3f} ± {rows[1].error_difference:.3f}</td>" in html
    assert [list(choice) for choice in rows[0].chosen_after] == written["layers"][0]["chosen_after"]


def test_probe_with_the_plain_estimator_and_a_given_probe(checkpoints: Path) -> None:
    models = {"before": entry("before", checkpoints), "after": entry("after", checkpoints)}
    options = ["--num_folds=3", "--C=0.5", "--standardize=true", "--settings.debiased=false"]
    rows = run("probe", *options, **models, data=DIGITS, output="out")
    for row in rows:
        X, Y = (features(name).layers[row.layer] for name in ("before", "after"))
        assert row.cka == pytest.approx(oracles.linear_cka(X, Y, debiased=False), abs=1e-9)
        assert row.chosen_before == [(0.5, True)] * 3
    written = read_json("out/probe.json")
    np.testing.assert_allclose(np.diagonal(written["comparison"]["values"]), [row.cka for row in rows])
    assert written["comparison"]["low"] is not None
    assert (written["config"]["C"], written["config"]["settings"]["debiased"]) == (0.5, False)


def test_project(checkpoints: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = [entry("before", checkpoints), entry("other", checkpoints, depth=3, embed_dim=24)]
    found = run("project", models=models, data=[DIGITS, NOISY], output="out", title="A <script>")
    assert isinstance(found, Projection)
    stored = {f"features_{model}_{data}.safetensors" for model in ("before", "other") for data in ("digits", "noisy")}
    assert names() == {"index.html", "map.html", "projection.json", *stored, *with_formats("matrices")}
    written = read_json("out/projection.json")
    assert len(written["points"]) == len(written["cka"]) == 2 * (2 + 3)
    np.testing.assert_array_equal(written["cka"], found.cka)
    assert [pairing["model"] for pairing in written["pairings"]] == ["before", "other"]
    html = check_page()
    assert "<h1>A &lt;script&gt;</h1>" in html
    assert 'href="map.html"' in html
    assert '<iframe src="map.html"' in html
    assert table_columns(html) <= explained(html) | {"axis", "PC1", "PC2", "PC3"}
    for row in ("explained variance", "correlation with the dataset", "correlation with the model"):
        assert row in explained(html)
    assert "<td>explained variance</td>" not in html  # on hover, too
    assert "correlation with the dataset, other" in html
    assert "estimator: CKA, debiased" in html
    layers = [features("before", data).layers["model.blocks.1"] for data in ("digits", "noisy")]
    assert found.cka[1, 6] == pytest.approx(oracles.linear_cka(*layers, debiased=True), abs=1e-9)
    pairing = written["pairings"][0]
    for space, name in (("map", "procrustes_in_map"), ("signatures", "procrustes_of_signatures")):
        residuals = pairing[name]
        assert residuals["squared_residual"] == pytest.approx(residuals["residual"] ** 2)
        assert f"<td>{space}</td><td>{residuals['residual']:.4f}</td>" in html
    page = Path("out/map.html").read_text()
    assert "A &lt;script&gt;" in page
    assert not re.findall(r'(?:src|href)="https?:', page)
    assert "Map: out/map.html" in capsys.readouterr().out
    # Later, from the stored features.
    again = run(
        "project",
        "--standardize=true",
        "--debiased=false",
        "--centre=false",
        features=[f"out/{name}" for name in sorted(stored)],
        output="again",
    )
    assert {(point.model, point.dataset) for point in again.points} == {
        (model, data) for model in ("before", "other") for data in ("digits", "noisy")
    }
    assert {"index.html", "map.html", "projection.json"} < names("again")
    every = [Features.load(f"out/{name}") for name in sorted(stored)]
    published = project(every, standardize=True, debiased=False, centre=False)
    np.testing.assert_array_equal(again.cka, published.cka)
    assert again.points == published.points
    assert "estimator: CKA of standardised features" in check_page("again")
    typed = lit_cka_command.run(
        ["project", "--features", *(f"out/{name}" for name in sorted(stored)), "--output=typed"]
    )
    assert len(typed.points) == len(again.points)


def test_project_one_model_or_one_dataset(checkpoints: Path) -> None:
    run("project", models=[entry("before", checkpoints)], data=[DIGITS, NOISY], output="out")
    html = check_page()
    assert "correlation with the dataset" in html
    assert "correlation with the model" not in html
    stored = ["out/features_before_digits.safetensors"]
    run("project", features=stored, output="again")
    assert "nan" not in check_page("again")


def test_project_three_datasets(checkpoints: Path) -> None:
    """Every pair of them, in tabs of the map and in a figure a model."""
    blurred = {**DIGITS, "init_args": {"classes": [3, 8], "shift": "blurred"}}
    models = [entry("before", checkpoints), entry("after", checkpoints)]
    run("project", models=models, data=[DIGITS, NOISY, blurred], output="out")
    assert with_formats("matrices_0_before", "matrices_1_after") <= names()
    assert not with_formats("matrices") & names()
    check_page()
    every = [features(m, d) for m in ("after", "before") for d in ("digits", "noisy", "blurred")]
    matrices = project_command._matrices(project(every, debiased=False))
    assert list(matrices["after"]) == [("digits", "noisy"), ("digits", "blurred"), ("noisy", "blurred")]
    for model, by_pair in matrices.items():
        for pair, (values, *_) in by_pair.items():
            A, B = (list(features(model, data).layers.values()) for data in pair)
            np.testing.assert_allclose(values, [[oracles.linear_cka(X, Y, False) for Y in B] for X in A], atol=1e-9)
    page = Path("out/map.html").read_text()
    for pair in ("digits and noisy", "digits and blurred", "noisy and blurred"):
        assert f"after: {pair}" in page


def stored(path: str, model: str, data: str, layers: dict[str, torch.Tensor]) -> str:
    Features(layers, [str(index) for index in range(12)], model, data).save(path)
    return path


def test_names_are_neither_markup_nor_formulas_nor_too_long(capsys: pytest.CaptureFixture[str]) -> None:
    layers = {name: torch.randn(12, 3).double() for name in ("blocks.$0", "blocks.[/1]")}
    names_of = ["run [/x] $5", "$\\frac{$ " + "層" * 80]
    files = [stored(f"{number}.safetensors", name, "д" * 90, layers) for number, name in enumerate(names_of)]
    lit_cka_command.run(["compare", "--features", *files, "--output=out [/b]"])
    lit_cka_command.run(["project", "--features", *files, "--output=map"])
    said = capsys.readouterr().out
    assert "run [/x] $5" in said
    assert "Report: out [/b]/index.html" in said
    assert {"index.html", "comparison.json"} < names("out [/b]")
    assert all(len(name.encode()) < 255 for name in names("out [/b]"))


def test_a_map_with_undefined_layers() -> None:
    layers = {
        "0": torch.randn(12, 3).double(),
        "1": torch.ones(12, 3).double(),
        "2": torch.full((12, 3), torch.nan).double(),
    }
    files = [stored(f"{data}.safetensors", "model", data, layers) for data in ("one", "two")]
    lit_cka_command.run(["project", "--features", *files, "--output=out"])
    assert "undefined" in check_page()


def test_datasets_of_one_name_are_an_error(checkpoints: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = {**DIGITS, "init_args": {"classes": [1, 2]}}
    _, said = refused(capsys, "compare", models=[entry("before", checkpoints)], data=[DIGITS, other])
    assert "datasets of different names, but got digits, digits" in said
    assert not Path("out").exists()


def under_torchrun(*args: str) -> subprocess.CompletedProcess[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.run(
        [*launch, str(ROOT / "analyze.py"), *args], text=True, capture_output=True, timeout=200, env=env
    )


@pytest.mark.slow
@pytest.mark.parametrize("command", ["compare", "project"])
def test_ranks_share_the_batches(command: str, checkpoints: Path) -> None:
    """The features of one process, in the order of the samples; one report."""
    models = [entry("before", checkpoints), entry("other", checkpoints, depth=3, embed_dim=24)]
    for model in models:
        model["init_args"]["batch_size"] = 9  # eight batches, of which the last is smaller
    local = {"settings": {"measure": "cknna", "num_permutations": 19}} if command == "compare" else {}
    run(command, models=models, data=[DIGITS], output="out", **local)
    done = under_torchrun(command, "--config=options.yaml", "--output=several")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Report: several/index.html") == 1
    assert names("several") == names()
    for model in ("before", "other"):
        alone, shared = (
            Features.load(f"{folder}/features_{model}_digits.safetensors") for folder in ("out", "several")
        )
        assert (shared.ids, shared.labels) == (alone.ids, alone.labels)
        for layer, value in alone.layers.items():
            torch.testing.assert_close(shared.layers[layer], value, rtol=0, atol=1e-6)
    if command == "compare":
        one, several = (read_json(f"{folder}/comparison.json")["comparisons"][0] for folder in ("out", "several"))
        for key in ("values", "p", "p_best", "excess"):
            np.testing.assert_allclose(several[key], one[key], atol=1e-6)


@pytest.mark.slow
def test_an_error_on_several_ranks_is_said_once(checkpoints: Path) -> None:
    wrong = {**DIGITS, "init_args": {"shift": "melted"}}
    Path("options.yaml").write_text(yaml.safe_dump({"models": [entry("before", checkpoints)], "data": wrong}))
    done = under_torchrun("compare", "--config=options.yaml", "--output=several")
    assert done.returncode != 0
    assert done.stderr.count("error: Expected `shift` to be one of") == 1
    assert not Path("several").exists()


def refused(capsys: pytest.CaptureFixture[str], command: str, *more: str, **options: Any) -> tuple[Any, str]:
    with pytest.raises(SystemExit) as ended:
        run(command, *more, **{"output": "out", **options})
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return ended.value.code, said


def test_what_a_user_can_mend_is_one_line(checkpoints: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = entry("before", checkpoints), entry("after", checkpoints)
    for n in (8, 9):
        Features({"0": torch.randn(n, 3).double()}, list("abcdefghi")[:n]).save(f"{n}.safetensors")
    Path("notes.txt").write_text("no features")
    files = {"class_path": "lit_cka.analysis.image_model.ImageFiles", "init_args": {"root": "none"}}
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("compare", {}, "one or two `models`, but got 0"),
        ("compare", {"models": [before]}, "`data` to compare the models on"),
        ("compare", {"models": [before, before], "data": DIGITS}, "models of different names, but got before, before"),
        ("compare", {"models": [entry("none", checkpoints)], "data": DIGITS}, "none.ckpt"),
        ("compare", {"models": [before], "features": ["9.safetensors"]}, "no `models` besides"),
        ("compare", {"features": ["none.safetensors"]}, "file of features at 'none.safetensors', but there is none"),
        ("compare", {"features": ["notes.txt"]}, "'notes.txt' is damaged or no safetensors file"),
        ("compare", {"features": ["9.safetensors", "8.safetensors"]}, "has 9 and model 8"),
        ("compare", {"features": ["9.safetensors"], "settings": {"batch_size": 0}}, "`batch_size` to be at least 4"),
        ("compare", {"features": ["9.safetensors"], "settings": {"level": 2.0}}, "`level` to be in (0, 1)"),
        (
            "compare",
            {"models": [before], "data": {**DIGITS, "init_args": {"shift": "upside"}}},
            "`shift` to be one of digits, rotated, noisy, blurred",
        ),
        (
            "compare",
            {"models": [before], "data": files},
            "images below 'none', but found none",
        ),
        ("project", {}, "either `models` and `data`, or `features`"),
        ("project", {"models": [before], "features": ["9.safetensors"]}, "either `models` and `data`, or `features`"),
        ("project", {"models": [before]}, "at least one model, but got none"),
        ("project", {"features": ["9.safetensors", "9.safetensors"]}, "every model and dataset once"),
        ("compare", {"features": ["9.safetensors"], "output": "notes.txt"}, "notes.txt"),
    ]  # fmt: skip
    for command, options, message in cases:
        code, said = refused(capsys, command, **options)
        assert code == 1, said
        assert message in said
        assert said.startswith("error: ")
        assert said.count("\n") == 1
        assert "out" not in names(".")
    probe = {"before": before, "after": after}
    for option, message in (
        ("--num_folds=1", "`num_folds` of 2 or more, but got 1"),
        ("--C=-1", "`C` to be positive, or None to have it chosen, but got -1.0"),
        ("--settings.level=2", "`level` to be in (0, 1), but got 2.0"),
    ):
        code, said = refused(capsys, "probe", option, **probe, data=DIGITS)
        assert code == 1
        assert message in said
        assert "out" not in names(".")  # before a model has run
    one_class = {**DIGITS, "init_args": {"classes": [3]}}
    code, said = refused(capsys, "probe", **probe, data=one_class)
    assert (code, said) == (1, "error: Expected labels of at least two classes, but all are 3.\n")
    code, said = refused(capsys, "probe", "--num_folds=50", **probe, data=DIGITS)
    assert code == 1
    assert "Expected at least 50 samples of each class" in said


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("compare", ["--settings.measure=cca"], "cca"),
        ("compare", ["--settings.num_draws=3"], "num_draws"),
        ("compare", ["--models=[{class_path: lit_cka.analysis.image_model.Nothing}]"], "Nothing"),
        ("compare", ["--config=none.yaml"], "none.yaml"),
        ("probe", [], "before"),
        ("project", ["--standardize=much"], "standardize"),
        ("project", ["--components=2"], "components"),
        ("project", ["--debiased=much"], "debiased"),
        ("probe", ["--penalty=l1"], "penalty"),
        ("probe", ["--settings.unbiased=true"], "unbiased"),
    ],
)
def test_wrong_options(command: str, options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = refused(capsys, command, *options)
    assert code == 2
    assert message in said
    assert names(".") == {"options.yaml"}


CONFIGS = sorted(
    path for command in ("compare", "probe", "project") for path in (ROOT / "configs").glob(f"{command}_*")
)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_the_configs_are_read(path: Path) -> None:
    command = path.name.partition("_")[0]
    config = import_module(f"lit_cka.commands.{command}").parser().parse_args(["--config", str(path)])
    written = yaml.safe_load(path.read_text())
    assert config.output == written["output"] == f"runs/{path.stem}"
    for option, value in written.items():
        assert option in config
        if isinstance(value, list):
            assert [each["class_path"] for each in config[option]] == [each["class_path"] for each in value]
    models = config.get("models") or [config.before, config.after]
    assert len({model.init_args.name for model in models}) == len(models)


def test_the_configs_of_published_results_have_their_estimator() -> None:
    """Of the reviews and of the two languages, plain CKA; the map not centred."""
    parsed = {
        name: import_module(f"lit_cka.commands.{name.partition('_')[0]}").parser().parse_args(["--config", name])
        for name in ("probe_distilbert", "probe_digits", "project_languages", "project_digits")
    }
    assert [parsed[name].settings.debiased for name in ("probe_distilbert", "probe_digits")] == [False, True]
    assert [parsed[name].debiased for name in ("project_languages", "project_digits")] == [False, True]
    assert [parsed[name].centre for name in ("project_languages", "project_digits")] == [False, True]


def test_there_is_a_config_for_each_command() -> None:
    assert {path.name.partition("_")[0] for path in CONFIGS} == {"compare", "probe", "project"}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser_page(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
@pytest.mark.parametrize("command", ["compare", "probe", "project"])
def test_the_report_in_a_browser(command: str, checkpoints: Path, browser: Page, tmp_path: Path) -> None:
    """All pictures show, all links lead to files, nothing is loaded from elsewhere, on any screen, light and dark."""
    models = [entry("before", checkpoints), entry("after", checkpoints)]
    options: dict[str, Any] = {
        "compare": {"models": models, "data": DIGITS},
        "probe": {"before": models[0], "after": models[1], "data": DIGITS},
        "project": {"models": models, "data": [DIGITS, NOISY]},
    }[command]
    run(command, **options, output="out", title="What <b>changed</b>")
    page, folder = tmp_path / "out" / "index.html", tmp_path / "out"
    for width, scheme in ((1280, "light"), (360, "dark")):
        browser.open(page, width=width, scheme=scheme)
        assert browser.text("h1") == "What <b>changed</b>"
        pictures = browser.evaluate(
            "Promise.all([...document.images].map((image) => image.decode().then(() =>"
            " [image.naturalWidth, image.clientWidth, image.alt])))"
        )
        assert pictures
        for natural, shown, description in pictures:
            assert natural > 300
            assert 200 < shown <= width
            assert description
        links = browser.evaluate("[...document.links].map((link) => link.href)")
        assert {Path(unquote(link)[len("file://") :]).resolve() for link in links} == {
            path.resolve() for path in folder.iterdir() if path.name != "index.html"
        }
        assert all(request.startswith(folder.resolve().as_uri()) for request in browser.requests)
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
        back = browser.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (back == "rgb(255, 255, 255)") == (scheme == "light")
        assert browser.errors == []
    if command == "project":
        browser.click_on('a[href="map.html"]')
        browser.settle()
        assert browser.evaluate("location.pathname").endswith("/map.html")
