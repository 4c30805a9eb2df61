"""G4, G7, G9 of a study on a cluster. Risk: a machine that is lost takes results along, a byte that changes on the way is
trained on, the table depends on where cells ran, or processes stay behind.

Two machines of a Ray cluster are played by two nodes on this one, which share no folder that the test looks into but the
study's. What travels and how a cell asks for memory is shown in the notebooks `sent` and `cluster`.
"""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import study_worker
from processes import marked
from study_worker import QUIET, STUDY, HoldUntil

from finpatch import cluster as cluster_module
from finpatch import flight
from finpatch.cell import Source
from finpatch.cluster import collect_data, work_on_cluster
from finpatch.config import dump_yaml
from finpatch.core import InputError, read_json
from finpatch.ledger import read_looks
from finpatch.plan import Plan
from finpatch.pool import CLOCK
from finpatch.sampler import RangeConfig
from finpatch.search import SearchConfig, run_search
from finpatch.study import run_study, settle

pytest.importorskip("ray", reason='Ray is not installed: `pip install "finpatch[cluster]"`')
from ray import cloudpickle
from ray.cluster_utils import Cluster

cloudpickle.register_pickle_by_value(study_worker)  # the other machines have no tests

ALONE = dataclasses.replace(STUDY, axes=dataclasses.replace(STUDY.axes, budgets=("2k", "4k"), n_seeds=1))


@pytest.fixture(scope="module")
def whole(raw6_dir, tmp_path_factory):
    "The study in this process alone."
    return run_study(ALONE, data_dir=raw6_dir, study_dir=tmp_path_factory.mktemp("whole"), **QUIET)


@pytest.fixture(scope="module")
def machines():
    "A head that runs no cell, and two machines of one processor each."
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    yield cluster, nodes
    cluster.shutdown()


def table(study_dir):
    return pd.read_parquet(study_dir / "results.parquet").drop(columns=[*CLOCK])


def training(folder):
    "The folders of the cells that have sent a checkpoint and no result."
    sent = {p.parent.parent for p in folder.glob("cells/*/checkpoints/step-*.json")}
    return {d for d in sent if not (d / "result.json").exists()}


def losses(caplog):
    return [r for r in caplog.records if "lost its worker and goes on elsewhere" in r.getMessage()]


def test_a_study_loses_a_machine_and_ends_with_the_table_of_one_process(raw6_dir, whole, machines, tmp_path, caplog):
    cluster, nodes = machines
    study_dir, plan, before = tmp_path / "study", Plan(ALONE, Source(raw6_dir, "cpu")), len(read_looks(raw6_dir / "ledger.jsonl"))
    noticed, first = tmp_path / "noticed", next(whole.glob("cells/*/result.json"))
    shutil.copytree(first.parent, study_dir / "cells" / first.parent.name)  # one is finished before the loss

    def kill():
        "End a machine while both train and have sent a checkpoint; hold them until it is noticed."
        if len(nodes) == 2 and len(training(study_dir)) == 2:
            cluster.remove_node(nodes.pop(), allow_graceful=False)
        if losses(caplog):
            noticed.touch()

    how = {"is_cooled": False, "checkpoint_every_s": 0.0, "callbacks": (HoldUntil(noticed),)}
    ended = work_on_cluster(plan, study_dir, cluster.address, on_poll=kill, **how)
    assert ended == {"is_stopped": False, "failed": {}} and losses(caplog)
    assert settle(plan, study_dir, ended)["status"] == "done"
    pd.testing.assert_frame_equal(table(study_dir), table(whole))
    for name in ("losses.parquet", "predictions.parquet"):
        assert pd.read_parquet(study_dir / name).equals(pd.read_parquet(whole / name))
    results = [read_json(p) for p in study_dir.glob("cells/*/result.json")]
    assert any(r.get("resumed_from_step") for r in results), "the lost cell began anew"
    assert (study_dir / "cells" / first.parent.name / "result.json").read_bytes() == first.read_bytes(), "it was made again"
    assert len(read_looks(raw6_dir / "ledger.jsonl")) == before, "a trial of `whole` was counted again"
    assert not [*study_dir.glob("cells/*/checkpoints/*.safetensors")]


def test_a_bit_that_changes_on_the_way_is_an_error_that_names_the_dataset(raw6_dir, machines, tmp_path, monkeypatch):
    def changed(plan):
        sent = collect_data(plan)
        frame = sent["frames"]["SP500.dataset.raw6"].copy()
        frame.iloc[-1, 0] = np.nextafter(frame.iloc[-1, 0], np.inf, dtype=frame.dtypes.iloc[0])
        return sent | {"frames": {"SP500.dataset.raw6": frame}}

    monkeypatch.setattr(cluster_module, "collect_data", changed)
    plan = Plan(ALONE, Source(raw6_dir, "cpu"))
    with pytest.raises(InputError, match="SP500.dataset.raw6 must arrive with the content"):
        work_on_cluster(plan, tmp_path / "study", machines[0].address, is_cooled=False)
    assert not [*(tmp_path / "study").glob("cells/*/result.json")]


