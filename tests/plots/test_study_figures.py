"""Figures of a study: what is drawn is what was given, where it was given."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex

from lit_cka import plots
from lit_cka.plots.canvas import OKABE_ITO

NAMES = ["better", "worse", "chance", "alone", "nothing"]
ROWS = [(2.0, 1.0, 3.0), (-2.0, -3.0, -1.0), (0.5, -1.0, 2.0), (1.5, math.nan, math.nan), None]


def test_intervals_are_coloured_by_the_side_that_they_are_on(tmp_path: Path) -> None:
    figure, (first, second) = plots.interval_panels(
        NAMES, {"one": ROWS, "two": ROWS[::-1]}, title="Gains", xlabel="pts"
    )
    bars = {line.get_ydata()[0]: line for line in first.lines[1:] if len(line.get_xdata()) == 2}
    assert {place: list(bar.get_xdata()) for place, bar in bars.items()} == {0: [1, 3], 1: [-3, -1], 2: [-1, 2]}
    colors = [to_hex(bars[place].get_color()) for place in range(3)]
    assert colors == [OKABE_ITO["blue"].lower(), OKABE_ITO["vermilion"].lower(), to_hex("0.45")]
    dots = [line for line in first.lines[1:] if len(line.get_xdata()) == 1]
    assert [(dot.get_xdata()[0], dot.get_ydata()[0]) for dot in dots] == [(2, 0), (-2, 1), (0.5, 2), (1.5, 3)]
    assert [label.get_text() for label in first.get_yticklabels()] == NAMES
    assert first.get_ylim() == second.get_ylim() == (4.5, -0.5)  # the first on top
    plots.save_figure(figure, tmp_path / "a.png")
    with pytest.raises(ValueError, match="Expected 5 rows in the panel 'one', but got 4"):
        plots.interval_panels(NAMES, {"one": ROWS[:4]})


def test_every_checkpoint_is_a_dot_and_their_mean_a_bar() -> None:
    values = [[1.0, 2.0, 6.0], [-1.0, -1.0, -1.0]]
    _, ax = plots.by_checkpoint(NAMES[:2], values, title="By checkpoint")
    for place, (dots, row) in enumerate(zip(ax.collections, values, strict=True)):
        offsets = np.asarray(dots.get_offsets())
        np.testing.assert_allclose(offsets[:, 0], row)
        assert (abs(offsets[:, 1] - place) < 0.3).all()
        assert len(set(offsets[:, 1])) == 3  # those with the same value are seen as well
    assert [line.get_xdata()[0] for line in ax.lines[1:]] == [3.0, -1.0]


def test_the_front_is_ringed_and_names_of_ones_own_differ() -> None:
    points = {"finetuned": (0.9, 0.6), "mine": (0.8, 0.7), "yours": (0.85, 0.65)}
    _, ax = plots.accuracy_plane(points, front=[(0.9, 0.6), (0.8, 0.7)])
    rings = [each for each in ax.collections if len(each.get_offsets()) and not each.get_facecolor().size]
    np.testing.assert_allclose(np.asarray(rings[0].get_offsets()), [(0.9, 0.6), (0.8, 0.7)])
    handles, labels = ax.get_legend_handles_labels()
    assert labels == ["finetuned", "mine", "yours", "on the front"]
    mine, yours = handles[1:3]
    assert to_hex(mine.get_facecolor()[0]) != to_hex(yours.get_facecolor()[0])
    assert not np.array_equal(mine.get_paths()[0].vertices, yours.get_paths()[0].vertices)
    _, ax = plots.accuracy_plane(points)
    assert ax.get_legend_handles_labels()[1] == ["finetuned", "mine", "yours"]
