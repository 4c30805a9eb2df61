"""Risk: a fast path that computes something else than the plain one, or whose random numbers are no dropout or cannot be had again."""

from dataclasses import replace

import pytest
import torch

from finpatch.compute import checkpoint_layers
from finpatch.fast import attention, draw_kept, drop
from finpatch.patchtst import PatchTST, PatchTSTConfig, attend

SIZE = {"n_features": 3, "context_length": 60, "patch_length": 6, "stride": 3, "n_layers": 2}
SMALL_HEADS = PatchTSTConfig(**SIZE, d_model=32, n_heads=8, d_ff=64, dropout=0.0)
SHAPES = {
    "small heads": SMALL_HEADS,
    "large heads": replace(SMALL_HEADS, d_model=64, n_heads=2),
    "short rows": replace(SMALL_HEADS, d_model=64, n_heads=2, patch_length=10, stride=5),
    "post batchnorm": replace(SMALL_HEADS, norm="batchnorm", norm_position="post", channel_mode="independent"),
    "head": replace(SMALL_HEADS, head_dropout=0.0, horizon=4, channel_mode="independent", revin=True),
}
X = torch.randn(64, 60, 3, generator=torch.Generator().manual_seed(0))


def computed(config: PatchTSTConfig, fused: bool) -> list[torch.Tensor]:
    "Output and gradients of a model in training mode."
    torch.manual_seed(0)
    model = PatchTST(config, fused)
    y = model(X)
    (y - 1).square().mean().backward()  # away from 0, where the gradient of the head is a sum that cancels
    return [y.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_fast_model_computes_what_the_plain_one_computes(shape):
    for fast, plain in zip(computed(SHAPES[shape], True), computed(SHAPES[shape], False), strict=True):
        assert torch.allclose(fast, plain, rtol=1e-5, atol=1e-5 * plain.abs().max())


@pytest.mark.parametrize("n_patches", [11, 19])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_attention_is_the_plain_one(dtype, n_patches):
    q, k, v = torch.randn(3, 4, 3, n_patches, 8, generator=torch.Generator().manual_seed(1)).to(dtype).unbind()
    close = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float64: 1e-12}[dtype]
    assert torch.allclose(attention(q, k, v), attend(q, k, v, fused=False), rtol=close, atol=close)


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.2, 0.5, 0.9])
def test_the_share_that_is_dropped_is_the_rate_and_the_mean_stays(rate):
    torch.manual_seed(0)
    n = 2_000_003
    y = drop(torch.ones(n), rate)
    gone, error = (y == 0).double().mean().item(), (rate * (1 - rate) / n) ** 0.5
    assert abs(gone - rate) < 5 * error + 2**-17
    assert y.unique().tolist() == pytest.approx([0, 1 / (1 - rate)], rel=1e-3)
    assert abs(y.double().mean().item() - 1) < 5 * error / (1 - rate)


def test_numbers_are_dropped_independently_of_their_neighbours_and_of_other_calls():
    torch.manual_seed(0)
    first, second = (draw_kept(torch.empty(1_000_000), 0.3)[0] - 0.7 for _ in range(2))
    pairs = [first[lag:] * first[:-lag] for lag in (1, 2, 3, 4, 8, 64, 704)] + [first * second]
    bound = 5 * 0.21 / 1_000_000**0.5  # five standard errors of a mean of products
    assert max(abs(pair.double().mean().item()) for pair in pairs) < bound


def test_attention_drops_weights_at_the_rate_and_scales_up_the_rest():
    torch.manual_seed(0)
    q = k = torch.zeros(64, 4, 50, 8)  # every weight is 1/50
    v = torch.eye(50)[:, :50].expand(64, 4, 50, 50)[..., :8].contiguous()
    y = attention(q, k, v, 0.2)
    assert abs((y == 0).double().mean().item() - 0.2) < 0.005 and y.max().item() == pytest.approx(1 / 50 / 0.8, rel=1e-4)


def test_every_step_draws_anew_and_a_seed_gives_the_same_bits():
    x = torch.ones(10_000)
    torch.manual_seed(5)
    a, b = drop(x, 0.3), drop(x, 0.3)
    torch.manual_seed(5)
    assert not torch.equal(a, b) and torch.equal(drop(x, 0.3), a) and torch.equal(drop(x, 0.3), b)
    state = torch.get_rng_state()
    c = drop(x, 0.3)
    torch.set_rng_state(state)
    assert torch.equal(drop(x, 0.3), c)


def test_a_layer_that_is_computed_twice_drops_the_same_again():
    "At sizes that take the fast path everywhere; the gradient is that of the forward pass that gave the loss."
    grads = []
    for is_checkpointed in (False, True):
        torch.manual_seed(0)
        model = PatchTST(replace(SMALL_HEADS, dropout=0.3, head_dropout=0.3))
        if is_checkpointed:
            checkpoint_layers(model)
        torch.manual_seed(1)
        model(X).sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.equal(*grads)


def test_what_is_plain_takes_no_fast_path(monkeypatch):
    monkeypatch.setattr("finpatch.fast.draw_kept", lambda *_: 1 / 0)
    config = replace(SMALL_HEADS, dropout=0.3, head_dropout=0.3)
    PatchTST(config, fused=False)(X).sum().backward()
    with pytest.raises(ZeroDivisionError):
        PatchTST(config)(X)
