"""G8. Risk: a training step uses an operation or a dtype that an Apple GPU lacks, and a machine without one never shows it.

This proves coverage, that every operation has a kernel; not values, which `finpatch doctor` checks on a Mac."""

from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from finpatch.budget import load_patchtst_config
from finpatch.compute import checkpoint_layers
from finpatch.core import HardwareError
from finpatch.dataset import from_arrays
from finpatch.experiment import OptimConfig, load_experiment_config
from finpatch.features import feature_names
from finpatch.mps_coverage import Coverage, check_mps_request, kernel_for
from finpatch.patchtst import PatchTST, PatchTSTConfig
from finpatch.targets import Task
from finpatch.trainer import Callback, Trainer

SHIPPED = sorted(Path(p.name).stem for p in (files("finpatch") / "configs" / "experiment").iterdir())
OPTIM = OptimConfig(lr=1e-3, epochs=1, max_steps=1, global_batch_size=4)
LOSS = {"binary": "binary_cross_entropy_with_logits", "real": "pow.Tensor_Scalar"}
STEP = {"addmm", "bmm", "_softmax", "_softmax_backward_data", "gelu_backward", "linalg_vector_norm", "_fused_adamw_"}


class CoverStep(Callback):
    "Record what lies between `before_step` and `after_step`: batch, forward, loss, backward, clipping, AdamW."

    order = 99

    def __init__(self, coverage: Coverage):
        self.coverage = coverage

    def before_step(self, trainer):
        self.coverage.__enter__()

    def after_step(self, trainer):
        self.coverage.__exit__(None, None, None)


def small(**options) -> PatchTSTConfig:
    return PatchTSTConfig(
        n_features=3, context_length=33, stride=7, d_model=16, n_heads=2, n_layers=2, d_ff=32, **options
    )


def cover(
    model_config: PatchTSTConfig, kind: str = "binary", optim: OptimConfig = OPTIM, model=None, precision="fp32"
) -> Coverage:
    "Take one step with the real trainer and predict once."
    rng, n = np.random.default_rng(0), model_config.context_length + 60
    x, y = rng.standard_normal((n, model_config.n_features)), rng.integers(0, 2, n)
    dataset = from_arrays(x, y, kind=kind, context_length=model_config.context_length, is_checked=False)
    model, coverage = model or PatchTST(model_config, fused=False), Coverage()
    Trainer(model, dataset, optim, callbacks=[CoverStep(coverage)], precision=precision).fit()
    with coverage, torch.no_grad():
        model.eval()(dataset.batch(dataset.index["val"][:2])[0])
    return coverage


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_experiment_has_kernels_for_a_whole_step(name, precision):
    config = load_experiment_config(name)
    shape = {"n_features": len(feature_names(config.tier)), "context_length": config.context_length}
    optim = replace(config.optim, epochs=1, max_steps=1, global_batch_size=4)
    kind = Task(config.task, horizon=config.horizon).kind
    coverage = cover(load_patchtst_config("20k", **shape, **config.model.architecture), kind, optim, precision=precision)
    assert coverage.findings == []
    assert STEP | {"bernoulli_.float", "index.Tensor"} <= set(coverage.ops)  # recorded, not skipped
    assert LOSS[kind] in coverage.ops
    assert not {op for op in coverage.ops if "scaled_dot_product" in op}


def test_a_preset_has_kernels_for_a_whole_step():
    coverage = cover(load_patchtst_config("2m"))
    assert coverage.findings == [] and set(coverage.ops) >= STEP


