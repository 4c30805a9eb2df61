"""Every benchmark runs, at tiny sizes. Risk: a row that nobody can make again, found out on the day it is needed. No speed is asserted."""

import re
from importlib.util import find_spec

import pytest

from benchmarks import gpu
from benchmarks.__main__ import PARTS, render
from benchmarks.turns import median_ratio, take_turns

TINY = {
    "paper": {"n_turns": 1, "n_windows": 2, "n_learn": 4},
    "presets": {"n_turns": 2, "small": "20k", "large": "20k", "n_windows": 8},
    "run": {"n_turns": 1, "budget": "5k", "epochs": 1},
    "study": {"budgets": ("2k", "3k"), "n_seeds": 1, "epochs": 1, "n_turns": 1},
    "trainer": {"budget": "5k", "n_steps": 30},
    "data": {"n_turns": 1, "n_symbols": 1, "n_rows": 700, "n_windows": 6000},
    "panel": {"sizes": (2, 4)},
    "start": {"n_turns": 1},
    "large": {"budget": "20k", "n_windows": 2},
    "batch": {"budget": "5k", "mem_cap": 1.0},
    "cluster": {"budget": "2k", "n_seeds": 4},
}
PEERS_MISSING = [name for name in ("accelerate", "neuralforecast") if find_spec(name) is None]  # of the extra `bench`
LONG = ("run", "study", "batch", "panel", "start", "cluster")  # those that start processes


def test_each_part_has_tiny_sizes():
    assert TINY.keys() == PARTS.keys()


@pytest.mark.parametrize("name", [n if n not in LONG else pytest.param(n, marks=pytest.mark.soak) for n in TINY])
def test_every_row_is_made_at_tiny_sizes(name):
    rows = PARTS[name].rows(**TINY[name])
    assert rows
    for row in rows:
        assert row.keys() == {"work", "target", "measured", "detail"} and all(row.values())
        assert re.search(r"\d", row["measured"]) or (row["measured"] == "not measured" and PEERS_MISSING), row
    assert rows[0]["work"] in render(rows, {"device": "cpu"})


@pytest.mark.soak
def test_the_lines_for_a_gpu_run_at_tiny_sizes_and_claim_nothing_without_one(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    found = gpu.rows(gpu.TINY)
    assert len(found) == len(gpu.PARTS) == 5
    assert {row["measured"] for row in found} == {"not measured"} and all("no CUDA device" in row["detail"] for row in found)


def test_turns_alternate_and_the_warm_ones_do_not_count():
    calls = []
    seconds = take_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, n_turns=2, n_warm=1)
    assert "".join(calls) == "abbaab" and [len(v) for v in seconds.values()] == [2, 2]
    assert median_ratio([4, 9, 8], [2, 3, 4]) == 2
