"use strict";
// The tab: what is asked of the server, and the panels that show it.

const EVERY = 5000; // milliseconds between looks at what is new
const HELP = {
  layer: "the layer's name in the model, without what all of them share",
  first: "CKA at the first step that was tracked",
  lowest: "the lowest CKA at any step",
  now: "CKA at the chosen step: 1 where the layer's geometry is that of the reference, 0 where nothing of it is left",
  interval: "where the CKA of all such data lies, with 95 %; as logged by the callback",
  left: "the first step at which CKA was below the threshold of untouched",
  verdict: "untouched, refined or rewritten, by the thresholds",
  other: "CKA of another run that is shown, at the same step or the one nearest to it",
  difference: "CKA of the first run less that of the other: negative where the first changed more",
  frozen: "the step from which on the layer is frozen, if it is at the chosen step",
  slowed: "the step from which on the layer learns more slowly, if it does at the chosen step",
  "rolled back": "the last step by the chosen one at which the layer was put nearer to where it began",
};

const parameters = (pairs) => new URLSearchParams(pairs).toString();

async function ask(path, pairs = {}) {
  const answer = await fetch(`./${path}?${parameters(pairs)}`);
  if (!answer.ok) throw Object.assign(new Error((await answer.json().catch(() => ({}))).error ?? `TensorBoard answered ${answer.status}.`), { gone: answer.status === 404 });
  return answer.json();
}

class Tab {
  constructor() {
    this.state = readState();
    this.listed = [];
    this.tables = new Map(); // by id, with the last step that was there when it was read
    this.panels = new Map();
    this.frame = 0;
    this.build();
  }

  build() {
    const labelled = (text, control, title = "") => element("label", { title }, element("span", {}, text), control);
    const select = (key) => element("select", { onchange: (event) => this.set({ [key]: event.target.value }) });
    const number = (key) => element("input", {
      type: "number", min: 0, max: 1, step: 0.01, value: this.state[key],
      onchange: (event) => event.target.value !== "" && this.set({ [key]: Number(event.target.value) }),
    });
    [this.run, this.compare, this.scalar] = [select("run"), select("compare"), select("scalar")];
    [this.untouched, this.refined] = [number("untouched"), number("refined")];
    this.fit = element("input", { type: "checkbox", checked: this.state.fit, onchange: (event) => this.set({ fit: event.target.checked }) });
    this.more = element("div", { className: "more" });
    this.slider = element("input", { type: "range", min: 0, value: 0, ariaLabel: "Step", oninput: (event) => this.setIndex(Number(event.target.value)) });
    this.play = element("button", { type: "button", onclick: () => this.playing(!this.timer) }, "Play");
    this.at = element("output", {});
    this.summary = element("div", { className: "summary", role: "status" });
    this.message = element("p", { className: "warning", role: "alert", hidden: true });
    this.table = element("div", { className: "scroll", tabIndex: 0 });
    this.beside = labelled("Colours from the lowest value", this.fit);
    this.beside.className = "beside";
    this.others = element("details", {}, element("summary", {}, "More runs"), this.more);
    const link = element("button", { type: "button", onclick: () => this.copyLink(link) }, "Copy link");
    const controls = element("form", { className: "controls", onsubmit: (event) => event.preventDefault() },
      labelled("Run", this.run), labelled("Compare with", this.compare),
      this.others,
      labelled("Untouched from", this.untouched, "CKA from which a layer counts as untouched"),
      labelled("Refined from", this.refined, "CKA from which a layer counts as refined, below as rewritten"),
      labelled("Another scalar", this.scalar), this.beside,
      link, element("button", { type: "button", onclick: () => this.saveCsv() }, "CSV"));
    const time = element("div", { className: "time" }, this.play, this.slider, this.at);
    this.pictures = element("div", { className: "pictures" });
    this.page = element("main", {}, controls, this.message, time, this.summary, this.pictures, element("section", {}, element("h2", {}, "Layers"), this.table));
    this.empty = element("section", { className: "empty", hidden: true },
      element("h2", {}, "No CKA in these logs yet"),
      element("p", {}, "Attach the callback to a training, with any logger that writes for TensorBoard, and look again after its first validation:"),
      element("pre", {}, "from lit_cka import CKACallback\n\ntrainer = Trainer(callbacks=[CKACallback()], logger=TensorBoardLogger(\"runs\"))"),
      element("p", {}, "This page looks every few seconds."));
    document.body.replaceChildren(this.page, this.empty);
    new ResizeObserver(() => this.redraw()).observe(this.pictures);
  }

