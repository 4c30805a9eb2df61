"""`make calibrate`: train ladders on series whose right answer is known, and write what the verdict says of them.

The larger ladders of each kind, with and without a choice of learning rates, and twenty draws of nothing. The page is made here and committed, so that it can be
read beside the guarantees; `tests/test_known_answers.py` trains one small draw of each kind at every test.
"""

import os
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path

import torch

from finpatch.device import describe_machine
from finpatch.known_answers import OPTIM, RIGHT, known_answer, train_surface, whole_schedule
from finpatch.surface import describe_surface
from finpatch.synthetic import make_series

PAGE = Path(__file__).parent.parent / "nbs" / "right_answers.qmd"
SHAPE = {"patch_length": 5, "stride": 5}
NOTHING = {"kind": "nothing", "n": 6000, "budgets": ("2k", "6k", "20k", "60k"), "n_seeds": 2, **SHAPE}
RATES = (1e-3, 3e-3, 1e-2)
HELPS = {"kind": "helps", "n": 100_000, "budgets": ("2k", "5k", "14k", "37k", "100k"), "n_seeds": 3, "n_pairs": 16, **SHAPE}
TURNS = {"kind": "best_then_worse", "n": 20_000, "budgets": ("2k", "6k", "20k", "90k", "400k"), "n_seeds": 5, "n_pairs": 8, **SHAPE}
LADDERS = [
    HELPS | {"rates": RATES},
    TURNS | {"rates": RATES},
    {"kind": "leak_column", "n": 6000, "budgets": ("2k", "6k", "20k"), "n_seeds": 2, **SHAPE},
]
ONE_RATE = [
    HELPS,
    TURNS,
    TURNS | {"budgets": ("27k", "53k", "104k", "204k", "400k"), "n_seeds": 3},
    {"kind": "helps", "n": 20_000, "budgets": ("2k", "5k", "14k", "37k", "100k"), "n_seeds": 2, "n_pairs": 4, **SHAPE},
    {"kind": "best_then_worse", "n": 20_000, "budgets": ("5k", "12k", "30k", "75k", "190k"), "n_seeds": 2, "n_pairs": 4, **SHAPE},
]
WHOLE = [HELPS | {"optim": whole_schedule(OPTIM, 70_000, 3300)}]  # seven tenths of the sessions are trained on
N_DRAWS = 20
SURFACE = {"budgets": ("5k", "11k", "24k", "50k", "110k"), "amounts": (3000, 6000, 12_000, 25_000, 50_000), "n_seeds": 3, **SHAPE}
SURFACE_DAYS = 71_429  # of which the last 50,000 before validation are the most that is trained on


def row(plan: dict, found: dict) -> str:
    losses = ", ".join(f"{budget}\u00a0{loss:.4f}" for budget, loss in found["loss"].items())
    pairs = [f"{plan['n_pairs']} pairs"] if "n_pairs" in plan else []
    made = ", ".join([f"{found['n']:,} sessions", *pairs, f"{plan['n_seeds']} seeds"])
    mark = "right" if found["is_right"] else "**wrong**"
    cells = (f"{found['kind']}: {made}", losses, f"{found['baseline']:.4f}", f"{found['bayes']:.4f}", f"{found['answer']}, {mark}")
    return f"| {' | '.join(cells)} |"


