"""G1, no look-ahead. Risk: a feature that knows Friday's close on Monday makes every later number worthless.

Truncation and corruption on real data at 200 random cuts and around short weeks; planted leaks;
weekly values against a second implementation; and features that survive a bad vendor.
"""

import numpy as np
import pandas as pd
import pytest
import talib
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from finpatch.audit import audit, choose_cuts, odd_weeks, scan_columns
from finpatch.causal import check_causal, random_bars
from finpatch.features import adjusted_bars, compute_features, feature, feature_names
from finpatch.market import load_ohlcv

PRICES = ["Open", "High", "Low", "Close"]


@pytest.fixture(scope="module", params=["SP500", "NASDAQ"])
def bars(request):
    return load_ohlcv(request.param)


@pytest.fixture(scope="module")
def nasdaq():
    return load_ohlcv("NASDAQ")


def both_tiers(bars, warmup=0):
    adjusted = adjusted_bars(bars)
    return pd.concat([compute_features(adjusted, tier, warmup=warmup) for tier in ("a20", "raw6")], axis=1)


def with_events(bars):
    "A 2:1 split, a 1:3 reverse split and a dividend each quarter, as a vendor shows them."
    n = len(bars)
    split = np.where(np.arange(n) < n // 3, 2.0, 1.0) * np.where(np.arange(n) < n // 2, 1 / 3, 1.0)
    paid = np.cumprod(np.where(np.arange(n) % 63 == 62, 0.995, 1.0))[::-1]
    raw = bars[PRICES].mul(split, axis=0)
    return raw.assign(**{"Adj Close": bars["Close"] * paid, "Volume": bars["Volume"] / split})


# the rule itself


def test_features_do_not_move_at_200_random_cuts_and_in_short_weeks(bars):
    cuts = {*choose_cuts(200, len(bars), seed=1), *odd_weeks(bars.index, 12)}
    report = audit(both_tiers, bars, cuts, seed=1)
    assert report.is_ok, report
    assert len(report.columns) == 26 and len(report.cuts) >= 200


def test_every_day_of_weeks_with_a_holiday(nasdaq):
    "Each session from 2001-09-03 (the closed week among them) and around Good Friday, New Year and Independence Day."
    spans = [
        ("2001-08-31", "2001-09-24"),
        ("2017-12-27", "2018-01-05"),
        ("2018-03-28", "2018-04-06"),
        ("2018-07-02", "2018-07-09"),
    ]
    cuts = np.flatnonzero(np.logical_or.reduce([(nasdaq.index >= a) & (nasdaq.index <= b) for a, b in spans]))
    assert check_causal(both_tiers, nasdaq, cuts) == []


@settings(max_examples=12, deadline=None, phases=[Phase.explicit, Phase.generate])  # shrinking a market says nothing
@given(seed=st.integers(0, 10_000), cut=st.integers(0, 599))
def test_made_up_markets_with_splits_and_dividends(seed, cut):
    assert check_causal(both_tiers, with_events(random_bars(600, seed)), [cut], seed) == []


# planted leaks: the check can fail


LEAKS = {
    "weekly bars under their own Monday": lambda x: (
        x["Close"].resample("W-MON", closed="left", label="left").last().reindex(x.index, method="ffill")
    ),
    "scaler fitted on everything": lambda x: (x["Close"] - x["Close"].mean()) / x["Close"].std(),
    "label one day early": lambda x: (x["Close"].shift(-1) > x["Close"]).astype(float),
    "adjusted backwards": lambda x: x["Close"] / x["Close"].iloc[-1],
    "a level found in hindsight": lambda x: x["Close"] > x["Close"].quantile(0.9),
    "days before a crash left out": lambda x: x["Close"].where(x["Close"].pct_change().shift(-1).fillna(0) > -0.2),
    "interpolated": lambda x: x["Volume"].where(x["Volume"] > 0).interpolate(),
}


@pytest.mark.parametrize("name", LEAKS)
def test_planted_leaks_are_found(name, nasdaq):
    cuts = [1000, 1001, 1002, 1003, 1004, nasdaq.index.get_loc("2015-05-12")]
    assert check_causal(LEAKS[name], nasdaq, cuts), name
    with pytest.raises(ValueError, match="earlier ones"):
        feature("planted", "1", 5, tier="planted")(lambda x: LEAKS[name](x).astype(float))


def test_a_column_with_the_next_return_in_it_is_flagged_by_name(bars):
    r = np.log(bars["Close"]).diff().shift(-1)
    noise = np.random.default_rng(3).standard_normal(len(bars)) * r.std() * 4
    table = compute_features(bars).assign(planted=r + noise)
    assert list(scan_columns(table, bars)["column"]) == ["planted"]


# weeks, by a second implementation


def test_weekly_value_is_that_of_the_week_before(bars):
    closes = bars["Close"].groupby(bars.index.to_period("W-SUN")).last()
    rsi = pd.Series(talib.RSI(closes.to_numpy(), 14) / 100, index=closes.index)
    expected = [rsi.shift(1)[week] for week in bars.index.to_period("W-SUN")]
    found = compute_features(bars, warmup=0)["rsi_14_weekly"]
    np.testing.assert_array_equal(found, np.float32(expected))


def test_weeks_of_a_market_that_never_closes():
    "On a calendar of seven days a week ends on Sunday, and Monday is the first day to know it."
    every_day = random_bars(420).set_axis(pd.date_range("2020-01-01", periods=420), axis=0)
    value = compute_features(every_day, warmup=0)["rsi_14_weekly"].iloc[140:]
    changes = value.index[value.diff().fillna(0) != 0]
    assert len(changes) > 30 and set(changes.day_name()) == {"Monday"}


def test_a20_is_the_table_of_definitions(bars):
    "The table of definitions spelled out with TA-Lib and pandas, without any of our helpers."
    h, l, c, v = (bars[name].to_numpy() for name in [*PRICES[1:], "Volume"])
    x = {f"dema_{n}_gap": np.log(c / talib.DEMA(c, n)) for n in (9, 10, 20, 25, 90)}
    x |= {f"sma_{n}_gap": np.log(c / talib.SMA(c, n)) for n in (12, 50, 100, 200)}
    x["rsi_14"] = talib.RSI(c, 14) / 100
    x["stochrsi_14"] = talib.STOCHRSI(c, 14, 5, 3, 0)[0] / 100
    x["macd_rel"] = talib.MACD(c, 12, 26, 9)[0] / c
    obv = talib.OBV(c, v)
    x["obv_z_20"] = (obv - talib.SMA(obv, 20)) / talib.STDDEV(obv, 20)
    x["adosc_rel"] = talib.ADOSC(h, l, c, v, 3, 10) / talib.SMA(v, 20)
    x["atr_14_rel"] = talib.ATR(h, l, c, 14) / c
    x["adx_14"] = talib.ADX(h, l, c, 14) / 100
    upper, _, lower = talib.BBANDS(c, 20, 2, 2)
    x["bb_percent_b_20"] = (c - lower) / (upper - lower)
    typical = bars[["High", "Low", "Close"]].mean(axis=1)
    x["vwap_20_gap"] = np.log(c / ((typical * v).rolling(20).sum() / bars["Volume"].rolling(20).sum()))
    found = compute_features(bars)
    assert list(found) == feature_names("a20") and set(found) == set(x) | {"rsi_14_weekly", "stochrsi_14_weekly"}
    for name, values in x.items():
        np.testing.assert_allclose(found[name], np.asarray(values)[500:], rtol=2e-6, atol=2e-7, err_msg=name)


# bad vendors


def test_flat_days_and_missing_volume_give_finite_features(bars):
    bad = with_events(bars)
    bad.iloc[2000:2030, bad.columns.get_indexer([*PRICES, "Adj Close"])] = bad["Close"].iloc[1999]
    bad.iloc[2500:2530, bad.columns.get_loc("Volume")] = 0
    bad.iloc[2010:2040, bad.columns.get_loc("Volume")] = 0
    found = both_tiers(bad)
    assert np.isfinite(found.iloc[400:]).all().all()
    assert (found["adosc_rel"].iloc[2519:2530] == 0).all()  # nothing over nothing, not rounding over rounding


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("rescale", ["currency", "re-based"])
def test_rescaled_prices_give_the_same_features(bars, rescale, flat):
    prices = with_events(bars)
    if flat:
        prices.iloc[3500:3530, :5] = prices.iloc[[3499], :5].to_numpy()
    other = prices.copy()
    if rescale == "currency":
        other[[*PRICES, "Adj Close"]] *= 1000
    else:
        other["Adj Close"] *= 0.98137 * (
            1 + 1e-13 * np.random.default_rng(0).standard_normal(len(other))
        )  # and its rounding
    before, after = both_tiers(prices, 400), both_tiers(other, 400)
    assert np.isfinite(before).all().all()
    # ADX counts a day as up or down by the larger of two differences; where these tie, rounding decides.
    limit = {"adx_14": 0.01} if rescale == "re-based" else {}
    for name in before:
        np.testing.assert_allclose(after[name], before[name], rtol=2e-6, atol=limit.get(name, 2e-6), err_msg=name)


def test_a_split_does_not_show(bars):
    "Split and dividend-adjusted prices give the features of the price path that the holder saw."
    plain = with_events(bars).assign(**{"Adj Close": lambda x: x["Close"]})
    plain[[*PRICES, "Adj Close"]] = bars[PRICES + ["Close"]].to_numpy()
    plain["Volume"] = bars["Volume"]
    split = plain.copy()
    split.loc[split.index[: len(split) // 2], PRICES] *= 3
    split.loc[split.index[: len(split) // 2], "Volume"] /= 3
    np.testing.assert_allclose(both_tiers(split, 400), both_tiers(plain, 400), rtol=2e-6, atol=2e-6)


def test_no_default_feature_uses_the_open(bars):
    moved = bars.assign(Open=bars["Low"])
    pd.testing.assert_frame_equal(compute_features(moved), compute_features(bars))


def test_where_the_file_starts_does_not_matter(bars):
    "Every row handed out: under 0.01 standard deviations."
    whole, worst = compute_features(bars), []
    for start in range(37, 4400, 111):
        late = compute_features(bars.iloc[start:])
        worst.append((abs(late - whole.reindex(late.index)) / whole.std()).max().max())
    assert len(worst) == 40 and max(worst) < 0.01
