"use strict";
// Lines over steps or over layers, with bands for intervals: hovered, or with a mark at one place.

class Chart {
  /** `title` is what a screen reader says; `onPick(x)` is called with the place on the x axis that is clicked or walked to. */
  constructor(title, { height = 260, onPick = null } = {}) {
    this.height = height;
    this.onPick = onPick;
    this.canvas = element("canvas", {
      tabIndex: 0, role: "application", ariaRoleDescription: "line chart",
      ariaLabel: `${title}. Left and right walk along a line, up and down from line to line.`,
    });
    this.readout = element("p", { className: "readout", role: "status" }, "Hover a line, or walk with the arrow keys.");
    this.tooltip = element("div", { className: "tooltip", hidden: true });
    this.body = element("div", { className: "chart" }, this.canvas, this.tooltip);
    this.base = document.createElement("canvas");
    this.canvas.addEventListener("pointermove", (event) => this.hover(event));
    this.canvas.addEventListener("pointerleave", () => this.leave());
    this.canvas.addEventListener("blur", () => this.leave());
    this.canvas.addEventListener("keydown", (event) => this.walk(event));
    this.canvas.addEventListener("click", (event) => this.onPick?.(this.xAt(event)));
  }

  /** lines: [{name, color, xs, ys, low, high, dashed, spans, held, notes}], spans over x, held a point or not, notes(index) for a tooltip; axes: {x: [first, last], y: [low, high], xLabel, yLabel, xNames}. */
  show(lines, axes) {
    const key = [document.documentElement.dataset.theme, axes.x, axes.y, axes.yLabel, lines.map((line) => [line.name, line.color])].join();
    const same = this.lines?.length === lines.length && lines.every((line, index) => line.ys === this.lines[index].ys && line.xs === this.lines[index].xs);
    if (same && key === this.key) return;
    this.key = key;
    this.lines = lines;
    this.axes = axes;
    this.draw();
  }

  mark(x) {
    this.marked = x;
    this.overlay();
  }

  scaled() {
    const [left, right, top, bottom] = [52, this.axes.named ? 92 : 12, 10, this.axes.xNames ? 66 : 40];
    const [width, height] = [this.width - left - right, this.height - top - bottom];
    const { x: [x0, x1], y: [y0, y1] } = this.axes;
    this.toX = (x) => left + (x1 > x0 ? ((x - x0) / (x1 - x0)) * width : width / 2);
    this.toY = (y) => top + (1 - (y - y0) / (y1 - y0 || 1)) * height;
    this.fromX = (pixel) => x0 + ((pixel - left) / width) * (x1 - x0);
    return { left, top, width, height };
  }

  draw() {
    this.width = this.body.clientWidth;
    if (!this.width || !this.lines) return;
    const context = sizeCanvas(this.base, this.width, this.height);
    const box = this.scaled();
    this.frame(context, box);
    context.save();
    context.beginPath();
    context.rect(box.left - 3, box.top - 3, box.width + 6, box.height + 6);
    context.clip();
    for (const line of this.lines) if (line.low) this.band(context, line);
    for (const line of this.lines) this.line(context, line, 1.6);
    context.restore();
    for (const line of this.lines) this.marks(context, line);
    if (this.axes.named) this.names(context, box);
    this.overlay();
  }

  /** Of lines, at their right ends: the first, the last, and what is far enough from those. */
  names(context, { left, width }) {
    const ends = this.lines.map((line) => ({ line, y: this.toY(line.ys.findLast((value) => value !== null) ?? NaN) })).filter(({ y }) => Number.isFinite(y));
    const taken = [];
    context.textAlign = "left";
    for (const { line, y } of ends.length > 1 ? [ends[0], ends.at(-1), ...ends.slice(1, -1)] : ends) {
      if (!line || taken.some((each) => Math.abs(each - y) < 13)) continue;
      taken.push(y);
      context.fillStyle = line.color;
      context.fillText(fitText(context, this.axes.named[this.lines.indexOf(line)], 84), left + width + 6, y);
    }
  }

