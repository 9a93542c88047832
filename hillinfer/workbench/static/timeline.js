// The timeline: spans of four lanes on a canvas. All spans are kept; spans narrower than a pixel are merged when drawn.

const LANES = ["gpu", "cpu", "drive", "link"];
const AROUND = ["wait", "draft", "verify"]; // spans without work of their own
const ROW = 16, TOP = 22, LEFT = 56, BOTTOM = 18;

class Lane {
  constructor() {
    this.n = 0; this.tracks = 1; this.longest = 0; this.bytes = 0; this.holdsModelled = false;
    this.grow(1024);
  }
  grow(size) {
    const bigger = (old, Type) => { const a = new Type(size); if (old) a.set(old); return a; };
    this.start = bigger(this.start, Float64Array); this.end = bigger(this.end, Float64Array);
    this.nbytes = bigger(this.nbytes, Float64Array); this.kind = bigger(this.kind, Uint8Array);
    this.layer = bigger(this.layer, Int16Array); this.step = bigger(this.step, Int32Array);
    this.modelled = bigger(this.modelled, Uint8Array); this.track = bigger(this.track, Uint8Array);
  }
  add(rows, c) { // indices into the batch c. Spans stay sorted by start; each goes on the first free track
    const order = (a, b) => c.start[a] - c.start[b] || c.dur[b] - c.dur[a];
    if (rows.some((row, i) => i && order(rows[i - 1], row) > 0)) rows.sort(order); // most batches arrive sorted
    let size = this.start.length;
    while (this.n + rows.length > size) size *= 2;
    if (size > this.start.length) this.grow(size);
    const first = this.lower(c.start[rows[0]]);
    const columns = ["start", "end", "nbytes", "kind", "layer", "step", "modelled"];
    const old = Object.fromEntries(columns.map((k) => [k, this[k].slice(first, this.n)]));
    let i = 0, j = 0, at = first;
    const kept = this.n - first;
    while (i < kept || j < rows.length) {
      if (j >= rows.length || (i < kept && old.start[i] <= c.start[rows[j]])) {
        for (const k of columns) this[k][at] = old[k][i];
        i++;
      } else {
        const r = rows[j++];
        this.start[at] = c.start[r]; this.end[at] = c.start[r] + c.dur[r]; this.nbytes[at] = c.bytes[r];
        this.kind[at] = c.kind[r]; this.layer[at] = c.layer[r]; this.step[at] = c.step[r];
        this.modelled[at] = c.modelled[r]; this.holdsModelled ||= c.modelled[r] > 0;
        this.longest = Math.max(this.longest, c.dur[r]); this.bytes += c.bytes[r];
      }
      at++;
    }
    this.n = at;
    const ends = [];
    for (let b = first - 1, missing = this.tracks; b >= 0 && missing; b--)
      if (ends[this.track[b]] === undefined) { ends[this.track[b]] = this.end[b]; missing--; }
    for (let b = first; b < this.n; b++) {
      let t = 0;
      while (ends[t] !== undefined && ends[t] > this.start[b]) t++;
      this.track[b] = t; ends[t] = this.end[b];
      if (t >= this.tracks) this.tracks = t + 1;
    }
  }
  lower(time) { // index of the first span that starts at or after `time`
    let lo = 0, hi = this.n;
    while (lo < hi) { const mid = (lo + hi) >> 1; if (this.start[mid] < time) lo = mid + 1; else hi = mid; }
    return lo;
  }
}

