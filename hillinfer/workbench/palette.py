"""One palette for every figure, safe for colour-blind readers: Okabe and Ito's for kinds, Cividis for amounts."""

# What a span's kind is part of. A family has one colour everywhere; its kinds are told apart by their labels.
FAMILIES = {
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
INK = {family: "#ffffff" if family in ("link", "observe") else "#111111" for family in COLOURS}  # of labels on them
FAMILY = {kind: family for family, kinds in FAMILIES.items() for kind in kinds.split()}

# Who served an attended token; the drive's part is split by why the hot pool missed it.
TIERS = {
    "device": "#009E73",
    "host pool": "#56B4E9",
    "drive: never in the pool": "#D55E00",
    "drive: demoted before": "#E69F00",
}

# Lines of many systems: seven colours, and another marker where they begin again.
LINES = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#111111")
MARKERS = ("circle", "square", "diamond", "cross", "triangle-up")


def line(i: int) -> tuple[str, str]:
    """Colour and marker of the i-th of many lines."""
    return LINES[i % len(LINES)], MARKERS[i // len(LINES) % len(MARKERS)]


def colour(kind: str) -> str:
    """Of a kind of span."""
    return COLOURS[FAMILY.get(kind, "other")]


def for_browser() -> dict:
    """What the JavaScript draws with."""
    return {"family": FAMILY, "colours": COLOURS, "ink": INK, "tiers": TIERS}