  /** A picture with its heading, made when first asked for. */
  panel(key, title, make) {
    let panel = this.panels.get(key);
    if (!panel) {
      const heading = element("h2", {});
      const chart = make();
      const save = element("button", { type: "button", className: "save", title: "Save this picture", onclick: () => this.savePng(chart.canvas, heading.textContent) }, "PNG");
      panel = { chart, heading, section: element("section", {}, element("header", {}, heading, save), chart.body, ...(chart.readout ? [chart.readout] : [])) };
      this.panels.set(key, panel);
    }
    panel.heading.textContent = title;
    this.wanted.push(panel.section);
    return panel.chart;
  }

  set(changes) {
    Object.assign(this.state, changes);
    keepState(this.state);
    this.fresh = true;
    this.refresh();
  }

  setIndex(index) {
    const { steps } = this.main;
    this.state.step = index >= steps.length - 1 ? null : steps[index];
    this.markStep();
    // Once for each picture of the screen, however fast the slider moves.
    cancelAnimationFrame(this.stepFrame);
    this.stepFrame = requestAnimationFrame(() => {
      keepState(this.state);
      this.showStep();
    });
  }

  playing(on) {
    clearInterval(this.timer);
    this.timer = null;
    this.play.textContent = on ? "Pause" : "Play";
    if (!on) return;
    if (this.index() >= this.main.steps.length - 1) this.setIndex(0);
    const pause = Math.max(40, Math.min(400, 8000 / this.main.steps.length));
    this.timer = setInterval(() => {
      this.setIndex(this.index() + 1);
      if (this.index() >= this.main.steps.length - 1) this.playing(false);
    }, pause);
  }

  index() {
    return this.state.step === null ? this.main.steps.length - 1 : Math.max(0, nearestIndex(this.main.steps, this.state.step));
  }

  async refresh() {
    const turn = (this.turn = (this.turn ?? 0) + 1);
    try {
      const { runs } = await ask("runs");
      this.listed = runs.flatMap((run) => run.series.map((series) => ({ id: run.series.length > 1 || series !== "cka" ? `${run.name} (${series})` : run.name, run: run.name, series, last: `${run.last} ${run.changed}`, scalars: run.scalars })));
      const chosen = this.chosen();
      const missing = chosen.filter((id) => !this.tables.has(id));
      const left = missing.length;
      await this.load(chosen[0] ?? "");
      if (left > 1 && turn === this.turn) {
        this.update(); // what is there by now, while the rest comes
        this.say(`Reading ${left - 1} more of ${chosen.length} runs.`);
      }
      await Promise.all(chosen.slice(1).map((id) => this.load(id)));
      this.say("");
    } catch (error) {
      this.say(error.gone ? error.message : `${error.message} What is shown may be old.`);
    }
    const listed = JSON.stringify(this.listed.map(({ id, scalars }) => [id, scalars]));
    if (turn !== this.turn || !(this.fresh || listed !== this.before)) return;
    [this.fresh, this.before] = [false, listed];
    this.update();
  }

  say(text) {
    this.message.hidden = !text;
    this.message.textContent = text;
  }

  entry(id) {
    return this.listed.find((each) => each.id === id);
  }

  chosen() {
    if (!this.entry(this.state.run)) this.state.run = this.listed[0]?.id ?? "";
    if (!this.entry(this.state.compare) || this.state.compare === this.state.run) this.state.compare = "";
    const more = (Array.isArray(this.state.more) ? this.state.more : []).filter((id) => this.entry(id));
    return [...new Set([this.state.run, this.state.compare, ...more])].filter(Boolean);
  }

  async load(id) {
    if (!this.entry(id)) return;
    const { run, series, last } = this.entry(id);
    if (this.tables.get(id)?.last === last) return;
    const table = await ask("scores", { run, series });
    this.tables.set(id, { ...table, last, id });
    this.fresh = true;
  }

  options(select, ids, chosen, none = null) {
    const wanted = [...(none === null ? [] : [["", none]]), ...ids.map((id) => [id, id])];
    if (String(wanted) !== select.dataset.options) {
      select.replaceChildren(...wanted.map(([value, text]) => element("option", { value }, text)));
      select.dataset.options = String(wanted);
    }
    select.value = chosen;
  }

