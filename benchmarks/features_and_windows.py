"""Features beside the bare TA-Lib calls behind them, and windows beside the machine's own copy.

The bare calls are those that a20 makes, with the same windows of the same arrays, and nothing around them. Two copies
stand beside a batch, both of its size and into new memory: blocks of the same rows one after the other, which come from
where a batch comes from, and one block over and over, which stays in the cache. Memory is told twice too: what is held
while batches are taken, and the most that there was while the dataset was made. The row names the less kind of each.
"""

import statistics
from itertools import cycle

import numpy as np
import pandas as pd
import torch

from finpatch.causal import random_bars
from finpatch.dataset import from_arrays
from finpatch.device import peak_mem_gib
from finpatch.features import compute_features

from .children import answer, resident_gib
from .turns import median_ratio, row, take_turns, tell_ms


def bare_calls(bars: pd.DataFrame) -> None:
    "The calls of TA-Lib that the definitions of a20 name, daily and weekly."
    import talib as ta

    high, low, c, v = (bars[name].to_numpy(np.float64) for name in ("High", "Low", "Close", "Volume"))
    for n in (9, 10, 20, 25, 90):
        ta.DEMA(c, n)
    for n in (12, 50, 100, 200):
        ta.SMA(c, n)
    for closes in (c, c[4::5].copy()):
        ta.RSI(closes, 14)
        ta.STOCHRSI(closes, 14, 5, 3, 0)
    ta.MACD(c, 12, 26, 9)
    obv = ta.OBV(c, v)
    ta.SMA(obv, 20)
    ta.STDDEV(obv, 20)
    ta.ADOSC(high, low, c, v, 3, 10)
    ta.SMA(v, 20)
    ta.ATR(high, low, c, 14)
    ta.ADX(high, low, c, 14)
    ta.BBANDS(c, 20, 2, 2)
    typical = (high + low + c) / 3
    ta.SUM(typical * v, 20)
    ta.SUM(v, 20)


def features(n_turns: int, n_symbols: int, n_rows: int) -> dict:
    frames = [random_bars(n_rows, seed).assign(**{"Adj Close": lambda f: f["Close"]}) for seed in range(min(n_symbols, 10))]
    each = [frames[i % len(frames)] for i in range(n_symbols)]
    calls = {
        "a20": lambda: [compute_features(frame, "a20") for frame in each],
        "bare TA-Lib": lambda: [bare_calls(frame) for frame in each],
    }
    seconds = take_turns(calls, n_turns, n_warm=1)
    work = f"a20 over {n_symbols} symbols × {n_rows:,} rows, one core"
    return row(work, "≤ 2.5 × bare TA-Lib", f"{median_ratio(seconds['a20'], seconds['bare TA-Lib']):.2f} ×", tell_ms(seconds))


def gather(n_turns: int, n_rows: int, n_windows: int = 512, context_length: int = 60) -> dict:
    "Gather shuffled batches, and copy as many bytes of the same rows."
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n_rows, 20), dtype=np.float32)
    data = from_arrays(x, (x[:, 0] > 0).astype(float), kind="binary", context_length=context_length)
    parts = cycle(data.index["train"][torch.randperm(len(data.index["train"]))].split(n_windows))
    blocks = cycle(data.x[: len(data.x) // (n_windows * context_length) * n_windows * context_length].split(n_windows * context_length) or [data.x])
    one = next(blocks)
    calls = {"batch": lambda: data.batch(next(parts)), "copy": lambda: next(blocks).clone(), "copy of one block": lambda: one.clone()}
    seconds = take_turns(calls, n_turns, n_warm=5)
    share, cached = (median_ratio(seconds[name], seconds["batch"]) for name in ("copy", "copy of one block"))
    rate = data.batch(next(parts))[0].nbytes / float(np.median(seconds["batch"])) / 2**30
    work = f"batches of {n_windows} windows of {context_length} rows from a dataset of {n_rows:,} rows"
    return row(work, "≥ 70 % of the copy rate", f"{share * 100:.0f} % of copying its rows, {cached * 100:.0f} % of copying one block in the cache", f"{tell_ms(seconds)}; {rate:.1f} GiB/s")


def held(n_rows: int) -> dict:
    "Load a dataset in this process; return what it holds over its feature tensor."
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n_rows, 20), dtype=np.float32)
    y = (x[:, 0] > 0).astype(float)
    from_arrays(x[:2000], y[:2000], kind="binary", context_length=60).batch(torch.arange(512))  # what is loaded once
    before = resident_gib()
    data = from_arrays(x, y, kind="binary", context_length=60)
    for part in data.index["train"][: 512 * 20].split(512):
        data.batch(part)
    sizes = {"tensor_gib": data.x.nbytes / 2**30, "held_gib": resident_gib() - before}
    return sizes | {"peak_gib": peak_mem_gib() - before}


def memory(n_rows: int) -> dict:
    found = [answer("features_and_windows", str(n_rows)) for _ in range(5)]  # what the C library keeps of freed memory differs
    found = {name: statistics.median(f[name] for f in found) for name in found[0]}
    held, peak = (found[name] / found["tensor_gib"] for name in ("held_gib", "peak_gib"))
    mib = {name: f"{found[name + '_gib'] * 1024:.0f} MiB" for name in ("tensor", "held", "peak")}
    detail = f"tensor {mib['tensor']}; {mib['held']} held while batches are taken, {mib['peak']} at most while it was made"
    return row(f"memory of a dataset of {n_rows:,} rows and its batches", "≤ 1.3 × its feature tensor", f"{held:.2f} × held, {peak:.2f} × at most", detail)


def rows(n_turns: int = 7, n_symbols: int = 100, n_rows: int = 10_000, n_windows: int = 1_000_000) -> list[dict]:
    return [features(n_turns, n_symbols, n_rows), gather(40 * n_turns, n_windows), memory(n_windows)]


if __name__ == "__main__":
    import json
    import sys

    print(json.dumps(held(int(sys.argv[1]))))
