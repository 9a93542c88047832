// Attention over every position of a text. The kernel sends tiles of a pyramid; a pixel takes the largest of its cells.

const TILE = 512, EVEN = 97, DECADE = 32; // as in pyramid.py
const LOW = -1.5, HIGH = 2.5; // decades around an even share, from the first colour to the last
const LEFT = 56, TOP = 4, AXIS = 34, AROUND = 16; // pixels; tokens of text on either side
const PLACES = ["the device", "host memory", "the drive", "places not recorded"];
const rgb = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
const pixel = ([r, g, b]) => ((255 << 24) | (b << 16) | (g << 8) | r) >>> 0;

class AttentionPane {
  constructor(model, root) {
    this.began = performance.now();
    this.model = model; this.root = root; this.tiles = new Map(); this.texts = new Map(); this.asked = new Set(); this.view = null; this.withPicked = true;
    this.palette = model.get("palette"); this.tierColours = [...Object.values(this.palette.tiers).slice(0, 3), "#8a8a8a"];
    root.classList.add("hi-board", "hi-map");
    const bar = make("div", "hi-bar", root), tools = make("span", "hi-tools", null);
    make("h4", "", bar, "Attention over the text");
    this.note = make("span", "hi-note", bar); bar.append(tools);
    this.select = make("select", "hi-button", tools); this.select.setAttribute("aria-label", "rows");
    this.select.addEventListener("change", () => this.open(this.select.value === "" ? null : +this.select.value));
    const button = (label, hint, act) => { const b = make("button", "hi-button", tools, label); b.type = "button"; b.title = hint; b.addEventListener("click", act); return b; };
    this.pickedButton = button("Selected", "what was selected, and where it lay, below each row (X)", () => this.togglePicked());
    button("Fit", "the whole text (0)", () => this.look(0, this.n)); button("+", "zoom in (W or +)", () => this.zoom(0.5)); button("-", "zoom out (S or -)", () => this.zoom(2));
    button("PNG", "save the current view as PNG", () => this.panel.canvas.toBlob((blob) => save("attention.png", blob)));
    this.drawLegend(make("div", "hi-legend", root));
    this.panel = canvasPanel(root, 200, "attention by layer and position; zoom: wheel, W and S; pan: drag, A and D; cell: arrow keys; heads of a layer: Enter", () => (this.theme ??= themeOf(root)), (c, w, h, t) => this.draw(c, w, h, t));
    this.spoken = make("div", "hi-facts", root); this.spoken.setAttribute("aria-live", "polite");
    this.passage = make("div", "hi-passage", root);
    this.listen(this.panel.canvas);
    for (const name of ["state", "layer"]) model.on("change:" + name, () => this.changed());
    model.on("msg:custom", (message, buffers) => this.accept(message, buffers));
    root.hillinfer = this; // gives tests access to the drawn state
    this.changed();
  }
  get n() { return Math.max(1, this.state.n ?? 1); }
  get least() { return Math.max(this.state.levels[this.layer == null ? 0 : 1], this.model.alone ? this.state.finest : 0); } // the finest level of this view
  changed() {
    const before = this.state?.version;
    this.state = this.model.get("state"); this.layer = this.model.get("layer");
    if (before !== this.state.version) { this.tiles.clear(); this.texts.clear(); this.asked.clear(); if (before === undefined || !this.view || this.view.to >= this.n) this.view = { from: 0, to: this.n }; }
    const { layers = [], heads = 0 } = this.state;
    this.rows = this.layer == null ? layers : [...Array(heads).keys()];
    this.select.replaceChildren(...["", ...layers].map((layer) => { const o = make("option", "", null, layer === "" ? "all layers, mean of their heads" : `layer ${layer}, its heads`); o.value = layer; return o; }));
    this.select.value = this.layer ?? "";
    this.rowHeight = Math.max(7, Math.min(18, Math.floor(352 / Math.max(1, this.rows.length))));
    this.panel.height = Math.max(90, this.rows.length * this.rowHeight + TOP + AXIS);
    this.at = null; this.sharp = false; this.tell(); this.panel.redraw();
  }
  accept(message, buffers) {
    if (message.version !== this.state.version) return;
    (message.tiles ?? []).forEach((key, i) => { const b = buffers[i]; this.tiles.set(key.join(), new Uint8Array(b.buffer, b.byteOffset, b.byteLength)); });
    (message.texts ?? []).forEach(([chunk, pieces]) => this.texts.set(chunk, pieces));
    this.panel.redraw(); this.tell();
  }
  ask(kind, key) { // once each, and tiles only when zooming rests
    if (this.model.alone || this.asked.has(kind + key)) return;
    this.wanted ??= { tiles: new Map(), texts: new Set() };
    if (kind === "tiles") this.wanted.tiles.set(key.join(), key); else this.wanted.texts.add(key);
    clearTimeout(this.asking);
    this.asking = setTimeout(() => {
      const tiles = [...this.wanted.tiles.values()], texts = [...this.wanted.texts];
      for (const one of tiles) this.asked.add("tiles" + one);
      for (const one of texts) this.asked.add("texts" + one);
      this.wanted = null;
      setTimeout(() => this.asked.clear(), 3000); // what was lost is asked for again
      this.model.send({ kind: "want", version: this.state.version, tiles, texts });
    }, 40);
  }

