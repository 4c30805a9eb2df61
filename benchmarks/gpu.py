"""`make bench-gpu`: what a training step gains on a CUDA device, with the card named.

Windows lie on the device, the model is compiled with CUDA graphs, AdamW is fused, the precision is the one that `auto` finds.
Without such a device the same lines run at tiny sizes on the CPU, so that they can be tested, and every row says "not measured".
"""

import json
import subprocess
import sys
import tempfile
import time
from itertools import cycle

import torch

from finpatch.batch_size import find_batch_size, pose
from finpatch.budget import load_patchtst_config
from finpatch.compute import choose_precision, set_up
from finpatch.cost import flops_per_sample
from finpatch.device import describe_machine
from finpatch.experiment import ComputeConfig, OptimConfig
from finpatch.patchtst import PatchTST
from finpatch.trainer import Trainer, epoch_order, train_step

from .children import environment
from .presets import Windows, make_data
from .turns import row

FULL = {"small": "2m", "large": "200m", "cell": "300k", "n_windows": 512, "n_steps": 200, "n_cells": 8, "side": 8192}
TINY = {"small": "20k", "large": "23k", "cell": "10k", "n_windows": 8, "n_steps": 2, "n_cells": 2, "side": 64}


def own_step(budget: str, device: torch.device, n_windows: int):
    "Return a trainer and a function that takes its next step."
    torch.manual_seed(0)
    data, model, is_cuda = make_data(3000).to(device), PatchTST(load_patchtst_config(budget)), device.type == "cuda"
    x, _ = data.batch(data.index["train"][:n_windows])
    done = set_up(model, ComputeConfig(precision="auto", is_compiled=is_cuda), x, device, mode="reduce-overhead")
    trainer = Trainer(model, data, OptimConfig(lr=1e-4, global_batch_size=n_windows), device=device, precision=done["precision"])
    parts = cycle(p for p in epoch_order(len(data.index["train"]), 0, 0).split(n_windows) if len(p) == n_windows)
    return trainer, lambda: train_step(trainer, data.index["train"][next(parts)])


def seconds_of(step, n_steps: int, device: torch.device) -> float:
    "Time steps after some that warm up, up to the end of what the device was given."
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for _ in range(min(20, n_steps)):
        step()
    wait()
    began = time.perf_counter()
    for _ in range(n_steps):
        step()
    wait()
    return time.perf_counter() - began


