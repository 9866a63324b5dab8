"""The table that a tracked training ends with: `print_table`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lit_cka import plots
from lit_cka.files import visible
from lit_cka.tracking.history import Record, change_mark, first_series, is_doubtful, verdict

_STYLES = {"untouched": "green", "refined": "yellow", "rewritten": "red", "undefined": "magenta"}


def print_table(
    history: Sequence[Record],
    thresholds: tuple[float, float],
    console: Console | None = None,
    *,
    reference: str = "",
    prefix: str = "",
    logged_step: int | None = None,
) -> None:
    """Print a table of layers, without what all their names begin with: first, lowest and last CKA, with a verdict on
    the last.

    Args:
        history: its `first_series` is shown.
        thresholds: of the verdicts.
        console: where to print; None for the standard output.
        reference: a few words on how it came to be.
        prefix: that the scores are logged under.
        logged_step: that loggers have for the last evaluation, said where it is another: the table has the number of
            optimizer steps taken, as `trainer.global_step` and checkpoints do.
    """
    records = first_series(history)
    if not records:
        return
    last = records[-1]
    names = list(last["scores"])
    short_names = plots.short_names(names, max(map(len, names))) if len(names) > 1 else names
    short = dict(zip(names, short_names, strict=True))
    common = names[0].removesuffix(short[names[0]]) if names else ""
    table = Table(
        title=f"CKA with the reference, n = {last['n']} samples",
        caption=Text(
            f"untouched >= {thresholds[0]:g} > refined >= {thresholds[1]:g} > rewritten"
            + _words_on_marks(last, thresholds)
            + (f"\nreference: {reference}" if reference else "")
            + (f"\nlogged as {visible(prefix)}/{visible(common)}<layer>" if prefix else "")
            + _counting(last["step"], logged_step),
            style="table.caption",
        ),
    )
    table.add_column("layer", overflow="fold")
    columns = [f"step {records[0]['step']}", "lowest"] if len(records) > 1 else []
    for column in (*columns, f"step {last['step']}"):
        table.add_column(column, justify="right", no_wrap=True)
    has_intervals, has_changes = bool(last.get("low")), bool(last.get("change_low"))
    if has_intervals:
        table.add_column("95 % interval", justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for name, cka in last["scores"].items():
        word = verdict(cka, thresholds)
        series = [record["scores"].get(name, np.nan) for record in records]
        lowest = min((value for value in series if value == value), default=np.nan)
        cells = [f"{value:.4f}" for value in ([series[0], lowest, cka] if columns else [cka])]
        cells[-1] += f" {change_mark(last, name) or ' '}" if has_changes else ""
        cells += [_interval(last, name)] if has_intervals else []
        doubt = " ?" if is_doubtful(last, name, thresholds) else ""
        table.add_row(Text(visible(short[name])), *cells, Text(word + doubt, _STYLES[word]))
    (console or Console()).print(table)


def _counting(step: int, logged_step: int | None) -> str:
    """Returns a line on how loggers count steps, where they have another number for the same moment."""
    if logged_step is None or logged_step == step:
        return ""
    return f"\nstep {step} is {logged_step} in loggers, which count from 0"


def _words_on_marks(record: Record, thresholds: tuple[float, float]) -> str:
    """Returns what the marks in the table mean, of those that are in it."""
    text = ""
    if record.get("change_low"):
        text += "\n\u2191 \u2193 changed since the last evaluation, = not told from chance"
    if any(is_doubtful(record, name, thresholds) for name in record["scores"]):
        text += "\n? too few samples for this verdict: the interval has another one too"
    return text


def _interval(record: Record, name: str) -> str:
    if name not in record.get("low", {}):
        return ""
    return f"{record['low'][name]:.4f}-{record['high'][name]:.4f}"
