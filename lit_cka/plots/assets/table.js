// A table that sorts by any column and filters by words in the first one and by the values of some others.

const data = JSON.parse(byId("data").textContent);
const MOST = 1000; // rows at a time: more would make every key stroke slow
const state = { column: data.sorted, descending: true, all: false };
const order = new Intl.Collator("en", { numeric: true });

const numberOf = (cell) => (cell === null ? null : Number(cell)); // "Infinity" is no number in JSON

function formatted(cell) {
  const value = numberOf(cell);
  if (value === null) return "";
  if (!Number.isFinite(value)) return minus(value > 0 ? "∞" : "-∞");
  if (Number.isInteger(value)) return minus(String(value));
  const size = Math.abs(value);
  return minus(size < 1e-3 || size >= 1e6 ? value.toExponential(2) : value.toPrecision(4));
}

/** Rows without a value come last, whichever way the others are sorted. */
function sorted(rows) {
  const { column, descending } = state;
  const sign = descending ? -1 : 1;
  const isNumber = data.columns[column].numeric;
  const key = (row) => (isNumber ? numberOf(row[column]) : row[column] || null);
  return [...rows].sort((one, other) => {
    const [a, b] = [key(one), key(other)];
    if (a === null || b === null) return (a === null) - (b === null);
    return sign * (isNumber ? Math.sign(a - b) || 0 : order.compare(a, b));
  });
}

function matching() {
  const words = byId("words").value.toLowerCase().split(/\s+/).filter(Boolean);
  const chosen = [...document.querySelectorAll("#filters select")].filter((select) => select.value !== "");
  return data.rows.filter(
    (row) =>
      words.every((word) => row[0].toLowerCase().includes(word)) &&
      chosen.every((select) => row[Number(select.dataset.column)] === select.value),
  );
}

/** A name, which breaks behind its dots and the like rather than within words. */
function nameCell(name) {
  const parts = name.split(/(?<=[._(])/).flatMap((part) => [part, element("wbr", {})]);
  return element("th", { scope: "row", title: name }, element("bdi", {}, ...parts));
}

function cell(value, index) {
  const column = data.columns[index];
  if (index === 0) return nameCell(value);
  if (column.numeric) return element("td", { className: "number" }, formatted(value));
  return element("td", { className: column.wide ? "wide" : "" }, value ?? "");
}

function draw() {
  const rows = sorted(matching());
  const shown = state.all ? rows : rows.slice(0, MOST);
  byId("rows").replaceChildren(...shown.map((row) => element("tr", {}, ...row.map(cell))));
  const total = `${rows.length} of ${data.rows.length} rows`;
  byId("count").textContent = shown.length < rows.length ? `${total}, the first ${shown.length} shown` : total;
  byId("all").hidden = shown.length === rows.length;
  [...byId("head").children].forEach((head, index) => {
    if (index === state.column) head.setAttribute("aria-sort", state.descending ? "descending" : "ascending");
    else head.removeAttribute("aria-sort");
  });
}

function buildHead() {
  data.columns.forEach((column, index) => {
    const button = element("button", { type: "button", title: column.explanation }, column.name);
    button.addEventListener("click", () => {
      // What is largest comes first among numbers, what is first in the alphabet among words.
      state.descending = state.column === index ? !state.descending : column.numeric;
      state.column = index;
      draw();
    });
    byId("head").append(element("th", { scope: "col", className: column.numeric ? "number" : "" }, button));
    byId("columns").append(element("dt", {}, column.name), element("dd", {}, column.explanation));
  });
}

function buildFilters() {
  data.columns.forEach((column, index) => {
    if (!column.choices) return;
    const values = [...new Set(data.rows.map((row) => row[index]).filter(Boolean))].sort(order.compare);
    const options = values.map((value) => element("option", { value }, value));
    const select = element("select", {}, element("option", { value: "" }, "all"), ...options);
    select.dataset.column = index;
    byId("filters").append(element("label", {}, column.name, select));
  });
  byId("filters").reset();
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  byId("filters").addEventListener("input", () => {
    state.all = false;
    draw();
  });
  byId("all").addEventListener("click", () => {
    state.all = true;
    draw();
  });
}

// More than a screen of sentences would push the table away.
const paragraphs = data.about.map((text) => element("p", {}, text));
const FIRST = paragraphs.length > 6 ? 2 : paragraphs.length;
byId("about").append(...paragraphs.slice(0, FIRST));
if (FIRST < paragraphs.length) {
  byId("about").append(element("details", {}, element("summary", {}, "The same in sentences, and how to read it"), ...paragraphs.slice(FIRST)));
}
for (const [source, caption] of data.pictures) {
  byId("pictures").append(element("figure", {}, element("img", { src: source, alt: caption }), element("figcaption", {}, caption)));
}
for (const name of data.files) {
  byId("files").hidden = false;
  byId("files").lastElementChild.append(element("li", {}, element("a", { href: encodeURIComponent(name) }, name)));
}
buildHead();
buildFilters();
draw();
