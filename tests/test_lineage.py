"""G4, lineage. The risk: data changes under a name that results were published with, and nobody is told."""

import json
import random
import shutil
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from finpatch.core import InputError, file_digest
from finpatch.digest import read_frame, write_frame
from finpatch.features import code_sha256
from finpatch.manifest import (
    content_sha256,
    find_entry,
    lineage,
    load_frame,
    register_processed,
    register_raw,
    store_processed,
    store_raw,
    verify,
)

DAYS = pd.bdate_range("1999-01-04", periods=300, name="session")
RAW, FEATURES, DATASET = "SP500.OHLCV.daily", "SP500.features.a20", "SP500.dataset.a20"


def make_bars(seed=0):
    close = 1200 * np.exp(np.random.default_rng(seed).normal(0, 0.01, len(DAYS)).cumsum())
    return pd.DataFrame({"High": close * 1.01, "Low": close * 0.99, "Close": close, "Volume": 8e8}, index=DAYS)


def build(data, source="embedded"):
    "A chain of three generations, and an unrelated raw file beside it."
    bars = make_bars()
    features = np.log(bars[["High", "Low"]].div(bars["Close"], axis=0)).astype("float32").add_suffix("_rel")
    store_raw(data, RAW, bars, source={"name": source, "arch": "8.0.0"})
    store_raw(data, "NASDAQ.OHLCV.daily", make_bars(1), source={"name": "embedded", "arch": "8.0.0"})
    store_processed(data, FEATURES, features, tier="a20", parents=[RAW], code_sha256="c0de")
    dataset = features.join(bars)
    store_processed(data, DATASET, dataset, tier="a20", parents=[FEATURES, RAW], code_sha256="c0de")


def test_the_committed_manifest_names_the_code_that_is_here():
    "Else the first command of a new user warns that other code made the same values."
    entries = json.loads((Path(__file__).parent.parent / "data" / "processed" / "manifest.json").read_text())["entries"]
    named = {(e["dataset_id"], e["code_sha256"]) for e in entries}
    kinds = [(f"{symbol}.{kind}.{tier}", tier) for symbol in ("SP500", "NASDAQ") for kind in ("features", "dataset") for tier in ("a20", "raw6")]
    assert {(name, code_sha256(tier)) for name, tier in kinds} <= named, "build them again in an empty data folder, and commit the manifest"


def find_path(dataset_id):
    return f"{'raw' if 'OHLCV' in dataset_id else 'processed'}/{dataset_id}.v1.parquet"


def problems(findings):
    return sorted((finding["problem"], finding["path"]) for finding in findings)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    data = tmp_path_factory.mktemp("built") / "data"
    build(data)
    assert verify(data) == []
    return data


@pytest.fixture
def data(built, tmp_path):
    return shutil.copytree(built, tmp_path / "data")


# ---- accidents to files


@pytest.mark.parametrize("dataset_id", [RAW, FEATURES, DATASET])
def test_a_flipped_byte_anywhere_is_named(data, dataset_id):
    path, rng = data / find_path(dataset_id), random.Random(0)
    whole = path.read_bytes()
    for position in [0, len(whole) - 1, *rng.sample(range(len(whole)), 16)]:
        torn = bytearray(whole)
        torn[position] ^= 1 << rng.randrange(8)
        path.write_bytes(torn)
        for findings in (verify(data), verify(data, [DATASET])):
            assert problems(findings) == [("changed", find_path(dataset_id))], position
        assert findings[0]["expected"] != findings[0]["found"]
    path.write_bytes(whole)
    assert verify(data) == []


def test_a_byte_of_an_unrelated_file_concerns_only_a_full_check(data):
    path = data / "raw/NASDAQ.OHLCV.daily.v1.parquet"
    path.write_bytes(path.read_bytes()[:-1])
    assert problems(verify(data)) == [("changed", "raw/NASDAQ.OHLCV.daily.v1.parquet")]
    assert verify(data, [DATASET]) == []


