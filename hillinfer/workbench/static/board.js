// The board: linked views of one run. Python streams the rows, and sends the attention at the cursor.

// Append-only rows. Python sends each once, and resends from a given row on request.
class Store {
  constructor() { this.spans = new Spans(); this.clear(); }
  clear() { this.spans.clear(); this.tokens = []; this.hits = new Hits(); this.asked = false; this.state = {}; this.detail = {}; }
  have() { return { spans: this.spans.n, hits: this.hits.n, tokens: this.tokens.length }; }
  accept(message, buffers) { // false if earlier rows are missing
    if (message.run !== this.run) { this.clear(); this.run = message.run; }
    this.state = message.state; this.detail = message.detail ?? this.detail;
    const have = this.have();
    if (["spans", "hits", "tokens"].some((k) => message.from[k] > have[k])) return false;
    if (["spans", "hits", "tokens"].some((k) => message.from[k] < have[k])) return true; // duplicate
    const column = (i, Type) => { const b = buffers[i]; return new Type(b.buffer.slice(b.byteOffset, b.byteOffset + b.byteLength)); };
    this.spans.kinds = message.kinds;
    const names = [["start", Float64Array], ["dur", Float64Array], ["bytes", Float64Array], ["lane", Uint8Array], ["kind", Uint8Array], ["layer", Int16Array], ["step", Int32Array], ["modelled", Uint8Array]];
    const c = Object.fromEntries(names.map(([name, Type], i) => [name, column(i, Type)]));
    if (c.start.length) this.spans.add(c);
    this.hits.add(column(8, Int32Array));
    this.tokens.push(...message.tokens);
    return true;
  }
}

const PART = { step: 0, layer: 1, queries: 2, device: 3, host: 4, drive: 5, demoted: 6, prefetched: 7 };
class Hits { // counters by step and layer, with sums per step over layers and per layer over steps
  constructor() { this.n = 0; this.steps = new Map(); this.sums = new Map(); this.layers = []; this.first = null; this.last = null; }
  add(rows) {
    for (let i = 0; i < rows.length; i += 8) {
      const step = rows[i], layer = rows[i + 1];
      this.first ??= step; this.last = step;
      if (!this.steps.has(step)) { this.steps.set(step, []); this.sums.set(step, new Float64Array(6)); }
      const r = rows.subarray(i + 2, i + 8), mine = this.steps.get(step);
      mine[layer] = r;
      const sum = (this.layers[layer] ??= new Float64Array(6)), all = this.sums.get(step);
      for (let k = 0; k < 6; k++) { sum[k] += r[k]; all[k] += r[k]; }
      this.n++;
    }
  }
  at(step, layer) {
    return (layer == null ? this.sums.get(step) : this.steps.get(step)?.[layer]) ?? null;
  }
}
const shares = (r) => { const q = Math.max(1, r[0]); return [r[1] / q, r[2] / q, (r[3] - r[4]) / q, r[4] / q]; }; // parallel to palette.tiers

const NEWEST = 300; // tokens in the page: the layout of more at every paint would slow the run down
function alignRows(root) { // boards side by side: each view as high as the other's, so that they stay row beside row
  const boards = [...(root.closest(".hi-compared")?.querySelectorAll(".hi-board") ?? [])];
  const rows = boards.map((one) => [...one.querySelectorAll(".hi-top, .hi-section")]);
  for (const parts of rows) for (const part of parts) part.style.minHeight = "";
  if (boards.length < 2) return;
  const heights = rows.map((parts) => parts.map((part) => Math.ceil(part.getBoundingClientRect().height)));
  rows.forEach((parts) => parts.forEach((part, i) => { part.style.minHeight = Math.max(...heights.map((one) => one[i] ?? 0)) + "px"; }));
}

class Board {
  constructor(model, store, root) {
    this.model = model; this.store = store; this.root = root; this.panels = []; this.view = null; this.following = true;
    this.palette = model.get("palette");
    root.classList.add("hi-board");
    const parts = model.get("parts");
    if (parts.includes("head")) this.buildHead();
    const grid = make("div", "hi-grid", root);
    if (parts.includes("text")) this.buildText(this.section(grid, "Text", "wide"));
    if (parts.includes("sparsity")) this.buildSparsity(this.section(grid, "Attention sparsity"));
    if (parts.includes("hits")) this.buildHits(this.section(grid, "Attended tokens by tier"));
    const row = make("div", "hi-wide hi-beside", grid);
    if (parts.includes("timeline")) this.buildTimeline(this.section(row, "Timeline", "wide"));
    if (parts.includes("why")) this.buildWhy(this.section(row, "Where the time went"));
    if (parts.includes("memory")) this.buildMemory(this.section(grid, "Memory and traffic", "wide"));
    this.sizes = new ResizeObserver(() => alignRows(root));
    for (const part of root.querySelectorAll(".hi-top, .hi-section")) this.sizes.observe(part);
    root.hillinfer = this; // gives tests access to the drawn state
  }
  section(parent, title, wide) {
    const s = make("section", "hi-section" + (wide ? " hi-wide" : ""), parent);
    s.setAttribute("aria-label", title);
    s.bar = make("div", "hi-bar", s);
    make("h4", "", s.bar, title);
    s.note = make("span", "hi-note", s.bar);
    return s;
  }
  panel(parent, height, label, draw) { const p = canvasPanel(parent, height, label, () => (this.theme ??= themeOf(this.root)), draw); this.panels.push(p); return p; }
  get cursor() { return this.model.get("cursor"); }
  point(change) { this.model.set("cursor", { ...this.cursor, ...change }); this.model.save_changes(); }
  refresh(all) { // all in one frame, and only panels with new data: the observed run needs the CPU
    if (all) this.theme = null;
    this.follow(); this.reachStep();
    const { spans, hits, run } = this.store, detail = this.store.detail;
    for (const p of this.panels) {
      const seen = [run, this.cursor, ...(p === this.heat || p === this.dist ? [detail] : p === this.time ? [spans.n] : [hits.n])];
      if (all || !p.seen || seen.some((value, i) => value !== p.seen[i])) p.now();
      p.seen = seen;
    }
    this.drawHead(); this.drawText(); this.drawSparsityNote(); this.drawMemory(); this.drawWhy(); this.measureNow(); this.scrollText();
  }