  frame(context, { left, top, width, height }) {
    context.font = FONT;
    context.textBaseline = "middle";
    context.textAlign = "right";
    const { y: [y0, y1], x: [x0, x1], xLabel, yLabel, xNames } = this.axes;
    for (const tick of ticks(y0, y1, Math.max(2, height / 45))) {
      context.fillStyle = themeColor("line");
      context.fillRect(left, Math.round(this.toY(tick)), width, 1);
      context.fillStyle = themeColor("ink");
      context.fillText(tickLabel(tick), left - 6, this.toY(tick));
    }
    context.fillStyle = themeColor("ink");
    if (xNames) {
      const every = Math.ceil((xNames.length * 15) / width);
      xNames.forEach((name, index) => {
        if (index % every) return;
        context.save();
        context.translate(this.toX(index), top + height + 7);
        context.rotate(-Math.PI / 5);
        context.fillText(fitText(context, name, 66), 0, 4);
        context.restore();
      });
    } else {
      context.textAlign = "center";
      for (const tick of ticks(x0, x1, Math.max(2, width / 80))) context.fillText(tickLabel(tick), this.toX(tick), top + height + 11);
      context.fillStyle = themeColor("soft");
      context.fillText(xLabel, left + width / 2, top + height + 29);
    }
    context.save();
    context.fillStyle = themeColor("soft");
    context.textAlign = "center";
    context.translate(10, top + height / 2);
    context.rotate(-Math.PI / 2);
    context.fillText(fitText(context, yLabel, height), 0, 0);
    context.restore();
  }

  /** Of many points in one pixel the first, the lowest and the highest: what a line through all of them would cover. */
  thinned({ xs, ys }) {
    if (xs.length < 2 * this.width) return xs.map((_, index) => index);
    const kept = [];
    const size = xs.length / this.width;
    for (let start = 0; start < xs.length; start += size) {
      const [first, last] = [Math.floor(start), Math.min(xs.length, Math.floor(start + size))];
      let [low, high] = [first, first];
      for (let index = first; index < last; index += 1) {
        if (ys[index] < ys[low] || ys[low] === null) low = index;
        if (ys[index] > ys[high] || ys[high] === null) high = index;
      }
      kept.push(...[...new Set([first, low, high])].sort((one, other) => one - other));
    }
    return kept;
  }

  line(context, line, width) {
    const { xs, ys } = line;
    context.strokeStyle = line.color;
    context.fillStyle = line.color;
    context.lineWidth = width;
    const alone = [];
    const drawn = this.thinned(line);
    const isFrozen = (from, to) => spanAt(line.spans, (xs[from] + xs[to]) / 2, "frozen") !== null;
    for (const frozen of line.spans?.length ? [false, true] : [false]) {
      context.setLineDash(frozen ? [2.5, 3] : line.dashed ? [6, 4] : []);
      context.beginPath();
      let before = null;
      for (const index of drawn) {
        if (ys[index] === null) {
          before = null;
          continue;
        }
        const [x, y] = [this.toX(xs[index]), this.toY(ys[index])];
        before !== null && isFrozen(before, index) === frozen ? context.lineTo(x, y) : context.moveTo(x, y);
        if (before === null && (ys[index + 1] ?? null) === null) alone.push([x, y]);
        before = index;
      }
      context.stroke();
    }
    context.setLineDash([]);
    if (this.axes.xNames && xs.length < 60) xs.forEach((x, index) => ys[index] !== null && this.dot(context, this.toX(x), this.toY(ys[index]), line.held?.[index]));
    for (const [x, y] of alone) context.fillRect(x - 2.5, y - 2.5, 5, 5);
  }

  /** A point of a profile; hollow where the layer is frozen. */
  dot(context, x, y, isHollow) {
    context.fillRect(x - 2.5, y - 2.5, 5, 5);
    if (!isHollow) return;
    const color = context.fillStyle;
    context.fillStyle = themeColor("ground");
    context.fillRect(x - 2, y - 2, 4, 4);
    context.strokeStyle = context.fillStyle = color;
    context.lineWidth = 1.5;
    context.strokeRect(x - 3, y - 3, 6, 6);
  }

  /** On a line, where something was done to its layer; hollow where it ended. */
  marks(context, line) {
    const { x: [x0, x1] } = this.axes;
    for (const { what, start, end } of line.spans ?? []) {
      for (const [x, fill] of [[start, line.color], ...(end !== null && end !== start ? [[end, themeColor("ground")]] : [])]) {
        const y = x < x0 || x > x1 ? null : heightAt(line, x);
        if (y !== null) drawMark(context, what, this.toX(x), this.toY(y), 3.6, { fill, edge: themeColor("ink") });
      }
    }
  }

  band(context, { xs, low, high, color }) {
    const there = xs.map((_, index) => index).filter((index) => low[index] !== null && high[index] !== null);
    if (!there.length) return;
    context.globalAlpha = 0.18;
    context.fillStyle = color;
    context.beginPath();
    there.forEach((index, at) => context[at ? "lineTo" : "moveTo"](this.toX(xs[index]), this.toY(high[index])));
    there.reverse().forEach((index) => context.lineTo(this.toX(xs[index]), this.toY(low[index])));
    context.fill();
    context.globalAlpha = 1;
  }

  xAt(event) {
    return this.fromX(event.clientX - this.canvas.getBoundingClientRect().left);
  }

