"""How long a user waits before anything happens: the help, the verification of the embedded data, an import."""

import statistics
import tempfile
from functools import partial
from pathlib import Path

from .children import command, make_data, seconds
from .turns import row


def rows(n_turns: int = 15) -> list[dict]:
    with tempfile.TemporaryDirectory() as name:
        data = Path(name)
        for tier in ("a20", "raw6"):
            make_data(data, tier)
        asked = {
            ("`finpatch --help`", 0.4): partial(seconds, *command("--help")),
            ("`finpatch verify` on the embedded data", 1.0): partial(seconds, *command("verify", "--data-dir", name)),
            ("`import finpatch`", 0.15): partial(seconds, "-c", "import finpatch"),
        }
        nothing = statistics.median(seconds("-c", "pass") for _ in range(n_turns))
        told = []
        for (work, target), call in asked.items():
            call()
            taken = [call() for _ in range(n_turns)]
            detail = f"median of {n_turns} new processes, slowest {max(taken):.2f} s; Python alone takes {nothing:.2f} s"
            told.append(row(work, f"≤ {target} s", f"{statistics.median(taken):.2f} s", detail))
    return told
