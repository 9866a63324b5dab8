"use strict";
// Layers by steps as a heatmap. A pixel of a small picture for each value, enlarged: a pointer costs no redrawing of it.

class LayerTime {
  /** `onPick(step)` is called with the step of the column that is clicked or walked to. */
  constructor(title, onPick) {
    this.title = title;
    this.onPick = onPick;
    this.canvas = element("canvas", {
      tabIndex: 0, role: "application", ariaRoleDescription: "heatmap",
      ariaLabel: `${title}. Rows are layers, columns steps. Arrow keys walk through the values.`,
    });
    this.tooltip = element("div", { className: "tooltip", hidden: true });
    this.readout = element("p", { className: "readout", role: "status" }, "Hover a value, or walk with the arrow keys.");
    this.body = element("div", { className: "chart" }, this.canvas, this.tooltip);
    this.image = document.createElement("canvas");
    this.base = document.createElement("canvas");
    this.cursor = null;
    this.canvas.addEventListener("pointermove", (event) => this.point(this.cellAt(event)));
    this.canvas.addEventListener("pointerleave", () => this.point(null));
    this.canvas.addEventListener("blur", () => this.point(null));
    this.canvas.addEventListener("click", () => this.cursor && this.onPick(this.data.steps[this.cursor[1]]));
    this.canvas.addEventListener("keydown", (event) => this.walk(event));
  }

  /** data: {layers, steps, values, low, high, num_samples, spans}; scale: {color, ticks: [[value, label]], range}; domain of steps. */
  show(data, scale, domain) {
    const key = [document.documentElement.dataset.theme, scale.range, scale.what, domain].join();
    if (data === this.data && key === this.key) return;
    this.key = key;
    this.data = data;
    this.scale = scale;
    this.domain = domain;
    this.names = shortNames(data.layers).names;
    const [rows, columns] = [data.layers.length, data.steps.length];
    [this.image.width, this.image.height] = [Math.max(columns, 1), Math.max(rows, 1)];
    const context = this.image.getContext("2d");
    const pixels = context.createImageData(this.image.width, this.image.height);
    const packed = ([red, green, blue]) => (255 << 24) | (blue << 16) | (green << 8) | red;
    const nothing = packed(toRgb(themeColor("undefined")));
    const whole = new Uint32Array(pixels.data.buffer);
    const [low, high] = scale.range;
    const table = Array.from({ length: 512 }, (_, index) => packed(scale.color(low + (index / 511) * (high - low))));
    for (let layer = 0; layer < rows; layer += 1) {
      const row = data.values[layer];
      for (let step = 0; step < columns; step += 1) {
        const place = row[step] === null ? -1 : Math.round((511 * (row[step] - low)) / (high - low));
        whole[layer * columns + step] = place < 0 && row[step] === null ? nothing : table[Math.max(0, Math.min(511, place))];
      }
    }
    context.putImageData(pixels, 0, 0);
    this.cursor = null;
    this.draw();
  }

  /** Columns reach half of the way to their neighbours. */
  edges() {
    const { steps } = this.data;
    const middle = (index) => (steps[index] + steps[index + 1]) / 2;
    return steps.map((step, index) => [index ? middle(index - 1) : this.domain[0], index + 1 < steps.length ? middle(index) : this.domain[1]]);
  }

  draw() {
    this.width = this.body.clientWidth;
    if (!this.width || !this.data) return;
    const rows = this.data.layers.length;
    const measure = this.canvas.getContext("2d");
    measure.font = FONT;
    const longest = Math.max(0, ...this.names.map((name) => measure.measureText(name.slice(0, 200)).width));
    [this.left, this.top, this.right] = [Math.ceil(Math.min(longest, this.width / 4)) + 10, 6, 66];
    this.row = Math.max(3, Math.min(26, 420 / rows));
    [this.grid, this.tall] = [Math.max(this.width - this.left - this.right, 10), this.row * rows];
    this.height = Math.max(this.top + this.tall + 42, 130);
    this.toX = (step) => {
      const [first, last] = this.domain;
      return this.left + (last > first ? ((step - first) / (last - first)) * this.grid : 0);
    };
    this.columns = this.domain[1] > this.domain[0] ? this.edges().map((edge) => edge.map(this.toX)) : [[this.left, this.left + this.grid]];
    const context = sizeCanvas(this.base, this.width, this.height);
    context.imageSmoothingEnabled = false;
    this.columns.forEach(([from, to], index) => {
      const [first, last] = [Math.round(from), Math.max(Math.round(to), Math.round(from) + 1)];
      context.drawImage(this.image, index, 0, 1, this.image.height, first, this.top, last - first, this.tall);
    });
    this.changes(context);
    this.labels(context);
    this.bar(context);
    this.paint();
  }