  hover(event) {
    if (!this.lines?.length) return;
    const box = this.canvas.getBoundingClientRect();
    const [x, y] = [this.fromX(event.clientX - box.left), event.clientY - box.top];
    let nearest = null;
    for (const line of this.lines) {
      const index = nearestIndex(line.xs, x);
      if (index < 0 || line.ys[index] === null) continue;
      const distance = Math.abs(this.toY(line.ys[index]) - y);
      if (!nearest || distance < nearest.distance) nearest = { line, index, distance };
    }
    this.point(nearest);
  }

  /** Values that are there: along a line with left and right, of the lines beside it with up and down. */
  walk(event) {
    const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    if (event.key === "Escape") return this.leave();
    if (event.key === "Enter" && this.hovered) return this.onPick?.(this.hovered.line.xs[this.hovered.index]);
    if (!(event.key in steps) || event.ctrlKey || event.altKey || event.metaKey || !this.lines?.length) return;
    event.preventDefault();
    const [down, right] = steps[event.key];
    if (!this.hovered) return this.point(this.first(this.lines, right < 0));
    const { line, index } = this.hovered;
    if (right) {
      let next = index + right;
      while (line.ys[next] === null) next += right;
      return next >= 0 && next < line.ys.length ? this.point({ line, index: next }) : undefined;
    }
    const at = this.lines.indexOf(line);
    const others = down < 0 ? this.lines.slice(0, at).reverse() : this.lines.slice(at + 1);
    const other = others.find((each) => (each.ys[nearestIndex(each.xs, line.xs[index])] ?? null) !== null);
    if (other) this.point({ line: other, index: nearestIndex(other.xs, line.xs[index]) });
  }

  /** The first value of the first line that has one, or its last. */
  first(lines, fromEnd) {
    const isThere = (value) => value !== null;
    const line = lines.find((each) => each.ys.some(isThere));
    return line ? { line, index: fromEnd ? line.ys.findLastIndex(isThere) : line.ys.findIndex(isThere) } : null;
  }

  point(found) {
    this.hovered = found;
    this.overlay();
    this.tooltip.hidden = !found;
    if (!found) return;
    const { line, index } = found;
    const place = this.axes.xNames ? this.axes.xNames[line.xs[index]] : `${this.axes.xLabel} ${line.xs[index]}`;
    const interval = line.low && line.low[index] !== null ? [["95 %", `${formatValue(line.low[index])} to ${formatValue(line.high[index])}`]] : [];
    const texts = [[line.name, this.axes.format(line.ys[index])], ...interval, ["at", place], ...(line.notes?.(index) ?? [])];
    this.tooltip.replaceChildren(definitions(texts));
    this.readout.textContent = texts.map((pair) => pair.join(" ")).join(", ");
    placeTooltip(this.tooltip, this.toX(line.xs[index]), this.toY(line.ys[index]), 6, this.width, this.height);
  }

  leave() {
    this.hovered = null;
    this.tooltip.hidden = true;
    this.overlay();
  }

  /** What changes with the pointer, over a picture of the rest. */
  overlay() {
    if (!this.width) return;
    const context = sizeCanvas(this.canvas, this.width, this.height);
    this.canvas.style.height = `${this.height}px`;
    context.save();
    context.setTransform(1, 0, 0, 1, 0, 0);
    if (this.hovered) context.globalAlpha = 0.45;
    context.drawImage(this.base, 0, 0);
    context.restore();
    if (this.marked !== undefined && this.marked !== null && !this.axes.xNames) {
      context.fillStyle = themeColor("accent");
      context.fillRect(Math.round(this.toX(this.marked)) - 1, 10, 2, this.height - 50);
    }
    if (!this.hovered) return;
    const { line, index } = this.hovered;
    if (line.low) this.band(context, line);
    this.line(context, line, 3);
    context.fillStyle = themeColor("ink");
    context.beginPath();
    context.arc(this.toX(line.xs[index]), this.toY(line.ys[index]), 4, 0, 7);
    context.fill();
  }
}

/** The height of a line at a place between its points; null where it has none. */
function heightAt({ xs, ys }, x) {
  const next = xs.findIndex((each) => each >= x);
  if (next < 0 || ys[next] === null) return null;
  if (xs[next] === x || next === 0) return xs[next] === x ? ys[next] : null;
  return ys[next - 1] === null ? null : ys[next - 1] + ((x - xs[next - 1]) / (xs[next] - xs[next - 1])) * (ys[next] - ys[next - 1]);
}

/** Where in ascending numbers the one nearest to `value` is. */
function nearestIndex(values, value) {
  if (!values.length) return -1;
  let [first, last] = [0, values.length - 1];
  while (last - first > 1) {
    const middle = (first + last) >> 1;
    values[middle] <= value ? (first = middle) : (last = middle);
  }
  return Math.abs(values[first] - value) <= Math.abs(values[last] - value) ? first : last;
}