  update() {
    const shown = this.chosen().map((id) => this.tables.get(id)).filter((table) => table?.steps.length);
    this.page.hidden = !shown.length;
    this.empty.hidden = shown.length > 0;
    if (!shown.length) return;
    this.main = shown[0];
    this.other = this.state.compare ? shown.find((table) => table.id === this.state.compare) ?? null : null;
    this.ticked = shown.filter((table) => table !== this.main && table !== this.other);
    const ids = this.listed.map((each) => each.id);
    this.options(this.run, ids, this.state.run);
    this.options(this.compare, ids.filter((id) => id !== this.state.run), this.state.compare, "nothing");
    this.options(this.scalar, this.entry(this.state.run)?.scalars ?? [], this.state.scalar, "none");
    this.more.replaceChildren(...ids.filter((id) => id !== this.state.run && id !== this.state.compare).map((id) => element("label", {},
      element("input", { type: "checkbox", checked: this.state.more.includes(id), onchange: (event) => this.set({ more: event.target.checked ? [...this.state.more, id] : this.state.more.filter((each) => each !== id) }) }), id)));
    this.others.hidden = !this.more.childElementCount;
    this.slider.max = this.main.steps.length - 1;
    this.showPictures(shown);
  }

  showPictures(shown) {
    this.wanted = [];
    const steps = shown.flatMap((table) => [table.steps[0], table.steps[table.steps.length - 1]]);
    this.domain = [Math.min(...steps), Math.max(...steps)];
    const least = (rows) => Math.min(1, ...(rows ?? []).map((row) => Math.min(...(row ?? []).map((value) => value ?? 1))));
    const lowest = Math.min(...shown.map((table) => least(table.values)));
    const low = this.state.fit ? Math.min(0.99, Math.floor(lowest * 100) / 100) : Math.min(0, Math.floor(lowest * 10) / 10);
    const scale = { color: valueColor(low), range: [low, 1], format: formatValue, what: "CKA" };
    const pick = (step) => this.setIndex(nearestIndex(this.main.steps, step));
    const heat = (table) => this.panel(`heat ${table.id}`, `${table.id}: layers over steps${legendOf(table, HEAT_LOOKS)}`, () => new LayerTime(table.id, pick)).show(table, scale, this.domain);
    const lowestEnd = Math.min(...shown.map((table) => least(table.low)));  // of intervals, which the curves have
    const floor = Math.floor(Math.min(lowest, lowestEnd, this.state.refined) * 20) / 20;
    const dark = document.documentElement.dataset.theme === "dark";
    const curves = (table) => {
      const lines = table.layers.map((name, index) => ({ name, color: depthColor(index, table.layers.length, dark), xs: table.steps, ys: table.values[index], low: table.low?.[index], high: table.high?.[index], spans: table.spans[index], notes: (at) => changeLines(table.spans[index], table.steps[at]) }));
      this.panel(`curves ${table.id}`, `${table.id}: every layer, from the first (dark) to the last (light)${legendOf(table, CURVE_LOOKS)}`, () => new Chart(`Curves of ${table.id}`, { onPick: pick }))
        .show(lines, { x: this.domain, y: [floor, 1], xLabel: "step", yLabel: "CKA", format: formatValue, named: shortNames(table.layers).names });
    };
    // Two beside each other belong together, where there is room for two.
    if (this.other) {
      [this.main, this.other].forEach(heat);
      this.showDifference(pick);
      this.showStep();
      [this.main, this.other].forEach(curves);
    } else {
      heat(this.main);
      curves(this.main);
      this.showStep();
    }
    for (const table of this.ticked) {
      heat(table);
      curves(table);
    }
    this.markStep();
    this.showScalar(shown, pick);
    if (this.wanted.some((section, index) => this.pictures.children[index] !== section) || this.pictures.childElementCount !== this.wanted.length) this.pictures.replaceChildren(...this.wanted);
    this.redraw();
  }