  buildHead() {
    const top = make("div", "hi-top", this.root), head = make("div", "hi-head", top);
    this.title = make("strong", "", head);
    this.progress = make("progress", "", head); this.progress.max = 1; this.progress.setAttribute("aria-label", "progress");
    this.status = make("span", "hi-status", head); this.status.setAttribute("role", "status"); this.status.setAttribute("aria-live", "polite");
    this.setting = make("div", "hi-note hi-setting", top);
  }
  drawHead() {
    const s = this.store.state;
    if (!this.title || !s.phase) return;
    this.title.textContent = s.title;
    this.setting.textContent = s.setting;
    this.progress.value = s.phase === "prefill" ? s.prefilled / Math.max(1, s.context) : s.foreseen ? s.done / s.foreseen : 0;
    if (s.phase === "done") this.progress.value = 1;
    const speed = s.speed ? `, ${number(s.speed, 1)} tokens/s (measured)` : "";
    const status = {
      waiting: "waiting", prefill: `prefill: ${number(s.prefilled)} of ${number(s.context)} tokens`,
      decode: `token ${s.done} of at most ${s.foreseen}${speed}, at most ${number(s.left_s, 0)} s left`,
      done: `done: ${s.done} tokens${speed}`, stopped: `stopped after ${s.done} tokens${speed}`, failed: s.error,
    }[s.phase];
    const notes = s.notes ? `; ${s.notes}` : "";
    const scored = s.score == null ? "" : ` - score ${number(100 * s.score, 1)} (${s.metric})`;
    const judged = notes + (s.right == null ? scored : s.right ? " - right" : " - wrong");
    if (this.status.textContent !== status + judged) this.status.textContent = status + judged;
    this.status.classList.toggle("hi-error", s.phase === "failed");
    this.root.dataset.phase = s.phase;
  }

  buildText(section) {
    this.text = make("div", "hi-text", section);
    this.text.tabIndex = 0; this.text.setAttribute("role", "listbox"); this.text.setAttribute("aria-label", "tokens; select with the left and right arrow keys");
    section.note.textContent = "question in grey, answer in bold; click a token to mark its step in all views";
    this.older = make("button", "hi-button", section.bar); this.older.type = "button"; this.older.hidden = true;
    this.older.addEventListener("click", () => { this.wholeText = true; this.shownRun = null; this.drawText(); this.scrollText(); });
    this.text.addEventListener("click", (e) => { const i = e.target.dataset?.i; if (i) this.pick(+i); });
    this.text.addEventListener("keydown", (e) => {
      const go = { ArrowRight: 1, ArrowLeft: -1 }[e.key];
      if (go) { e.preventDefault(); const at = this.store.tokens.findIndex((t) => t[1] === this.cursor.step); this.pick(Math.min(this.store.tokens.length - 1, Math.max(0, at + go))); }
      if (e.key === "Escape") this.point({ step: null });
    });
    this.shown = 0;
  }
  pick(i) { const t = this.store.tokens[i]; if (t) this.point({ step: t[1] === this.cursor.step ? null : t[1] }); }
  drawText() {
    if (!this.text) return;
    if (this.shown > this.store.tokens.length || this.shownRun !== this.store.run) {
      if (this.shownRun != null) this.wholeText = false;
      this.text.replaceChildren(); this.shown = 0; this.shownRun = this.store.run;
    }
    this.grew ||= this.shown < this.store.tokens.length;
    if (!this.wholeText) this.shown = Math.max(this.shown, this.store.tokens.length - NEWEST);
    for (; this.shown < this.store.tokens.length; this.shown++) {
      const [text, step, ms, asked] = this.store.tokens[this.shown];
      const el = make("span", asked ? "hi-asked" : "hi-answer", this.text, text || "·");
      el.dataset.i = this.shown; el.dataset.step = step; el.title = `step ${step}, at ${number(ms, 1)} ms`; el.setAttribute("role", "option");
    }
    if (!this.wholeText) while (this.text.childElementCount > NEWEST) this.text.firstChild.remove();
    const hidden = this.store.tokens.length - this.text.childElementCount;
    this.older.hidden = !hidden; this.older.textContent = `show ${number(hidden)} older tokens`;
    for (const el of this.text.querySelectorAll(".hi-on")) if (+el.dataset.step !== this.cursor.step) el.classList.remove("hi-on");
    if (this.cursor.step != null) for (const el of this.text.querySelectorAll(`[data-step="${this.cursor.step}"]`)) el.classList.add("hi-on");
  }
  scrollText() { // last, because it forces a layout
    if (!this.text) return;
    if (this.grew) this.text.scrollTop = this.text.scrollHeight;
    this.grew = false;
    const marked = this.cursor.step !== this.markedStep && this.text.querySelector(".hi-on");
    if (marked) this.text.scrollTop = marked.offsetTop - this.text.offsetTop - this.text.clientHeight / 2;
    this.markedStep = this.cursor.step;
  }

