"use strict";
// Colours of values and of depth, ticks, and names without what all of them share.

const RAMP = ["#440154", "#482878", "#3e4989", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6ece58", "#b5de2b", "#fde725"];
const DIVERGING = ["#2166ac", "#67a9cf", "#d1e5f0", "#f7f7f7", "#fddbc7", "#ef8a62", "#b2182b"];
const DIFFERENCE = 0.5; // what the ends of the diverging scale stand for, always

const toRgb = (hex) => [1, 3, 5].map((start) => parseInt(hex.slice(start, start + 2), 16));
const mix = (one, other, share) => one.map((value, index) => Math.round(value + share * (other[index] - value)));

function colorTable(colors, size = 256) {
  const stops = colors.map(toRgb);
  return Array.from({ length: size }, (_, index) => {
    const place = (index / (size - 1)) * (stops.length - 1);
    const first = Math.min(Math.floor(place), stops.length - 2);
    return mix(stops[first], stops[first + 1], place - first);
  });
}

const RAMP_TABLE = colorTable(RAMP);
const DIVERGING_TABLE = colorTable(DIVERGING);
const css = (rgb) => `rgb(${rgb.join(" ")})`;
const pick = (table, share) => table[Math.round((table.length - 1) * Math.max(0, Math.min(1, share)))];

/** Of a CKA from `low` to 1, or of a difference of two. */
const valueColor = (low) => (value) => pick(RAMP_TABLE, (value - low) / (1 - low));
const differenceColor = (value) => pick(DIVERGING_TABLE, 0.5 - value / (2 * DIFFERENCE));

/** Of a layer: from the first, dark, to the last, light; with less of the end that the ground would swallow. */
function depthColor(index, count, dark) {
  const share = count > 1 ? index / (count - 1) : 0.5;
  return css(pick(RAMP_TABLE, dark ? 0.4 + 0.6 * share : 0.86 * share));
}

/** Whole steps of 1, 2 or 5 times a power of ten. */
function ticks(first, last, most) {
  if (!(last > first)) return [first];
  const rough = (last - first) / Math.max(most, 1);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999);
  const found = [];
  for (let tick = Math.ceil(first / step - 1e-9) * step; tick <= last + step * 1e-9; tick += step) found.push(+tick.toPrecision(12));
  return found;
}

const tickLabel = (value) => (Math.abs(value) >= 1e4 ? minus(value.toLocaleString("en")) : minus(String(+value.toPrecision(6))));

/** Layers without what all of them begin with, but for its last segment, which says what the numbers count. */
function shortNames(names) {
  const parts = names.map((name) => name.split("."));
  const least = Math.min(...parts.map((each) => each.length));
  let same = 0;
  while (same < least && parts.every((each) => each[same] === parts[0][same])) same += 1;
  const left = names.length > 1 ? Math.max(same - 1, 0) : 0;
  return { common: parts[0] ? parts[0].slice(0, left).join(".") : "", names: parts.map((each) => each.slice(left).join(".")) };
}
