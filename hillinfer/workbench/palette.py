"""The palette of all figures, safe for colour-blind readers: Okabe-Ito for categories, Cividis for magnitudes."""

# Families of span kinds. Each family has one colour everywhere; labels distinguish the kinds within it.
FAMILIES = {
    "round": "draft verify",
    "choose": "select guess score merge encode evaluate",
    "compute": "attend dense",
    "host memory": "append view gather swap",
    "drive read": "read prefetch fetch",
    "drive write": "write rescale",
    "link": "transfer",
    "wait": "wait",
    "observe": "observe",
}
COLOURS = {
    "round": "#E8E8E8",
    "choose": "#E69F00",
    "compute": "#009E73",
    "host memory": "#56B4E9",
    "drive read": "#D55E00",
    "drive write": "#CC79A7",
    "link": "#0072B2",
    "wait": "#BBBBBB",
    "observe": "#8A8A8A",
    "other": "#F0E442",
}
# What the decoding thread was at (`explain.WORK`), in the colours of its spans.
WORK = {
    "the model's own work": COLOURS["compute"],
    "selecting": COLOURS["choose"],
    "moving records in memory": COLOURS["host memory"],
    "reading the drive": COLOURS["drive read"],
    "waiting for a prefetch": COLOURS["drive write"],
    "observing attention": COLOURS["observe"],
    "outside all spans": "#C9CDD2",
}
INK = {family: "#ffffff" if family in ("link", "observe") else "#111111" for family in COLOURS}  # colour of labels
FAMILY = {kind: family for family, kinds in FAMILIES.items() for kind in kinds.split()}

# Tiers that serve attended tokens; drive reads are split by the reason for the pool miss.
TIERS = {
    "device": "#009E73",
    "host pool": "#56B4E9",
    "drive: never in the pool": "#D55E00",
    "drive: demoted before": "#E69F00",
}

# Series of line charts: seven colours, with a new marker each time they repeat.
LINES = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#111111")
MARKERS = ("circle", "square", "diamond", "cross", "triangle-up")


def line(i: int) -> tuple[str, str]:
    """Colour and marker of the i-th series."""
    return LINES[i % len(LINES)], MARKERS[i // len(LINES) % len(MARKERS)]


def colour(kind: str) -> str:
    """Colour of a span kind."""
    return COLOURS[FAMILY.get(kind, "other")]


def for_browser() -> dict:
    """The palette for the JavaScript code."""
    return {"family": FAMILY, "colours": COLOURS, "ink": INK, "tiers": TIERS, "work": WORK}