  buildSparsity(section) {
    this.sparsity = section;
    this.heat = this.panel(section, 190, "heat map, layers by heads: share of tokens that holds 90 % of the attention", (c, w, h, t) => this.drawHeat(c, w, h, t));
    const canvas = this.heat.canvas;
    canvas.tabIndex = 0;
    const cell = (e) => { const b = this.cells; if (!b) return null; const head = Math.floor((e.offsetX - b.x) / b.w), layer = Math.floor((e.offsetY - b.y) / b.h); return head >= 0 && head < b.heads && layer >= 0 && layer < b.layers ? { layer, head } : null; };
    canvas.addEventListener("click", (e) => { const at = cell(e); if (at) this.point(at.layer === this.cursor.layer && at.head === this.cursor.head ? { layer: null, head: null } : at); });
    canvas.addEventListener("mousemove", (e) => { const at = cell(e), d = this.store.detail.heat; canvas.title = at && d ? `layer ${at.layer}, head ${at.head}: ${percent(d.needed[at.layer][at.head], 1)} of the tokens hold 90 % of the attention` + (d.recall ? `; the selected tokens hold ${percent(d.recall[at.layer][at.head], 1)}` : "") : ""; });
    canvas.addEventListener("keydown", (e) => {
      const go = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[e.key], b = this.cells;
      if (!go || !b) return;
      e.preventDefault();
      this.point({ layer: Math.min(b.layers - 1, Math.max(0, (this.cursor.layer ?? 0) + go[0])), head: Math.min(b.heads - 1, Math.max(0, (this.cursor.head ?? 0) + go[1])) });
    });
    this.distNote = make("div", "hi-note", section);
    this.dist = this.panel(section, 136, "attention over positions, and the selected positions", (c, w, h, t) => this.drawDistribution(c, w, h, t));
  }
  drawSparsityNote() {
    if (!this.sparsity) return;
    const d = this.store.detail.heat;
    const one = this.store.detail.distribution;
    this.distNote.textContent = one ? `layer ${one.layer}, ${one.head == null ? "mean of the heads" : "head " + one.head}, step ${one.step}: share of the attention in blocks of ${one.block} tokens` : "";
    this.sparsity.note.textContent = d ? `step ${d.step}; share of tokens that holds 90 % of ${d.exact ? "all" : "the selected tokens'"} attention` : this.store.state.observed === false ? "off" : "no data yet";
  }
  drawHeat(ctx, width, height, theme) {
    const d = this.store.detail.heat;
    if (!d) { axisText(ctx, theme, width / 2, height / 2, "appears with the first tokens", "center"); this.cells = null; return; }
    const layers = d.needed.length, heads = d.needed[0].length, x = 46, y = 8, w = (width - x - 76) / heads, h = (height - y - 30) / layers;
    this.cells = { x, y, w, h, layers, heads };
    for (let l = 0; l < layers; l++) for (let k = 0; k < heads; k++) {
      ctx.fillStyle = cividis(1 + Math.log10(Math.max(1e-3, d.needed[l][k])) / 3); // 0.1 % to 100 %, logarithmic
      ctx.fillRect(x + k * w, y + l * h, Math.max(1, w - 1), Math.max(1, h - 1));
    }
    const every = (n, room) => Math.max(1, Math.ceil(n / Math.max(1, room)));
    for (let l = 0; l < layers; l += every(layers, (height - y - 30) / 13)) axisText(ctx, theme, x - 6, y + (l + 0.5) * h, l, "right");
    for (let k = 0; k < heads; k += every(heads, (width - x - 76) / 22)) axisText(ctx, theme, x + (k + 0.5) * w, height - 22, k, "center");
    axisText(ctx, theme, x + heads * w / 2, height - 8, "head", "center");
    upright(ctx, theme, 9, y + layers * h / 2, "layer");
    const bx = width - 62, bh = height - y - 30;
    for (let i = 0; i < bh; i++) { ctx.fillStyle = cividis(1 - i / bh); ctx.fillRect(bx, y + i, 10, 1.5); }
    [["100 %", 0], ["10 %", 1 / 3], ["1 %", 2 / 3], ["0.1 %", 1]].forEach(([label, f]) => axisText(ctx, theme, bx + 14, y + 5 + f * (bh - 10), label));
    const { layer, head } = this.cursor;
    if (layer != null && layer < layers) for (const [colour, thick] of [[theme.back, 5], [theme.text, 2]]) { // visible on dark and light cells
      ctx.strokeStyle = colour; ctx.lineWidth = thick;
      ctx.strokeRect(x + (head ?? 0) * w, y + layer * h, (head == null ? heads : 1) * w - 1, h - 1); ctx.lineWidth = 1;
    }
  }
  drawDistribution(ctx, width, height, theme) {
    const d = this.store.detail.distribution;
    if (!d) return;
    const x = 54, y = 6, w = width - x - 12, h = height - y - 42, n = d.mass.length, bw = w / n;
    const floor = -4; // log10: attention below 0.01 % is not drawn
    for (let i = 0; i < n; i++) {
      const top = d.mass[i] > 0 ? Math.max(0, 1 - Math.log10(d.mass[i]) / floor) : 0;
      ctx.fillStyle = d.chosen[i] ? this.palette.colours.choose : theme.grid;
      ctx.fillRect(x + i * bw, y + h - top * h, Math.max(1, bw - (bw > 3 ? 1 : 0)), top * h);
      if (d.chosen[i]) { ctx.globalAlpha = 0.25 + 0.75 * Math.min(1, d.chosen[i] / d.block); ctx.fillStyle = theme.link; ctx.fillRect(x + i * bw, y + h + 3, Math.max(1, bw), 6); ctx.globalAlpha = 1; }
    }
    for (const [label, f] of [["100 %", 0], ["1 %", 0.5], ["0.01 %", 1]]) { axisText(ctx, theme, x - 4, y + 4 + f * (h - 10), label, "right"); ctx.fillStyle = theme.grid; ctx.fillRect(x, y + f * h, w, 0.5); }
    axisText(ctx, theme, x - 4, y + h + 8, "selected", "right");
    for (const f of [0, 0.5, 1]) axisText(ctx, theme, x + f * w, y + h + 18, number(f * d.n), f === 0 ? "left" : f === 1 ? "right" : "center");
    axisText(ctx, theme, x + w / 2, y + h + 32, `position in the context, tokens; ${number(d.chosen.reduce((a, b) => a + b, 0))} of ${number(d.n)} attended to`, "center");
  }

