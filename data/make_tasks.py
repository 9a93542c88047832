"""Write the held-out test records of data/tasks/: `python data/make_tasks.py`."""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import hillinfer.longbench.synthetic as syn  # noqa: E402

SEED = 20
FILES = {
    **{("lines", 1024): 200, ("lines", 2048): 200, ("lines", 4096): 50, ("lines", 8192): 20},
    **{(task, tokens): 50 for task in syn.TASKS if task != "lines" for tokens in (1024, 2048)},
    **{("needle", 4096): 20, ("needle", 8192): 10},
}


def main() -> None:
    folder = ROOT / "data" / "tasks"
    folder.mkdir(exist_ok=True)
    for (task, tokens), n in FILES.items():
        rows = [json.dumps(record) + "\n" for record in syn.make_records(task, tokens, n, SEED)]
        (folder / f"{task}_{tokens // 1024}k.jsonl").write_text("".join(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
