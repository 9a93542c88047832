// Helpers of all widgets.

const DPR = () => Math.max(1, window.devicePixelRatio || 1);
const make = (tag, cls, parent, text) => {
  const el = document.createElement(tag);
  if (cls) el.className = cls;
  if (text !== undefined) el.textContent = text;
  if (parent) parent.append(el);
  return el;
};
const themeOf = (el) => {
  const css = getComputedStyle(el), get = (name) => css.getPropertyValue(name).trim();
  return { back: get("--hi-back"), text: get("--hi-text"), faint: get("--hi-faint"), grid: get("--hi-grid"), mark: get("--hi-mark"), link: get("--hi-link") };
};
const number = (x, digits = 0) => Number(x).toLocaleString("en", { maximumFractionDigits: digits, minimumFractionDigits: digits });
const bytes = (x) => { const u = ["B", "KiB", "MiB", "GiB", "TiB"]; let i = 0; while (x >= 1024 && i < 4) { x /= 1024; i++; } return number(x, i ? 1 : 0) + " " + u[i]; };
const percent = (x, digits = 0) => number(100 * x, digits) + " %";
const save = (name, blob) => { const a = make("a", "", null); a.href = URL.createObjectURL(blob); a.download = name; a.click(); setTimeout(() => URL.revokeObjectURL(a.href), 5000); };
const isDark = () => { // by JupyterLab's mark, the classes of VS Code and marimo, or the system's wish
  const marks = [...document.body.classList, ...document.documentElement.classList], light = document.body.dataset.jpThemeLight;
  if (light) return light === "false";
  if (marks.some((mark) => ["vscode-dark", "vscode-high-contrast", "dark"].includes(mark))) return true;
  return !marks.some((mark) => ["vscode-light", "light"].includes(mark)) && matchMedia("(prefers-color-scheme: dark)").matches;
};
const watchTheme = (root, changed) => { // marks a view as dark or light, now and at each change; returns what ends the watch
  const mark = () => { root.dataset.dark = isDark(); }, again = () => { mark(); changed(); };
  const theme = new MutationObserver(again), system = matchMedia("(prefers-color-scheme: dark)");
  for (const el of [document.body, document.documentElement]) theme.observe(el, { attributes: true, attributeFilter: ["data-jp-theme-light", "class"] });
  system.addEventListener("change", again);
  mark();
  return () => { theme.disconnect(); system.removeEventListener("change", again); };
};

// Cividis in eight steps, from dark (low) to light (high).
const CIVIDIS = [[0, 32, 77], [33, 61, 107], [77, 83, 110], [104, 103, 113], [130, 124, 118], [159, 147, 115], [203, 186, 105], [255, 234, 70]];
function cividis(x) {
  const p = Math.min(0.9999, Math.max(0, x)) * 7, i = Math.floor(p), f = p - i;
  return `rgb(${CIVIDIS[i].map((c, k) => Math.round(c + f * (CIVIDIS[i + 1][k] - c))).join(",")})`;
}

function canvasPanel(parent, height, label, theme, draw) {
  const canvas = make("canvas", "hi-canvas", parent);
  canvas.setAttribute("role", "img"); canvas.setAttribute("aria-label", label);
  let queued = false;
  const panel = {
    canvas, height, frame: 0, width: 0, // set by the ResizeObserver: reading it from the canvas would force a layout at every paint
    now() {
      queued = false;
      const width = panel.width;
      if (!width) return;
      const ratio = DPR(), h = panel.height;
      if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(h * ratio)) {
        canvas.width = Math.round(width * ratio); canvas.height = Math.round(h * ratio); canvas.style.height = h + "px";
        const ctx = canvas.getContext("2d"); // resizing resets the context; setting the font at every paint would force a layout
        ctx.font = "11px system-ui, sans-serif"; ctx.textBaseline = "middle";
      }
      const ctx = canvas.getContext("2d"), began = performance.now();
      ctx.setTransform(ratio, 0, 0, ratio, 0, 0);
      ctx.fillStyle = theme().back; ctx.fillRect(0, 0, width, h);
      draw(ctx, width, h, theme());
      panel.drawMs = performance.now() - began; panel.frame++;
    },
    redraw() { if (!queued) { queued = true; requestAnimationFrame(() => { if (queued) panel.now(); }); } },
  };
  panel.watch = new ResizeObserver(([entry]) => { panel.width = entry.contentRect.width; panel.redraw(); });
  panel.watch.observe(canvas);
  return panel;
}

function axisText(ctx, theme, x, y, text, align = "left") { ctx.fillStyle = theme.faint; ctx.textAlign = align; ctx.fillText(text, x, y); ctx.textAlign = "left"; }
function upright(ctx, theme, x, y, text) { ctx.save(); ctx.translate(x, y); ctx.rotate(-Math.PI / 2); axisText(ctx, theme, 0, 0, text, "center"); ctx.restore(); }
function niceTick(raw) {
  const power = 10 ** Math.floor(Math.log10(raw)), m = raw / power;
  return power * (m <= 1 ? 1 : m <= 2 ? 2 : m <= 5 ? 5 : 10);
}
