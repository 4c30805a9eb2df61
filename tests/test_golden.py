"""Golden losses: fifty steps of a tiny model that no refactor may change. Risk: a rewrite that is faster and slightly other.

Float64, no dropout, weights and data from numpy's generator, so that neither torch's initialisation nor its random
numbers matter. Nine digits hold across thread counts and instruction sets; six are asked for.
"""

import numpy as np
import pytest
import torch

from finpatch.callbacks import Schedule
from finpatch.dataset import FinancialDataset
from finpatch.experiment import OptimConfig
from finpatch.patchtst import PatchTST, PatchTSTConfig
from finpatch.trainer import Callback, Trainer

STEPS = (0, 9, 19, 29, 39, 49)
GOLDEN = {
    "binary": [0.735984549897, 0.653518048341, 0.613383535019, 0.495805306861, 0.432348960981, 0.476973965442],
    "real": [1.430372264269, 1.094022307934, 0.759770031843, 0.658004998249, 0.197513161303, 0.248150346774],
}


class Losses(Callback):
    "Keep the loss of each step."

    def before_fit(self, trainer):
        self.values = []

    def after_step(self, trainer):
        self.values.append(float(trainer.loss))


def losses(kind: str, **options) -> list[float]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1600, 4))
    target = x[:, 0] + 0.5 * x[:, 1]
    y = (target > 0).astype(float) if kind == "binary" else target
    data = FinancialDataset.from_arrays(x, y, kind=kind, context_length=20)
    data.x, data.y = data.x.double(), data.y.double()
    size = {"d_model": 16, "n_heads": 2, "n_layers": 2, "d_ff": 32, "dropout": 0.0}
    model = PatchTST(PatchTSTConfig(n_features=4, context_length=20, **size)).double()
    with torch.no_grad():
        for _, p in sorted(model.named_parameters()):
            p.copy_(torch.from_numpy(0.1 * rng.normal(size=tuple(p.shape)) + (p.ndim == 1) * p.numpy()))
    keep = Losses()
    optim = OptimConfig(lr=3e-3, warmup_steps=10, max_steps=50, epochs=5, patience=None)
    Trainer(model, data, optim, callbacks=[Schedule(), keep], **options).fit()
    return keep.values


@pytest.mark.parametrize("kind", GOLDEN)
def test_fifty_steps_have_the_golden_losses(kind):
    values = losses(kind)
    assert len(values) == 50
    assert [values[i] for i in STEPS] == pytest.approx(GOLDEN[kind], rel=1e-6)


def test_micro_batches_have_the_golden_losses():
    "Accumulation and padding are rounding alone."
    values = losses("binary", micro_batch_size=24)
    assert [values[i] for i in STEPS] == pytest.approx(GOLDEN["binary"], rel=1e-6)
