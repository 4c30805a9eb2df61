"""G1, G2, G6 of panels. Risk: one symbol's future reaches another's rows, copies of a stock count as evidence, a symbol is
judged before it was listed or after it was dropped, or a table of closes passes for bars.

Labels and peers are held against loops over sessions; the study is run to its verdict on three made-up stocks.
"""

import json
from dataclasses import replace
from datetime import date
from importlib.util import find_spec

import numpy as np
import pandas as pd
import pytest
import torch

from finpatch.audit import audit, audit_dataset, audit_panel
from finpatch.causal import random_bars
from finpatch.cli import main
from finpatch.collect import build_many, fetch_many, fetch_universe
from finpatch.core import InputError, read_json
from finpatch.dataset import load_dataset, n_windows
from finpatch.evaluate import evaluate_predictions
from finpatch.experiment import ExperimentConfig, ModelConfig, OptimConfig, SplitsConfig
from finpatch.features import compute_features, feature_names
from finpatch.folds import FoldsConfig
from finpatch.forecast import predict
from finpatch.manifest import load_frame, verify
from finpatch.market import load_ohlcv
from finpatch.panel import PanelConfig, add_peers
from finpatch.plan import AxesConfig, StudyConfig
from finpatch.run import load_run, train_run
from finpatch.study import run_study
from finpatch.targets import Task
from finpatch.universe import load_universe

has_panel = all(find_spec(name) for name in ("skfolio", "bokeh_sampledata"))
needs_panel = pytest.mark.skipif(not has_panel, reason="the extra `panel` is not installed")
SYMBOLS = ("A", "B", "C")
DAYS = pd.bdate_range("2001-01-01", periods=2400, name="session")


def closes_of(seed, days=DAYS):
    rng = np.random.default_rng(seed)
    return pd.DataFrame({"Close": 50 * np.exp(np.cumsum(rng.normal(0, 0.01, len(days))))}, index=days)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    "Three stocks of closes alone: one whole, one listed late, one that misses a tenth of its days."
    folder = tmp_path_factory.mktemp("panel")
    rng = np.random.default_rng(9)
    days = {"A": DAYS, "B": DAYS[300:], "C": DAYS[rng.random(len(DAYS)) > 0.1]}
    for seed, (symbol, own) in enumerate(days.items()):
        closes_of(seed, own).to_csv(folder / f"{symbol}.csv")
    (folder / "mine.csv").write_text("symbol,from,to\nA,,\nB,2005-01-03,2008-12-31\nC,,\n")
    fetched = fetch_many(SYMBOLS, "file", data_dir=folder / "data", path=folder, calendar="none")
    built = build_many(SYMBOLS, "c12", data_dir=folder / "data")
    assert set(fetched["status"]) == {"fetched"} and set(built["status"]) == {"built"} and verify(folder / "data") == []
    return folder / "data"


def experiment(data_dir, **changes):
    spans = {"train_end": date(2006, 12, 29), "val_end": date(2008, 6, 30), "test_end": date(2010, 1, 29)}
    config = ExperimentConfig(
        seed=0,
        dataset=tuple(f"{s}.dataset.c12" for s in SYMBOLS),
        task="excess",
        horizon=1,
        context_length=20,
        splits=SplitsConfig(**spans, max_context=30),
        model=ModelConfig(patch_length=5, stride=5),
        panel=PanelConfig(min_symbols=3),
        optim=OptimConfig(lr=1e-3, epochs=1, warmup_steps=4),
        thermal=None,
    )
    return replace(config, **changes)


def frames_of(data_dir):
    return {s: load_frame(data_dir, f"{s}.dataset.c12") for s in SYMBOLS}


# Labels


