"""Risk: a bad answer of the vendor becomes data (G4, G6), or a fetch hangs.

The real yfinance asks a server on this machine; no network is used."""

import http.server
import importlib
import importlib.util
import json
import socket
import sys
import threading
import time

import numpy as np
import pandas as pd
import pytest

from finpatch import yahoo
from finpatch.bars import read_embedded, tidy_bars
from finpatch.core import InputError
from finpatch.market import fetch_ohlcv, load_ohlcv

needs_yfinance = pytest.mark.skipif(
    importlib.util.find_spec("yfinance") is None, reason="yfinance is not installed (extra `market`)"
)
pytestmark = [
    pytest.mark.filterwarnings("ignore:Series.values returning an ndarray that drops timezone"),  # exchange_calendars
    pytest.mark.filterwarnings("ignore:The inplace keyword in"),  # yfinance
]
BARS = tidy_bars(read_embedded("NASDAQ")).loc["2018-11-01":"2018-12-31"]
SPAN = {"start": "2018-11-01", "end": "2018-12-31"}
NOW = "2019-06-03 12:00"

# ---------------------------------------------------------------- the vendor's JSON, served from this machine


def chart(bars):
    opens = (bars.index + pd.Timedelta(hours=9.5)).tz_localize("America/New_York")
    quote = {
        name.lower(): [None if np.isnan(v) else v for v in bars[name]]
        for name in ("Open", "High", "Low", "Close", "Volume")
    }
    meta = {
        "symbol": "QQQ",
        "currency": "USD",
        "instrumentType": "EQUITY",
        "exchangeTimezoneName": "America/New_York",
        "priceHint": 2,
    }
    meta |= {
        "validRanges": ["1d", "max"],
        "timezone": "EST",
        "gmtoffset": -18000,
        "exchangeName": "NMS",
        "regularMarketTime": 1546290000,
    }
    adj = [{"adjclose": [None if np.isnan(v) else v for v in bars["Adj Close"]]}]
    result = {
        "meta": meta,
        "timestamp": [int(t.timestamp()) for t in opens],
        "indicators": {"quote": [quote], "adjclose": adj},
    }
    first = int(opens[0].timestamp())
    result["events"] = {"dividends": {str(first): {"amount": 0.25, "date": first}}}
    return json.dumps({"chart": {"result": [result], "error": None}}).encode()


def unknown_symbol():
    return json.dumps(
        {
            "chart": {
                "result": None,
                "error": {"code": "Not Found", "description": "No data found, symbol may be delisted"},
            }
        }
    ).encode()


