"""What a tracked training leaves to look at: scalars and pictures in the loggers, and files."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np
import torch
from rich.console import Console

from lit_cka import plots
from lit_cka.features.lightning_private import logging_step, note_same_on_all_ranks
from lit_cka.files import write_bytes
from lit_cka.parallel.warning import warn
from lit_cka.tracking.history import BOUNDS, Record, first_series, mean_score, verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DRAWING_SHARE = 0.01


def heatmap(history: Sequence[Record]) -> Figure:
    """The layers-by-time heatmap of `first_series`."""
    records = first_series(history)
    layer_names = list(records[-1]["scores"])
    values = np.array([[record["scores"].get(name, np.nan) for record in records] for name in layer_names])
    times = [str(record["step"]) for record in records]
    return plots.layer_time_heatmap(values, layer_names, times, title="CKA of each layer", xlabel="optimizer step")[0]


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
    times = [record["step"] for record in records]
    return plots.epoch_trend(
        values, layer_names, times, bands=(bands[0], bands[1]), title=title, ylabel="CKA, 95 % intervals", limits=None
    )[0]


def log_records(
    trainer: pl.Trainer, pl_module: pl.LightningModule, records: Sequence[Record], prefix: str, *, on_step: bool
) -> list[str]:
    """Log an evaluation's records, one per dataloader; the keys of the scores and their means, for the chart.

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
        for end, bounds in (("low", record.get("low", {})), ("high", record.get("high", {}))):
            ends.update({f"{prefix}_{end}/{name}{suffix}": value for name, value in bounds.items()})
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
    """Gives the heatmap, and once per run the chart of all layers, to the loggers that can show them.

    Within `fit` the heatmap is drawn as often as takes at most a hundredth of the time: at the first evaluation, later
    ones as time allows, and the last.
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self.restart()

    def restart(self) -> None:
        """A new `fit` begins."""
        self._start, self._spent = time.monotonic(), 0.0
        self._waiting: tuple[list[str], int] | None = None  # keys and step of what has not been drawn

    def update(self, trainer: pl.Trainer, history: Sequence[Record], keys: list[str]) -> None:
        """Draw the history, now or later; `keys` are those of the scalars."""
        # The step that Lightning gives the scalars of this evaluation, so that both align.
        self._waiting = (keys, logging_step(trainer))
        if trainer.state.fn != "fit" or self._spent <= _DRAWING_SHARE * (time.monotonic() - self._start):
            self.finish(trainer, history)

    def finish(self, trainer: pl.Trainer, history: Sequence[Record]) -> None:
        """Draw what has been left for later."""
        if self._waiting is None or not trainer.is_global_zero:
            return
        start = time.monotonic()
        (keys, step), self._waiting = self._waiting, None
        _draw(trainer, history, self._prefix, keys, step)
        self._spent += time.monotonic() - start


def _draw(trainer: pl.Trainer, history: Sequence[Record], prefix: str, keys: list[str], step: int) -> None:
    pixels = None
    for logger in trainer.loggers:
        # By what they can do: TensorBoard's writer, and W&B's logger. Others have the scalars.
        writer: Any = getattr(logger, "experiment", None)
        takes_charts, takes_images = hasattr(writer, "add_custom_scalars"), hasattr(writer, "add_image")
        if not (takes_images or hasattr(logger, "log_image")):
            continue
        if pixels is None:
            pixels = plots.figure_pixels(heatmap(history))
        if takes_charts:
            _add_chart(writer, prefix, keys)
        if takes_images:
            writer.add_image(f"{prefix}/heatmap", pixels, step, dataformats="HWC")
        else:
            logger.log_image(  # type: ignore[attr-defined]  # W&B's own
                key=f"{prefix}/heatmap", images=[pixels]
            )


def _add_chart(writer: Any, prefix: str, keys: Sequence[str]) -> None:
    """Put the chart of all layers into TensorBoard's layout, of which the last one written replaces all earlier."""
    layout = vars(writer).setdefault("_lit_cka_layout", {})
    if prefix not in layout:
        # Tags are regular expressions there, matched as prefixes: unanchored, blocks.1 would show blocks.10 too.
        layout[prefix] = {f"{prefix} of all layers": ["Multiline", [f"^{re.escape(key)}$" for key in keys]]}
        writer.add_custom_scalars(layout)


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
    writer.writerow([*about, "layer", "cka", "verdict", *BOUNDS])
    for record in history:
        of_layers: Any = record
        for name, cka in record["scores"].items():
            bounds = [of_layers.get(key, {}).get(name) for key in BOUNDS]
            writer.writerow([*(of_layers[key] for key in about), name, cka, verdict(cka, thresholds), *bounds])
    write_bytes(folder / "cka_history.csv", rows.getvalue().encode())
    plots.save_figure(heatmap(history), folder / "cka_heatmap.png")
    plots.save_figure(curves(history), folder / "cka_curves.png")


def leave_report(
    folder: str | os.PathLike[str], history: Sequence[Record], thresholds: tuple[float, float], console: Console
) -> None:
    """Write the report to the folder of a run that has ended well, and say where; that it can't is a warning."""
    try:
        write_report(folder, history, thresholds)
    except OSError as error:
        warn(f"The report on CKA could not be written to {str(folder)!r}: {error}.")
        return
    console.print(f"CKA of each layer over time: {Path(folder) / 'cka_heatmap.png'}", soft_wrap=True, markup=False)