  drawLegend(legend) {
    make("span", "", legend, "times an even share:");
    const scale = make("span", "hi-scale", legend), bar = make("i", "", null);
    bar.style.background = `linear-gradient(to right, ${CIVIDIS.map((_, i) => cividis(i / 7)).join(",")})`;
    scale.append("1/30 ", bar, " 300");
    make("span", "", legend, "below each row: selected, and where most of it lay:");
    PLACES.slice(0, 3).forEach((name, i) => { const mark = make("i", "", null); mark.style.background = this.tierColours[i]; make("span", "", legend, name.replace("the ", "")).prepend(mark); });
  }
  colours(theme) {
    const back = rgb(theme.back);
    this.heat = Uint32Array.from({ length: 256 }, (_, code) => pixel(code ? cividis(((code - EVEN) / DECADE - LOW) / (HIGH - LOW)).match(/\d+/g).map(Number) : back));
    this.marks = Uint32Array.from({ length: 256 }, (_, code) => { const a = code & 63 ? 0.3 + 0.7 * (code & 63) / 63 : 0, c = rgb(this.tierColours[code >> 6]); return pixel(back.map((b, i) => Math.round(b + a * (c[i] - b)))); });
    this.coloured = theme;
  }
  // The tile that a cell of a level lies in, or the one of the nearest coarser level that has arrived, and the cell in it.
  find(level, cell) {
    for (let l = level; l <= this.state.top; l++) {
      const c = Math.floor(cell / 2 ** (l - level)), key = [this.layer ?? -1, l, c >> 9], tile = this.tiles.get(key.join());
      if (tile) return { tile, cell: c & 511, level: l };
      if (l === level) this.ask("tiles", key);
    }
    return null;
  }
  draw(ctx, width, height, theme) {
    const { from, to } = this.view, ratio = DPR(), w = Math.round((width - LEFT - 8) * ratio), rows = this.rows.length;
    if (!rows || w < 10) { axisText(ctx, theme, width / 2, height / 2, "appears with the first observed step", "center"); return; }
    if (this.coloured !== theme) this.colours(theme);
    const high = Math.round(this.rowHeight * ratio), strip = this.withPicked ? Math.max(2, Math.round(0.3 * high)) : 0, per = (to - from) / w;
    const level = this.level = Math.min(this.state.top, Math.max(this.least, Math.floor(Math.log2(per)))), block = 2 ** level;
    if (this.image?.width !== w || this.image.height !== rows * high) { this.image = ctx.createImageData(w, rows * high); this.pixels = new Uint32Array(this.image.data.buffer); }
    const line = new Uint32Array(w), below = new Uint32Array(w), columns = [], empty = pixel(rgb(theme.back));
    this.sharp = true;
    for (let x = 0, last = null; x < w; x++) {
      const cell = Math.floor((from + x * per) / block), end = Math.max(cell + 1, Math.ceil((from + (x + 1) * per) / block));
      if (last?.from === cell && last.to === end) { columns.push(last); continue; }
      const found = cell * block < this.n ? this.find(level, cell) : null;
      if (cell * block < this.n && found?.level !== level) this.sharp = false;
      last = { from: cell, to: end, found, at: found?.cell, end: found && Math.min(TILE, found.cell + (found.level === level ? end - cell : 1)) };
      columns.push(last);
    }
    this.pixels.fill(empty);
    for (let r = 0; r < rows; r++) {
      for (let x = 0; x < w; x++) {
        const { found, at, end } = columns[x];
        if (!found) { line[x] = below[x] = empty; continue; }
        const own = found.tile, first = 2 * (r * TILE + at);
        let heat = own[first], mark = own[first + 1];
        for (let i = first + 2, stop = 2 * (r * TILE + end); i < stop; i += 2) { if (own[i] > heat) heat = own[i]; if ((own[i + 1] & 63) > (mark & 63)) mark = own[i + 1]; }
        line[x] = this.heat[heat]; below[x] = this.marks[mark];
      }
      for (let y = 0; y < high - 1; y++) this.pixels.set(y < high - 1 - strip ? line : below, (r * high + y) * w);
    }
    ctx.putImageData(this.image, Math.round(LEFT * ratio), Math.round(TOP * ratio));
    this.drawAxes(ctx, width, theme, high / ratio);
    if (this.sharp) this.paintedMs ??= performance.now() - this.began;
  }
  drawAxes(ctx, width, theme, high) {
    const { from, to } = this.view, bottom = TOP + this.rows.length * high, X = (p) => LEFT + (p - from) / (to - from) * (width - LEFT - 8);
    this.high = high;
    const every = Math.ceil(12 / high);
    this.rows.forEach((row, i) => { if (i % every === 0) axisText(ctx, theme, LEFT - 6, TOP + (i + 0.5) * high, row, "right"); });
    upright(ctx, theme, 9, (TOP + bottom) / 2, this.layer == null ? "layer" : "head");
    const tick = Math.max(1, niceTick((to - from) / Math.max(2, (width - LEFT) / 110)));
    for (let p = Math.ceil(from / tick) * tick; p <= to; p += tick) {
      ctx.fillStyle = theme.faint; ctx.fillRect(X(p), bottom, 1, 4);
      if (X(p) < width - 60) axisText(ctx, theme, X(p) + 3, bottom + 9, number(p));
    }
    axisText(ctx, theme, (LEFT + width) / 2, bottom + 25, `position in the text, ${number(to - from)} of ${number(this.n)} tokens; a cell: ${number(2 ** this.level)}`, "center");
    if (this.at) { // visible on dark and light cells
      const x = Math.max(LEFT, X(this.at.first)), w = Math.max(3, Math.min(width - 8, X(this.at.last)) - x);
      for (const [colour, thick] of [[theme.back, 4], [theme.text, 2]]) { ctx.strokeStyle = colour; ctx.lineWidth = thick; ctx.strokeRect(x, TOP + this.at.row * high, w, high - 1); }
      ctx.lineWidth = 1;
    }
  }

