"""G1 behind the features. Risk: the window, the scaler or the model sees what the features do not.

At 200 random cuts of real data the history is cut off, and the future is corrupted; window, logit and, once training is
over, the scaler must be the same bits.
"""

import dataclasses
from datetime import date

import numpy as np
import pandas as pd
import pytest
import torch

from finpatch.adjust import forward_adjust
from finpatch.budget import load_patchtst_config
from finpatch.causal import corrupt_after
from finpatch.core import InputError
from finpatch.dataset import (
    FinancialDataset,
    Scaler,
    SymbolRows,
    load_dataset,
    rows_from_frame,
)
from finpatch.experiment import SplitsConfig, load_experiment_config
from finpatch.features import compute_features
from finpatch.market import load_ohlcv
from finpatch.patchtst import PatchTST
from finpatch.samples import place_samples, sample_table, training_rows
from finpatch.targets import Task

SPLITS = SplitsConfig(train_end=date(2011, 12, 31), val_end=date(2015, 12, 31), test_end=date(2018, 12, 31))
CONTEXT = 60


@pytest.fixture(scope="module")
def bars():
    return load_ohlcv("SP500")


def make_rows(bars, until=None):
    features = compute_features(bars, "a20").loc[:until]  # a corrupted future may have no features; nobody may care
    return rows_from_frame("SP500", features.join(forward_adjust(bars).loc[features.index]), Task("direction"))


@pytest.fixture(scope="module")
def whole(bars):
    rows, names = make_rows(bars)
    return FinancialDataset([rows], names, Task("direction"), SPLITS, CONTEXT)


def seen_at(bars, t, scaler):
    "Return the last window up to session t, and the scaler that the bars would give."
    rows, names = make_rows(bars, until=t)
    data = FinancialDataset([rows], names, Task("direction"), SPLITS, CONTEXT, scaler, is_checked=False)
    at = rows.sessions.get_loc(t)
    return data.windows(torch.tensor([at])), rows


def fitted(rows):
    return Scaler.fit(rows.x[training_rows([rows], place_samples([rows], SPLITS, 1).rows_of("train"), SPLITS.max_context)], ("",))


def test_windows_logits_and_scaler_at_200_random_cuts(bars, whole):
    torch.manual_seed(0)
    model = PatchTST(load_patchtst_config("20k")).eval()
    rng = np.random.default_rng(0)
    sessions = whole.samples["origin"]
    cuts = np.sort(rng.choice(len(sessions), 200, replace=False))
    n_fitted = 0
    for i, cut in enumerate(cuts):
        t = sessions[cut]
        want = whole.windows(whole.row[[cut]])
        truncated = bars.loc[:t]
        corrupted = corrupt_after(bars, bars.index.get_loc(t), seed=i)
        for changed in (truncated, corrupted):
            window, rows = seen_at(changed, t, whole.scaler)
            assert torch.equal(window, want), t
            with torch.no_grad():
                assert torch.equal(model(window), model(want))
            if t >= np.datetime64(SPLITS.train_end) and i % 10 == 0:
                n_fitted += 1
                assert np.array_equal(fitted(rows).mean, whole.scaler.mean)
                assert np.array_equal(fitted(rows).std, whole.scaler.std)
    assert n_fitted >= 10


def test_a_window_that_peeks_is_found(bars, whole):
    "The test above can fail: a window that ends one session later differs."
    t = whole.samples["origin"][2000]
    window, _ = seen_at(bars, t, whole.scaler)
    assert not torch.equal(window, whole.windows(whole.row[[2000]] + 1))


@pytest.mark.parametrize("context", [20, 60, 120, 512])
def test_every_context_meets_the_same_dates(context, bars, whole):
    rows, names = make_rows(bars)
    other = FinancialDataset([rows], names, Task("direction"), SPLITS, context)
    assert other.samples.equals(whole.samples)
    assert other.windows(other.row[:1]).shape == (1, context, 20)


def test_memory_grows_with_rows_not_with_context(whole):
    "The windows of 512 sessions own no more memory than those of 20: one tensor of rows."
    assert whole.x.untyped_storage().nbytes() == whole.x.numel() * 4


@pytest.mark.parametrize("horizon", [1, 5, 20])
def test_labels_of_training_never_reach_into_a_later_split(horizon, bars):
    features = compute_features(bars, "a20")
    frame = features.join(forward_adjust(bars).loc[features.index])
    rows, _ = rows_from_frame("SP500", frame, Task("regression", horizon=horizon))
    samples = sample_table(rows, SPLITS, horizon)
    ends, starts = samples.groupby("split")["target_end"].max(), samples.groupby("split")["origin"].min()
    assert ends["train"] <= starts["val"] and ends["val"] <= starts["test"]
    place = rows.sessions.get_indexer
    for early, late in (("train", "val"), ("val", "test")):
        last = samples.loc[samples["split"] == early, "origin"].max()
        assert place([starts[late]])[0] - place([last])[0] - 1 == horizon - 1


