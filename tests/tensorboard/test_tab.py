"""The tab in a real TensorBoard: what it answers, and what a reader sees of it in Chromium."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.tensorboard import SummaryWriter

from lit_cka import CKACallback, FreezeConverged
from lit_cka.tracking.layer_events import LayerEvent, LayerEvents, to_text
from tests.browser import CHROMIUM, Page, browser_page
from tests.control.helpers import Adam, freezing, train_data
from tests.tracking.helpers import loader, trainer

in_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
LAYERS = [f"model.blocks.{number}" for number in range(12)]
MARKUP = "<b>bold</b> $\\frac$ [/INST]"
# What callbacks did to a run: its second block is frozen between two evaluations, and both are trained again.
GROUPS = (("embed", "blocks.0"), ("blocks.1",))
FROZEN = (
    LayerEvent(10, "frozen", (0,), "converged"),
    LayerEvent(23, "frozen", (1,), "converged"),
    LayerEvent(43, "trained", (0, 1), "the loss turned"),
)
DRIFTED = (
    LayerEvent(20, "rolled back", (0,), "beyond the drift budget"),
    LayerEvent(30, "slowed", (0,), "learning rate x 0.1"),
    LayerEvent(40, "rolled back", (0,), "beyond the drift budget"),
)


def write(folder: Path, values: Mapping[str, Mapping[int, float]]) -> None:
    with SummaryWriter(str(folder)) as writer:
        for tag, by_step in values.items():
            for step, value in by_step.items():
                writer.add_scalar(tag, value, step)


def run_of(layers: list[str], rate: float, prefix: str = "cka", *, bands: bool = False, n: int = 200) -> dict[str, Any]:
    """Scalars as the callback logs them: deeper layers change more, and stop at step 30."""
    steps = range(0, 60, 10)

    def cka(index: int, step: int) -> float:
        return 1 - rate * (index + 1) / len(layers) * min(step, 30) / 30

    values = {f"{prefix}/{name}": {s: cka(i, s) for s in steps} for i, name in enumerate(layers)}
    if bands:
        for name in layers:
            cells = values[f"{prefix}/{name}"]
            values[f"{prefix}_low/{name}"] = {step: value - 0.03 for step, value in cells.items()}
            values[f"{prefix}_high/{name}"] = {step: value + 0.02 for step, value in cells.items()}
    of_layers = [values[f"{prefix}/{name}"] for name in layers]
    values[f"{prefix}/mean"] = {s: math.fsum(each[s] for each in of_layers) / len(layers) for s in steps}
    values[f"{prefix}/num_samples"] = dict.fromkeys(steps, float(n))
    return values


class Server:
    """A TensorBoard in a process of its own, as people start it.

    Attributes:
        callbacks: of the run "trained" that it shows.
    """

    callbacks: tuple[CKACallback, FreezeConverged]

    def __init__(self, folder: Path, log: Path) -> None:
        command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--port", "0",
                   "--reload_interval", "1", "--load_fast", "false"]  # fmt: skip
        self._log = log.open("w+")
        self.process = subprocess.Popen(command, stderr=self._log, stdout=self._log)
        for _ in range(600):
            found = [word for word in log.read_text().split() if word.startswith("http://localhost:")]
            if found:
                self.address = found[0].rstrip("/")
                return
            try:
                self.process.wait(0.1)
            except subprocess.TimeoutExpired:
                continue
            break
        raise RuntimeError(log.read_text())

    def ask(self, path: str, **parameters: str) -> Any:
        address = f"{self.address}/data/plugin/cka/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(address) as answer:
            return json.load(answer)

    def tab(self, **state: Any) -> str:
        """The tab alone, without TensorBoard around it."""
        chosen = urllib.parse.quote(json.dumps(state))
        return f"{self.address}/data/plugin_entry.html?name=cka&{len(chosen)}#p.cka.state={chosen}"

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._log.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("logs")
    write(folder / "fast", {**run_of(LAYERS, 0.6, bands=True), "val_acc": {0: 0.5, 50: 0.9}})
    write(folder / "slow", run_of(LAYERS, 0.2))
    write(folder / "two", {**run_of(["a", "b"], 0.5), **run_of(["c"], 0.1, "pretrained", n=50)})
    broken = run_of(["ok", "dead"], 0.5)
    broken["cka/dead"] = dict.fromkeys(broken["cka/dead"], math.nan)
    write(folder / "broken", broken)
    gaps = run_of(["a"], 0.5)
    gaps["cka/a"] |= {20: math.nan, 30: math.nan}
    write(folder / "gaps", gaps)
    write(folder / "once", {tag: {0: cells[0]} for tag, cells in run_of(["a", MARKUP], 0.5).items()})
    write(folder / "deep", run_of([f"layer.{number}" for number in range(500)], 0.5))
    write(folder / "frozen", run_of(["embed", "blocks.0", "blocks.0.attn", "blocks.1", "head"], 0.5))
    with SummaryWriter(str(folder / "frozen")) as writer:
        writer.add_text("notes/layers", "of somebody else")
        writer.add_text("freeze/layers", to_text(LayerEvents(GROUPS, FROZEN[:1])), 12)
        writer.add_text("freeze/layers", to_text(LayerEvents(GROUPS, FROZEN)), 43)
        writer.add_text("drift/layers", to_text(LayerEvents((("head",),), DRIFTED)), 40)
    write(folder / "other", {"loss": {0: 1.0}, "loss/mean": {0: 1.0}})
    trained = CKACallback(layers=["net.head", "net.stem.0", "net.blocks.*.linear"], prefix="mine"), freezing(1)
    logger = TensorBoardLogger(folder, name="trained", version="")
    run = trainer(tmp_path_factory.mktemp("run"), *trained, logger=logger, max_epochs=2)
    run.fit(Adam(), train_data(), loader())
    server = Server(folder, tmp_path_factory.mktemp("server") / "log")
    server.callbacks = trained
    for _ in range(100):  # until it has read all
        if sum(bool(run["series"]) for run in server.ask("runs")["runs"]) == 9:
            break
        time.sleep(0.1)
    yield server
    server.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser_page(tmp_path_factory.mktemp("profile")) as page:
        yield page


def test_any_tensorboard_finds_the_tab(server: Server) -> None:
    with urllib.request.urlopen(f"{server.address}/data/plugins_listing") as answer:
        tab = json.load(answer)["cka"]
    assert (tab["enabled"], tab["tab_name"]) == (True, "CKA")
    with urllib.request.urlopen(server.address + tab["loading_mechanism"]["module_path"]) as answer:
        assert answer.headers["Content-Type"].startswith("application/javascript")
        assert b"export async function render" in answer.read()


def test_runs_and_their_series(server: Server) -> None:
    runs = {run["name"]: run for run in server.ask("runs")["runs"]}
    assert {name: run["series"] for name, run in runs.items()} == {
        "fast": ["cka"], "slow": ["cka"], "two": ["cka", "pretrained"], "broken": ["cka"], "once": ["cka"],
        "deep": ["cka"], "other": [], "gaps": ["cka"], "frozen": ["cka"], "trained": ["mine"],
    }  # fmt: skip
    assert runs["fast"]["scalars"] == ["cka/mean", "val_acc"]
    assert runs["fast"]["last"] == 50
    assert runs["fast"]["changed"] == 0 < runs["frozen"]["changed"]


def test_values_are_those_that_were_logged(server: Server) -> None:
    table = server.ask("scores", run="fast", series="cka")
    expected = run_of(LAYERS, 0.6, bands=True)
    assert (table["layers"], table["steps"]) == (LAYERS, list(range(0, 60, 10)))
    for key, prefix in (("values", "cka"), ("low", "cka_low"), ("high", "cka_high")):
        for name, row in zip(LAYERS, table[key], strict=True):
            assert row == pytest.approx(list(expected[f"{prefix}/{name}"].values()), abs=1e-6)
    assert table["num_samples"] == [200] * 6
    assert server.ask("scores", run="slow", series="cka")["low"] is None
    assert server.ask("scores", run="two", series="pretrained")["layers"] == ["c"]
    broken = server.ask("scores", run="broken", series="cka")
    assert broken["values"][broken["layers"].index("dead")] == [None] * 6
    assert server.ask("scalar", run="fast", tag="val_acc") == {
        "run": "fast", "tag": "val_acc", "steps": [0, 50], "values": pytest.approx([0.5, 0.9], abs=1e-6),
    }  # fmt: skip


@pytest.mark.parametrize("asked", [{"run": "gone", "series": "cka"}, {"run": "fast", "series": "no"}, {}])
def test_what_is_not_there_is_said(server: Server, asked: dict[str, str]) -> None:
    with pytest.raises(urllib.error.HTTPError) as error:
        server.ask("scores", **asked)
    assert error.value.code == 404
    assert "There is no series" in json.load(error.value)["error"]


def test_a_run_of_the_callbacks_with_layers_in_the_models_order(server: Server) -> None:
    """Also where that is not the order of names; with what FreezeConverged did, of other layers than are tracked."""
    tracking, frozen_by = server.callbacks
    table = server.ask("scores", run="trained", series="mine")
    history = tracking.history
    assert table["layers"] == list(history[0]["scores"])
    assert table["layers"][0] == "net.head"
    for row, name in zip(table["values"], table["layers"], strict=True):
        assert row == pytest.approx([record["scores"][name] for record in history], abs=1e-6)
    assert table["num_samples"] == [record["n"] for record in history]
    (event,) = frozen_by.history
    frozen = [{"what": "frozen", "start": event["logged_step"], "end": None, "why": "converged"}]
    expected = {"net.stem.0": frozen, "net.blocks.0.linear": frozen, "net.blocks.1.linear": []}
    assert expected.items() <= dict(zip(table["layers"], table["spans"], strict=True)).items()
    assert table["steps"][0] < event["logged_step"] < table["steps"][1]


def opened(page: Page, server: Server, **state: Any) -> Page:
    page.visit(server.tab(**state), width=1400, height=1400)
    page.wait_for("document.documentElement?.dataset.ready === 'true'")
    page.settle()
    return page


def middle(page: Page, selector: str, x: float, y: float) -> tuple[float, float]:
    """A place within an element, as shares of it."""
    page.evaluate(f"document.querySelector({json.dumps(selector)}).scrollIntoView({{block: 'center'}})")
    box = page.evaluate(
        f"(b => [b.x, b.y, b.width, b.height])(document.querySelector({json.dumps(selector)}).getBoundingClientRect())"
    )
    return box[0] + x * box[2], box[1] + y * box[3]


def no_errors(page: Page) -> bool:
    return [error for error in page.errors if "favicon" not in error] == []


@in_browser
def test_hovering_and_walking_show_exact_values(page: Page, server: Server) -> None:
    opened(page, server, run="fast")
    page.move(*middle(page, ".pictures canvas", 0.85, 0.05))
    assert page.text(".tooltip").split("\n")[:2] == ["layer", "model.blocks.0"]
    assert "0.950" in page.text(".tooltip")  # of 1 - 0.6 / 12
    assert "0.920 to 0.970" in page.text(".tooltip")
    assert "200" in page.text(".tooltip")
    page.evaluate("document.querySelector('.pictures canvas').focus()")
    page.key("ArrowDown", times=12)
    page.key("ArrowRight", times=6)
    assert "layer model.blocks.11, step 50, CKA 0.400" in page.text(".readout")
    page.key("Enter")
    page.key("Escape")
    assert no_errors(page)


@in_browser
def test_the_slider_moves_through_time(page: Page, server: Server) -> None:
    opened(page, server, run="fast")
    assert "step 50: model.blocks.11 has changed most, CKA 0.400" in page.text(".summary")
    assert "It was below 0.99 first at step 10" in page.text(".summary")
    page.evaluate("document.querySelector('input[type=range]').focus()")
    page.key("Home")
    page.key("ArrowRight")
    page.wait_for("document.querySelector('.time output').textContent === 'step 10'")
    page.settle()
    assert "step 10: model.blocks.11 has changed most, CKA 0.800" in page.text(".summary")
    assert "step 10" in page.text("thead")
    page.click_on(".time button")
    page.wait_for("document.querySelector('.time output').textContent === 'step 50'")
    assert page.text(".time button") == "Play"  # again, at the end
    assert no_errors(page)


@in_browser
def test_two_runs_and_their_difference(page: Page, server: Server) -> None:
    opened(page, server, run="fast", compare="slow", scalar="val_acc")
    assert (
        "slow has changed less in 12 of 12 layers; they differ most in model.blocks.11: 0.400 against 0.800"
        in page.text(".summary")
    )
    titles = page.evaluate("[...document.querySelectorAll('.pictures h2')].map(each => each.innerText)")
    assert titles[:3] == [
        "fast: layers over steps",
        "slow: layers over steps",
        "fast less slow: red where the first has changed more",
    ]
    assert titles[-1] == "val_acc"
    row = page.evaluate("[...document.querySelectorAll('tbody tr')].at(-1).innerText").split("\t")
    assert row == [
        "blocks.11",
        "1.000",
        "0.400",
        "0.400",
        "0.370 to 0.420",
        "10",
        "rewritten",
        "0.800",
        "\N{MINUS SIGN}0.400",
        "rewritten",
    ]
    # On a fixed scale, red where the first has changed more: the last layer at the last step.
    color = page.evaluate("""(() => {
      const canvas = document.querySelectorAll('.pictures canvas')[2], context = canvas.getContext('2d');
      const [left, top] = [Math.round(canvas.width * .8), Math.round(6 + 12 * 26 - 8)];
      return [...context.getImageData(left, top, 1, 1).data];
    })()""")
    assert color[0] > color[2] + 60
    assert no_errors(page)


@in_browser
def test_curves_and_profile_are_walked_with_the_keyboard(page: Page, server: Server) -> None:
    opened(page, server, run="fast")
    headings = page.evaluate("[...document.querySelectorAll('.pictures h2')].map(each => each.innerText)")
    place = next(index for index, text in enumerate(headings) if "every layer" in text)
    section = f"document.querySelectorAll('.pictures section')[{place}]"
    page.evaluate(f"{section}.querySelector('canvas').focus()")
    read = f"{section}.querySelector('.readout').innerText"
    page.key("ArrowRight")
    assert page.evaluate(read).startswith("model.blocks.0 1.000")
    page.key("ArrowRight")
    assert "95 %" in page.evaluate(read)
    assert page.evaluate(read).endswith("at step 10")
    page.key("ArrowDown", times=20)  # to the last layer
    assert page.evaluate(read).startswith("model.blocks.11 0.800")
    page.key("ArrowUp")
    assert page.evaluate(read).startswith("model.blocks.10 ")
    page.key("Enter")
    page.wait_for("document.querySelector('.time output').textContent === 'step 10'")
    page.key("ArrowRight", times=9)
    assert page.evaluate(read).endswith("at step 50")
    page.key("Escape")
    assert page.evaluate(f"{section}.querySelector('.tooltip').hidden")
    place = next(index for index, text in enumerate(headings) if text.startswith("Over depth"))
    section = f"document.querySelectorAll('.pictures section')[{place}]"
    page.evaluate(f"{section}.querySelector('canvas').focus()")
    page.key("ArrowLeft")
    assert page.evaluate(f"{section}.querySelector('.readout').innerText").endswith("at blocks.11")
    assert no_errors(page)


@in_browser
def test_values_that_are_not_there_are_walked_past(page: Page, server: Server) -> None:
    opened(page, server, run="broken")
    headings = page.evaluate("[...document.querySelectorAll('.pictures h2')].map(each => each.innerText)")
    place = next(index for index, text in enumerate(headings) if "every layer" in text)
    section = f"document.querySelectorAll('.pictures section')[{place}]"
    page.evaluate(f"{section}.querySelector('canvas').focus()")
    for key in ("ArrowRight", "ArrowUp", "ArrowDown"):
        page.key(key)
        assert page.evaluate(f"{section}.querySelector('.readout').innerText").startswith("ok ")
    opened(page, server, run="gaps")
    page.evaluate(f"{section}.querySelector('canvas').focus()")
    page.key("ArrowRight", times=3)
    assert page.evaluate(f"{section}.querySelector('.readout').innerText").endswith("at step 40")
    assert no_errors(page)


@in_browser
def test_a_third_run_is_in_the_table(page: Page, server: Server) -> None:
    opened(page, server, run="slow", compare="fast", more=["once"])
    heads = page.evaluate("[...document.querySelectorAll('thead th')].map(each => each.innerText)")
    assert heads[-5:] == ["fast", "difference", "its verdict", "once", "its verdict"]
    opened(page, server, run="fast", more=["slow"])
    row = page.evaluate("[...document.querySelectorAll('tbody tr')].at(-1).innerText").split("\t")
    assert row[-2:] == ["0.800", "rewritten"]
    assert no_errors(page)


def test_what_was_done_to_layers_comes_with_their_values(server: Server) -> None:
    table = server.ask("scores", run="frozen", series="cka")
    spans = dict(zip(table["layers"], table["spans"], strict=True))
    until = {"what": "frozen", "end": 43, "why": "converged"}
    assert spans["embed"] == spans["blocks.0"] == spans["blocks.0.attn"] == [{**until, "start": 10}]
    assert spans["blocks.1"] == [{**until, "start": 23}]
    assert [(span["what"], span["start"], span["end"]) for span in spans["head"]] == [
        ("rolled back", 20, 20), ("slowed", 30, None), ("rolled back", 40, 40),
    ]  # fmt: skip
    assert server.ask("scores", run="fast", series="cka")["spans"] == [[]] * 12


def column_of(page: Page, heading: str) -> dict[str, str]:
    """What the table says of each layer under a heading."""
    heads = page.evaluate("[...document.querySelectorAll('thead th')].map(each => each.innerText)")
    rows = page.evaluate("[...document.querySelectorAll('tbody tr')].map(each => each.innerText)")
    return {row.split("\t")[0]: row.split("\t")[heads.index(heading)] for row in rows}


@in_browser
def test_a_reader_sees_what_was_frozen_when(page: Page, server: Server) -> None:
    opened(page, server, run="frozen", step=30)
    frozen = {"embed": "10", "blocks.0": "10", "blocks.0.attn": "10", "blocks.1": "23", "head": ""}
    assert column_of(page, "frozen since") == frozen
    assert column_of(page, "slowed since") == dict.fromkeys(frozen, "") | {"head": "30"}
    assert column_of(page, "rolled back")["head"] == "at step 20"
    assert "4 of 5 layers are frozen: blocks.0, blocks.0.attn, blocks.1, embed." in page.text(".summary")
    page.evaluate("document.querySelector('.pictures canvas').focus()")
    page.key("ArrowDown")
    page.key("ArrowRight", times=3)  # blocks.0 at step 30
    assert "frozen since step 10, converged" in page.text(".readout")
    page.key("ArrowDown", times=2)  # blocks.1
    assert "frozen since step 23, converged" in page.text(".readout")
    page.key("ArrowLeft")
    assert "frozen" not in page.text(".readout")
    page.evaluate("document.querySelector('input[type=range]').focus()")
    page.key("End")
    page.wait_for("document.querySelector('.time output').textContent === 'step 50'")
    page.settle()
    assert column_of(page, "frozen since") == dict.fromkeys(frozen, "")
    assert column_of(page, "rolled back")["head"] == "2 times, last at step 40"
    assert "none of 5 layers are frozen." in page.text(".summary")
    assert no_errors(page)


@in_browser
@pytest.mark.slow
def test_runs_beside_each_other_have_what_was_done_to_each(page: Page, server: Server) -> None:
    opened(page, server, run="slow", compare="frozen", more=["fast"], step=30)
    titles = page.evaluate("[...document.querySelectorAll('.pictures h2')].map(each => each.innerText)")
    assert [title for title in titles if "hatched" in title] == [
        "frozen: layers over steps; hatched: frozen, dotted: slowed, \N{BLACK LEFT-POINTING TRIANGLE}: rolled back"
    ]
    heads = page.evaluate("[...document.querySelectorAll('thead th')].map(each => each.innerText)")
    assert heads[heads.index("frozen") :] == [
        "frozen", "difference", "its verdict", "frozen since", "slowed since", "rolled back", "fast", "its verdict",
    ]  # fmt: skip
    assert no_errors(page)


@in_browser
def test_hatching_begins_and_ends_where_a_layer_was_frozen(page: Page, server: Server) -> None:
    opened(page, server, run="frozen")
    assert "layers over steps; hatched: frozen, dotted: slowed" in page.text(".pictures h2")
    layers = server.ask("scores", run="frozen", series="cka")["layers"]

    def white(layer: str) -> list[int]:
        """Where the row of a layer has white, which no value has: from its first line to its last, with hatching."""
        y = int(6 + 26 * (layers.index(layer) + 0.5))
        row = page.evaluate(f"""(() => {{
          const canvas = document.querySelector('.pictures canvas'), width = canvas.width;
          const read = Object.assign(document.createElement('canvas'), {{ width, height: 1 }}).getContext('2d');
          read.drawImage(canvas, 0, -{y});
          const row = read.getImageData(0, 0, width, 1).data;
          return [...Array(width).keys()].filter(x => row[4 * x] > 200 && row[4 * x + 2] > 200);
        }})()""")
        return [int(place) for place in row]

    first, second = white("blocks.0"), white("blocks.1")
    assert len(first) > 30
    for inside in ("embed", "blocks.0.attn"):
        assert (white(inside)[0], white(inside)[-1]) == (first[0], first[-1])
    # From step 10 to 43, and from step 23.
    assert second[-1] == first[-1]
    assert (second[0] - first[0]) / (first[-1] - first[0]) == pytest.approx(13 / 33, abs=0.01)
    assert len(white("head")) > 10  # two signs, and dots
    assert no_errors(page)


@in_browser
def test_thresholds_move_the_verdicts(page: Page, server: Server) -> None:
    opened(page, server, run="slow")
    assert "already at the first step" not in page.text(".summary")
    verdicts = "[...document.querySelectorAll('td.verdict')].map(each => each.textContent)"
    assert page.evaluate(verdicts) == ["refined"] * 6 + ["rewritten"] * 6
    refined = "document.querySelectorAll('input[type=number]')[1]"
    page.evaluate(f"(each => {{ each.value = '0.8'; each.dispatchEvent(new Event('change')); }})({refined})")
    page.wait_for(f"{verdicts}.every((word, index) => word === 'refined')")
    assert "refined%22%3A0.8" in page.evaluate("location.hash")  # the link has it
    assert no_errors(page)


@in_browser
@pytest.mark.parametrize(
    "state",
    [
        {"run": "two (pretrained)", "compare": "fast"},
        {"run": "broken"},
        {"run": "once"},
        {"run": "deep", "more": ["fast"]},
        {"run": "no such run", "compare": "neither", "untouched": "x", "more": 7},
        {"run": "fast", "compare": "deep"},
    ],
    ids=str,
)
def test_runs_of_all_kinds(page: Page, server: Server, state: dict[str, Any]) -> None:
    opened(page, server, **state)
    assert no_errors(page)
    assert page.evaluate("document.querySelectorAll('tbody tr').length") > 0
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    if state["run"] == "once":
        assert MARKUP in page.text("table")
    if state["run"] == "broken":
        assert "undefined" in page.text("table")
    if state.get("compare") in ("fast", "deep"):
        assert "no layer in common" in page.text(".warning")


@in_browser
def test_narrow_dark_and_in_the_frame_of_tensorboard(page: Page, server: Server) -> None:
    page.visit(f"{server.address}/?darkMode=true#cka", width=600, height=1000)
    frame = "[...document.querySelectorAll('iframe')].find(each => each.src.includes('plugin_entry'))?.contentDocument"
    page.wait_for(f"{frame}?.documentElement?.dataset.ready === 'true'", 60)
    assert page.evaluate(f"{frame}.documentElement.dataset.theme") == "dark"
    assert page.evaluate(f"{frame}.documentElement.scrollWidth <= {frame}.defaultView.innerWidth")
    assert page.evaluate(f"{frame}.querySelector('main').hidden") is False


@in_browser
def test_live_runs_come_and_go(page: Page, tmp_path: Path) -> None:
    server = Server(tmp_path / "logs", tmp_path / "log")
    try:
        opened(page, server)
        assert "No CKA in these logs yet" in page.text("body")
        assert "CKACallback()" in page.text("body")
        write(tmp_path / "logs" / "run", run_of(["a", "b"], 0.5))
        page.wait_for("document.querySelectorAll('tbody tr').length === 2", 30)
        shutil.rmtree(tmp_path / "logs" / "run")
        page.wait_for("!document.querySelector('.empty').hidden", 60)
    finally:
        server.close()
    assert no_errors(page)
