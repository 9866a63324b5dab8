"""A whole study of tiny networks: against each checkpoint evaluated by hand, stopped and gone on with, and on ranks."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats

from lit_cka.study.evaluation import Evaluator
from lit_cka.study.report import describe_study, save_study
from lit_cka.study.storage import load_result
from lit_cka.study.study import Study, StudyResults
from lit_cka.study.summary import summarise
from lit_cka.study.table import record
from tests.study.helpers import SETS, Net, Sets, write_checkpoints

ROOT = Path(__file__).parents[2]
EDITS: dict[str, Any] = {"monosoup": {"rule": "energy", "R": 0.5}, "trim": {"density": 0.3}}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_checkpoints(folder)
    return folder


def study(models: Path, **options: Any) -> Study:
    given = {"edits": EDITS, "wise_ft": [0.5], "device": "cpu", **options}
    return Study(str(models / "pretrained.pt"), [str(models / "*.pt")], Net(), **given)


@torch.no_grad()
def right(weights: dict[str, torch.Tensor]) -> list[NDArray[np.bool_]]:
    """Which samples of each set a network gets right, all in one batch."""
    model = Net()
    model.load_state_dict(weights)
    data = Sets()
    data.setup("test")
    sets = [each.dataset.tensors for each in data.test_sets]  # type: ignore[attr-defined]
    return [(model.eval()(x).argmax(1) == labels).numpy() for x, labels in sets]


def test_a_study_is_its_checkpoints_evaluated_by_hand(models: Path, tmp_path: Path) -> None:
    results = study(models).run(Sets(), tmp_path)
    assert [each.name for each in results.checkpoints] == ["tuned_0", "tuned_1", "tuned_2"]
    assert results.failed == {}
    rows = {row.label: row for row in summarise(results.checkpoints)}
    assert list(rows) == ["pretrained", "finetuned", *EDITS, "wise_ft_0.5", "shrink(monosoup)", "shrink(trim)"]
    pretrained = torch.load(models / "pretrained.pt")
    gains, accuracies = [], []
    for index, result in enumerate(results.checkpoints):
        tuned = torch.load(models / f"tuned_{index}.pt")
        half = {name: pretrained[name].lerp(tuned[name], 0.5) if tuned[name].is_floating_point() else tuned[name]
                for name in tuned}  # fmt: skip
        for label, weights in (("pretrained", pretrained), ("finetuned", tuned), ("wise_ft_0.5", half)):
            place = result.variants.index(label)
            for found, expected in zip(result.sets, right(weights), strict=True):
                np.testing.assert_array_equal(found.right[place], expected)
        before, after = right(tuned), right(half)
        accuracies.append([each.mean() for each in after])
        gains.append([a.mean() - b.mean() for a, b in zip(after, before, strict=True)])
    row = rows["wise_ft_0.5"]
    assert row.in_distribution == pytest.approx(np.mean(accuracies, axis=0)[0])
    assert row.shifted == pytest.approx(np.mean(accuracies, axis=0)[1:].mean())
    by_model = np.mean([gain[1:] for gain in gains], axis=1)
    np.testing.assert_allclose(row.gain_shifted.by_model, by_model, atol=1e-12)
    interval = tuple(stats.ttest_1samp(by_model, 0).confidence_interval())
    assert row.gain_shifted.over_models == pytest.approx(interval, rel=1e-9)
    assert row.verdict == "is a shrinkage"
    assert row.kept == pytest.approx(0.5, abs=1e-3)
    assert rows["trim"].beyond_shifted is not None
    assert rows["trim"].seconds > 0
    points = {label: (row.in_distribution, row.shifted) for label, row in rows.items()}
    for label, (x, y) in points.items():
        is_beaten = any(a >= x and b >= y and (a, b) != (x, y) for a, b in points.values())
        assert rows[label].on_front == (not is_beaten)


def test_each_batch_is_loaded_once(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []
    original = torch.utils.data.TensorDataset.__getitem__

    def item(self: Any, index: Any) -> Any:
        loaded.append(index)
        return original(self, index)

    monkeypatch.setattr(torch.utils.data.TensorDataset, "__getitem__", item)
    monkeypatch.setattr(torch.utils.data.TensorDataset, "__getitems__", None, raising=False)
    study(models).run(Sets(), tmp_path)
    assert len(loaded) == 3 * (50 + 40 + 40)


def test_what_is_there_is_not_done_again(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = study(models).run(Sets(), tmp_path)
    evaluated = []
    original = Evaluator.evaluate

    def evaluate(self: Evaluator, checkpoint: Any, *args: Any) -> Any:
        evaluated.append(checkpoint.name)
        return original(self, checkpoint, *args)

    monkeypatch.setattr(Evaluator, "evaluate", evaluate)
    said: list[str] = []
    again = study(models).run(Sets(), tmp_path, say=said.append)
    assert evaluated == []
    assert said == ["3 of 3 checkpoints are evaluated already."]
    for a, b in zip(first.checkpoints, again.checkpoints, strict=True):
        np.testing.assert_array_equal(a.sets[2].right, b.sets[2].right)
    next((tmp_path / "checkpoints").glob("tuned_1*")).unlink()
    study(models).run(Sets(), tmp_path)
    assert evaluated == ["tuned_1"]
    (models / "tuned_2.pt").touch()  # written anew since
    study(models).run(Sets(), tmp_path)
    assert evaluated == ["tuned_1", "tuned_2"]
    with pytest.raises(ValueError, match=r"but these differ: `max_batches` \(not given before, 2 now\)"):
        study(models, max_batches=2).run(Sets(), tmp_path)


def broken(models: Path, folder: Path) -> Path:
    """The checkpoints, with one of another architecture, one with NaN and one damaged among them."""
    for path in models.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    weights = torch.load(models / "tuned_0.pt")
    torch.save({**weights, "blocks.1.weight": torch.full((8, 8), torch.nan)}, folder / "tuned_nan.pt")
    torch.save(Net(9).state_dict(), folder / "tuned_other.pt")
    (folder / "tuned_torn.pt").write_bytes((models / "tuned_0.pt").read_bytes()[:900])
    return folder


def test_bad_checkpoints_are_named_and_the_others_go_on(models: Path, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    results = study(broken(models, tmp_path / "models")).run(Sets(), tmp_path / "out")
    assert [each.name for each in results.checkpoints] == ["tuned_0", "tuned_1", "tuned_2"]
    assert list(results.failed) == ["tuned_nan", "tuned_other", "tuned_torn"]
    assert "'blocks.1.weight' of the fine-tuned model holds NaN or infinity" in results.failed["tuned_nan"]
    assert "of another architecture" in results.failed["tuned_other"]
    assert "tuned_torn.pt" in results.failed["tuned_torn"]
    rows = summarise(results.checkpoints)
    alone = study(models).run(Sets(), tmp_path / "alone")
    assert [row.shifted for row in rows] == [row.shifted for row in summarise(alone.checkpoints)]
    said = describe_study(results, rows)
    for name, why in results.failed.items():
        assert f"Left out: {name}. {why}" in said


def test_nan_is_named_where_no_edit_looks(models: Path, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    results = study(broken(models, tmp_path / "models"), include=["head.*"]).run(Sets(), tmp_path / "out")
    assert "'blocks.1.weight' of the fine-tuned model holds NaN or infinity" in results.failed["tuned_nan"]


def test_no_good_checkpoint_is_an_error(models: Path, tmp_path: Path) -> None:
    folder = broken(models, tmp_path)
    given = {"edits": EDITS, "device": "cpu"}
    bad = Study(str(folder / "pretrained.pt"), [str(folder / "tuned_nan.pt")], Net(), **given)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Expected checkpoints that can be evaluated, but: Expected finite weights"):
        bad.run(Sets(), tmp_path / "out")
    spoiled = Study(str(folder / "tuned_nan.pt"), [str(folder / "tuned_0.pt")], Net(), **given)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"'blocks\.1\.weight' of the pretrained model holds NaN"):
        spoiled.run(Sets(), tmp_path / "out2")
    assert not (tmp_path / "out2" / "plan.json").exists()


def test_other_samples_at_each_pass_are_an_error(models: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    study(models).run(Sets(), folder)
    next((folder / "checkpoints").glob("tuned_1*")).unlink()
    with pytest.raises(ValueError, match="those of 'plain' differ between 'tuned_0' and 'tuned_1': are they shuffled"):
        study(models).run(Sets(shuffled=True), folder)


def test_one_set_is_no_study_and_an_absent_class_is_said(models: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Expected at least two test sets"):
        study(models).run(Sets(num_sets=1), tmp_path / "one")
    results = study(models).run(Sets(absent=2), tmp_path / "absent")
    assert [each.absent for each in results.checkpoints[0].sets] == [[2]] * 3
    assert "grouped has no sample of the classes 2: its numbers say nothing of these." in described(results)
    assert not any("has no sample" in line for line in described(study(models).run(Sets(), tmp_path / "all")))


def described(results: StudyResults) -> list[str]:
    return describe_study(results, summarise(results.checkpoints))


def test_one_checkpoint_has_no_verdict(models: Path, tmp_path: Path) -> None:
    one = Study(str(models / "pretrained.pt"), [str(models / "tuned_0.pt")], Net(), edits=EDITS, device="cpu")
    results = one.run(Sets(), tmp_path)
    rows = {row.label: row for row in summarise(results.checkpoints)}
    assert rows["trim"].verdict == "two checkpoints needed"
    assert np.isfinite(rows["trim"].gain_shifted.over_samples).all()
    assert described(results)[-1].endswith("add checkpoints for intervals.")
    assert np.isnan(record(rows["trim"])["gain_shifted"]["over_both"]).all()


def test_what_is_written_agrees(models: Path, tmp_path: Path) -> None:
    results = study(models).run(Sets(), tmp_path)
    rows = save_study(tmp_path, results, {"seed": 0})
    content = json.loads((tmp_path / "study.json").read_text())
    assert content["test_sets"] == {
        name: {"num_samples": n, "metric": "top1", "absent_classes": []}
        for name, n in zip(SETS, (50, 40, 40), strict=True)
    }
    with (tmp_path / "study.csv").open() as file:
        table = list(csv.DictReader(file))
    with (tmp_path / "checkpoints.csv").open() as file:
        by_checkpoint = list(csv.DictReader(file))
    assert len(by_checkpoint) == 3 * len(rows)
    for row, held, line in zip(rows, content["edits"], table, strict=True):
        assert held["label"] == line["label"] == row.label
        assert float(line["gain_shifted_over_both_low"]) == held["gain_shifted"]["over_both"][0]
        assert held["gain_shifted"]["mean"] == row.gain_shifted.mean
        mine = [each for each in by_checkpoint if each["edit"] == row.label]
        assert np.mean([float(each["shifted_average"]) for each in mine]) == pytest.approx(row.shifted)
    names = {path.name for path in tmp_path.iterdir()}
    figures = {f"{name}{end}" for name in ("plane", "gains", "by_checkpoint") for end in (".svg", ".png", ".pdf")}
    tables = {
        "study.json",
        "study.csv",
        "checkpoints.csv",
        "index.html",
        "checkpoints.html",
        "plan.json",
        "checkpoints",
    }
    assert names == figures | tables


def command(models: Path, output: Path, *more: str) -> list[str]:
    options = [f"--study.pretrained={models / 'pretrained.pt'}", f"--study.checkpoints=['{models}/*.pt']"]
    options += ["--study.model=tests.study.helpers.Net", f"--study.edits={json.dumps(EDITS)}", "--study.device=cpu"]
    return ["study", *options, "--data=tests.study.helpers.Sets", f"--output={output}", *more]


@pytest.mark.slow
def test_a_study_that_was_killed_goes_on(models: Path, tmp_path: Path) -> None:
    """With SIGTERM, as soon as there is one result: the same command does the rest, and comes to the same."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    args = [sys.executable, "-m", "lit_cka", *command(models, tmp_path / "out", "--data.batch_size=1")]
    with subprocess.Popen(args, env=env, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        deadline = time.monotonic() + 120
        while not list((tmp_path / "out" / "checkpoints").glob("[!.]*")) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate()
    assert process.returncode == 143
    assert "The same command goes on from there." in said
    done = sorted((tmp_path / "out" / "checkpoints").glob("[!.]*"))
    assert 1 <= len(done) < 3
    before = [path.stat().st_mtime_ns for path in done]
    subprocess.run(args, env=env, check=True, cwd=tmp_path)
    assert [path.stat().st_mtime_ns for path in done] == before
    whole = study(models, wise_ft=()).run(Sets(batch_size=1), tmp_path / "whole")
    for each in whole.checkpoints:
        found = load_result(next((tmp_path / "out" / "checkpoints").glob(f"{each.name}-*")))
        for a, b in zip(found.sets, each.sets, strict=True):
            np.testing.assert_array_equal(a.right, b.right)


@pytest.mark.slow
def test_ranks_share_the_checkpoints(models: Path, tmp_path: Path) -> None:
    """Two ranks, of which one meets a bad checkpoint, write what one process does."""
    (tmp_path / "models").mkdir()
    folder = broken(models, tmp_path / "models")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "lit_cka"]
    args = [*launch, *command(folder, tmp_path / "two")]
    done = subprocess.run(args, env=env, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    study(folder, wise_ft=()).run(Sets(), tmp_path / "one")
    contents = []
    results = StudyResults([load_result(path) for path in sorted((tmp_path / "one" / "checkpoints").iterdir())], {})
    rows = summarise(results.checkpoints)
    content = json.loads((tmp_path / "two" / "study.json").read_text())
    contents = [(each["label"], each["shifted"], each["p_adjusted"]) for each in content["edits"]]
    assert contents == [(row.label, row.shifted, None if np.isnan(row.p_adjusted) else row.p_adjusted) for row in rows]
    assert sorted(content["failed"]) == ["tuned_nan", "tuned_other", "tuned_torn"]
