"""G7. Risk: the batch, the clock or an unrecorded state changes a result, and nobody can have it again."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from finpatch.core import InputError, NotFoundError, RuleError, read_json
from finpatch.dataset import FinancialDataset
from finpatch.experiment import load_experiment_config
from finpatch.forecast import predict
from finpatch.manifest import load_frame, store_processed
from finpatch.run import load_run, make_model, override, train_run
from finpatch.trainer import Trainer, predict_logits

QUICK = override(load_experiment_config("sp500_direction"), max_steps=6)


def digest(config, data_dir, run_dir) -> str:
    train_run(config, "20k", data_dir=data_dir, run_dir=run_dir, is_progress_shown=False)
    return read_json(run_dir / "result.json")["weights_sha256"]


def test_same_config_and_seed_give_the_same_bits(data_dir, tmp_path):
    torch.manual_seed(99)  # whatever state was there before must not matter
    first = digest(QUICK, data_dir, tmp_path / "1")
    torch.rand(7)
    np.random.default_rng().random()
    assert digest(QUICK, data_dir, tmp_path / "2") == first
    assert digest(dataclasses.replace(QUICK, seed=1), data_dir, tmp_path / "3") != first


def test_another_process_gives_the_same_bits(data_dir, tmp_path):
    here = digest(QUICK, data_dir, tmp_path / "here")
    command = ["train", "--config", "sp500_direction", "--budget", "20k", "--max-steps", "6", "--json"]
    where = ["--data-dir", str(data_dir), "--run-dir", str(tmp_path / "there"), "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-m", "finpatch", *command, *where], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["weights_sha256"] == here


def test_what_decides_a_run_is_recorded(data_dir, tmp_path):
    digest(QUICK, data_dir, tmp_path / "run")
    record = read_json(tmp_path / "run" / "run.json")
    assert record["machine"]["n_threads"] == torch.get_num_threads()
    assert record["machine"]["torch"] == torch.__version__
    assert {e["dataset_id"] for e in record["lineage"]} >= {"SP500.OHLCV.daily", "SP500.dataset.a20"}
    assert load_run(tmp_path / "run", data_dir).config == QUICK


# The folder says what happened


@pytest.fixture(scope="module")
def finished(data_dir, tmp_path_factory):
    return train_run(
        QUICK, "20k", data_dir=data_dir, run_dir=tmp_path_factory.mktemp("f") / "run", is_progress_shown=False
    )


@pytest.fixture
def copy(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


CHANGES = {
    "another task": lambda run: edit(run / "config.yaml", "task: direction", "task: threshold_1pct"),
    "another context": lambda run: edit(run / "config.yaml", "embargo: 0", "embargo: 1"),
    "another scaler": lambda run: edit(run / "run.json", '"clip": 5.0', '"clip": 4.0'),
    "other features": lambda run: edit(run / "run.json", '"rsi_14"', '"rsi_15"'),
    "another size": lambda run: edit(run / "run.json", '"n_params": ', '"n_params": 1'),
    "other forecasts": lambda run: (run / "predictions.parquet").write_bytes(b"PAR1"),
    "no config": lambda run: (run / "config.yaml").unlink(),
    "no record": lambda run: (run / "run.json").unlink(),
    "no weights": lambda run: (run / "best.safetensors").unlink(),
    "half the weights": lambda run: os.truncate(run / "best.safetensors", 999),
    "no result": lambda run: (run / "result.json").unlink(),
    "half the result": lambda run: os.truncate(run / "result.json", 99),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_that_was_edited_is_refused_in_three_parts(change, copy):
    load_run(copy, None)
    CHANGES[change](copy)
    with pytest.raises(RuleError) as caught:
        load_run(copy, None)
    assert str(copy) in str(caught.value) and caught.value.remedy


def test_a_run_is_usable_without_what_it_does_not_rest_on(copy):
    for name in ("predictions.parquet", "learning_curve.png", "metrics.jsonl", "last.safetensors"):
        (copy / name).unlink()
    assert load_run(copy, None).config == QUICK


@pytest.mark.parametrize(
    ("changes", "steps", "reason"),
    [
        ({"epochs": 1, "max_steps": 1000}, 36, "epochs"),
        ({"epochs": 1}, 36, "epochs"),
        ({"max_steps": 3}, 3, "max_steps"),
    ],
)
def test_the_reason_of_the_end_is_the_one_that_ended_it(changes, steps, reason, data_dir, tmp_path):
    config = override(load_experiment_config("sp500_direction"), **changes)
    train_run(config, "5k", data_dir=data_dir, run_dir=tmp_path / "run", is_progress_shown=False)
    result = read_json(tmp_path / "run" / "result.json")
    assert (result["n_steps"], result["stop_reason"]) == (steps, reason)


def test_a_figure_that_fails_ends_no_run(data_dir, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("finpatch.job.plot_learning_curve", lambda *_: 1 / 0)
    path = train_run(QUICK, "5k", data_dir=data_dir, run_dir=tmp_path / "run", is_progress_shown=False)
    assert read_json(path / "run.json")["status"] == "done" and load_run(path, None).result["status"] == "done"
    assert "no learning curve" in caplog.text and not list(path.glob("*.png")) and not list(path.glob(".*"))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), MemoryError("too big")])
@pytest.mark.parametrize("place", ["run.Trainer", "job.judge"])
def test_a_run_that_broke_off_says_so_and_has_no_result(error, place, data_dir, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise error

    monkeypatch.setattr(f"finpatch.{place}", broken)
    with pytest.raises(type(error)):
        train_run(QUICK, "5k", data_dir=data_dir, run_dir=tmp_path / "run", is_progress_shown=False)
    record = read_json(tmp_path / "run" / "run.json")
    assert record["status"] == "failed" and record["error"].startswith(type(error).__name__) and record["ended_utc"]
    assert not (tmp_path / "run" / "result.json").exists()
    with pytest.raises(NotFoundError, match="finished run"):
        load_run(tmp_path / "run", None)


def test_features_made_by_other_code_are_refused_whatever_code_is_installed(finished, data_dir, tmp_path, monkeypatch):
    "The registered file is what is read: its maker counts, then and now, not what the installed code would make."
    run = load_run(finished, None)
    monkeypatch.setattr("finpatch.features.code_sha256", lambda tier: "0" * 64)
    assert predict(run, data_dir, asof="2018-12-31")["origin"].tolist() == [pd.Timestamp("2018-12-31")]
    other = Path(shutil.copytree(data_dir, tmp_path / "data"))
    frame = load_frame(other, "SP500.dataset.a20").iloc[:-1]
    parents = [(p["dataset_id"], p["version"]) for p in run.record["lineage"][0]["parents"]]
    store = {"tier": "a20", "parents": parents, "new_version": True}
    store_processed(other, "SP500.dataset.a20", frame, code_sha256=run.record["code_sha256"], **store)
    assert str(predict(run, other)["origin"].iloc[-1].date()) == "2018-12-28"  # a newer version of the same making
    store_processed(other, "SP500.dataset.a20", frame.iloc[:-1], code_sha256="1" * 64, **store)
    with pytest.raises(InputError, match="feature code 111111111111"):
        predict(run, other)


def test_forecasts_are_those_of_the_best_weights_and_not_the_last(data_dir, tmp_path):
    config = override(load_experiment_config("sp500_direction"), lr=2e-2)
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, patience=1))  # the last epoch is worse
    path = train_run(config, "5k", data_dir=data_dir, run_dir=tmp_path / "run", is_progress_shown=False)
    run, stored = load_run(path, data_dir), pd.read_parquet(path / "predictions.parquet")
    assert (
        run.result["stop_reason"] == "early_stop" and run.result["best_weights_sha256"] != run.result["weights_sha256"]
    )
    np.testing.assert_allclose(predict_logits(run.model, run.dataset, run.dataset.row), stored["logit"], atol=1e-6)
    assert run.dataset.scaler is run.scaler  # that of the run, not one fitted on what lies there today


def test_seed_and_micro_batch_reach_the_trainer_and_the_record(data_dir, tmp_path, monkeypatch):
    seen = {}

    def spy(*args, **options):
        seen.update(options)
        return Trainer(*args, **options)

    monkeypatch.setattr("finpatch.run.Trainer", spy)
    config = dataclasses.replace(QUICK, seed=5)
    where = {"data_dir": data_dir, "run_dir": tmp_path / "run", "is_progress_shown": False}
    train_run(config, "5k", micro_batch_size=16, **where)
    assert (seen["seed"], seen["micro_batch_size"]) == (5, 16)
    assert read_json(tmp_path / "run" / "run.json")["micro_batch_size"] == 16


def test_a_model_starts_at_the_prior_of_its_training_labels():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(1200, 3)), (rng.random(1200) < 0.5).astype(float)
    many = np.where(np.arange(1200) % 5 > 1, 1.0, y)  # four of five are 1
    config = dataclasses.replace(QUICK, context_length=20)
    make = lambda labels: FinancialDataset.from_arrays(x, labels, kind="binary", context_length=20)
    half, most = make(y), make(many)
    with torch.no_grad():
        gap = [make_model(config, "5k", d).eval()(half.batch(half.index["val"])[0]) for d in (most, half)]
    priors = [d.y[d.index["train"]].mean() for d in (most, half)]
    assert torch.allclose(gap[0] - gap[1], torch.logit(priors[0]) - torch.logit(priors[1]), atol=1e-5)