  /** What was done to layers: patterns while it holds, with a line where it begins and ends, and marks. */
  changes(context) {
    if (!this.data.spans?.some((spans) => spans.length)) return;
    const [first, last] = [this.columns[0][0], this.columns.at(-1)[1]];
    const within = (step) => this.toX(step) >= first && this.toX(step) <= last;
    const patterns = Object.fromEntries(LASTING.map((what) => [what, heldPattern(context, what)]));
    const each = (draw) => this.data.spans.forEach((spans, layer) => spans.forEach((span) => draw(span, this.top + layer * this.row)));
    each(({ what, start, end }, y) => {
      if (!(what in patterns)) return;
      const [from, to] = [Math.max(first, this.toX(start)), end === null ? last : Math.min(last, this.toX(end))];
      context.fillStyle = patterns[what];
      if (to > from) context.fillRect(from, y, to - from, this.row);
    });
    each(({ what, start, end }, y) => {
      for (const step of what in patterns ? [start, end] : []) {
        if (step === null || !within(step)) continue;
        [["#000000", 4], ["#ffffff", 2]].forEach(([color, width]) => {
          context.fillStyle = color;
          context.fillRect(Math.round(this.toX(step)) - width / 2, y, width, this.row);
        });
      }
    });
    each(({ what, start }, y) => {
      const size = Math.max(2, Math.min(5, this.row / 3));
      if (!(what in patterns) && within(start)) drawMark(context, what, Math.min(this.toX(start), last - size), y + this.row / 2, size, { fill: "#ffffff", edge: "#000000" });
    });
  }

  /** What changes with the pointer and the step, over a picture of the rest. */
  paint() {
    const context = sizeCanvas(this.canvas, this.width, this.height);
    this.canvas.style.height = `${this.height}px`;
    context.save();
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.drawImage(this.base, 0, 0);
    context.restore();
    const at = this.marked === undefined ? -1 : this.data.steps.indexOf(this.marked);
    if (at >= 0) {
      const middle = Math.round((this.columns[at][0] + this.columns[at][1]) / 2);
      context.fillStyle = themeColor("accent");
      context.fillRect(middle - 1, this.top + this.tall, 3, 7);
    }
    if (!this.cursor) return;
    const [layer, step] = this.cursor;
    const [from, to] = this.columns[step];
    for (const [color, width] of [["#000000", 4], ["#ffffff", 2]]) {
      [context.strokeStyle, context.lineWidth] = [color, width];
      context.strokeRect(from, this.top + layer * this.row, Math.max(to - from, 3), this.row);
    }
  }

  labels(context) {
    context.font = FONT;
    context.fillStyle = themeColor("ink");
    context.textBaseline = "middle";
    context.textAlign = "right";
    const every = Math.ceil(14 / this.row);
    this.names.forEach((name, index) => {
      if (index % every) return;
      context.fillText(fitText(context, name, this.left - 10), this.left - 6, this.top + (index + 0.5) * this.row);
    });
    context.textAlign = "center";
    const y = this.top + this.tall;
    for (const tick of ticks(...this.domain, Math.max(2, this.grid / 80))) context.fillText(tickLabel(tick), this.toX(tick), y + 14);
    context.fillStyle = themeColor("soft");
    context.fillText("step", this.left + this.grid / 2, y + 31);
  }

  bar(context) {
    const [x, height] = [this.left + this.grid + 14, Math.max(this.tall, 80)];
    const [low, high] = this.scale.range;
    for (let row = 0; row < height; row += 1) {
      context.fillStyle = css(this.scale.color(high - (row / (height - 1)) * (high - low)));
      context.fillRect(x, this.top + row, 12, 1);
    }
    context.fillStyle = themeColor("ink");
    context.textAlign = "left";
    for (const tick of ticks(low, high, 4)) {
      const y = this.top + (1 - (tick - low) / (high - low)) * height;
      context.fillText(tickLabel(tick), x + 16, Math.max(this.top + 6, Math.min(this.top + height - 5, y)));
    }
  }

  mark(step) {
    this.marked = step;
    if (this.columns) this.paint();
  }

  cellAt(event) {
    const box = this.canvas.getBoundingClientRect();
    const [x, y] = [event.clientX - box.left, event.clientY - box.top - this.top];
    const layer = Math.floor(y / this.row);
    const step = this.columns?.findIndex(([from, to]) => x >= from && x < to) ?? -1;
    return layer >= 0 && layer < this.data.layers.length && step >= 0 ? [layer, step] : null;
  }

  walk(event) {
    const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    if (event.key === "Escape") return this.point(null);
    if (event.key === "Enter" && this.cursor) return this.onPick(this.data.steps[this.cursor[1]]);
    if (!(event.key in steps) || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    const bound = (value, count) => Math.max(0, Math.min(count - 1, value));
    const [layer, step] = this.cursor ?? [-steps[event.key][0], -steps[event.key][1]];
    const [down, right] = steps[event.key];
    this.point([bound(layer + down, this.data.layers.length), bound(step + right, this.data.steps.length)]);
  }

  point(cursor) {
    if (String(cursor) === String(this.cursor)) return;
    this.cursor = cursor;
    this.paint();
    this.tooltip.hidden = !cursor;
    if (!cursor) return;
    const [layer, step] = cursor;
    const value = this.data.values[layer][step];
    const text = value === null ? "none" : this.scale.format(value);
    const low = this.data.low?.[layer]?.[step] ?? null;
    const interval = low === null ? [] : [["95 %", `${formatValue(low)} to ${formatValue(this.data.high[layer][step])}`]];
    const n = this.data.num_samples?.[step] ?? null;
    const lines = [["layer", this.data.layers[layer]], ["step", String(this.data.steps[step])], [this.scale.what, text], ...interval];
    if (n !== null) lines.push(["n", String(n)]);
    lines.push(...changeLines(this.data.spans?.[layer], this.data.steps[step]));
    this.tooltip.replaceChildren(definitions(lines));
    this.readout.textContent = lines.map((pair) => pair.join(" ")).join(", ");
    const [from, to] = this.columns[step];
    placeTooltip(this.tooltip, (from + to) / 2, this.top + (layer + 0.5) * this.row, 8, this.width, this.height);
  }
}
