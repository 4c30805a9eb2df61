"""How long the discovery of the batch size takes for 2m, and how many probes it makes."""

import json
import tempfile
import time

from .children import command, run
from .turns import row


def rows(budget: str = "2m", mem_cap: float | None = None) -> list[dict]:
    cap = ["--mem-cap", str(mem_cap)] if mem_cap else []
    with tempfile.TemporaryDirectory() as name:
        began = time.perf_counter()
        found = json.loads(run(*command("batch-size", "--budget", budget, "--json", "--runs-dir", name, *cap)))
        took = time.perf_counter() - began
    n = len(found["probes"])
    detail = f"{found['recommended']} recommended, {found['largest_safe']} are safe within {found['limit_gib']:.1f} GiB"
    return [row(f"batch-size discovery for {budget}", "≤ 60 s and ≤ 8 probes", f"{took:.0f} s, {n} probes", detail)]
