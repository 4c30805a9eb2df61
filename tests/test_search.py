"""G5, G6, G9 of a search. Risk: settings that no run reads are ranked, a test span steers the choice, a kill changes it."""

import dataclasses
import random
import time

import numpy as np
import pytest
from study_worker import CONTEXT, STUDY, search_quietly

from finpatch.cell import Cell, Source, limited_threads, run_cell
from finpatch.config import dump_yaml
from finpatch.core import InputError, read_json
from finpatch.ledger import read_looks
from finpatch.plan import Plan, rate_cells
from finpatch.search import RangeConfig, SearchConfig

SPACE = (
    RangeConfig(key="optim.weight_decay", low=1e-3, high=0.5, is_log=True),
    RangeConfig(key="model.dropout", low=0.0, high=0.5),
)

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # of fork


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "study.yaml"
    path.write_text(dump_yaml(STUDY))
    return SearchConfig(study=str(path), space=SPACE, n_trials=8)


def trials(search_dir):
    return read_json(search_dir / "result.json")["trials"]


@pytest.mark.soak
def test_a_search_killed_at_random_moments_equals_one_that_was_not(config, raw6_dir, tmp_path):
    whole = search_quietly(config, tmp_path / "whole", raw6_dir)
    n_looks = len(read_looks(raw6_dir / "ledger.jsonl"))
    rng, killed = random.Random(0), tmp_path / "killed"
    for n_kills in range(3):
        child = CONTEXT.Process(target=search_quietly, args=(config, killed, raw6_dir))
        child.start()
        deadline = time.monotonic() + 200
        while len(list(killed.glob("cells/*/run.json"))) < 4 * n_kills + 2 and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.1))
        child.kill()
        child.join()
        assert not (killed / "result.json").exists(), "the search was too short to be killed so often"
    search_quietly(config, killed, raw6_dir)
    assert trials(killed) == trials(whole)
    assert len({t["val_loss"] for t in trials(whole)}) == 8
    assert len(read_looks(raw6_dir / "ledger.jsonl")) == n_looks  # the same trials are the same looks


def test_nothing_after_validation_reaches_a_trial(config, raw6_dir, tmp_path):
    "With garbage for a future the trial has the same weights and loss; a cell of the study has not even a dataset."
    plan = Plan(STUDY, Source(raw6_dir, "cpu"))
    cell = rate_cells(plan, plan.questions[0], "2k", 3e-3)[0]
    other = Source(raw6_dir, "cpu")
    frames = other.frames(cell.config)
    frames["SP500"].loc[frames["SP500"].index > str(cell.config.splits.val_end)] = np.nan
    with limited_threads(1):
        results = [run_cell(cell, s, tmp_path / str(i), is_cooled=False) for i, s in enumerate((plan.source, other))]
    for name in ("status", "best_val_loss", "weights_sha256"):
        assert results[0][name] == results[1][name]
    assert results[0]["status"] == "done"
    with pytest.raises(InputError):
        other.dataset(Cell(cell.config, "2k"))


def test_a_value_that_the_run_does_not_read_is_an_error(config, raw6_dir, tmp_path, monkeypatch):
    import finpatch.trainer as owner

    honest = owner.make_optimizer
    dead = lambda model, optim: honest(model, dataclasses.replace(optim, weight_decay=0.05))
    monkeypatch.setattr(owner, "make_optimizer", dead)
    with pytest.raises(InputError, match=r"optim.weight_decay`; got the same from 0.001 to 0.5"):
        search_quietly(config, tmp_path / "s", raw6_dir)
    assert not (tmp_path / "s" / "result.json").exists()


def test_a_value_that_is_lost_on_the_way_to_the_model_is_an_error(config, raw6_dir, tmp_path, monkeypatch):
    import finpatch.search as owner

    honest = owner.put
    monkeypatch.setattr(
        owner, "put", lambda c, values: honest(c, {k: v for k, v in values.items() if k != "model.dropout"})
    )
    no_probe = dataclasses.replace(config, space=(SPACE[1],), n_trials=4)
    monkeypatch.setattr(owner, "check_consumed", lambda *args: True)
    with pytest.raises(InputError, match="must use the values of its trial"):
        search_quietly(no_probe, tmp_path / "s", raw6_dir)
