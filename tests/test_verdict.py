"""G6, the verdict. The risk: a ladder of sizes in which nothing happens is read as a finding, or a finding is missed.

The notebooks show each verdict on one ladder. Here are the rates over thousands, the properties that must hold for all
losses, and what must be refused. Every rate comes from seed 0.
"""

import json
import math
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finpatch.core import InputError, to_json
from finpatch.exponent import fit_exponent
from finpatch.scaling import comparisons, verdict

X = np.array([4.0, 4.5, 5.0, 5.5, 6.0])
SIZES, SEEDS = 10**X, 3
MIXED = (0.05, 0.05, 0.004)  # standard deviations: day × size, day × size × seed, a seed's own offset
QUARREL = (0.0, 0.05, 0.0)  # seeds disagree from day to day, in no direction, as models that found nothing do
FEW = settings(max_examples=25, deadline=None, derandomize=True)


def overlapping(rng, shape, n, h):
    "Noise with the dependence of labels that span h sessions, standard deviation 1."
    shocks = np.cumsum(rng.standard_normal((*shape, n + h)), axis=-1)
    return (shocks[..., h:] - shocks[..., :-h]) / math.sqrt(h)


def null_losses(rng, n, h, world=MIXED):
    "Losses (sizes, seeds, sessions) in which size does nothing."
    k, (by_size, by_seed, luck) = len(SIZES), world
    days = 0.69 + 0.1 * overlapping(rng, (1, 1), n, h) + by_size * overlapping(rng, (k, 1), n, h)
    return days + by_seed * overlapping(rng, (k, SEEDS), n, h) + luck * rng.standard_normal((k, SEEDS, 1))


def true_se(n, h, world=MIXED):
    "The standard error of the slope that `null_losses` has."
    w, (by_size, by_seed, luck) = (X - X.mean()) / ((X - X.mean()) ** 2).sum(), world
    return math.sqrt((w**2).sum() * ((by_size**2 + by_seed**2 / SEEDS) * h / n + luck**2 / SEEDS))


def names(n_panels, n, h, world=MIXED, slope=0.0):
    rng = np.random.default_rng(0)
    tilt = slope * (X - X.mean())[:, None, None]
    return [verdict(null_losses(rng, n, h, world) + tilt, SIZES, horizon=h)["verdict"] for _ in range(n_panels)]


@pytest.mark.parametrize(("n_panels", "n", "h"), [(2000, 500, 1), (5000, 750, 5)])
def test_nothing_is_read_as_a_finding_as_often_as_it_should(n_panels, n, h):
    "At a true rate of 2.3 % one set of 2,000 panels in twenty falls out of the band by chance; hence 5,000 at h = 5."
    found = names(n_panels, n, h)
    for name in ("helps", "hurts"):
        assert 0.0165 <= found.count(name) / n_panels <= 0.0345, (name, found.count(name))
    assert found.count("best_at") <= 0.01 * n_panels


def test_days_are_not_counted_twice_where_seeds_only_disagree():
    "The true rate is 1.8 % here, a little careful; counting the days again as seeds would make it 0.4 %."
    found = names(2000, 500, 1, QUARREL)
    for name in ("helps", "hurts"):
        assert 0.01 <= found.count(name) / 2000 <= 0.0345, (name, found.count(name))


@pytest.mark.parametrize(("n", "h"), [(500, 1), (750, 5)])
def test_a_slope_of_2_8_standard_errors_is_mostly_found(n, h):
    found = names(600, n, h, slope=-2.8 * true_se(n, h))
    assert 0.70 <= (found.count("helps") + found.count("less_bad")) / 600 <= 0.84
    assert found.count("hurts") == 0


def ladder(curve, seed=0, n=600, noise=0.01, luck=0.0005):
    "Losses around a curve whose sizes share most of their days."
    rng, k = np.random.default_rng(seed), len(curve)
    days = 0.2 * rng.standard_normal(n) + noise * rng.standard_normal((k, 1, n))
    own = noise * rng.standard_normal((k, SEEDS, n)) + luck * rng.standard_normal((k, SEEDS, 1))
    return np.asarray(curve)[:, None, None] + days + own


CURVES = {
    "helps": [0.66, 0.65, 0.64, 0.63, 0.62],
    "hurts": [0.62, 0.63, 0.64, 0.65, 0.66],
    "best_at": [0.66, 0.64, 0.63, 0.64, 0.66],
    "no_difference": [0.64] * 5,
    "cannot_tell": [0.63, 0.65, 0.66, 0.65, 0.63],  # no slope, and yet the sizes differ
}


@pytest.mark.parametrize("name", CURVES)
def test_each_shape_is_recognised(name):
    found = verdict(ladder(CURVES[name]), SIZES, delta=0.002)
    assert found["verdict"] == name
    assert found["low"] <= found["beta"] <= found["high"]
    if name == "best_at":
        assert found["best_size"] == SIZES[2]


