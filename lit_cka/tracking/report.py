"""What a tracked training leaves to look at: scalars and pictures in the loggers, and files."""

from __future__ import annotations

import csv
import io
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers import Logger
from rich.console import Console

from lit_cka import plots
from lit_cka.features.lightning_private import logging_step, note_same_on_all_ranks
from lit_cka.files import write_bytes
from lit_cka.parallel.warning import warn
from lit_cka.tracking.artifacts import log_charts, log_files, log_images, takes_files, takes_images
from lit_cka.tracking.history import BOUNDS, LOGGED_BESIDE, THRESHOLDS, Record, first_series, mean_score, verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DRAWING_SHARE = 0.01
_LOGGED_DPI = 200  # of pictures in loggers, which show them large
_STEPS = "optimizer steps taken"


def heatmap(history: Sequence[Record], thresholds: tuple[float, float] = THRESHOLDS) -> Figure:
    """The layers-by-time heatmap of `first_series`, with the verdict on each layer's last value beside its row."""
    records = first_series(history)
    layer_names = list(records[-1]["scores"])
    values = np.array([[record["scores"].get(name, np.nan) for record in records] for name in layer_names])
    times = [str(record["step"]) for record in records]
    words = [verdict(records[-1]["scores"][name], thresholds) for name in layer_names]
    title = f"CKA of each layer with the reference, n = {records[-1]['n']}"
    return plots.layer_time_heatmap(values, layer_names, times, title=title, xlabel=_STEPS, row_notes=words)[0]


def curves(history: Sequence[Record]) -> Figure:
    """A curve for every layer over the time of `first_series`, coloured by depth."""
    records = first_series(history)
    layer_names = list(records[-1]["scores"])
    values = [[record["scores"].get(name, np.nan) for record in records] for name in layer_names]
    title = "CKA of each layer, from the first (dark) to the last (light)"
    bands = [
        [[record.get(end, {}).get(name, np.nan) for record in records] for name in layer_names]  # type: ignore[attr-defined]
        for end in ("low", "high")
    ]
    steps = [record["step"] for record in records]
    return plots.epoch_trend(
        values, layer_names, steps, bands=(bands[0], bands[1]), title=title, xlabel=_STEPS,
        ylabel="CKA, 95 % intervals", limits=None,
    )[0]  # fmt: skip


def log_records(
    trainer: pl.Trainer, pl_module: pl.LightningModule, records: Sequence[Record], prefix: str, *, on_step: bool
) -> list[str]:
    """Log an evaluation's records, one per dataloader; the keys of the scores and their means, for the charts.

    Args:
        trainer: that the module is in.
        pl_module: whose `log` makes them known to all loggers, and to callbacks that monitor.
        records: of the same evaluation.
        prefix: of the keys.
        on_step: within a training epoch, at once, whatever `log_every_n_steps` is.
    """
    values: dict[str, float] = {}
    ends: dict[
        str, float
    ] = {}  # of intervals: for loggers alone, since a progress bar and a table of results have enough
    charted: list[str] = []
    for record in records:
        suffix = f"/dataloader_idx_{record['dataloader']}" if len(records) > 1 else ""
        named = {**record["scores"], "mean": mean_score(record["scores"])}
        charted += [f"{prefix}/{name}{suffix}" for name in named]
        values.update({f"{prefix}/{name}{suffix}": value for name, value in named.items()})
        values[f"{prefix}/num_samples{suffix}"] = record["n"]
        for key in LOGGED_BESIDE:
            of_layers: dict[str, float] = record.get(key, {})  # type: ignore[assignment]
            ends.update({f"{prefix}_{key}/{name}{suffix}": value for name, value in of_layers.items()})
    if trainer.barebones:  # which logs nothing, and warns of each attempt
        return charted
    # All ranks have the same values already, so there is nothing to synchronise.
    for key, value in values.items():
        note_same_on_all_ranks(key)
        pl_module.log(
            key,
            torch.tensor(value, dtype=torch.float32, device=pl_module.device),
            prog_bar=f"{key}/".startswith(f"{prefix}/mean/"),
            on_step=on_step,
            on_epoch=not on_step,
            logger=False if on_step else None,
            add_dataloader_idx=False,
            batch_size=1,
            rank_zero_only=False,
        )
    at_once = {**values, **ends} if on_step else ends
    for logger in trainer.loggers if at_once else ():
        logger.log_metrics(at_once, step=logging_step(trainer))
    return charted


