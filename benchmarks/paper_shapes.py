"""A training step at the paper's shapes beside the PatchTST of Hugging Face and of neuralforecast.

Seven series, 336 steps in, 96 out, patches of 16 every 8; 32 windows, which are 224 series. Each peer is built as it recommends
(fused attention for Hugging Face; residual attention for neuralforecast), and with what the paper has where the peer's default
is another model: the paper's sizes, for Hugging Face a head that sees every patch instead of their mean, for neuralforecast a
window that is scaled by its mean instead of its last value. Each is built twice: with the paper's dropout, 0.2, in every place
that has a rate, and with the dropout that the peer has by itself, so that no row rests on how dropout is drawn. That is none for
Hugging Face, and 0.2 outside of attention for neuralforecast, where this project's model drops attention weights as well, having
one rate for all. This project's model is the peer's own variant (norms, padding, positions), begins with the peer's weights, and
has to give the peer's forecast before anything is timed; neuralforecast's residual attention is off for that one comparison,
since this model has none. Both then take the same batches with the same optimiser. Whether the faster one also learns the same
is asked by 200 steps on a series of waves and noise, and the loss of both on windows that neither has seen.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from finpatch.hf import config_from_hf, translate
from finpatch.patchtst import PatchTST, PatchTSTConfig

from .turns import median_ratio, not_measured, row, take_turns, tell_ms

C, T, H = 7, 336, 96
SIZES = {"D 16": {"d_model": 16, "n_heads": 4, "d_ff": 128}, "D 128": {"d_model": 128, "n_heads": 16, "d_ff": 256}}
FASTER = {"Hugging Face": (1.5, 2.0), "neuralforecast": (1.8, 2.4)}  # Targets in float32, and in bfloat16
RATES = {"dropout 0.2": 0.2, "the peer's own dropout": None}


def hugging_face(d_model: int, n_heads: int, d_ff: int, rate: float | None) -> tuple[nn.Module, Callable, PatchTST]:
    "Return the peer, its loss of (x, y), and the same model here."
    import transformers

    transformers.logging.set_verbosity_error()
    names = ("attention_dropout", "positional_dropout", "path_dropout", "ff_dropout")
    rates = {} if rate is None else dict.fromkeys(names, rate)
    shape = {"num_input_channels": C, "context_length": T, "patch_length": 16, "patch_stride": 8, "prediction_length": H}
    shape |= {"pooling_type": None}  # all patches go into the head, as in the paper; the peer's default is their mean
    size = {"d_model": d_model, "num_attention_heads": n_heads, "num_hidden_layers": 3, "ffn_dim": d_ff}
    config = transformers.PatchTSTConfig(**shape, **size, **rates)
    model = transformers.PatchTSTForPrediction(config)
    ours = PatchTST(replace(config_from_hf(config), horizon=H))
    head = {f"head.{name}": value for name, value in model.head.projection.state_dict().items()}
    ours.load_state_dict(translate(model.model.encoder.state_dict()) | head)
    check_same(ours, lambda x: model.eval()(past_values=x).prediction_outputs)
    return model, lambda x, y: model(past_values=x, future_values=y).loss, ours


def neural_forecast(d_model: int, n_heads: int, d_ff: int, rate: float | None) -> tuple[nn.Module, Callable, PatchTST]:
    "Return the peer, its loss of (x, y), and the same model here."
    import logging

    from neuralforecast.losses.pytorch import MSE
    from neuralforecast.models import PatchTST as Peer

    logging.getLogger("lightning_fabric").setLevel(logging.ERROR)
    rates = {} if rate is None else dict.fromkeys(("dropout", "fc_dropout", "attn_dropout"), rate)
    size = {"hidden_size": d_model, "n_heads": n_heads, "linear_hidden_size": d_ff, "encoder_layers": 3, "patch_len": 16, "stride": 8}
    build = lambda **more: Peer(h=H, input_size=T, loss=MSE(), max_steps=1, revin_subtract_last=False, **size, **more)
    model, plain = build(**rates), build(attn_dropout=0.0, res_attention=False)
    config = {"n_features": C, "context_length": T, "patch_length": 16, "stride": 8, "horizon": H, "n_layers": 3}
    config |= {"channel_mode": "independent", "revin": True, "end_padding": True, "norm": "batchnorm", "norm_position": "post"}
    config |= {"d_model": d_model, "n_heads": n_heads, "d_ff": d_ff, "dropout": model.hparams.dropout, "final_norm": False}
    ours = PatchTST(PatchTSTConfig(**config))
    ours.load_state_dict(from_neural_forecast(model.model.state_dict(), d_model))
    plain.load_state_dict(model.state_dict())
    check_same(ours, lambda x: by_series(plain.eval(), x))
    return model, lambda x, y: F.mse_loss(by_series(model, x), y), ours


def by_series(model: nn.Module, x: Tensor) -> Tensor:  # (B, T, C) to (B, H, C)
    "Give each series to neuralforecast's model as a window of its own."
    y = model({"insample_y": x.transpose(1, 2).reshape(-1, T, 1)})
    return y.view(-1, C, H).transpose(1, 2)


NAMES = [("self_attn.to_out.0", "attention.out"), ("ff.0", "up"), ("ff.3", "down"), ("norm_attn.1", "norm1"), ("norm_ffn.1", "norm2"),
         ("backbone.encoder.layers", "encoder"), ("backbone.W_P", "patching"), ("backbone.W_pos", "positions"), ("head.linear", "head")]  # fmt: skip


def from_neural_forecast(state: dict[str, Tensor], d_model: int) -> dict[str, Tensor]:
    "Rename the peer's tensors, join queries, keys and values, and let the head read patch by patch."
    ours = {}
    for name, value in state.items():
        for old, new in NAMES:
            name = name.replace(old, new)
        ours[name] = value
    for name in [name for name in ours if ".self_attn.W_Q." in name]:
        ours[name.replace("self_attn.W_Q", "attention.qkv")] = torch.cat([ours.pop(name.replace("W_Q", f"W_{part}")) for part in "QKV"])
    ours["head.weight"] = ours["head.weight"].view(H, d_model, -1).transpose(1, 2).flatten(1)
    return {name: value for name, value in ours.items() if "sdp_attn" not in name}


@torch.no_grad()
def check_same(ours: PatchTST, peer: Callable[[Tensor], Tensor]) -> None:
    "Raise unless both give one forecast of the same windows."
    x, _ = next(waves(4))
    torch.testing.assert_close(ours.eval()(x), peer(x), rtol=1e-4, atol=1e-4)


PEERS = {"Hugging Face": hugging_face, "neuralforecast": neural_forecast}


def waves(n_windows: int) -> Iterator[tuple[Tensor, Tensor]]:
    "Yield batches (B, T, C) and what follows (B, H, C): two waves a series and noise."
    draw = torch.Generator().manual_seed(0)
    t = torch.arange(T + H)[None, :, None]
    while True:
        phase, height = (torch.rand(2, n_windows, 1, C, generator=draw) for _ in range(2))
        clean = sum((1 + h) * torch.sin(2 * torch.pi * (t / period + p)) for h, p, period in zip(height, phase, (24, 60), strict=True))
        both = clean + 0.5 * torch.randn(clean.shape, generator=draw)
        yield both[:, :T], both[:, T:]


def make_step(model: nn.Module, loss: Callable, batches: Iterator, is_bf16: bool = False) -> Callable[[], float]:
    "Return a function that takes a training step on the next batch."
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step() -> None:
        model.train()
        optimizer.zero_grad(set_to_none=True)
        x, y = next(batches)
        with torch.autocast("cpu", torch.bfloat16) if is_bf16 else nullcontext():
            value = loss(x, y)
        value.backward()
        optimizer.step()

    return step


@torch.no_grad()
def test_loss(model: nn.Module, loss: Callable, n_windows: int) -> float:
    "Return the loss on windows that training has not seen."
    model.eval()
    batches = waves(n_windows)
    return sum(float(loss(*next(batches))) for _ in range(8)) / 8


test_loss.__test__ = False


def ways_of(peer: str, size: str, rate: float | None, n_windows: int) -> dict[str, tuple]:  # name → model, loss, step
    "Make the peer and this project's model, each in float32 and in bfloat16, on the same batches."
    torch.manual_seed(0)
    ways = {}
    for precision in ("float32", "bfloat16"):
        theirs, loss, ours = PEERS[peer](**SIZES[size], rate=rate)
        own = lambda x, y, ours=ours: F.mse_loss(ours(x), y)
        for name, model, call in (("peer", theirs, loss), ("finpatch", ours, own)):
            seen = waves(n_windows)
            for _ in range(8):
                next(seen)  # these are the test's
            ways[f"{name} {precision}"] = (model, call, make_step(model, call, seen, precision == "bfloat16"))
    return ways


def rows(n_turns: int = 25, n_windows: int = 32, n_learn: int = 200) -> list[dict]:
    found = []
    for size, peer, (said, rate) in product(SIZES, PEERS, RATES.items()):
        work = f"training step, paper's shapes, {size}, {said}, against {peer}"
        try:
            ways = ways_of(peer, size, rate, n_windows)
        except ImportError as error:
            found.append(not_measured(work, f"≥ {FASTER[peer][0]} ×", error))
            continue
        seconds = take_turns({name: step for name, (_, _, step) in ways.items()}, n_turns)
        n_steps = n_learn if rate is not None else n_turns + 2  # equal losses are asked for at equal dropout
        for _ in range(n_steps - n_turns - 2):
            for _, _, step in ways.values():
                step()
        losses = {name: test_loss(model, loss, n_windows) for name, (model, loss, _) in ways.items()}
        found += speed_rows(work, FASTER[peer], seconds, losses, n_steps)
    return found


def speed_rows(work: str, targets: tuple, seconds: dict, losses: dict, n_learn: int) -> list[dict]:
    "The row of float32 and that of bfloat16, which meets the peer's faster precision."
    best = min(("peer float32", "peer bfloat16"), key=lambda name: sorted(seconds[name])[len(seconds[name]) // 2])
    told = []
    for precision, peer, target in zip(("float32", "bfloat16"), ("peer float32", best), targets, strict=True):
        own = f"finpatch {precision}"
        gap = losses[own] / losses[peer] - 1
        detail = f"{tell_ms({name: seconds[name] for name in (own, peer)})}; loss after {n_learn} steps {losses[own]:.4f} against {losses[peer]:.4f}, {gap * 100:+.1f} %"
        told.append(row(f"{work}, {precision}", f"≥ {target} ×, loss within 1 %", f"{median_ratio(seconds[peer], seconds[own]):.2f} ×", detail))
    return told