def test_another_content_is_found_even_if_its_md5_was_made_to_fit(data):
    expected = find_entry(data, RAW)["content_sha256"]
    write_frame(make_bars(7), data / find_path(RAW))
    md5 = file_digest(data / find_path(RAW), "md5")
    edit(data, "raw", lambda book: book["entries"][1]["md5s"].append(md5))
    found = [each for each in verify(data) if each["problem"] == "changed"]
    assert [each["path"] for each in found] == [find_path(RAW)]
    assert expected in found[0]["expected"] and content_sha256(make_bars(7)) in found[0]["found"]


def test_a_missing_parent_is_named_with_its_children(data):
    (data / find_path(RAW)).unlink()
    children = [("parent_missing", find_path(each)) for each in (DATASET, FEATURES)]
    assert problems(verify(data)) == [("missing", find_path(RAW)), *children]
    assert all(RAW in each["expected"] for each in verify(data) if each["problem"] == "parent_missing")


def test_a_parent_without_an_entry_is_named(data):
    edit(data, "raw", lambda book: book["entries"].pop(1))
    found = problems(verify(data, [DATASET]))
    assert ("manifest_edited", "raw/manifest.json") in found
    assert ("unregistered", find_path(RAW)) in found
    assert [path for problem, path in found if problem == "parent_missing"] == [find_path(DATASET), find_path(FEATURES)]


@pytest.mark.parametrize(
    "name",
    ["raw/extra.parquet", "processed/deep/extra.parquet", "raw/notes.txt", "raw/SP500.OHLCV.daily.v9.parquet"],
)
def test_an_extra_file_is_named(data, name):
    (data / name).parent.mkdir(exist_ok=True)
    (data / name).write_bytes(b"x")
    assert problems(verify(data)) == problems(verify(data, [DATASET])) == [("unregistered", name)]


def test_hidden_files_are_no_finding(data):
    for name in ("raw/.gitkeep", "raw/.SP500.parquet.abc.tmp", "processed/.DS_Store", "ledger.jsonl"):
        (data / name).touch()
    assert verify(data) == []


# ---- a fresh clone


def test_a_fresh_clone_is_not_built_and_a_rebuild_proves_itself(data):
    before = {kind: (data / kind / "manifest.json").read_bytes() for kind in ("raw", "processed")}
    for path in data.rglob("*.parquet"):
        path.unlink()
    assert {problem for problem, _ in problems(verify(data))} == {"not_built"}
    assert len(verify(data)) == 4 and len(verify(data, [DATASET])) == 3
    build(data)
    assert verify(data) == []
    assert before == {kind: (data / kind / "manifest.json").read_bytes() for kind in ("raw", "processed")}


def test_what_cannot_be_built_again_is_missing(tmp_path):
    build(tmp_path, source="yahoo")
    for path in tmp_path.rglob("SP500*.parquet"):
        path.unlink()
    expected = [("missing", find_path(each)) for each in (RAW, FEATURES, DATASET)]
    expected += [("parent_missing", find_path(each)) for each in (FEATURES, DATASET, DATASET)]  # it has two parents
    assert problems(verify(tmp_path)) == sorted(expected)


# ---- accidents to manifests


def edit(data, kind, change):
    path = data / kind / "manifest.json"
    book = json.loads(path.read_text())
    change(book)
    path.write_text(json.dumps(book))


def places(value, at=()):
    "Every place in a JSON value, the inner ones included."
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, each in inner:
        yield (*at, name)
        yield from places(each, (*at, name))


@pytest.mark.parametrize("kind", ["raw", "processed"])
@pytest.mark.parametrize("how", ["replace", "remove"])
def test_every_edit_of_a_manifest_is_named(data, kind, how):
    path = data / kind / "manifest.json"
    whole = path.read_text()
    every = list(places(json.loads(whole)))
    assert len(every) > 30
    for place in every:
        inner = book = json.loads(whole)
        for step in place[:-1]:
            inner = inner[step]
        if how == "remove":
            del inner[place[-1]]
        else:
            inner[place[-1]] = f"{inner[place[-1]]}x" if isinstance(inner[place[-1]], str) else 7
        path.write_text(json.dumps(book))
        assert ("manifest_edited", f"{kind}/manifest.json") in problems(verify(data, [DATASET])), place
        with pytest.raises(InputError, match="must be as it was written"):
            load_frame(data, DATASET)


