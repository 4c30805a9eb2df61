"""What the trainer costs over a bare PyTorch loop that does the same 2m steps.

Both run in this process, on the same windows in the same order, in alternating blocks; medians over the blocks. The
bare loop is what a careful user would write: gather, forward, backward, clip, set the learning rate, fused AdamW.
"""

import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from finpatch.budget import load_patchtst_config
from finpatch.callbacks import Schedule, WriteMetrics, lr_at
from finpatch.checkpoint import Checkpoint, PauseOnSignal
from finpatch.dataset import FinancialDataset
from finpatch.device import describe_machine
from finpatch.experiment import OptimConfig
from finpatch.patchtst import PatchTST
from finpatch.trainer import Callback, Trainer, epoch_order, make_optimizer

N_STEPS, N_BLOCKS, N_WARM = 30, 7, 5


class Clock(Callback):
    "Note the time after each step."

    order = 99

    def before_fit(self, trainer):
        self.times = []

    def after_step(self, trainer):
        self.times.append(time.perf_counter())


def make_data() -> FinancialDataset:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(4600, 20)), (rng.normal(size=4600) > 0).astype(float)
    return FinancialDataset.from_arrays(x, y, kind="binary", context_length=60)


def make_model() -> PatchTST:
    torch.manual_seed(0)
    return PatchTST(load_patchtst_config("2m"))


def step_s(times: list[float]) -> float:
    return (times[-1] - times[N_WARM]) / (len(times) - 1 - N_WARM)


def bare(data: FinancialDataset, optim: OptimConfig) -> float:
    model, times = make_model(), []
    optimizer, index = make_optimizer(model, optim), data.index["train"]
    model.train()
    for step, part in enumerate(epoch_order(len(index), 0, 0).split(64)[:N_STEPS]):
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, N_STEPS, optim)
        x, y = data.batch(index[part])
        optimizer.zero_grad(set_to_none=True)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(model(x)[:, 0], y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        times.append(time.perf_counter())
    return step_s(times)


def trained(data: FinancialDataset, optim: OptimConfig, folder: Path) -> float:
    clock = Clock()
    metrics = folder / "metrics.jsonl"
    kept = [PauseOnSignal(folder / "STOP"), Schedule(), WriteMetrics(metrics), Checkpoint(folder / "checkpoints")]
    Trainer(make_model(), data, optim, callbacks=[*kept, clock]).fit()
    return step_s(clock.times)


def main() -> dict:
    data, optim = make_data(), OptimConfig(lr=1e-4, max_steps=N_STEPS)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(N_BLOCKS):
            rows.append((bare(data, optim), trained(data, optim, Path(folder))))
    ratios = [b / a for a, b in rows]
    return {
        "bare_step_s": statistics.median(a for a, _ in rows),
        "trainer_step_s": statistics.median(b for _, b in rows),
        "ratio": statistics.median(ratios),
        "ratio_low_high": [min(ratios), max(ratios)],
        "machine": describe_machine(torch.device("cpu")),
    }


if __name__ == "__main__":
    print(json.dumps(main(), indent=1))
