"""G5. Risk: an option that does nothing, dropout left on, a parameter without effect, a wrong input that passes."""

from dataclasses import fields, replace
from itertools import product

import pytest
import torch
from torch.nn import functional as F

from finpatch.budget import load_patchtst_config
from finpatch.model_config import FIELDS, PatchTSTConfig
from finpatch.patchtst import PatchTST

TINY = PatchTSTConfig(
    n_features=3, context_length=13, patch_length=4, stride=2, d_model=16, n_heads=4, n_layers=2, d_ff=24, dropout=0.0
)
NORMS = list(product(("layernorm", "batchnorm"), ("pre", "post")))
SHAPES = [
    {}, {"channel_mode": "independent"}, {"horizon": 3}, {"horizon": 3, "channel_mode": "independent"},
    {"revin": True, "revin_affine": True}, {"revin": True, "revin_affine": True, "horizon": 3},
    {"end_padding": True}, {"n_outputs": 2, "final_norm": False}, {"positions": "sincos"},
]  # fmt: skip


def build(**options):
    "A model in eval mode whose norms, biases and statistics are not the trivial ones of a fresh layer."
    torch.manual_seed(0)
    model = PatchTST(replace(TINY, **options)).eval()
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.ndim == 1 and name != "head.bias":
                value.add_(torch.rand_like(value) * 0.3)
    return model


def windows(n=6, seed=1):
    return torch.randn(n, 13, 3, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("norm", NORMS, ids="-".join)
def test_every_parameter_moves_the_output(shape, norm):
    model, x = build(norm=norm[0], norm_position=norm[1], **shape), windows()
    torch.manual_seed(2)
    with torch.no_grad():
        before = model(x)
        for name, p in model.named_parameters():
            for rows in p.chunk(3) if ".qkv." in name else [p]:
                is_key_bias = name.endswith("qkv.bias") and rows.storage_offset() == TINY.d_model
                old = rows.clone()
                rows += torch.randn_like(rows) * 0.3
                change = (model(x) - before).abs().max()
                rows.copy_(old)
                assert (change < 1e-6) if is_key_bias else (change > 1e-5), name


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("norm", NORMS, ids="-".join)
def test_fused_and_plain_attention_agree_in_value_and_gradient(shape, norm):
    model = build(norm=norm[0], norm_position=norm[1], **shape).train()
    plain = PatchTST(model.config, fused=False)
    plain.load_state_dict(model.state_dict())
    x = windows()
    fused_y, plain_y = model(x), plain(x)
    assert torch.allclose(fused_y, plain_y, atol=1e-5)
    for y in (fused_y, plain_y):
        y.square().sum().backward()
    for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-4), name
        assert a.grad.abs().max() > 0, name


CHANGES = {
    "n_features": 4, "context_length": 14, "patch_length": 5, "stride": 3, "d_model": 20, "n_heads": 2, "n_layers": 3,
    "d_ff": 32, "dropout": 0.5, "head_dropout": 0.5, "channel_mode": "independent", "revin": True, "revin_affine": True,
    "end_padding": True, "norm": "batchnorm", "norm_position": "post", "final_norm": False, "positions": "sincos",
    "n_outputs": 2, "horizon": 3,
}  # fmt: skip


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_changes_the_model(field):
    base = replace(TINY, revin=field == "revin_affine")
    changed = replace(base, **{field: CHANGES[field]})
    outputs, keys = [], []
    for config in (base, changed):
        torch.manual_seed(0)
        model = PatchTST(config).train()
        outputs.append(model(torch.randn(6, config.context_length, config.n_features)))
        keys.append({name: p.shape for name, p in model.named_parameters()})
    is_same = keys[0] == keys[1] and outputs[0].shape == outputs[1].shape and torch.equal(*outputs)
    assert not is_same


def test_the_list_of_changes_is_complete():
    assert set(CHANGES) == {field.name for field in fields(PatchTSTConfig)}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("rate", ["dropout", "head_dropout"])
def test_dropout_acts_in_training_only(rate, fused):
    torch.manual_seed(0)
    model, quiet, x = PatchTST(replace(TINY, **{rate: 0.5}), fused), PatchTST(TINY, fused).eval(), windows()
    quiet.load_state_dict(model.state_dict())
    assert not torch.equal(model(x), model(x))
    assert torch.equal(model.eval()(x), quiet(x))


@pytest.mark.parametrize("fused", [True, False])
def test_dropout_within_a_layer_acts_in_training_only(fused):
    block, rows = PatchTST(replace(TINY, dropout=0.5), fused).encoder[0], torch.randn(10, 16)
    attention = block.attention
    assert not torch.equal(block.feed_forward(rows), block.feed_forward(rows))
    assert not torch.equal(attention(rows), attention(rows))
    attention.eval()
    want = attention.weights(rows) @ attention.heads(rows)[2]
    assert torch.allclose(attention(rows), attention.out(want.transpose(1, 2).reshape(10, 16)), atol=1e-6)


@pytest.mark.parametrize("mode", ["mixed", "independent"])
@pytest.mark.parametrize("norm", NORMS, ids="-".join)
def test_layer_outputs_follow_from_the_attention_maps(mode, norm):
    model, x = build(norm=norm[0], norm_position=norm[1], channel_mode=mode, revin=True), windows()
    seen = []
    handles = [
        block.register_forward_hook(lambda block, inputs, out: seen.append((inputs[0], out))) for block in model.encoder
    ]
    model(x)
    for handle in handles:
        handle.remove()
    maps = model.train().attention_maps(x)
    assert model.encoder[1].norm1.training
    assert maps.shape == (2, 6 * model.config.n_channels, 4, 5, 5)
    assert torch.allclose(maps.sum(-1), torch.ones(maps.shape[:-1]), atol=1e-6)
    model.eval()
    for block, weights, (h, out) in zip(model.encoder, maps, seen, strict=True):
        values = block.attention.heads(block.norm1(h) if block.is_pre else h)[2]
        branch = block.attention.out((weights @ values).transpose(1, 2).reshape(h.shape))
        mid = h + branch if block.is_pre else block.norm1(h + branch)
        inner = block.down(F.gelu(block.up(block.norm2(mid) if block.is_pre else mid)))
        again = mid + inner if block.is_pre else block.norm2(mid + inner)
        assert (again - out).abs().max() < 1e-5


