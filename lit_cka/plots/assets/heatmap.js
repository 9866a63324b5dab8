"use strict";
// A matrix of values in [0, 1] on a canvas: hovered, or walked through with the arrow keys; and as a table.

class Heatmap {
  constructor(panel, matrix, colormap) {
    this.matrix = matrix;
    this.colormap = colormap;
    this.cursor = null;
    const label = `${matrix.name}: ${matrix.rows.length} rows, ${matrix.columns.length} columns. Arrow keys walk through the cells.`;
    this.canvas = element("canvas", { tabIndex: 0, role: "application", ariaRoleDescription: "heatmap", ariaLabel: label });
    this.readout = element("p", { className: "value", role: "status" }, "Hover a cell, or walk with the arrow keys.");
    this.tooltip = element("div", { className: "tooltip", hidden: true });
    this.scroll = element("div", { className: "scroll" }, this.canvas);
    this.body = element("div", { className: "matrix" }, element("h2", {}, matrix.name), this.readout, this.scroll, this.tooltip);
    panel.append(this.body, this.table());
    this.canvas.addEventListener("pointermove", (event) => this.point(this.cellAt(event)));
    this.canvas.addEventListener("pointerleave", () => this.point(null));
    this.canvas.addEventListener("blur", () => this.point(null));
    this.canvas.addEventListener("keydown", (event) => this.walk(event));
    this.scroll.addEventListener("scroll", () => (this.tooltip.hidden = true));
  }

  value(row, column) {
    return this.matrix.values[row * this.matrix.columns.length + column];
  }

  cellAt(event) {
    const box = this.canvas.getBoundingClientRect();
    const row = Math.floor((event.clientY - box.top - this.top) / this.cell);
    const column = Math.floor((event.clientX - box.left - this.left) / this.cell);
    const inside = row >= 0 && column >= 0 && row < this.matrix.rows.length && column < this.matrix.columns.length;
    return inside ? [row, column] : null;
  }

  /** The cell's centre in the window, for whoever wants to point at it. */
  clientPosition(row, column) {
    const box = this.canvas.getBoundingClientRect();
    return [box.left + this.left + (column + 0.5) * this.cell, box.top + this.top + (row + 0.5) * this.cell];
  }

