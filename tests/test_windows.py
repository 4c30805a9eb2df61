"""G1 behind the features. Risk: the window, the scaler or the model sees what the features do not.

At 200 random cuts of real data the history is cut off, and the future is corrupted; window, logit and, once training is
over, the scaler must be the same bits.
"""

from datetime import date

import numpy as np
import pytest
import torch

from finpatch.adjust import forward_adjust
from finpatch.budget import load_patchtst_config
from finpatch.causal import corrupt_after
from finpatch.dataset import FinancialDataset, Scaler, rows_from_frame, sample_table, training_rows
from finpatch.experiment import SplitsConfig
from finpatch.features import compute_features
from finpatch.market import load_ohlcv
from finpatch.patchtst import PatchTST
from finpatch.targets import Task

SPLITS = SplitsConfig(train_end=date(2011, 12, 31), val_end=date(2015, 12, 31), test_end=date(2018, 12, 31))
CONTEXT = 60


@pytest.fixture(scope="module")
def bars():
    return load_ohlcv("SP500")


def make_rows(bars, until=None):
    features = compute_features(bars, "a20").loc[:until]  # a corrupted future may have no features; nobody may care
    return rows_from_frame("SP500", features.join(forward_adjust(bars).loc[features.index]), Task("direction"))


@pytest.fixture(scope="module")
def whole(bars):
    rows, names = make_rows(bars)
    return FinancialDataset([rows], names, Task("direction"), SPLITS, CONTEXT)


def seen_at(bars, t, scaler):
    "Return the last window up to session t, and the scaler that the bars would give."
    rows, names = make_rows(bars, until=t)
    data = FinancialDataset([rows], names, Task("direction"), SPLITS, CONTEXT, scaler, is_checked=False)
    at = rows.sessions.get_loc(t)
    return data.windows(torch.tensor([at])), rows


def fitted(rows):
    return Scaler.fit(rows.x[training_rows(sample_table(rows, SPLITS, 1), SPLITS.max_context)], ("",))


def test_windows_logits_and_scaler_at_200_random_cuts(bars, whole):
    torch.manual_seed(0)
    model = PatchTST(load_patchtst_config("20k")).eval()
    rng = np.random.default_rng(0)
    sessions = whole.samples["origin"]
    cuts = np.sort(rng.choice(len(sessions), 200, replace=False))
    n_fitted = 0
    for i, cut in enumerate(cuts):
        t = sessions[cut]
        want = whole.windows(whole.row[[cut]])
        truncated = bars.loc[:t]
        corrupted = corrupt_after(bars, bars.index.get_loc(t), seed=i)
        for changed in (truncated, corrupted):
            window, rows = seen_at(changed, t, whole.scaler)
            assert torch.equal(window, want), t
            with torch.no_grad():
                assert torch.equal(model(window), model(want))
            if t >= np.datetime64(SPLITS.train_end) and i % 10 == 0:
                n_fitted += 1
                assert np.array_equal(fitted(rows).mean, whole.scaler.mean)
                assert np.array_equal(fitted(rows).std, whole.scaler.std)
    assert n_fitted >= 10


def test_a_window_that_peeks_is_found(bars, whole):
    "The test above can fail: a window that ends one session later differs."
    t = whole.samples["origin"][2000]
    window, _ = seen_at(bars, t, whole.scaler)
    assert not torch.equal(window, whole.windows(whole.row[[2000]] + 1))


@pytest.mark.parametrize("context", [20, 60, 120, 512])
def test_every_context_meets_the_same_dates(context, bars, whole):
    rows, names = make_rows(bars)
    other = FinancialDataset([rows], names, Task("direction"), SPLITS, context)
    assert other.samples.equals(whole.samples)
    assert other.windows(other.row[:1]).shape == (1, context, 20)


def test_memory_grows_with_rows_not_with_context(whole):
    "The windows of 512 sessions own no more memory than those of 20: one tensor of rows."
    assert whole.x.untyped_storage().nbytes() == whole.x.numel() * 4


@pytest.mark.parametrize("horizon", [1, 5, 20])
def test_labels_of_training_never_reach_into_a_later_split(horizon, bars):
    features = compute_features(bars, "a20")
    frame = features.join(forward_adjust(bars).loc[features.index])
    rows, _ = rows_from_frame("SP500", frame, Task("regression", horizon=horizon))
    samples = sample_table(rows, SPLITS, horizon)
    ends, starts = samples.groupby("split")["target_end"].max(), samples.groupby("split")["origin"].min()
    assert ends["train"] <= starts["val"] and ends["val"] <= starts["test"]
    place = rows.sessions.get_indexer
    for early, late in (("train", "val"), ("val", "test")):
        last = samples.loc[samples["split"] == early, "origin"].max()
        assert place([starts[late]])[0] - place([last])[0] - 1 == horizon - 1