  buildHits(section) {
    this.hitsSection = section;
    const legend = make("div", "hi-legend", section);
    for (const [name, colour] of Object.entries(this.palette.tiers)) { const item = make("span", "", legend, name); make("i", "", null).style.background = colour; const i = make("i", ""); i.style.background = colour; item.prepend(i); }
    this.hitsOverSteps = this.panel(section, 165, "share of the attended tokens by serving tier, over steps", (c, w, h, t) => this.drawHits(c, w, h, t));
    this.hitsOverSteps.canvas.addEventListener("click", (e) => { const f = this.hitsFrame; if (!f) return; const step = Math.floor(f.first + (e.offsetX - f.x) / f.w * f.n); if (this.store.hits.steps.has(step)) this.point({ step: step === this.cursor.step ? null : step }); });
    this.hitsByLayer = this.panel(section, 150, "share of the attended tokens by serving tier, per layer", (c, w, h, t) => this.drawLayers(c, w, h, t));
    this.hitsByLayer.canvas.addEventListener("click", (e) => { const f = this.layersFrame; if (!f) return; const layer = Math.floor((e.offsetY - f.y) / f.h); if (layer >= 0 && layer < f.n) this.point({ layer: layer === this.cursor.layer ? null : layer, head: null }); });
  }
  drawHits(ctx, width, height, theme) {
    const hits = this.store.hits, x = 46, y = 8, w = width - x - 12, h = height - y - 34;
    if (!hits.n) { axisText(ctx, theme, width / 2, height / 2, "appears with the first tokens", "center"); this.hitsFrame = null; return; }
    const n = hits.last - hits.first + 1, columns = Math.min(n, Math.floor(w)), colours = Object.values(this.palette.tiers);
    this.hitsFrame = { x, w, first: hits.first, n };
    for (let c = 0; c < columns; c++) {
      const sum = new Float64Array(6);
      for (let s = Math.floor(c * n / columns); s < Math.max(Math.floor((c + 1) * n / columns), Math.floor(c * n / columns) + 1); s++) { const r = hits.at(hits.first + s, this.cursor.layer); if (r) for (let k = 0; k < 6; k++) sum[k] += r[k]; }
      let top = y + h;
      shares(sum).forEach((share, k) => { const part = share * h; top -= part; ctx.fillStyle = colours[k]; ctx.fillRect(x + c * w / columns, top, Math.max(1, w / columns - (w / columns > 4 ? 1 : 0)), part); });
    }
    for (const f of [0, 0.5, 1]) axisText(ctx, theme, x - 4, y + 2 + f * (h - 4), percent(1 - f), "right");
    axisText(ctx, theme, x, height - 20, hits.first); axisText(ctx, theme, x + w, height - 20, hits.last, "right");
    axisText(ctx, theme, x + w / 2, height - 8, `decode step; ${this.cursor.layer == null ? "all layers" : "layer " + this.cursor.layer}, share of the attended tokens`, "center");
    if (this.cursor.step != null && this.cursor.step >= hits.first && this.cursor.step <= hits.last) { const at = x + (this.cursor.step - hits.first) / n * w; ctx.strokeStyle = theme.text; ctx.lineWidth = 2; ctx.strokeRect(at, y, Math.max(2, w / n), h); ctx.lineWidth = 1; }
    const sum = new Float64Array(6); for (const r of hits.layers) if (r) for (let k = 0; k < 6; k++) sum[k] += r[k];
    const s = shares(sum);
    this.hitsSection.note.textContent = `mean: device ${percent(s[0])}, pool ${percent(s[1])}, drive ${percent(s[2] + s[3])}` + (sum[5] ? `; ${percent(sum[5] / Math.max(1, sum[3]))} of the drive's were prefetched` : "");
  }
  drawLayers(ctx, width, height, theme) {
    const hits = this.store.hits, n = hits.layers.length, x = 46, y = 4, w = width - x - 12;
    if (!n) { this.layersFrame = null; return; }
    this.height = Math.max(90, Math.min(226, n * 14 + 34));
    if (this.hitsByLayer.height !== this.height) { this.hitsByLayer.height = this.height; this.hitsByLayer.now(); return; }
    const h = (height - y - 30) / n, colours = Object.values(this.palette.tiers), step = this.cursor.step;
    this.layersFrame = { y, h, n };
    upright(ctx, theme, 9, y + n * h / 2, "layer");
    for (let l = 0; l < n; l++) {
      const r = step == null ? hits.layers[l] : hits.at(step, l);
      if (!r) continue;
      let at = x;
      shares(r).forEach((share, k) => { ctx.fillStyle = colours[k]; ctx.fillRect(at, y + l * h, share * w, Math.max(1, h - 1)); at += share * w; });
      if (h > 9 || l % 4 === 0) axisText(ctx, theme, x - 6, y + (l + 0.5) * h, l, "right");
      if (l === this.cursor.layer) { ctx.strokeStyle = theme.text; ctx.lineWidth = 2; ctx.strokeRect(x, y + l * h, w, h - 1); ctx.lineWidth = 1; }
    }
    for (const f of [0, 0.5, 1]) axisText(ctx, theme, x + f * w, height - 20, percent(f), f === 0 ? "left" : f === 1 ? "right" : "center");
    axisText(ctx, theme, x + w / 2, height - 8, `share by layer, ${step == null ? "all steps" : "step " + step}; click a layer`, "center");
  }

