"""Risk: an encoder that trains but is not PatchTST. One set of weights must give the reference's numbers."""

from itertools import product

import pytest
import torch

from finpatch.hf import from_hf
from finpatch.patchtst import PatchTST

transformers = pytest.importorskip("transformers", reason="the reference is a development dependency")

VARIANTS = list(
    product(("batchnorm", "layernorm"), (True, False), ("sincos", "random"), ("std", None), (40, 42), (16, 128))
)


def make_reference(norm, is_pre, positions, scaling, context_length, d_model):
    "A random reference in float64, three layers, with BatchNorm statistics that are not those of a fresh layer."
    torch.manual_seed(0)
    config = transformers.PatchTSTConfig(
        num_input_channels=3, context_length=context_length, patch_length=8, patch_stride=4, num_hidden_layers=3,
        d_model=d_model, num_attention_heads=4 if d_model == 16 else 16, ffn_dim=2 * d_model, norm_type=norm,
        pre_norm=is_pre, positional_encoding_type=positions, scaling=scaling,
    )  # fmt: skip
    reference = transformers.PatchTSTModel(config).double()
    with torch.no_grad():
        for name, value in reference.state_dict().items():
            if name.endswith("running_var"):
                value.uniform_(0.5, 2)
            elif value.is_floating_point() and "position_enc" not in name:
                value.add_(torch.randn_like(value) * (0.2 if value.ndim == 1 else 0.5 * value.shape[1] ** -0.5))
    return reference


def largest_error(reference, model, x):
    "Largest difference, and largest output of the reference."
    with torch.no_grad():
        want, got = reference(x).last_hidden_state, model.encode(x)
    assert got.shape == want.shape
    return (got - want).abs().max().item(), want.abs().max().item()


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(str(part) for part in v))
def test_encoder_equals_the_reference(variant):
    reference = make_reference(*variant)
    x = torch.randn(4, variant[4], 3, dtype=torch.float64) * 3 + 1
    for dtype, training in product((torch.float64, torch.float32), (False, True)):
        reference.to(dtype).train(training)
        model = from_hf(reference)
        assert model.training == training
        error, largest = largest_error(reference, model, x.to(dtype))
        assert error <= (1e-9 if dtype == torch.float64 else 1e-5 * largest)
        mine, theirs = ([v for n, v in m.state_dict().items() if "running" in n] for m in (model, reference))
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(mine, theirs, strict=True))


def test_the_comparison_can_fail():
    reference = make_reference("layernorm", True, "sincos", "std", 42, 16).eval()
    model = from_hf(reference)
    x = torch.randn(4, 42, 3, dtype=torch.float64)
    with torch.no_grad():
        model.encoder[1].norm2.bias[3] += 1e-6
    assert largest_error(reference, model, x)[0] > 1e-9


def test_a_model_with_a_head_gives_its_encoder_and_own_sines_match():
    config = transformers.PatchTSTConfig(
        num_input_channels=3, context_length=42, patch_length=8, patch_stride=4, d_model=16
    )
    reference = transformers.PatchTSTForPrediction(config).eval()
    model = from_hf(reference)
    error, largest = largest_error(reference.model, model, torch.randn(4, 42, 3))
    assert error <= 1e-5 * largest
    assert torch.allclose(PatchTST(model.config).positions, model.positions, atol=1e-6)