def test_attention_maps_leave_the_model_as_it_was():
    model = build(norm="batchnorm").train()
    model.encoder[0].norm1.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.attention_maps(windows())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training and model.encoder[1].training and not model.encoder[0].norm1.training


def test_end_padding_is_the_same_as_repeating_the_last_row():
    padded, x = build(end_padding=True), windows()
    longer = PatchTST(replace(TINY, context_length=13 + 2 - 1)).eval()
    longer.load_state_dict(padded.state_dict())
    rows = torch.cat([x, x[:, -1:], x[:, -1:]], dim=1)[
        :, :14
    ]  # 13 rows padded by 2; patches of 4 every 2 use the first 14
    assert padded.config.n_patches == longer.config.n_patches == 6
    assert torch.equal(padded(x), longer(rows))


def test_without_padding_the_earliest_rows_are_dropped():
    model, x = build(), windows()
    early, late = x.clone(), x.clone()
    early[:, 0], late[:, -1] = 9, 9
    assert torch.equal(model(early), model(x))
    assert not torch.equal(model(late), model(x))


def test_independent_channels_do_not_see_each_other():
    model, x = build(channel_mode="independent", horizon=3, revin=True, revin_affine=True), windows()
    moved = x.clone()
    moved[..., 1] *= -2
    change = (model(moved) - model(x)).abs().amax((0, 1))
    assert change[1] > 1e-3 and change[0] == 0 and change[2] == 0


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (lambda x: x.double(), r"got float64 \(6, 13, 3\)"),
        (lambda x: x.long(), "got int64"),
        (lambda x: x.half(), "got float16"),
        (lambda x: x[:, :12], r"got float32 \(6, 12, 3\)"),
        (lambda x: x[..., :2], r"got float32 \(6, 13, 2\)"),
        (lambda x: x[0], r"got float32 \(13, 3\)"),
        (lambda x: x.transpose(1, 2), r"got float32 \(6, 3, 13\)"),
        (lambda x: x.index_fill(1, torch.tensor([4]), torch.nan), r"got 18 NaN or .* the first at \(0, 4, 0\)"),
        (lambda x: x.index_fill(2, torch.tensor([2]), torch.inf), "got 78 NaN or infinite"),
        (lambda x: x.numpy(), "got ndarray"),
    ],
)
@pytest.mark.parametrize("call", [PatchTST.__call__, PatchTST.encode, PatchTST.attention_maps])
def test_a_wrong_input_is_refused_with_the_expected_shape(spoil, found, call):
    with pytest.raises(ValueError, match=rf"must be float32 of shape \(B, 13, 3\).*{found}"):
        call(build(), spoil(windows()))


def test_a_model_in_another_dtype_expects_that_dtype():
    model, x = build(), windows()
    assert model.double()(x.double()).dtype == torch.float64
    with pytest.raises(ValueError, match="must be float64"):
        model(x)
    assert model.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_autocast_takes_float32_and_stays_close():
    model, x = build(), windows()
    with torch.autocast("cpu", torch.bfloat16):
        half = model(x)
    assert half.dtype == torch.bfloat16
    assert 0 < (half - model(x)).abs().max() < 0.05


@pytest.mark.parametrize("name", ["2m", "20m"])
def test_a_preset_takes_a_step_and_starts_near_its_output_bias(name):
    torch.manual_seed(0)
    model = PatchTST(load_patchtst_config(name))
    model.set_output_bias(-1.2)
    logits = model(torch.randn(32, 60, 20))
    assert logits.shape == (32, 1) and (logits.mean() + 1.2).abs() < 0.1 and logits.std() < 0.25
    loss = F.binary_cross_entropy_with_logits(logits[:, 0], torch.ones(32))
    loss.backward()
    torch.optim.AdamW(model.parameters(), lr=1e-3).step()
    assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in model.parameters())
    with torch.no_grad():
        again = F.binary_cross_entropy_with_logits(model(torch.randn(32, 60, 20))[:, 0], torch.ones(32))
    assert again < loss


def test_weights_are_saved_with_the_fixed_positions_and_a_seed_repeats_them():
    models = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        models.append(PatchTST(replace(TINY, positions="sincos")).state_dict())
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    assert not torch.equal(models[0]["head.weight"], models[2]["head.weight"])
    assert torch.equal(models[0]["positions"], models[2]["positions"])
    PatchTST(replace(TINY, positions="sincos")).load_state_dict(models[0])


@pytest.mark.parametrize(
    "options", [{}, {"norm": "batchnorm", "norm_position": "post", "channel_mode": "independent", "horizon": 2}]
)
def test_a_device_agrees_with_the_cpu(device, options):
    model, x = build(**options), windows()
    want = model(x)
    want.square().sum().backward()
    there = PatchTST(model.config, fused=False).eval()
    there.load_state_dict(model.state_dict())
    there.to(device)(x.to(device)).square().sum().backward()
    assert torch.allclose(there(x.to(device)).cpu(), want, atol=1e-4)
    for (name, a), b in zip(model.named_parameters(), there.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad.cpu(), atol=1e-3, rtol=1e-3), name
