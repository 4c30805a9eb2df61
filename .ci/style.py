"""Print the house figures of each notebook."""

import json
import re
from pathlib import Path
from statistics import median

EXPORT = re.compile(r"^#\s*\|\s*export", re.MULTILINE)
TEST = re.compile(r"\b(test_\w+|assert)\b")

print(f"{'notebook':34}{'exported':>9}{'median':>8}{'longest':>8}{'tests':>7}{'words':>7}  beyond the house figures")
for path in sorted(Path("nbs").rglob("*.ipynb")):
    if any(part.startswith((".", "_")) for part in path.parts):
        continue
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    words = sum(len("".join(c["source"]).split()) for c in cells if c["cell_type"] == "markdown")
    exported = [c for c in code if EXPORT.search(c)]
    sizes = [len(c.splitlines()) for c in exported] or [0]
    lines = sum(sum(1 for line in c.splitlines() if line.strip()) for c in exported)
    tests = sum(len(TEST.findall(c)) for c in code if c not in exported)
    rules = {
        "cell over 40 lines": max(sizes) > 40,
        "under a test per 10 lines": tests * 10 < lines,
        "under two words a line": words < 2 * lines,
        "over 300 KB": path.stat().st_size > 300_000,
    }
    flags = ", ".join(k for k, v in rules.items() if v and lines)
    name = str(path.relative_to("nbs"))
    print(f"{name:34}{lines:>9}{median(sizes):>8.0f}{max(sizes):>8}{tests:>7}{words:>7}  {flags}")