  buildTimeline(section) {
    this.line = section;
    const tools = make("span", "hi-tools", section.bar);
    const button = (label, hint, act) => { const b = make("button", "hi-button", tools, label); b.title = hint; b.type = "button"; b.addEventListener("click", act); return b; };
    this.followButton = button("Follow", "keep the newest steps in view", () => { this.following = true; this.follow(); this.time.redraw(); this.measure(); });
    button("Fit", "show everything (0)", () => this.look(this.store.spans.t0, this.store.spans.t1));
    button("+", "zoom in (W or +)", () => this.zoom(0.5)); button("-", "zoom out (S or -)", () => this.zoom(2));
    this.tableButton = button("Table", "the spans in view as a table (T)", () => this.toggleTable());
    button("PNG", "save the current view as PNG", () => this.exportPng()); button("SVG", "save the current view as SVG", () => this.exportSvg());
    if (!this.model.alone) { button("HTML", "save this board as a self-contained page", () => this.model.send({ kind: "export", what: "html" })); button("Trace", "save all spans as a file for ui.perfetto.dev", () => this.model.send({ kind: "export", what: "trace" })); button("Perfetto", "open all spans in ui.perfetto.dev; without a network they are saved", () => { this.store.tab = navigator.onLine ? window.open(this.model.get("perfetto")) : null; this.model.send({ kind: "export", what: "perfetto" }); }); }
    const legend = make("div", "hi-legend", section);
    for (const [name, colour] of Object.entries(this.palette.colours)) { const item = make("span", "", legend, name), i = make("i", ""); i.style.background = colour; item.prepend(i); }
    const pale = make("i", "hi-pale"); make("span", "", legend, "modelled: pale, dashed, ~").prepend(pale);
    this.time = this.panel(section, 150, "timeline; zoom: wheel, W and S; pan: drag, A and D; select a span: N and P; table: T", (c, w, h, t) => this.drawTime(c, w, h, t));
    const canvas = this.time.canvas;
    canvas.tabIndex = 0; canvas.classList.add("hi-time");
    this.tip = make("div", "hi-tip", section); this.tip.hidden = true;
    this.spoken = make("div", "hi-facts", section); this.spoken.setAttribute("aria-live", "polite");
    this.table = make("div", "hi-table", section); this.table.hidden = true;
    canvas.addEventListener("wheel", (e) => { e.preventDefault(); if (e.shiftKey || Math.abs(e.deltaX) > Math.abs(e.deltaY)) this.pan((e.deltaX || e.deltaY) / 1000); else this.zoom(Math.exp(e.deltaY / 400), e.offsetX); }, { passive: false });
    let drag = null;
    canvas.addEventListener("pointerdown", (e) => { drag = { x: e.offsetX, from: this.view.from, to: this.view.to, moved: false }; canvas.setPointerCapture(e.pointerId); });
    canvas.addEventListener("pointermove", (e) => {
      if (drag) { const ms = (drag.x - e.offsetX) * (drag.to - drag.from) / this.plot(); if (Math.abs(drag.x - e.offsetX) > 3) drag.moved = true; if (drag.moved) this.look(drag.from + ms, drag.to + ms); }
      else this.hover(e);
    });
    canvas.addEventListener("pointerup", (e) => { if (drag && !drag.moved) { const step = this.store.spans.stepAt(this.timeAt(e.offsetX)); if (step != null) this.point({ step: step === this.cursor.step ? null : step }); } drag = null; });
    canvas.addEventListener("pointerleave", () => { this.tip.hidden = true; });
    canvas.addEventListener("dblclick", () => this.look(this.store.spans.t0, this.store.spans.t1));
    canvas.addEventListener("keydown", (e) => {
      const act = { w: () => this.zoom(0.6), "+": () => this.zoom(0.6), "=": () => this.zoom(0.6), s: () => this.zoom(1.6), "-": () => this.zoom(1.6), a: () => this.pan(-0.15), ArrowLeft: () => this.pan(-0.15), d: () => this.pan(0.15), ArrowRight: () => this.pan(0.15), 0: () => this.look(this.store.spans.t0, this.store.spans.t1), Home: () => this.look(this.store.spans.t0, this.store.spans.t1), f: () => this.followButton.click(), t: () => this.toggleTable(), n: () => this.next(1), p: () => this.next(-1), ArrowDown: () => this.lane(1), ArrowUp: () => this.lane(-1), Escape: () => this.point({ step: null }) }[e.key.length === 1 ? e.key.toLowerCase() : e.key];
      if (act && !e.ctrlKey && !e.metaKey && !e.altKey) { e.preventDefault(); e.stopPropagation(); act(); }
    });
  }
  plot() { return Math.max(50, this.time.width - LEFT - 8); }
  timeAt(x) { return this.view.from + (x - LEFT) * (this.view.to - this.view.from) / this.plot(); }
  look(from, to) { this.following = false; this.aim(from, to); this.time.redraw(); this.measure(); }
  aim(from, to) {
    const { t0, t1 } = this.store.spans, least = 1e-3, whole = Math.max(least, t1 - t0);
    let width = Math.min(whole * 1.02, Math.max(least, to - from));
    from = Math.max(t0 - whole * 0.01, Math.min(from, t1 + whole * 0.01 - width));
    this.view = { from, to: from + width };
    this.followButton.setAttribute("aria-pressed", this.following);
  }
  zoom(factor, x) { const at = this.timeAt(x ?? LEFT + this.plot() / 2), { from, to } = this.view; this.look(at - (at - from) * factor, at + (to - at) * factor); }
  pan(share) { const by = share * (this.view.to - this.view.from); this.look(this.view.from + by, this.view.to + by); }
  follow() { // the latest six steps of a running run, everything before the first step
    if (!this.time) return;
    const spans = this.store.spans, live = ["prefill", "decode"].includes(this.store.state.phase);
    if (!this.following && this.view && this.viewRun === this.store.run) return;
    if (this.viewRun !== this.store.run) { this.following = true; this.viewRun = this.store.run; }
    const step = spans.stepStart.length - 6, from = step > 0 && (live || this.model.get("parts").length > 1) ? spans.stepStart[step] : undefined;
    this.aim(from ?? spans.t0, spans.t1);
  }
  reachStep() { // scroll to a step selected in another view
    const step = this.cursor.step, at = step == null ? null : this.store.spans.windowOf(step);
    if (!this.time || step === this.reached || (step != null && !at)) return; // its spans may be yet to come
    this.reached = step;
    if (!at || !this.view || (at[0] >= this.view.from && at[1] <= this.view.to)) return;
    const width = Math.max(this.view.to - this.view.from, 1.5 * (at[1] - at[0])), middle = (at[0] + at[1]) / 2;
    this.look(middle - width / 2, middle + width / 2);
  }
  drawTime(ctx, width, height, theme) {
    const spans = this.store.spans;
    if (!this.view) this.view = { from: spans.t0, to: spans.t1 };
    const need = timelineHeight(spans);
    if (this.time.height !== need) { this.time.height = need; this.time.now(); return; }
    const before = this.stat?.shown;
    this.stat = drawTimeline(ctx, width, spans, this.view, { theme, palette: this.palette, cursor: this.cursor.step });
    if (this.stat.shown !== before) this.measure();
    if (this.marked) { const { lane, i } = this.marked, l = spans.lanes[lane], k = this.plot() / (this.view.to - this.view.from); let y = TOP; for (let a = 0; a < lane; a++) y += spans.lanes[a].tracks * ROW + 6; ctx.strokeStyle = theme.text; ctx.lineWidth = 2; ctx.strokeRect(LEFT + (l.start[i] - this.view.from) * k, y + l.track[i] * ROW, Math.max(2, (l.end[i] - l.start[i]) * k), ROW - 3); ctx.lineWidth = 1; }
  }
  measure() { if (this.time) this.measuring ??= setTimeout(() => this.measureNow(), 120); } // debounced: not at every frame of a zoom
  measureNow() { // statistics of the current view
    clearTimeout(this.measuring); this.measuring = null;
    const spans = this.store.spans, v = this.view;
    if (!this.time) return;
    if (!v || !spans.n) { this.line.note.textContent = ""; return; }
    const from = Math.max(v.from, spans.t0), to = Math.min(v.to, spans.t1);
    this.overlap = spans.overlap(from, to);
    const busy = LANES.map((name) => [name, spans.busy([name], from, to)]).filter(([, ms]) => ms > 0).map(([name, ms]) => `${name} ${percent(ms / (to - from))}`).join(", ");
    const some = spans.lanes.some((l) => l.holdsModelled);
    this.line.note.textContent = `${number(to - from, to - from < 10 ? 2 : 0)} ms in view; overlap ${percent(this.overlap)} of the shorter side; busy: ${busy}${some ? "; includes modelled spans" : ""}`;
    const stat = this.stat ?? { shown: 0, merged: 0 };
    this.spoken.textContent = this.marked ? this.describe(this.marked) : `${number(stat.shown)} of ${number(spans.n)} spans in view` + (stat.merged ? `, ${number(stat.merged)} of them narrower than a pixel and merged with a neighbour` : "") + "; none omitted";
    if (!this.table.hidden) this.fillTable();
  }
  describe({ lane, i }) {
    const spans = this.store.spans, l = spans.lanes[lane];
    return `${LANES[lane]} ${spans.kinds[l.kind[i]]}, layer ${l.layer[i]}, step ${l.step[i]}: ${number((l.end[i] - l.start[i]) * 1e3, 1)} us from ${number(l.start[i], 3)} ms, ${number(l.nbytes[i])} bytes, ${l.modelled[i] ? "modelled" : "measured"}`;
  }
  spanAt(x, y) {
    const spans = this.store.spans, t = this.timeAt(x), slack = 2 * (this.view.to - this.view.from) / this.plot();
    let top = TOP;
    for (let k = 0; k < spans.lanes.length; k++) {
      const l = spans.lanes[k], track = Math.floor((y - top) / ROW);
      if (track >= 0 && track < l.tracks) {
        let best = null;
        for (let i = l.lower(t - l.longest - slack); i < l.n && l.start[i] <= t + slack; i++) if (l.track[i] === track && l.end[i] >= t - slack && (best === null || l.end[i] - l.start[i] > l.end[best] - l.start[best])) best = i;
        return best === null ? null : { lane: k, i: best };
      }
      top += l.tracks * ROW + 6;
    }
    return null;
  }
  hover(e) {
    const found = this.spanAt(e.offsetX, e.offsetY);
    this.tip.hidden = !found;
    if (!found) return;
    this.tip.textContent = this.describe(found);
    this.tip.style.left = Math.min(e.offsetX + 12, Math.max(0, this.time.width - 340)) + "px";
    this.tip.style.top = this.time.canvas.offsetTop + e.offsetY + 16 + "px";
  }
  next(by) {
    const spans = this.store.spans;
    if (!this.marked || !spans.lanes[this.marked.lane].n) { const lane = spans.lanes.findIndex((l) => l.n); if (lane < 0) return; this.marked = { lane, i: Math.min(spans.lanes[lane].n - 1, spans.lanes[lane].lower(this.view.from)) }; }
    else this.marked.i = Math.min(spans.lanes[this.marked.lane].n - 1, Math.max(0, this.marked.i + by));
    this.reveal();
  }
  lane(by) {
    const spans = this.store.spans;
    if (!this.marked) return this.next(0);
    const t = spans.lanes[this.marked.lane].start[this.marked.i];
    for (let k = this.marked.lane + by; k >= 0 && k < spans.lanes.length; k += by) if (spans.lanes[k].n) { this.marked = { lane: k, i: Math.min(spans.lanes[k].n - 1, spans.lanes[k].lower(t)) }; break; }
    this.reveal();
  }
  reveal() { const l = this.store.spans.lanes[this.marked.lane], t = l.start[this.marked.i], width = this.view.to - this.view.from; if (t < this.view.from || t > this.view.to) this.look(t - width / 2, t + width / 2); this.time.redraw(); this.measure(); }
  toggleTable() { this.table.hidden = !this.table.hidden; this.tableButton.setAttribute("aria-pressed", !this.table.hidden); if (!this.table.hidden) this.fillTable(); }
  fillTable() { // accessible form: the same numbers as text
    const spans = this.store.spans, rows = [];
    spans.lanes.forEach((l, lane) => { for (let i = l.lower(this.view.from - l.longest); i < l.n && l.start[i] <= this.view.to; i++) if (l.end[i] >= this.view.from) rows.push({ lane, i }); });
    const shown = rows.sort((a, b) => spans.lanes[a.lane].start[a.i] - spans.lanes[b.lane].start[b.i]).slice(0, 200);
    const table = make("table", "", null);
    make("caption", "", table, `${number(shown.length)} of ${number(rows.length)} spans in view, by start` + (shown.length < rows.length ? "; zoom in for the rest" : ""));
    const head = make("tr", "", make("thead", "", table));
    for (const name of ["lane", "kind", "layer", "step", "start, ms", "us", "bytes", ""]) make("th", "", head, name).scope = "col";
    const body = make("tbody", "", table);
    for (const { lane, i } of shown) { const l = spans.lanes[lane], tr = make("tr", "", body); for (const v of [LANES[lane], spans.kinds[l.kind[i]], l.layer[i], l.step[i], number(l.start[i], 3), number((l.end[i] - l.start[i]) * 1e3, 1), number(l.nbytes[i]), l.modelled[i] ? "modelled" : "measured"]) make("td", "", tr, v); }
    this.table.replaceChildren(table);
  }
  exportPng() { this.time.canvas.toBlob((blob) => save("timeline.png", blob)); }
  svg() { const width = this.time.width || 1000, ctx = new SvgContext(width, timelineHeight(this.store.spans)); drawTimeline(ctx, width, this.store.spans, this.view, { theme: this.theme ??= themeOf(this.root), palette: this.palette, cursor: this.cursor.step }); return ctx.toString(); }
  exportSvg() { save("timeline.svg", new Blob([this.svg()], { type: "image/svg+xml" })); }