def test_a_cell_that_no_machine_can_hold_stays_open_with_the_reason(raw6_dir, machines, tmp_path, monkeypatch):
    monkeypatch.setattr(flight, "WORKER_GIB", 1e6)
    ended = work_on_cluster(Plan(ALONE, Source(raw6_dir, "cpu")), tmp_path / "study", machines[0].address, is_cooled=False)
    assert not ended["is_stopped"] and len(ended["failed"]) == 8
    assert all("no machine of the cluster has 1 CPU, 0 GPU and 1000000.0 GiB" in x for x in ended["failed"].values())


def test_a_search_loses_a_machine_and_makes_the_trials_of_one_process(raw6_dir, machines, tmp_path, caplog):
    (tmp_path / "study.yaml").write_text(dump_yaml(ALONE))
    decay = RangeConfig(key="optim.weight_decay", low=1e-3, high=0.5, is_log=True)
    config = SearchConfig(study=str(tmp_path / "study.yaml"), space=(decay,), n_trials=5, round_size=2)
    (cluster, nodes), flown, noticed = machines, tmp_path / "flown", tmp_path / "noticed"
    while len(nodes) < 2:
        nodes.append(cluster.add_node(num_cpus=1))

    def wait(is_so):
        deadline = time.monotonic() + 60
        while not is_so() and time.monotonic() < deadline:
            time.sleep(0.02)

    def kill():
        "End a machine while both train and have sent a checkpoint; hold them until it is noticed."
        wait(lambda: len(training(flown)) == 2)
        cluster.remove_node(nodes.pop(), allow_graceful=False)
        wait(lambda: losses(caplog))
        noticed.touch()

    how = {"data_dir": raw6_dir, "device": "cpu", "is_cooled": False, "is_progress_shown": False}
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(kill)
        held = {"checkpoint_every_s": 0.0, "callbacks": (HoldUntil(noticed),)}
        run_search(config, "2k", search_dir=flown, executor="ray", address=cluster.address, **how, **held)
        ended.result(timeout=150)
    run_search(config, "2k", search_dir=tmp_path / "alone", **how)
    results = [read_json(d / "result.json") for d in (flown, tmp_path / "alone")]
    assert results[0]["status"] == results[1]["status"] == "done" and results[0]["trials"] == results[1]["trials"]
    assert [r["kind"] for r in results[0]["trials"]] == ["grid"] * 3 + ["sampled"] * 2
    assert losses(caplog)


def start_command(raw6_dir, tmp_path):
    "Start the command on a cluster of its own, and wait for its first result."
    (tmp_path / "tiny.yaml").write_text(dump_yaml(ALONE))
    words = ["study", "--config", str(tmp_path / "tiny.yaml"), "--data-dir", str(raw6_dir), "--run-dir", str(tmp_path / "study")]
    mark = f"FINPATCH_TEST_{uuid.uuid4().hex}"
    command = [sys.executable, "-m", "finpatch", *words, "--executor", "ray", "--workers", "1", "--device", "cpu", "--no-thermal"]
    child = subprocess.Popen(command, env=os.environ | {mark: "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 200
    while not [*tmp_path.glob("study/cells/*/result.json")] and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    return child, mark


def wait_until_gone(mark, seconds):
    deadline = time.monotonic() + seconds
    while marked(mark) and time.monotonic() < deadline:
        time.sleep(0.1)
    return marked(mark)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
def test_the_command_that_is_terminated_leaves_no_process_and_goes_on_without_the_cluster(raw6_dir, whole, tmp_path):
    child, mark = start_command(raw6_dir, tmp_path)
    assert len(marked(mark)) > 3, "no cluster was running"
    child.send_signal(signal.SIGTERM)
    out, err = child.communicate(timeout=100)
    assert child.returncode == 3, err
    assert "Go on with the same command" in out
    assert not wait_until_gone(mark, 20)
    state = read_json(tmp_path / "study" / "state.json")
    assert (state["status"], state["failed"]) == ("stopped", {}) and 0 < state["n_open"] < state["n_cells"]
    run_study(ALONE, data_dir=raw6_dir, study_dir=tmp_path / "study", **QUIET)
    pd.testing.assert_frame_equal(table(tmp_path / "study"), table(whole))


@pytest.mark.soak
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
def test_the_command_that_is_killed_leaves_no_process(raw6_dir, tmp_path):
    "The cell ends within seconds; two processes of Ray look for their parent about once a minute."
    child, mark = start_command(raw6_dir, tmp_path)
    assert len(marked(mark)) > 3
    child.kill()
    child.communicate(timeout=100)
    assert not wait_until_gone(mark, 150)
