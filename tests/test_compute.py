"""G5, G7 and G8 of how a run is computed. Risk: a way to save memory or time changes the result, or is recorded and not done."""

import logging
import os
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch

from finpatch import compute
from finpatch.compute import checkpoint_layers, choose_precision, compile_model, same_draws, set_up
from finpatch.core import HardwareError, InputError
from finpatch.dataset import FinancialDataset
from finpatch.experiment import ComputeConfig, OptimConfig
from finpatch.patchtst import PatchTST, PatchTSTConfig
from finpatch.trainer import Callback, Trainer

CPU = torch.device("cpu")
X = torch.randn(32, 20, 3, generator=torch.Generator().manual_seed(0))


def make_model(fused: bool = True, **options) -> PatchTST:
    torch.manual_seed(0)
    size = {"d_model": 16, "n_heads": 2, "n_layers": 3, "d_ff": 32}
    return PatchTST(PatchTSTConfig(**{"n_features": 3, "context_length": 20} | size | options), fused)


def make_data(dtype=torch.float32) -> FinancialDataset:
    x = np.random.default_rng(0).normal(size=(900, 3)).astype(np.float32)
    data = FinancialDataset.from_arrays(x, (x[:, 0] > 0).astype(float), kind="binary", context_length=20)
    data.x, data.y = data.x.to(dtype), data.y.to(dtype)
    return data


class Losses(Callback):
    def before_fit(self, trainer):
        self.values = []

    def after_step(self, trainer):
        self.values.append(trainer.loss)


def fit(model, dtype=torch.float32, **options):
    losses, optim = Losses(), OptimConfig(lr=3e-3, max_steps=12, global_batch_size=32)
    torch.manual_seed(1)
    trainer = Trainer(model.to(dtype), make_data(dtype), optim, callbacks=[losses], **options).fit()
    weights = torch.cat([p.detach().flatten().cpu() for p in model.parameters()])
    return torch.stack(losses.values), weights, trainer.val_loss


# ---- precision


class Faces:
    "What torch says of a GPU: bfloat16 in hardware, in software, or not at all."

    def __init__(self, native: bool, emulated: bool):
        self.native, self.emulated = native, emulated

    def __call__(self, including_emulation: bool = True) -> bool:
        return self.native or (including_emulation and self.emulated)


@pytest.mark.parametrize(
    ("native", "emulated", "is_sound", "auto", "asked"),
    [
        (True, True, True, "bf16", "bf16"),
        (True, True, False, "fp32", "sound device"),
        (False, True, True, "fp32", "bf16"),
        (False, False, True, "fp32", "no bfloat16"),
    ],
)
def test_auto_is_bf16_on_a_gpu_that_multiplies_it_and_passed_the_probe(
    native, emulated, is_sound, auto, asked, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", Faces(native, emulated))
    gpu = torch.device("cuda")
    assert choose_precision("auto", gpu, is_sound) == auto and choose_precision("fp32", gpu, is_sound) == "fp32"
    if asked == "bf16":
        assert choose_precision("bf16", gpu, is_sound) == "bf16"
    else:
        with pytest.raises(HardwareError, match=asked):
            choose_precision("bf16", gpu, is_sound)


@pytest.mark.parametrize("is_new", [True, False])
def test_mps_is_fp32_unless_asked_and_refuses_where_macos_is_too_old(is_new, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: is_new)
    mps = torch.device("mps")
    assert choose_precision("auto", mps) == "fp32"
    if is_new:
        assert choose_precision("bf16", mps) == "bf16"
    else:
        with pytest.raises(HardwareError, match="no bfloat16"):
            choose_precision("bf16", mps)


def test_bf16_trains_in_bfloat16_and_keeps_its_weights_in_float32():
    seen = []
    model = make_model()
    model.encoder[0].up.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    losses, weights, _ = fit(model, precision="bf16")
    exact, reference, _ = fit(make_model())
    assert set(seen) == {torch.bfloat16} and weights.dtype == torch.float32
    assert not torch.equal(weights, reference) and torch.allclose(losses, exact, atol=0.05)


# ---- activation checkpointing


@pytest.mark.parametrize(("dtype", "dropout"), [(torch.float64, 0.0), (torch.float32, 0.3)], ids=str)
@pytest.mark.parametrize("micro_batch_size", [None, 12])
def test_activation_checkpointing_changes_no_bit(dtype, dropout, micro_batch_size):
    "Neither of the arithmetic nor of the draws of dropout, in the model and in the run."
    options = {"dropout": dropout, "head_dropout": dropout}
    plain, twice = make_model(**options), make_model(**options)
    checkpoint_layers(twice)
    a, b = (fit(m, dtype, micro_batch_size=micro_batch_size) for m in (plain, twice))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and a[2] == b[2]


def test_the_draws_of_a_device_whose_generator_torch_does_not_put_back_are_put_back_here(monkeypatch):
    "As on MPS: with torch's own handling off and without ours the gradients are of other draws, with ours they are not."

    def gradients(run_block) -> torch.Tensor:
        model = make_model(dropout=0.5)
        model.run_block = run_block
        torch.manual_seed(3)
        model(X).sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    off = {"use_reentrant": False, "preserve_rng_state": False}
    want = gradients(torch.nn.Module.__call__)
    assert not torch.equal(gradients(partial(compute.checkpoint, **off)), want)
    assert torch.equal(gradients(partial(compute.checkpoint, **off, context_fn=partial(same_draws, CPU))), want)


def test_checkpointed_layers_are_plain_where_no_gradient_is_asked_for(monkeypatch):
    model = make_model()
    checkpoint_layers(model)
    monkeypatch.setattr(compute, "checkpoint", lambda *_, **__: 1 / 0)
    with torch.no_grad():
        model.train()(X)
    model.eval()(X).sum().backward()
    with pytest.raises(ZeroDivisionError):
        model.train()(X)


def test_batchnorm_refuses_activation_checkpointing():
    with pytest.raises(InputError, match="must not meet BatchNorm"):
        set_up(make_model(norm="batchnorm"), ComputeConfig(is_checkpointed=True), X, CPU)


PEAK = """
import torch
from finpatch.device import peak_mem_gib
from finpatch.compute import checkpoint_layers
from finpatch.patchtst import PatchTST, PatchTSTConfig
size = {"d_model": 64, "n_heads": 4, "n_layers": 16, "d_ff": 256, "dropout": 0.1}
model = PatchTST(PatchTSTConfig(n_features=20, context_length=60, **size))
plain, x = model.run_block, torch.randn(192, 60, 20)
model(x[:2]).sum().backward()
peaks = [peak_mem_gib()]
checkpoint_layers(model)
for run_block in (model.run_block, plain):
    model.run_block = run_block
    model(x).sum().backward()
    peaks.append(peak_mem_gib())
print(peaks[1] - peaks[0], peaks[2] - peaks[0])
"""


def test_activation_checkpointing_saves_memory_that_can_be_measured():
    "Peak resident memory of one process that takes a step with it, then one without."
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True, env=environment)
    less, more = map(float, done.stdout.split())
    assert less < 0.6 * more, (less, more)


