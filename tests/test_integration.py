"""The parts together, on real data: shapes, gradients and batches of the real features, on every device there is."""

import dataclasses

import numpy as np
import pytest
import torch

from finpatch.budget import count_parameters, load_patchtst_config
from finpatch.dataset import FinancialDataset, load_dataset, n_windows
from finpatch.experiment import load_experiment_config
from finpatch.features import build_dataset
from finpatch.patchtst import PatchTST
from finpatch.trainer import predict_logits


@pytest.fixture(scope="module")
def dataset(data_dir) -> FinancialDataset:
    return load_dataset(load_experiment_config("sp500_direction"), data_dir)


def small_model(**changes) -> PatchTST:
    torch.manual_seed(0)
    return PatchTST(load_patchtst_config("50k", n_features=20, context_length=60, **changes))


def test_patchtst_with_real_feature_dimensions(dataset):
    "The 2m preset fits the twenty features and sixty sessions of the real data, at its exact size."
    model = PatchTST(load_patchtst_config("2m", n_features=len(dataset.names), context_length=dataset.context_length))
    x, y = dataset.batch(dataset.index["train"][:4])
    assert x.shape == (4, 60, 20) and y.shape == (4,)
    assert model(x).shape == (4, 1)
    assert count_parameters(model) == 1_822_657


def backward(model: PatchTST, dataset: FinancialDataset, device: torch.device) -> torch.Tensor:
    model, samples = model.to(device), dataset.index["train"][:16]
    x, y = (v.to(device) for v in dataset.batch(samples))
    dataset.task.loss(model(x), y).mean().backward()
    return torch.cat([p.grad.flatten().cpu() for p in model.parameters()])


def test_patchtst_backward_pass(dataset, device):
    "Every parameter gets a finite gradient, equal to the CPU's."
    got = backward(small_model(dropout=0.0), dataset, device)
    want = backward(small_model(dropout=0.0), dataset, torch.device("cpu"))
    assert torch.isfinite(got).all() and (got != 0).float().mean() > 0.9
    assert torch.allclose(got, want, atol=1e-4 * want.abs().max().item(), rtol=1e-3)


@pytest.mark.skipif(not torch.backends.mps.is_available(), reason="no Apple GPU here: MPS is not available")
def test_patchtst_backward_pass_on_mps(dataset):
    "The 2m preset runs forward and backward on MPS."
    model = PatchTST(load_patchtst_config("2m", n_features=20, context_length=60, dropout=0.0))
    assert torch.isfinite(backward(model, dataset, torch.device("mps"))).all()


def test_patchtst_batch_inference(dataset, device):
    "Predictions do not depend on how they are batched, nor on the split's size being a multiple of anything."
    model, data = small_model().to(device), dataset.to(device)
    rows = data.row[data.index["test"]]
    whole = predict_logits(model, data, rows, batch_size=len(rows))
    pieces = predict_logits(model, data, rows, batch_size=37)
    dataset.to("cpu")
    assert len(whole) == n_windows(dataset)["test"] == 754
    assert torch.allclose(whole, pieces, atol=1e-5)


def test_splits_hold_the_expected_sessions(dataset):
    counts = n_windows(dataset)
    assert counts["val"] == 1006 and counts["test"] == 754 and counts["train"] > 2000
    by_split = dataset.samples.groupby("split")
    assert str(by_split["target_end"].max()["train"].date()) == "2011-12-30"
    assert str(by_split["target_end"].max()["test"].date()) == "2018-12-31"
    assert np.isfinite(dataset.samples["y"]).all()


def test_the_dataset_of_an_experiment_is_the_one_it_reads(data_dir):
    "G5 for the one setting that needs real files: another tier, other features."
    build_dataset("SP500", "raw6", data_dir=data_dir)
    config = load_experiment_config("sp500_direction")
    other = load_dataset(dataclasses.replace(config, dataset=("SP500.dataset.raw6",)), data_dir)
    assert len(other.names) == 6 and len(load_dataset(config, data_dir).names) == 20
