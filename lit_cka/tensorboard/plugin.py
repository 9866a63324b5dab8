"""TensorBoard's side of the tab: `CKAPlugin`, named by the entry point group `tensorboard_plugins`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import Any

from tensorboard import plugin_util
from tensorboard.backend import http_util
from tensorboard.data.provider import RunTagFilter
from tensorboard.plugins import base_plugin
from werkzeug import wrappers

from lit_cka.tensorboard.layer_texts import last_changes, read_events
from lit_cka.tensorboard.series import Series, find_series, table
from lit_cka.tracking.layer_events import spans_of_layers

_SCALARS, _LAYOUTS, _LAYOUT = "scalars", "custom_scalars", "custom_scalars__config__"
_POINTS = 1000  # of each scalar: what TensorBoard itself keeps
_SCRIPTS = (
    ("lit_cka.plots", "dom.js"),
    ("lit_cka.plots", "canvas.js"),
    ("lit_cka.tensorboard", "scales.js"),
    ("lit_cka.tensorboard", "changes.js"),
    ("lit_cka.tensorboard", "charts.js"),
    ("lit_cka.tensorboard", "layer_time.js"),
    ("lit_cka.tensorboard", "state.js"),
    ("lit_cka.tensorboard", "tab.js"),
)
Answer = Callable[[wrappers.Request], wrappers.Response]


class CKAPlugin(base_plugin.TBPlugin):  # type: ignore[misc]  # it has no types
    """Shows the CKA of every layer over time, of all runs that have logged it.

    Args:
        context: TensorBoard's.
    """

    plugin_name = "cka"

    def __init__(self, context: base_plugin.TBContext) -> None:
        self._provider: Any = context.data_provider

    def get_plugin_apps(self) -> dict[str, Any]:
        """Returns what answers below `data/plugin/cka`."""
        answers: dict[str, Answer] = {
            "/index.js": _script,
            "/tab.css": _style,
            "/runs": self._runs,
            "/scores": self._scores,
            "/scalar": self._scalar,
        }
        return {path: wrappers.Request.application(answer) for path, answer in answers.items()}

    def is_active(self) -> bool:
        """Always: where nothing is logged, the tab says how to get something."""
        return True

    def frontend_metadata(self) -> base_plugin.FrontendMetadata:
        """Returns how the tab is called, and what it loads."""
        return base_plugin.FrontendMetadata(es_module_path="/index.js", tab_name="CKA")

    def data_plugin_names(self) -> tuple[str, ...]:
        """Returns whose data the tab shows."""
        return (_SCALARS,)

    def _runs(self, request: wrappers.Request) -> wrappers.Response:
        context, experiment = _of(request)
        scalars = self._provider.list_scalars(context, experiment_id=experiment, plugin_name=_SCALARS)
        order = self._order(context, experiment)
        changed = last_changes(self._provider, context, experiment)
        runs = []
        for run, tags in sorted(scalars.items()):
            found = self._series(context, experiment, run, tags, order.get(run, []))
            of_cka = {tag for series in found for tag in series.tags}
            others = [tag for tag in sorted(tags) if tag not in of_cka and not tag.endswith("/num_samples")]
            last = max((tags[tag].max_step for series in found for tag in series.tags), default=0)
            names = [series.name for series in found]
            runs.append(
                {"name": run, "series": names, "scalars": others, "last": last, "changed": changed.get(run, 0.0)}
            )
        return _json(request, {"runs": runs})

    def _scores(self, request: wrappers.Request) -> wrappers.Response:
        context, experiment = _of(request)
        run, name = request.args.get("run", ""), request.args.get("series", "")
        listed = self._provider.list_scalars(
            context, experiment_id=experiment, plugin_name=_SCALARS, run_tag_filter=RunTagFilter(runs=[run])
        )
        tags = listed.get(run, {})
        order = self._order(context, experiment).get(run, [])
        found = [each for each in self._series(context, experiment, run, tags, order) if each.name == name]
        if not found:
            return _json(request, {"error": f"There is no series {name!r} in the run {run!r} any more."}, 404)
        values = self._values(context, experiment, run, found[0].tags)
        spans = spans_of_layers(found[0].layers, read_events(self._provider, context, experiment, run))
        return _json(request, {"run": run, **table(found[0], values), "spans": spans})

    def _scalar(self, request: wrappers.Request) -> wrappers.Response:
        context, experiment = _of(request)
        run, tag = request.args.get("run", ""), request.args.get("tag", "")
        values = self._values(context, experiment, run, [tag]).get(tag, {})
        steps = sorted(values)
        finite = [values[step] if abs(values[step]) < float("inf") else None for step in steps]
        return _json(request, {"run": run, "tag": tag, "steps": steps, "values": finite})

    def _series(
        self, context: Any, experiment: str, run: str, tags: Mapping[str, Any], order: list[str]
    ) -> list[Series]:
        if not any(tag.endswith("/mean") or "/mean/dataloader_idx_" in tag for tag in tags):
            return []
        read = self._provider.read_last_scalars(
            context, experiment_id=experiment, plugin_name=_SCALARS, run_tag_filter=RunTagFilter(runs=[run])
        )
        last = {tag: float(datum.value) for tag, datum in read.get(run, {}).items() if datum is not None}
        return find_series(list(tags), order, last)

    def _values(self, context: Any, experiment: str, run: str, tags: list[str]) -> dict[str, dict[int, float]]:
        """Returns values by tag and step; of a step that comes twice, as after a restart, the later one."""
        read = self._provider.read_scalars(
            context,
            experiment_id=experiment,
            plugin_name=_SCALARS,
            downsample=_POINTS,
            run_tag_filter=RunTagFilter(runs=[run], tags=tags),
        )
        return {tag: {datum.step: float(datum.value) for datum in data} for tag, data in read.get(run, {}).items()}

    def _order(self, context: Any, experiment: str) -> dict[str, list[str]]:
        """Returns, by run, tags in the order of the charts that the callback has logged, which is that of depth."""
        from tensorboard.plugins.custom_scalar import layout_pb2

        read = self._provider.read_tensors(
            context,
            experiment_id=experiment,
            plugin_name=_LAYOUTS,
            downsample=1,
            run_tag_filter=RunTagFilter(tags=[_LAYOUT]),
        )
        order: dict[str, list[str]] = {}
        for run, tags in read.items():
            for datum in tags.get(_LAYOUT, []):
                try:
                    layout = layout_pb2.Layout.FromString(datum.numpy.item())
                except (ValueError, TypeError, AttributeError):
                    continue
                except Exception:  # of protobuf, which has no common class for what it can't read
                    continue
                patterns = [
                    tag for category in layout.category for chart in category.chart for tag in chart.multiline.tag
                ]
                order[run] = [re.sub(r"\\(.)", r"\1", each.removeprefix("^").removesuffix("$")) for each in patterns]
        return order


def _of(request: wrappers.Request) -> tuple[Any, str]:
    return plugin_util.context(request.environ), plugin_util.experiment_id(request.environ)


def _json(request: wrappers.Request, content: Any, code: int = 200) -> wrappers.Response:
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    return _respond(request, text, "application/json", code)


def _respond(request: wrappers.Request, text: str, kind: str, code: int = 200) -> wrappers.Response:
    response: wrappers.Response = http_util.Respond(request, text, kind, code=code)
    return response


def _script(request: wrappers.Request) -> wrappers.Response:
    """One module of the scripts that the pages share and the tab's own."""
    parts = [files(package).joinpath("assets", name).read_text("utf-8") for package, name in _SCRIPTS]
    return _respond(request, "\n".join(parts), "application/javascript")


def _style(request: wrappers.Request) -> wrappers.Response:
    style = files("lit_cka.tensorboard").joinpath("assets", "tab.css").read_text("utf-8")
    return _respond(request, style, "text/css")
