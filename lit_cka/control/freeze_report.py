"""What `FreezeConverged` tells of what it did: its events, scalars for the loggers, and a table at the end."""

from __future__ import annotations

from collections.abc import Sequence

import lightning.pytorch as pl
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lit_cka.control.freeze_decision import FreezeEvent
from lit_cka.control.plan import FreezePlan
from lit_cka.control.savings import Savings
from lit_cka.features.lightning_private import note_same_on_all_ranks
from lit_cka.files import visible
from lit_cka.tracking.layer_events import LayerEvent, LayerEvents, What

_WIDTH = 72  # has room for the lines of the caption


def log_scalars(pl_module: pl.LightningModule, values: dict[str, float]) -> None:
    """Log values that all ranks have, at the end of a validation."""
    for key, value in values.items():
        note_same_on_all_ranks(key)
        pl_module.log(
            key,
            torch.tensor(value, dtype=torch.float32, device=pl_module.device),
            on_step=False,
            on_epoch=True,
            add_dataloader_idx=False,
            batch_size=1,
            rank_zero_only=False,
        )


def layer_events(history: Sequence[FreezeEvent], groups: tuple[tuple[str, ...], ...]) -> LayerEvents:
    """Returns what froze when, for the loggers.

    Args:
        history: the events, oldest first.
        groups: by block, the layers that are frozen with it.
    """
    events = []
    before = 0
    for event in history:
        what: What = "frozen" if event["num_frozen"] > before else "trained"
        changed = range(*sorted((before, event["num_frozen"])))
        events.append(LayerEvent(event.get("logged_step", event["step"]), what, tuple(changed), event["why"]))
        before = event["num_frozen"]
    return LayerEvents(groups, tuple(events))


def print_events(
    history: Sequence[FreezeEvent], plan: FreezePlan, savings: Savings, num_cached: int, console: Console | None = None
) -> None:
    """Print what froze when, and what that saved.

    Args:
        history: the events, oldest first.
        plan: what is frozen with each block.
        savings: what was counted.
        num_cached: the number of samples whose activations are kept.
        console: where to print; None for the standard output.
    """
    table = Table(
        title=f"Frozen blocks, of {len(plan.parts)}",
        caption=Text(_caption(plan, savings, num_cached), style="table.caption"),
        min_width=_WIDTH,
    )
    for column in ("step", "epoch", "frozen"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("blocks", overflow="fold")
    table.add_column("why")
    for event in history:
        names = event["blocks"]
        shown = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
        table.add_row(
            str(event["step"]), str(event["epoch"]), str(event["num_frozen"]), Text(visible(shown)), event["why"]
        )
    if not history:
        table.add_row("", "", "0", Text("none has converged"), "")
    (console or Console()).print(table)


def _caption(plan: FreezePlan, savings: Savings, num_cached: int) -> str:
    taken, full = savings.flops(plan)
    text = f"FLOPs of the steps: {taken:.3g} of {full:.3g}, {100 * savings.share_of_flops(plan):.1f} % saved"
    seconds, whole = savings.seconds()
    if whole == whole and seconds:
        text += f"\nseconds of the steps: {seconds:.3g} of {whole:.3g}, {100 * (1 - seconds / whole):.1f} % saved"
    return text + (f"\nactivations kept of {num_cached} samples" if num_cached else "")
