"""G8 of a study's plan. Risk: hours that were made up, so that somebody rents a week of machines for a month of work.

The estimate is held against studies that are run, in seconds of the processor: what other programs take is no part of it.
"""

import dataclasses
import time
from datetime import date

import pytest

from finpatch.cell import Source, limited_threads
from finpatch.estimate import estimate, measure_baselines, measure_pace
from finpatch.experiment import OptimConfig
from finpatch.folds import FoldsConfig
from finpatch.ledger import read_looks
from finpatch.plan import AxesConfig, Plan, StudyConfig
from finpatch.rates import RatesConfig
from finpatch.work import work

SMALL = StudyConfig(
    symbols=("SP500",),
    axes=AxesConfig(budgets=("10k", "100k"), n_seeds=1, tasks=("direction",), tiers=("raw6",)),
    folds=FoldsConfig(test_start=date(2011, 1, 1), test_end=date(2018, 12, 31), n_folds=2),
    optim=OptimConfig(lr=1e-3, warmup_steps=5, epochs=5, patience=4, global_batch_size=64),  # no cell can stop early
    rates=None,
    thermal=None,
)


@pytest.mark.soak
@pytest.mark.parametrize("name", ["two sizes", "a search of small ones"])
def test_the_estimate_is_within_a_quarter_of_measured_runs(raw6_dir, tmp_path, name):
    changes = {"axes": dataclasses.replace(SMALL.axes, budgets=("2k", "30k"), tasks=("log_range",))}
    changes |= {"rates": RatesConfig(n_points=3, max_extensions=0)}
    plan = Plan(dataclasses.replace(SMALL, **(changes if name != "two sizes" else {})), Source(raw6_dir, "cpu"))
    with limited_threads(1):
        looks = len(read_looks(raw6_dir / "ledger.jsonl"))
        found = estimate(plan, 1, lambda cell: measure_pace(plan, cell), lambda: measure_baselines(plan))
        assert len(read_looks(raw6_dir / "ledger.jsonl")) == looks, "an estimate counted a trial"
        began = time.process_time()
        assert work(plan, tmp_path / "study", is_cooled=False) == {"is_stopped": False, "failed": {}}
        took = time.process_time() - began
    assert found["hours"]["low"] == found["hours"]["high"]
    assert 0.75 < 3600 * found["hours"]["high"] / took < 1.25, f"{3600 * found['hours']['high']:.1f} s for {took:.1f} s"