@pytest.mark.parametrize("horizon", [1, 5])
def test_excess_is_the_return_against_the_median_of_those_that_traded(horizon, data_dir):
    frames = frames_of(data_dir)
    joined, task = add_peers(frames, horizon, PanelConfig(min_symbols=2)), Task("excess", horizon)
    for symbol, frame in joined.items():
        y, days = task.labels(frame.filter(["Close", "Peers"])), frame.index
        for t in (0, 1, 300, 777, len(days) - horizon - 1, len(days) - 1):
            if t + horizon >= len(days):
                assert np.isnan(y.iloc[t])
                continue
            a, b = days[t], days[t + horizon]
            both = [np.log(f["Close"][b] / f["Close"][a]) for f in frames.values() if a in f.index and b in f.index]
            want = (
                np.nan
                if len(both) < 2
                else float(np.log(frame["Close"][b] / frame["Close"][a]) - np.median(both) > 1e-9)
            )
            assert y.iloc[t] == want or (np.isnan(y.iloc[t]) and np.isnan(want)), (symbol, a)


def test_no_close_after_its_horizon_moves_a_label(data_dir):
    "Corrupt every close of every symbol after a session: labels that end at or before it stay."
    frames, cut, h = frames_of(data_dir), pd.Timestamp("2007-05-15"), 5
    rng = np.random.default_rng(1)
    later = {
        s: f.assign(Close=f["Close"] * np.where(f.index > cut, rng.uniform(0.5, 2, len(f)), 1))
        for s, f in frames.items()
    }
    for s in SYMBOLS:
        y, moved = (Task("excess", h).labels(add_peers(x, h, PanelConfig(min_symbols=2))[s]) for x in (frames, later))
        ends = pd.Series(frames[s].index, index=frames[s].index).shift(-h) <= cut
        pd.testing.assert_series_equal(y[ends], moved[ends])
        assert not y[~ends].equals(moved[~ends])


def test_too_few_symbols_give_no_label_and_one_symbol_no_panel(data_dir):
    few, more = (load_dataset(experiment(data_dir, panel=PanelConfig(min_symbols=n)), data_dir) for n in (3, 2))
    assert len(few.samples) < len(more.samples)
    with pytest.raises(InputError, match="compares the symbols of a panel; got 1 for"):
        experiment(data_dir, dataset=("A.dataset.c12",))
    with pytest.raises(InputError, match="use a panel"):
        Task("excess").labels(load_ohlcv("SP500"))


# Samples


def test_a_symbol_is_judged_while_it_belongs_and_looks_back_beyond(data_dir):
    universe = str(data_dir.parent / "mine.csv")
    config = experiment(data_dir, task="direction", panel=PanelConfig(universe=universe))
    data, whole = load_dataset(config, data_dir), load_dataset(replace(config, panel=PanelConfig()), data_dir)
    own = data.samples[data.samples["symbol"] == "B"]
    assert (own["origin"].min(), own["origin"].max()) == (pd.Timestamp("2005-01-03"), pd.Timestamp("2008-12-31"))
    others = [d.samples[d.samples["symbol"] != "B"].drop(columns="row") for d in (data, whole)]
    pd.testing.assert_frame_equal(*[o.reset_index(drop=True) for o in others])
    first = own.index[0]
    frame = load_frame(data_dir, "B.dataset.c12")
    window = frame.loc[: own["origin"].min(), feature_names("c12")].tail(20)
    np.testing.assert_allclose(
        data.batch(torch.tensor([first]))[0][0].numpy(), data.scaler(window.to_numpy()), atol=1e-6
    )


def test_a_symbol_that_the_universe_does_not_name_is_refused(data_dir, tmp_path):
    (tmp_path / "two.csv").write_text("symbol,from,to\nA,,\nB,,\n")
    with pytest.raises(InputError, match="every symbol must be in the universe `two`; got C"):
        load_dataset(
            experiment(data_dir, task="direction", panel=PanelConfig(universe=str(tmp_path / "two.csv"))), data_dir
        )


def test_a_scaler_per_symbol_sees_training_rows_of_its_symbol_alone(data_dir):
    config = experiment(data_dir, task="direction", panel=PanelConfig(scaler="per_symbol"))
    data, frames = load_dataset(config, data_dir), frames_of(data_dir)
    for symbol, frame in frames.items():
        own = data.samples[(data.samples["symbol"] == symbol) & (data.samples["split"] == "train")]
        first = frame.index[frame.index.get_loc(own["origin"].min()) - 29]
        seen = frame.loc[first : own["origin"].max(), list(data.names)].to_numpy(np.float64)
        np.testing.assert_allclose(data.scaler.of(symbol).mean, seen.mean(axis=0), rtol=1e-9, atol=1e-12)
    later = {s: f.copy() for s, f in frames.items()}
    for f in later.values():
        f.loc[f.index > "2007-01-05", list(data.names)] = 1e3
    again = load_dataset(config, data_dir, frames=later, is_checked=False)
    assert np.array_equal(again.scaler.mean, data.scaler.mean)


