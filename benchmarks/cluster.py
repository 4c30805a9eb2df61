"""What a second worker brings: cells an hour of one small study on a Ray cluster of this machine, with one worker and with two.

A cluster is started for each. The rate is that of the results after the second, and after the baselines, so that neither the start
of Ray nor the first import of torch in a worker is in it; the whole time is told beside it.
"""

import tempfile
import time
from datetime import date
from pathlib import Path


def study(budget: str, n_seeds: int):
    from finpatch.experiment import OptimConfig
    from finpatch.folds import FoldsConfig
    from finpatch.plan import AxesConfig, StudyConfig

    folds = FoldsConfig(test_start=date(2013, 1, 1), test_end=date(2018, 12, 31), n_folds=1)
    axes = AxesConfig(budgets=(budget,), n_seeds=n_seeds, tasks=("log_range",), tiers=("raw6",))
    optim = OptimConfig(lr=1e-3, warmup_steps=5, global_batch_size=64, epochs=3, patience=2)
    return StudyConfig(symbols=("SP500",), axes=axes, folds=folds, optim=optim, rates=None, thermal=None)


def cells_an_hour(config, folder: Path, n_workers: int) -> tuple[float, float]:
    "Run a study; return its rate and its whole time in seconds."
    from finpatch.cell import Source
    from finpatch.cluster import work_on_cluster
    from finpatch.core import read_json
    from finpatch.plan import Plan

    began, study_dir = time.monotonic(), folder / f"study-{n_workers}"
    ended = work_on_cluster(Plan(config, Source(folder / "data", "cpu")), study_dir, n_workers=n_workers)
    assert ended == {"is_stopped": False, "failed": {}}, ended
    ends = [(read_json(p)["role"], p.stat().st_mtime) for p in study_dir.glob("cells/*/result.json")]
    times = sorted(t for role, t in ends if role == "study")
    first = max([times[1], *(t for role, t in ends if role != "study" and t < times[-1])])
    return 3600 * sum(t > first for t in times) / (times[-1] - first), time.monotonic() - began


def rows(budget: str = "30k", n_seeds: int = 30) -> list[dict]:
    from finpatch.features import build_dataset
    from finpatch.market import fetch_ohlcv

    with tempfile.TemporaryDirectory() as tmp:
        fetch_ohlcv("SP500", data_dir=Path(tmp) / "data")
        build_dataset("SP500", "raw6", data_dir=Path(tmp) / "data")
        (one, one_s), (two, two_s) = (cells_an_hour(study(budget, n_seeds), Path(tmp), n) for n in (1, 2))
    detail = f"{one:,.0f} and {two:,.0f} cells an hour; {n_seeds} cells of {budget} and one of baselines in {one_s:.0f} and {two_s:.0f} s, Ray's start included"
    return [{"work": "a second worker of a Ray cluster", "target": "× 2", "measured": f"× {two / one:.2f}", "detail": detail}]
