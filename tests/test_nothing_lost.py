"""G9, nothing lost. The risk: a kill, a full disk or a second writer leaves half a file under a name that is trusted."""

import errno
import logging
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from finpatch.digest import content_sha256, read_frame, write_frame
from finpatch.lineage import inspect
from finpatch.lock import LockedError, exclusive
from finpatch.manifest import describe, enter, find_entry, load_frame, store_processed, store_raw, verify

RAW, FEATURES = "SP500.OHLCV.daily", "SP500.features.a20"
SOURCE = {"name": "embedded"}
N_ROWS = 10_000
context = multiprocessing.get_context("forkserver")  # children start in milliseconds
context.set_forkserver_preload(["finpatch.manifest", "pytest"])


def make_frame(seed, n_rows=N_ROWS):
    values = np.random.default_rng(seed).normal(size=(n_rows, 4))
    return pd.DataFrame(values, columns=list("abcd"), index=pd.date_range("1900-01-01", periods=n_rows, name="session"))


def store_both(data, frame, **kw):
    store_raw(data, RAW, frame, source=SOURCE, new_version=True, **kw)
    made = {"tier": "a20", "parents": [RAW], "code_sha256": "c0de"}
    return store_processed(data, FEATURES, frame / 2, **made, new_version=True, **kw)


def assert_whole(data, allowed=()):
    "Every final name holds a whole file; one that no entry names yet only where allowed."
    findings = verify(data)
    assert {finding["problem"] for finding in findings} <= set(allowed), findings
    assert all(len(read_frame(data / finding["path"])) == N_ROWS for finding in findings)


# ---- kills


def write_for_ever(data, seed, started):
    frames = [make_frame(seed + i) for i in range(4)]
    for i in range(1_000_000):
        store_both(data, frames[i % 4])
        started.set()


@pytest.mark.soak
def test_twenty_kills_at_random_moments(tmp_path):
    rng, n_torn, n_versions = random.Random(0), 0, 0
    for kill in range(20):
        data = tmp_path / f"data{kill // 4}"
        data.mkdir(exist_ok=True)
        started = context.Event()
        child = context.Process(target=write_for_ever, args=(data, 10 * kill, started))
        child.start()
        assert started.wait(60)
        time.sleep(rng.uniform(0, 0.2))
        child.kill()
        child.join()
        n_torn += len(list(data.rglob(".*.tmp")))
        assert_whole(data, allowed=["unregistered"])
        n_versions += store_both(data, make_frame(1000 + kill), timeout_s=1)["version"]
        assert_whole(data)
        assert content_sha256(load_frame(data, RAW)) == content_sha256(make_frame(1000 + kill))
        assert not list(data.rglob(".*.tmp"))
    assert n_versions > 50, "the children got nothing done, so the kills proved nothing"
    assert n_torn > 0, "no kill came during a write, so the kills proved nothing"


def die_at(data, seed, module, name):
    setattr(sys.modules[module], name, lambda *args, **kw: os.kill(os.getpid(), signal.SIGKILL))
    store_raw(data, RAW, make_frame(seed), source=SOURCE, new_version=True)


def kill_at(data, seed, module, name):
    "Store a frame in a child that dies when it calls the function."
    child = context.Process(target=die_at, args=(data, seed, module, name))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL


def test_killed_before_the_rename_nothing_has_happened(tmp_path):
    kill_at(tmp_path, 0, "os", "replace")
    assert [path.suffix for path in (tmp_path / "raw").iterdir()] == [".tmp"]
    assert verify(tmp_path) == []
    store_raw(tmp_path, RAW, make_frame(0), source=SOURCE)
    assert_whole(tmp_path)
    assert not list(tmp_path.rglob(".*.tmp"))