# ---- compilation


def no_compiler(graph, inputs):
    raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found in\n(None, 'g++')")


def wrong_code(graph, inputs):
    return lambda *args: [y * 1.5 if y.ndim == 2 and y.shape[1] == 1 else y for y in graph(*args)]


@pytest.mark.parametrize(
    ("backend", "reason"), [(no_compiler, "No working C++ compiler"), (wrong_code, "must compute the same")]
)
def test_without_a_compiler_or_with_a_wrong_one_the_model_runs_uncompiled_and_says_so(backend, reason, caplog):
    model = make_model(dropout=0.3)
    with caplog.at_level(logging.WARNING, "finpatch"):
        effective = set_up(model, ComputeConfig(is_compiled=True), X, CPU, backend=backend)
    assert effective["is_compiled"] is False
    assert [r.getMessage().count(reason) for r in caplog.records] == [1] and "\n" not in caplog.text.rstrip("\n")
    a, b = fit(model), fit(make_model(dropout=0.3))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_a_compiled_model_trains_and_the_trial_leaves_no_trace():
    "With torch's own `eager` back end, which needs no compiler and takes no other arithmetic."
    calls = []

    def spy(graph, inputs):
        calls.append(graph)
        return graph.forward

    model = make_model(dropout=0.3)
    keys, state = list(model.state_dict()), torch.get_rng_state()
    assert compile_model(model, X, "fp32", backend=spy) and len(calls) >= 2  # both modes
    assert torch.equal(torch.get_rng_state(), state) and list(model.state_dict()) == keys
    plain = make_model(dropout=0.3, fused=False)  # a compiled model draws as torch does, not in bulk
    a, b = fit(model), fit(plain)
    assert torch.allclose(a[0], b[0], rtol=1e-4) and a[2] == pytest.approx(b[2], rel=1e-4)
    is_noise = torch.cat([torch.full((p.numel(),), name.endswith("qkv.bias")) for name, p in plain.named_parameters()])
    assert torch.allclose(a[1][~is_noise], b[1][~is_noise], rtol=1e-3, atol=1e-5)  # keys' biases have no gradient but noise


# ---- no waiting


class NoSync(Callback):
    "Make torch raise where the host waits for the device, from the second step of an epoch to its last."

    order = 1

    def before_step(self, trainer):
        if trainer.epoch_step == 1:
            torch.cuda.set_sync_debug_mode("error")

    def after_step(self, trainer):
        if trainer.epoch_step == trainer.steps_per_epoch - 1:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_no_step_waits_for_the_device(is_checkpointed):
    model, data = make_model(dropout=0.1), make_data()
    set_up(model, ComputeConfig(is_checkpointed=is_checkpointed), X, torch.device("cuda"))
    optim = OptimConfig(lr=3e-3, epochs=1, global_batch_size=32)
    try:
        Trainer(model, data, optim, device="cuda", micro_batch_size=12, callbacks=[NoSync()]).fit()
    finally:
        torch.cuda.set_sync_debug_mode("default")
