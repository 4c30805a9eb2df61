"""G6, honest numbers. The risk: an interval that is too narrow, a label counted twice, a look that is not counted.

The notebooks show coverage, every metric against its reference, and each refusal. Here are the properties that must
hold for all inputs, and the ways in which a file, a process or a machine could make them fail.
"""

import json
import multiprocessing
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finpatch.alarms import first_collapse, read_spreads
from finpatch.calibration import recalibrate
from finpatch.core import InputError, to_json
from finpatch.economics import economics, held_positions, positions
from finpatch.episodes import check_enough, count_episodes
from finpatch.evaluate import (
    check_predictions,
    count_looks,
    evaluate_predictions,
    infer_horizon,
    mean_interval,
    record_look,
    result_table,
    span_digest,
)
from finpatch.ledger import read_looks
from finpatch.predictions import SPLITS, overlapping_rows

FEW = settings(max_examples=40, deadline=None, derandomize=True)


def make_file(seed=0, n=700, horizon=1, skill=0.0, noise=0.0):
    """Return predictions over train, val and test with the straddlers dropped; `skill` moves p with y."""
    rng = np.random.default_rng(seed)
    days = pd.bdate_range("2010-01-01", periods=n + horizon)
    start = np.array([0, int(0.4 * n), int(0.7 * n), n])
    split = np.searchsorted(start, np.arange(n), "right") - 1
    inside = np.arange(n) + horizon <= start[split + 1]  # the label must end before the next split begins
    shocks = rng.normal(size=n + horizon)
    y = (np.convolve(shocks, np.ones(horizon), "valid")[1:] > 0).astype(float)
    slow = np.convolve(rng.normal(size=n + 9), np.ones(10), "valid") / np.sqrt(10)  # opinions last two weeks
    odds = skill * (2 * y - 1) + noise * slow
    frame = pd.DataFrame({"origin": days[:n], "target_end": days[horizon:], "y": y, "p": 1 / (1 + np.exp(-odds))})
    frame["split"] = np.array(["train", "val", "test"])[split]
    return frame[inside].reset_index(drop=True)


# Intervals


@FEW
@given(st.integers(8, 400), st.integers(1, 30), st.floats(-1e3, 1e3), st.floats(1e-3, 1e3), st.integers(0, 2**32 - 1))
def test_interval_moves_and_stretches_with_its_values(n, horizon, shift, scale, seed):
    x = np.random.default_rng(seed).normal(size=n)
    plain, moved = mean_interval(x, horizon), mean_interval(shift + scale * x, horizon)
    assert np.allclose(moved, shift + scale * np.array(plain), atol=1e-7 * (abs(shift) + scale))
    assert plain.low <= plain.value <= plain.high