@pytest.mark.parametrize("seed", range(5))
def test_a_curve_that_levels_off_does_not_turn(seed):
    found = verdict(ladder([0.66, 0.63, 0.62, 0.6199, 0.6199], seed, noise=0.05), SIZES)
    assert found["verdict"] == "helps"


def test_bigger_is_only_less_bad_while_the_baseline_stands():
    losses = ladder(CURVES["helps"])
    assert verdict(losses, SIZES, baseline=losses[-1, 0] + 0.02)["verdict"] == "helps"
    found = verdict(losses, SIZES, baseline=losses[-1, 0] - 0.02)
    assert found["verdict"] == "less_bad" and found["skill"]["high"] < 0
    near = verdict(
        losses, SIZES, baseline=losses[-1].mean(axis=0) + 0.001 * np.random.default_rng(0).standard_normal(600)
    )
    assert near["verdict"] == "less_bad"  # not told apart is not beaten


def test_the_object_has_the_promised_keys_and_is_json():
    found = verdict(ladder(CURVES["helps"]), SIZES, baseline=np.full(600, 0.7))
    promised = {"verdict", "sentence", "beta", "low", "high", "delta", "n_days", "n_trials", "n_test_looks"}
    assert promised <= set(found) and found["n_days"] == 600
    to_json(found)
    assert to_json(verdict(ladder(CURVES["helps"])[:2], SIZES[:2]))  # two sizes have no bend


@FEW
@given(st.integers(0, 10**6), st.sampled_from(sorted(CURVES)), st.floats(-5, 5), st.randoms(use_true_random=False))
def test_what_must_not_matter_does_not(seed, name, shift, random):
    losses = ladder(CURVES[name], seed, luck=0.003)
    found = verdict(losses, SIZES, baseline=losses[0, 0] + 0.01)
    mixed = np.stack([rows[random.sample(range(SEEDS), SEEDS)] for rows in losses])
    order = random.sample(range(5), 5)
    for other, sizes, base in (
        (mixed, SIZES, losses[0, 0] + 0.01),
        (losses[order], SIZES[order], losses[0, 0] + 0.01),
        (losses + shift, SIZES, losses[0, 0] + 0.01 + shift),
        (losses, 1000 * SIZES, losses[0, 0] + 0.01),
        (losses[..., ::-1], SIZES, losses[0, 0, ::-1] + 0.01),
    ):
        again = verdict(other, sizes, baseline=base)
        assert again["verdict"] == found["verdict"]
        assert [again[k] for k in ("beta", "low", "high")] == pytest.approx([found[k] for k in ("beta", "low", "high")])


@FEW
@given(st.integers(0, 10**6), st.floats(-0.01, 0.01))
def test_the_opposite_losses_have_the_opposite_verdict(seed, slope):
    losses = ladder(slope * (X - X.mean()) + 0.64, seed, luck=0.003)
    found, other = verdict(losses, SIZES, delta=0.003), verdict(-losses, SIZES, delta=0.003)
    assert other["beta"] == pytest.approx(-found["beta"])
    assert (other["low"], other["high"]) == pytest.approx((-found["high"], -found["low"]))
    swapped = {"helps": "hurts", "hurts": "helps"}
    if "best_at" not in (found["verdict"], other["verdict"]):  # the opposite of a turn is an arch
        assert other["verdict"] == swapped.get(found["verdict"], found["verdict"])


@FEW
@given(st.integers(0, 10**6), st.floats(0.5, 20))
def test_a_unit_of_loss_is_a_matter_of_taste(seed, factor):
    losses = ladder(CURVES["helps"], seed, luck=0.02)
    found, scaled = verdict(losses, SIZES), verdict(factor * losses, SIZES, delta=factor * 0.001)
    assert scaled["verdict"] == found["verdict"] and scaled["beta"] == pytest.approx(factor * found["beta"])


def test_losses_that_are_the_same_everywhere_are_no_finding():
    same = np.repeat(ladder([0.64])[:1, :1], 5, axis=0).repeat(3, axis=1)
    assert verdict(same, SIZES)["verdict"] == "no_difference"
    assert verdict(np.full((5, 3, 600), 0.64), SIZES)["verdict"] == "no_difference"


