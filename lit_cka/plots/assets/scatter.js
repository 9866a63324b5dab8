"use strict";
// Points in space on a 2D canvas: the projection, the drawing, and which point is where on the screen.

// Marks as SVG paths of radius 1, for the canvas and for the legend.
const SHAPES = [
  "M1 0A1 1 0 1 1-1 0A1 1 0 1 1 1 0Z",
  "M-.88-.88H.88V.88H-.88Z",
  "M0-1.15L1.1.85H-1.1Z",
  "M0-1.25L1.25 0 0 1.25-1.25 0Z",
  "M0 1.15L1.1-.85H-1.1Z",
  "M-.4-1.15H.4V-.4H1.15V.4H.4V1.15H-.4V.4H-1.15V-.4H-.4Z",
  "M-1.15 0L-.58-1H.58L1.15 0 .58 1H-.58Z",
  "M0-1.3L.38-.5 1.25-.4.6.2.78 1.05 0 .62-.78 1.05-.6.2-1.25-.4-.38-.5Z",
];
// Told apart by colour-blind readers, and at least 3:1 against the ground of their theme.
const PALETTES = {
  light: ["#0072b2", "#d55e00", "#007a5a", "#a8327a", "#7a6000", "#6a4fc0", "#b3202c", "#4a4f57"],
  dark: ["#5bb8f0", "#ff9447", "#2fd6a3", "#f490c8", "#f0e05a", "#b9a3ff", "#ff7f7f", "#c9ced6"],
};

function categoryColor(index, theme) {
  const lightness = theme === "dark" ? 70 : 38;
  return PALETTES[theme][index] ?? `hsl(${Math.round(index * 137.5) % 360} 65% ${lightness}%)`;
}

class Scatter {
  static INITIAL = { yaw: -0.6, pitch: 0.4, zoom: 1, panX: 0, panY: 0 };
  static CAMERA = 5; // distance of the eye, in radii of the scene

  constructor(canvas, points, explained) {
    this.canvas = canvas;
    this.points = points;
    this.explained = explained;
    this.view = { ...Scatter.INITIAL };
    this.paths = SHAPES.map((shape) => new Path2D(shape));
    this.low = [0, 1, 2].map((axis) => Math.min(...points.map((point) => point.position[axis])));
    this.high = [0, 1, 2].map((axis) => Math.max(...points.map((point) => point.position[axis])));
    // One scale for all axes: distances on the screen are distances between representations.
    this.radius = Math.hypot(...this.low.map((low, axis) => this.high[axis] - low)) / 2 || 1;
    const depths = points.map((point) => point.depth);
    this.depths = [Math.min(...depths), Math.max(...depths)];
  }

  /** Screen coordinates in the canvas, nearness to the eye in [-1, 1], and magnification. */
  project(position) {
    const { yaw, pitch, zoom, panX, panY } = this.view;
    const [x, y, z] = position.map((value, axis) => (value - (this.low[axis] + this.high[axis]) / 2) / this.radius);
    const across = x * Math.cos(yaw) + z * Math.sin(yaw);
    const toward = z * Math.cos(yaw) - x * Math.sin(yaw);
    const up = y * Math.cos(pitch) - toward * Math.sin(pitch);
    const near = y * Math.sin(pitch) + toward * Math.cos(pitch);
    const magnification = Scatter.CAMERA / (Scatter.CAMERA - near);
    const { clientWidth: width, clientHeight: height } = this.canvas;
    const scale = 0.5 * Math.min(width, height) * zoom * magnification;
    return { x: width / 2 + panX + across * scale, y: height / 2 + panY - up * scale, near, magnification };
  }

  rotate(yaw, pitch) {
    const limit = Math.PI / 2;
    this.view.yaw = (this.view.yaw + yaw) % (2 * Math.PI);
    this.view.pitch = Math.max(-limit, Math.min(limit, this.view.pitch + pitch));
  }

  /** What is at (x, y) of the canvas stays there. */
  zoom(factor, x = this.canvas.clientWidth / 2, y = this.canvas.clientHeight / 2) {
    const zoom = Math.max(0.3, Math.min(40, this.view.zoom * factor));
    const change = zoom / this.view.zoom;
    const offsetX = x - this.canvas.clientWidth / 2, offsetY = y - this.canvas.clientHeight / 2;
    this.view.zoom = zoom;
    this.view.panX = offsetX - (offsetX - this.view.panX) * change;
    this.view.panY = offsetY - (offsetY - this.view.panY) * change;
  }

