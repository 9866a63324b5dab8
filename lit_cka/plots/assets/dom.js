"use strict";
// Elements and numbers as text.

const byId = (id) => document.getElementById(id);

/** Names come from models and data: they become text, never markup. */
function element(tag, properties, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "role") node.setAttribute("role", value);
    else node[name] = value;
  }
  node.append(...children);
  return node;
}

function definitions(pairs) {
  return element("dl", {}, ...pairs.flatMap(([term, text]) => [element("dt", {}, term), element("dd", {}, text)]));
}

/** hints: sentences by the name of a column, or by what a row's first cell says, on hover. */
function dataTable(name, columns, rows, format = formatNumber, hints = {}) {
  const hint = (text) => (Object.hasOwn(hints, text) ? { title: hints[text] } : {});
  const cell = (value, column) => {
    const tag = column === 0 ? "th" : "td";
    if (typeof value === "string") return element(tag, column === 0 ? { scope: "row", ...hint(value) } : {}, value);
    return element(tag, { className: "number" }, format(value ?? NaN));
  };
  const numeric = (column) => rows.some((row) => typeof row[column] === "number");
  const head = columns.map((column, index) => element("th", { scope: "col", className: numeric(index) ? "number" : "", ...hint(column) }, column));
  const table = element(
    "table", {},
    element("caption", {}, name),
    element("thead", {}, element("tr", {}, ...head)),
    element("tbody", {}, ...rows.map((row) => element("tr", {}, ...row.map(cell)))),
  );
  return element("div", { className: "table" }, table); // which scrolls within
}

/** Beside (x, y) of its parent, inside a parent of this size where that is possible. */
function placeTooltip(tooltip, x, y, gap, width, height) {
  const left = x + gap + 8 + tooltip.offsetWidth <= width ? x + gap + 8 : Math.max(0, x - gap - 8 - tooltip.offsetWidth);
  const top = Math.max(0, Math.min(y + gap, height - tooltip.offsetHeight));
  tooltip.style.transform = `translate(${Math.round(left)}px, ${Math.round(top)}px)`;
}

/** A similarity. */
function formatValue(value) {
  if (!Number.isFinite(value)) return "undefined";
  const text = value.toFixed(3);
  // Rounding must not make nearly the same out to be the same; float32 is exact to 1e-7.
  if (text === "1.000" && value < 1 - 1e-6) return "> 0.999";
  return minus(text);
}

/** Any other number. */
function formatNumber(value) {
  if (!Number.isFinite(value)) return "undefined";
  if (Number.isInteger(value)) return minus(String(value));
  const size = Math.abs(value);
  return minus(size >= 1e6 || size < 1e-3 ? value.toExponential(2) : value.toFixed(3));
}

const minus = (text) => text.replaceAll("-", "−");
