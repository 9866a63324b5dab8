"use strict";
// What the reader does: filters, the list of points for keyboard and screen reader, pointers and keys on the map, tabs.

// --- Controls --------------------------------------------------------------------------------------------------------

function buildFilter(by) {
  const fieldset = byId(`filter-${by}`);
  const boxes = names[by].map((name, index) => {
    const box = element("input", { type: "checkbox", checked: true });
    box.addEventListener("change", () => {
      state.off[by][box.checked ? "delete" : "add"](index);
      filter();
    });
    const label = element("label", { title: name }, box, swatch(by, index), element("span", { className: "name" }, name));
    label.dataset.index = index;
    fieldset.append(label);
    return box;
  });
  if (boxes.length < 4) return;
  const setAll = (checked) => () => {
    for (const box of boxes) box.checked = checked;
    state.off[by] = new Set(checked ? [] : boxes.keys());
    filter();
  };
  const buttons = ["All", "None"].map((text) => element("button", { type: "button", ariaLabel: `${text} of the ${by}s` }, text));
  buttons[0].addEventListener("click", setAll(true));
  buttons[1].addEventListener("click", setAll(false));
  fieldset.querySelector("legend").after(element("div", { className: "all" }, ...buttons));
}

function buildDepths() {
  const sliders = [byId("depth-first"), byId("depth-last")];
  const show = () => sliders.forEach((slider, end) => {
    slider.value = state.depths[end];
    slider.nextElementSibling.textContent = state.depths[end];
  });
  sliders.forEach((slider, end) => {
    [slider.min, slider.max] = scatter.depths;
    slider.addEventListener("input", () => {
      const value = Number(slider.value);
      // One end pushes the other along.
      state.depths = end === 0 ? [value, Math.max(value, state.depths[1])] : [Math.min(value, state.depths[0]), value];
      show();
      filter();
    });
  });
  show();
}

function buildControls() {
  // A reloaded page must not keep boxes of the last visit: the state starts anew.
  byId("controls").reset();
  byId("controls").addEventListener("submit", (event) => event.preventDefault());
  for (const radio of document.querySelectorAll("input[name=color]")) {
    radio.addEventListener("change", () => {
      state.colorBy = radio.value;
      drawLegend();
      redraw();
    });
  }
  for (const [id, key] of [["pair-links", "pairLinks"], ["depth-lines", "depthLines"]]) {
    byId(id).addEventListener("change", (event) => {
      state[key] = event.target.checked;
      redraw();
    });
  }
  buildFilter("dataset");
  buildFilter("model");
  buildDepths();
  byId("clear").addEventListener("click", () => {
    select(null);
    byId("list").focus();
  });
}

// --- The list of points ----------------------------------------------------------------------------------------------

/** Scroll the list, and nothing around it. */
function showInList(index) {
  const [list, item] = [byId("list"), byId(`point-${index}`)];
  const top = item.offsetTop - list.offsetTop - 4;
  const bottom = top + item.offsetHeight + 10 - list.clientHeight;
  list.scrollTop = Math.min(Math.max(list.scrollTop, bottom), top);
}

/** Make this the list's current point, and hover it; null for none. */
function activate(index) {
  state.active = index;
  const list = byId("list");
  list.querySelector(".active")?.classList.remove("active");
  list.removeAttribute("aria-activedescendant");
  hover(index);
  if (index === null) return;
  const item = byId(`point-${index}`);
  item.classList.add("active");
  list.setAttribute("aria-activedescendant", item.id);
  showInList(index);
  say(spoken([...pairTexts(index), ...selectionTexts(index)]));
}

