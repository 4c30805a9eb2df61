"""G3, G5, G6, G9 of a study. Risk: days of cells lost to a kill, a cell that survives a change of what made it, a setting
that decides nothing, a verdict on cells that nobody meant to compare.

The notebooks show the plan, the workers and the pool at work. Here a study is killed at random moments and must end with
the table of one that was not; the key of a cell is held against everything that decides it.
"""

import ast
import dataclasses
import json
import os
import random
import shutil
import signal
import tempfile
import threading
import time
from datetime import date
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from study_worker import CONTEXT, QUIET, STUDY, parent_of_worker, study_in_child

import finpatch
from finpatch import cell as cell_module
from finpatch import scaling
from finpatch.cell import BASELINE_CODE, CODE, Cell, Source, cell_key, limited_threads, run_cell
from finpatch.cli import main
from finpatch.collect import build_many, fetch_universe
from finpatch.config import dump_yaml
from finpatch.core import InputError, read_json
from finpatch.experiment import ComputeConfig
from finpatch.folds import FoldsConfig
from finpatch.panel import PanelConfig
from finpatch.plan import AxesConfig, EffectConfig, Plan, StudyConfig, known_cells, load_study_config, study_cells
from finpatch.pool import CLOCK, judge_pool, pool_question
from finpatch.rates import RatesConfig
from finpatch.study import run_study
from finpatch.thermal_config import ThermalConfig
from finpatch.universe import load_universe
from finpatch.work import Results

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # of fork


@pytest.fixture(scope="module")
def whole(raw6_dir, tmp_path_factory):
    "The study that nobody touches."
    return run_study(STUDY, data_dir=raw6_dir, study_dir=tmp_path_factory.mktemp("whole"), **QUIET)


def table(study_dir):
    return pd.read_parquet(study_dir / "results.parquet").drop(columns=[*CLOCK])


def verdict(study_dir):
    return {k: v for k, v in read_json(study_dir / "verdict.json").items() if k not in ("n_test_looks", "questions")}


def changed(config, key, value):
    owner, _, name = key.rpartition(".")
    inner = changed(getattr(config, owner), name, value) if owner else value
    return dataclasses.replace(config, **{owner or name: inner})


# Killed, shared, stopped


def wait_for(pattern, study_dir, n=1):
    deadline = time.monotonic() + 200
    while len(list(study_dir.glob(pattern))) < n and time.monotonic() < deadline:
        time.sleep(0.01)


@pytest.mark.soak
def test_a_study_killed_at_random_moments_ends_with_the_table_of_one_that_was_not(raw6_dir, whole, tmp_path):
    rng, study_dir, done = random.Random(0), tmp_path / "killed", []
    for n_kills in range(4):
        child = CONTEXT.Process(target=study_in_child, args=(study_dir, raw6_dir))
        child.start()
        wait_for("cells/*/result.json", study_dir, 2 * n_kills + 1)
        time.sleep(rng.uniform(0, 0.2))
        child.kill()
        child.join()
        done.append({p.parent.name: p.read_bytes() for p in study_dir.glob("cells/*/result.json")})
        assert not (study_dir / "verdict.json").exists(), "the study was too short to be killed so often"
    study_in_child(study_dir, raw6_dir)
    pd.testing.assert_frame_equal(table(study_dir), table(whole))
    assert verdict(study_dir) == verdict(whole)
    for name in ("losses.parquet", "predictions.parquet"):
        assert pd.read_parquet(study_dir / name).equals(pd.read_parquet(whole / name))
    for cells in done:  # what was finished before a kill was not made again
        assert all((study_dir / "cells" / k / "result.json").read_bytes() == v for k, v in cells.items())


