"""Time several ways of the same work in one process: each in turn, so that whatever else the machine does meets all alike."""

import statistics
import time
from collections.abc import Callable


def take_turns(calls: dict[str, Callable[[], object]], n_turns: int, n_warm: int = 2) -> dict[str, list[float]]:
    "Call each once a turn, in alternating order; return the seconds of the turns after those that warm up."
    seconds = {name: [] for name in calls}
    for turn in range(n_warm + n_turns):
        for name in list(calls)[:: -1 if turn % 2 else 1]:
            began = time.perf_counter()
            calls[name]()
            if turn >= n_warm:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def median_ratio(slow: list[float], fast: list[float]) -> float:
    "Return the median, over turns, of how many times longer `slow` took in the same turn."
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def tell_ms(seconds: dict[str, list[float]]) -> str:
    "Say the median of each in milliseconds."
    return ", ".join(f"{name} {statistics.median(values) * 1e3:.3g} ms" for name, values in seconds.items())


def row(work: str, target: str, measured: str, detail: str) -> dict[str, str]:
    return {"work": work, "target": target, "measured": measured, "detail": detail}


def not_measured(work: str, target: str, error: Exception) -> dict[str, str]:
    "The row of a peer that is not installed or of hardware that is not here."
    return row(work, target, "not measured", f"{type(error).__name__}: {error}; `make bench` installs the peers")