  buildWhy(section) {
    this.why = section; section.classList.add("hi-why"); this.whyTitle = section.bar.querySelector("h4");
    const tools = make("span", "hi-tools", section.bar), b = make("button", "hi-button", tools, "slowest step");
    b.type = "button"; b.title = "mark the slowest step, and explain it"; b.hidden = true; this.slowest = b;
    b.addEventListener("click", () => this.point({ step: this.cursor.step == null ? this.store.state.why.step : null }));
    this.whyBody = make("div", "", section); this.whyBody.setAttribute("aria-live", "polite");
  }
  drawWhy() {
    if (!this.why) return;
    const run = this.store.state.why, step = this.cursor.step, one = step == null ? run : this.store.detail.why?.sentence ? this.store.detail.why : null;
    this.whyTitle.textContent = step == null ? "Where this run's time went" : "Why was this token slow?";
    this.slowest.hidden = !run; this.slowest.textContent = step == null ? "slowest step" : "whole run";
    const key = one ? one.sentence : step == null ? "" : "step";
    if (key === this.whyKey) return;
    this.whyKey = key;
    const fresh = one && (step == null || one.step === step);
    if (!fresh) { this.whyBody.replaceChildren(make("p", "hi-note", null, step == null ? "appears when the run has ended" : this.model.alone ? "this page has no kernel: steps are explained in the notebook" : "looking it up ...")); return; }
    const sentence = make("p", "hi-sentence", null, one.sentence), bars = make("div", "hi-bars", null);
    const works = this.palette.work, values = (column) => one.rows.filter((r) => r[0] in works).map((r) => [r[0], r[2 + column]]);
    const longest = Math.max(1e-9, ...[0, 1].map((c) => values(c).reduce((sum, v) => sum + v[1], 0)));
    for (const c of [0, 1]) {
      make("span", "hi-note", bars, one.columns[c]);
      const bar = make("div", "hi-stack", bars);
      for (const [name, ms] of values(c)) { const i = make("i", "", bar); i.style.width = 100 * ms / longest + "%"; i.style.background = works[name]; i.title = `${name}: ${number(ms, 1)} ms`; }
    }
    const scroll = make("div", "hi-table", null), table = make("table", "", scroll), head = make("tr", "", make("thead", "", table)), body = make("tbody", "", table);
    for (const name of ["", ...one.columns, ""]) make("th", "", head, name).scope = "col";
    for (const [name, unit, mine, usual] of one.rows) {
      const tr = make("tr", "", body), th = make("th", "", tr, name); th.scope = "row";
      if (works[name]) { const i = make("i", "", null); i.style.background = works[name]; th.prepend(i); }
      const digits = unit === "tokens" || unit === "MiB/s" ? 0 : 1;
      make("td", "", tr, number(mine, digits)); make("td", "", tr, number(usual, digits)); make("td", "", tr, unit);
    }
    this.whyBody.replaceChildren(sentence, bars, scroll);
    this.why.dataset.cause = one.cause;
  }