# Evidence


def test_copies_of_a_stock_are_no_more_evidence_than_one():
    "Ten symbols with the same labels and forecasts have the intervals of one: losses are averaged over a session first."
    rng, days = np.random.default_rng(0), pd.bdate_range("2010-01-01", periods=1500)
    y = (rng.random(1500) < 0.5).astype(float)
    p = np.clip(0.5 + 0.05 * (y - 0.5) + 0.05 * rng.normal(size=1500), 0.01, 0.99)
    one = pd.DataFrame(
        {"origin": days, "y": y, "p": p, "split": np.repeat(["train", "val", "test"], 500), "symbol": "S0"}
    )
    one["target_end"] = one["origin"].shift(-1).fillna(days[-1] + pd.Timedelta(days=1))
    one = one.drop(index=[499, 999])
    ten = pd.concat([one.assign(symbol=f"S{i}") for i in range(10)], ignore_index=True)
    a, b = (evaluate_predictions(x.reset_index(drop=True), 1) for x in (one, ten))
    for metric in ("log_loss", "brier", "auc", "accuracy"):
        assert [b["test"][metric][k] for k in ("value", "low", "high")] == pytest.approx(
            [a["test"][metric][k] for k in ("value", "low", "high")], rel=1e-9
        )


# No look-ahead


def test_the_audit_catches_one_symbols_future_in_anothers_features():
    frames = {s: random_bars(500, seed)[["Close"]] for seed, s in enumerate(SYMBOLS)}

    def rank(panel, days=0):
        moves = pd.DataFrame({s: np.log(f["Close"]).diff(5) for s, f in panel.items()}).shift(-days)
        return {s: moves.rank(axis=1)[s].reindex(f.index).to_frame("rank") for s, f in panel.items()}

    assert audit_panel(rank, frames, cuts=12, first_cut=10).is_ok
    found = audit_panel(lambda panel: rank(panel, 1), frames, cuts=12, first_cut=10)
    assert {leak.column for leak in found.leaks} == {f"{s}|rank" for s in SYMBOLS}

    def only_b(panel):
        "A knows what B will do; B and C know nothing."
        tomorrow = np.log(panel["B"]["Close"]).diff().shift(-1)
        honest = {s: np.log(f["Close"]).diff().to_frame("x") for s, f in panel.items()}
        return honest | {"A": tomorrow.reindex(panel["A"].index).to_frame("x")}

    assert {leak.column for leak in audit_panel(only_b, frames, cuts=12, first_cut=10).leaks} == {"A|x"}


def test_c12_knows_nothing_of_the_future_and_nothing_but_closes():
    bars = load_ohlcv("NASDAQ")
    assert audit(lambda x: compute_features(x, "c12", warmup=0), bars[["Close"]], cuts=60).is_ok
    other = bars.assign(Open=1.0, High=2.0, Low=0.5, Volume=0.0)
    assert compute_features(bars, "c12").equals(compute_features(other, "c12"))


def test_closes_alone_are_no_bars(data_dir, capsys):
    for words, told in [
        (["data", "build", "A", "--tier", "a20"], "closes alone serve tier c12"),
        (["data", "build", "A", "--tier", "raw6"], "none named Open"),
    ]:
        assert main([*words, "--data-dir", str(data_dir)]) == 1
        err = capsys.readouterr().err
        assert told in err and len(err.strip().splitlines()) == 1
    for task in ("threshold_1pct", "log_range"):
        with pytest.raises(InputError, match="no High, Low"):
            load_dataset(experiment(data_dir, task=task), data_dir)
    assert audit_dataset("A", "c12", data_dir, n_cuts=20).is_ok


# To the end


