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
