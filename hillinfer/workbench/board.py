"""The board: linked views of one run in the browser, as one anywidget. Drawn in static/*.js; fed from here."""

import base64
import gzip
import json
import re
import threading
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Protocol

import anywidget
import numpy as np
import traitlets

from hillinfer.errors import UsageError
from hillinfer.timeline import LANES, Counters, Span, Timeline
from hillinfer.workbench import palette
from hillinfer.workbench.observe import AttentionRecord, Seen

STATIC = Path(__file__).parent / "static"
PARTS = ("head", "text", "sparsity", "hits", "timeline", "memory")
HITS = "step layer queries device host drive demoted prefetched".split()  # the columns that static/board.js reads
BATCH = 50_000  # spans in one message, 1.9 MB


class Source(Protocol):
    """What a board shows; `LiveRun` is one."""

    timeline: Timeline
    counters: Counters
    tokens: Sequence[tuple]
    record: AttentionRecord | None

    def status(self) -> dict: ...


class Board(anywidget.AnyWidget):
    """Linked views of a run. `flush` sends what is new; choosing a step, layer, head or token marks it in all views.

    parts  which views, of PARTS
    """

    _esm = (STATIC / "timeline.js").read_text() + (STATIC / "board.js").read_text()
    _css = (STATIC / "board.css").read_text()
    parts = traitlets.List().tag(sync=True)
    palette = traitlets.Dict().tag(sync=True)
    cursor = traitlets.Dict().tag(sync=True)

    def __init__(self, source: Source | None = None, parts: Sequence[str] = PARTS):
        if unknown := set(parts) - set(PARTS):
            raise UsageError(f"no view {', '.join(sorted(unknown))}; choose of {', '.join(PARTS)}")
        super().__init__(parts=list(parts), palette=palette.for_browser())
        self._writing = threading.RLock()  # callbacks come from other threads than the painter
        self._run = 0
        self.show_run(source)
        self.on_msg(self._asked)
        self.observe(lambda change: self._pointed(), "cursor")

    def show_run(self, source: Source | None) -> None:
        """Show another run, from its beginning."""
        with self._writing:
            self.source, self._run = None, self._run + 1
            self._sent = dict(spans=0, hits=0, tokens=0)
            self._kinds: dict[str, int] = {}
            self._looked: tuple | None = None  # what `detail` is of
            self._origin: int | None = None
            self.state, self.detail = {}, {}
            self._told: tuple | None = None  # state and detail, as they were last sent
            self.cursor = dict.fromkeys(("step", "layer", "head"))
            self.source = source
            if source is not None:
                self.flush()

    def flush(self) -> None:
        """Send what came since the last time, and how things stand."""
        with self._writing:
            self.state = self.source.status()
            self._look()
            while self._send_news():
                pass

    def _send_news(self) -> bool:
        """One message of new rows and how things stand, if any of it is new; whether there may be more.

        One, because each costs the page more than what is in it.
        """
        source, at = self.source, self._sent
        spans = source.timeline.spans[at["spans"] : at["spans"] + BATCH]
        hits = source.counters.rows[at["hits"] : at["hits"] + BATCH]
        tokens = list(source.tokens[at["tokens"] : at["tokens"] + BATCH])
        detail = None if self._told and self._told[1] is self.detail else self.detail
        if not (spans or hits or tokens or detail is not None or self.state != self._told[0]):
            return False
        buffers = [column.tobytes() for column in self._columns(spans)]
        rows = [[getattr(row, name) for name in HITS] for row in hits]
        buffers.append(np.array(rows, np.int32).tobytes())
        message = {"kind": "more", "run": self._run, "from": dict(at), "kinds": list(self._kinds), "tokens": tokens}
        self.send(message | {"state": self.state, "detail": detail}, buffers)
        self._told = self.state, self.detail
        for name, new in (("spans", spans), ("hits", hits), ("tokens", tokens)):
            at[name] += len(new)
        return BATCH in (len(spans), len(hits), len(tokens))

    def _columns(self, spans: list[Span]) -> list[np.ndarray]:
        """Spans as the columns that static/board.js reads: start and duration in ms, bytes, lane, kind, ..."""
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

    def _pointed(self) -> None:
        """A person chose a step, layer or head."""
        with self._writing:
            self._look()
            if self.source is not None:
                self._send_news()

    def _look(self) -> None:
        """Take up the attention at the cursor: a heat map of layers by heads, and one distribution over blocks."""
        record = getattr(self.source, "record", None)
        found = record.at(self.cursor["step"]) if record is not None else None
        if found is None:
            return
        step, layers = found
        where = (self._run, step, self.cursor["layer"], self.cursor["head"])
        if where == self._looked:  # it is there already
            return
        self._looked = where
        rows = [layers[layer] for layer in sorted(layers)]
        heat = {"step": step, "exact": record.exact, "needed": [_list(row.needed / row.n) for row in rows]}
        heat["caught"] = [_list(row.caught) for row in rows] if record.exact else None
        layer = self.cursor["layer"] if self.cursor["layer"] in layers else max(layers)
        self.detail = {"heat": heat, "distribution": _distribution(step, layer, self.cursor["head"], layers[layer])}

    def _asked(self, _, message: dict, buffers) -> None:
        """The browser lacks rows (it was loaded, or a message was lost), or a person wants a file."""
        with self._writing:
            if self.source is None:
                return
            if message["kind"] == "have":
                current = message["run"] == self._run
                self._sent = dict(message["have"]) if current else dict(spans=0, hits=0, tokens=0)
                self._told = None
                while self._send_news():
                    pass
            elif message["what"] == "trace":
                data = gzip.compress(json.dumps(self.source.timeline.chrome_trace()).encode(), 3)
                self._file("hillinfer-trace.json.gz", "application/gzip", data)
            else:
                self._file("hillinfer-board.html", "text/html", self.html().encode())

    def _file(self, name: str, kind: str, data: bytes) -> None:
        self.send({"kind": "file", "name": name, "type": kind}, [data])

    def html(self, title: str = "hillinfer") -> str:
        """A page with this board and all its data, which needs no kernel and no network."""
        with self._writing:
            source = self.source
            columns = self._columns(source.timeline.spans)
            rows = [[getattr(row, name) for name in HITS] for row in source.counters.rows]
            parts = [base64.b64encode(part.tobytes()).decode() for part in [*columns, np.array(rows, np.int32)]]
            traits = {name: getattr(self, name) for name in ("parts", "palette", "cursor")}
            message = {"kind": "more", "run": 1, "from": dict(spans=0, hits=0, tokens=0), "kinds": list(self._kinds)}
            message |= {"state": self.state, "detail": self.detail}
            message["tokens"] = [list(token) for token in source.tokens]
        data = json.dumps({"traits": traits, "message": message, "buffers": parts}).replace("<", "\\u003c")
        page = (STATIC / "page.html").read_text()
        parts = dict(TITLE=escape(title), CSS=self._css, DATA=data, ESM=self._esm)
        return re.sub(r"/\*(TITLE|CSS|DATA|ESM)\*/", lambda mark: parts[mark[1]], page)  # once: a text may hold marks