@pytest.mark.parametrize("name", ["enter", "write_entries"])
def test_killed_between_file_and_manifest_the_file_is_adopted(tmp_path, caplog, name):
    kill_at(tmp_path, 0, "finpatch.manifest", name)
    path = tmp_path / "raw" / f"{RAW}.v1.parquet"
    assert [finding["problem"] for finding in verify(tmp_path)] == ["unregistered"]
    inode = path.stat().st_ino
    with caplog.at_level(logging.WARNING, "finpatch"):
        assert store_raw(tmp_path, RAW, make_frame(0), source=SOURCE)["version"] == 1
    assert "adopted" in caplog.text and path.stat().st_ino == inode
    assert_whole(tmp_path)


@pytest.mark.parametrize("torn", [None, b"PAR1 half"])
def test_an_orphan_that_is_not_what_was_wanted_is_replaced(tmp_path, caplog, torn):
    kill_at(tmp_path, 0, "finpatch.manifest", "enter")
    if torn:
        (tmp_path / "raw" / f"{RAW}.v1.parquet").write_bytes(torn)
    with caplog.at_level(logging.WARNING, "finpatch"):
        store_raw(tmp_path, RAW, make_frame(1), source=SOURCE)
    assert "replaced" in caplog.text and "adopted" not in caplog.text
    assert content_sha256(load_frame(tmp_path, RAW)) == content_sha256(make_frame(1))
    assert_whole(tmp_path)


def test_an_orphan_of_the_next_version_is_adopted(tmp_path, caplog):
    store_raw(tmp_path, RAW, make_frame(0), source=SOURCE)
    kill_at(tmp_path, 1, "finpatch.manifest", "enter")
    assert find_entry(tmp_path, RAW)["version"] == 1
    with caplog.at_level(logging.WARNING, "finpatch"):
        assert store_raw(tmp_path, RAW, make_frame(1), source=SOURCE, new_version=True)["version"] == 2
    assert "adopted" in caplog.text
    assert_whole(tmp_path)


def test_a_registered_file_that_was_damaged_is_written_again(tmp_path, caplog):
    path = tmp_path / store_raw(tmp_path, RAW, make_frame(0), source=SOURCE)["path"]
    before = (tmp_path / "raw" / "manifest.json").read_bytes()
    path.write_bytes(path.read_bytes()[:1000])
    with caplog.at_level(logging.WARNING, "finpatch"):
        store_raw(tmp_path, RAW, make_frame(0), source=SOURCE)
    assert "replaced" in caplog.text
    assert_whole(tmp_path)
    assert (tmp_path / "raw" / "manifest.json").read_bytes() == before


# ---- a full disk


def store_in_little_room(data, n_bytes, result):
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))
    try:
        store_raw(data, RAW, make_frame(1), source=SOURCE, new_version=True)
    except OSError as error:
        result.put(error.errno)


def test_a_file_that_does_not_fit_leaves_everything_as_it_was(tmp_path):
    "The kernel itself cuts the write off after 50 kB."
    store_raw(tmp_path, RAW, make_frame(0), source=SOURCE)
    before = {path.name: path.read_bytes() for path in (tmp_path / "raw").iterdir()}
    result = context.SimpleQueue()
    child = context.Process(target=store_in_little_room, args=(tmp_path, 50_000, result))
    child.start()
    child.join(60)
    assert child.exitcode == 0 and not result.empty() and result.get() == errno.EFBIG
    assert {path.name: path.read_bytes() for path in (tmp_path / "raw").iterdir()} == before
    assert store_raw(tmp_path, RAW, make_frame(1), source=SOURCE, new_version=True, timeout_s=1)["version"] == 2
    assert_whole(tmp_path)


@pytest.mark.parametrize(
    "step",
    ["pyarrow.parquet.write_table", "finpatch.core.flush", "os.replace", "finpatch.entries.write_json"],
)
def test_a_disk_that_fills_up_at_any_step_loses_nothing(tmp_path, monkeypatch, step):
    def full(*args, **kw):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    store_raw(tmp_path, RAW, make_frame(0), source=SOURCE)
    with monkeypatch.context() as patch:
        patch.setattr(step, full)
        with pytest.raises(OSError, match="No space left"):
            store_raw(tmp_path, RAW, make_frame(1), source=SOURCE, new_version=True)
    assert_whole(tmp_path, allowed=["unregistered"])
    assert find_entry(tmp_path, RAW)["version"] == 1 and not list(tmp_path.rglob(".*.tmp"))
    assert store_raw(tmp_path, RAW, make_frame(1), source=SOURCE, new_version=True, timeout_s=1)["version"] == 2
    assert_whole(tmp_path)