def draw(plan: dict, seed: int = 0) -> tuple[dict, str]:
    began, found = time.perf_counter(), known_answer(**plan, seed=seed)
    print(text := row(plan, found), f"{time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    return found, text


def draw_all(asked: list[tuple[dict, int]]) -> list[tuple[dict, str]]:
    "Draw side by side, a thread each: models this small gain little from a second one."
    with ProcessPoolExecutor(os.cpu_count(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return list(pool.map(draw, *zip(*asked, strict=True)))


def draw_surface() -> dict:
    "Train every size on every amount of data, side by side."
    series = make_series("helps", SURFACE_DAYS, n_pairs=16)
    with ProcessPoolExecutor(os.cpu_count(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        surface = train_surface(series, each=pool.map, **SURFACE)
    return describe_surface(surface) | {"bayes": series.bayes_loss}


def surface_table(said: dict) -> str:
    "Lay out losses by size and amount; the best size of each amount is bold."
    lines = [f"| sessions of training | {' | '.join(SURFACE['budgets'])} |", f"|---|{'---|' * len(SURFACE['budgets'])}"]
    for amount, losses, best in zip(said["amounts"], said["loss"], said["best_size"], strict=True):
        cells = [f"**{x:.4f}**" if n == best else f"{x:.4f}" for x, n in zip(losses, said["sizes"], strict=True)]
        lines.append(f"| {amount:,.0f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def page(drawn: list[dict], noise: list[str], ladders: list[str], one_rate: list[str], whole: list[str], surface: dict) -> str:
    "Lay out the page."
    machine = describe_machine(torch.device("cpu")) | {"torch": torch.__version__.split("+")[0], "n_threads": 1}
    told = ", ".join(f"{key} {value}" for key, value in machine.items())
    counts = Counter(found["answer"] for found in drawn)
    said = ", ".join(f"{name} {n}" for name, n in counts.most_common())
    wrong = sum(not found["is_right"] for found in drawn)
    head = "| series | test loss by size, nats | best baseline | truth | answer |\n|---|-------|---|---|---|"
    return f"""---
title: "Right answers"
description: "What the verdict says where the truth is known"
---

Series are drawn whose right answer is known, ladders of models are trained on them, and the verdict is asked. Seeds are 0, 1, …
as they come; none was chosen by its outcome, and every draw is shown. Made by `make calibrate` on {datetime.now(UTC):%Y-%m-%d},
{told}.

## Larger ladders

*Helps* hides a signal in products of ten days of four channels, which no linear model sees and which takes parameters to
learn; there are as many pairs of directions as the table says. *Best, then worse* is the same with fewer sessions, so that
the largest size has too little to learn from. *Leak column* plants a column that knows the next return; its answer is the
name of the column. In the first two, each size takes the learning rate, of 0.001, 0.003 and 0.01, that does best on
validation with a seed of its own, as in a study. *Wrong* means that the answer is not the one that the series was made
for.

{head}
{chr(10).join(ladders)}

A series does not decide alone where a ladder turns; the trainer has a say. The first was made for larger sizes to do better
throughout. Up to 37k they do; 100k, trained by the same rule, ended worse than 37k with each of its three seeds, so "best
at 37k" is what these losses say, though not what was asked of the series. Early stopping is what holds it back, as the next
table shows.

## To the end of the schedule

All of the ladders above stop when validation has not improved for four epochs of thirty, long before the learning rate has
come down, and that costs a large size more than a small one. Here every size takes 3,300 steps to the end of its schedule,
with the learning rate 0.003, and the weights with the best validation loss are judged.

{head}
{chr(10).join(whole)}

## The same without a choice of learning rates

All sizes are trained with 0.003. In the third line the ladder begins beyond the best size, which nobody knew before: there
is no turn in it to be found, and the losses only rise. In the last, two seeds are too few to say that the smallest size is
worse than the second.

{head}
{chr(10).join(one_rate)}

## Parameters and data

*Helps* once more, {SURFACE_DAYS:,} sessions with 16 pairs, three seeds: five sizes, each trained on the most recent 3,000 to 50,000 sessions
and judged on the same ones, with 2,400 steps to the end of the schedule and the learning rate 0.003 throughout. Test loss in nats; the truth has
{surface["bayes"]:.4f}. The best size of each row is bold.

{surface_table(surface)}

{surface["sentence"]}

## Where nothing can be known

{len(drawn)} draws of a series without drift or memory in its direction, four sizes and two seeds each. The answers were: {said}.
{wrong} of {len(drawn)} claimed that bigger is better. A ladder of larger models may truly do worse here, since each fits
some noise, so *hurts* is not counted as wrong.

{head}
{chr(10).join(noise)}

The pure verdict is held to its error rates without training, on 2,000 panels of noise and 2,000 with a slope of 2.8 standard
errors, in `tests/test_verdict.py`.
"""


def main() -> None:
    assert set(RIGHT) == {NOTHING["kind"], *(plan["kind"] for plan in LADDERS)}
    surface = draw_surface()
    noise = [(NOTHING, seed) for seed in range(N_DRAWS)]
    done = iter(draw_all([(plan, 0) for plan in LADDERS + ONE_RATE + WHOLE] + noise))
    ladders, one_rate, whole = ([text for _, text in islice(done, len(plans))] for plans in (LADDERS, ONE_RATE, WHOLE))
    drawn, noise = zip(*done, strict=True)
    PAGE.write_text(page(drawn, noise, ladders, one_rate, whole, surface), encoding="utf-8")


if __name__ == "__main__":
    main()