  move(x, y) {
    this.view.panX += x;
    this.view.panY += y;
  }

  reset() {
    this.view = { ...Scatter.INITIAL };
  }

  /** Index of the visible point nearest to (x, y), the one in front if they coincide; null if all are further. */
  pick(x, y, visible, reach) {
    let best = null, least = reach;
    for (const index of visible) {
      const place = this.project(this.points[index].position);
      const distance = Math.hypot(place.x - x, place.y - y) - 0.01 * place.near;
      if (distance < least) [best, least] = [index, distance];
    }
    return best;
  }

  /**
   * scene: visible, colorOf(point), shapeOf(point), links and paths as pairs of indices, hovered, selected, related, and
   * labels, the indices of points to name.
   */
  draw(scene) {
    const { clientWidth: width, clientHeight: height } = this.canvas;
    if (!width) return;
    const context = sizeCanvas(this.canvas, width, height);
    const places = this.points.map((point) => this.project(point.position));
    this.drawBox(context);
    context.lineCap = "round";
    for (const [from, to] of scene.paths) {
      this.line(context, places[from], places[to], scene.colorOf(this.points[from]), 1.5, 0.55);
    }
    const [link, accent] = [themeColor("link"), themeColor("accent")];
    for (const [from, to] of scene.links) {
      const marked = [from, to].some((index) => index === scene.hovered || index === scene.selected);
      this.line(context, places[from], places[to], marked ? accent : link, marked ? 2.5 : 1, marked ? 1 : 0.65, [4, 3]);
    }
    const nearest = [...scene.visible].sort((one, other) => places[one].near - places[other].near);
    for (const index of nearest) this.drawPoint(context, index, places[index], scene);
    this.drawLabels(context, scene.labels, places);
    for (const index of [scene.selected, scene.hovered]) {
      if (index !== null && scene.visible.includes(index)) this.drawPoint(context, index, places[index], scene);
    }
  }

  /** Names beside their points, those in front first; a name that would cover another is left out. */
  drawLabels(context, labels, places) {
    const { clientWidth: width, clientHeight: height } = this.canvas;
    const taken = [];
    context.font = "12px system-ui, 'DejaVu Sans', sans-serif";
    context.textAlign = "left";
    context.textBaseline = "middle";
    context.lineWidth = 3;
    context.lineJoin = "round";
    for (const index of [...labels].sort((one, other) => places[other].near - places[one].near)) {
      const text = shortened(this.points[index].layer);
      const size = context.measureText(text).width;
      const { x, y } = places[index];
      const left = x + 12 + size <= width ? x + 12 : x - 12 - size;
      const isFree = taken.every((box) => Math.abs(box.y - y) > 14 || left > box.right || left + size < box.left);
      if (!isFree || left < 0 || y < 8 || y > height - 8) continue;
      taken.push({ left, right: left + size, y });
      context.strokeStyle = themeColor("ground");
      context.strokeText(text, left, y);
      context.fillStyle = themeColor("ink");
      context.fillText(text, left, y);
    }
    this.labelled = taken.length;
  }

  line(context, from, to, color, width, alpha, dashes = []) {
    context.globalAlpha = alpha * (0.75 + 0.25 * ((from.near + to.near) / 2));
    context.strokeStyle = color;
    context.lineWidth = width;
    context.setLineDash(dashes);
    context.beginPath();
    context.moveTo(from.x, from.y);
    context.lineTo(to.x, to.y);
    context.stroke();
    context.globalAlpha = 1;
    context.setLineDash([]);
  }

  drawPoint(context, index, place, scene) {
    const point = this.points[index];
    const [first, last] = this.depths;
    const deep = last > first ? (point.depth - first) / (last - first) : 0.5;
    const marked = index === scene.hovered || index === scene.selected;
    const size = (4 + 3.5 * deep) * place.magnification;
    context.save();
    context.translate(place.x, place.y);
    context.globalAlpha = marked ? 1 : 0.8 + 0.2 * place.near;
    context.scale(size, size);
    context.fillStyle = scene.colorOf(point);
    context.strokeStyle = themeColor("ground");
    context.lineWidth = 1.2 / size;
    context.fill(this.paths[scene.shapeOf(point) % this.paths.length]);
    context.stroke(this.paths[scene.shapeOf(point) % this.paths.length]);
    if (marked || scene.related.has(index)) {
      context.globalAlpha = 1;
      context.strokeStyle = themeColor(index === scene.selected ? "accent" : "ink");
      context.lineWidth = (marked ? 2.5 : 1.5) / size;
      context.beginPath();
      context.arc(0, 0, 1.35 + 3 / size, 0, 2 * Math.PI);
      context.stroke();
    }
    context.restore();
  }