GOOD = ladder(CURVES["helps"])
BAD = {
    "one seed": ((GOOD[:, :1], SIZES), {}),
    "one size": ((GOOD[:1], SIZES[:1]), {}),
    "no size": (([], []), {}),
    "no seed axis": ((GOOD[:, 0], SIZES), {}),
    "other sizes": ((GOOD, SIZES[:4]), {}),
    "a size twice": ((GOOD, [1, 2, 2, 3, 4]), {}),
    "a size of 0": ((GOOD, [0, 1, 2, 3, 4]), {}),
    "a size in words": ((GOOD, ["2m", "3m", "4m", "5m", "6m"]), {}),
    "NaN": ((np.where(GOOD > 1.2, np.nan, GOOD), SIZES), {}),
    "infinite": ((np.where(GOOD > 1.2, np.inf, GOOD), SIZES), {}),
    "text": ((GOOD.astype(str)[:, :, :5].tolist()[:1] + [[["a"]]], SIZES[:2]), {}),
    "ragged sessions": (([GOOD[0], GOOD[1][:, 1:]], SIZES[:2]), {}),
    "too few sessions": ((GOOD[..., :99], SIZES), {}),
    "too few for the horizon": ((GOOD, SIZES), {"horizon": 7}),
    "half a horizon": ((GOOD, SIZES), {"horizon": 1.5}),
    "a negative delta": ((GOOD, SIZES), {"delta": -0.001}),
    "no delta": ((GOOD, SIZES), {"delta": float("nan")}),
    "a baseline of other sessions": ((GOOD, SIZES), {"baseline": GOOD[0, 0, 1:]}),
    "a baseline with a hole": ((GOOD, SIZES), {"baseline": np.where(GOOD[0, 0] > 1, np.nan, GOOD[0, 0])}),
}


@pytest.mark.parametrize("case", BAD)
def test_what_no_verdict_can_be_made_of_is_refused(case):
    words, options = BAD[case]
    with pytest.raises(InputError):
        verdict(*words, **options)


def test_the_appendix_finds_nothing_where_there_is_nothing():
    rng, found = np.random.default_rng(0), 0
    for _ in range(200):
        found += (comparisons(null_losses(rng, 300, 1), SIZES)["p_holm"] < 0.05).any()
    assert found <= 20  # at most 5 % of 200, and four standard errors


SIX = np.array([2e3, 6e3, 2e4, 6e4, 2e5, 6e5])
LAW = 0.24 + 9.0 * SIX**-0.45


def test_a_known_exponent_is_recovered():
    found = fit_exponent(ladder(LAW), SIX)
    assert found["refused"] == [] and found["low"] < 0.45 < found["high"] and found["high"] - found["low"] < 0.2
    assert found["irreducible"] == pytest.approx(0.24, abs=0.03)


REFUSED = {
    "four sizes": (LAW[:4], SIX[:4], SEEDS, "five sizes"),
    "two seeds": (LAW, SIX, 2, "three seeds"),
    "no slope": (np.full(6, 0.5), SIX, SEEDS, "must fall"),
    "rising": (LAW[::-1], SIX, SEEDS, "must fall"),
    "on its bound": ([0.6, 0.4, 0.4, 0.4, 0.4, 0.4], SIX, SEEDS, "on its bound"),
    "holds 0": (0.66 - 0.006 * np.log10(SIX), SIX, SEEDS, "holds 0"),
    "misses the largest": ([*LAW[:5], LAW[5] - 0.08], SIX, SEEDS, "misses the largest"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_exponent_is_refused(case):
    curve, sizes, seeds, reason = REFUSED[case]
    found = fit_exponent(ladder(curve, noise=0.02)[:, :seeds], sizes)
    assert any(reason in text for text in found["refused"]), found
    assert found["alpha"] is None and found["low"] is None


def test_no_torch_is_needed():
    code = "import sys; import finpatch.scaling, finpatch.synthetic, finpatch.power; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_power_is_answered_before_there_is_data(tmp_path, capsys):
    from finpatch.cli import main

    where = ["--data-dir", str(tmp_path), "--config", "sp500_direction"]
    assert main(["power", *where, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["n_days"], found["n_spans"], found["counted_on"], found["is_enough"]) == (754, 754, "calendar", False)
    assert "cannot separate budgets" in found["sentence"] and found["pair"] == pytest.approx(0.0061, abs=5e-5)
    assert main(["power", *where, "--budgets", "10k,30k,100k"]) == 0
    assert "budgets 10k, 30k, 100k" in capsys.readouterr().out
    assert main(["power", *where, "--budgets", "10k"]) == 1
    assert "two or more sizes" in capsys.readouterr().err


def test_power_refuses_data_that_was_changed_and_reads_no_test_label(data_dir, tmp_path):
    from finpatch.manifest import load_frame
    from finpatch.power import answer_question, questions_of, test_days

    asked = questions_of("sp500_threshold_1pct")[0]
    frame = load_frame(data_dir, "SP500.dataset.a20")
    moved = frame.copy()
    late = moved.index > pd.Timestamp(asked.spans.val_end)
    moved.loc[late, ["Open", "High", "Low", "Close"]] *= np.exp(np.linspace(0, 3, late.sum()))[:, None]
    assert test_days(asked, {"SP500": moved}) == test_days(asked, {"SP500": frame})
    shutil.copytree(data_dir, tmp_path / "data")
    path = tmp_path / "data" / "processed" / "SP500.dataset.a20.v1.parquet"
    stored = pd.read_parquet(path)
    stored.assign(Close=stored["Close"] * 1.01).to_parquet(path, index=False)
    with pytest.raises(InputError, match="must have the content"):
        answer_question(asked, tmp_path / "data")
