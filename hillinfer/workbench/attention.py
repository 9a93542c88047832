"""The attention map: a widget over `AttentionMap`, by tiles on request. static/map.js draws it."""

import base64
from collections.abc import Callable, Iterable

import anywidget
import numpy as np
import traitlets

from hillinfer.errors import UsageError
from hillinfer.workbench import palette
from hillinfer.workbench.board import STATIC, standalone
from hillinfer.workbench.pyramid import TILE, AttentionMap

TextOf = Callable[[int, int], list[str]]  # (first, last) -> the texts of these tokens

PAGE, TEXT = 2 << 20, 1 << 20  # of a self-contained page: bytes of tiles, characters of text


class AttentionView(anywidget.AnyWidget):
    """Attention by layer and position, zoomable to the single token; a click on a layer shows its heads.

    text     shown for the cell under the pointer
    setting  first words of its caption
    """

    _esm = "".join((STATIC / name).read_text(encoding="utf-8") for name in ("common.js", "map.js"))
    _css = (STATIC / "board.css").read_text(encoding="utf-8")
    state = traitlets.Dict().tag(sync=True)
    layer = traitlets.Int(None, allow_none=True).tag(sync=True)
    palette = traitlets.Dict().tag(sync=True)

    def __init__(self, map: AttentionMap, text: TextOf | None = None, setting: str = ""):
        super().__init__(palette=palette.for_browser())
        self.on_msg(self._on_message)
        self.show_map(map, text, setting)

    def show_map(self, map: AttentionMap, text: TextOf | None = None, setting: str = "") -> None:
        """Switch to another map, or to what this one has become."""
        self.map, self.text = map, text
        if self.layer not in map.counts:
            self.layer = None
        state = dict(n=map.n, steps=map.steps, layers=sorted(map.counts), version=f"{id(map)}-{map.version}")
        state |= dict(heads=max(map.counts.values(), default=0), levels=[map.level_of(None), map.level_of(0)])
        state |= dict(top=map.top(), finest=self._finest(map))
        self.state = state | dict(setting=setting, text=text is not None)

    def _on_message(self, _, message: dict, buffers) -> None:
        """Answer a page that lacks tiles or text; one that shows another map asks again."""
        if message["version"] == self.state["version"]:
            self.send(*self._answer(message["tiles"], message["texts"]))

    def _answer(self, tiles: list[list[int]], texts: list[int]) -> tuple[dict, list[bytes]]:
        """A message with tiles by [layer or -1, level, index], and texts by chunk of TILE tokens."""
        buffers = [self.map.tile(None if view < 0 else view, *where).tobytes() for view, *where in tiles]
        pieces = [[chunk, self.text(chunk * TILE, min(self.map.n, (chunk + 1) * TILE))] for chunk in texts]
        return {"kind": "tiles", "version": self.state["version"], "tiles": tiles, "texts": pieces}, buffers

    def _finest(self, map: AttentionMap) -> int:
        """The finest level whose tiles of all layers fit in a page with those above it."""
        level, room = map.top(), PAGE
        while level > map.level_of(None) and (room := room - self._bytes(map, level)) >= self._bytes(map, level - 1):
            level -= 1
        return level

    @staticmethod
    def _bytes(map: AttentionMap, level: int) -> int:
        return -(-map.n // (TILE << level)) * TILE * 2 * len(map.counts)

    def html(self, title: str = "hillinfer") -> str:
        """A self-contained page with the layers' map, as fine as 2 MiB hold, and the first MiB of text."""
        keys = [
            [-1, level, index]
            for level in range(self.state["finest"], self.map.top() + 1)
            for index in range(-(-self.map.n // (TILE << level)))
        ]
        message, buffers = self._answer(keys, [])
        room, chunks = TEXT, range(-(-self.map.n // TILE)) if self.text else ()
        for [one] in (self._answer([], [chunk])[0]["texts"] for chunk in chunks):
            if (room := room - sum(map(len, one[1]))) < 0:
                break
            message["texts"].append(one)
        parts = [base64.b64encode(part).decode() for part in buffers]
        traits = {name: getattr(self, name) for name in ("state", "layer", "palette")}
        return standalone(title, self._css, self._esm, {"traits": traits, "message": message, "buffers": parts})


def show_attention(source, text: TextOf | None = None, setting: str = "") -> AttentionView:
    """The attention of a long text, by layer, head and position; zoom to the single token.

    source  a finished `LiveRun` whose record has a map; an `AttentionMap`; or an array, or any iterable of layers, each
            (H, n) or (n,): attention weights of one step, read layer by layer
    text, setting  see `AttentionView`; a run has its own
    """
    if isinstance(source, AttentionMap):
        return AttentionView(source, text, setting)
    if not hasattr(source, "record"):
        return AttentionView(map_of(source), text, setting)
    if source.record is None or source.record.map is None:
        raise UsageError("this run recorded no map: give it AttentionRecord(map=AttentionMap())")
    return AttentionView(*map_of_run(source))


def map_of_run(run) -> tuple[AttentionMap, TextOf, str]:
    """A `LiveRun`'s map, text and setting. Without the exact observation the weights cover the selected tokens only."""
    partial = "" if run.record.exact else "; attention over the selected tokens"
    return run.record.map, run.text_of, f"{run.system}, {run.case.title}{partial}"


def map_of(layers: Iterable[np.ndarray]) -> AttentionMap:
    """One step's attention weights, (H, n) or (n,) for each layer."""
    found = AttentionMap()
    for layer, weights in enumerate(layers):
        found.add(layer, np.atleast_2d(np.asarray(weights)))
    return found
