"""G8, hardware truth. The risk: a micro-batch that was found to fit runs out of memory in the fit, at night; or a search
that was killed leaves a process behind that holds the memory."""

import math
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finpatch import batch_size, probe
from finpatch.batch_size import (
    choose_micro_batch,
    describe_result,
    find_batch_size,
    make_fits,
    pose,
    store_path,
    stored_answer,
)
from finpatch.core import HardwareError, read_json, write_json
from finpatch.experiment import ComputeConfig, load_experiment_config
from finpatch.memory import HAS_DATA_LIMIT, steady_memory
from finpatch.model_config import PatchTSTConfig
from finpatch.probe import Probe, run_probe
from finpatch.run import train_run
from finpatch.sizes import LEAST_GIB, MARGIN, MOST, cut_step, find_knee, largest_fitting, search

pytestmark = pytest.mark.timeout(900)  # each probe loads torch anew, which takes long on a busy machine
needs_limit = pytest.mark.skipif(
    not (HAS_DATA_LIMIT and steady_memory()), reason="RLIMIT_DATA and mallopt are Linux's with glibc"
)


def made_up(limit_gib, base_gib, window_gib, floor_gib=0.0, hidden_gib=0.0, fixed_s=0.1):
    def fits(n, spare_gib=0.0):
        used = max(floor_gib, base_gib + window_gib * n)
        is_in = used + hidden_gib + spare_gib <= limit_gib
        return Probe(micro_batch_size=n, fits=is_in, peak_mem_gib=used, step_s=fixed_s + n / 100)

    return fits


def true_limit(fits, most):
    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle).fits else (low, middle)
    return low


# ---- the search, on made-up devices


@given(room=st.floats(0.3, 50), window=st.floats(1e-4, 0.05), floor=st.floats(0, 0.02), hidden=st.floats(-0.02, 0.02))
def test_the_answer_of_eight_probes_is_within_five_percent_and_leaves_its_margin(room, window, floor, hidden):
    base, most = 0.3, 1024
    limit = base + room
    fits = made_up(limit, base, window, base + floor * room, hidden * room)
    probes, true = search(fits, limit, most), true_limit(fits, most)
    found = largest_fitting(probes)
    assert len(probes) <= MOST
    assert len({p.micro_batch_size for p in probes}) == len(probes), "the same size twice"
    assert found >= min(math.floor(0.95 * true), 0.98 * (true - LEAST_GIB / window) - 1), f"{found} of {true}"
    used = max(base + floor * room, base + window * found) + hidden * room
    assert found == 0 or used + LEAST_GIB <= limit + 1e-9, "no room for what a run keeps and a rehearsal does not"
    if found > 64 and found * window > floor * room:  # beyond the two probes that draw the line
        assert used + 0.9 * MARGIN * window * found <= limit


@given(
    room=st.floats(0.02, 50),
    window=st.floats(1e-4, 0.05),
    floor=st.floats(0, 0.5),
    hidden=st.floats(-0.1, 0.1),
    most=st.integers(1, 2000),
)
def test_no_device_however_odd_gets_a_size_that_does_not_fit(room, window, floor, hidden, most):
    limit = 0.3 + room
    fits = made_up(limit, 0.3, window, 0.3 + floor * room, hidden * room)
    probes = search(fits, limit, most)
    assert largest_fitting(probes) <= true_limit(fits, most)
    assert len(probes) <= MOST


@pytest.mark.parametrize("fixed_s", [0.0, 0.05, 0.5, 50.0])
def test_the_knee_is_nearly_as_fast_and_nearly_the_smallest(fixed_s):
    fits = made_up(100.0, 0.3, 1e-3, fixed_s=fixed_s)
    result = describe_result(fits, 100.0, "mem_cap")
    rate = lambda n: n / fits(n).step_s
    assert rate(result["knee"]) >= 0.9 * rate(1024)
    smallest = next(n for n in range(1, 1025) if rate(n) >= 0.9 * rate(1024))
    assert result["knee"] <= 2 * smallest
    assert result["recommended"] == min(result["knee"], result["largest_safe"])
    assert len(result["probes"]) <= MOST


