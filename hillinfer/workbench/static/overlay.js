// Several runs in one chart: a line for each over its steps.

const LEFT = 56, TOP = 8, BOTTOM = 36, STYLES = ["solid", "dashed", "dotted"], DASHES = [[], [6, 3], [2, 2]];

class Overlay {
  constructor(model, root) {
    this.model = model; this.root = root; this.hidden = new Set();
    root.classList.add("hi-board", "hi-overlay");
    const bar = make("div", "hi-bar", root);
    make("h4", "", bar, "Runs over each other");
    this.note = make("span", "hi-note", bar);
    const tools = make("span", "hi-tools", bar);
    this.select = make("select", "hi-button", tools); this.select.setAttribute("aria-label", "figure");
    this.select.addEventListener("change", () => { model.set("figure", this.select.value); model.save_changes(); });
    const b = make("button", "hi-button", tools, "PNG"); b.type = "button"; b.title = "save the chart as PNG";
    b.addEventListener("click", () => this.panel.canvas.toBlob((blob) => save("runs.png", blob)));
    this.legend = make("div", "hi-legend", root);
    this.panel = canvasPanel(root, 220, "a line for each run over its steps; read a step with the left and right arrow keys", () => (this.theme ??= themeOf(root)), (c, w, h, t) => this.draw(c, w, h, t));
    this.spoken = make("div", "hi-facts", root); this.spoken.setAttribute("aria-live", "polite");
    const canvas = this.panel.canvas;
    canvas.tabIndex = 0; canvas.classList.add("hi-time");
    canvas.addEventListener("pointermove", (e) => this.point(Math.floor((e.offsetX - LEFT) / Math.max(1, this.panel.width - LEFT - 12) * this.steps)));
    canvas.addEventListener("pointerleave", () => this.point(null));
    canvas.addEventListener("keydown", (e) => { const go = { ArrowLeft: -1, ArrowRight: 1 }[e.key]; if (go) { e.preventDefault(); e.stopPropagation(); this.point((this.at ?? -1) + go); } });
    for (const name of ["lines", "figure", "figures"]) model.on("change:" + name, () => this.changed());
    root.hillinfer = this; // gives tests access to the drawn state
    this.changed();
  }
  get shown() { return this.lines.filter((line) => !this.hidden.has(line.name)); }
  get steps() { return Math.max(1, ...this.shown.map((line) => line.steps)); }
  changed() {
    this.lines = this.model.get("lines"); this.root.hidden = this.lines.length < 2;
    const figures = this.model.get("figures"), figure = this.model.get("figure");
    this.unit = figures.find(([name]) => name === figure)?.[1] ?? "";
    this.select.replaceChildren(...figures.map(([name, unit]) => { const o = make("option", "", null, `${name}, ${unit} a step`); o.value = name; return o; }));
    this.select.value = figure;
    this.legend.replaceChildren(...this.lines.map((line, i) => {
      const b = make("button", "hi-button", null, `${line.name}: median ${number(line.median, 1)} ${this.unit}` + (line.each > 1 ? `, means of ${line.each} steps` : ""));
      b.type = "button"; b.title = "show or hide this run"; b.setAttribute("aria-pressed", !this.hidden.has(line.name));
      const mark = make("i", "hi-stroke"); mark.style.borderTop = `3px ${STYLES[i % 3]} ${this.colour(i)}`; b.prepend(mark);
      b.addEventListener("click", () => { if (!this.hidden.delete(line.name)) this.hidden.add(line.name); this.changed(); });
      return b;
    }));
    this.point(null);
  }
  colour(i) { const colours = this.model.get("colours"), one = colours[i % colours.length]; return one === "#111111" ? (this.theme ?? themeOf(this.root)).text : one; }
  point(step) {
    this.at = step == null || step < 0 || step >= this.steps ? null : step;
    const value = (line) => { const v = line.values[Math.floor(this.at / line.each)]; return v == null ? "ended" : `${number(v, 1)} ${this.unit}`; };
    this.spoken.textContent = this.at == null ? "point at a step for its figures" : `step ${this.at + 1}: ` + this.shown.map((line) => `${line.name} ${value(line)}`).join("; ");
    this.panel.redraw();
  }
  draw(ctx, width, height, theme) {
    const values = this.shown.flatMap((line) => line.values).sort((a, b) => a - b), usual = 1.5 * (values[Math.floor(0.98 * values.length)] ?? 0); // a few outliers must not flatten the lines
    const w = width - LEFT - 12, h = height - TOP - BOTTOM, most = Math.max(1e-9, usual && Math.min(usual, values.at(-1))), tick = niceTick(most / 4), top = Math.ceil(most / tick) * tick;
    const X = (step) => LEFT + (step + 0.5) / this.steps * w, Y = (v) => TOP + h - v / top * h;
    for (let v = 0; v <= top * 1.001; v += tick) { ctx.fillStyle = theme.grid; ctx.fillRect(LEFT, Y(v), w, v ? 0.5 : 1); axisText(ctx, theme, LEFT - 6, Y(v), number(v, tick < 1 ? 1 : 0), "right"); }
    const every = Math.max(1, niceTick(this.steps / Math.max(2, w / 90)));
    for (let step = every; step <= this.steps; step += every) axisText(ctx, theme, X(step - 1), TOP + h + 11, number(step), "center");
    axisText(ctx, theme, LEFT + w / 2, height - 8, "step of question and answer", "center");
    upright(ctx, theme, 9, TOP + h / 2, this.unit);
    if (this.at != null) { ctx.fillStyle = theme.faint; ctx.fillRect(X(this.at), TOP, 1, h); }
    const above = values.filter((v) => v > top).length;
    this.note.textContent = above ? `${number(above)} of ${number(values.length)} points lie above, up to ${number(values.at(-1), 0)} ${this.unit}` : "";
    this.drawn = 0;
    ctx.save(); ctx.beginPath(); ctx.rect(LEFT, TOP, w, h + 1); ctx.clip();
    this.lines.forEach((line, i) => {
      if (this.hidden.has(line.name)) return;
      ctx.strokeStyle = this.colour(i); ctx.lineWidth = 1.6; ctx.setLineDash(DASHES[i % 3]); ctx.beginPath();
      line.values.forEach((v, k) => ctx.lineTo(X(Math.min(line.steps - 1, (k + 0.5) * line.each - 0.5)), Y(v)));
      if (line.values.length === 1) ctx.arc(X(0), Y(line.values[0]), 2, 0, 7);
      ctx.stroke(); this.drawn++;
    });
    ctx.restore();
  }
}

const board = {
  render({ model, el }) {
    const root = make("div", "", el), ended = watchTheme(root, () => { chart.theme = null; chart.changed(); }), chart = new Overlay(model, root);
    return () => { ended(); chart.panel.watch.disconnect(); };
  },
};
export default board;