function buildList() {
  const list = byId("list");
  list.append(...indices.map((index) => {
    const { dataset, model, layer } = points[index];
    const item = element(
      "li", { id: `point-${index}`, role: "option", title: shortLabel(points[index]) },
      element("span", {}, `${layer} · ${data.datasets[dataset]}`), element("small", {}, data.models[model]),
    );
    item.dataset.index = index;
    item.setAttribute("aria-selected", "false");
    item.addEventListener("pointerenter", () => hover(index));
    item.addEventListener("pointerleave", () => hover(null));
    item.addEventListener("click", () => {
      select(index);
      if (isVisible(index)) activate(index);
    });
    return item;
  }));
  list.addEventListener("keydown", (event) => {
    const visible = visiblePoints();
    if (!visible.length || event.ctrlKey || event.altKey || event.metaKey) return;
    const current = visible.indexOf(state.active);
    const last = visible.length - 1;
    const targets = {
      ArrowDown: Math.min(last, current + 1), ArrowUp: Math.max(0, current - 1), Home: 0, End: last,
      PageDown: Math.min(last, current + 10), PageUp: Math.max(0, current - 10),
    };
    if (event.key in targets) activate(visible[targets[event.key]]);
    else if ((event.key === "Enter" || event.key === " ") && current >= 0) select(state.active);
    else return;
    event.preventDefault();
  });
  list.addEventListener("focus", () => {
    // A click decides for itself which point it is.
    if (!list.matches(":focus-visible")) return;
    activate(state.selected ?? visiblePoints()[0] ?? null);
  });
  list.addEventListener("blur", () => activate(null));
}

// --- The canvas ------------------------------------------------------------------------------------------------------

const STEP = Math.PI / 24;
const VIEW_ACTIONS = { in: () => scatter.zoom(1.25), out: () => scatter.zoom(0.8), reset: () => scatter.reset() };

function onViewKey(event) {
  if (event.ctrlKey || event.altKey || event.metaKey) return;
  const directions = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  const zooms = { "+": "in", "=": "in", "-": "out", _: "out", 0: "reset" };
  if (event.key in directions) {
    const [right, down] = directions[event.key];
    if (event.shiftKey) scatter.move(20 * right, 20 * down);
    else scatter.rotate(STEP * right, STEP * down);
  } else if (event.key in zooms) {
    VIEW_ACTIONS[zooms[event.key]]();
  } else {
    return;
  }
  event.preventDefault();
  redraw();
}

function buildCanvas() {
  const canvas = scatter.canvas;
  canvas.setAttribute("aria-label", `${points.length} points. The list of points says the same in words.`);
  const fingers = new Map();
  let travelled = 0;
  const local = (event) => {
    const box = canvas.getBoundingClientRect();
    return { x: event.clientX - box.left, y: event.clientY - box.top };
  };
  const at = (event) => {
    const { x, y } = local(event);
    return scatter.pick(x, y, visiblePoints(), event.pointerType === "touch" ? 22 : 13);
  };
  const spread = () => {
    const [one, other] = [...fingers.values()];
    return Math.hypot(one.x - other.x, one.y - other.y);
  };
  canvas.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    canvas.setPointerCapture(event.pointerId);
    if (!fingers.size) travelled = 0;
    fingers.set(event.pointerId, local(event));
  });
  canvas.addEventListener("pointermove", (event) => {
    const before = fingers.get(event.pointerId);
    if (!before) return hover(at(event));
    const now = local(event);
    const [right, down] = [now.x - before.x, now.y - before.y];
    const spreadBefore = fingers.size === 2 ? spread() : null;
    fingers.set(event.pointerId, now);
    travelled += Math.hypot(right, down);
    // The hand of a click trembles.
    if (travelled < 4) return;
    hover(null);
    if (spreadBefore) scatter.zoom(spread() / spreadBefore, now.x, now.y);
    else if (event.shiftKey) scatter.move(right, down);
    else scatter.rotate(right * 0.008, down * 0.008);
    redraw();
  });
  canvas.addEventListener("pointerup", (event) => {
    if (!fingers.delete(event.pointerId) || travelled >= 4) return;
    const index = at(event);
    select(index);
    hover(index);
    if (state.selected !== null) showInList(state.selected);
  });
  canvas.addEventListener("pointercancel", (event) => fingers.delete(event.pointerId));
  canvas.addEventListener("pointerleave", () => hover(null));
  canvas.addEventListener("wheel", (event) => {
    // Until the map has the focus, the wheel scrolls the page past it.
    if (document.activeElement !== canvas) return;
    event.preventDefault();
    const { x, y } = local(event);
    scatter.zoom(Math.exp(-Math.max(-100, Math.min(100, event.deltaY)) * 0.002), x, y);
    redraw();
  }, { passive: false });
  canvas.addEventListener("keydown", onViewKey);
  for (const button of document.querySelectorAll("[data-view]")) {
    button.addEventListener("click", () => {
      VIEW_ACTIONS[button.dataset.view]();
      redraw();
    });
  }
  new ResizeObserver(redraw).observe(canvas);
}

// --- Tabs ------------------------------------------------------------------------------------------------------------

const heatmaps = new Map();

