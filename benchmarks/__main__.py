"""`make bench`: run every benchmark, print one table, write RESULTS.md with the machine named.

Speed is shown here and asserted nowhere. Run it on a machine that does nothing else.
"""

import sys
from datetime import UTC, datetime
from pathlib import Path

import torch

from finpatch.device import describe_machine

from . import (
    cluster,
    discovery,
    features_and_windows,
    gpu,
    large_model,
    panel,
    paper_shapes,
    presets,
    small_cells,
    start_up,
    trainer_overhead,
    whole_run,
)

PARTS = {
    "paper": paper_shapes, "presets": presets, "run": whole_run, "study": small_cells, "trainer": trainer_overhead,
    "data": features_and_windows, "panel": panel, "start": start_up, "large": large_model, "batch": discovery, "cluster": cluster,
}  # fmt: skip


def render(rows: list[dict], machine: dict) -> str:
    "Lay out the table as Markdown."
    told = ", ".join(f"{key} {value}" for key, value in machine.items())
    head = ["# Benchmarks", "", "Made by `make bench`; medians, and ratios within one run.", "",
            f"{datetime.now(UTC):%Y-%m-%d}, {told}.", "", "| work | target | measured | detail |", "|---|---|---|---|"]  # fmt: skip
    return "\n".join([*head, *("| {work} | {target} | {measured} | {detail} |".format(**row) for row in rows)]) + "\n"


def main(names: list[str]) -> None:
    rows = []
    for name in names or PARTS:
        print(f"{name} …", file=sys.stderr, flush=True)
        rows += (found := PARTS[name].rows())
        print(*(f"  {r['work']}: {r['measured']} ({r['target']}); {r['detail']}" for r in found), sep="\n", file=sys.stderr, flush=True)
    if not names:
        rows += gpu.rows() if torch.cuda.is_available() else gpu.unmeasured()
    table = render(rows, describe_machine(torch.device("cpu")) | {"torch": torch.__version__.split("+")[0]})
    print(table)
    if not names:
        (Path(__file__).parent / "RESULTS.md").write_text(table)


if __name__ == "__main__":
    main(sys.argv[1:])