class LoggedFigures:
    """Gives heatmap and curves, and once per run the charts of layers, to the loggers that can show them.

    Within `fit` pictures are drawn as often as takes at most a hundredth of the time: at the first evaluation, later
    ones as time allows, and the last.

    Attributes:
        step: that the loggers have for the last evaluation; None before the first.
    """

    def __init__(self, prefix: str, thresholds: tuple[float, float]) -> None:
        self._prefix, self._thresholds = prefix, thresholds
        self.step: int | None = None
        self.restart()

    def restart(self) -> None:
        """A new `fit` begins."""
        self._start, self._spent = time.monotonic(), 0.0
        self._waiting = False  # for what has not been drawn

    def update(self, trainer: pl.Trainer, history: Sequence[Record], keys: list[str]) -> None:
        """Draw the history, now or later; `keys` are those of the scalars."""
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                log_charts(logger, self._prefix, keys)
        # The step that Lightning gives the scalars of this evaluation, so that both align.
        self._waiting, self.step = True, logging_step(trainer)
        if trainer.state.fn != "fit" or self._spent <= _DRAWING_SHARE * (time.monotonic() - self._start):
            self.finish(trainer, history)

    def finish(self, trainer: pl.Trainer, history: Sequence[Record]) -> None:
        """Draw what has been left for later."""
        if not self._waiting or self.step is None or not trainer.is_global_zero:
            return
        start = time.monotonic()
        self._waiting = False
        _draw(trainer, history, self._prefix, self._thresholds, self.step)
        self._spent += time.monotonic() - start


def _draw(
    trainer: pl.Trainer, history: Sequence[Record], prefix: str, thresholds: tuple[float, float], step: int
) -> None:
    loggers = [logger for logger in trainer.loggers if takes_images(logger)]
    if not loggers:  # which have the scalars
        return
    figures = {"heatmap": heatmap(history, thresholds), "curves": curves(history)}
    images = {f"{prefix}/{name}": plots.figure_pixels(figure, dpi=_LOGGED_DPI) for name, figure in figures.items()}
    for logger in loggers:
        log_images(logger, images, step)


def write_report(folder: str | os.PathLike[str], history: Sequence[Record], thresholds: tuple[float, float]) -> None:
    """Write `cka_history.json`, `cka_history.csv` (a row per record and layer), `cka_heatmap.png` and `cka_curves.png`,
    each whole or not at all.

    Raises:
        ValueError: if nothing has been tracked.
    """
    if not history:
        raise ValueError("Expected a tracked validation or test to report, but there has been none.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # NaN is no JSON: undefined scores are null there.
    cleaned = [
        {**record, "scores": {name: None if cka != cka else cka for name, cka in record["scores"].items()}}
        for record in history
    ]
    write_bytes(folder / "cka_history.json", json.dumps(cleaned, indent=2).encode())
    rows = io.StringIO()
    writer = csv.writer(rows)
    about = ("step", "epoch", "stage", "dataloader", "n")
    beside = (*BOUNDS, "rank") if any("rank" in record for record in history) else BOUNDS
    writer.writerow([*about, "layer", "cka", "verdict", *beside])
    for record in history:
        of_layers: Any = record
        for name, cka in record["scores"].items():
            bounds = [of_layers.get(key, {}).get(name) for key in beside]
            writer.writerow([*(of_layers[key] for key in about), name, cka, verdict(cka, thresholds), *bounds])
    write_bytes(folder / "cka_history.csv", rows.getvalue().encode())
    plots.save_figure(heatmap(history, thresholds), folder / "cka_heatmap.png")
    plots.save_figure(curves(history), folder / "cka_curves.png")


def leave_report(
    folder: Path | None,
    history: Sequence[Record],
    thresholds: tuple[float, float],
    console: Console,
    loggers: Sequence[Logger],
    prefix: str,
) -> None:
    """Write the report to the folder of a run that has ended well, say where, and give it to loggers that keep files.

    Args:
        folder: of the run and this callback; None where the run has none, as with a server of MLflow's.
        history: to report.
        thresholds: of the verdicts.
        console: where to say it.
        loggers: of the run.
        prefix: of the logged keys, which the files have with those loggers, too.
    """
    if folder is None and not any(map(takes_files, loggers)):
        return
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary) if folder is None else folder
        try:
            write_report(place, history, thresholds)
        except OSError as error:  # a warning, and no end of a training that went well
            warn(f"The report on CKA could not be written to {str(place)!r}: {error}.")
            return
        if folder is not None:
            shown = folder / "cka_heatmap.png"
            console.print(f"CKA of each layer over time: {shown}", soft_wrap=True, markup=False)
        log_files(loggers, place, prefix)