export class Spans {
  constructor() { this.clear(); }
  clear() {
    this.lanes = LANES.map(() => new Lane()); this.n = 0; this.kinds = []; this.t0 = 0; this.t1 = 1;
    this.firstStep = null; this.stepStart = [];
  }
  add(c) { // columns start, dur (ms), bytes, lane, kind, layer, step, modelled
    const rows = LANES.map(() => new Uint32Array(c.start.length)), counts = LANES.map(() => 0);
    if (this.n === 0) { this.t0 = this.t1 = c.start[0]; this.firstStep = c.step[0]; }
    let { t0, t1 } = this;
    for (let i = 0; i < c.start.length; i++) {
      const lane = c.lane[i], start = c.start[i], end = start + c.dur[i], s = c.step[i] - this.firstStep;
      rows[lane][counts[lane]++] = i;
      if (start < t0) t0 = start;
      if (end > t1) t1 = end;
      if (s >= 0 && !(this.stepStart[s] <= start)) this.stepStart[s] = start;
    }
    this.t0 = t0; this.t1 = t1;
    rows.forEach((indices, lane) => counts[lane] && this.lanes[lane].add(indices.subarray(0, counts[lane]), c));
    this.n += c.start.length;
  }
  stepAt(time) {
    let found = null;
    for (let s = this.stepStart.length - 1; s >= 0; s--) if (this.stepStart[s] <= time) { found = s; break; }
    return found === null ? null : found + this.firstStep;
  }
  windowOf(step) {
    const s = step - this.firstStep, from = this.stepStart[s];
    if (from === undefined) return null;
    let next = s + 1;
    while (next < this.stepStart.length && this.stepStart[next] === undefined) next++;
    return [from, next < this.stepStart.length ? this.stepStart[next] : this.t1];
  }
  busy(which, from, to) { // ms in [from, to] during which at least one of these lanes was busy; spans AROUND work do not count
    const lanes = which.map((name) => this.lanes[LANES.indexOf(name)]);
    const at = lanes.map((lane) => lane.lower(from - lane.longest));
    let total = 0, until = from;
    for (;;) {
      let best = -1;
      for (let k = 0; k < lanes.length; k++)
        if (at[k] < lanes[k].n && (best < 0 || lanes[k].start[at[k]] < lanes[best].start[at[best]])) best = k;
      if (best < 0) break;
      const lane = lanes[best], i = at[best]++;
      if (lane.start[i] >= to) break;
      if (AROUND.includes(this.kinds[lane.kind[i]])) continue;
      const end = Math.min(to, lane.end[i]);
      if (end > until) { total += end - Math.max(until, lane.start[i]); until = end; }
    }
    return total;
  }
  overlap(from, to) { // share of the shorter side, compute or transfer, that ran concurrently with the other
    const one = this.busy(["cpu", "gpu"], from, to), other = this.busy(["drive", "link"], from, to);
    const both = one + other - this.busy(LANES, from, to);
    return Math.min(one, other) > 0 ? both / Math.min(one, other) : 0;
  }
}

