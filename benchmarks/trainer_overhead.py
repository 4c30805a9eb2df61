"""What the trainer costs over a bare PyTorch loop that does the same 2m steps.

Both run in this process and take turns, step by step, on windows of the same data: a callback takes a bare step before or
after each step of the trainer, so that whatever else the machine does meets both alike. Each loop comes twice in a row and
finds its weights in the cache at the second time, so two turns, which hold both cases for both, make one ratio. The bare
loop is what a careful user would write: gather, forward, backward, clip, set the learning rate, fused AdamW. The trainer
runs with everything that an ordinary run has: schedule, metrics, checkpoints, signals, heat, a progress line.
"""

import io
import tempfile
import time
from contextlib import redirect_stderr
from pathlib import Path

import numpy as np
import torch
from scipy.stats import bootstrap

from finpatch.budget import load_patchtst_config
from finpatch.callbacks import Progress, Schedule, WriteMetrics, lr_at
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
    "Beside each step of the trainer take one of the bare loop, in turns before and after it; time both."

    order = -1  # before all others, so that what they do counts as the trainer's

    def __init__(self, bare: BareLoop):
        self.bare, self.trained_s, self.bare_s, self.inner_s = bare, [], [], 0.0

    def take(self) -> None:
        began = time.perf_counter()
        self.bare.step()
        self.inner_s = time.perf_counter() - began

    def before_fit(self, trainer):
        self.mark = time.perf_counter()

    def before_step(self, trainer):
        "A turn lasts from here to here; what lies between is the trainer's, but for the bare step."
        now = time.perf_counter()
        if self.bare.done:
            self.trained_s.append(now - self.mark - self.inner_s)
            self.bare_s.append(self.inner_s)
        self.mark = now
        if trainer.step % 2 == 0:
            self.take()

    def after_step(self, trainer):
        if trainer.step % 2 == 0:  # the step that has just been taken was an odd one
            self.take()


def pairs(seconds: np.ndarray) -> np.ndarray:
    "Add up each two turns."
    return seconds[: len(seconds) // 2 * 2].reshape(-1, 2).sum(axis=1)


def measure(budget: str = "2m", n_steps: int = 1200, n_warm: int = 10) -> dict:
    "Return median seconds of both, and the median of their ratios by two turns with its interval."
    optim, data = OptimConfig(lr=1e-4, max_steps=n_steps, epochs=1000), make_data()
    turns = TakeTurns(BareLoop(data, optim, budget))
    with tempfile.TemporaryDirectory() as name, redirect_stderr(io.StringIO()):
        folder = Path(name)
        ordinary = [Schedule(), Progress(), WriteMetrics(folder / "metrics.jsonl"), PauseOnSignal(folder / "STOP"),
                    Checkpoint(folder / "checkpoints"), ThermalCallback(path=folder / "thermal.jsonl")]  # fmt: skip
        Trainer(make_model(budget), data, optim, callbacks=[turns, *ordinary]).fit()
    trained, bare = np.array(turns.trained_s[n_warm:]), np.array(turns.bare_s[n_warm:])
    ratio = pairs(trained) / pairs(bare)
    low, high = bootstrap((ratio,), np.median, rng=np.random.default_rng(0)).confidence_interval
    return {"trainer_step_s": np.median(trained), "bare_step_s": np.median(bare), "ratio": np.median(ratio),
            "low": low, "high": high, "n_steps": len(bare)}  # fmt: skip


def rows(budget: str = "2m", n_steps: int = 1200) -> list[dict]:
    found = measure(budget, n_steps)
    work = f"trainer over a bare loop, {budget}, batch 64, float32"
    ends = f"95 % interval {(found['low'] - 1) * 100:+.2f} to {(found['high'] - 1) * 100:+.2f} %"
    detail = f"median over {found['n_steps']} turns, {ends}; {found['trainer_step_s'] * 1e3:.1f} ms a step"
    return [{"work": work, "target": "< 1 %", "measured": f"{(found['ratio'] - 1) * 100:+.2f} %", "detail": detail}]