@given(step=st.integers(1, 5000), largest=st.integers(1, 5000))
def test_a_step_is_cut_into_the_fewest_parts_and_hardly_filled_up(step, largest):
    size = cut_step(step, largest)
    assert 1 <= size <= largest
    parts = math.ceil(step / size)
    assert parts == math.ceil(step / largest)
    assert size * parts - step < parts, "a window or less for nothing in each part"


# ---- real probes under a cap, and real fits


def loaded_gib():
    "What a process has before it trains: torch built for CUDA takes half a GiB more than torch built for the CPU."
    code = "import finpatch.probe, finpatch.run, finpatch.memory as m; print(m.own_memory_gib()[0])"
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


CONFIG = PatchTSTConfig(  # much memory, little arithmetic
    n_features=20,
    context_length=60,
    patch_length=2,
    stride=1,
    d_model=16,
    n_heads=8,
    n_layers=6,
    d_ff=16,
    head_dropout=0.1,
)
MODEL = "d_model: 16\nn_heads: 8\nn_layers: 6\nd_ff: 16\n"
FIT = """
import sys
from finpatch.memory import cap_own_memory
cap_own_memory(float(sys.argv[1]))
from dataclasses import replace
from finpatch.experiment import load_experiment_config
from finpatch.run import train_run
n = int(sys.argv[2])
config = load_experiment_config("sp500_direction")
config = replace(config, model=replace(config.model, patch_length=2, stride=1))
config = replace(config, optim=replace(config.optim, global_batch_size=2 * n, max_steps=2))
config = replace(config, compute=replace(config.compute, checkpoint_every_s=0.0))
where = {"data_dir": sys.argv[4], "run_dir": sys.argv[5], "device": "cpu"}
train_run(config, sys.argv[3], micro_batch_size=n, conclude=lambda *args: {"status": "done"}, **where)
print("trained")
"""


def start_fit(cap_gib, n, data_dir, folder):
    "Begin a run that accumulates, validates, watches the heat and writes a checkpoint after each step, under the cap."
    folder.mkdir()
    (folder / "model.yaml").write_text(MODEL)
    words = [cap_gib, n, folder / "model.yaml", data_dir, folder / "run"]
    return subprocess.Popen([sys.executable, "-c", FIT, *map(str, words)], stdout=-1, stderr=-1, text=True)


@pytest.mark.soak
@needs_limit
def test_the_answer_under_a_cap_is_close_to_the_limit_and_every_fit_at_it_survives(data_dir, tmp_path):
    cap = round(loaded_gib() + 0.7, 2)  # reached before 1,024 windows, the most that `search` looks at
    question = pose(CONFIG, "cpu", mem_cap_gib=cap)
    assert question.limit == (cap, "mem_cap"), "this machine has too little memory free for the test"
    probes = search(make_fits(question, cap, lambda probe: None), cap)
    found, seen = largest_fitting(probes), [(p.micro_batch_size, p.fits, p.peak_mem_gib) for p in probes]
    assert len(probes) <= MOST and found > 100, seen
    assert find_knee(probes) <= found
    above = start_fit(cap, math.ceil(1.05 * found), data_dir, tmp_path / "above")
    fits = [start_fit(cap, found, data_dir, tmp_path / str(i)) for i in range(3)]
    ends = [(fit.communicate(), fit.returncode) for fit in (*fits, above)]  # all, so that none outlives a failure
    for (said, errors), status in ends[:-1]:
        assert (status, said) == (0, "trained\n"), f"{found} windows, after {seen}: {errors[-600:]}"
    errors = ends[-1][0][1]
    assert above.returncode != 0 and "memory" in errors.lower(), f"{math.ceil(1.05 * found)} fit, after {seen}"