  point(row, cell) { // mark a cell of the drawn level
    const block = 2 ** this.level, first = cell * block;
    if (row < 0 || row >= this.rows.length || first < 0 || first >= this.n) return;
    this.at = { row, cell, first, last: Math.min(this.n, first + block) };
    this.tell(); this.panel.redraw();
  }
  tell() {
    const s = this.state, at = this.at, blocks = 2 ** this.least;
    const kept = this.model.alone ? "this page has" : this.layer == null ? "kept in" : "heads are kept in";
    this.note.textContent = s.steps ? [s.setting, s.steps > 1 ? `mean over ${number(s.steps)} steps` : "one step", blocks > 1 ? `${kept} blocks of ${number(blocks)} tokens` : ""].filter(Boolean).join("; ") : "";
    if (!at) { this.spoken.textContent = s.steps ? "point at a cell, or move with the arrow keys" : ""; this.passage.replaceChildren(); return; }
    const found = this.find(this.level, at.cell), row = this.rows[at.row];
    const where = `${this.layer == null ? "layer" : "head"} ${row}, ` + (at.last - at.first > 1 ? `tokens ${number(at.first)} to ${number(at.last - 1)}` : `token ${number(at.first)}`);
    let what = "loading";
    if (found?.level === this.level) {
      const [heat, mark] = found.tile.subarray(2 * (at.row * TILE + found.cell)), ratio = 10 ** ((heat - EVEN) / DECADE);
      what = heat ? `${heat === 1 ? "at most " : ""}${percentOf(ratio * (at.last - at.first) / this.n)} of the attention, ${Number(ratio.toPrecision(2)).toLocaleString("en")} times an even share` : "no attention recorded";
      const often = `${percent((mark & 63) / 63)} ${s.steps > 1 ? "of the times" : "of it"}`;
      what += mark & 63 ? `; selected ${often}, most from ${PLACES[mark >> 6]}` : "; not selected";
    }
    this.spoken.textContent = `${where}: ${what}`;
    this.passage.replaceChildren(...(s.text ? this.textAround(at) : []));
  }
  textAround({ first, last }) {
    const parts = [["", Math.max(0, first - AROUND), first], ["mark", first, Math.min(last, first + 2 * AROUND)]];
    if (last - first <= 2 * AROUND) parts.push(["", last, Math.min(this.n, last + AROUND)]);
    return parts.map(([tag, from, to]) => {
      let text = "";
      for (let i = from; i < to; i++) { const chunk = i >> 9, pieces = this.texts.get(chunk); if (!pieces) { this.ask("texts", chunk); return make("span", "", null, this.model.alone ? "" : "…"); } text += (pieces[i & 511] ?? "").replace(/\n/g, "↵ "); }
      return make(tag || "span", "", null, text + (tag && last > to ? "…" : ""));
    });
  }
  look(from, to) {
    const width = Math.min(this.n, Math.max(8, to - from)), first = Math.max(0, Math.min(from, this.n - width));
    this.view = { from: first, to: first + width }; this.sharp = false; this.panel.redraw();
  }
  position(x) { return this.view.from + (x - LEFT) / Math.max(50, this.panel.width - LEFT - 8) * (this.view.to - this.view.from); }
  zoom(factor, x) { const { from, to } = this.view, at = x === undefined ? (this.at ? (this.at.first + this.at.last) / 2 : (from + to) / 2) : this.position(x); this.look(at - (at - from) * factor, at + (to - at) * factor); }
  pan(share) { const by = share * (this.view.to - this.view.from); this.look(this.view.from + by, this.view.to + by); }
  open(layer) { if (layer !== null && this.model.alone && !this.tiles.has([layer, this.state.top, 0].join())) { this.select.value = this.layer ?? ""; this.spoken.textContent = "this page has no kernel: heads are shown in the notebook"; return; } this.model.set("layer", layer); this.model.save_changes(); }
  togglePicked() { this.withPicked = !this.withPicked; this.pickedButton.setAttribute("aria-pressed", this.withPicked); this.panel.redraw(); }
  move(rows, cells) {
    const block = 2 ** this.level, at = this.at ?? { row: 0, first: this.view.from };
    this.point(Math.min(this.rows.length - 1, Math.max(0, at.row + rows)), Math.floor(at.first / block) + cells);
    if (this.at && (this.at.first < this.view.from || this.at.last > this.view.to)) this.look(this.at.first - (this.view.to - this.view.from) / 2, this.at.first + (this.view.to - this.view.from) / 2);
  }
  hover(x, y) { this.point(Math.floor((y - TOP) / this.high), Math.floor(this.position(x) / 2 ** this.level)); }
  listen(canvas) {
    canvas.tabIndex = 0; canvas.classList.add("hi-time"); this.pickedButton.setAttribute("aria-pressed", true);
    canvas.addEventListener("wheel", (e) => { e.preventDefault(); if (e.shiftKey || Math.abs(e.deltaX) > Math.abs(e.deltaY)) this.pan((e.deltaX || e.deltaY) / 1000); else this.zoom(Math.exp(e.deltaY / 400), e.offsetX); }, { passive: false });
    let drag = null;
    canvas.addEventListener("pointerdown", (e) => { drag = { x: e.offsetX, ...this.view, moved: false }; canvas.setPointerCapture(e.pointerId); });
    canvas.addEventListener("pointermove", (e) => {
      if (!drag) return this.hover(e.offsetX, e.offsetY);
      if (Math.abs(drag.x - e.offsetX) > 3) drag.moved = true;
      if (drag.moved) { const by = (drag.x - e.offsetX) * (drag.to - drag.from) / Math.max(50, this.panel.width - LEFT - 8); this.look(drag.from + by, drag.to + by); }
    });
    canvas.addEventListener("pointerup", (e) => { if (drag && !drag.moved) { this.hover(e.offsetX, e.offsetY); if (this.at && this.layer == null) this.open(this.rows[this.at.row]); } drag = null; });
    canvas.addEventListener("dblclick", () => this.look(0, this.n));
    canvas.addEventListener("keydown", (e) => {
      const act = { w: () => this.zoom(0.6), "+": () => this.zoom(0.6), "=": () => this.zoom(0.6), s: () => this.zoom(1.6), "-": () => this.zoom(1.6), a: () => this.pan(-0.15), d: () => this.pan(0.15), 0: () => this.look(0, this.n), Home: () => this.look(0, this.n), x: () => this.togglePicked(), ArrowLeft: () => this.move(0, -1), ArrowRight: () => this.move(0, 1), ArrowUp: () => this.move(-1, 0), ArrowDown: () => this.move(1, 0), Enter: () => this.at && this.open(this.layer == null ? this.rows[this.at.row] : null), Escape: () => this.open(null) }[e.key.length === 1 ? e.key.toLowerCase() : e.key];
      if (act && !e.ctrlKey && !e.metaKey && !e.altKey) { e.preventDefault(); e.stopPropagation(); act(); }
    });
  }
}
const percentOf = (x) => (x >= 0.1 ? percent(x) : Number((100 * x).toPrecision(2)).toLocaleString("en", { maximumFractionDigits: 6 }) + " %");

const board = {
  render({ model, el }) {
    const root = make("div", "", el), ended = watchTheme(root, () => { pane.theme = null; pane.panel.redraw(); }), pane = new AttentionPane(model, root);
    return () => { ended(); pane.panel.watch.disconnect(); };
  },
};
export default board;
