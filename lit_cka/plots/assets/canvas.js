"use strict";
// A canvas in the pixels of the screen and the colours of the theme, and text that fits.

const FONT = "12px system-ui, 'DejaVu Sans', sans-serif";

/** The text, cut in the middle to at most `width`. */
function fitText(context, text, width) {
  if (context.measureText(text).width <= width) return text;
  const letters = [...text];
  let keep = letters.length - 1;
  const cut = () => letters.slice(0, Math.ceil(keep / 2)).join("") + "…" + letters.slice(letters.length - Math.floor(keep / 2)).join("");
  // From a length that fits about, so that names of thousands of letters take no time.
  keep = Math.min(keep, Math.ceil((letters.length * width * 2) / context.measureText(text).width));
  while (keep > 1 && context.measureText(cut()).width > width) keep -= 1;
  return cut();
}

function themeColor(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

function sizeCanvas(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return context;
}
