"""G6 of a walk forward. Risk: a training label that reaches into a test span, or sizes and contexts judged on other days.

What is dropped at a boundary is counted by brute force for any history, horizon and embargo; the rest is looked up in the
datasets that a study trains on.
"""

from dataclasses import replace
from datetime import date

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finpatch.cell import Source
from finpatch.core import InputError
from finpatch.experiment import OptimConfig
from finpatch.features import build_dataset
from finpatch.folds import FoldsConfig, common_sessions, make_folds
from finpatch.plan import AxesConfig, Plan, StudyConfig, study_cells
from finpatch.predictions import check_predictions
from finpatch.samples import SymbolRows, sample_table, split_origins

DAYS = pd.DatetimeIndex(pd.bdate_range("2000-01-03", periods=900), name="session")


@st.composite
def histories(draw):
    "A history with gaps, folds that fit into it, a horizon and an embargo."
    kept = np.random.default_rng(draw(st.integers(0, 99))).random(900) < draw(st.sampled_from([1.0, 0.9]))
    days = DAYS[kept]
    kind = draw(st.sampled_from(["expanding", "rolling"]))
    first = draw(st.integers(450, 600))
    config = FoldsConfig(
        test_start=days[first].date(),
        test_end=days[draw(st.integers(700, len(days) - 1))].date(),
        n_folds=draw(st.integers(1, 4)),
        val_sessions=draw(st.integers(5, 25)),
        kind=kind,
        train_sessions=draw(st.integers(100, 400)) if kind == "rolling" else None,
        embargo=draw(st.integers(0, 12)),
    )
    return days, config, draw(st.integers(1, 20))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(histories())
def test_no_training_label_reaches_past_its_span_and_the_purge_is_exact(history):
    days, config, h = history
    folds = make_folds(days, config, max_context=30)
    place = {str(d.date()): i for i, d in enumerate(days)}
    last_test = next_test = None
    for fold in folds:
        train_end, val_end, test_end = (place[str(d)] for d in (fold.train_end, fold.val_end, fold.test_end))
        origins = split_origins(days, fold, h)
        train, val, test = (origins[k] for k in ("train", "val", "test"))
        begin = place[str(fold.train_start)] if fold.train_start else 0
        want = [t for t in range(29, len(days) - h) if begin <= t + 1 and t + h <= train_end - config.embargo]
        assert train.tolist() == want
        assert val_end - train_end == config.val_sessions
        assert config.train_sessions in (None, train_end - begin + 1)
        assert next_test in (None, val_end)
        next_test = test_end
        assert val.tolist() == list(range(train_end, val_end - h + 1))
        assert test.tolist() == list(range(val_end, test_end - h + 1))
        if len(val) and len(test):
            assert test[0] - val[-1] == h  # h − 1 between them belong nowhere
        if config.embargo == 0 and len(train) and len(val):
            assert val[0] - train[-1] == h
        if last_test is not None and len(test):
            assert test[0] - last_test == h
        last_test = test[-1] if len(test) else None
    assert sum(len(split_origins(days, f, 1)["test"]) for f in folds) == sum(days >= str(config.test_start)) - sum(
        days > str(config.test_end)
    )


@pytest.fixture(scope="module")
def plan(data_dir):
    build_dataset("SP500", "raw6", data_dir=data_dir)
    axes = AxesConfig(
        budgets=("5k",), n_seeds=1, tasks=("regression",), tiers=("raw6",), horizons=(5,), contexts=(20, 60, 120)
    )
    folds = FoldsConfig(test_start=date(2007, 1, 1), test_end=date(2018, 12, 31), n_folds=4)
    return Plan(
        StudyConfig(symbols=("SP500",), axes=axes, folds=folds, optim=OptimConfig(lr=1e-3)), Source(data_dir, "cpu")
    )


@pytest.fixture(scope="module")
def datasets(plan):
    "Datasets by question and fold."
    cells = {q: study_cells(plan, q, "5k", 1e-3) for q in plan.questions}
    return {q: [plan.source.dataset(c) for c in cells[q]] for q in plan.questions}


def test_every_context_of_a_study_meets_the_same_dates(datasets):
    first, *others = datasets.values()
    for fold in range(4):
        for other in others:
            assert other[fold].samples.equals(first[fold].samples)
            assert other[fold].context_length != first[fold].context_length


def test_a_longest_context_of_its_own_would_meet_other_dates(plan):
    "The test above can fail: cut with the shorter context alone, the first fold begins earlier."
    shorter = replace(plan.config, axes=replace(plan.config.axes, contexts=(20,)))
    other = Plan(shorter, plan.source)
    cells = [study_cells(p, p.questions[0], "5k", 1e-3)[0] for p in (plan, other)]
    assert not plan.source.dataset(cells[0]).samples.equals(plan.source.dataset(cells[1]).samples)


def test_the_scaler_of_a_fold_is_fitted_on_its_training_rows_alone(plan, datasets):
    question = plan.questions[0]
    frame = plan.source.frames(study_cells(plan, question, "5k", 1e-3)[0].config)["SP500"]
    means = []
    for fold, data in zip(plan.folds(question), datasets[question], strict=True):
        last = data.samples.loc[data.samples["split"] == "train", "origin"].max()
        seen = frame.loc[:last, list(data.names)].to_numpy(np.float32).astype(np.float64)
        assert last < pd.Timestamp(fold.train_end)
        np.testing.assert_allclose(data.scaler.mean, seen.mean(axis=0), rtol=1e-12)
        means.append(data.scaler.mean)
    assert len({m.tobytes() for m in means}) == 4


def test_predictions_pooled_over_folds_are_a_file_that_evaluation_takes(datasets):
    parts = [d.samples.assign(fold=k, p=0.1) for k, d in enumerate(next(iter(datasets.values())))]
    pooled = check_predictions(pd.concat(parts, ignore_index=True))
    test = pooled[pooled["split"] == "test"]
    assert test["origin"].is_unique and len(test) == 3020 - 4 * 4
    parts[1] = parts[1].assign(origin=parts[1]["origin"] - pd.Timedelta(days=400))
    with pytest.raises(InputError):
        check_predictions(pd.concat(parts, ignore_index=True))


def test_symbols_of_a_panel_are_cut_at_the_same_dates():
    rng = np.random.default_rng(0)
    listed = {"OLD": DAYS, "NEW": DAYS[350:], "THIN": DAYS[rng.random(900) < 0.8]}
    frames = {k: pd.DataFrame({"x": 1.0}, index=days) for k, days in listed.items()}
    config = FoldsConfig(test_start=DAYS[500].date(), test_end=DAYS[899].date(), n_folds=2, val_sessions=50)
    folds = make_folds(common_sessions(frames), config, max_context=20)
    for h in (1, 5):
        for name, days in listed.items():
            rows = SymbolRows(name, days, np.zeros((len(days), 1), np.float32), np.zeros(len(days)))
            for fold in folds:
                table = sample_table(rows, fold, h)
                ends = {"train": fold.train_end, "val": fold.val_end, "test": fold.test_end}
                for split, part in table.groupby("split"):
                    assert part["target_end"].max() <= pd.Timestamp(ends[split])
                assert table.loc[table["split"] == "test", "origin"].min() >= pd.Timestamp(fold.val_end) - pd.Timedelta(
                    days=4
                )
