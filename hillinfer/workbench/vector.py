"""A timeline as a vector drawing, for papers: no browser, no network."""

import textwrap
from html import escape
from pathlib import Path

from hillinfer import files
from hillinfer.errors import UsageError
from hillinfer.timeline import LANES, Timeline
from hillinfer.workbench import palette

LEFT, ROW, THIN = 60, 24, 0.2  # points: of the lanes' names; of a lane; the narrowest box


def timeline_svg(timeline: Timeline, path: str | Path, steps: int = 3, setting: str = "", width: int = 1000) -> Path:
    """Write the last `steps` steps as SVG, with lanes, legend and a caption; boxes under 0.2 points are merged.

    setting  follows the number of steps in the caption
    """
    last = max((span.step for span in timeline.spans), default=0)
    spans = sorted((span for span in timeline.spans if span.step > last - steps), key=lambda span: span.start_ns)
    if not spans:
        raise UsageError("the timeline has no spans")
    start, end = spans[0].start_ns, max(span.end_ns for span in spans)
    scale, lanes = (width - LEFT - 10) / (end - start), [n for n in LANES if any(span.lane == n for span in spans)]
    parts = [f'<text x="4" y="{20 + i * ROW}">{lane}</text>' for i, lane in enumerate(lanes)]
    reached = dict.fromkeys(lanes, 0.0)
    for span in spans:
        x, wide = LEFT + (span.start_ns - start) * scale, (span.end_ns - span.start_ns) * scale
        if wide < THIN and x < reached[span.lane]:
            continue
        reached[span.lane] = x + max(wide, THIN)
        told = f"{span.kind}, layer {span.layer}, step {span.step}, {(span.end_ns - span.start_ns) / 1e6:.3f} ms"
        box = f'x="{x:.2f}" y="{8 + lanes.index(span.lane) * ROW}" width="{max(wide, THIN):.2f}" height="16"'
        parts.append(f'<rect {box} fill="{palette.colour(span.kind)}"><title>{escape(told)}</title></rect>')
    y, x = 24 + len(lanes) * ROW, LEFT
    for family in dict.fromkeys(palette.FAMILY.get(span.kind, "other") for span in spans):
        parts.append(f'<rect x="{x}" y="{y - 9}" width="10" height="10" fill="{palette.COLOURS[family]}"/>')
        parts.append(f'<text x="{x + 14}" y="{y}">{family}</text>')
        x += 30 + 7 * len(family)
    shown = len({span.step for span in spans})
    caption = textwrap.wrap(f"{shown} steps, {(end - start) / 1e6:.1f} ms, {timeline.source}. {setting}", width // 7)
    parts += [f'<text x="4" y="{y + 22 + 15 * i}">{escape(line)}</text>' for i, line in enumerate(caption)]
    size = f'viewBox="0 0 {width} {y + 15 + 15 * len(caption)}" width="{width}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">'
    return files.write_text(path, "\n".join([head, *parts, "</svg>"]))
