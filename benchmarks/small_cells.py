"""Cells of a study an hour, beside one `finpatch train` process a cell.

The ladder of the shipped study at one learning rate, one task and one fold; one process a cell is what a shell loop does, as many at
a time as there are processors, a thread each. The study makes its baselines besides; they are not counted as cells. Both take turns.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .children import command, environment, make_data, run
from .turns import median_ratio, row

BUDGETS = ("10k", "23k", "55k", "130k", "300k")
OPTIM = "{{lr: 1e-3, weight_decay: 0.05, warmup_steps: 20, global_batch_size: 128, epochs: {epochs}, patience: 4}}"
MODEL = "{patch_length: 10, stride: 10, dropout: 0.1, head_dropout: 0.1}"
STUDY = """
symbols: [SP500]
axes: {{budgets: [{budgets}], n_seeds: {n_seeds}, tasks: [direction], tiers: [raw6], horizons: [1], contexts: [60]}}
folds: {{kind: expanding, n_folds: 1, test_start: 2016-01-01, test_end: 2018-12-31, val_sessions: 504}}
model: {model}
optim: {optim}
rates: null
effect: {{nats: 0.001, r2: 0.01}}
"""
CELL = """
seed: {seed}
dataset: [SP500.dataset.raw6]
task: direction
horizon: 1
context_length: 60
splits: {{train_end: 2013-12-31, val_end: 2015-12-31, test_end: 2018-12-31}}
model: {model}
optim: {optim}
"""


def study_s(folder: Path, budgets: tuple, n_seeds: int, epochs: int) -> float:
    "Run the study; return its seconds."
    text = STUDY.format(budgets=", ".join(budgets), n_seeds=n_seeds, model=MODEL, optim=OPTIM.format(epochs=epochs))
    (folder / "study.yaml").write_text(text)
    began = time.perf_counter()
    where = ["--data-dir", str(folder / "data"), "--run-dir", str(folder / "study"), "--device", "cpu"]
    run(*command("study", "--config", str(folder / "study.yaml"), *where))
    return time.perf_counter() - began


def processes_s(folder: Path, budgets: tuple, n_seeds: int, epochs: int) -> float:
    "Train each cell in a process of its own; return the seconds of all."

    def train(cell: tuple[str, int]) -> None:
        budget, seed = cell
        path = folder / f"cell{seed}.yaml"
        path.write_text(CELL.format(seed=seed, model=MODEL, optim=OPTIM.format(epochs=epochs)))
        where = ["--data-dir", str(folder / "data"), "--run-dir", str(folder / f"{budget}-{seed}"), "--device", "cpu"]
        words = command("train", "--config", str(path), "--budget", budget, *where)
        subprocess.run([sys.executable, *words], check=True, capture_output=True, env=environment() | {"OMP_NUM_THREADS": "1"})

    cells = [(budget, seed) for budget in reversed(budgets) for seed in range(n_seeds)]
    began = time.perf_counter()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(train, cells))
    return time.perf_counter() - began


def rows(budgets: tuple = BUDGETS, n_seeds: int = 3, epochs: int = 100, n_turns: int = 3) -> list[dict]:
    took = {"processes": [], "study": []}
    with tempfile.TemporaryDirectory() as name:
        make_data(Path(name) / "data", "raw6")
        for turn in range(n_turns):
            folder = Path(name) / str(turn)
            folder.mkdir()
            (folder / "data").symlink_to(Path(name) / "data")
            for who, call in (("processes", processes_s), ("study", study_s))[:: -1 if turn % 2 else 1]:
                took[who].append(call(folder, budgets, n_seeds, epochs))
    n, middle = len(budgets) * n_seeds, {who: statistics.median(seconds) for who, seconds in took.items()}
    told = {who: f"{n / s * 3600:.0f} an hour in {s:.0f} s" for who, s in middle.items()}
    work, ratio = f"study of {budgets[0]} to {budgets[-1]}, {n_seeds} seeds, against a process a cell", median_ratio(*took.values())
    return [row(work, "≥ 2 ×", f"{ratio:.2f} ×", f"{n} cells: {told['study']}, against {told['processes']}")]
