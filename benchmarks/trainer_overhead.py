"""What the trainer costs over a bare PyTorch loop that does the same 2m steps.

Both run in this process and take turns, step by step, on windows of the same data: a callback takes a bare step after each
step of the trainer, so that whatever else the machine does meets both alike. The bare loop is what a careful user would
write: gather, forward, backward, clip, set the learning rate, fused AdamW. The trainer runs with everything that an
ordinary run has: schedule, metrics, checkpoints, signals, heat.
"""

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
from finpatch.experiment import OptimConfig
from finpatch.patchtst import PatchTST
from finpatch.thermal import ThermalCallback
from finpatch.trainer import Callback, Trainer, epoch_order, make_optimizer


def make_data(n: int = 12_000) -> FinancialDataset:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(n, 20)), (rng.normal(size=n) > 0).astype(float)
    return FinancialDataset.from_arrays(x, y, kind="binary", context_length=60)


def make_model(budget: str = "2m") -> PatchTST:
    torch.manual_seed(0)
    return PatchTST(load_patchtst_config(budget))


class BareLoop:
    "The steps of a loop without a trainer, one at a time."

    def __init__(self, data: FinancialDataset, optim: OptimConfig, budget: str):
        self.data, self.optim, self.model = data, optim, make_model(budget).train()
        self.optimizer, self.index = make_optimizer(self.model, optim), data.index["train"]
        self.parts, self.done = epoch_order(len(self.index), 0, 0).split(optim.global_batch_size), 0

    def step(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr_at(self.done, self.optim.max_steps, self.optim)
        x, y = self.data.batch(self.index[self.parts[self.done % (len(self.parts) - 1)]])
        self.optimizer.zero_grad(set_to_none=True)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(self.model(x)[:, 0], y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.done += 1


class TakeTurns(Callback):
    "After each step of the trainer take one of the bare loop; time both."

    order = 99

    def __init__(self, bare: BareLoop):
        self.bare, self.trained_s, self.bare_s = bare, [], []

    def before_fit(self, trainer):
        self.mark = time.perf_counter()

    def after_step(self, trainer):
        ended = time.perf_counter()
        self.bare.step()
        self.trained_s.append(ended - self.mark)
        self.mark = time.perf_counter()
        self.bare_s.append(self.mark - ended)


def measure(budget: str = "2m", n_steps: int = 150, n_warm: int = 10) -> dict:
    "Return median seconds of both, and their ratio."
    optim, data = OptimConfig(lr=1e-4, max_steps=n_steps, epochs=1000), make_data()
    turns = TakeTurns(BareLoop(data, optim, budget))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ordinary = [Schedule(), WriteMetrics(folder / "metrics.jsonl"), PauseOnSignal(folder / "STOP"),
                    Checkpoint(folder / "checkpoints"), ThermalCallback(path=folder / "thermal.jsonl")]  # fmt: skip
        Trainer(make_model(budget), data, optim, callbacks=[*ordinary, turns]).fit()
    trained, bare = turns.trained_s[n_warm:], turns.bare_s[n_warm:]
    ratio = statistics.median(trained) / statistics.median(bare)
    return {"trainer_step_s": statistics.median(trained), "bare_step_s": statistics.median(bare), "ratio": ratio,
            "mean_ratio": sum(trained) / sum(bare), "n_steps": len(bare)}  # fmt: skip


def rows() -> list[dict]:
    found = measure()
    work = "trainer over a bare loop, 2m, batch 64, float32"
    detail = f"{found['trainer_step_s'] * 1e3:.1f} ms a step, bare {found['bare_step_s'] * 1e3:.1f} ms; mean ratio {found['mean_ratio']:.3f}"
    return [{"work": work, "target": "< 1 %", "measured": f"{(found['ratio'] - 1) * 100:+.2f} %", "detail": detail}]