class _Recorded:
    """A timeline, and counters where there are any, as a source."""

    record = None
    tokens = ()

    def __init__(self, timeline: Timeline, counters: Counters | None, record: AttentionRecord | None):
        self.timeline, self.counters, self.record = timeline, counters or Counters(), record

    def status(self) -> dict:
        return {}


def show_timeline(timeline: Timeline) -> Board:
    """The timeline alone, every span of it, to zoom and pan."""
    return Board(_Recorded(timeline, None, None), ("timeline",))


def show_record(timeline: Timeline, counters: Counters, record: AttentionRecord | None = None) -> Board:
    """Timeline, hits and, where there is a record of it, attention of a run that is over. Linked."""
    parts = ("sparsity", "hits", "timeline") if record else ("hits", "timeline")
    return Board(_Recorded(timeline, counters, record), parts)


def _distribution(step: int, layer: int, head: int | None, seen: Seen) -> dict:
    mass = seen.mass.astype(np.float32)
    return {
        "step": step,
        "layer": layer,
        "head": head,
        "n": seen.n,
        "block": seen.block,
        "mass": _list(mass.mean(0) if head is None else mass[head]),
        "chosen": seen.chosen.tolist(),
    }


def _list(values: np.ndarray) -> list[float]:
    return [round(float(value), 6) for value in values]