def test_a_run_on_a_panel_is_loaded_and_predicts_with_the_scaler_of_each_symbol(data_dir, tmp_path):
    config = experiment(data_dir, panel=PanelConfig(scaler="per_symbol", min_symbols=3))
    path = train_run(config, "5k", data_dir=data_dir, run_dir=tmp_path / "run", device="cpu", is_progress_shown=False)
    run = load_run(path, data_dir)
    assert run.scaler.symbols == SYMBOLS and n_windows(run.dataset) == read_json(path / "run.json")["n_windows"]
    stored = pd.read_parquet(path / "predictions.parquet").set_index(["symbol", "origin"])["p"]
    table = predict(run, data_dir).set_index(["symbol", "origin"])["p"]
    np.testing.assert_allclose(table.loc[stored.index], stored, atol=1e-6)


@pytest.mark.parametrize("scaler", ["pooled", "per_symbol"])
def test_a_panel_study_ends_in_a_verdict(scaler, data_dir, tmp_path):
    study = StudyConfig(
        symbols=SYMBOLS,
        axes=AxesConfig(budgets=("2k", "4k"), n_seeds=2, tasks=("excess",), tiers=("c12",), contexts=(20,)),
        folds=FoldsConfig(test_start=date(2008, 1, 1), test_end=date(2010, 1, 29), val_sessions=250),
        optim=OptimConfig(lr=3e-3, warmup_steps=5, global_batch_size=512, epochs=2, patience=1),
        model=ModelConfig(patch_length=5, stride=5),
        panel=PanelConfig(scaler=scaler, min_symbols=3, universe=str(data_dir.parent / "mine.csv")),
        rates=None,
        thermal=None,
    )
    quiet = {"device": "cpu", "is_progress_shown": False, "n_workers": 0}
    path = run_study(study, data_dir=data_dir, study_dir=tmp_path / "study", **quiet)
    said = read_json(path / "verdict.json")
    assert said["n_test_looks"] >= 1 and len(said["by_size"]) == 2 and said["sentence"]
    losses = pd.read_parquet(path / "losses.parquet")
    one = losses[(losses["name"] == "model") & (losses["split"] == "test")].groupby(["budget", "seed"])["session"]
    assert (one.nunique() == one.size()).all() and said["n_days"] == one.size().iloc[
        0
    ]  # a session counts once, whatever the symbols


# Packages


@needs_panel
def test_a_universe_is_fetched_and_built_by_two_commands(tmp_path, capsys):
    where = ["--data-dir", str(tmp_path / "data"), "--json"]
    assert main(["data", "fetch", "--universe", "skfolio", *where]) == 0
    first = json.loads(capsys.readouterr().out)["symbols"]
    assert {row["status"] for row in first} == {"fetched"} and {row["n_rows"] for row in first} == {8313}
    assert main(["data", "build", "--universe", "skfolio", "--tier", "c12", *where]) == 0
    capsys.readouterr()
    assert main(["data", "fetch", "--universe", "skfolio", *where]) == 0
    assert {row["status"] for row in json.loads(capsys.readouterr().out)["symbols"]} == {"kept"}
    assert verify(tmp_path / "data") == []
    entry = next(
        e for e in read_json(tmp_path / "data/raw/manifest.json")["entries"] if e["dataset_id"].startswith("AAPL")
    )
    assert entry["source"]["library"] == "skfolio" and entry["accepted"] == ["unexplained_jumps"]


@needs_panel
def test_real_splits_are_no_labels(tmp_path):
    "AAPL as traded, 2:1 on 2005-02-28: the label is the +0.8 % of who held it."
    table = fetch_universe(load_universe("bokeh"), data_dir=tmp_path)
    assert set(table["status"]) == {"fetched"}, table["reason"].tolist()
    bars = load_frame(tmp_path, "AAPL.OHLCV.daily")
    assert Task("direction").labels(bars)["2005-02-25"] == 1
    assert abs(np.log(bars["Close"]).diff()["2005-02-28"]) > 0.6


def test_a_missing_extra_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("finpatch.packaged.find_spec", lambda name: None)
    assert main(["data", "fetch", "AAPL", "--source", "skfolio", "--data-dir", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert 'pip install "finpatch[panel]"' in err and len(err.strip().splitlines()) == 1
