"""G6, baselines. The risk: a baseline that sees the future, is fitted on other rows or labels than the model's, or is
weaker than it looks; each would make a model's skill look better than it is, or hide that there is none.
"""

import hashlib
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from finpatch.baselines import MADE, NOT_FEATURES, baseline_predictions, log_atr, tuned_baselines
from finpatch.core import InputError
from finpatch.evaluate import evaluate_predictions, losses
from finpatch.targets import Task
from finpatch.tuned import linear_tuned

ROOT = Path(__file__).parent.parent
N, VAL, TEST = 1500, 800, 1150
predictions_of = partial(baseline_predictions, context_length=20, n_trials=2)  # quick


def make_bars(seed=0, n=N, memory=0.0):
    """Return bars whose volatility remembers, with three features: a forecast of tomorrow, noise, and the ATR."""
    rng = np.random.default_rng(seed)
    slow = np.convolve(rng.normal(size=n + 39), np.ones(40) / np.sqrt(40), "valid")
    sigma = 0.01 * np.exp(0.5 * slow)
    hint = rng.normal(size=n)
    ret = sigma * (memory * np.r_[0, hint[:-1]] + np.sqrt(1 - memory**2) * rng.normal(size=n))
    close = 100 * np.exp(np.cumsum(ret))
    spread = sigma * (0.5 + rng.random(n))
    days = pd.bdate_range("2010-01-01", periods=n, name="session")
    bars = pd.DataFrame({"Open": close, "High": close * np.exp(spread), "Low": close * np.exp(-spread)}, index=days)
    bars = bars.assign(Close=close, Volume=1e6)
    atr = np.exp(log_atr(bars)[:, 0])
    features = pd.DataFrame({"hint": hint, "noise": rng.normal(size=n), "atr_14_rel": atr}, index=days)
    return features.astype(np.float32).bfill().join(bars)


def make_rows(task, bars, symbol="A"):
    """Return the rows of a predictions frame: three splits, the straddlers dropped, no forecasts."""
    h, place = task.horizon, np.arange(len(bars))
    start = np.array([0, VAL, TEST, len(bars)])
    split = np.searchsorted(start, place, "right") - 1
    ends = pd.Series(bars.index, index=bars.index).shift(-h)
    frame = pd.DataFrame({"origin": bars.index, "target_end": ends, "y": task.labels(bars), "symbol": symbol})
    frame["split"] = np.array(["train", "val", "test"])[split]
    inside = place + h <= start[split + 1] - (split == 2)
    return frame[inside & frame["y"].notna()].reset_index(drop=True)


@pytest.mark.parametrize("task", [Task("direction"), Task("threshold_1pct", horizon=5), Task("log_range")], ids=str)
def test_nothing_after_a_date_changes_a_forecast_at_or_before_it(task):
    """Corrupt prices and features of the second half of the test span: labels, fits and choices before it must stay."""
    bars = make_bars()
    cut = 1300
    later = bars.copy()
    rng = np.random.default_rng(9)
    later.iloc[cut + 1 :, :3] = rng.normal(size=(N - cut - 1, 3)).astype(np.float32)
    tail = later.index[cut + 1 :]
    for name in later.columns.intersection(NOT_FEATURES):
        later.loc[tail, name] *= np.exp(np.random.default_rng(10).normal(0, 0.1, len(tail)))  # one factor a session
    later.loc[tail, "High"] *= np.exp(rng.random(len(tail)))
    plain, corrupt = (predictions_of(task, b, make_rows(task, b)) for b in (bars, later))
    before = make_rows(task, bars)["origin"] <= bars.index[cut]
    for name in plain:
        pd.testing.assert_series_equal(plain[name][before], corrupt[name][before], check_exact=True, obj=name)
    assert (plain["last_row"][~before] != corrupt["last_row"][~before]).any()  # the corruption was real


def test_validation_labels_choose_the_penalty_and_fit_nothing():
    bars, task = make_bars(memory=0.3), Task("direction")
    rows = make_rows(task, bars)
    x, y = bars[["hint", "noise"]].to_numpy(np.float64), task.labels(bars).to_numpy()
    train, val = (bars.index.isin(rows["origin"][rows["split"] == name]) for name in ("train", "val"))
    flipped = np.where(val, 1 - y, y)
    p, best = linear_tuned(x, y, "binary", train, val)
    q, worst = linear_tuned(x, flipped, "binary", train, val)
    assert best["C"] > worst["C"] == 1e-4  # a forecast that is wrong on validation is shrunk as far as it goes
    assert not np.array_equal(p, q)
    one, other = (linear_tuned(x, labels, "binary", train, val, n_trials=1)[0] for labels in (y, flipped))
    assert np.array_equal(one, other)  # with nothing to choose, validation has no part in it
    same, _ = linear_tuned(x, np.where(np.arange(N) >= TEST, 1 - y, y), "binary", train, val)
    assert np.array_equal(p, same)