OPTIONS = {
    "independent": ({"channel_mode": "independent"}, "clone"),
    "revin": ({"revin": True, "revin_affine": True}, "var.correction"),
    "end_padding": ({"end_padding": True}, "cat"),
    "batchnorm": ({"norm": "batchnorm", "norm_position": "post"}, "native_batch_norm_backward"),
    "sincos": ({"positions": "sincos", "final_norm": False}, "add.Tensor"),
    "head_dropout": ({"head_dropout": 0.2, "dropout": 0.0}, "bernoulli_.float"),
    "all": ({"channel_mode": "independent", "norm": "batchnorm", "revin": True}, "native_batch_norm"),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_of_the_model_has_kernels(name):
    options, op = OPTIONS[name]
    coverage = cover(small(**options))
    assert coverage.findings == [] and STEP | {op} <= set(coverage.ops)


def test_a_forecast_has_kernels():
    model, coverage = PatchTST(small(horizon=4, revin=True, channel_mode="independent"), fused=False), Coverage()
    with coverage:
        F.mse_loss(model(torch.randn(4, 33, 3)), torch.zeros(4, 4, 3)).backward()
    assert coverage.findings == []


def test_bfloat16_and_activation_checkpointing_have_kernels():
    model = PatchTST(small(), fused=False)
    checkpoint_layers(model)
    coverage = cover(small(), model=model, precision="bf16")
    assert coverage.findings == [] and torch.bfloat16 in coverage.ops["addmm"]


class Spoiled(PatchTST):
    "A model that needs what MPS lacks."

    def __init__(self, spoil):
        super().__init__(small(), fused=False)
        self.spoil = spoil

    def forward(self, x):
        return super().forward(x) + self.spoil(x)


NEGATIVES = {
    "eig": (lambda x: torch.linalg.eig(x[0, :3]).eigenvalues.real.sum(), ("linalg_eig", "no_kernel")),
    "complex": (lambda x: torch.fft.rfft(x).abs().mean(), ("_fft_r2c", "complex")),
    "double": (lambda x: x.double().mean().float(), ("mean.dim", "float64")),
    "heaviside": (lambda x: torch.heaviside(x, x).mean(), ("heaviside", "no_kernel")),
    "new double": (lambda x: torch.ones(2, dtype=torch.float64, device=x.device).mean().float(), ("ones", "float64")),
}


@pytest.mark.parametrize("name", NEGATIVES)
def test_what_mps_lacks_is_found_inside_a_training_step(name):
    spoil, (op, problem) = NEGATIVES[name]
    findings = cover(small(), model=Spoiled(spoil)).findings
    assert {"op": op, "problem": problem} in findings


def test_the_parts_of_a_composite_operation_are_judged_too():
    with Coverage() as coverage:
        torch._foreach_norm([torch.ones(3)])
    assert kernel_for("_foreach_norm.Scalar") == "CompositeExplicitAutograd" and "linalg_vector_norm" in coverage.ops


def test_an_optimiser_in_float64_is_found():
    model, coverage = torch.nn.Linear(2, 1).double(), Coverage()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.ones(1, 2, dtype=torch.float64)).sum().backward()
    with coverage:
        optimizer.step()
    assert {"op": "_fused_adamw_", "problem": "float64"} in coverage.findings


def test_the_table_knows_the_fused_optimiser_and_the_kernels_that_only_mps_has():
    ops = ("_fused_adamw_", "linear", "linear_backward", "native_batch_norm_backward", "unfold_backward")
    assert [kernel_for(op) for op in ops] == ["MPS"] * 5
    assert [kernel_for(op) for op in ("linalg_eig", "heaviside", "geqrf", "nothing")] == [None] * 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.complex128])
def test_a_dtype_that_mps_lacks_is_refused(dtype):
    with pytest.raises(HardwareError, match=r"MPS computes in float32, float16 or bfloat16; got (float64|complex)"):
        check_mps_request(dtype)


def test_several_ranks_on_mps_are_refused():
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        check_mps_request(dtype, 1)
    with pytest.raises(HardwareError, match=r"neither DDP nor FSDP for it; got 2 ranks\. Start one process"):
        check_mps_request(torch.float32, 2)


def test_the_refusal_agrees_with_a_mac(device):
    if device.type != "mps":
        pytest.skip("float64 is refused by MPS only")
    with pytest.raises(TypeError, match="float64"):
        torch.ones(1, dtype=torch.float64, device=device)