  buildMemory(section) { this.memory = make("div", "hi-memory", section); this.memorySection = section; }
  drawMemory() {
    const s = this.store.state, spans = this.store.spans;
    if (!this.memory || !s.phase) return;
    const steps = Math.max(1, this.store.hits.steps.size), cell = (name, value, hint) => { const d = make("div", "", null); make("b", "", d, value); make("span", "", d, name); d.title = hint ?? ""; return d; };
    const memory = Object.entries(s.memory ?? {}).filter(([, v]) => v).map(([k, v]) => cell(k === "drive" ? "on the drive (reserved)" : `in memory: ${k === "device" || k === "host" ? "KV, " + k : k === "hits" ? "hit table" : "key codes"}`, bytes(v), `${number(v)} bytes`));
    const lanes = LANES.map((name, i) => [name, spans.lanes[i].bytes]).filter(([, v]) => v).map(([name, v]) => cell(`${name} lane, per token`, bytes(v / steps), `${number(v)} bytes in ${steps} steps`));
    const cells = [...memory, ...lanes], text = cells.map((one) => one.textContent).join();
    if (text !== this.memoryText) { this.memoryText = text; this.memory.replaceChildren(...cells); }
    this.memorySection.note.textContent = "current memory, and bytes processed by the spans of each lane, measured";
  }
}

