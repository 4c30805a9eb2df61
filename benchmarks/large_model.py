"""What a training step of 200m holds beyond its weights, gradients and two moments, 16 bytes a parameter.

In a process of its own: the peak over what it held before the model was built, with and without activation checkpointing.
"""

import json
import sys

from .children import answer, resident_gib
from .turns import row


def measure(budget: str, n_windows: int, is_checkpointed: bool) -> dict:
    "Take two steps of the trainer in this process."
    import torch

    from finpatch.budget import count_parameters, load_patchtst_config
    from finpatch.compute import checkpoint_layers
    from finpatch.device import peak_mem_gib
    from finpatch.experiment import OptimConfig
    from finpatch.memory import reserve_nothing, steady_memory
    from finpatch.patchtst import PatchTST
    from finpatch.trainer import Trainer, train_step

    from .presets import make_data

    reserve_nothing()
    steady_memory()
    data = make_data(3000)
    torch.ones(512, 512) @ torch.ones(512, 512)  # what the libraries take once
    before = resident_gib()
    model = PatchTST(load_patchtst_config(budget))
    if is_checkpointed:
        checkpoint_layers(model)
    trainer = Trainer(model, data, OptimConfig(lr=1e-4, global_batch_size=2 * n_windows), micro_batch_size=n_windows)
    for part in data.index["train"][: 4 * n_windows].split(2 * n_windows):
        train_step(trainer, part)
    n = count_parameters(model)
    return {"n_params": n, "over_gib": peak_mem_gib() - before - 16 * n / 2**30, "before_gib": before}


def rows(budget: str = "200m", n_windows: int = 8) -> list[dict]:
    told = []
    for is_checkpointed, target in ((False, 0.6), (True, 0.3)):
        found = answer("large_model", budget, str(n_windows), str(int(is_checkpointed)))
        work = f"{budget} on the CPU, micro-batch {n_windows}{', activation checkpointing' if is_checkpointed else ''}"
        detail = f"{found['n_params']:,} parameters are {16 * found['n_params'] / 2**30:.2f} GiB; {found['before_gib']:.2f} GiB before the model"
        told.append(row(f"{work}: peak over 16 bytes a parameter", f"≤ {target} GiB", f"{found['over_gib']:.2f} GiB", detail))
    return told


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]), sys.argv[3] == "1")))