@pytest.mark.parametrize(
    "text, is_starved", [(probe.NO_THREAD_DATA + ": ABORT", True), ("cannot open shared object", False)]
)
def test_where_the_c_library_gives_up_for_want_of_memory_it_is_out_of_memory(text, is_starved, tmp_path, monkeypatch):
    "It ends the child with status 127 and no exception; another end with that status is a fault."
    (tmp_path / "python").write_text(f"#!/bin/sh\necho '{text}' >&2\nexit 127\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    if is_starved:
        assert not run_probe(CONFIG, 16, cap_gib=4).fits
    else:
        with pytest.raises(HardwareError, match="exit status 127"):
            run_probe(CONFIG, 16, cap_gib=4)


# ---- no child left behind

PARENT = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background is started deaf to it
from finpatch.model_config import PatchTSTConfig
from finpatch.probe import run_probe
run_probe(PatchTSTConfig(n_features=20, context_length=60), 2048, cap_gib=8)  # long work, if let
"""


def wait_for(condition, timeout_s=120):
    end = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return value


def test_the_child_ends_with_its_parent():
    "All at once, since most of the time goes into loading torch."
    kinds = [(signal.SIGKILL, False), (signal.SIGKILL, True), (signal.SIGINT, True), (signal.SIGTERM, True)]
    parents = [subprocess.Popen([sys.executable, "-c", PARENT], stderr=subprocess.DEVNULL) for _ in kinds]
    children = [wait_for(psutil.Process(parent.pid).children)[0] for parent in parents]
    for (kind, is_busy), parent, child in zip(kinds, parents, children, strict=True):
        if is_busy:  # the model is built and steps are under way
            wait_for(lambda child=child: child.memory_info().rss > 5 * 2**27)
        assert parent.poll() is None and child.is_running()
        os.kill(parent.pid, kind)
        assert parent.wait(60) != 0
        wait_for(lambda child=child: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, timeout_s=6)


@pytest.mark.parametrize("kills, is_starved", [([7, 8], True), ([None, None], True), ([7, 7], False)])
def test_only_a_kill_that_the_kernel_counts_is_out_of_memory(kills, is_starved, monkeypatch):
    me, ends = psutil.Process(), []
    counts = iter(kills)
    monkeypatch.setattr(probe, "count_kills", lambda: next(counts))

    def ask():
        try:
            ends.append(run_probe(CONFIG, 64, cap_gib=4))
        except HardwareError as error:
            ends.append(error)

    others = me.children()
    thread = threading.Thread(target=ask)
    thread.start()
    wait_for(lambda: [c for c in me.children() if c not in others])[0].kill()
    thread.join(60)
    if is_starved:
        assert ends == [Probe(micro_batch_size=64, fits=False, peak_mem_gib=None, step_s=None)]
    else:
        assert "exit status -9" in str(ends[0])


# ---- what is kept and used


def test_a_stored_answer_needs_the_memory_that_it_needed(tmp_path, monkeypatch):
    fits = made_up(10.0, 1.0, 0.01)
    monkeypatch.setattr(batch_size, "make_fits", lambda *args: fits)
    limits = iter([10.0, 10.0, 0.5])
    monkeypatch.setattr(batch_size, "memory_limit", lambda *args: (next(limits), "machine"))
    question = pose("20k", "cpu", 6)
    answer = find_batch_size(question, store_dir=tmp_path)
    assert stored_answer(question, tmp_path) == answer
    assert stored_answer(question, tmp_path) is None, "half a gibibyte is free, and it needs more than one"
    others = [pose("30k", "cpu", 6), replace(question, mem_fraction=0.5), replace(question, n_rows=6000)]
    others.append(replace(question, compute=ComputeConfig(precision="bf16")))
    assert not any(stored_answer(other, tmp_path) for other in others)


def test_auto_takes_the_stored_answer_and_the_step_stays(data_dir, tmp_path):
    config = load_experiment_config("sp500_direction")
    config = replace(config, optim=replace(config.optim, max_steps=2), thermal=None)
    probes = [{"micro_batch_size": 30, "fits": True, "peak_mem_gib": 0.1, "step_s": 0.1}]
    write_json(store_path(pose("5k", "cpu"), tmp_path), {"largest_safe": 999, "recommended": 30, "probes": probes})
    where = {"data_dir": data_dir, "runs_dir": tmp_path, "device": "cpu", "is_progress_shown": False}
    run_dir = train_run(config, "5k", micro_batch_size="auto", conclude=lambda *args: {"status": "done"}, **where)
    record = read_json(run_dir / "run.json")
    assert record["micro_batch_size"] == 22, "64 in three parts"
    assert record["config"]["optim"]["global_batch_size"] == 64


def test_auto_asks_once_and_keeps_the_answer(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(batch_size, "make_fits", lambda *args: asked.append(1) or made_up(2.0, 0.3, 0.001))
    question = pose("20k", "cpu", mem_cap_gib=2.0)
    first = choose_micro_batch(question, 64, tmp_path)
    assert (choose_micro_batch(question, 64, tmp_path), len(asked)) == (first, 1)
