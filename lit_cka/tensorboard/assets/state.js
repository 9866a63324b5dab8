"use strict";
// What is chosen, kept in the address of TensorBoard's page, so that a link shows the same; and the theme that it has.

const DEFAULTS = { run: "", compare: "", more: [], step: null, untouched: 0.99, refined: 0.9, scalar: "", fit: false };

/** The window whose address people copy: TensorBoard's, around the frame of the tab. */
const outer = () => {
  try {
    return window.parent.location.hash === undefined ? window : window.parent;
  } catch {
    return window; // of another origin: a notebook, say
  }
};

function readState() {
  const text = new URLSearchParams(outer().location.hash.replace(/^#/, "")).get("p.cka.state");
  try {
    const read = JSON.parse(text ?? "{}");
    const known = Object.entries(read).filter(([key, value]) => key in DEFAULTS && (DEFAULTS[key] === null || typeof value === typeof DEFAULTS[key]));
    return { ...DEFAULTS, ...Object.fromEntries(known) };
  } catch {
    return { ...DEFAULTS };
  }
}

function stateLink(state) {
  const changed = Object.entries(state).filter(([key, value]) => JSON.stringify(value) !== JSON.stringify(DEFAULTS[key]));
  const parameters = new URLSearchParams({ "p.cka.state": JSON.stringify(Object.fromEntries(changed)) });
  return `${outer().location.href.split("#")[0]}#cka&${parameters}`;
}

function keepState(state) {
  outer().history.replaceState(outer().history.state, "", stateLink(state));
}

/** Sets the page's theme to TensorBoard's, now and whenever that changes; calls `changed` then. */
function followTheme(changed) {
  const page = outer() === window ? null : outer().document.body;
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const apply = () => {
    const dark = page ? page.classList.contains("dark-mode") : system.matches;
    const theme = dark ? "dark" : "light";
    if (document.documentElement.dataset.theme === theme) return;
    document.documentElement.dataset.theme = theme;
    changed();
  };
  apply();
  system.addEventListener("change", apply);
  if (page) new MutationObserver(apply).observe(page, { attributes: true, attributeFilter: ["class"] });
}

function download(name, href) {
  element("a", { download: name, href }).click();
}