function openTab(index) {
  state.tab = index;
  [...byId("tabs").children].forEach((tab, position) => {
    tab.setAttribute("aria-selected", String(position === index));
    tab.tabIndex = position === index ? 0 : -1;
    byId(`panel-${position}`).hidden = position !== index;
  });
  if (index && !heatmaps.has(index)) {
    heatmaps.set(index, new Heatmap(byId(`panel-${index}`), data.matrices[index - 1], data.colormap));
  }
  heatmaps.get(index)?.draw();
  redraw();
}

function buildTabs() {
  const tabs = ["Map", ...data.matrices.map((matrix) => matrix.name)].map((name, index) => {
    const tab = element("button", { id: `tab-${index}`, type: "button", role: "tab", title: name }, name);
    tab.setAttribute("aria-controls", `panel-${index}`);
    tab.addEventListener("click", () => openTab(index));
    if (index) {
      const panel = element("section", { id: `panel-${index}`, className: "panel", role: "tabpanel" });
      panel.setAttribute("aria-labelledby", tab.id);
      document.querySelector("main").append(panel);
    }
    return tab;
  });
  for (const matrix of data.matrices) matrix.values = floats(matrix.values);
  byId("tabs").append(...tabs);
  byId("tabs").hidden = tabs.length === 1;
  byId("tabs").addEventListener("keydown", (event) => {
    const targets = {
      ArrowRight: (state.tab + 1) % tabs.length, ArrowLeft: (state.tab + tabs.length - 1) % tabs.length,
      Home: 0, End: tabs.length - 1,
    };
    if (!(event.key in targets)) return;
    event.preventDefault();
    openTab(targets[event.key]);
    tabs[state.tab].focus();
  });
  window.addEventListener("resize", () => heatmaps.get(state.tab)?.draw());
  openTab(0);
}

function buildNotes() {
  const notes = data.notes.length ? [definitions(data.notes)] : [];
  byId("notes").append(...notes, ...data.tables.map((table) => dataTable(table.name, table.columns, table.rows, formatNumber, data.explanations)));
  if (!data.leftOut.length) return;
  const which = data.leftOut.length > 10 ? [...data.leftOut.slice(0, 10), "…"] : data.leftOut;
  byId("left-out").textContent = `Left out, since their coordinates are undefined: ${data.leftOut.length} (${which.join("; ")}).`;
  byId("left-out").hidden = false;
}

// --- Start -----------------------------------------------------------------------------------------------------------

const darkScheme = window.matchMedia("(prefers-color-scheme: dark)");
let chosen = false;
darkScheme.addEventListener("change", () => {
  if (!chosen) setTheme(darkScheme.matches ? "dark" : "light");
});
byId("theme").addEventListener("click", () => {
  chosen = true;
  setTheme(state.theme === "dark" ? "light" : "dark");
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || state.tab) return;
  if (state.hovered !== null) activate(null);
  else if (state.selected !== null) select(null);
});

document.documentElement.classList.toggle("framed", window !== window.parent);
buildTabs();
buildControls();
buildList();
buildCanvas();
buildNotes();
setTheme(darkScheme.matches ? "dark" : "light");
select(null);
say("");
filter();

/** What the page shows, for tests and for the browser's console. */
window.litCkaMap = {
  get visible() { return visiblePoints().map((index) => shortLabel(points[index])); },
  get hovered() { return state.hovered === null ? null : shortLabel(points[state.hovered]); },
  get selected() { return state.selected === null ? null : shortLabel(points[state.selected]); },
  get links() { return state.pairLinks ? visibleLinks().length : 0; },
  get paths() { return state.depthLines ? visiblePaths().length : 0; },
  get colorBy() { return state.colorBy; },
  get tab() { return byId(`tab-${state.tab}`).textContent; },
  get theme() { return state.theme; },
  get labels() { return pathEnds().map((index) => shortLabel(points[index])); },
  get labelled() { return scatter.labelled; },
  get view() { return { ...scatter.view }; },
  /** Where in the window a point is. */
  clientPosition(label) {
    const box = scatter.canvas.getBoundingClientRect();
    const place = scatter.project(points.find((point) => shortLabel(point) === label).position);
    return [box.left + place.x, box.top + place.y];
  },
  /** Where in the window a cell of the matrix on the open tab is. */
  cellPosition(row, column) { return heatmaps.get(state.tab).clientPosition(row, column); },
};