  walk(event) {
    const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    if (event.key === "Escape") return this.point(null);
    if (!(event.key in steps) || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    if (!this.cursor) return this.point([0, 0], true);
    const bound = (value, count) => Math.max(0, Math.min(count - 1, value));
    const [down, right] = steps[event.key];
    const [row, column] = this.cursor;
    this.point([bound(row + down, this.matrix.rows.length), bound(column + right, this.matrix.columns.length)], true);
  }

  point(cursor, bring = false) {
    if (String(cursor) === String(this.cursor)) return;
    this.cursor = cursor;
    this.draw();
    this.tooltip.hidden = !cursor;
    if (!cursor) return;
    const [row, column] = cursor;
    const value = formatValue(this.value(row, column));
    const [rowName, columnName] = [this.matrix.rows[row], this.matrix.columns[column]];
    this.readout.textContent = `${value}: ${rowName} × ${columnName}`;
    this.tooltip.replaceChildren(definitions([["row", rowName], ["column", columnName], ["value", value]]));
    if (bring) {
      const [first, last] = [this.left + (column - 1) * this.cell, this.left + (column + 2) * this.cell];
      this.scroll.scrollLeft = Math.min(Math.max(this.scroll.scrollLeft, last - this.scroll.clientWidth), first);
    }
    const below = this.clientPosition(row, column)[1] + this.cell - window.innerHeight;
    if (bring && below > 0) window.scrollBy(0, below);
    const [x, y] = this.clientPosition(row, column);
    const box = this.body.getBoundingClientRect();
    placeTooltip(this.tooltip, x - box.left, y - box.top, this.cell / 2, box.width, box.height);
  }

  draw() {
    const { rows, columns } = this.matrix;
    const measure = this.canvas.getContext("2d");
    measure.font = FONT;
    const width = this.scroll.clientWidth - 8;
    if (width <= 0) return;
    const longest = (names, most) => Math.min(most, Math.max(...names.map((name) => measure.measureText(name.slice(0, 200)).width)));
    const [labelWidth, labelHeight] = [longest(rows, Math.min(220, width / 4)), longest(columns, 170)];
    const bar = 78;
    const least = Math.max(1, Math.min(4, Math.floor(3000 / Math.max(rows.length, columns.length))));
    const fitting = Math.floor((width - labelWidth - 8 - bar) / columns.length);
    this.cell = Math.max(least, Math.min(46, fitting, Math.max(14, Math.floor((window.innerHeight - 300) / rows.length))));
    [this.left, this.top] = [Math.ceil(labelWidth) + 8, 8];
    const [gridWidth, gridHeight] = [this.cell * columns.length, this.cell * rows.length];
    const barHeight = Math.max(gridHeight, 110);
    const total = [this.left + gridWidth + bar, Math.max(this.top + gridHeight + labelHeight + 10, barHeight + 30)];
    [this.canvas.style.width, this.canvas.style.height] = total.map((pixels) => `${pixels}px`);
    const context = sizeCanvas(this.canvas, ...total);
    context.font = FONT;
    this.drawCells(context);
    this.drawLabels(context, labelWidth, labelHeight, gridHeight);
    this.drawBar(context, this.left + gridWidth + 18, barHeight);
    if (this.cursor) {
      const [row, column] = this.cursor;
      const [x, y] = [this.left + column * this.cell, this.top + row * this.cell];
      for (const [color, lineWidth] of [["#000000", 4], ["#ffffff", 2]]) {
        [context.strokeStyle, context.lineWidth] = [color, lineWidth];
        context.strokeRect(x, y, this.cell, this.cell);
      }
    }
  }

  drawCells(context) {
    const { rows, columns } = this.matrix;
    context.textAlign = "center";
    context.textBaseline = "middle";
    const numbered = this.cell >= 32;
    rows.forEach((_, row) => columns.forEach((__, column) => {
      const value = this.value(row, column);
      const [x, y] = [this.left + column * this.cell, this.top + row * this.cell];
      context.fillStyle = this.color(value);
      // A hair wider: no seams between cells at fractional pixel ratios.
      context.fillRect(x, y, this.cell + (column + 1 < columns.length ? 0.5 : 0), this.cell + (row + 1 < rows.length ? 0.5 : 0));
      if (numbered && Number.isFinite(value)) {
        context.fillStyle = value > 0.48 ? "#000000" : "#ffffff";
        context.fillText(minus(value.toFixed(2)), x + this.cell / 2, y + this.cell / 2);
      }
    }));
  }

  color(value) {
    if (!Number.isFinite(value)) return themeColor("undefined");
    return this.colormap[Math.round(255 * Math.max(0, Math.min(1, value)))];
  }

  drawLabels(context, labelWidth, labelHeight, gridHeight) {
    const { rows, columns } = this.matrix;
    const every = Math.ceil(14 / this.cell);
    context.fillStyle = themeColor("ink");
    context.textAlign = "right";
    rows.forEach((name, row) => {
      if (row % every) return;
      context.fillText(fitText(context, name, labelWidth), this.left - 6, this.top + (row + 0.5) * this.cell);
    });
    columns.forEach((name, column) => {
      if (column % every) return;
      context.save();
      context.translate(this.left + (column + 0.5) * this.cell, this.top + gridHeight + 6);
      context.rotate(-Math.PI / 2);
      context.fillText(fitText(context, name, labelHeight), 0, 0);
      context.restore();
    });
  }

  drawBar(context, x, height) {
    for (let row = 0; row < height; row += 1) {
      context.fillStyle = this.color(1 - row / (height - 1));
      context.fillRect(x, this.top + row, 14, 1);
    }
    context.fillStyle = themeColor("ink");
    context.textAlign = "left";
    for (const tick of [0, 0.25, 0.5, 0.75, 1]) {
      const y = this.top + (1 - tick) * height;
      context.fillText(String(tick), x + 19, Math.max(this.top + 6, Math.min(this.top + height - 5, y)));
    }
    if (this.matrix.values.every(Number.isFinite)) return;
    context.fillStyle = themeColor("undefined");
    context.fillRect(x, this.top + height + 9, 14, 12);
    context.fillStyle = themeColor("ink");
    context.fillText("none", x + 19, this.top + height + 15);
  }

  /** Made when it is opened: it has as many cells as the matrix. */
  table() {
    const { name, rows, columns } = this.matrix;
    const details = element("details", {}, element("summary", {}, "As a table"));
    details.addEventListener("toggle", () => {
      if (details.childElementCount > 1) return;
      const cells = rows.map((row, index) => [row, ...columns.map((_, column) => this.value(index, column))]);
      details.append(element("div", { className: "scroll", tabIndex: 0 }, dataTable(name, ["", ...columns], cells, formatValue)));
    });
    return details;
  }
}
