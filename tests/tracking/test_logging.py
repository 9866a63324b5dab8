"""What the callback leaves elsewhere: other callbacks, loggers, a TensorBoard server, checkpoints, and no hooks."""

from __future__ import annotations

import csv
import io
import json
import re
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.trainer.connectors.logger_connector import result

from lit_cka import CKACallback
from tests.tracking.helpers import (
    BLOCKS,
    Classifier,
    Keeper,
    Net,
    PlainLogger,
    frozen,
    hand_cka,
    hooks_of,
    loader,
    train_loader,
    trainer,
)

# Other callbacks.


@pytest.mark.parametrize("name", ["mean", BLOCKS[1]])
def test_other_callbacks_monitor(tmp_path: Path, name: str) -> None:
    callback, stopping = CKACallback(), EarlyStopping(f"cka/{name}", mode="max", patience=0)
    saving = ModelCheckpoint(tmp_path, monitor=f"cka/{name}", mode="min", filename="{step}")
    trainer(tmp_path, callback, stopping, saving, enable_checkpointing=True, max_epochs=9).fit(
        Classifier(), train_loader(), loader()
    )
    values = [record["scores"].get(name, np.mean(list(record["scores"].values()))) for record in callback.history]
    assert values[1] < values[0]
    assert (stopping.stopped_epoch, len(values)) == (1, 2)
    assert saving.best_model_score.item() == pytest.approx(values[1], abs=1e-6)
    assert Path(saving.best_model_path).name == "step=8.ckpt"


def test_two_callbacks_with_their_own_prefixes(tmp_path: Path) -> None:
    module, other = Classifier(), Net()
    before = frozen(module)
    callbacks = [CKACallback(), CKACallback(reference=other, prefix="pretrained", layers="net.blocks.[02]")]
    run = trainer(tmp_path, *callbacks)
    run.fit(module, train_loader(), loader())
    names = [BLOCKS[0], BLOCKS[2]]
    for callback, start, layers in zip(callbacks, (before, Classifier(other)), (BLOCKS, names), strict=True):
        assert callback.scores == pytest.approx(hand_cka(start, module, layers, loader()), abs=1e-9)
        for name, score in callback.scores.items():
            assert run.callback_metrics[f"{callback.options.prefix}/{name}"].item() == pytest.approx(score, abs=1e-6)
    assert callbacks[0].scores != callbacks[1].scores


def test_two_callbacks_with_one_prefix_are_refused(tmp_path: Path) -> None:
    run = trainer(tmp_path, CKACallback(), CKACallback(debiased=True))
    message = r"each CKACallback .* to have a `prefix` of its own, .* 'cka': pass, say, CKACallback\(prefix='cka_2'\)"
    with pytest.raises(ValueError, match=message):
        run.fit(Classifier(), train_loader(), loader())
    assert CKACallback().state_key != CKACallback(prefix="other").state_key


# Loggers.