# ---- several writers


def hold(data, ready):
    with exclusive(data):
        ready.set()
        time.sleep(60)


def test_a_held_lock_names_its_holder_and_a_dead_holder_holds_nothing(tmp_path, caplog):
    ready = context.Event()
    child = context.Process(target=hold, args=(tmp_path, ready))
    child.start()
    assert ready.wait(60)
    started = time.monotonic()
    with pytest.raises(LockedError) as error:
        store_raw(tmp_path, RAW, make_frame(0), source=SOURCE, timeout_s=0.3)
    assert 0.3 <= time.monotonic() - started < 5
    assert f"process {child.pid} on " in error.value.found and " since 20" in error.value.found
    assert not (tmp_path / "raw").exists()
    child.kill()
    child.join()
    with caplog.at_level(logging.WARNING, "finpatch"):
        store_raw(tmp_path, RAW, make_frame(0), source=SOURCE, timeout_s=1)
        assert f"process {child.pid}" in caplog.text and "ended without releasing" in caplog.text
        caplog.clear()
        store_raw(tmp_path, RAW, make_frame(0), source=SOURCE, timeout_s=1)
        assert not caplog.text
    assert_whole(tmp_path)


def store_many(data, writer, n):
    for i in range(n):
        store_raw(data, f"W{writer}.OHLCV.daily", make_frame(i, 50), source=SOURCE, new_version=True)
        store_raw(data, "SHARED.OHLCV.daily", make_frame(100 * writer + i, 50), source=SOURCE, new_version=True)


def test_concurrent_writers_lose_no_entry(tmp_path):
    workers = [context.Process(target=store_many, args=(tmp_path, writer, 5)) for writer in range(3)]
    workers += [threading.Thread(target=store_many, args=(tmp_path, writer, 5)) for writer in (3, 4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert verify(tmp_path) == []
    assert [find_entry(tmp_path, f"W{writer}.OHLCV.daily")["version"] for writer in range(5)] == [5] * 5
    assert find_entry(tmp_path, "SHARED.OHLCV.daily")["version"] == 25


def test_verify_waits_for_the_entry_of_a_file_that_was_just_written(tmp_path):
    path, placed, is_looked_at = tmp_path / "raw" / f"{RAW}.v1.parquet", threading.Event(), threading.Event()

    def write():
        with exclusive(tmp_path):
            write_frame(make_frame(2), path)
            placed.set()
            is_looked_at.wait(10)
            enter(tmp_path, "raw", path, describe(RAW, make_frame(2), {"source": SOURCE, "accepted": []}))

    writer = threading.Thread(target=write)
    writer.start()
    assert placed.wait(10)
    assert [finding["problem"] for finding in inspect(tmp_path, None)] == ["unregistered"]
    threading.Timer(0.3, is_looked_at.set).start()
    assert verify(tmp_path) == []
    writer.join()


def test_git_takes_the_manifests_and_nothing_else(tmp_path):
    store_both(tmp_path, make_frame(0, 50))
    (tmp_path / "raw" / ".SP500.OHLCV.daily.v1.parquet.abc.tmp").touch()
    with exclusive(tmp_path):
        names = {f"data/{path.relative_to(tmp_path).as_posix()}" for path in tmp_path.rglob("*") if path.is_file()}
    assert len(names) == 7
    root = Path(__file__).parents[1]
    asked = subprocess.run(["git", "check-ignore", *names], check=False, cwd=root, capture_output=True, text=True)
    if asked.returncode > 1:
        pytest.skip(f"not a git checkout: {asked.stderr.strip()}")
    assert names - set(asked.stdout.split()) == {"data/raw/manifest.json", "data/processed/manifest.json"}