def test_last_row_finds_what_one_row_holds():
    """The hint explains tomorrow's sign; the Bayes loss is known from the simulation, the prior's is ln 2."""
    memory = 0.6
    bars, task = make_bars(memory=memory), Task("direction")
    rows = make_rows(task, bars)
    made = predictions_of(task, bars, rows)
    test = (rows["split"] == "test").to_numpy()
    from scipy.stats import norm

    chance = norm.cdf(memory / np.sqrt(1 - memory**2) * bars["hint"].reindex(rows["origin"]).to_numpy())
    y = rows["y"].to_numpy()
    bayes, found = (losses(y, np.asarray(p), True)[test].mean() for p in (chance, made["last_row"]))
    assert bayes < found < bayes + 0.02 < 0.62
    assert losses(y, made["prior"].to_numpy(), True)[test].mean() > 0.68


def test_volatility_and_har_beat_the_prior_where_volatility_remembers():
    bars = make_bars()
    for task, name in ((Task("threshold_1pct"), "volatility"), (Task("log_range"), "har")):
        rows = make_rows(task, bars)
        made = predictions_of(task, bars, rows)
        result = evaluate_predictions(rows.assign(p=made[name]), task.horizon, made)
        assert result["skill"]["prior"]["test"]["low"] > 0, name
    assert "har" not in predictions_of(Task("direction"), bars, make_rows(Task("direction"), bars))


def test_the_window_finds_what_an_earlier_row_holds():
    """Tomorrow's sign was hinted at four sessions ago: today's row is silent about it, its window is not."""
    bars = make_bars(memory=0.6)
    bars["hint"] = bars["hint"].shift(-4).fillna(0)
    task = Task("direction")
    rows = make_rows(task, bars)
    made, chosen = tuned_baselines(task, bars, rows, context_length=10)
    test, y = (rows["split"] == "test").to_numpy(), rows["y"].to_numpy()
    loss = {name: losses(y, p.to_numpy(), True)[test].mean() for name, p in made.items()}
    assert loss["window"] < 0.68 < loss["last_row"]
    assert loss["boosting_window"] < 0.68 < loss["boosting"]
    assert {name: settings[0]["n_trials"] for name, settings in chosen.items()} == dict.fromkeys(chosen, 5)


@pytest.mark.parametrize("names", ["A", "AB"])
def test_every_tuned_baseline_gets_as_many_trials_as_asked_and_says_what_it_chose(names):
    """The symbols of a panel are fitted as one; numbers have HAR for the range, and DLinear where there is one series."""
    bars = {name: make_bars(seed) for seed, name in enumerate(names, 1)}
    task = Task("log_range")
    panel = pd.concat([make_rows(task, own, symbol) for symbol, own in bars.items()], ignore_index=True)
    made, chosen = tuned_baselines(task, bars, panel, context_length=8, n_trials=2)
    tuned = {"last_row": "C", "window": "C", "boosting": "lr", "boosting_window": "lr"}
    tuned |= {"dlinear": "lr"} if names == "A" else {}
    assert set(made) == {"prior", "climatology", "volatility", "har", *tuned}
    assert set(chosen) == set(tuned)
    val = panel["split"] == "val"
    for name, key in tuned.items():
        (setting,) = chosen[name]
        assert (setting["fold"], setting["symbol"], setting["n_trials"]) == (0, "A" if names == "A" else "", 2)
        assert setting[key] > 0
        told = losses(panel["y"][val].to_numpy(), made[name][val].to_numpy(), False).mean()
        assert setting["val_loss"] == pytest.approx(told, rel=1e-9)


def test_a_panel_teaches_each_symbol_what_the_others_know():
    """Fitted as one: what holds for A is forecast for B, which has no training rows of its own and whose prior is A's."""
    bars, task = {"A": make_bars(1, memory=0.6), "B": make_bars(2, memory=0.6)}, Task("direction")
    a, b = (make_rows(task, own, symbol) for symbol, own in bars.items())
    panel = pd.concat([a, b[b["split"] != "train"]], ignore_index=True)
    made = predictions_of(task, bars, panel)
    is_b = (panel["symbol"] == "B").to_numpy()
    assert made["prior"][is_b].nunique() == 1 and made["prior"][is_b].iloc[0] == made["prior"][~is_b].iloc[0]
    y = panel["y"].to_numpy()
    assert losses(y, made["last_row"].to_numpy(), True)[is_b].mean() < 0.62
    alone = predictions_of(task, {"A": bars["A"]}, a)
    pd.testing.assert_series_equal(made["volatility"][~is_b], alone["volatility"], check_index=False, rtol=1e-9)