def test_symbols_whose_features_stand_in_another_order_are_refused(bars, monkeypatch):
    "Stacked as they stand, one symbol's RSI would be scaled, and learnt, as the other's gap."
    features = compute_features(bars, "a20")
    frame = features.join(forward_adjust(bars).loc[features.index])
    other = frame[[*features.columns[::-1], *frame.columns[20:]]]
    frames = {"A.dataset.a20": frame, "B.dataset.a20": frame}
    monkeypatch.setattr(
        "finpatch.dataset.frame_reader", lambda *_: (lambda s: frames[f"{s}.dataset.a20"], 2 * len(frame))
    )
    config = dataclasses.replace(load_experiment_config("sp500_direction"), dataset=tuple(frames))
    assert len(load_dataset(config).names) == 20
    frames["B.dataset.a20"] = other
    with pytest.raises(InputError, match="same features in one order.*B.dataset.a20"):
        load_dataset(config)


def panel(horizon):
    "Two symbols, of which one trades on fewer days; the values of a window tell symbol and row."
    days = pd.DatetimeIndex(pd.bdate_range("2000-01-03", periods=1200), name="session")
    fewer = days[np.random.default_rng(0).random(1200) > 0.1]
    y = np.random.default_rng(1).normal(size=1200)
    make = lambda name, at, x0: SymbolRows(name, at, x0 + np.arange(2.0 * len(at)).reshape(-1, 2), y[: len(at)].copy())
    rows = [make("A", days, 0), make("B", fewer, 10_000)]
    rows[1].y[300:310] = np.nan  # labels missing in the middle
    ends = {"train_end": days[599].date(), "val_end": days[899].date(), "test_end": days[1199].date()}
    splits = SplitsConfig(**ends, train_start=days[100].date(), embargo=2, max_context=30)
    data = FinancialDataset(rows, ("a", "b"), Task("regression", horizon), splits, 20, is_checked=horizon == 1)
    return rows, splits, data


@pytest.mark.parametrize("horizon", [1, 5, 20])
def test_rows_and_labels_of_a_panel_with_sessions_of_its_own(horizon):
    "By brute force over each symbol's own sessions: split, row, label, last session, window."
    rows, splits, data = panel(horizon)
    ends = [pd.Timestamp(d) for d in (splits.train_end, splits.val_end, splits.test_end)]
    begin, want, start = pd.Timestamp(splits.train_start), [], 0
    for part in rows:
        last_train = (part.sessions <= ends[0]).sum() - 1 - splits.embargo
        for t in range(splits.max_context - 1, len(part.sessions) - horizon):
            span = part.sessions[t + 1 : t + horizon + 1]
            split = np.unique(np.searchsorted(ends, span))
            is_late = split[0] == 0 and (span[0] < begin or t + horizon > last_train)
            if len(split) == 1 and split[0] < 3 and not is_late and np.isfinite(part.y[t]):
                key = (("train", "val", "test")[split[0]], part.symbol, part.sessions[t], span[-1])
                want.append((*key, part.y[t], start + t))
        start += len(part.x)
    got = data.samples.sort_values("row")
    assert [tuple(r) for r in got.itertuples(index=False)] == want
    raw = np.concatenate([r.x for r in rows])
    places = torch.tensor([0, len(got) // 2, len(got) - 1])
    for window, row in zip(data.batch(places)[0], data.samples["row"].iloc[places.numpy()], strict=True):
        np.testing.assert_array_equal(window.numpy(), data.scaler(raw[row - 19 : row + 1]))
    spans = got[got["split"] == "train"].groupby("symbol")["row"].agg(["min", "max"]).to_numpy()
    used = np.concatenate([np.arange(a - 29, b + 1) for a, b in spans])
    np.testing.assert_allclose(data.scaler.mean, raw[used].astype(np.float64).mean(axis=0), rtol=1e-12)


def test_no_row_after_training_of_any_symbol_moves_the_scaler():
    rows, splits, data = panel(5)
    for part in rows:
        part.x[part.sessions > pd.Timestamp(splits.train_end)] = 1e9
    again = FinancialDataset(rows, ("a", "b"), data.task, splits, 20, is_checked=False)
    assert np.array_equal(again.scaler.mean, data.scaler.mean) and np.array_equal(again.scaler.std, data.scaler.std)


def test_symbols_of_a_panel_do_not_add_sessions():
    "Two symbols with sixty sessions of validation each are sixty sessions, not 120, and too few."
    days = pd.DatetimeIndex(pd.bdate_range("2000-01-03", periods=700), name="session")
    rng, ends = np.random.default_rng(0), {"train_end": days[399], "val_end": days[460], "test_end": days[699]}
    splits = SplitsConfig(**{k: d.date() for k, d in ends.items()}, max_context=10)
    rows = [SymbolRows(name, days, rng.normal(size=(700, 2)), rng.normal(size=700)) for name in "AB"]
    with pytest.raises(InputError, match="val must hold at least 100.*61 sessions"):
        FinancialDataset(rows, ("a", "b"), Task("regression"), splits, 10)
