"""The presets on this machine: 2m beside torch's own encoder with a DataLoader, 20m beside the machine's matrix products.

torch's `nn.TransformerEncoder` is given the sizes of 2m, pre-norm, GELU, the same dropout, a flattening head, fused AdamW and
clipping, and a DataLoader over the same windows, as a careful user would write it. For 20m every matrix product of a
training step, forward and backward, is multiplied alone at the shapes that the step has; that is as fast as the step could
be if nothing else took time.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import cycle

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from finpatch.budget import load_patchtst_config
from finpatch.dataset import FinancialDataset
from finpatch.experiment import OptimConfig
from finpatch.patchtst import PatchTST, PatchTSTConfig
from finpatch.trainer import Trainer, epoch_order, train_step

from .turns import median_ratio, row, take_turns, tell_ms

PRECISIONS = {"fp32": "float32", "bf16": "bfloat16"}


def make_data(n: int = 12_000) -> FinancialDataset:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(n, 20)), (rng.normal(size=n) > 0).astype(float)
    return FinancialDataset.from_arrays(x, y, kind="binary", context_length=60)


class Windows(Dataset):
    "Windows as torch's own loader wants them: one at a time."

    def __init__(self, data: FinancialDataset):
        self.x, self.y, self.index, self.row = data.x, data.y, data.index["train"], data.row

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        sample = self.index[i]
        end = int(self.row[sample]) + 1
        return self.x[end - 60 : end], self.y[sample]


class PlainEncoder(nn.Module):
    "The model of a preset from torch's own parts."

    def __init__(self, config: PatchTSTConfig):
        super().__init__()
        self.config, d = config, config.d_model
        self.patching = nn.Linear(config.patch_length * config.n_features, d)
        self.positions = nn.Parameter(torch.randn(config.n_patches, d) * 0.02)
        layer = partial(nn.TransformerEncoderLayer, activation="gelu", batch_first=True, norm_first=True)
        layers = layer(d, config.n_heads, config.d_ff, config.dropout)
        self.encoder = nn.TransformerEncoder(layers, config.n_layers, nn.LayerNorm(d), enable_nested_tensor=False)
        self.dropout, self.head = nn.Dropout(config.dropout), nn.Linear(config.n_patches * d, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, 1)
        patches = x.unfold(1, self.config.patch_length, self.config.stride).flatten(2)  # (B, N, F·P)
        return self.head(self.encoder(self.dropout(self.patching(patches) + self.positions)).flatten(1))


def forever(loader: DataLoader) -> Iterator:
    while True:
        yield from loader


def plain_step(model: nn.Module, batches: Iterator, is_bf16: bool) -> Callable[[], None]:
    "Return a step of the loop that a careful user writes."
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        x, y = next(batches)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16) if is_bf16 else nullcontext():
            logits = model(x)[:, 0]
        F.binary_cross_entropy_with_logits(logits.float(), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def own_step(budget: str, data: FinancialDataset, precision: str, n_windows: int) -> Callable[[], None]:
    "Return a step of this project's trainer."
    torch.manual_seed(0)
    optim = OptimConfig(lr=1e-4, global_batch_size=n_windows)
    trainer = Trainer(PatchTST(load_patchtst_config(budget)), data, optim, precision=precision)
    parts = cycle(epoch_order(len(data.index["train"]), 0, 0).split(n_windows))
    return lambda: train_step(trainer, data.index["train"][next(parts)])


def against_plain(budget: str, n_turns: int, n_windows: int) -> list[dict]:
    data, told = make_data(), []
    for (precision, name), target in zip(PRECISIONS.items(), (1.2, 1.9), strict=True):
        torch.manual_seed(0)
        calls = {"finpatch": own_step(budget, data, precision, n_windows)}
        for peer in dict.fromkeys(("fp32", precision)):
            loader = DataLoader(Windows(data), batch_size=n_windows, shuffle=True, drop_last=True)
            model = PlainEncoder(load_patchtst_config(budget)).train()
            calls[f"torch {PRECISIONS[peer]}"] = plain_step(model, forever(loader), peer == "bf16")
        seconds = take_turns(calls, n_turns)
        best = min((n for n in seconds if n != "finpatch"), key=lambda n: sorted(seconds[n])[n_turns // 2])
        peers = "the faster of its precisions" if precision == "bf16" else "in float32 too"
        work = f"{budget} preset, batch {n_windows}, {name}, against nn.TransformerEncoder and DataLoader, {peers}"
        others = {n: median_ratio(seconds[n], seconds["finpatch"]) for n in seconds if n != "finpatch"}
        ratios = ", ".join(f"{n} {r:.2f} ×" for n, r in others.items())
        told.append(row(work, f"≥ {target} ×", f"{others[best]:.2f} ×", f"{tell_ms(seconds)}; {ratios}"))
    return told


def products(config: PatchTSTConfig, n_windows: int, dtype: torch.dtype) -> tuple[Callable[[], None], int]:
    "Return a function that takes every matrix product of a training step, and how many operations they are."
    c, r = config, n_windows * config.n_patches
    d, maps = c.d_model, []
    for n_in, n_out in c.n_layers * ((d, 3 * d), (d, d), (d, c.d_ff), (c.d_ff, d)):
        maps.append((torch.randn(r, n_in, dtype=dtype), torch.randn(n_out, n_in, dtype=dtype), torch.randn(r, n_out, dtype=dtype)))

    def multiply() -> None:
        for x, w, g in maps:
            F.linear(x, w)
            g @ w
            g.T @ x

    return multiply, sum(6 * x.numel() * len(w) for x, w, _ in maps)


def against_products(budget: str, n_turns: int, n_windows: int) -> list[dict]:
    data, told, config = make_data(), [], load_patchtst_config(budget)
    for (precision, name), target in zip(PRECISIONS.items(), (82, 70), strict=True):
        multiply, n_ops = products(config, n_windows, getattr(torch, name))
        calls = {"finpatch": own_step(budget, data, precision, n_windows), "its matrix products alone": multiply}
        seconds = take_turns(calls, n_turns)
        share = median_ratio(seconds["its matrix products alone"], seconds["finpatch"])
        rate = n_ops / sorted(seconds["its matrix products alone"])[n_turns // 2] / 1e9
        work = f"{budget} preset, batch {n_windows}, {name}, of the machine's matrix products at its shapes"
        told.append(row(work, f"≥ {target} %", f"{share * 100:.0f} %", f"{tell_ms(seconds)}; products reach {rate:.0f} GFLOP/s"))
    return told


def rows(n_turns: int = 40, small: str = "2m", large: str = "20m", n_windows: int = 64) -> list[dict]:
    return against_plain(small, n_turns, n_windows) + against_products(large, max(2, n_turns // 2), n_windows)