@pytest.mark.soak
def test_a_study_that_is_terminated_stops_with_its_workers_and_goes_on_in_two(raw6_dir, whole, tmp_path, monkeypatch):
    study_dir = tmp_path / "study"

    def terminate():
        wait_for("cells/*/result.json", study_dir)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("finpatch.work.worker_context", lambda: CONTEXT)
    threading.Thread(target=terminate).start()
    options = QUIET | {"data_dir": raw6_dir, "study_dir": study_dir}
    run_study(STUDY, **options | {"n_workers": 1})
    state = read_json(study_dir / "state.json")
    assert (state["status"], state["failed"]) == ("stopped", {}) and state["n_open"] > 0
    assert len(pd.read_parquet(study_dir / "results.parquet")) == state["n_cells"]
    assert not (study_dir / "verdict.json").exists()
    run_study(STUDY, **options | {"n_workers": 2})
    assert read_json(study_dir / "state.json")["status"] == "done"
    pd.testing.assert_frame_equal(table(study_dir), table(whole))


class Signals:
    "Tell this process to end, where Python cannot raise: an exception in `__del__` is printed and lost."

    def __init__(self, number):
        self.number = number

    def __del__(self):
        os.kill(os.getpid(), self.number)
        for _ in range(1000):  # the handler is called here
            pass


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("n_workers", [0, 1])
def test_a_request_to_end_that_python_loses_stops_the_study_all_the_same(raw6_dir, tmp_path, monkeypatch, n_workers, number):
    shown = [Signals(number), None]  # `None` is taken before the work begins
    monkeypatch.setattr("finpatch.work.worker_context", lambda: CONTEXT)
    monkeypatch.setattr("finpatch.work.StudyProgress.show", lambda self: shown and shown.pop() and None)
    run_study(STUDY, **QUIET | {"data_dir": raw6_dir, "study_dir": tmp_path, "n_workers": n_workers})
    state = read_json(tmp_path / "state.json")
    assert not shown and (state["status"], state["failed"]) == ("stopped", {})


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_no_worker_survives_its_parent(whole, raw6_dir, tmp_path):
    receive, send = CONTEXT.Pipe(duplex=False)
    parent = CONTEXT.Process(target=parent_of_worker, args=(tmp_path / "study", raw6_dir, send))
    parent.start()
    worker = receive.recv()
    wait_for("cells/*/run.json", tmp_path / "study")
    assert is_running(worker)
    parent.kill()
    parent.join()
    deadline = time.monotonic() + 60
    while is_running(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(worker)
    assert list((tmp_path / "study").glob("cells/*/checkpoints/step-*.json")), "it ended without a checkpoint"


# What decides a cell


@pytest.fixture(scope="module")
def source(raw6_dir):
    return Source(raw6_dir, "cpu")


def played(cell):
    "Pretend that the smallest rate is the best, so that the grid is extended as far as allowed."
    return {"status": "done", "best_val_loss": cell.config.optim.lr}


def outcome(config, source):
    "Everything that a study's config decides: the keys of its cells, and what the verdict is held against."
    keys = [cell_key(c, source) for c in known_cells(Plan(config, source), played)]
    return sorted(keys), config.effect


UNIVERSE = Path(tempfile.mkdtemp()) / "own.csv"
UNIVERSE.write_text("symbol,from,to\nSP500,2003-01-02,\n")
CHANGES = {
    "axes.budgets": ("2k", "5k"),
    "axes.n_seeds": 3,
    "axes.tasks": ("regression",),
    "axes.tiers": ("a20",),
    "axes.horizons": (2,),
    "axes.contexts": (30,),
    "axes.train_sessions": (600,),
    "folds.test_start": date(2012, 1, 3),
    "folds.test_end": date(2017, 12, 29),
    "folds.n_folds": 1,
    "folds.val_sessions": 300,
    "folds.kind": "rolling",
    "folds.train_sessions": 900,
    "folds.embargo": 3,
    "rates.n_points": 5,
    "rates.factor": 2.0,
    "rates.seeds": (1001,),
    "rates.max_extensions": 1,
    "effect.nats": 0.002,
    "effect.r2": 0.02,
    "compute.precision": "bf16",
    "compute.is_compiled": True,
    "compute.is_checkpointed": True,
    "optim.lr": 1e-3,
    "optim.weight_decay": 0.1,
    "optim.epochs": 3,
    "optim.patience": 2,
    "model.dropout": 0.2,
    "model.stride": 4,
    "panel.scaler": "per_symbol",
    "panel.universe": str(UNIVERSE),
    "panel.min_symbols": 5,
    "panel.train_symbols": 1,
    "rates": None,
}
CLOCKWORK = {"compute.checkpoint_every_s": 5.0, "thermal": ThermalConfig(fair_c=60.0)}  # decide nothing but the clock
OTHERS = {
    "compute.parallel",  # refused: a cell has one process
    "symbols",
    "model",
    "optim",
    "panel",
    "axes",
    "folds",
    "effect",
    "compute",
    "axes.train_symbols",
}  # owners of fields above; symbols: below; the symbols that train: test_data_axes


@pytest.mark.parametrize("key", CHANGES)
def test_changing_a_field_changes_the_cells_or_the_verdict(key, source):
    base, config = STUDY, STUDY
    if key in ("folds.kind", "folds.train_sessions"):  # each needs the other
        rolling = dataclasses.replace(STUDY.folds, kind="rolling", train_sessions=800)
        base = STUDY if key == "folds.kind" else dataclasses.replace(STUDY, folds=rolling)
        config = dataclasses.replace(STUDY, folds=dataclasses.replace(rolling, train_sessions=900))
    else:
        config = changed(STUDY, key, CHANGES[key])
    assert outcome(config, source) != outcome(base, source)


@pytest.mark.parametrize("key", CLOCKWORK)
def test_what_only_the_clock_feels_makes_no_new_cells(key, source):
    assert outcome(changed(STUDY, key, CLOCKWORK[key]), source) == outcome(STUDY, source)


def test_every_field_of_a_study_is_listed():
    own = {
        "axes": AxesConfig,
        "folds": FoldsConfig,
        "rates": RatesConfig,
        "effect": EffectConfig,
        "compute": ComputeConfig,
        "panel": PanelConfig,
    }
    names = {f"{k}.{f.name}" for k, owner in own.items() for f in dataclasses.fields(owner)}
    names |= {f.name for f in dataclasses.fields(StudyConfig)}
    assert names - OTHERS <= set(CHANGES) | set(CLOCKWORK)


def test_another_symbol_makes_other_cells(source):
    other = dataclasses.replace(STUDY, symbols=("NASDAQ",))
    with pytest.raises(InputError, match="NASDAQ.dataset.raw6"):
        outcome(other, source)


def imported(name, seen):
    "Collect the modules of the package that a module needs, at any depth."
    text = (Path(finpatch.__file__).parent / f"{name}.py").read_text()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module and node.module not in seen:
            seen.add(node.module)
            imported(node.module, seen)
    return seen


# Read by data, model or trainer, and yet no part of what decides a number: errors, files, names, sensors, what is registered
ASIDE = {"core", "config", "device", "experiment", "thermal_config", "causal", "manifest", "entries",
         "lineage", "lock", "digest"}  # fmt: skip

# Read by baselines through `evaluate`, which judges forecasts and makes none
JUDGES = {"alarms", "calibration", "classes", "interval", "ledger", "predictions", "table"}


def test_the_digest_of_the_code_covers_what_data_model_and_trainer_are_made_of():
    needed = set().union(
        *(imported(name, {name}) for name in ("dataset", "folds", "patchtst", "budget", "trainer", "callbacks"))
    )
    assert needed - ASIDE <= set(CODE)
    assert imported("baselines", {"baselines"}) - ASIDE - JUDGES <= set(BASELINE_CODE)


def test_a_change_of_code_or_data_is_another_cell(raw6_dir, monkeypatch, tmp_path):
    first = Source(raw6_dir, "cpu")
    plan = Plan(STUDY, first)
    cells = study_cells(plan, plan.questions[0], "2k", 3e-3)
    key = cell_key(cells[0], first)
    assert key == cell_key(cells[0], Source(raw6_dir, "cpu"))
    with monkeypatch.context() as patch:
        patch.setattr(cell_module, "code_digest", lambda names=CODE: "another")
        assert cell_key(cells[0], Source(raw6_dir, "cpu")) != key
    other = Source(raw6_dir, "cpu")
    entries = [e | {"content_sha256": "0"} for e in other.entries(cells[0].config)]
    other.kept["entries", cells[0].config.dataset] = entries
    assert cell_key(cells[0], other) != key


def test_changed_data_stops_a_study_before_its_first_cell(raw6_dir, tmp_path):
    own = shutil.copytree(raw6_dir, tmp_path / "data")
    path = next((own / "raw").glob("*.parquet"))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(InputError, match="verified data"):
        run_study(STUDY, data_dir=own, study_dir=tmp_path / "study", **QUIET)
    assert not (tmp_path / "study" / "cells").exists()


# What the study may say


def test_a_refused_cell_is_a_row_with_its_reason(raw6_dir, tmp_path):
    "Moves of 5 % within a day are too rare to be learnt; the other question is judged as if alone."
    axes = dataclasses.replace(STUDY.axes, tasks=("direction", "threshold_5pct"), budgets=("2k",), n_seeds=1)
    config = dataclasses.replace(STUDY, axes=axes, rates=None, optim=dataclasses.replace(STUDY.optim, epochs=1))
    study_dir = run_study(config, data_dir=raw6_dir, study_dir=tmp_path / "study", **QUIET)
    rows = pd.read_parquet(study_dir / "results.parquet").groupby("task")
    assert set(rows.get_group("threshold_5pct")["status"]) == {"refused"}
    assert rows.get_group("threshold_5pct")["reason"].str.contains("episodes").all()
    assert set(rows.get_group("direction")["status"]) == {"done"}
    first, second = read_json(study_dir / "verdict.json")["questions"]
    assert first["verdict"] == second["verdict"] == "cannot_tell"
    assert "two or more sizes" in first["sentence"] and "episodes" in second["sentence"]


def test_no_difference_is_not_said_of_cells_that_hit_the_cap(whole, source):
    "Two epochs are a cap that cells of either size hit: whatever the losses, a difference is not ruled out."
    rows = table(whole).query("role == 'study'")
    assert set(rows.loc[rows["is_capped"], "stop_reason"]) == {"epochs"}
    assert set(rows.loc[~rows["is_capped"], "stop_reason"]) <= {"early_stop"}
    plan = Plan(STUDY, source)
    pool, _ = pool_question(plan.questions[0], plan, Results(source, whole / "cells"), whole / "cells")
    assert pool.capped == ("2k", "4k")
    capped, free = (judge_pool(p, 10.0, "nats", scaling.verdict) for p in (pool, dataclasses.replace(pool, capped=())))
    assert (capped["verdict"], free["verdict"]) == ("cannot_tell", "no_difference")
    assert "hit the cap" in capped["sentence"]


def test_every_loss_and_verdict_comes_from_rows_of_the_table(whole):
    rows = table(whole).set_index("key")
    losses = pd.read_parquet(whole / "losses.parquet")
    assert set(losses["key"]) == set(rows.index[rows["role"] != "search"])
    model = losses[(losses["name"] == "model") & (losses["split"] == "test")]
    mean = model.groupby(["budget", "seed"])["loss"].mean().unstack().to_numpy()
    by_size = read_json(whole / "verdict.json")["by_size"]
    np.testing.assert_allclose([r["by_seed"] for r in by_size], mean, rtol=1e-12)
    predictions = pd.read_parquet(whole / "predictions.parquet")
    assert set(predictions["key"]) == set(rows.index[rows["role"] == "study"])
    assert sorted(predictions["fold"].unique()) == [0, 1]


def test_learning_rates_are_chosen_on_validation_of_the_first_fold_by_seeds_of_their_own(whole):
    rows = table(whole)
    search, study = rows[rows["role"] == "search"], rows[rows["role"] == "study"]
    assert set(search["fold"]) == {0} and not set(search["seed"]) & set(study["seed"])
    for budget, part in study.groupby("budget"):
        tried = search[search["budget"] == budget]
        assert len(tried) == 3 and set(part["lr"]) == {tried.loc[tried["best_val_loss"].idxmin(), "lr"]}


# As shipped


def panel_data(universe, tiers, data_dir):
    "Fetch and build a universe that comes with a package."
    fetch_universe(load_universe(universe), data_dir=data_dir)
    for tier in tiers:
        assert set(build_many(load_universe(universe).symbols, tier, data_dir=data_dir)["status"]) == {"built"}
    return data_dir


@pytest.mark.parametrize(
    "name", sorted(p.stem for p in (Path(finpatch.__file__).parent / "configs/study").glob("*.yaml"))
)
def test_shipped_studies_have_a_model_for_each_cell(name, source, tmp_path):
    config = load_study_config(name)
    if config.panel.universe:
        if not find_spec(config.panel.universe):
            pytest.skip(f"the extra `panel` is not installed: no {config.panel.universe}")
        source = Source(panel_data(config.panel.universe, config.axes.tiers, tmp_path / "data"), "cpu")
    (tmp_path / "copy.yaml").write_text(dump_yaml(config))
    assert load_study_config(tmp_path / "copy.yaml") == config
    cells = list(known_cells(Plan(config, source), lambda c: None, is_expected=True))
    assert not any("refused" in source.effective(c).get("model", {}) for c in cells)
    axes = config.axes
    n = len(axes.budgets) * len(axes.tasks) * len(axes.tiers) * max(1, len(axes.train_sessions))
    assert (
        sum(c.role == "study" for c in cells) == n * config.folds.n_folds * 3
        and sum(c.role == "search" for c in cells) == n * 5
    )


def test_the_command_estimates_before_it_trains(raw6_dir, tmp_path, capsys):
    (tmp_path / "tiny.yaml").write_text(dump_yaml(STUDY))
    words = [
        "study",
        "--config",
        str(tmp_path / "tiny.yaml"),
        "--data-dir",
        str(raw6_dir),
        "--runs-dir",
        str(tmp_path / "runs"),
    ]
    assert main([*words, "--budgets", "2k", "--seeds", "1", "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["cells"] == {"search": 3, "study": 2, "baselines": 2}
    assert {"flops", "mem_gib", "hours"} <= set(found) and not (tmp_path / "runs").exists()


def test_the_last_lines_of_the_command_are_the_verdict_and_the_report(raw6_dir, whole, tmp_path, capsys):
    (tmp_path / "tiny.yaml").write_text(dump_yaml(STUDY))
    words = ["study", "--config", str(tmp_path / "tiny.yaml"), "--data-dir", str(raw6_dir), "--run-dir", str(whole)]
    assert main([*words, "--workers", "0", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"Report: {whole / 'report.html'}" and (whole / "report.html").exists()
    assert lines[-2].startswith("direction.h1 on raw6: ") and read_json(whole / "verdict.json")["sentence"] in lines[-2]


def test_a_cell_does_not_depend_on_what_ran_before_it(source, whole, tmp_path):
    "In a study it was one of many in a process; alone it has the same weights."
    plan = Plan(STUDY, source)
    rows = table(whole).query("role == 'study' and budget == '4k'").set_index("key")
    cell: Cell = study_cells(plan, plan.questions[0], "4k", float(rows["lr"].iloc[0]))[-1]
    with limited_threads(1):
        alone = run_cell(cell, source, tmp_path, is_cooled=False)
    assert alone["best_weights_sha256"] == rows.loc[alone["key"], "best_weights_sha256"]
