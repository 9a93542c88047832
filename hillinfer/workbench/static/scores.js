// The accuracy board: a row of figures for each variant, and the answers to one sample side by side.

const dash = (value, text) => (value == null ? "–" : text(value));
const signed = (x, digits = 1) => (x > 0 ? "+" : "") + number(x, digits);
const COLUMNS = [ // title, what it is, the text of a row's cell, the field without which there is no column
  ["samples", "answers so far, of those asked for", (r) => number(r.n) + (r.planned ? ` of ${number(r.planned)}` : "")],
  ["score", "mean over the tasks in per cent, with its 95 % bootstrap interval over samples", null, "score"],
  ["to full", "difference to full attention over the same samples, paired, with its 95 % interval", (r) => dash(r.diff, (d) => signed(d) + (r.diff_low == null ? "" : ` [${signed(r.diff_low)}, ${signed(r.diff_high)}]`)), "diff"],
  ["KL", "divergence of the next token's distribution from full attention's, in nats, the reference answer forced on both", (r) => dash(r.kl, (k) => number(k, 3)), "kl"],
  ["agree", "share of the answer's tokens whose most likely token is full attention's", (r) => dash(r.agree, (a) => number(a, 1) + " %"), "agree"],
  ["KV read", "bytes of KV that attention reads a token (median)", (r) => dash(r.kv, (k) => bytes(1024 * k)), "kv"],
  ["drive", "bytes from the drive a token (median)", (r) => dash(r.drive, (k) => (k ? bytes(1024 * k) : "0")), "drive"],
  ["ms/token", "measured, median over samples; only where each system decoded by itself", (r) => dash(r.ms, (m) => number(m, 1)), "ms"],
];

