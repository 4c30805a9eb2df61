"""What a panel costs: 500 symbols × 8,000 sessions × 20 features, from registered files to training steps.

Each size is loaded in a process of its own, so that its peak memory is its own. Files are made of random numbers and
registered as any others are; the load verifies every one of them as it reads it.
"""

import json
import resource
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import numpy as np
import pandas as pd

from .children import answer

N_SESSIONS, N_FEATURES, SIZES = 8000, 20, (125, 250, 500)
DAYS = pd.DatetimeIndex(pd.bdate_range("1990-01-01", periods=N_SESSIONS, name="session"))


def names(n: int) -> tuple[str, ...]:
    return tuple(f"S{i:03d}.dataset.noise" for i in range(n))


def write(folder: Path, n: int) -> None:
    "Write and register n symbols; all entries at once, since one by one would write the manifest n times."
    from finpatch.core import file_digest, utc_now
    from finpatch.digest import write_frame
    from finpatch.entries import write_entries
    from finpatch.manifest import describe

    rng, entries = np.random.default_rng(0), []
    for name in names(n):
        close = 100 * np.exp(np.cumsum(rng.normal(0, 0.01, N_SESSIONS)))
        x = rng.standard_normal((N_SESSIONS, N_FEATURES), dtype=np.float32)
        frame = pd.DataFrame(x, index=DAYS, columns=[f"x{i}" for i in range(N_FEATURES)]).assign(Close=close)
        path = folder / "processed" / f"{name}.v1.parquet"
        write_frame(frame, path)
        about = {"tier": "noise", "parents": [], "code_sha256": "0" * 64, "machine": "none"}
        files = {"path": f"processed/{path.name}", "md5s": [file_digest(path, "md5")], "created_utc": utc_now()}
        entries.append(describe(name, frame, about) | files)
    write_entries(folder, "processed", entries)


def config(n: int):
    from finpatch.experiment import ExperimentConfig, ModelConfig, OptimConfig, SplitsConfig

    ends = {"train_end": date(2010, 12, 31), "val_end": date(2014, 12, 31), "test_end": date(2020, 6, 30)}
    splits, model = SplitsConfig(**ends, max_context=60), ModelConfig(patch_length=10, stride=10)
    what = {"dataset": names(n), "task": "direction", "horizon": 1, "context_length": 60, "splits": splits, "model": model}
    return ExperimentConfig(seed=0, optim=OptimConfig(lr=1e-3, global_batch_size=512), **what)


def peak_gib() -> float:
    "Return the peak of this process; what `getrusage` says begins on Linux with the peak of the parent."
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30  # macOS: bytes


def measure(folder: str, n: int) -> dict:
    "Load, gather and train; return seconds and the peak of this process."
    import torch

    from finpatch.dataset import load_dataset
    from finpatch.job import make_model

    before = peak_gib()
    began = time.perf_counter()
    data = load_dataset(config(n), folder)
    loaded = time.perf_counter() - began
    peak = peak_gib()
    model, index = make_model(config(n), "20k", data), data.index["train"][torch.randperm(len(data.index["train"]))]
    gathers, steps = [], []
    for part in index[: 512 * 12].split(512):
        began = time.perf_counter()
        x, y = data.batch(part)
        gathers.append(time.perf_counter() - began)
        data.task.loss(model(x), y).mean().backward()
        steps.append(time.perf_counter() - began)
    seconds = {"load_s": loaded, "gather_s": float(np.median(gathers)), "step_s": float(np.median(steps))}
    return seconds | {"before_gib": before, "peak_gib": peak, "n_rows": len(data.x)}


def rows(sizes: tuple[int, ...] = SIZES) -> list[dict]:
    found, work = {}, f"{sizes[-1]} symbols × {N_SESSIONS:,} sessions × {N_FEATURES} features"
    with tempfile.TemporaryDirectory() as name:
        write(Path(name), sizes[-1])
        for n in sizes:
            found[n] = answer("panel", name, str(n))
    small, large = found[sizes[-2]], found[sizes[-1]]
    own = {n: f["peak_gib"] - f["before_gib"] for n, f in found.items()}
    times = "; ".join(f"{n}: {f['load_s']:.1f} s" for n, f in found.items())
    peaks = "; ".join(f"{n}: {gib:.2f} GiB" for n, gib in own.items())
    whole = f"{large['peak_gib']:.2f} GiB with Python and torch"
    grown = f"× {large['load_s'] / small['load_s']:.2f} time, × {own[sizes[-1]] / own[sizes[-2]]:.2f} memory"
    step = f"a training step of 20k parameters takes {large['step_s'] * 1e3:.0f} ms"
    told = [
        (f"load and verify {work}", "seconds", f"{large['load_s']:.1f} s", times),
        ("peak memory that the load adds", "< 1 GiB", f"{own[sizes[-1]]:.2f} GiB", f"{peaks}; {whole}"),
        ("twice the symbols", "linear", grown, f"{sizes[-2]} to {sizes[-1]} symbols"),
        ("a batch of 512 windows of 60 sessions", "as on one symbol", f"{large['gather_s'] * 1e3:.1f} ms", step),
    ]
    return [dict(zip(("work", "target", "measured", "detail"), row, strict=True)) for row in told]


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