  /** The box around all points, and its three edges that carry the axes. */
  drawBox(context) {
    const corner = (bits) => [0, 1, 2].map((axis) => (bits & (1 << axis) ? this.high : this.low)[axis]);
    const line = themeColor("line");
    for (const axis of [0, 1, 2]) {
      const edges = [0, 1, 2, 3, 4, 5, 6, 7]
        .filter((bits) => !(bits & (1 << axis)))
        .map((bits) => [corner(bits), corner(bits | (1 << axis))]);
      for (const [from, to] of edges) this.line(context, this.project(from), this.project(to), line, 1, 1);
      if (this.high[axis] - this.low[axis] > 1e-6 * this.radius) this.drawAxis(context, axis, edges);
    }
  }

  drawAxis(context, axis, edges) {
    const middle = ([from, to]) => this.project(from.map((value, other) => (value + to[other]) / 2));
    const outermost = (place) => (axis === 1 ? -place.x : place.y);
    const [from, to] = edges.reduce((best, edge) => (outermost(middle(edge)) > outermost(middle(best)) ? edge : best));
    const center = this.project(this.low.map((low, other) => (low + this.high[other]) / 2));
    const [start, end] = [this.project(from), this.project(to)];
    const length = Math.hypot(end.x - start.x, end.y - start.y);
    if (length < 60) return; // seen from its end
    // Labels stand off the edge, on the side away from the box.
    let across = { x: (start.y - end.y) / length, y: (end.x - start.x) / length };
    const half = { x: (start.x + end.x) / 2, y: (start.y + end.y) / 2 };
    if (across.x * (half.x - center.x) + across.y * (half.y - center.y) < 0) across = { x: -across.x, y: -across.y };
    context.fillStyle = themeColor("soft");
    context.textAlign = "center";
    context.textBaseline = "middle";
    context.font = "12px system-ui, 'DejaVu Sans', sans-serif";
    const step = niceStep(Math.max(...this.high.map((high, other) => high - this.low[other])) / 6);
    for (let count = Math.ceil(this.low[axis] / step); count * step <= this.high[axis]; count += 1) {
      const tick = count * step;
      const position = [...from];
      position[axis] = tick;
      const place = this.project(position);
      const foot = { ...place, x: place.x + 4 * across.x, y: place.y + 4 * across.y };
      this.line(context, place, foot, themeColor("soft"), 1, 1);
      const text = minus(String(Number(tick.toPrecision(3))));
      const away = 8 + 0.5 * context.measureText(text).width * Math.abs(across.x) + 6 * Math.abs(across.y);
      context.fillText(text, place.x + away * across.x, place.y + away * across.y);
    }
    const share = this.explained[axis];
    const label = `PC${axis + 1}${share === null ? "" : ` (${(100 * share).toFixed(1)} %)`}`;
    context.fillStyle = themeColor("ink");
    context.font = "600 13px system-ui, 'DejaVu Sans', sans-serif";
    const clamp = (value, margin, size) => Math.max(margin, Math.min(size - margin, value));
    const margin = context.measureText(label).width / 2 + 4;
    if (axis === 1) {
      // Above the upright axis, where neither ticks nor points are.
      const tip = start.y < end.y ? start : end;
      context.fillText(label, clamp(tip.x, margin, this.canvas.clientWidth), tip.y - 14);
      return;
    }
    const reach = 14 + (34 + 0.5 * context.measureText(label).width) * Math.abs(across.x) + 22 * Math.abs(across.y);
    context.fillText(
      label,
      clamp(half.x + reach * across.x, margin, this.canvas.clientWidth),
      clamp(half.y + reach * across.y, 10, this.canvas.clientHeight),
    );
  }
}

/** A name without its middle, where it is long. */
const shortened = (name) => (name.length > 24 ? `${name.slice(0, 11)}…${name.slice(-12)}` : name);

/** 1, 2 or 5 times a power of ten, at least `least`. */
function niceStep(least) {
  const power = 10 ** Math.floor(Math.log10(least));
  return power * [1, 2, 5, 10].find((factor) => factor * power >= least);
}