def digest_of_all():
    task, bars = Task("log_range"), make_bars()
    made = baseline_predictions(task, bars, make_rows(task, bars), 30, 2)
    return hashlib.sha256(b"".join(p.to_numpy().tobytes() for p in made.values())).hexdigest()


def test_the_same_bytes_whatever_the_number_of_threads():
    """Sums of floats depend on how they are cut; a machine with more cores must not have other baselines."""
    code = "import sys; sys.path.insert(0, 'tests'); from test_baselines import digest_of_all; print(digest_of_all())"
    other = "2" if os.environ.get("OMP_NUM_THREADS") == "1" else "1"
    env = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), other)
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == digest_of_all()


def test_what_is_remembered_is_of_the_same_input():
    """One label, price or feature that differs anywhere, in training too, is another input."""
    bars, task = make_bars(memory=0.4), Task("direction")
    rows = make_rows(task, bars)
    baseline_predictions(task, bars, rows, 8, 2)
    n = len(MADE)
    first = baseline_predictions(task, bars, rows, 8, 2)
    assert len(MADE) == n
    other = bars.copy()
    other.iloc[100, 0] += 5
    second = baseline_predictions(task, other, rows, 8, 2)
    assert len(MADE) == n + 1
    assert (first["last_row"] != second["last_row"]).any()
    assert all(len(MADE) == n + 2 for _ in [baseline_predictions(task, bars, rows[rows["split"] != "test"], 8, 2)])
    assert baseline_predictions(task, bars, rows, 8, 1)["window"].notna().sum() == len(rows) - 7


def test_volatility_is_the_same_whether_the_tier_has_it_or_not():
    bars, task = make_bars(), Task("threshold_1pct")
    rows = make_rows(task, bars)
    tiers = bars, bars.drop(columns="atr_14_rel")
    with_it, without = (predictions_of(task, tier, rows)["volatility"] for tier in tiers)
    scored = rows["split"] != "train"
    np.testing.assert_allclose(without[scored], with_it[scored], atol=2e-3)  # 14 training rows less
    assert without[scored].notna().all()


def test_every_fold_by_itself_and_every_symbol_with_a_prior_of_its_own():
    task, bars = Task("direction"), {"A": make_bars(1, memory=0.4), "B": make_bars(2, memory=0.4)}
    parts = {symbol: make_rows(task, own, symbol) for symbol, own in bars.items()}
    panel = pd.concat(parts.values()).sort_values(["origin", "symbol"]).reset_index(drop=True)
    together = predictions_of(task, bars, panel)
    folds = pd.concat([panel.assign(fold=0), panel.assign(fold=1)], ignore_index=True)
    twice = predictions_of(task, bars, folds)
    for name, p in together.items():
        np.testing.assert_array_equal(twice[name][: len(panel)], p, err_msg=name)
        np.testing.assert_array_equal(twice[name][len(panel) :], p, err_msg=name)
    for symbol, rows in parts.items():
        alone = predictions_of(task, bars[symbol], rows)
        mine = (panel["symbol"] == symbol).to_numpy()
        for name in ("prior", "climatology"):
            np.testing.assert_array_equal(together[name][mine], alone[name], err_msg=f"{symbol} {name}")
        assert not np.array_equal(together["last_row"][mine], alone["last_row"])
    assert evaluate_predictions(panel.assign(p=together["last_row"]), 1, together)["spans"]["test"]["n_sessions"] == 349


def test_a_file_without_training_rows_gets_the_same_baselines():
    """Its training sessions are those whose labels ended before the first scored origin: the run's own."""
    task, bars = Task("threshold_1pct", horizon=5), make_bars()
    rows = make_rows(task, bars)
    scored = rows[rows["split"] != "train"]
    full, bare = predictions_of(task, bars, rows), predictions_of(task, bars, scored)
    for name in full:
        pd.testing.assert_series_equal(full[name][scored.index], bare[name], check_exact=True)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t, b, r: (Task("threshold_2pct"), b, r), "labels of the frame must be those of the task"),
        (lambda t, b, r: (t, b.assign(Close=b["Close"].shift(3).fillna(100)), r), "Low ≤ Close ≤ High"),
        (lambda t, b, r: (t, b.iloc[100:], r), "every origin must be a session of the bars"),
        (lambda t, b, r: (t, {"AA": b}, r), "Did you mean `AA`"),
        (lambda t, b, r: (t, b.drop(columns="High"), r), "no High"),
    ],
)
def test_bad_input_says_rule_finding_and_remedy(change, says):
    task, bars = Task("direction"), make_bars()
    with pytest.raises(InputError) as caught:
        baseline_predictions(*change(task, bars, make_rows(task, bars)))
    assert says in str(caught.value)
    assert all(caught.value.as_dict().values())