  /** Where both have the layer and the step. */
  showDifference(pick) {
    const { main, other } = this;
    const layers = main.layers.filter((name) => other.layers.includes(name));
    const steps = main.steps.filter((step) => other.steps.includes(step));
    if (!layers.length || !steps.length) return this.say(`${main.id} and ${other.id} have no ${layers.length ? "step" : "layer"} in common.`);
    const value = (table, layer, step) => table.values[table.layers.indexOf(layer)][table.steps.indexOf(step)];
    const values = layers.map((layer) => {
      const rows = [main, other].map((table) => table.values[table.layers.indexOf(layer)]);
      return steps.map((step) => {
        const [one, two] = [main, other].map((table, index) => rows[index][table.steps.indexOf(step)]);
        return one === null || two === null ? null : one - two;
      });
    });
    const scale = { color: differenceColor, range: [-DIFFERENCE, DIFFERENCE], format: formatDifference, what: "difference" };
    this.panel("difference", `${main.id} less ${other.id}: red where the first has changed more`, () => new LayerTime("Difference", pick))
      .show({ layers, steps, values, low: null, high: null, num_samples: null }, scale, this.domain);
  }

  async showScalar(shown, pick) {
    const tag = this.state.scalar;
    if (!tag) return;
    const dark = document.documentElement.dataset.theme === "dark";
    const looks = [[themeColor("accent"), false], [themeColor("second"), true]];
    const lines = [];
    for (const [index, table] of shown.entries()) {
      const { run, scalars } = this.entry(table.id) ?? { scalars: [] };
      if (!scalars.includes(tag)) continue;
      const read = await ask("scalar", { run, tag }).catch(() => null);
      if (read) lines.push({ name: table.id, color: looks[index]?.[0] ?? depthColor(index, shown.length, dark), dashed: looks[index]?.[1] ?? false, xs: read.steps, ys: read.values });
    }
    const values = lines.flatMap((line) => line.ys).filter((value) => value !== null);
    if (!values.length || tag !== this.state.scalar) return;
    const [low, high] = [Math.min(...values), Math.max(...values)];
    const how = lines.length > 1 ? `: ${lines.map((each) => `${each.name} (${each.dashed ? "dashed" : "solid"})`).join(", ")}` : "";
    const chart = this.panel("scalar", `${tag}${how}`, () => new Chart("Another scalar", { height: 200, onPick: pick }));
    this.pictures.append(this.panels.get("scalar").section);
    chart.show(lines, { x: this.domain, y: low < high ? [low, high] : [low - 0.5, high + 0.5], xLabel: "step", yLabel: tag, format: formatNumber });
    chart.mark(this.main.steps[this.index()]);
  }

  /** What depends on the chosen step alone. */
  showStep() {
    const index = this.index();
    const step = this.main.steps[index];
    this.slider.value = index;
    this.at.textContent = `step ${step}`;
    this.slider.ariaValueText = this.at.textContent;
    this.markStep();
    const names = shortNames(this.main.layers).names;
    const line = (table, color, dashed) => {
      const at = nearestIndex(table.steps, step);
      const ofLayer = (rows) => this.main.layers.map((name) => rows?.[table.layers.indexOf(name)]?.[at] ?? null);
      const spans = (place) => table.spans[table.layers.indexOf(this.main.layers[place])];
      const held = names.map((_, place) => spanAt(spans(place), step, "frozen") !== null);
      return { name: table.id, color, dashed, held, notes: (place) => changeLines(spans(place), step), xs: names.map((_, place) => place), ys: ofLayer(table.values), low: table.low && ofLayer(table.low), high: table.high && ofLayer(table.high) };
    };
    const lines = [line(this.main, themeColor("accent"), false), ...(this.other ? [line(this.other, themeColor("second"), true)] : [])];
    const all = lines.flatMap((each) => each.ys).filter((value) => value !== null);
    const wanted = [...this.wanted];
    const profile = this.panel("profile", `Over depth at step ${step}${this.other ? `: ${this.main.id} (solid) and ${this.other.id} (dashed)` : ""}`, () => new Chart("Profile over depth"));
    if (wanted.includes(this.panels.get("profile").section)) this.wanted = wanted; // of another step alone
    profile.show(lines, { x: [0, Math.max(names.length - 1, 1)], y: [Math.min(0, ...all), 1], xNames: names, xLabel: "layer", yLabel: "CKA", format: formatValue });
    this.showTable(index, step);
    this.showSummary(index, step);
  }

  markStep() {
    const step = this.main.steps[this.index()];
    for (const [key, { chart }] of this.panels) if (key !== "profile" && (chart.lines || chart.data)) chart.mark(step);
  }

