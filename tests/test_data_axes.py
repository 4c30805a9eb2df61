"""G1, G6 of the data axes. Risk: less data is judged on other days or other symbols, a symbol that does not train reaches the
scaler, subsets are not nested, or a curve of losses is read as a law that it does not follow.

Two made-up stocks share a signal; a study crosses two sizes, three lengths of training and one or two symbols.
"""

from dataclasses import replace
from datetime import date

import numpy as np
import pandas as pd
import pytest

from finpatch.cell import Source, cell_key
from finpatch.collect import build_many, fetch_many
from finpatch.core import InputError, read_json
from finpatch.dataset import load_dataset, n_windows
from finpatch.experiment import ModelConfig, OptimConfig
from finpatch.folds import FoldsConfig
from finpatch.panel import PanelConfig
from finpatch.plan import AxesConfig, Plan, StudyConfig, baseline_cells, known_cells, study_cells
from finpatch.report import build_report
from finpatch.study import run_study

SYMBOLS = ("A", "B")
DAYS = pd.bdate_range("2001-01-01", periods=2400, name="session")
QUIET = {"device": "cpu", "is_progress_shown": False, "n_workers": 0}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("axes")
    for seed, symbol in enumerate(SYMBOLS):
        steps = np.random.default_rng(seed).normal(0, 0.01, len(DAYS))
        pd.DataFrame({"Close": 50 * np.exp(np.cumsum(steps))}, index=DAYS).to_csv(folder / f"{symbol}.csv")
    fetch_many(SYMBOLS, "file", data_dir=folder / "data", path=folder, calendar="none")
    build_many(SYMBOLS, "c12", data_dir=folder / "data")
    return folder / "data"


def make_study(**axes):
    crossed = {"train_sessions": (250, 500, 1000), "train_symbols": (1, 2)} | axes
    words = {"budgets": ("2k", "4k"), "n_seeds": 2, "tasks": ("direction",), "tiers": ("c12",), "contexts": (20,)}
    return StudyConfig(
        symbols=SYMBOLS,
        axes=AxesConfig(**words, **crossed),
        folds=FoldsConfig(test_start=date(2008, 1, 1), test_end=date(2010, 1, 29), val_sessions=250),
        optim=OptimConfig(lr=3e-3, warmup_steps=5, global_batch_size=512, epochs=2, patience=1),
        model=ModelConfig(patch_length=5, stride=5),
        rates=None,
        thermal=None,
    )


@pytest.fixture(scope="module")
def plan(data_dir):
    return Plan(make_study(), Source(data_dir, "cpu"))


def samples_of(plan, question):
    return plan.source.dataset(baseline_cells(plan, question)[0]).samples


def test_every_amount_is_judged_on_the_same_days_and_symbols(plan):
    judged = [s[s["split"] != "train"].drop(columns="row") for s in (samples_of(plan, q) for q in plan.questions)]
    assert set(judged[0]["symbol"]) == set(SYMBOLS)
    for other in judged[1:]:
        pd.testing.assert_frame_equal(other.reset_index(drop=True), judged[0].reset_index(drop=True))


def test_less_data_is_a_part_of_more_and_the_most_recent(plan):
    trained = {q: samples_of(plan, q).query("split == 'train'") for q in plan.questions}
    keys = {q: set(zip(t["symbol"], t["origin"], strict=True)) for q, t in trained.items()}
    for q, t in trained.items():
        assert t["origin"].nunique() == q.train_sessions and t["symbol"].nunique() == (q.train_symbols or 2)
        assert t["origin"].max() == trained[plan.questions[0]]["origin"].max()
        for other in plan.questions:
            if q.train_sessions <= other.train_sessions and (q.train_symbols or 2) <= (other.train_symbols or 2):
                assert keys[q] <= keys[other]


def test_a_symbol_that_does_not_train_reaches_neither_scaler_nor_training_windows(plan, data_dir):
    question = next(q for q in plan.questions if q.train_symbols == 1)
    config = study_cells(plan, question, "2k", 1e-3)[0].config
    frames = {s: f.copy() for s, f in plan.source.frames(config).items()}
    before = load_dataset(config, data_dir, frames=frames)
    frames["B"].loc[: pd.Timestamp(config.splits.val_end), list(before.names)] = 1e3
    after = load_dataset(config, data_dir, frames=frames)
    assert np.array_equal(before.scaler.mean, after.scaler.mean) and n_windows(before) == n_windows(after)
    rows = before.index["train"]
    assert before.batch(rows)[0].equal(after.batch(rows)[0])
    every = load_dataset(replace(config, panel=PanelConfig()), data_dir, frames=frames)
    assert not np.array_equal(every.scaler.mean, before.scaler.mean)


def test_a_scaler_per_symbol_is_refused_for_a_symbol_that_does_not_train(plan, data_dir):
    question = next(q for q in plan.questions if q.train_symbols == 1)
    config = study_cells(plan, question, "2k", 1e-3)[0].config
    with pytest.raises(InputError, match="training rows of each; got none of B"):
        load_dataset(replace(config, panel=PanelConfig(scaler="per_symbol", train_symbols=1)), data_dir)


def test_all_symbols_are_the_same_cells_as_none_named_and_fewer_are_others(data_dir, plan):
    def keys(**axes):
        one = Plan(make_study(train_sessions=(500,), **axes), plan.source)
        return {cell_key(c, plan.source) for c in known_cells(one, lambda cell: None)}

    assert keys(train_symbols=()) == keys(train_symbols=(2,))
    assert keys(train_symbols=()).isdisjoint(keys(train_symbols=(1,)))


@pytest.fixture(scope="module")
def whole(data_dir, tmp_path_factory):
    return run_study(make_study(), data_dir=data_dir, study_dir=tmp_path_factory.mktemp("study"), **QUIET)


def test_a_study_of_amounts_ends_with_a_surface_and_its_report(whole):
    verdict, table = read_json(whole / "verdict.json"), pd.read_parquet(whole / "results.parquet")
    assert len(verdict["questions"]) == 6 and (verdict["train_sessions"], verdict["train_symbols"]) == (1000, 0)
    [surface] = verdict["surfaces"]
    assert surface["amounts"] == sorted(surface["amounts"])
    assert sorted(zip(surface["train_sessions"], surface["train_symbols"], strict=True)) == [
        (n, k) for n in (250, 500, 1000) for k in (0, 1)
    ]
    assert "needs five sizes and five amounts" in surface["law"]["refused"][0] and surface["law"]["alpha"] is None
    for q in verdict["questions"]:  # every loss of the surface is that of its question
        at = [
            i
            for i, pair in enumerate(zip(surface["train_sessions"], surface["train_symbols"], strict=True))
            if pair == (q["train_sessions"], q["train_symbols"])
        ]
        assert surface["loss"][at[0]] == pytest.approx([row["loss"]["value"] for row in q["by_size"]])
        own = table[(table["train_sessions"] == q["train_sessions"]) & (table["train_symbols"] == q["train_symbols"])]
        assert (own["role"] == "study").sum() == 4
    page = build_report(whole).read_text()
    assert surface["sentence"].split(":")[0] in page and "direction.h1.c12.c20.d250.s1" in page
    assert (whole / "report" / "direction.h1.c12.c20.data.losses.csv").is_file()