def test_nothing_is_written_to_an_edited_manifest(data):
    edit(data, "raw", lambda book: book["entries"][0].update(n_rows=1))
    before = (data / "raw" / "manifest.json").read_bytes()
    with pytest.raises(InputError, match="git checkout"):
        store_raw(data, "SPY.OHLCV.daily", make_bars(3), source={"name": "file"})
    assert (data / "raw" / "manifest.json").read_bytes() == before
    assert not (data / "raw" / "SPY.OHLCV.daily.v1.parquet").exists()


def test_a_manifest_that_is_gone_leaves_unregistered_files(data):
    (data / "processed" / "manifest.json").unlink()
    assert problems(verify(data)) == [("unregistered", find_path(DATASET)), ("unregistered", find_path(FEATURES))]


# ---- the digest, which other machines have to reach too


def test_the_digest_of_a_content_never_changes():
    "Computed with pandas 2.2 and pyarrow 17, and again with pandas 3.1 and pyarrow 26."
    days = pd.to_datetime(["1999-01-04", "1999-01-05", "2018-12-31"])
    columns = {
        "Close": [1228.1, 1244.78, np.nan],
        "rsi_14": np.array([0.5, np.inf, -0.0], "float32"),
        "n": [1, 2, 3],
        "is_stale": [True, False, True],
        "symbol": ["SP500", "é", ""],
        "seen": days,
    }
    frame = pd.DataFrame(columns, index=days)
    assert content_sha256(frame) == "6a788c679b93fac53cedb774f9a7e4a65d06cf6a201bb11968c8c604fc5813bf"


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_the_digest_knows_no_storage(tmp_path, unit):
    bars = make_bars()
    bars.index = bars.index.as_unit(unit)
    for options in ({"compression": "zstd"}, {"use_dictionary": False}, {"data_page_version": "2.0"}):
        bars.to_parquet(tmp_path / "bars.parquet", **options)
        assert content_sha256(read_frame(tmp_path / "bars.parquet")) == content_sha256(make_bars())
    assert content_sha256(bars.astype(">f8")) == content_sha256(bars)


# ---- versions


def test_equal_content_in_other_bytes_only_adds_an_md5(data):
    before, path = find_entry(data, RAW), data / find_path(RAW)
    for compression in ("gzip", "zstd", "gzip"):
        load_frame(data, RAW).to_parquet(path, compression=compression)
        if compression == "zstd":
            assert problems(verify(data)) == [("changed", find_path(RAW))]
        after = register_raw(data, RAW, path, source={"name": "file"})
    assert len(after["md5s"]) == 3 and after["md5s"][0] == before["md5s"][0]
    assert {**after, "md5s": 0, "entry_sha256": 0} == {**before, "md5s": 0, "entry_sha256": 0}
    assert verify(data) == []


def test_other_content_under_a_version_is_refused_and_the_next_one_offered(data):
    before = (data / find_path(RAW)).read_bytes()
    with pytest.raises(InputError) as error:
        store_raw(data, RAW, make_bars(1), source={"name": "embedded"})
    assert "version 2" in error.value.remedy and content_sha256(make_bars(1)) in error.value.found
    assert (data / find_path(RAW)).read_bytes() == before and verify(data) == []

    second = store_raw(data, RAW, make_bars(1), source={"name": "embedded"}, new_version=True)
    assert second["version"] == 2 and find_entry(data, RAW) == second
    assert content_sha256(load_frame(data, RAW, 1)) == content_sha256(make_bars())
    with pytest.raises(InputError, match="version 3"):
        store_raw(data, RAW, make_bars(), source={"name": "embedded"})
    write_frame(make_bars(2), data / find_path(RAW))
    with pytest.raises(InputError, match="version 3"):
        register_raw(data, RAW, data / find_path(RAW), source={}, version=1)


