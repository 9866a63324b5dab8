"use strict";
// What callbacks did to layers, as spans of {what, start, end, why}: in words, and as patterns and marks over pictures.

const LASTING = ["frozen", "slowed"]; // the rest is over at once

/** The span of this kind that holds at a step, if there is one. */
const spanAt = (spans, step, what) => (spans ?? []).findLast((span) => span.what === what && span.start <= step && (span.end === null || step < span.end)) ?? null;

const anySpan = (table, what) => (table.spans ?? []).some((spans) => spans.some((span) => span.what === what));

/** When it was done last at or before a step, and how often by then. */
function doneBy(spans, step, what) {
  const done = (spans ?? []).filter((span) => span.what === what && span.start <= step);
  return done.length ? `${done.length > 1 ? `${done.length} times, last ` : ""}at step ${done.at(-1).start}` : "";
}

/** Lines of a tooltip about a layer at a step. */
function changeLines(spans, step) {
  const lasting = LASTING.map((what) => spanAt(spans, step, what)).filter(Boolean).map((span) => [span.what, `since step ${span.start}, ${span.why}`]);
  const over = ["rolled back", "stopped"].map((what) => [what, doneBy(spans, step, what)]).filter(([, text]) => text);
  return [...lasting, ...over];
}

/** What the marks of a run's picture mean, for its heading. */
function legendOf(table, words) {
  const used = Object.entries(words).filter(([what]) => anySpan(table, what)).map(([what, look]) => `${look}: ${what}`);
  return used.length ? `; ${used.join(", ")}` : "";
}
const HEAT_LOOKS = { frozen: "hatched", slowed: "dotted", "rolled back": "◀", stopped: "■" };
const CURVE_LOOKS = { frozen: "dashed from ◆", slowed: "●", "rolled back": "◀", stopped: "■" };

/** A pattern that is seen on any colour: light lines or dots with a dark side. */
function heldPattern(context, what) {
  const size = 8;
  const tile = document.createElement("canvas");
  const scale = window.devicePixelRatio || 1;
  [tile.width, tile.height] = [size * scale, size * scale];
  const drawing = tile.getContext("2d");
  drawing.scale(scale, scale);
  for (const [color, shift] of [["rgb(0 0 0 / 60%)", 1], ["rgb(255 255 255 / 85%)", 0]]) {
    [drawing.strokeStyle, drawing.fillStyle, drawing.lineWidth] = [color, color, 1.1];
    if (what === "frozen") {
      for (const at of [-size, 0, size]) {
        drawing.beginPath();
        drawing.moveTo(at - 1 + shift, size + 1);
        drawing.lineTo(at + size + 1 + shift, -1);
        drawing.stroke();
      }
    } else drawing.fillRect(2 + shift * 0.8, 2 + shift * 0.8, 2, 2);
  }
  const pattern = context.createPattern(tile, "repeat");
  pattern.setTransform(new DOMMatrix().scale(1 / scale));
  return pattern;
}

/** A small sign at a place: of a span's start, or of the end of one that lasted (hollow). */
function drawMark(context, what, x, y, size, { fill, edge }) {
  context.beginPath();
  if (what === "frozen") for (const [dx, dy] of [[0, -1], [1, 0], [0, 1], [-1, 0]]) context.lineTo(x + 1.25 * size * dx, y + 1.25 * size * dy);
  else if (what === "rolled back") for (const [dx, dy] of [[-1, 0], [0.8, -1], [0.8, 1]]) context.lineTo(x + size * dx, y + size * dy);
  else if (what === "slowed") context.arc(x, y, size * 0.8, 0, 7);
  else context.rect(x - size * 0.8, y - size * 0.8, size * 1.6, size * 1.6);
  context.closePath();
  [context.fillStyle, context.strokeStyle, context.lineWidth] = [fill, edge, 1.2];
  context.fill();
  context.stroke();
}

const someOf = (names) => names.slice(0, 5).join(", ") + (names.length > 5 ? ` and ${names.length - 5} more` : "");

/** What was done to the layers of a run by a step, in sentences. */
function changeSentences(table, step) {
  const sentences = [];
  for (const what of LASTING.filter((each) => anySpan(table, each))) {
    const held = table.layers.filter((_, layer) => spanAt(table.spans[layer], step, what));
    sentences.push(`At step ${step}, ${held.length || "none"} of ${table.layers.length} layers ${held.length === 1 ? "is" : "are"} ${what}${held.length ? `: ${someOf(held)}` : ""}.`);
  }
  const isStopped = (span) => span.what === "stopped";
  const stop = (table.spans ?? []).flat().find(isStopped);
  const beyond = table.layers.filter((_, layer) => table.spans[layer].some(isStopped));
  if (stop) sentences.push(`The training was stopped at step ${stop.start}, with ${someOf(beyond)} beyond the drift budget.`);
  return sentences;
}
