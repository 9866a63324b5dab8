"""Arrays in, figures and self-contained HTML out: functions return `(figure, axes)`, and load matplotlib when called.

Nothing is computed here, and no file is written but by `save_figure`.
"""

from lit_cka.plots.canvas import figure_pixels, save_figure, short_names
from lit_cka.plots.editing import accuracy_plane, lambda_figure
from lit_cka.plots.heatmap import heatmap
from lit_cka.plots.layer_time import layer_time_heatmap
from lit_cka.plots.side_by_side import side_by_side
from lit_cka.plots.study import by_checkpoint, interval_panels
from lit_cka.plots.trend import epoch_trend, layer_trend, probe_figure
from lit_cka.plots.updates import spectra_by_depth, updates_by_layer

__all__ = [
    "accuracy_plane", "by_checkpoint", "epoch_trend", "figure_pixels", "heatmap", "interval_panels", "lambda_figure",
    "layer_time_heatmap", "layer_trend", "probe_figure", "save_figure", "short_names", "side_by_side",
    "spectra_by_depth", "updates_by_layer",
]  # fmt: skip
