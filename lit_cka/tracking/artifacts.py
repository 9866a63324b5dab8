"""Loggers that keep files and pictures: what a tracked training gives them, by what they can do.

Their libraries are never imported: a logger is asked for the methods that Lightning's own classes have, `log_image` of
`WandbLogger` and `experiment.log_artifact` of `MLFlowLogger`, so that one derived from them is served as well.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import Logger
from numpy.typing import NDArray

from lit_cka.parallel.warning import warn


def takes_images(logger: Logger) -> bool:
    """Whether the logger shows pictures: TensorBoard's writer does, and W&B's logger."""
    return hasattr(logger, "log_image") or hasattr(getattr(logger, "experiment", None), "add_image")


def takes_files(logger: Logger) -> bool:
    """Whether the logger keeps files with a run: MLflow's client does."""
    return hasattr(logger, "run_id") and hasattr(getattr(logger, "experiment", None), "log_artifact")


def log_images(logger: Any, images: Mapping[str, NDArray[np.uint8]], step: int) -> None:
    """Give pictures (height, width, 3) to a logger that `takes_images`, by their keys."""
    for key, pixels in images.items():
        if hasattr(logger, "log_image"):
            logger.log_image(key=key, images=[pixels])  # at the step of the scalars that W&B has last
        else:
            logger.experiment.add_image(key, pixels, step, dataformats="HWC")


def log_charts(logger: Logger, prefix: str, keys: Sequence[str]) -> None:
    """Put a chart of each layer, in the order of depth, into the layout of TensorBoard's custom scalars, once per run.

    A chart each: in one for all, TensorBoard gives all layers of a run one colour. The last layout that a run has
    written replaces all earlier, so those of other prefixes stay in it.
    """
    writer: Any = getattr(logger, "experiment", None)
    if not hasattr(writer, "add_custom_scalars"):
        return
    layout = vars(writer).setdefault("_lit_cka_layout", {})
    if prefix not in layout:
        # Tags are regular expressions there, matched as prefixes: unanchored, blocks.1 would show blocks.10 too.
        charts = {key.removeprefix(f"{prefix}/"): ["Multiline", [f"^{re.escape(key)}$"]] for key in keys}
        layout[prefix] = charts
        writer.add_custom_scalars(layout)


def log_files(loggers: Sequence[Logger], folder: Path, artifact_path: str) -> None:
    """Give all files of a folder to the loggers that keep files; that one can't is a warning, and no end of a run."""
    for logger in loggers:
        if not takes_files(logger):
            continue
        experiment, run_id = logger.experiment, logger.run_id  # type: ignore[attr-defined]
        try:
            for path in sorted(folder.iterdir()):
                experiment.log_artifact(run_id, str(path), artifact_path)
        except Exception as error:  # of MLflow's client, its server or the network: each has its own
            warn(f"The report on CKA could not be given to {type(logger).__name__}: {error}.")