// Draws to a canvas context or an SvgContext.
export function drawTimeline(ctx, width, spans, view, look) {
  const { theme, palette, cursor } = look, scale = (width - LEFT - 8) / (view.to - view.from);
  const X = (t) => LEFT + (t - view.from) * scale;
  const stat = { shown: 0, merged: 0, boxes: 0 };
  ctx.fillStyle = theme.back; ctx.fillRect(0, 0, width, timelineHeight(spans));
  if (cursor != null && spans.windowOf(cursor)) {
    const [a, b] = spans.windowOf(cursor);
    ctx.fillStyle = theme.mark;
    const x = Math.max(LEFT, X(a)), end = Math.min(width - 8, X(b));
    if (end >= x) ctx.fillRect(x, 0, Math.max(2, end - x), timelineHeight(spans));
  }
  const visible = [];
  const s0 = spans.stepAt(view.from) ?? spans.firstStep ?? 0, s1 = spans.stepAt(view.to) ?? s0;
  if (s1 - s0 < width / 40) for (let s = s0; s <= s1; s++) visible.push(s);
  let y = TOP;
  LANES.forEach((name, l) => {
    const lane = spans.lanes[l];
    ctx.fillStyle = theme.grid; ctx.fillRect(0, y - 3, width, 1);
    ctx.fillStyle = theme.text; ctx.fillText(name, 6, y + ROW / 2 - 1);
    const last = [], from = lane.lower(view.from - lane.longest), to = lane.lower(view.to);
    for (let i = from; i < to; i++) {
      if (lane.end[i] < view.from) continue;
      stat.shown++;
      const a = Math.max(LEFT, X(lane.start[i])), b = Math.min(width - 8, X(lane.end[i])), t = lane.track[i];
      const pixel = Math.floor(a);
      if (b - a < 1) {
        if (last[t] === pixel) { stat.merged++; continue; }
        last[t] = pixel;
      }
      const kind = spans.kinds[lane.kind[i]], top = y + t * ROW, w = Math.max(1, b - a);
      ctx.fillStyle = palette.colours[palette.family[kind] ?? "other"];
      stat.boxes++;
      if (lane.modelled[i]) {
        ctx.globalAlpha = 0.35; ctx.fillRect(a, top, w, ROW - 3); ctx.globalAlpha = 1;
        ctx.strokeStyle = ctx.fillStyle; ctx.setLineDash([3, 2]);
        ctx.strokeRect(a + 0.5, top + 0.5, Math.max(0, w - 1), ROW - 4); ctx.setLineDash([]);
      } else ctx.fillRect(a, top, w, ROW - 3);
      const text = [(lane.modelled[i] ? "~" : "") + kind + (lane.layer[i] < 0 ? "" : " L" + lane.layer[i]), kind].find((t) => t.length * 6.4 + 6 < w);
      if (text) {
        ctx.fillStyle = lane.modelled[i] ? theme.text : palette.ink[palette.family[kind] ?? "other"];
        ctx.fillText(text, a + 3, top + ROW / 2 - 1);
      }
    }
    y += lane.tracks * ROW + 6;
  });
  let free = 0; // x from which the next step label fits
  for (const s of visible) {
    const w = spans.windowOf(s);
    if (!w || X(w[0]) < LEFT) continue;
    ctx.fillStyle = theme.grid; ctx.fillRect(X(w[0]), 4, 1, y - 4);
    if (X(w[0]) < free || X(w[0]) > width - 50) continue;
    ctx.fillStyle = theme.faint; ctx.fillText("step " + s, X(w[0]) + 3, 10);
    free = X(w[0]) + 56;
  }
  const tick = niceTick((view.to - view.from) / Math.max(2, (width - LEFT) / 110));
  const digits = Math.max(0, Math.min(6, Math.ceil(-Math.log10(tick))));
  ctx.fillStyle = theme.grid; ctx.fillRect(LEFT, y, width - LEFT - 8, 1);
  for (let t = Math.ceil(view.from / tick) * tick; t <= view.to; t += tick) {
    if (X(t) > width - 50) break;
    ctx.fillStyle = theme.faint; ctx.fillRect(X(t), y, 1, 4);
    ctx.fillText(t.toFixed(digits) + " ms", X(t) + 3, y + 9);
  }
  return stat;
}

export function timelineHeight(spans) {
  return TOP + spans.lanes.reduce((sum, lane) => sum + lane.tracks * ROW + 6, 0) + BOTTOM;
}
export class SvgContext { // records the drawing calls used above as SVG
  constructor(width, height) { this.size = [width, height]; this.parts = []; this.globalAlpha = 1; this.dash = ""; }
  static escape(text) { return String(text).replace(/[&<>"]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c]); }
  fillRect(x, y, w, h) {
    this.parts.push(`<rect x="${x.toFixed(2)}" y="${y.toFixed(2)}" width="${w.toFixed(2)}" height="${h.toFixed(2)}" fill="${this.fillStyle}" fill-opacity="${this.globalAlpha}"/>`);
  }
  strokeRect(x, y, w, h) {
    this.parts.push(`<rect x="${x.toFixed(2)}" y="${y.toFixed(2)}" width="${w.toFixed(2)}" height="${h.toFixed(2)}" fill="none" stroke="${this.strokeStyle}" stroke-dasharray="${this.dash}"/>`);
  }
  setLineDash(dash) { this.dash = dash.join(" "); }
  fillText(text, x, y) {
    this.parts.push(`<text x="${x.toFixed(1)}" y="${(y + 4).toFixed(1)}" fill="${this.fillStyle}">${SvgContext.escape(text)}</text>`);
  }
  toString() {
    const [w, h] = this.size;
    return `<svg xmlns="http://www.w3.org/2000/svg" width="${w}" height="${h}" viewBox="0 0 ${w} ${h}" font-family="system-ui, sans-serif" font-size="11">${this.parts.join("")}</svg>`;
  }
}
