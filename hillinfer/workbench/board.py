"""The board: linked views of one run, as one anywidget. static/*.js draws them; this module sends the data."""

import base64
import gzip
import json
import re
import threading
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Protocol

import anywidget
import numpy as np
import traitlets

from hillinfer.errors import UsageError
from hillinfer.timeline import LANES, Counters, Span, Timeline
from hillinfer.workbench import palette
from hillinfer.workbench.explain import explain
from hillinfer.workbench.observe import AttentionRecord, AttentionSnapshot

STATIC = Path(__file__).parent / "static"
PARTS = ("head", "text", "sparsity", "hits", "timeline", "why", "memory")
HITS = "step layer queries device host drive demoted prefetched".split()  # column order of static/board.js
BATCH = 50_000  # spans per message, 1.9 MB


class RunSource(Protocol):
    """Data source of a board, such as a `LiveRun`."""

    timeline: Timeline
    counters: Counters
    tokens: Sequence[tuple]
    record: AttentionRecord | None

    def status(self) -> dict: ...


class Board(anywidget.AnyWidget):
    """Linked views of a run. Selecting a step, layer, head or token marks it in all views; `flush` sends new data.

    parts  names of the views to show, from PARTS
    """

    _esm = "".join((STATIC / f"{name}.js").read_text(encoding="utf-8") for name in ("common", "timeline", "board"))
    _css = (STATIC / "board.css").read_text(encoding="utf-8")
    parts = traitlets.List().tag(sync=True)
    palette = traitlets.Dict().tag(sync=True)
    cursor = traitlets.Dict().tag(sync=True)
    perfetto = traitlets.Unicode("https://ui.perfetto.dev").tag(sync=True)  # where traces are opened

    def __init__(self, source: RunSource | None = None, parts: Sequence[str] = PARTS):
        if unknown := set(parts) - set(PARTS):
            raise UsageError(f"no view {', '.join(sorted(unknown))}; choose from {', '.join(PARTS)}")
        super().__init__(parts=list(parts), palette=palette.for_browser())
        self._writing = threading.RLock()  # widget callbacks run on other threads than the painter
        self._run = 0
        self.show_run(source)
        self.on_msg(self._on_message)
        self.observe(lambda change: self._cursor_moved(), "cursor")

    def show_run(self, source: RunSource | None) -> None:
        """Switch to another run, from its beginning."""
        with self._writing:
            self.source, self._run = None, self._run + 1
            self._sent = dict(spans=0, hits=0, tokens=0)
            self._kinds: dict[str, int] = {}
            self._detail_key: tuple | None = None  # run and cursor that `detail` belongs to
            self._explained: tuple | None = None  # run and step that its explanation belongs to
            self._origin: int | None = None
            self.state, self.detail, self._summary = {}, {}, None
            self._last_sent: tuple | None = None  # state and detail of the last message
            self.cursor = dict.fromkeys(("step", "layer", "head"))
            self.source = source
            if source is not None:
                self.flush()

    def flush(self) -> None:
        """Send all new rows and the current state."""
        with self._writing:
            self.state = self.source.status()
            if self.state.get("phase") in ("done", "stopped", None):  # the whole run's record is read for it
                self._summary = self._summary or self._explain(None)
                self.state = self.state | {"why": self._summary}
            self._update_detail()
            while self._send_rows():
                pass

    def _send_rows(self) -> bool:
        """Send one message with new rows and the state, unless nothing changed. True if more rows may be waiting.

        Everything goes into one message, because the overhead per message exceeds the cost of its content.
        """
        source, sent = self.source, self._sent
        spans = source.timeline.spans[sent["spans"] : sent["spans"] + BATCH]
        hits = source.counters.rows[sent["hits"] : sent["hits"] + BATCH]
        tokens = list(source.tokens[sent["tokens"] : sent["tokens"] + BATCH])
        detail = None if self._last_sent and self._last_sent[1] is self.detail else self.detail
        if not (spans or hits or tokens or detail is not None or self.state != self._last_sent[0]):
            return False
        buffers = [column.tobytes() for column in self._columns(spans)]
        rows = [[getattr(row, name) for name in HITS] for row in hits]
        buffers.append(np.array(rows, np.int32).tobytes())
        message = {"kind": "more", "run": self._run, "from": dict(sent), "kinds": list(self._kinds), "tokens": tokens}
        self.send(message | {"state": self.state, "detail": detail}, buffers)
        self._last_sent = self.state, self.detail
        for name, new in (("spans", spans), ("hits", hits), ("tokens", tokens)):
            sent[name] += len(new)
        return BATCH in (len(spans), len(hits), len(tokens))

    def _columns(self, spans: list[Span]) -> list[np.ndarray]:
        """Spans in the columns of static/board.js: start, duration (ms), bytes, lane, kind, layer, step, modelled."""
        if spans and self._origin is None:
            self._origin = min(span.start_ns for span in spans)
        origin, kinds = self._origin or 0, self._kinds
        start = np.array([span.start_ns for span in spans], np.int64)
        return [
            (start - origin) / 1e6,
            (np.array([span.end_ns for span in spans], np.int64) - start) / 1e6,
            np.array([span.bytes for span in spans], np.float64),
            np.array([LANES.index(span.lane) for span in spans], np.uint8),
            np.array([kinds.setdefault(span.kind, len(kinds)) for span in spans], np.uint8),
            np.array([span.layer for span in spans], np.int16),
            np.array([span.step for span in spans], np.int32),
            np.array([bool(span.detail.get("modelled")) for span in spans], np.uint8),
        ]

    def _cursor_moved(self) -> None:
        """The user selected a step, layer or head."""
        with self._writing:
            self._update_detail()
            if self.source is not None:
                self._send_rows()

    def _update_detail(self) -> None:
        """Set `detail` to the attention at the cursor: heat map of layers by heads, and distribution over positions."""
        if self.source is None:
            return
        if (self._run, self.cursor["step"]) != self._explained:
            self._explained = self._run, self.cursor["step"]
            why = self._explain(self.cursor["step"]) if self.cursor["step"] is not None else None
            self.detail = self.detail | {"why": why or {}}
        record = getattr(self.source, "record", None)
        found = record.snapshots_at(self.cursor["step"]) if record is not None else None
        if found is None:
            return
        step, layers = found
        key = (self._run, step, self.cursor["layer"], self.cursor["head"])
        if key == self._detail_key:  # already up to date
            return
        self._detail_key = key
        rows = [layers[layer] for layer in sorted(layers)]
        heat = {"step": step, "exact": record.exact, "needed": [_list(row.needed / row.n) for row in rows]}
        heat["recall"] = [_list(row.recall) for row in rows] if record.exact else None
        layer = self.cursor["layer"] if self.cursor["layer"] in layers else max(layers)
        chosen = _distribution(step, layer, self.cursor["head"], layers[layer])
        self.detail = self.detail | {"heat": heat, "distribution": chosen}

    def _explain(self, step: int | None) -> dict | None:
        """The explanation of a step or of the run for the page; None where there is no record."""
        try:
            return asdict(explain(self.source, step))
        except UsageError:
            return None

    def _on_message(self, _, message: dict, buffers) -> None:
        """Handle a message of the page: it lacks rows (after a reload or a lost message), or requests an export."""
        with self._writing:
            if self.source is None:
                return
            if message["kind"] == "have":
                current = message["run"] == self._run
                self._sent = dict(message["have"]) if current else dict(spans=0, hits=0, tokens=0)
                self._last_sent = None
                while self._send_rows():
                    pass
            elif message["what"] == "html":
                self._file("hillinfer-board.html", "text/html", self.html().encode())
            else:
                data = gzip.compress(json.dumps(self.source.timeline.chrome_trace()).encode(), 3)
                self._file("hillinfer-trace.json.gz", "application/gzip", data, message["what"] == "perfetto")

    def _file(self, name: str, kind: str, data: bytes, open: bool = False) -> None:
        self.send({"kind": "file", "name": name, "type": kind, "open": open}, [data])

    def html(self, title: str = "hillinfer") -> str:
        """A self-contained page with this board and all its data. It needs neither kernel nor network."""
        with self._writing:
            source = self.source
            columns = self._columns(source.timeline.spans)
            rows = [[getattr(row, name) for name in HITS] for row in source.counters.rows]
            parts = [base64.b64encode(part.tobytes()).decode() for part in [*columns, np.array(rows, np.int32)]]
            traits = {name: getattr(self, name) for name in ("parts", "palette", "cursor")}
            message = {"kind": "more", "run": 1, "from": dict(spans=0, hits=0, tokens=0), "kinds": list(self._kinds)}
            message |= {"state": self.state, "detail": self.detail}
            message["tokens"] = [list(token) for token in source.tokens]
        return standalone(title, self._css, self._esm, {"traits": traits, "message": message, "buffers": parts})


