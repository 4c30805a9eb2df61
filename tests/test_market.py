"""Risk: bad bars reach data/ (G4, G6). Every check of the validator, every form of file, and what may be accepted."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finpatch.bars import read_embedded, read_file, tidy_bars
from finpatch.calendar import unfinished
from finpatch.core import InputError, NotFoundError
from finpatch.market import fetch_ohlcv, load_ohlcv, validate_ohlcv
from finpatch.validate import ACCEPTABLE, CHECKS, PRICES, find_form, refuse_unaccepted

pytestmark = pytest.mark.filterwarnings(
    "ignore:Series.values returning an ndarray that drops timezone"
)  # exchange_calendars
NOON, DAY = "2018-06-15", "2018-03-05"

SESSIONS = tidy_bars(read_embedded("SP500")).index


def make_bars(first="2018-01-02", last="2018-06-14", seed=0):
    days = SESSIONS[SESSIONS.slice_indexer(first, last)]
    rng = np.random.default_rng(seed)
    close = 100 * np.exp(rng.normal(0, 0.01, len(days)).cumsum())
    open_ = close * np.exp(rng.normal(0, 0.002, len(days)))
    high, low = np.maximum(open_, close) * 1.003, np.minimum(open_, close) * 0.997
    values = {"Open": open_, "High": high, "Low": low, "Close": close, "Adj Close": close * 0.9, "Volume": 1e6}
    return pd.DataFrame(values, index=days)


BARS = make_bars()


def put(column, value, day=DAY):
    bars = BARS.copy()
    bars.loc[day, column] = value
    return bars


def move(day, to):
    return BARS.rename(index={pd.Timestamp(day): pd.Timestamp(to)})


def split_unadjusted(ratio):
    bars = BARS.drop(columns="Adj Close")
    bars.loc[DAY:, PRICES] /= ratio
    return bars


CASES = {  # name -> (bars, first date that must be listed or None)
    "empty": (BARS.iloc[:0], None),
    "columns": (BARS.drop(columns="High"), None),
    "dtypes": (BARS.astype({"Volume": str}), None),
    "index": (BARS.set_index(BARS.index + pd.Timedelta(hours=16)), "2018-01-02"),
    "order": (BARS.iloc[[0, 1, 3, 2, 4]], "2018-01-04"),
    "duplicates": (BARS.loc[[*BARS.index[:44], *BARS.index[43:]]], "2018-03-06"),
    "not_finite": (put("Volume", np.nan), DAY),
    "nonpositive_prices": (put(["Low", "Open"], 0.0), DAY),
    "negative_volume": (put("Volume", -1.0), DAY),
    "unfinished_bar": (
        pd.concat([BARS, BARS.tail(1).set_axis(pd.DatetimeIndex(["2018-06-15"]), axis=0)]),
        "2018-06-15",
    ),
    "null_bars": (put([*PRICES, "Adj Close"], np.nan), DAY),
    "price_range": (put("High", 1.0), DAY),
    "missing_sessions": (BARS.drop(pd.Timestamp(DAY)), DAY),
    "extra_sessions": (
        pd.concat([BARS, BARS.tail(1).set_axis(pd.DatetimeIndex(["2018-02-19"]), axis=0)]).sort_index(),
        "2018-02-19",
    ),
    "unexplained_jumps": (split_unadjusted(2), DAY),
    "stale_opens": (BARS.assign(Open=BARS["Close"].shift().fillna(100), High=999, Low=1), "2018-01-03"),
    "zero_volume": (put("Volume", 0.0), DAY),
}


@pytest.mark.parametrize("name", CASES)
def test_each_check_finds_its_fault(name):
    bars, day = CASES[name]
    findings = {finding.name: finding for finding in validate_ohlcv(bars, now=NOON)}
    assert set(findings) == {name}
    assert findings[name].severity == CHECKS[name].severity
    assert findings[name].n >= 0 and findings[name].message.startswith(name)
    if day:
        assert findings[name].dates[0] == day and day in findings[name].message


def test_every_check_has_a_case():
    assert set(CASES) | {"ends_early"} == set(CHECKS)  # ends_early belongs to Yahoo: tests/test_yahoo.py


@pytest.mark.parametrize("name", [name for name in CASES if CHECKS[name].severity == "error"])
def test_errors_say_rule_finding_and_remedy(name):
    bars, day = CASES[name]
    with pytest.raises(InputError) as caught:
        refuse_unaccepted(validate_ohlcv(bars, now=NOON))
    assert CHECKS[name].rule in caught.value.rule
    assert CHECKS[name].remedy in caught.value.remedy
    assert day is None or day in caught.value.found
    assert (f"accept {name}" in caught.value.remedy) == (name in ACCEPTABLE)


@pytest.mark.parametrize("name", [name for name in CASES if CHECKS[name].severity == "error"])
def test_only_a_vendors_quirk_can_be_accepted(name):
    findings = validate_ohlcv(CASES[name][0], now=NOON)
    if name in ACCEPTABLE:
        assert [finding.name for finding in refuse_unaccepted(findings, [name])] == [name]
    else:
        with pytest.raises(InputError, match=r"Acceptable: null_bars"):
            refuse_unaccepted(findings, [name])


def test_clean_bars_have_no_finding():
    assert validate_ohlcv(BARS, now=NOON) == []


def test_several_errors_are_told_together():
    bars = put("Volume", -1.0).drop(pd.Timestamp("2018-04-04"))
    with pytest.raises(InputError, match=r"2018-03-05.*2018-04-04") as caught:
        refuse_unaccepted(validate_ohlcv(bars, now=NOON))
    assert "accept" not in caught.value.remedy  # one of the two cannot be accepted


def test_newest_first_is_only_a_matter_of_order():
    assert [f.name for f in validate_ohlcv(BARS[::-1], now=NOON)] == ["order"]


def test_only_the_first_dates_are_listed():
    finding = validate_ohlcv(BARS.drop(BARS.index[10:30]), now=NOON)[0]
    assert (finding.n, len(finding.dates), finding.dates[0]) == (20, 5, f"{BARS.index[10]:%Y-%m-%d}")


@pytest.mark.parametrize(
    ("column", "value"), [("Open", np.inf), ("Adj Close", -np.inf), ("Close", np.nan), ("Volume", np.inf)]
)
def test_infinities_and_nan_in_any_column(column, value):
    findings = {finding.name: finding for finding in validate_ohlcv(put(column, value), now=NOON)}
    assert column in findings["not_finite"].message and findings["not_finite"].dates == [DAY]


@pytest.mark.parametrize(("factor", "n"), [(1 - 5e-7, 0), (1 - 5e-6, 1)])
def test_range_tolerance_is_relative(factor, n):
    high = BARS.loc[DAY, ["Open", "Close"]].max() * factor
    assert len(validate_ohlcv(put("High", high), now=NOON)) == n


@pytest.mark.parametrize(("ratio", "name"), [(2, "2:1"), (1.5, "3:2"), (3, "3:1"), (0.1, "1:10")])
def test_unadjusted_split_is_named(ratio, name):
    finding = validate_ohlcv(split_unadjusted(ratio), now=NOON)[0]
    assert f"{DAY} looks like a {name} split" in finding.message


def test_adjusted_split_is_silent_and_copied_adjustment_is_not():
    bars = split_unadjusted(2)
    adjusted = bars.assign(**{"Adj Close": bars["Close"].where(bars.index >= DAY, bars["Close"] / 2)})
    assert validate_ohlcv(adjusted, now=NOON) == []
    assert [f.name for f in validate_ohlcv(bars.assign(**{"Adj Close": bars["Close"]}), now=NOON)] == [
        "unexplained_jumps"
    ]


def test_apple_split_of_2005_and_crash_of_2000():
    def two(days, close, adj=None):
        bars = pd.DataFrame(dict.fromkeys(PRICES, close), index=pd.DatetimeIndex(days))
        bars["Open"] = [close[0] * 1.0, close[1]]
        return (bars if adj is None else bars.assign(**{"Adj Close": adj})).assign(Volume=1e8)

    split = ["2005-02-25", "2005-02-28"], [88.99, 44.86]
    assert validate_ohlcv(two(*split, adj=[44.495, 44.86])) == []
    assert "2005-02-28 looks like a 2:1 split" in validate_ohlcv(two(*split))[0].message
    crash = validate_ohlcv(two(["2000-09-28", "2000-09-29"], [53.5, 25.75], adj=[26.75, 12.875]))
    assert [f.name for f in crash] == ["unexplained_jumps"] and "split" not in crash[0].message
    assert refuse_unaccepted(crash, "unexplained_jumps") == crash


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 99), holes=st.sets(st.integers(1, 60), min_size=1, max_size=20))
def test_every_missing_session_is_counted(seed, holes):
    bars = make_bars(last="2018-04-30", seed=seed)
    gone = bars.index[sorted(holes)]
    finding = validate_ohlcv(bars.drop(gone), now=NOON)[0]
    assert (finding.name, finding.n) == ("missing_sessions", len(holes))
    assert finding.dates == [f"{day:%Y-%m-%d}" for day in gone[:5]]


@settings(max_examples=40, deadline=None)
@given(data=st.data(), row=st.integers(0, len(BARS) - 1))
def test_a_bad_value_anywhere_is_found_on_its_day(data, row):
    column = data.draw(st.sampled_from(list(BARS.columns)))
    bad = data.draw(st.sampled_from([np.nan, np.inf, -np.inf, -1.0]))
    day = f"{BARS.index[row]:%Y-%m-%d}"
    errors = [f for f in validate_ohlcv(put(column, bad, day), now=NOON) if f.severity == "error"]
    assert errors and all(f.dates == [day] for f in errors if f.name != "unexplained_jumps")


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_tidy_bars_does_not_depend_on_how_the_vendor_writes(data):
    order = data.draw(st.permutations(list(BARS.columns)))
    spell = data.draw(
        st.sampled_from([str.upper, str.lower, lambda s: s.replace(" ", "_"), lambda s: s.replace(" ", "").lower()])
    )
    table = BARS[order].rename(columns=spell).assign(Extra="text")
    if data.draw(st.booleans()):
        table = table.reset_index(names=data.draw(st.sampled_from(["date", "Date", "DATETIME", "session"])))
    if data.draw(st.booleans()) and table.index.name == "session":
        table = table.tz_localize("America/New_York")
    pd.testing.assert_frame_equal(tidy_bars(table), BARS, check_freq=False)


# ---------------------------------------------------------------- sources


@pytest.mark.parametrize("name", ["bars.csv", "bars.csv.gz", "bars.parquet"])
@pytest.mark.parametrize("has_adj", [True, False])
def test_file_source_reads_any_case_with_and_without_adj_close(tmp_path, name, has_adj):
    bars = BARS if has_adj else BARS.drop(columns="Adj Close")
    table = bars.rename(columns=str.upper).reset_index(names="DATE")
    getattr(table, "to_parquet" if "parquet" in name else "to_csv")(tmp_path / name, index=False)
    loaded = load_ohlcv("X", "file", path=tmp_path / name, now=NOON)
    pd.testing.assert_frame_equal(loaded, bars, check_freq=False)
    assert loaded.index.name == "session" and loaded.index.tz is None


def test_file_written_by_yfinance_keeps_its_days(tmp_path):
    table = BARS.tz_localize("America/New_York").rename_axis("Date").assign(Dividends=0.0, **{"Stock Splits": 0.0})
    table.to_csv(tmp_path / "y.csv")  # offsets -05:00 and -04:00
    pd.testing.assert_frame_equal(load_ohlcv("X", "file", path=tmp_path / "y.csv", now=NOON), BARS, check_freq=False)


BAD_FILES = {
    "empty.csv": (b"", "readable"),
    "text.csv": (b"Date,Open,High,Low,Close,Volume\n2018-01-02,1,1,1,one,5\n", "one"),
    "mixed.csv": (b"Date,Open,High,Low,Close,Volume\n12/1/2018,1,1,1,1,5\n15/1/2018,1,1,1,1,5\n", "15/1/2018"),
    "epoch.csv": (b"Date,Open,High,Low,Close,Volume\n1514851200,1,1,1,1,5\n", "1514851200"),
    "nodate.csv": (b"Open,High,Low,Close,Volume\n1,1,1,1,5\n", "needs a date"),
    "early.csv": (b"Date,Open,High,Low,Close,Volume\n0001-01-04,1,1,1,1,5\n", "0001-01-04"),
    "dates.csv": (b"Date,Open,High,Low,Close,Volume\nsoon,1,1,1,1,5\n", "soon"),
    "semicolon.csv": (b"Date;Open;High;Low;Close;Volume\n2018-01-02;1;1;1;1;5\n", "Date;Open.*by commas"),
    "latin.csv": ("Date,Open,High,Low,Close,Volume\n2018-01-02,1,1,1,1,ü\n".encode("latin-1"), "in UTF-8"),
    "comma.csv": (b'Date,Open,High,Low,Close,Volume\n2018-01-02,"1,5",2,1,2,5\n', "decimal points"),
    "broken.parquet": (b"PAR1 not really", "readable"),
    "bars.xlsx": (b"", "Convert it"),
    "twice.csv": (b"Date,Open,High,Low,Close,close,Volume\n2018-01-02,1,1,1,1,2,5\n", "Close"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_name_the_fault(tmp_path, name):
    content, words = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=words):
        load_ohlcv("X", "file", path=tmp_path / name, now=NOON)


def test_missing_file_names_its_path(tmp_path):
    with pytest.raises(NotFoundError, match=r"nowhere.csv"):
        read_file(tmp_path / "nowhere.csv")
    with pytest.raises(NotFoundError, match="a folder at"):
        read_file(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"symbol": "SP501"}, "Did you mean `SP500`"),
        ({"symbol": "../SP500"}, "file name"),
        ({"source": "yaho"}, "Did you mean `yahoo`"),
        ({"source": "file"}, "--path FILE"),
        ({"path": "x.csv"}, "belongs to source `file`"),
        ({"calendar": "XNYSE"}, "Did you mean `XNYS`"),
        ({"start": "first of May"}, "2024-01-31"),
        ({"end": "01/02/2018"}, "2024-01-31"),
        ({"start": "2018-05-01", "end": "2018-04-01"}, "at least one row"),
        ({"accept": ["missing_sesions"]}, "Did you mean `missing_sessions`"),
        ({"accept": ["duplicates"]}, "Acceptable"),
    ],
)
def test_bad_arguments_are_answered_with_a_remedy(arguments, words):
    with pytest.raises(InputError, match=words):
        load_ohlcv(**({"symbol": "SP500"} | arguments))


@pytest.mark.parametrize("symbol", ["SP500", "NASDAQ"])
def test_embedded_passes_with_warnings_only(symbol):
    bars = load_ohlcv(symbol)
    assert bars.shape == (5031, 6) and {f.severity for f in validate_ohlcv(bars)} == {"warning"}
    assert list(bars.columns) == ["Open", "High", "Low", "Close", "Adj Close", "Volume"]


def test_embedded_file_must_have_the_known_digest(tmp_path, monkeypatch):
    package = tmp_path / "arch"
    (package / "data" / "sp500").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    (package / "data" / "sp500" / "sp500.csv.gz").write_bytes(b"another release")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "arch", raising=False)
    with pytest.raises(InputError, match=r"Install arch 7.2.0"):
        load_ohlcv("SP500")
    (package / "data" / "sp500" / "sp500.csv.gz").unlink()
    with pytest.raises(NotFoundError, match=r"pip install"):
        load_ohlcv("SP500")


def test_calendars(tmp_path):
    days = pd.date_range("2018-01-01", "2018-02-28", name="session")
    coin = pd.DataFrame({"Open": 10.0, "High": 11.0, "Low": 9.0, "Close": 10.5, "Volume": 1.0}, index=days)
    coin.to_csv(tmp_path / "coin.csv")
    for calendar in ("24/7", "none"):
        assert len(load_ohlcv("BTC", "file", path=tmp_path / "coin.csv", calendar=calendar)) == 59
    with pytest.raises(InputError, match=r"extra_sessions.*2018-01-01.*2018-01-06"):
        load_ohlcv("BTC", "file", path=tmp_path / "coin.csv")
    assert find_form(coin) == []


def test_half_day_is_finished_at_its_own_close():
    day = pd.DatetimeIndex(["2018-11-23"])  # New York closed at 13:00, 18:00 UTC
    assert len(unfinished(day, "XNYS", "2018-11-23 17:59")) == 1
    assert len(unfinished(day, "XNYS", "2018-11-23 18:00")) == 0


def test_only_clean_data_is_written_and_the_manifest_knows_what_was_accepted(tmp_path):
    CASES["missing_sessions"][0].to_csv(tmp_path / "gap.csv")
    ask = {"data_dir": tmp_path / "data", "path": tmp_path / "gap.csv", "now": NOON}
    with pytest.raises(InputError, match=DAY):
        fetch_ohlcv("GAP", "file", **ask)
    assert not list((tmp_path / "data").glob("raw/*.parquet"))
    entry = fetch_ohlcv("GAP", "file", accept=["missing_sessions"], **ask)
    assert list(entry["accepted"]) == ["missing_sessions"]
    source = entry["source"]
    assert (source["name"], source["calendar"], source["parameters"]["file"]) == ("file", "XNYS", "gap.csv")
    assert source["findings"][0]["dates"] == [DAY] and set(source["content_sha256"]) == {"prices", "adj_close"}


@pytest.mark.parametrize("wrong", [{"accept": ["missing_sesions"]}, {"calendar": "XNYSE"}, {"start": "soon"}])
def test_a_misspelt_argument_costs_no_download(wrong):
    asked = []
    with pytest.raises(InputError):
        load_ohlcv("SPY", "yahoo", fetch=lambda *question: asked.append(question), **wrong)
    assert asked == []


def test_null_bar_of_a_holiday_is_no_extra_session(tmp_path):
    holiday = BARS.tail(1).set_axis(pd.DatetimeIndex(["2018-02-19"]), axis=0) * np.nan
    pd.concat([BARS, holiday]).sort_index().to_csv(tmp_path / "holiday.csv")
    bars = load_ohlcv("X", "file", path=tmp_path / "holiday.csv", accept="null_bars", now=NOON)
    pd.testing.assert_frame_equal(bars, BARS, check_freq=False, check_names=False)


def test_accepted_null_bars_are_dropped(tmp_path):
    CASES["null_bars"][0].to_csv(tmp_path / "null.csv")
    bars = load_ohlcv("X", "file", path=tmp_path / "null.csv", accept="null_bars", now=NOON)
    assert len(bars) == len(BARS) - 1 and bars.notna().all().all()