class Stepwise(Classifier):
    """Logs at every batch."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("loss", self.loss(batch), on_step=True, on_epoch=True)

    test_step = validation_step


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_what_an_evaluation_logs_by_itself_has_the_same_steps(tmp_path: Path, stage: str) -> None:
    """Though its loop runs once more before it."""
    seen = []
    for callbacks in ([], [CKACallback()]):
        torch.manual_seed(0)
        logger = PlainLogger()
        run, module = trainer(tmp_path, *callbacks, logger=logger), Stepwise()
        for _ in range(2):
            getattr(run, stage)(module, loader(), verbose=False)
        kept = [(step, {k: v for k, v in values.items() if not k.startswith("cka")}) for step, values in logger.seen]
        seen.append([(step, values) for step, values in kept if values.keys() - {"epoch"}])
    assert seen[0] == seen[1]
    assert [step for step, values in seen[0] if "loss_step" in values] == [0, 1, 2] * 2


def test_csv_logger(tmp_path: Path) -> None:
    callback, logger = CKACallback(), CSVLogger(tmp_path)
    trainer(tmp_path, callback, logger=logger).fit(Classifier(), train_loader(), loader())
    with open(Path(logger.log_dir) / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["cka/mean"]]
    assert len(rows) == len(callback.history) == 2
    for row, record in zip(rows, callback.history, strict=True):
        assert int(row["step"]) == record["step"] - 1  # as Lightning counts in loggers
        assert {name: float(row[f"cka/{name}"]) for name in BLOCKS} == pytest.approx(record["scores"], abs=1e-6)
        assert float(row["cka/mean"]) == pytest.approx(np.mean(list(record["scores"].values())), abs=1e-6)


def test_a_logger_without_pictures_has_the_scalars(tmp_path: Path) -> None:
    callback, logger = CKACallback(), PlainLogger()
    trainer(tmp_path, callback, logger=logger).fit(Classifier(), train_loader(), loader())
    seen = [metrics for _, metrics in logger.seen if "cka/mean" in metrics]
    assert len(seen) == 2
    assert all({f"cka/{name}" for name in BLOCKS} <= set(metrics) for metrics in seen)


def events(logger: TensorBoardLogger) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    everything = {"scalars": 0, "images": 0, "tensors": 0}
    return EventAccumulator(logger.log_dir, size_guidance=everything).Reload()


def layout(accumulator: Any) -> dict[str, list[str]]:
    """The tags of each chart, from the one custom-scalars layout of the run."""
    from tensorboard.plugins.custom_scalar import layout_pb2

    (event,) = accumulator.Tensors("custom_scalars__config__")
    parsed = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    return {chart.title: list(chart.multiline.tag) for category in parsed.category for chart in category.chart}


@pytest.mark.parametrize(
    ("share", "steps"),
    [pytest.param(1e9, [3, 7, 11], marks=pytest.mark.slow), (1e-9, [3, 11])],
    ids=["all", "first and last"],
)
def test_tensorboard_holds_scalars_and_pictures(
    tmp_path: Path, share: float, steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heatmaps as often as their share of the time allows."""
    monkeypatch.setattr("lit_cka.tracking.report._DRAWING_SHARE", share)
    callback, logger = CKACallback(), TensorBoardLogger(tmp_path)
    trainer(tmp_path, callback, logger=logger, max_epochs=3).fit(Classifier(), train_loader(), loader())
    accumulator = events(logger)
    for name in BLOCKS:
        written = accumulator.Scalars(f"cka/{name}")
        assert [event.step for event in written] == [3, 7, 11]
        assert [event.value for event in written] == pytest.approx(
            [record["scores"][name] for record in callback.history], abs=1e-6
        )
    assert len(accumulator.Scalars("cka/mean")) == 3
    for name in ("heatmap", "curves"):
        images = accumulator.Images(f"cka/{name}")
        assert [image.step for image in images] == steps  # as the scalars
        pixels = matplotlib.image.imread(io.BytesIO(images[-1].encoded_image_string), format="png")
        assert pixels.shape[:2] == (images[-1].height, images[-1].width)
        assert images[-1].width > 900  # large enough to read
        assert len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 20  # something is drawn
    charts = layout(accumulator)
    assert list(charts) == [*BLOCKS, "mean"]  # in one for all, all would have one colour
    scalars = [tag for tag in accumulator.Tags()["scalars"] if tag.startswith("cka/")]
    for name, tags in charts.items():  # each finds the scalar it is for, and that alone
        assert [tag for tag in scalars for pattern in tags if re.match(pattern, tag)] == [f"cka/{name}"]


def test_charts_of_two_callbacks_do_not_replace_each_other(tmp_path: Path) -> None:
    """TensorBoard keeps the last layout that a run has written."""
    logger, callbacks = TensorBoardLogger(tmp_path), [CKACallback(), CKACallback(prefix="other", layers=BLOCKS[:1])]
    trainer(tmp_path, *callbacks, logger=logger).fit(Classifier(), train_loader(), loader())
    from tensorboard.plugins.custom_scalar import layout_pb2

    last = events(logger).Tensors("custom_scalars__config__")[-1]
    shown = layout_pb2.Layout.FromString(last.tensor_proto.string_val[0])
    assert {category.title for category in shown.category} == {"cka", "other"}


def test_charts_once_for_all_stages(tmp_path: Path) -> None:
    """A test after a fit writes to the same run."""
    logger, module = TensorBoardLogger(tmp_path), Classifier()
    run = trainer(tmp_path, CKACallback(), logger=logger)
    run.fit(module, train_loader(), loader())
    run.test(module, loader(), verbose=False)
    assert list(layout(events(logger))) == [*BLOCKS, "mean"]