GOOD = (200, chart(BARS))
HTML = (200, b"<html><body>Will be right back...</body></html>")
BROKEN = (200, GOOD[1][: len(GOOD[1]) // 2])  # a body that ends in the middle, honestly declared
CUT = (200, GOOD[1], "cut")  # a connection closed before the declared length


class Vendor:
    "What the server will answer, and what it was asked."

    def __init__(self):
        self.answers, self.seen = [GOOD], []

    def next(self, path):
        self.seen.append(path)
        if "range=1d" in path:  # yfinance asks for the time zone first
            return GOOD
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]

    @property
    def n_asked(self):
        return sum("period1" in path for path in self.seen)


@pytest.fixture
def vendor(monkeypatch, tmp_path):
    yfinance = pytest.importorskip("yfinance")
    for name in ("cache", "scrapers.history", "scrapers.quote"):
        importlib.import_module(f"yfinance.{name}")

    state = Vendor()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            status, body, *how = state.next(self.path)
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if how else body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    base = f"http://127.0.0.1:{server.server_port}"
    for module in (yfinance.base, yfinance.scrapers.history):
        monkeypatch.setattr(module, "_BASE_URL_", base)
    for name in ("_BASE_URL_", "_QUERY1_URL_"):
        monkeypatch.setattr(yfinance.scrapers.quote, name, base)
    monkeypatch.setattr(yfinance.scrapers.quote, "_QUOTE_SUMMARY_URL_", base + "/v10/finance/quoteSummary")
    monkeypatch.setattr(yfinance.data.YfData, "_get_cookie_and_crumb", lambda self, timeout=30: ("crumb", "basic"))
    monkeypatch.setattr(yahoo, "is_reachable", lambda: True)
    state.waits = []
    monkeypatch.setattr(
        yahoo.fetch_yahoo, "__kwdefaults__", yahoo.fetch_yahoo.__kwdefaults__ | {"sleep": state.waits.append}
    )
    yfinance.set_tz_cache_location(str(tmp_path))
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    yield state
    yfinance.cache.get_tz_cache().store("QQQ", None)
    server.shutdown()
    server.server_close()


def load(**more):
    return load_ohlcv("QQQ", "yahoo", **(SPAN | {"now": NOW} | more))


def test_good_answer_is_the_vendors_raw_bars(vendor):
    bars = load()
    pd.testing.assert_frame_equal(bars, BARS, check_freq=False, rtol=1e-12)
    query = next(path for path in vendor.seen if "period1" in path)
    assert "interval=1d" in query and "QQQ" in query and "range=" not in query
    assert bars.index.tz is None and list(bars.columns) == list(BARS.columns)  # no Dividends


def test_adjusted_close_is_kept_beside_raw_prices(vendor):
    vendor.answers = [(200, chart(BARS.assign(**{"Adj Close": BARS["Close"] * 0.97})))]
    bars = load()
    np.testing.assert_allclose(bars["Close"], BARS["Close"])
    np.testing.assert_allclose(bars["Adj Close"], BARS["Close"] * 0.97)


@pytest.mark.parametrize(
    "bad", [(500, b"<html>oops</html>"), HTML, BROKEN, CUT, (503, b"")], ids=["500", "html", "broken", "cut", "503"]
)
def test_a_bad_answer_is_asked_again_and_not_replayed(vendor, bad):
    vendor.answers = (
        [bad, bad, bad, bad, GOOD] if bad[0] >= 500 else [bad, bad, GOOD]
    )  # yfinance itself repeats a 5xx once
    assert len(load()) == len(BARS)
    assert vendor.waits == [1, 2]


@pytest.mark.parametrize("bad", [(500, b"oops"), HTML, BROKEN], ids=["500", "html", "broken"])
def test_a_vendor_that_stays_bad_ends_in_one_line_with_alternatives(vendor, bad):
    vendor.answers = [bad]
    with pytest.raises(InputError, match=r"4 tries.*--source file.*SP500 and NASDAQ") as caught:
        load()
    assert vendor.waits == [1, 2, 4] and "\n" not in str(caught.value)


def test_rate_limit_stops_at_once(vendor):
    vendor.answers = [(429, b"Too Many Requests")]
    with pytest.raises(InputError, match=r"1 try.*Wait an hour"):
        load()
    assert vendor.waits == [] and vendor.n_asked <= 2  # yfinance itself repeats a 429 once


def test_unknown_symbol_is_not_asked_again(vendor):
    vendor.answers = [(404, unknown_symbol())]
    with pytest.raises(InputError, match=r"may be delisted.*1 try.*Check the symbol"):
        load()
    assert vendor.waits == []


def test_null_bar_is_named_and_can_be_accepted(vendor):
    lost = BARS.copy()
    lost.loc["2018-12-12"] = np.nan  # all six, as Yahoo sends it
    vendor.answers = [(200, chart(lost))]
    with pytest.raises(InputError, match=r"null_bars: 1 session: 2018-12-12"):
        load()
    assert len(load(accept=["null_bars"])) == len(BARS) - 1


def test_single_nan_cannot_be_accepted(vendor):
    vendor.answers = [(200, chart(BARS.assign(High=BARS["High"].where(BARS.index != "2018-12-12"))))]
    with pytest.raises(InputError, match=r"not_finite: 1 session: 2018-12-12; in High"):
        load(accept=["null_bars"])


def test_silently_truncated_history_is_refused(vendor):
    vendor.answers = [(200, chart(BARS.iloc[:-5]))]
    with pytest.raises(InputError, match=r"ends_early: 5 sessions: 2018-12-24"):
        load()
    assert len(load(accept="ends_early")) == len(BARS) - 5


def test_settings_of_yfinance_are_left_as_they_were(vendor):
    import yfinance

    assert yfinance.config.debug.hide_exceptions is True
    vendor.answers = [BROKEN]
    with pytest.raises(InputError):
        load()
    assert yfinance.config.debug.hide_exceptions is True


def test_manifest_entry_tells_source_and_digests_adjustment_apart(vendor, tmp_path):
    first = fetch_ohlcv("QQQ", "yahoo", data_dir=tmp_path / "a", now=NOW, **SPAN)["source"]
    vendor.answers = [(200, chart(BARS.assign(**{"Adj Close": BARS["Close"] * 0.97})))]
    later = fetch_ohlcv("QQQ", "yahoo", data_dir=tmp_path / "b", now=NOW, **SPAN)["source"]
    assert first["content_sha256"]["prices"] == later["content_sha256"]["prices"]
    assert first["content_sha256"]["adj_close"] != later["content_sha256"]["adj_close"]
    assert (first["name"], first["library"], first["parameters"]["start"]) == ("yahoo", "yfinance", "2018-11-01")
    assert first["library_version"][0].isdigit()


# ---------------------------------------------------------------- an injected fetcher


def give(bars):
    return lambda symbol, start, end: bars.tz_localize("America/New_York").assign(
        Dividends=0.0, **{"Stock Splits": 0.0}
    )


def test_dates_are_always_explicit():
    asked = []

    def fetch(*question):
        asked.append(question)
        return give(BARS)(*question)

    yahoo.fetch_yahoo("QQQ", "2018-11-01", "2018-12-31", fetch=fetch)
    yahoo.fetch_yahoo("QQQ", fetch=fetch)
    assert asked[0] == ("QQQ", "2018-11-01", "2019-01-01")  # the vendor's end is exclusive
    assert asked[1][1] < "1930" and pd.Timestamp(asked[1][2]) > pd.Timestamp.now()  # an open end


@pytest.mark.parametrize(("now", "last"), [("2018-12-31 20:59", "2018-12-28"), ("2018-12-31 21:00", "2018-12-31")])
def test_bar_of_an_open_session_is_left_out(now, last):
    bars = load_ohlcv("QQQ", "yahoo", fetch=give(BARS), now=now)
    assert str(bars.index[-1].date()) == last


@pytest.mark.parametrize(
    ("error", "n_tries", "words"),
    [
        (ConnectionError("reset by peer"), 4, "reset by peer"),
        (TimeoutError("timed out"), 4, "timed out"),
        (RuntimeError("HTTP 429"), 1, "Wait an hour"),
        (None, 4, "an empty answer"),
    ],
)
def test_failures_of_the_fetcher(error, n_tries, words):
    calls, waits = [], []

    def fetch(*question):
        calls.append(question)
        if error:
            raise error
        return pd.DataFrame()

    with pytest.raises(InputError, match=words):
        yahoo.fetch_yahoo("QQQ", fetch=fetch, sleep=waits.append)
    assert len(calls) == n_tries and waits == [1, 2, 4][: n_tries - 1]


# ---------------------------------------------------------------- no network, no package


@needs_yfinance
def test_without_network_one_line_in_seconds(monkeypatch):
    monkeypatch.setattr(yahoo, "getproxies", dict)
    over = threading.Event()

    def dropped(*_, **__):  # by a firewall
        over.wait(60)
        raise TimeoutError

    monkeypatch.setattr(socket, "create_connection", dropped)
    begun = time.monotonic()
    with pytest.raises(InputError, match=r"no connection.*--source file --path FILE.*SP500 and NASDAQ") as caught:
        load_ohlcv("SPY", "yahoo")
    assert time.monotonic() - begun < 10 and "\n" not in str(caught.value)
    over.set()


def test_without_yfinance_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "yfinance", None)
    with pytest.raises(InputError, match=r'pip install "finpatch\[market\]"'):
        load_ohlcv("SPY", "yahoo")
