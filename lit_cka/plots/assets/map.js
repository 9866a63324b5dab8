"use strict";
// What the map shows: its state, points in words, and what follows from a change.

const data = JSON.parse(byId("data").textContent);
const floats = (text) => new Float32Array(Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)).buffer);
const points = data.points;
const cka = floats(data.cka);
const scatter = new Scatter(byId("scatter"), points, data.explained);
const names = { dataset: data.datasets, model: data.models };
const indices = points.map((_, index) => index);

const state = {
  colorBy: "dataset",
  off: { dataset: new Set(), model: new Set() },
  depths: [...scatter.depths],
  pairLinks: true,
  depthLines: true,
  hovered: null,
  active: null, // in the list
  selected: null,
  tab: 0,
  theme: "light",
};

// --- What belongs together -------------------------------------------------------------------------------------------

function grouped(keyOf) {
  const groups = new Map();
  for (const index of indices) {
    const key = keyOf(points[index]);
    if (!groups.has(key)) groups.set(key, []);
    groups.get(key).push(index);
  }
  return [...groups.values()];
}

// Model and dataset are numbers here, so that no name can imitate a separator.
const samePairs = grouped((point) => `${point.model} ${point.layer}`);
const layerPaths = grouped((point) => `${point.model} ${point.dataset}`);
for (const path of layerPaths) path.sort((one, other) => points[one].depth - points[other].depth);
const partners = new Map(samePairs.flatMap((group) => group.map((index) => [index, group.filter((other) => other !== index)])));

function isVisible(index) {
  const { dataset, model, depth } = points[index];
  const [first, last] = state.depths;
  return !state.off.dataset.has(dataset) && !state.off.model.has(model) && first <= depth && depth <= last;
}

const visiblePoints = () => indices.filter(isVisible);

function visibleLinks() {
  return samePairs.flatMap((group) => {
    const shown = group.filter(isVisible);
    return shown.flatMap((from, position) => shown.slice(position + 1).map((to) => [from, to]));
  });
}

/** The first and the last layer of each path that is shown: the map names them. */
function pathEnds() {
  const paths = layerPaths.map((path) => path.filter(isVisible)).filter((path) => path.length);
  return [...new Set(paths.flatMap((path) => [path[0], path.at(-1)]))];
}

function visiblePaths() {
  return layerPaths.flatMap((path) => {
    const shown = path.filter(isVisible);
    return shown.slice(1).map((to, position) => [shown[position], to]);
  });
}

// --- Points in words -------------------------------------------------------------------------------------------------

const shortLabel = ({ dataset, model, layer }) => `${layer} · ${data.datasets[dataset]} · ${data.models[model]}`;

function comparison(one, other) {
  const distance = Math.hypot(...points[one].position.map((value, axis) => value - points[other].position[axis]));
  return `CKA ${formatValue(cka[one * points.length + other])}, distance ${formatNumber(distance)}`;
}

function description(index) {
  const { dataset, model, layer, depth } = points[index];
  return [["layer", `${layer} (depth ${depth})`], ["model", data.models[model]], ["dataset", data.datasets[dataset]]];
}

const pairTexts = (index) => partners.get(index).map((other) => [`with ${data.datasets[points[other].dataset]}`, comparison(index, other)]);

function selectionTexts(index) {
  return state.selected === null || state.selected === index ? [] : [["with selected", comparison(index, state.selected)]];
}

function say(text) {
  byId("live").textContent = text;
}

const spoken = (texts) => texts.map(([term, text]) => `${term}: ${text}`).join("; ");

// --- Drawing ---------------------------------------------------------------------------------------------------------

let requested = false;

function redraw() {
  if (requested) return;
  requested = true;
  requestAnimationFrame(() => {
    requested = false;
    draw();
  });
}

function draw() {
  const shapeBy = state.colorBy === "dataset" ? "model" : "dataset";
  const marked = [state.hovered, state.selected].filter((index) => index !== null);
  scatter.draw({
    visible: visiblePoints(),
    colorOf: (point) => categoryColor(point[state.colorBy], state.theme),
    shapeOf: (point) => point[shapeBy],
    links: state.pairLinks ? visibleLinks() : [],
    paths: state.depthLines ? visiblePaths() : [],
    hovered: state.hovered,
    selected: state.selected,
    labels: pathEnds(),
    related: new Set(marked.flatMap((index) => partners.get(index))),
  });
  const tooltip = byId("tooltip");
  if (!tooltip.hidden) {
    const place = scatter.project(points[state.hovered].position);
    const { clientWidth, clientHeight } = scatter.canvas;
    placeTooltip(tooltip, place.x, place.y, 8, clientWidth, clientHeight);
  }
}

function swatch(by, index) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "-1.5 -1.5 3 3");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  const colored = state.colorBy === by;
  path.setAttribute("d", SHAPES[colored ? 0 : index % SHAPES.length]);
  path.setAttribute("fill", colored ? categoryColor(index, state.theme) : themeColor("soft"));
  svg.append(path);
  return svg;
}

function drawLegend() {
  for (const by of ["dataset", "model"]) {
    for (const label of document.querySelectorAll(`#filter-${by} label`)) {
      label.querySelector("svg").replaceWith(swatch(by, Number(label.dataset.index)));
    }
  }
}

// --- Changes of state ------------------------------------------------------------------------------------------------

function hover(index) {
  if (index === state.hovered) return;
  state.hovered = index;
  const tooltip = byId("tooltip");
  tooltip.hidden = index === null;
  if (index !== null) {
    tooltip.replaceChildren(definitions([...description(index), ...pairTexts(index), ...selectionTexts(index)]));
  }
  redraw();
}

function select(index) {
  state.selected = index === state.selected ? null : index;
  const shown = state.selected === null
    ? [element("p", {}, "None: click a point, or press Enter in the list, and all others say how similar they are to it.")]
    : [definitions([...description(index), ...pairTexts(index)])];
  byId("selected").replaceChildren(...shown);
  byId("clear").hidden = state.selected === null;
  for (const item of byId("list").children) {
    item.setAttribute("aria-selected", String(Number(item.dataset.index) === state.selected));
  }
  say(state.selected === null ? "Nothing is selected." : `Selected: ${shortLabel(points[index])}.`);
  const hovered = state.hovered;
  hover(null);
  hover(hovered);
  redraw();
}

function filter() {
  const visible = visiblePoints();
  const count = visible.length === points.length ? `${points.length}` : `${visible.length} of ${points.length}`;
  byId("count").textContent = visible.length ? `${count} points` : `No point of ${points.length}: widen the filters.`;
  for (const item of byId("list").children) item.hidden = !isVisible(Number(item.dataset.index));
  if ([state.hovered, state.active].some((index) => index !== null && !isVisible(index))) activate(null);
  if (state.selected !== null && !isVisible(state.selected)) select(null);
  redraw();
}

function setTheme(theme) {
  state.theme = theme;
  document.documentElement.dataset.theme = theme;
  byId("theme").textContent = `Switch to ${theme === "dark" ? "light" : "dark"}`;
  drawLegend();
  redraw();
  heatmaps.get(state.tab)?.draw();
}
