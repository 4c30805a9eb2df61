"""G7. Risk: the batch, the clock or an unrecorded state changes a result, and nobody can have it again."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from finpatch.core import read_json
from finpatch.experiment import load_experiment_config
from finpatch.features import build_dataset
from finpatch.market import fetch_ohlcv
from finpatch.run import load_run, override, train_run

QUICK = override(load_experiment_config("sp500_direction"), max_steps=6)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    fetch_ohlcv("SP500", data_dir=path)
    build_dataset("SP500", "a20", data_dir=path)
    return path


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