  word(value) {
    if (value === null) return "undefined";
    return value >= this.state.untouched ? "untouched" : value >= this.state.refined ? "refined" : "rewritten";
  }

  leftAt(layer) {
    const at = this.main.values[layer].findIndex((value) => value !== null && value < this.state.untouched);
    return at < 0 ? null : this.main.steps[at];
  }

  /** Since when a layer is not untouched any more, for a sentence and for a cell. */
  since(layer) {
    const left = this.leftAt(layer);
    if (left === null) return { sentence: `It was never below ${this.state.untouched}.`, cell: "never" };
    if (left === this.main.steps[0]) return { sentence: `It was below ${this.state.untouched} already at the first step that was tracked, ${left}.`, cell: `≤ ${left}` };
    return { sentence: `It was below ${this.state.untouched} first at step ${left}.`, cell: String(left) };
  }

  showTable(index, step) {
    const { main, other } = this;
    const { common, names } = shortNames(main.layers);
    const valueOf = (table, name) => table.values[table.layers.indexOf(name)]?.[nearestIndex(table.steps, step)] ?? null;
    const done = (table) => ["frozen", "slowed", "rolled back"].filter((what) => anySpan(table, what));
    const doneTo = (table, name) => {
      const spans = table.spans[table.layers.indexOf(name)];
      return done(table).map((what) => (LASTING.includes(what) ? String(spanAt(spans, step, what)?.start ?? "") : doneBy(spans, step, what)));
    };
    const doneColumns = (table) => done(table).map((what) => [LASTING.includes(what) ? `${what} since` : what, what]);
    const columns = [["layer", "layer"], [`first, step ${main.steps[0]}`, "first"], ["lowest", "lowest"], [`chosen, step ${step}`, "now"],
      ...(main.low ? [["95 %", "interval"]] : []), [`below ${this.state.untouched} from step`, "left"], ["verdict", "verdict"], ...doneColumns(main),
      ...(other ? [[other.id, "other"], ["difference", "difference"], ["its verdict", "verdict"], ...doneColumns(other)] : []),
      ...this.ticked.flatMap((table) => [[table.id, "other"], ["its verdict", "verdict"], ...doneColumns(table)])];
    const rows = main.layers.map((name, layer) => {
      const value = main.values[layer][index];
      const defined = main.values[layer].filter((each) => each !== null);
      const others = other ? valueOf(other, name) : null;
      const word = this.word(value);
      const cells = [names[layer], formatValue(main.values[layer][0] ?? NaN), formatValue(defined.length ? Math.min(...defined) : NaN), formatValue(value ?? NaN),
        ...(main.low ? [main.low[layer][index] === null ? "" : `${formatValue(main.low[layer][index])} to ${formatValue(main.high[layer][index])}`] : []),
        this.since(layer).cell, word, ...doneTo(main, name), ...(other ? [formatValue(others ?? NaN), value === null || others === null ? "" : formatDifference(value - others), this.word(others), ...doneTo(other, name)] : []),
        ...this.ticked.flatMap((table) => [formatValue(valueOf(table, name) ?? NaN), this.word(valueOf(table, name)), ...doneTo(table, name)])];
      return element("tr", {}, ...cells.map((text, column) => element(column ? "td" : "th", { ...(column === 0 && { scope: "row", title: name }), className: columns[column][1] === "verdict" ? `verdict ${text}` : column ? "number" : "" }, text)));
    });
    this.table.replaceChildren(element("table", {},
      element("caption", {}, `${main.id}${common ? `, layers of ${common}` : ""}`),
      element("thead", {}, element("tr", {}, ...columns.map(([text, help]) => element("th", { scope: "col", title: HELP[help] }, text)))),
      element("tbody", {}, ...rows)));
  }