def test_the_table_says_how_loggers_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The trainer's steps are those taken, the loggers' that of the last one, from 0: so has Lightning it."""
    logger = TensorBoardLogger(tmp_path)
    callback = CKACallback()
    trainer(tmp_path, callback, logger=logger, max_epochs=3).fit(Classifier(), train_loader(), loader())
    shown = capsys.readouterr().out
    last = events(logger).Scalars("cka/mean")[-1].step
    assert (callback.history[-1]["step"], last) == (12, 11)
    assert "step 12" in shown
    assert "12 is 11 in loggers" in shown


class ImageLogger(PlainLogger):
    """With the one method more that Lightning's `WandbLogger` has."""

    def __init__(self) -> None:
        super().__init__()
        self.images: list[tuple[str, tuple[int, ...]]] = []

    def log_image(self, key: str, images: list[Any], step: int | None = None, **kwargs: Any) -> None:
        self.images += [(key, image.shape) for image in images]


class FileLogger(PlainLogger):
    """With what Lightning's `MLFlowLogger` has: a `run_id`, and MLflow's client, which keeps files."""

    def __init__(self, folder: Path | None, fails: bool = False) -> None:
        super().__init__()
        self.kept: list[tuple[str, str, str | None]] = []
        self.run_id, self.folder, self.fails = "the run", folder, fails

    @property
    def experiment(self) -> FileLogger:
        return self

    @property
    def save_dir(self) -> str | None:
        return None if self.folder is None else str(self.folder)

    def log_artifact(self, run_id: str, local_path: str, artifact_path: str | None = None) -> None:
        if self.fails:
            raise ConnectionError("the server is away")
        assert Path(local_path).stat().st_size
        self.kept.append((run_id, Path(local_path).name, artifact_path))


REPORT = ["cka_curves.png", "cka_heatmap.png", "cka_history.csv", "cka_history.json"]


def test_a_logger_of_images_has_both_pictures(tmp_path: Path) -> None:
    logger = ImageLogger()
    trainer(tmp_path, CKACallback(prefix="sim"), logger=logger).fit(Classifier(), train_loader(), loader())
    assert {key for key, _ in logger.images} == {"sim/heatmap", "sim/curves"}
    assert all(len(shape) == 3 and shape[2] == 3 for _, shape in logger.images)