class Scores {
  constructor(model, root) {
    this.model = model; this.root = root;
    root.classList.add("hi-board", "hi-scores");
    const head = make("div", "hi-head", root);
    make("strong", "", head, "Accuracy");
    this.progress = make("progress", "", head); this.progress.max = 1; this.progress.setAttribute("aria-label", "progress");
    this.status = make("span", "hi-status", head); this.status.setAttribute("role", "status"); this.status.setAttribute("aria-live", "polite");
    const details = make("details", "hi-note hi-setting", root);
    make("summary", "", details, "the same in a terminal");
    this.note = make("code", "", details); this.details = details;
    this.scroll = make("div", "hi-scroll", root);
    this.pane = make("section", "hi-answers", root); this.pane.setAttribute("aria-label", "answers"); this.pane.hidden = true;
    for (const [name, draw] of [["rows", "drawTable"], ["state", "drawState"], ["answers", "drawAnswers"], ["cell", "drawTable"]]) model.on("change:" + name, () => this[draw]());
    this.drawState(); this.drawTable(); this.drawAnswers();
    root.hillinfer = this; // gives tests access
  }
  drawState() {
    const s = this.model.get("state");
    this.progress.hidden = !s.total;
    this.progress.value = s.total ? s.done / s.total : 0;
    const kept = s.kept ? `, ${number(s.kept)} of them from before` : "";
    const left = s.left_s == null ? "" : `; about ${s.left_s > 90 ? number(s.left_s / 60, 0) + " min" : number(s.left_s, 0) + " s"} left`;
    const done = `${number(s.done ?? 0)} of ${number(s.total ?? 0)} answers${kept}`;
    const text = {
      preparing: "looking for rows and model", answering: `${done}${left}: ${s.doing}`, done: `done: ${done}`,
      stopped: `stopped: ${done}; Run continues`, failed: "failed", watching: `watching: ${number(s.done ?? 0)} answers`,
      kept: s.done ? `${number(s.done)} answers kept in the folder; Run answers what is missing` : "choose tasks and systems, then Run",
    }[s.phase] ?? "";
    this.status.textContent = (s.error ? `error: ${s.error} ` : "") + (s.error && s.phase === "failed" ? "" : text);
    this.status.classList.toggle("hi-error", !!s.error);
    this.note.textContent = s.command ?? ""; this.details.hidden = !s.command;
    this.root.dataset.phase = s.phase ?? "";
  }
  drawTable() {
    const rows = this.model.get("rows"), at = this.model.get("cell");
    if (!rows.length) { this.scroll.replaceChildren(); return; }
    const tasks = [...new Set(rows.flatMap((r) => Object.keys(r.tasks)))];
    const several = ["model", "question"].filter((name) => new Set(rows.map((r) => r[name])).size > 1);
    const focus = document.activeElement?.dataset?.key; // kept over the redraw
    const columns = COLUMNS.filter(([, , , name]) => !name || rows.some((r) => r[name] != null)); // an eval of fidelity alone has no scores
    const table = make("table", "", null), head = make("tr", "", make("thead", "", table));
    const title = (text, hint, cls) => { const th = make("th", cls ?? "", head, text); th.scope = "col"; if (hint) th.title = hint; };
    for (const name of several) title(name, "", "hi-name");
    title("system, alpha", "and the share of the tokens that a decode step attends to", "hi-name");
    for (const [name, hint] of columns) title(name, hint);
    for (const task of tasks) title(task, `score on ${task} in per cent; click a cell to read its answers`, "hi-task");
    const body = make("tbody", "", table);
    for (const r of rows) {
      const tr = make("tr", r.system === "full" ? "hi-reference" : "", body);
      for (const name of several) make("td", "hi-name", tr, String(r[name]).split("/").pop()).title = r[name];
      const th = make("th", "", tr, r.system + (r.system === "full" ? "" : ` ${r.alpha}`)); th.scope = "row";
      for (const [, , text] of columns) { const td = make("td", "", tr); if (text) td.textContent = text(r); else this.drawScore(td, r); }
      for (const task of tasks) {
        const td = make("td", "hi-task", tr), score = r.tasks[task];
        if (score == null) { td.textContent = "–"; continue; }
        const b = make("button", "hi-cell", td, number(score, 1));
        b.type = "button"; b.dataset.key = [r.model, r.question, r.system, r.alpha, task].join("|");
        b.style.setProperty("--hi-share", score + "%");
        b.setAttribute("aria-pressed", ["model", "question", "system", "alpha"].every((name) => r[name] === at[name]) && task === at.task);
        b.title = `the answers of all systems to ${task}`;
        b.addEventListener("click", () => this.choose({ task, model: r.model, question: r.question, system: r.system, alpha: r.alpha, sample: 0 }));
      }
    }
    this.scroll.replaceChildren(table);
    if (focus) [...this.scroll.querySelectorAll("button")].find((b) => b.dataset.key === focus)?.focus();
  }
  drawScore(td, r) {
    if (r.score == null) { td.textContent = "–"; return; }
    const box = make("div", "hi-score", td), bar = make("div", "hi-interval", box);
    if (r.low != null) { const line = make("i", "hi-range", bar); line.style.left = r.low + "%"; line.style.width = Math.max(0.5, r.high - r.low) + "%"; }
    make("i", "hi-dot", bar).style.left = r.score + "%";
    make("b", "", box, number(r.score, 1));
    box.title = r.low == null ? "one sample of a task: no interval" : `95 % interval ${number(r.low, 1)} to ${number(r.high, 1)}`;
  }
  choose(cell) { this.model.set("cell", cell); this.model.save_changes(); }
  drawAnswers() {
    const a = this.model.get("answers"), at = this.model.get("cell");
    this.pane.hidden = !a.task;
    if (!a.task) return;
    const bar = make("div", "hi-bar", null);
    make("h4", "", bar, `${a.task}, sample ${a.number + 1} of ${a.of}`);
    make("span", "hi-note", bar, `${number(a.tokens)} tokens in the prompt; id ${a.id}`);
    const tools = make("span", "hi-tools", bar);
    const button = (label, hint, act) => { const b = make("button", "hi-button", tools, label); b.type = "button"; b.title = hint; b.addEventListener("click", act); return b; };
    button("‹ previous", "previous sample", () => this.choose({ ...at, sample: (a.number + a.of - 1) % a.of }));
    button("next ›", "next sample", () => this.choose({ ...at, sample: (a.number + 1) % a.of }));
    button("close", "close the answers", () => this.choose({}));
    const facts = make("div", "hi-asking", null);
    const fact = (name, text) => { make("span", "hi-note", facts, name); make("span", "", facts, text); };
    fact("question", a.input == null ? "not at hand: name the rows' folder or data.zip as data" : a.input.trim() || "(the task's own instruction)");
    fact("reference", a.reference.join(" | "));
    const cards = make("div", "hi-cards", null);
    a.answers.forEach((one, index) => {
      const card = make("article", "hi-card" + (one.system === at.system && (one.alpha ?? 1) === at.alpha ? " hi-chosen" : ""), cards);
      const top = make("div", "hi-bar", card);
      make("h5", "", top, one.system + (one.alpha == null ? "" : ` ${one.alpha}`));
      make("b", "hi-mark", top, one.score == null ? "–" : number(100 * one.score, 1));
      const text = make("p", "hi-answer-text", card);
      make("span", one.parts == null ? "" : "hi-same", text, one.same);
      if (one.parts != null) { make("mark", "", text, one.token || "(ends here)"); make("span", "", text, one.rest); }
      if (!one.same && one.parts == null) text.textContent = "(no answer)";
      const said = one.system === "full" ? "the reference for the others" : !one.compared ? "full has not answered yet" : one.parts == null ? "the same as full's, to the end" : `parts from full's at ${a.unit} ${one.parts + 1}`;
      const foot = make("div", "hi-bar", card);
      make("span", "hi-note", foot, said);
      if (!this.model.alone) { const b = make("button", "hi-button hi-open", foot, one.parts == null ? "open in the dashboard" : "open this token"); b.type = "button"; b.title = "ask again in the dashboard" + (one.parts == null ? "" : ", and mark this token's step"); b.addEventListener("click", () => this.model.send({ kind: "open", index })); }
    });
    this.pane.replaceChildren(bar, facts, cards);
  }
}

const board = { render({ model, el }) { const root = make("div", "", el); new Scores(model, root); return watchTheme(root, () => {}); } };
export default board;