def peer_rate(budget: str, n_windows: int, n_steps: int, is_cuda: bool) -> float:
    "Return the samples a second of Hugging Face's Trainer with this project's model in bfloat16, after as many steps that warm up."
    import transformers

    n_warm, marks = min(20, n_steps), []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step in (n_warm, n_warm + n_steps):
                torch.cuda.synchronize() if is_cuda else None
                marks.append(time.perf_counter())

    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = PatchTST(load_patchtst_config(budget), fused=is_cuda)  # torch's own fused attention there

        def forward(self, x, labels):
            logits = self.model(x)
            return {"loss": torch.nn.functional.binary_cross_entropy_with_logits(logits[:, 0].float(), labels)}

    windows = Windows(make_data(3000))
    samples = [dict(zip(("x", "labels"), windows[i], strict=True)) for i in range(len(windows))]
    options = {"per_device_train_batch_size": n_windows, "max_steps": n_warm + n_steps, "optim": "adamw_torch_fused", "bf16": True}
    options |= {"use_cpu": not is_cuda, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no"}
    with tempfile.TemporaryDirectory() as out:
        arguments = transformers.TrainingArguments(out, remove_unused_columns=False, label_names=["labels"], **options)
        transformers.Trainer(Wrapped(), arguments, train_dataset=samples, callbacks=[Clock()]).train()
    return n_windows * n_steps / (marks[1] - marks[0])


def against_peer(device: torch.device, size: dict) -> tuple[str, str]:
    budget, n, n_steps = size["small"], size["n_windows"], size["n_steps"]
    own = n * n_steps / seconds_of(own_step(budget, device, n)[1], n_steps, device)
    try:
        peer = peer_rate(budget, n, n_steps, device.type == "cuda")
    except ImportError as error:
        return "not measured", f"{own:.0f} samples a second; {type(error).__name__}: {error}"
    return f"{own / peer:.1f} ×", f"{own:.0f} samples a second against {peer:.0f}, which is not compiled, batch {n}"


def of_matrix_rate(device: torch.device, size: dict) -> tuple[str, str]:
    budget, side = size["large"], size["side"]
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    rate = 2 * side**3 * 50 / seconds_of(lambda: a @ b, 50, device)
    n, n_steps = max(8, size["n_windows"] // 2), max(2, size["n_steps"] // 10)
    took = seconds_of(own_step(budget, device, n)[1], n_steps, device)
    got = flops_per_sample(load_patchtst_config(budget), training=True) * n * n_steps / took
    return f"{got / rate:.0%}", f"{got / 1e12:.3g} of {rate / 1e12:.3g} TFLOP/s of a product of {side} × {side}, batch {n}"


WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "aten::_local_scalar_dense")


def waits_a_step(device: torch.device, size: dict) -> tuple[str, str]:
    n_steps, (_, step) = min(40, size["n_steps"]), own_step(size["small"], device, size["n_windows"])
    seconds_of(step, 2, device)
    with torch.profiler.profile() as profile:
        for _ in range(n_steps):
            step()
    found = {e.key: e.count for e in profile.key_averages() if e.key in WAITS}
    return f"{sum(found.values()) / n_steps:.2f}", f"{found or 'none'} in {n_steps} steps"


def found_by_itself(device: torch.device, size: dict) -> tuple[str, str]:
    answer = find_batch_size(pose(size["small"], str(device)), max_micro_batch=4096 if device.type == "cuda" else 2)
    return f"{answer['recommended']}, {choose_precision('auto', device)}", f"{len(answer['probes'])} probes, {answer['largest_safe']} are safe"


def cell_steps_s(budget: str, device: torch.device, n_steps: int) -> float:
    "Return the steps a second of one small cell, batch 128."
    return n_steps / seconds_of(own_step(budget, device, 128)[1], n_steps, device)


def many_cells(device: torch.device, size: dict) -> tuple[str, str]:
    words = [sys.executable, "-m", "benchmarks.gpu", "cell", size["cell"], str(device), str(size["n_steps"] * 10)]

    def together(n: int) -> float:
        children = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment()) for _ in range(n)]
        return sum(json.loads(child.communicate()[0].splitlines()[-1]) for child in children)

    one, many = together(1), together(size["n_cells"])
    return f"{many / one:.1f} ×", f"{many:.0f} steps a second in {size['n_cells']} processes against {one:.0f} in one"


PARTS = (
    ("training step of {small} against Hugging Face's Trainer", "≥ 10 ×", against_peer),
    ("training step of {large}, of the measured bfloat16 matrix rate", "≥ 45 %", of_matrix_rate),
    ("waits of the host for the device, a step", "0", waits_a_step),
    ("batch size and precision of {small}, as found", "by the discovery", found_by_itself),
    ("{n_cells} cells of {cell} at once on one card against one", "as many as possible", many_cells),
)


def rows(size: dict | None = None) -> list[dict]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size, found = size or (FULL if device.type == "cuda" else TINY), []
    for work, target, part in PARTS:
        measured, detail = part(device, size)
        if device.type == "cuda":
            found.append(row(work.format(**size), target, measured, detail))
    return found or unmeasured()


def unmeasured() -> list[dict]:
    "The rows of a machine without such a device."
    detail = "no CUDA device here; the tests take these lines at tiny sizes on the CPU"
    return [row(work.format(**FULL), target, "not measured", detail) for work, target, _ in PARTS]


if __name__ == "__main__":
    if sys.argv[1:2] == ["cell"]:
        print(json.dumps(cell_steps_s(sys.argv[2], torch.device(sys.argv[3]), int(sys.argv[4]))))
    else:
        from .__main__ import render

        chosen = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        print(render(rows(), describe_machine(chosen) | {"torch": torch.__version__.split("+")[0]}))