// A trace to a tab of ui.perfetto.dev by its documented handshake: PING until it answers PONG, then the file. Where no tab
// opens or answers (no network, a blocked popup) the trace is saved.
async function toPerfetto(tab, address, name, blob) {
  if (!tab) return save(name, blob);
  const buffer = await blob.arrayBuffer(), { origin } = new URL(address);
  const done = (answered) => {
    clearInterval(pinging); clearTimeout(patience); window.removeEventListener("message", hear);
    if (answered) return tab.postMessage({ perfetto: { buffer, title: "hillinfer", fileName: name } }, origin);
    tab.close(); save(name, blob);
  };
  const hear = (e) => { if (e.source === tab && e.data === "PONG") done(true); };
  window.addEventListener("message", hear);
  const pinging = setInterval(() => (tab.closed ? done(false) : tab.postMessage("PING", origin)), 100), patience = setTimeout(() => done(false), 10_000);
}

const stores = new WeakMap();
function storeOf(model) {
  if (stores.has(model)) return stores.get(model);
  const store = new Store();
  stores.set(model, store);
  store.views = new Set();
  store.refresh = () => { if (!store.queued) { store.queued = true; requestAnimationFrame(() => { store.queued = false; for (const board of store.views) board.refresh(); }); } };
  model.on("msg:custom", (message, buffers) => {
    if (message.kind === "file") {
      const blob = new Blob(buffers, { type: message.type });
      return message.open ? toPerfetto(store.tab, model.get("perfetto"), message.name, blob) : save(message.name, blob);
    }
    if (message.kind !== "more") return;
    if (!store.accept(message, buffers)) { if (!store.asked) { store.asked = true; model.send({ kind: "have", run: store.run, have: store.have() }); } return; }
    store.asked = false;
    store.refresh();
  });
  model.on("change:cursor", store.refresh);
  model.send({ kind: "have", run: null, have: store.have() });
  return store;
}

const board = {
  render({ model, el }) {
    const store = storeOf(model), root = make("div", "", el), ended = watchTheme(root, () => board.refresh(true)), board = new Board(model, store, root);
    store.views.add(board);
    board.refresh();
    return () => { store.views.delete(board); ended(); board.sizes.disconnect(); for (const p of board.panels) p.watch.disconnect(); };
  },
};
export default board;
