"""A training step at the paper's shapes beside the PatchTST of Hugging Face and of neuralforecast.

Seven series, 336 steps in, 96 out, patches of 16 every 8; 32 windows, which are 224 series. Each peer is built as it
recommends (fused attention for Hugging Face; residual attention for neuralforecast) with the sizes of the paper, and twice: with
the paper's dropout, 0.2, in every place that has a rate, and with the dropout that the peer has by itself, so that no row rests
on how dropout is drawn. That is none for Hugging Face, and 0.2 outside of attention for neuralforecast, where this project's
model drops attention weights as well, having one rate for all. This project's model is the peer's own variant: where norms lie, padding, fixed or
learned positions. Beside Hugging Face it begins with the peer's own weights; neuralforecast's lie in another order, so there each
begins with its own. Both then take the same batches with the same optimiser. Whether the faster one also learns the same is
asked by 200 steps on a series of waves and noise, and the loss of both on windows that neither has seen.
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


def hugging_face(d_model: int, n_heads: int, d_ff: int, rate: float | None) -> tuple[nn.Module, Callable, PatchTSTConfig]:
    "Return the peer, its loss of (x, y), and the config of the same model here."
    import transformers

    transformers.logging.set_verbosity_error()
    names = ("attention_dropout", "positional_dropout", "path_dropout", "ff_dropout")
    rates = {} if rate is None else dict.fromkeys(names, rate)
    shape = {"num_input_channels": C, "context_length": T, "patch_length": 16, "patch_stride": 8, "prediction_length": H}
    shape |= {"pooling_type": None}  # all patches go into the head, as in the paper; the peer's default is their mean
    size = {"d_model": d_model, "num_attention_heads": n_heads, "num_hidden_layers": 3, "ffn_dim": d_ff}
    config = transformers.PatchTSTConfig(**shape, **size, **rates)
    model = transformers.PatchTSTForPrediction(config)
    return model, lambda x, y: model(past_values=x, future_values=y).loss, replace(config_from_hf(config), horizon=H)


def neural_forecast(d_model: int, n_heads: int, d_ff: int, rate: float | None) -> tuple[nn.Module, Callable, PatchTSTConfig]:
    "Return the peer, its loss of (x, y), and the config of the same model here."
    import logging

    from neuralforecast.losses.pytorch import MSE
    from neuralforecast.models import PatchTST as Peer

    logging.getLogger("lightning_fabric").setLevel(logging.ERROR)
    rates = {} if rate is None else dict.fromkeys(("dropout", "fc_dropout", "attn_dropout"), rate)
    size = {"hidden_size": d_model, "n_heads": n_heads, "linear_hidden_size": d_ff, "encoder_layers": 3}
    model = Peer(h=H, input_size=T, patch_len=16, stride=8, loss=MSE(), max_steps=1, **size, **rates)
    ours = {"n_features": C, "context_length": T, "patch_length": 16, "stride": 8, "horizon": H, "n_layers": 3}
    ours |= {"channel_mode": "independent", "revin": True, "end_padding": True, "norm_position": "post", "final_norm": False}

    def loss(x: Tensor, y: Tensor) -> Tensor:  # this peer takes each series as a window of its own
        flat = [part.transpose(1, 2).reshape(-1, part.shape[1], 1) for part in (x, y)]
        return F.mse_loss(model({"insample_y": flat[0]}), flat[1])

    return model, loss, PatchTSTConfig(d_model=d_model, n_heads=n_heads, d_ff=d_ff, dropout=model.hparams.dropout, **ours)


def begin_alike(ours: PatchTST, theirs: nn.Module) -> None:
    "Give this project's model the weights of Hugging Face's."
    head = {f"head.{name}": value for name, value in theirs.head.projection.state_dict().items()}
    ours.load_state_dict(translate(theirs.model.encoder.state_dict()) | head)


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
        theirs, loss, config = PEERS[peer](**SIZES[size], rate=rate)
        ours = PatchTST(config)
        if peer == "Hugging Face":
            begin_alike(ours, theirs)
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