@pytest.mark.parametrize("has_folder", [True, False])
def test_a_logger_of_files_has_the_report(tmp_path: Path, has_folder: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where the run has no folder, as on a server."""
    folder = tmp_path / "run" if has_folder else None
    logger = FileLogger(folder)
    trainer(tmp_path, CKACallback(), logger=logger).fit(Classifier(), train_loader(), loader())
    assert logger.kept == [("the run", name, "cka") for name in REPORT]
    assert ("CKA of each layer over time: " in capsys.readouterr().out) is has_folder
    assert sorted(path.name for path in (tmp_path / "run").glob("cka/*")) == (REPORT if has_folder else [])


def test_a_logger_that_can_not_keep_files_ends_no_run(tmp_path: Path) -> None:
    run = trainer(tmp_path, CKACallback(), logger=FileLogger(tmp_path / "run", fails=True))
    with pytest.warns(UserWarning, match="could not be given to FileLogger: the server is away"):
        run.fit(Classifier(), train_loader(), loader())
    assert run.state.finished


def test_lightnings_own_loggers_have_these_methods() -> None:
    """Whose libraries need not be here for that."""
    from inspect import signature

    from lightning.pytorch.loggers import MLFlowLogger, WandbLogger

    assert list(signature(WandbLogger.log_image).parameters) == list(signature(ImageLogger.log_image).parameters)
    assert isinstance(MLFlowLogger.run_id, property)


def test_the_client_of_mlflow_has_this_method() -> None:
    pytest.importorskip("mlflow")
    from inspect import signature

    from mlflow.tracking import MlflowClient

    assert list(signature(MlflowClient.log_artifact).parameters) == ["self", "run_id", "local_path", "artifact_path"]


def test_log_figures_false_draws_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = TensorBoardLogger(tmp_path)
    trainer(tmp_path, CKACallback(log_figures=False), logger=logger).fit(Classifier(), train_loader(), loader())
    accumulator = events(logger)
    assert len(accumulator.Scalars("cka/mean")) == 2
    assert accumulator.Tags()["images"] == []
    assert "custom_scalars__config__" not in accumulator.Tags()["tensors"]
    assert "CKA" not in capsys.readouterr().out


@contextmanager
def tensorboard_server(folder: Path) -> Iterator[str]:
    """A TensorBoard server on this machine, as a process of its own, killed at the end; gives its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--host", "127.0.0.1"]
    command += ["--port", str(port), "--load_fast=false", "--reload_interval", "1"]
    with open(folder / "server.log", "w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait(timeout=20)


def get(address: str, deadline: float, **query: Any) -> bytes:
    """The answer, which is asked for until it is not empty: the server reads its logs in the background."""
    last: Any = None
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{address}?{urllib.parse.urlencode(query)}", timeout=10) as response:
                last = response.read()
            if last.strip() not in (b"", b"{}", b"[]", b"null"):
                return last
        except OSError as error:
            last = error
        time.sleep(0.3)
    raise TimeoutError(f"No answer from {address} {query}: {last!r}")


@pytest.mark.timeout(120)
def test_a_real_tensorboard_server_shows_it_all(tmp_path: Path) -> None:
    callback, logger = CKACallback(), TensorBoardLogger(tmp_path, name="run", version="")
    trainer(tmp_path, callback, logger=logger).fit(Classifier(Net(num_blocks=12)), train_loader(), loader())
    assert len(callback.scores) == 12
    deadline = time.monotonic() + 80
    with tensorboard_server(tmp_path) as address:
        runs = json.loads(get(f"{address}/data/runs", deadline))
        assert runs == ["run"]
        scalars = json.loads(get(f"{address}/data/plugin/scalars/scalars", deadline, run="run", tag="cka/net.blocks.1"))
        assert [value for _, _, value in scalars] == pytest.approx(
            [record["scores"]["net.blocks.1"] for record in callback.history], abs=1e-6
        )
        images = json.loads(
            get(f"{address}/data/plugin/images/images", deadline, run="run", tag="cka/heatmap", sample=0)
        )
        assert [image["step"] for image in images] == [step for _, step, _ in scalars]
        picture = get(f"{address}/data/plugin/images/individualImage?{images[-1]['query']}", deadline)
        assert matplotlib.image.imread(io.BytesIO(picture), format="png").ndim == 3
        shown = json.loads(get(f"{address}/data/plugin/custom_scalars/layout", deadline))
        charts = [chart for category in shown["category"] for chart in category["chart"]]
        assert [chart["title"] for chart in charts] == [*callback.scores, "mean"]
        for chart, name in zip(charts, [*callback.scores, "mean"], strict=True):
            (tag,) = chart["multiline"]["tag"]
            found = json.loads(get(f"{address}/data/plugin/custom_scalars/scalars", deadline, run="run", tag=tag))
            assert list(found["tag_to_events"]) == [f"cka/{name}"]  # blocks.1 without blocks.10
            assert len(found["tag_to_events"][f"cka/{name}"]) == 2


# Hooks.


class Failing(Classifier):
    """Fails in the second validation after the sanity check."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error
        self.fails = True

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        assert hooks_of(self) > 0 or self.trainer.sanity_checking  # the callback is at work
        self.loss(batch)
        if self.fails and self.global_step > 4:
            raise self.error


@pytest.mark.parametrize("error", [RuntimeError("on purpose"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_no_hook_survives_an_exception(tmp_path: Path, error: BaseException) -> None:
    module, callback = Failing(error), CKACallback()
    # Lightning ends the process at an interrupt.
    expected = (SystemExit, KeyboardInterrupt) if isinstance(error, KeyboardInterrupt) else RuntimeError
    with pytest.raises(expected):
        trainer(tmp_path, callback).fit(module, train_loader(), loader())
    assert module.global_step == 8
    assert len(callback.history) == 1
    assert hooks_of(module) == 0
    # And it can be used again.
    module.train().fails = False
    trainer(tmp_path, callback, max_epochs=1).fit(module, train_loader(), loader())
    assert len(callback.history) == 2


def test_no_hook_outside_of_evaluations(tmp_path: Path) -> None:
    class Watching(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            assert hooks_of(self) == 0
            return super().training_step(batch, batch_idx)

    module = Watching()
    trainer(tmp_path, CKACallback()).fit(module, train_loader(), loader())
    assert len(module.losses) == 8
    assert hooks_of(module) == 0


def test_own_hooks_of_the_module_stay(tmp_path: Path) -> None:
    module, calls = Classifier(), []
    module.net.blocks[1].register_forward_hook(lambda *args: calls.append(1))
    trainer(tmp_path, CKACallback()).fit(module, train_loader(), loader())
    assert hooks_of(module) == 1
    # The reference runs the copied hook too: what it does to the outputs belongs to the model.
    assert len(calls) >= 8 + 2 * 3 + 2


# Checkpoints.


def test_state_is_plain_and_restores_the_history(tmp_path: Path) -> None:
    callback = CKACallback(debiased=True)
    run = trainer(tmp_path, callback)
    run.fit(Classifier(), train_loader(), loader())
    run.save_checkpoint(tmp_path / "end.ckpt")
    states = torch.load(tmp_path / "end.ckpt", weights_only=True)["callbacks"]
    (state,) = [state for key, state in states.items() if key.startswith("CKACallback")]
    restored = CKACallback()
    restored.load_state_dict(state)
    assert restored.history == callback.history
    assert restored.scores == callback.scores
    restored.history[0]["scores"][BLOCKS[0]] = 7.0
    assert callback.history[0]["scores"][BLOCKS[0]] != 7.0


def test_a_checkpoint_with_undefined_scores_loads(tmp_path: Path) -> None:
    callback = CKACallback()
    run = trainer(tmp_path, callback, max_epochs=1)
    module = Classifier()
    module.net.blocks[1].register_forward_hook(lambda m, i, output: output if m.training else output * torch.nan)
    module.validation_step = lambda batch, batch_idx: module.net(batch[0])
    with pytest.warns(UserWarning, match="is undefined"):
        run.fit(module, train_loader(), loader())
    run.save_checkpoint(tmp_path / "end.ckpt")
    states = torch.load(tmp_path / "end.ckpt", weights_only=True)["callbacks"]
    (state,) = [state for key, state in states.items() if key.startswith("CKACallback")]
    assert np.isnan(state["history"][0]["scores"][BLOCKS[1]])


def stopped_training(folder: Path) -> tuple[Path, Classifier, CKACallback]:
    """A training of two epochs, saved, and the weights it began with."""
    module, callback = Classifier(), CKACallback()
    before = frozen(module)
    run = trainer(folder, callback)
    run.fit(module, train_loader(), loader())
    run.save_checkpoint(folder / "stopped.ckpt")
    return folder / "stopped.ckpt", before, callback


def test_resuming_an_untracked_training_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "stopped.ckpt"
    stopped = trainer(tmp_path)
    stopped.fit(Classifier(), train_loader(), loader())
    stopped.save_checkpoint(path)
    run = trainer(tmp_path, CKACallback(), max_epochs=3)
    with pytest.raises(ValueError, match=r"those that the training began with are gone.*`reference=`"):
        run.fit(Classifier(), train_loader(), loader(), ckpt_path=path)
    assert run.fit_loop.epoch_loop.batch_progress.total.ready <= 8  # none after those of the stopped training


def test_resuming_with_a_reference_goes_on_with_the_history(tmp_path: Path) -> None:
    path, before, stopped = stopped_training(tmp_path)
    torch.save(before.state_dict(), tmp_path / "before.pt")
    module, callback = Classifier(), CKACallback(reference=tmp_path / "before.pt")
    trainer(tmp_path, callback, max_epochs=3).fit(module, train_loader(), loader(), ckpt_path=path)
    assert [record["epoch"] for record in callback.history] == [0, 1, 2]
    assert callback.history[:2] == stopped.history
    assert callback.scores == pytest.approx(hand_cka(before, module, BLOCKS, loader()), abs=1e-9)


def test_a_checkpoint_saved_at_every_epoch_holds_the_history_so_far(tmp_path: Path) -> None:
    saving, keeper = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}"), Keeper()
    trainer(tmp_path, CKACallback(), saving, keeper, enable_checkpointing=True).fit(
        Classifier(), train_loader(), loader()
    )
    lengths = []
    for epoch in (0, 1):
        states = torch.load(tmp_path / f"epoch={epoch}.ckpt", weights_only=True)["callbacks"]
        lengths += [len(state["history"]) for key, state in states.items() if key.startswith("CKACallback")]
    assert lengths == [1, 2]


def test_the_mean_is_in_the_progress_bar(tmp_path: Path) -> None:
    run, module = trainer(tmp_path, CKACallback()), Classifier()
    run.fit(module, train_loader(), loader())
    shown = {key: value for key, value in run.progress_bar_metrics.items() if key.startswith("cka")}
    assert shown == {"cka/mean": pytest.approx(run.callback_metrics["cka/mean"].item(), abs=1e-7)}


def test_lightning_recommends_no_synchronisation_of_what_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it does for the module's own scalars, with several processes, if they are logged like ours."""
    monkeypatch.setattr(result, "_distributed_is_initialized", lambda: True)
    monkeypatch.setattr(result, "warning_cache", result.WarningCache())
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        trainer(tmp_path, CKACallback()).fit(Classifier(), train_loader(), loader())
    recommended = [str(each.message) for each in seen if "sync_dist=True" in str(each.message)]
    assert any("val" in text for text in recommended)
    assert not any("cka" in text for text in recommended)