def standalone(title: str, css: str, esm: str, data: dict) -> str:
    """A page that renders a widget's module without a kernel. data: its traits, and the message that fills it."""
    page = (STATIC / "page.html").read_text(encoding="utf-8")
    parts = dict(TITLE=escape(title), CSS=css, DATA=json.dumps(data).replace("<", "\\u003c"), ESM=esm)
    return re.sub(r"/\*(TITLE|CSS|DATA|ESM)\*/", lambda mark: parts[mark[1]], page)  # one pass: texts may hold markers


class _RecordedRun:
    """A finished run as a data source: its timeline, and counters and attention if recorded."""

    record = None
    tokens = ()

    def __init__(self, timeline: Timeline, counters: Counters | None, record: AttentionRecord | None):
        self.timeline, self.counters, self.record = timeline, counters or Counters(), record

    def status(self) -> dict:
        return {}


def show_timeline(timeline: Timeline) -> Board:
    """A board with the timeline only: all spans, with zoom and pan."""
    return Board(_RecordedRun(timeline, None, None), ("timeline",))


def show_record(timeline: Timeline, counters: Counters, record: AttentionRecord | None = None) -> Board:
    """A board of a finished run: linked views of timeline, hits and, if recorded, attention."""
    parts = ("sparsity", "hits", "timeline", "why") if record else ("hits", "timeline", "why")
    return Board(_RecordedRun(timeline, counters, record), parts)


def _distribution(step: int, layer: int, head: int | None, snapshot: AttentionSnapshot) -> dict:
    mass = snapshot.mass.astype(np.float32)
    return {
        "step": step,
        "layer": layer,
        "head": head,
        "n": snapshot.n,
        "block": snapshot.block,
        "mass": _list(mass.mean(0) if head is None else mass[head]),
        "chosen": snapshot.chosen.tolist(),
    }


def _list(values: np.ndarray) -> list[float]:
    return [round(float(value), 6) for value in values]
