"""A study as a table: its columns, each with a sentence on what it is, and its rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lit_cka.plots.table_page import Cell, Column
from lit_cka.study.statistics import Effect, Interval
from lit_cka.study.summary import Row

POINTS = 100.0  # percentage points in a share
VERDICT = (
    "more than shrinkage: better on the shifted sets than the shrinkage of the same size (p, Holm, below 0.05) and no "
    "worse in-distribution (p of its own not below 0.05); less: the other way round; trades otherwise: better on one "
    "side "
    "and worse on the other, as a stronger or a weaker shrinkage is; not told: the difference may be chance; is a "
    "shrinkage: scales each weight's update and does no more; enlarges the update: what stands beside it is no "
    "shrinkage."
)
NULL = (
    "Percentage points above the null, shrink(...): each weight's update scaled to the size that the edit leaves it. "
    "Above "
    "0, the edit does more than make the update smaller."
)
_MINUS = "\N{MINUS SIGN}"


def study_columns(first: str, shifted: Sequence[str], num_checkpoints: int) -> list[Column]:
    """Returns the columns of the page.

    Args:
        first: the name of the test set that is in-distribution.
        shifted: the names of the others.
        num_checkpoints: on how many fine-tuned models the means rest.
    """
    others, means = ", ".join(shifted), f"mean over {num_checkpoints} fine-tuned models"
    both = "for other models and other samples: where it holds 0, the difference may be chance"
    gain = "Percentage points above the fine-tuned model, paired sample by sample; larger is better"
    of_gain = "Of the gain on the shifted sets, 95 %"
    sentences = {
        "edit": "What was done to the fine-tuned weights.",
        "verdict": VERDICT,
        "in-distribution": f"Right answers on {first} in percent, {means}; more is better.",
        "shifted": f"Right answers in percent, the mean over {others}, {means}; more is better.",
        "gain in-distribution": f"{gain}. On {first}.",
        "its interval": f"95 % interval of the gain in-distribution, {both}.",
        "gain shifted": f"{gain}. Mean over {others}.",
        "interval (shifted)": f"{of_gain}, {both}.",
        "for other samples": f"{of_gain} for other samples and these models: what more test samples would narrow.",
        "for other models": f"{of_gain} for other models and these samples: what more checkpoints would narrow.",
        "wins": "Fine-tuned models, of all, that the edit makes better on the shifted sets; and ties.",
        "above shrinkage": f"{NULL} On the shifted sets.",
        "interval (above)": f"95 % interval of that, {both}; not corrected for the number of edits.",
        "p, "
        "Holm": "Probability of as large a difference from shrinkage if there were none, corrected for the number of "
        "edits (Holm 1979); small where there is one.",
        "above shrinkage, in-distribution": f"{NULL} On {first}.",
        "front": "Whether no other row is better on one side and as good on the other (Pareto).",
        "update kept": "Norm of the edited update over that of the fine-tuned one, in percent, median over models: 100 "
        "leaves its size, 0 is the pretrained model.",
        "seconds": "That the edit of one model takes, median over models, on the machine of the study; less is better.",
        "MiB": "Memory that the edit of one model takes at its peak above what is there before, the edited weights "
        "included, median over models; less is better.",
    }
    words = {"edit", "verdict", "its interval", "interval (shifted)", "for other samples", "for other models", "wins"}
    words |= {"interval (above)", "front"}
    return [
        Column(name, said, numeric=name not in words, choices=name in ("verdict", "front"))
        for name, said in sentences.items()
    ]


def study_cells(row: Row, num_checkpoints: int) -> list[Cell]:
    """Returns a cell for each of `study_columns`."""
    gain, beyond = row.gain_shifted, row.beyond_shifted
    is_reference = row.label == "finetuned"
    wins = f"{gain.wins} of {num_checkpoints}" + (f", {gain.ties} tied" if gain.ties else "")
    return [
        row.label,
        row.verdict or None,
        POINTS * row.in_distribution,
        POINTS * row.shifted,
        None if is_reference else POINTS * row.gain_in_distribution.mean,
        None if is_reference else shown_interval(row.gain_in_distribution.over_both),
        None if is_reference else POINTS * gain.mean,
        None if is_reference else shown_interval(gain.over_both),
        None if is_reference else shown_interval(gain.over_samples),
        None if is_reference else shown_interval(gain.over_models),
        None if is_reference else wins,
        None if beyond is None else POINTS * beyond.mean,
        None if beyond is None else shown_interval(beyond.over_both),
        None if beyond is None else row.p_adjusted,
        None if row.beyond_in_distribution is None else POINTS * row.beyond_in_distribution.mean,
        "yes" if row.on_front else "no",
        None if row.kept is None else POINTS * row.kept,
        row.seconds,
        row.mebibytes,
    ]


def shown_interval(interval: Interval) -> str | None:
    """Returns an interval in percentage points; None where there is none.

    Example:
        >>> shown_interval((0.0123, 0.02))
        '1.2 to 2.0'
    """
    if interval[0] != interval[0]:
        return None
    return " to ".join(f"{POINTS * end:.1f}".replace("-", _MINUS) for end in interval)


def record(row: Row) -> dict[str, Any]:
    """Returns a row as it goes into JSON: shares in [0, 1], not percent."""
    effects = ("gain_in_distribution", "gain_shifted", "beyond_in_distribution", "beyond_shifted")
    return {key: _effect(value) if key in effects else value for key, value in vars(row).items()}


def flat_record(row: Row) -> dict[str, Any]:
    """Returns a row as it goes into CSV, with a column for each end of an interval."""
    found: dict[str, Any] = {}
    for key, value in record(row).items():
        if not isinstance(value, dict):
            found[key] = value
            continue
        for name, number in value.items():
            if name.startswith("over_"):
                found[f"{key}_{name}_low"], found[f"{key}_{name}_high"] = number
            elif name != "by_model":
                found[f"{key}_{name}"] = number
    return found


def _effect(effect: Effect | None) -> dict[str, Any] | None:
    return None if effect is None else {**effect._asdict(), "wins": effect.wins, "ties": effect.ties}