  showSummary(index, step) {
    const { main, other } = this;
    const now = main.values.map((row) => row[index]);
    const defined = now.filter((value) => value !== null);
    const n = main.num_samples[index];
    const sentences = [];
    if (defined.length) {
      const most = now.indexOf(Math.min(...defined));
      const counts = ["untouched", "refined", "rewritten"].map((word) => `${now.filter((value) => this.word(value) === word).length} ${word}`);
      const interval = main.low && main.low[most][index] !== null ? ` (95 %: ${formatValue(main.low[most][index])} to ${formatValue(main.high[most][index])})` : "";
      sentences.push(`${main.id}, step ${step}: ${main.layers[most]} has changed most, CKA ${formatValue(now[most])}${interval}. ` +
        `${this.since(most).sentence} Of ${now.length} layers: ${counts.join(", ")}.`);
    } else sentences.push(`${main.id}, step ${step}: no layer has a value here.`);
    sentences.push(...changeSentences(main, step));
    if (other) {
      const at = nearestIndex(other.steps, step);
      const pairs = main.layers.map((name, layer) => [name, now[layer], other.values[other.layers.indexOf(name)]?.[at] ?? null]).filter((pair) => pair[1] !== null && pair[2] !== null);
      if (pairs.length) {
        const less = pairs.filter(([, one, two]) => two > one).length;
        const amount = 2 * less >= pairs.length ? `less in ${less}` : `more in ${pairs.length - less}`;
        const [name, one, two] = pairs.reduce((far, pair) => (Math.abs(pair[1] - pair[2]) > Math.abs(far[1] - far[2]) ? pair : far));
        sentences.push(`${other.id}${other.steps[at] === step ? "" : ` (its step ${other.steps[at]})`} has changed ${amount} of ${pairs.length} layers; they differ most in ${name}: ${formatValue(one)} against ${formatValue(two)}.`);
      }
    }
    sentences.push(`${n === null ? "How many samples are behind a value was not logged." : `Each value is of n = ${n} samples${main.low ? "" : "; no intervals are logged, so that how far it may be off is not known here"}.`}`);
    sentences.push("CKA is with the callback's reference, by default the weights that the training began with, on the data that were tracked: 1 where a layer's features are the same but for rotation and scale, 0 where nothing of them is left.");
    this.summary.replaceChildren(...sentences.map((text) => element("p", {}, text)));
  }

  redraw() {
    cancelAnimationFrame(this.frame);
    this.frame = requestAnimationFrame(() => this.panels.forEach(({ chart, section }) => section.isConnected && chart.draw()));
  }

  recolor() {
    if (this.main) this.update();
  }

  async copyLink(button) {
    const link = stateLink(this.state);
    await navigator.clipboard?.writeText(link).catch(() => {});
    keepState(this.state);
    button.textContent = "Link is in the address bar";
    setTimeout(() => (button.textContent = "Copy link"), 1500);
  }

  savePng(canvas, title) {
    const copy = element("canvas", { width: canvas.width, height: canvas.height });
    const context = copy.getContext("2d");
    context.fillStyle = themeColor("ground");
    context.fillRect(0, 0, copy.width, copy.height);
    context.drawImage(canvas, 0, 0);
    download(`${title.replace(/[^\w.-]+/g, "_").slice(0, 80)}.png`, copy.toDataURL("image/png"));
  }

  saveCsv() {
    const quoted = (text) => `"${String(text).replaceAll('"', '""')}"`;
    const rows = [["run", "layer", "step", "cka", "low", "high", "n", "state"].join(",")];
    for (const id of this.chosen()) {
      const table = this.tables.get(id);
      table?.layers.forEach((layer, row) => table.steps.forEach((step, column) => rows.push([
        quoted(id), quoted(layer), step, table.values[row][column] ?? "", table.low?.[row][column] ?? "", table.high?.[row][column] ?? "", table.num_samples[column] ?? "",
        LASTING.filter((what) => spanAt(table.spans[row], step, what)).join(" "),
      ].join(","))));
    }
    const url = URL.createObjectURL(new Blob([rows.join("\r\n") + "\r\n"], { type: "text/csv" }));
    download("cka.csv", url);
    setTimeout(() => URL.revokeObjectURL(url), 10000);
  }
}

const formatDifference = (value) => (value > 0 ? "+" : "") + minus(value.toFixed(3));

/** What TensorBoard calls when the tab is opened. */
export async function render() {
  document.documentElement.lang = "en";
  document.head.append(element("link", { rel: "stylesheet", href: "./tab.css" }));
  const tab = new Tab();
  followTheme(() => tab.recolor());
  outer().addEventListener("hashchange", () => tab.set(readState()));
  await tab.refresh();
  document.documentElement.dataset.ready = "true";
  setInterval(() => document.hidden || tab.refresh(), EVERY);
}