def test_other_parents_are_another_version(data):
    store_raw(data, RAW, make_bars(1), source={"name": "embedded"}, new_version=True)
    again = {"tier": "a20", "parents": [RAW], "code_sha256": "c0de"}
    with pytest.raises(InputError, match="instead of") as error:
        store_processed(data, FEATURES, load_frame(data, FEATURES), **again)
    assert f"{RAW} v2" in error.value.found and f"{RAW} v1" in error.value.found
    second = store_processed(data, FEATURES, load_frame(data, FEATURES), **again, new_version=True)
    assert second["version"] == 2 and second["parents"][0]["version"] == 2
    assert verify(data) == []


def test_other_code_with_equal_values_is_a_warning(data):
    before, frame = find_entry(data, FEATURES), load_frame(data, FEATURES)
    made = {"tier": "a20", "parents": [RAW]}
    with pytest.warns(UserWarning, match="expected c0de, found beef"):
        assert store_processed(data, FEATURES, frame, **made, code_sha256="beef") == before
    with pytest.warns(UserWarning, match="other code"):
        register_processed(data, FEATURES, data / before["path"], **made, code_sha256="beef")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store_processed(data, FEATURES, frame, **made, code_sha256="c0de")
    with pytest.raises(InputError, match="version 2"):
        store_processed(data, FEATURES, frame * 2, **made, code_sha256="beef")


# ---- another processor


def test_another_processor_may_differ_in_the_last_bits_only(data):
    frame, entry = load_frame(data, FEATURES), find_entry(data, FEATURES)
    made = {"tier": "a20", "parents": [RAW], "code_sha256": "c0de", "machine": "other"}
    for shift in (1e-3, 1e-4, 2e-6):
        moved = frame.copy()
        moved.iloc[123, 1] += np.float32(shift)
        with pytest.raises(InputError, match="differs by up to"):
            store_processed(data, FEATURES, moved, **made)
    flipped = frame.copy()
    flipped.iloc[::50] = np.nextafter(flipped.iloc[::50], np.float32(1))
    after = store_processed(data, FEATURES, flipped, **made)
    assert after["content_sha256"] == entry["content_sha256"] and list(after["platforms"]) == ["other"]
    assert verify(data) == []
    with pytest.raises(InputError, match="never changes"):
        store_raw(data, RAW, make_bars() * (1 + 1e-12), source={"name": "embedded"})


# ---- the walk


def test_the_walk_reaches_every_ancestor(data):
    assert [each["dataset_id"] for each in lineage(data, DATASET)] == [DATASET, FEATURES, RAW]
    parent, frame = DATASET, load_frame(data, FEATURES)
    for generation in range(5):
        name = f"SP500.extra{generation}.a20"
        made = {"tier": "a20", "parents": [parent, RAW], "code_sha256": "c0de"}
        store_processed(data, name, frame * (generation + 2), **made)
        parent = name
    assert len(lineage(data, parent)) == 8
    path = data / find_path(FEATURES)
    path.write_bytes(path.read_bytes()[:-1])
    assert problems(verify(data, [parent])) == [("changed", find_path(FEATURES))]


def test_a_parent_that_was_replaced_is_named(data, tmp_path):
    "A raw folder that is consistent in itself, but not the one that the features came from."
    other = tmp_path / "other"
    store_raw(other, RAW, make_bars(5), source={"name": "embedded"})
    shutil.rmtree(data / "raw")
    shutil.copytree(other / "raw", data / "raw")
    findings = verify(data)
    assert problems(findings) == [("parent_changed", find_path(DATASET)), ("parent_changed", find_path(FEATURES))]
    assert content_sha256(make_bars()) in findings[0]["expected"]
    assert content_sha256(make_bars(5)) in findings[0]["found"]


def test_nothing_is_computed_from_a_file_that_changed(data):
    write_frame(make_bars(9), data / find_path(RAW))
    with pytest.raises(InputError, match=content_sha256(make_bars())):
        load_frame(data, RAW)


def test_a_parent_must_be_registered(data):
    with pytest.raises(InputError, match="Did you mean `SP500.OHLCV.daily`"):
        store_processed(data, "SP500.x.a20", make_bars(), tier="a20", parents=["SP500.OHLC.daily"], code_sha256="c0de")
