"""Compare two JSON results of a benchmark: python -m benchmarks.compare BEFORE AFTER

A result is a dictionary with `facts` and lists of rows. Rows are matched by their non-numeric fields.
"""

import json
import sys
from pathlib import Path


def number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def rows_of(result: dict) -> dict[tuple, dict[str, float]]:
    """Maps (list name, identifying fields of a row) to the numbers of the row."""
    found = {}
    for name, rows in result.items():
        for row in rows if isinstance(rows, list) else ():
            label = (
                name,
                *(str(value) for key, value in row.items() if not number(value) or key in ("tokens", "bytes")),
            )
            found[label] = {
                key: value for key, value in row.items() if number(value) and key not in ("tokens", "bytes")
            }
    return found


def compare(before: dict, after: dict) -> list[str]:
    """The comparison as lines: differing facts, each figure with its ratio, then the unmatched rows."""
    facts = [(key, before.get("facts", {}).get(key), value) for key, value in after.get("facts", {}).items()]
    lines = [f"{key}: {old} -> {new}" for key, old, new in facts if old != new]
    left, right = rows_of(before), rows_of(after)
    lines.append(f"{'':64}{'before':>12}{'after':>12}{'after/before':>14}")
    for label in [label for label in left if label in right]:
        for key, old in left[label].items():
            if key in right[label]:
                new = right[label][key]
                ratio = f"{new / old:.3f}" if old else ""
                lines.append(f"{' '.join(label)[:48]:50}{key:14}{old:12.4g}{new:12.4g}{ratio:>14}")
    for label in left.keys() ^ right.keys():
        lines.append(f"only {'before' if label in left else 'after'}: {' '.join(label)}")
    return lines


def main() -> int:
    if len(sys.argv) != 3:
        print(__doc__.strip().split("\n")[0], file=sys.stderr)
        return 2
    try:
        before, after = (json.loads(Path(name).read_text(encoding="utf-8")) for name in sys.argv[1:])
    except (OSError, ValueError) as error:
        print(f"error: {error}; name two JSON files that a benchmark wrote with --out", file=sys.stderr)
        return 2
    print("\n".join(compare(before, after)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