@pytest.mark.parametrize("phi", [0.0, 0.6])
def test_interval_covers_losses_that_remember(phi):
    """An autoregression is not what the rule was made for; where its memory is within the horizon it still covers."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2000, 1200)) ** 2 - 1  # skewed as losses are
    for t in range(1, 1200):
        x[:, t] += phi * x[:, t - 1]
    interval = mean_interval(x[:, 200:], horizon=5)
    assert 0.93 <= np.mean((interval.low <= 0) & (interval.high >= 0)) <= 0.97


@pytest.mark.parametrize(("horizon", "n"), [(1, 500), (5, 1900)])
def test_noise_is_seldom_found_better_than_the_best_baseline(horizon, n):
    """A model that answers one half plus a little noise has no skill; hardly any such file may give a finding."""
    files = [make_file(seed, n, horizon, noise=0.02) for seed in range(50)]
    found = [evaluate_predictions(frame)["test"]["skill"]["low"] > 0 for frame in files]
    assert sum(found) <= 4  # 1.25 expected of an exact interval; five or more have a chance of 1 %


# What is counted as one


def brute_episodes(sessions, horizon):
    """Largest number of spans (t, t+h] that share no session, by dynamic programming over all of them."""
    best = {}
    for t in sorted(set(sessions), reverse=True):
        best[t] = 1 + max([best[s] for s in best if s >= t + horizon], default=0)
    return max(best.values(), default=0)


@FEW
@given(st.lists(st.integers(0, 120), max_size=30), st.integers(1, 25))
def test_episodes_are_as_many_as_any_choice_of_disjoint_spans(sessions, horizon):
    assert count_episodes(sessions, horizon) == brute_episodes(sessions, horizon)


@pytest.mark.parametrize("horizon", [1, 5, 20])
def test_limits_are_exact(horizon):
    y = np.random.default_rng(0).normal(size=100 * horizon)
    assert check_enough(y, horizon, "real")["n_spans"] == 100
    with pytest.raises(InputError, match=f"{100 * horizon - 1} sessions"):
        check_enough(y[1:], horizon, "real")
    rare = np.zeros(4000)
    rare[np.arange(20) * horizon] = 1
    assert check_enough(rare, horizon)["n_episodes"] == 20
    rare[19 * horizon] = 0
    with pytest.raises(InputError, match="got 19 at horizon"):
        check_enough(rare, horizon)


def test_copies_of_a_symbol_add_no_evidence():
    frame = make_file(skill=0.1, noise=0.3)
    panel = pd.concat([frame.assign(symbol=name) for name in "ABC"], ignore_index=True)
    one, three = evaluate_predictions(frame.assign(symbol="A")), evaluate_predictions(panel)
    for metric, value in one["test"].items():
        assert np.allclose(list(three["test"][metric].values()), list(value.values()), atol=1e-9), metric
    assert three["spans"] == one["spans"]


def test_seeds_are_not_days():
    frame = make_file()
    with pytest.raises(InputError, match="2 pairs of budget and seed"):
        evaluate_predictions(pd.concat([frame.assign(seed=0), frame.assign(seed=1)]))


# Splits


@FEW
@given(st.lists(st.tuples(st.sampled_from(SPLITS), st.integers(0, 25), st.integers(1, 6)), min_size=1))
def test_overlap_is_found_exactly_where_two_splits_share_a_session(rows):
    """Compare with the definition, pair by pair: the later of two rows is named if the earlier one reaches past it."""
    frame = pd.DataFrame([(s, a, a + h) for s, a, h in rows], columns=["split", "origin", "target_end"])
    for name in ("origin", "target_end"):
        frame[name] = pd.Timestamp("2020-01-01") + pd.to_timedelta(frame[name], unit="D")
    late = [
        any(o.split != row.split and o.origin <= row.origin < o.target_end for o in frame.itertuples())
        for row in frame.itertuples()
    ]
    assert overlapping_rows(frame).index.tolist() == np.flatnonzero(late).tolist()


@pytest.mark.parametrize("horizon", [2, 5])
def test_purge_is_exactly_horizon_minus_one(horizon):
    frame = make_file(n=2000, horizon=horizon)
    assert infer_horizon(check_predictions(frame)) == horizon
    last = frame[frame["split"] == "train"].iloc[-1]
    step = pd.offsets.BDay(1)
    straddler = last.to_frame().T.assign(origin=last["origin"] + step, target_end=last["target_end"] + step)
    with pytest.raises(InputError, match="labels overlap in 1 rows"):
        check_predictions(pd.concat([frame, straddler], ignore_index=True))


def test_labels_of_the_test_span_never_choose_the_baseline():
    frame = make_file(3)
    other = frame.assign(y=frame["y"].where(frame["split"] != "test", 1 - frame["y"]))
    for rival in (0.3, 0.45, 0.5, 0.55):
        rivals = {"rival": np.full(len(frame), rival)}
        first, second = evaluate_predictions(frame, baselines=rivals), evaluate_predictions(other, baselines=rivals)
        assert first["best_baseline"] == second["best_baseline"]


# The same file, the same numbers


def test_order_index_and_format_of_the_rows_change_nothing(tmp_path):
    frame = make_file(skill=0.1, noise=0.3)
    shuffled = frame.sample(frac=1, random_state=0)
    shuffled.index = [f"row {i % 7}" for i in range(len(frame))]  # not even unique
    for other in (shuffled, frame.astype({"origin": str, "target_end": str}), frame.assign(fold=0, logit=0.0)):
        first, second = evaluate_predictions(frame), evaluate_predictions(other)
        for metric, value in first["test"].items():
            assert np.allclose(list(second["test"][metric].values()), list(value.values()), atol=1e-12), metric
        assert span_digest(check_predictions(other)) == span_digest(check_predictions(frame))


def test_result_is_strict_json_and_prints_the_same_after_it():
    result = evaluate_predictions(make_file().assign(p=0.5))  # a constant forecast has no calibration slope
    back = json.loads(to_json(result))
    assert back["test"]["calibration_slope"]["value"] is None
    assert result_table(back) == result_table(result)
    assert [alarm["name"] for alarm in result["alarms"]] == ["collapsed", "collapsed"]


def test_certainty_that_is_wrong_is_charged_and_named():
    frame = make_file(skill=0.1, noise=0.3)
    plain = evaluate_predictions(frame)
    frame.loc[frame.index[-1], "p"] = 1 - frame["y"].iloc[-1]
    result = evaluate_predictions(frame)
    charge = (result["test"]["log_loss"]["value"] - plain["test"]["log_loss"]["value"]) * result["n_windows"]["test"]
    assert 26 < charge < 28  # nats, and not infinite
    assert "certain" in [alarm["name"] for alarm in result["alarms"]]


# Calls, calibration, years


@settings(FEW, max_examples=12)
@given(st.integers(0, 2**32 - 1), st.floats(0, 2), st.floats(0, 2), st.sampled_from([1, 5]))
def test_details_add_up_for_any_forecast(seed, skill, noise, horizon):
    """Counts are the rows, bins and years hold every row once, and averages of parts are the whole."""
    frame = make_file(seed, n=1900, horizon=horizon, skill=skill, noise=noise)
    result = evaluate_predictions(frame)
    for split, n in (("val", result["n_windows"]["val"]), ("test", result["n_windows"]["test"])):
        assert sum(result["counts"][split].values()) == n
        bins, years = result["calibration"][split]["bins"], result["skill_by_year"][split]
        assert sum(b["n"] for b in bins) == sum(year["n_sessions"] for year in years) == n
        rate = sum(b["n"] * b["y"] for b in bins) / n
        assert np.isclose(rate, result[split]["base_rate"]["value"], atol=1e-12)
        whole = sum(year["n_sessions"] * year["value"] for year in years) / n
        assert np.isclose(whole, result[split]["skill"]["value"], atol=1e-12)
        assert 0 <= result["calibration"][split]["ece"] <= 1
        c, rows = result["counts"][split], frame[frame["split"] == split]
        right = (c["tp"] + c["tn"]) / n
        assert np.isclose(right, result[split]["accuracy"]["value"], atol=1e-12)
        shares = {"recall": (c["tp"], c["fn"]), "precision": (c["tp"], c["fp"])}
        for name, (hits, misses) in shares.items():
            found = result[split][name]
            if hits + misses:
                assert np.isclose(found["value"], hits / (hits + misses), atol=1e-12)
                assert 0 <= found["low"] <= found["value"] <= found["high"] <= 1
        assert rows["y"].sum() == c["tp"] + c["fn"]


def test_recalibration_undoes_any_boldness_and_looks_at_no_test_label():
    """Two forecasts on one line in log odds are the same after recalibration, whatever the line."""
    frame = make_file(skill=0.3, noise=0.5)
    odds = np.log(frame["p"]) - np.log1p(-frame["p"])
    plain, _ = recalibrate(frame.assign(fold=0), frame["p"].to_numpy(), True)
    moved, (line,) = recalibrate(frame.assign(fold=0), (1 / (1 + np.exp(-(0.7 + 3 * odds)))).to_numpy(), True)
    test = (frame["split"] == "test").to_numpy()
    assert np.allclose(plain[test], moved[test], atol=1e-9)
    assert line["slope"] > 0
    other = frame.assign(y=frame["y"].where(frame["split"] != "test", 1 - frame["y"]), fold=0)
    assert np.array_equal(recalibrate(other, frame["p"].to_numpy(), True)[0], plain)
    result = evaluate_predictions(frame)
    assert result["recalibrated"]["test"]["log_loss"]["value"] == pytest.approx(
        -np.log(np.where(frame["y"] == 1, plain, 1 - plain))[test].mean(), abs=1e-12
    )


# Alarms


def trained(tmp_path, strength, shares, seed=0, **optim):
    """Train a tiny PatchTST and judge it as a run does: its predictions beside the spread at every evaluation.

    y is 1 with the logistic chance of `strength` times the last row's first feature; the features are independent.
    """
    import torch

    from finpatch.callbacks import WriteMetrics
    from finpatch.dataset import FinancialDataset
    from finpatch.experiment import OptimConfig
    from finpatch.job import predict_samples
    from finpatch.patchtst import PatchTST, PatchTSTConfig
    from finpatch.trainer import Trainer

    rng = np.random.default_rng(seed)
    x = rng.normal(size=(1600, 3))
    y = (rng.random(1600) < 1 / (1 + np.exp(-strength * x[:, 0]))).astype(float)
    dataset = FinancialDataset.from_arrays(x, y, kind="binary", context_length=8, shares=shares)
    torch.manual_seed(seed)
    shape = {"d_model": 16, "n_heads": 2, "n_layers": 1, "d_ff": 32, "dropout": 0.0}
    model = PatchTST(PatchTSTConfig(n_features=3, context_length=8, patch_length=4, stride=4, **shape))
    path = tmp_path / "metrics.jsonl"
    Trainer(model, dataset, OptimConfig(warmup_steps=0, **optim), seed=seed, callbacks=[WriteMetrics(path)]).fit()
    return evaluate_predictions(predict_samples(model, dataset, "tiny", seed), history=read_spreads(path))


def names(result):
    return {(alarm["name"], alarm["split"]) for alarm in result["alarms"]}


def test_a_truly_collapsed_model_is_named(tmp_path):
    """Weight decay takes 95 % of every matrix at each step: there is signal, and the model answers its bias."""
    result = trained(tmp_path, 1.0, (0.5, 0.25), lr=1e-2, weight_decay=95.0, epochs=5)
    assert names(result) == {("collapsed", "val")}
    assert "in 5 evaluations running, first at step 13" in result["alarms"][0]["found"]
    assert result["sharpness"]["test"] < 0.005


def test_a_noise_fitting_model_is_named(tmp_path):
    """320 rows of nothing, learnt by heart."""
    result = trained(tmp_path, 0.0, (0.2, 0.4), lr=5e-3, weight_decay=0.0, epochs=30)
    assert names(result) == {("noise_fitting", "val"), ("noise_fitting", "test")}
    assert result["test"]["skill"]["high"] < 0
    assert result["recalibrated"]["test"]["skill"]["value"] > result["test"]["skill"]["value"]


def test_a_healthy_model_raises_no_alarm(tmp_path):
    result = trained(tmp_path, 1.0, (0.5, 0.25), lr=5e-3, epochs=6)
    assert result["alarms"] == []
    assert result["test"]["skill"]["low"] > 0


def test_an_honest_weak_model_raises_no_alarm():
    """It says 0.54 ± 0.02 and is right: y is 1 with just that chance. Nearly all its days lie on one side."""
    raised = []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        frame = make_file(seed, n=2500)
        frame["p"] = 0.54 + 0.02 * rng.normal(size=len(frame))
        frame["y"] = (rng.random(len(frame)) < frame["p"]).astype(float)
        history = [{"step": 40 * i, "sharpness": r} for i, r in enumerate((0.001, 0.003, 0.02, 0.04))]
        result = evaluate_predictions(frame, history=history)
        counts = result["counts"]["test"]
        assert counts["tp"] + counts["fp"] > 0.95 * result["n_windows"]["test"]
        raised += [alarm["name"] for alarm in result["alarms"]]
    assert set(raised) <= {"noise_fitting"}
    assert len(raised) <= 3  # of 24 spans; the upper end of a 95 % interval lies below the truth in 0.6 of them


@FEW
@given(st.lists(st.sampled_from([0.0, 0.004, 0.005, 0.1]), max_size=12))
def test_collapse_is_the_first_three_flat_evaluations_running(spreads):
    """Compare with the definition: the first place from which three on end are below the limit."""
    flat = [r < 0.005 for r in spreads]
    want = next((i for i in range(len(flat)) if flat[i : i + 3] == [True] * 3), None)
    found = first_collapse(spreads)
    assert (found[0] if found else None) == want


# What it would have earned


@FEW
@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(60, 110))
def test_a_position_knows_nothing_later_than_two_sessions_before(seed, horizon, cut):
    """Other forecasts after a date change no position that earns a return up to the second session after it."""
    rng = np.random.default_rng(seed)
    days = pd.bdate_range("2020-01-01", periods=140)
    frame = pd.DataFrame({"origin": days, "p": rng.random(140), "fold": 0, "split": ["train"] * 50 + ["test"] * 90})
    later = frame.assign(p=frame["p"].where(frame.index <= cut, rng.random(140)))
    first, second = (held_positions(pd.Series(positions(f), days)[50:], days, horizon) for f in (frame, later))
    assert np.array_equal(first[: cut + 3], second[: cut + 3])
    assert ((first >= 0) & (first <= 1 + 1e-12)).all()
    assert (first[:52] == 0).all()  # nothing is held before the first test signal is filled


def test_holding_all_of_it_earns_the_price_and_pays_twice():
    """Always fully invested for a horizon of one: the closes tell the rest."""
    frame = make_file(n=700).assign(fold=0, symbol="A")
    frame["p"] = np.where(frame["split"] == "train", np.linspace(0.4, 0.5, len(frame)), 1.0)
    days = pd.DatetimeIndex(pd.concat([frame["origin"], frame["target_end"]]).unique()).sort_values()
    close = pd.Series(100 * np.exp(np.random.default_rng(0).normal(0, 0.01, len(days)).cumsum()), days)
    panel = economics(frame, {"A": close}, 1, costs_bp=(0.0, 10.0))["test"]
    test = frame[frame["split"] == "test"]
    change = (close / close.shift(1) - 1)[test["origin"].iloc[0] : test["target_end"].iloc[-1]].iloc[2:]
    free, dear = (row["strategy"]["return_per_year"] for row in panel["costs"])
    assert free == pytest.approx(252 * change.mean(), abs=1e-12)
    assert dear == pytest.approx(252 * (change.mean() - 2 * 10e-4 / len(change)), abs=1e-12)
    assert (panel["mean_position"], panel["n_sessions"]) == (1.0, len(change))


# A run


def test_a_run_stores_all_of_it(tmp_path, data_dir):
    from finpatch.core import read_json
    from finpatch.experiment import load_experiment_config
    from finpatch.run import override, train_run

    config = override(load_experiment_config("sp500_direction"), epochs=2, max_steps=20)
    options = {"runs_dir": tmp_path, "device": "cpu", "is_progress_shown": False, "is_cooled": False}
    run_dir = train_run(config, "20k", data_dir=data_dir, **options)
    result = read_json(run_dir / "result.json")
    assert [row["step"] for row in read_spreads(run_dir / "metrics.jsonl")] == [20]
    assert set(result["baseline_settings"]) == {"last_row", "window", "boosting", "boosting_window"}
    assert all(s["n_trials"] == 5 for settings in result["baseline_settings"].values() for s in settings)
    assert set(result["baselines"]) == {"prior", "climatology", "volatility", *result["baseline_settings"]}
    assert result["economics"]["test"]["costs"][1]["cost_bp"] == 1
    assert "pays no dividend" in result["economics"]["note"]
    for key in ("counts", "calibration", "skill_by_year", "recalibrated"):
        assert result[key]["test"], key


# Looks


def look_often(path, worker):
    for i in range(20):
        record_look(path, "span", f"{worker}.{i}")


def test_looks_of_several_processes_are_all_counted(tmp_path):
    path = tmp_path / "ledger.jsonl"
    workers = [multiprocessing.get_context("fork").Process(target=look_often, args=(path, w)) for w in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert count_looks(path, "span") == 80
    assert len({look["what"] for look in read_looks(path)}) == 80


@pytest.mark.parametrize("tail", [b'{"time": "2026', b"\xff\xfe", b"\n\n", b"[1]\n", b'{"span": "span"'])
def test_a_torn_ledger_keeps_its_whole_lines(tmp_path, tail):
    path = tmp_path / "ledger.jsonl"
    assert [record_look(path, "span", i) for i in range(3)] == [1, 2, 3]
    with path.open("ab") as stream:
        stream.write(tail)
    assert record_look(path, "span", "after") == 4


def test_evaluation_needs_neither_torch_nor_scikit_learn_to_be_imported():
    heavy = ("torch", "sklearn", "scipy", "matplotlib", "arch", "transformers")
    code = f"import finpatch.evaluate, finpatch.baselines, sys; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
