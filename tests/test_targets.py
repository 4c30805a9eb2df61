"""G2, one target. Risk: trained on closes and scored on highs, a regression trained with a classifier's loss, labels of z-scores.

Every rule against a loop over days written apart from it; labels that no rescaling moves; known answers on real data.
"""

import pickle
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from finpatch.causal import random_bars
from finpatch.core import InputError
from finpatch.market import load_ohlcv
from finpatch.targets import Task, class_balance, parse_task, task_names

PRICES = ["Open", "High", "Low", "Close"]


@pytest.fixture(scope="module")
def sp500():
    return load_ohlcv("SP500")


def label_by_hand(name, prices, t, h):
    "One label, from the rows t−60 … t+h alone."
    high, low, close = (prices[column].tolist() for column in ("High", "Low", "Close"))
    if t + h >= len(close):
        return np.nan
    if name == "direction":
        return float(close[t + h] / close[t] - 1 > 1e-9)
    if name.startswith("threshold"):
        return float(max(high[t + 1 : t + h + 1]) >= close[t] * (1 + float(name[10:-3]) / 100))
    if name == "log_range":
        spread = np.log(max(high[t + 1 : t + h + 1]) / min(low[t + 1 : t + h + 1]))
        return np.log(spread) if spread > 1e-9 else np.nan
    if t < 60:
        return np.nan
    return np.log(close[t + h] / close[t]) / np.std(np.diff(np.log(close[t - 60 : t + 1])), ddof=1)


@settings(max_examples=12, deadline=None, phases=[Phase.explicit, Phase.generate])  # shrinking a market says nothing
@given(seed=st.integers(0, 10_000), horizon=st.integers(1, 25))
def test_labels_are_those_of_the_definitions(seed, horizon):
    prices = random_bars(120, seed)
    for name in task_names():
        expected = [label_by_hand(name, prices, t, horizon) for t in range(len(prices))]
        np.testing.assert_allclose(Task(name, horizon).labels(prices), expected, rtol=1e-9, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("horizon", [1, 5, 20])
@pytest.mark.parametrize("name", task_names())
def test_rescaling_moves_no_label(sp500, name, horizon):
    "Another currency, a vendor's re-basing, a split: the same labels, bit for bit where they are classes."
    task, bars = Task(name, horizon), sp500.loc["2000":"2008"]
    before, n = task.labels(bars), len(bars) // 2
    currency, rebased, split = bars.copy(), bars.copy(), bars.copy()
    currency[[*PRICES, "Adj Close"]] *= 1000
    rebased["Adj Close"] *= 0.98137
    split.iloc[:n, :4] *= 3
    for other in (currency, rebased, split):
        np.testing.assert_allclose(task.labels(other), before, rtol=1e-7, atol=1e-9 if task.kind == "real" else 0)
    assert before.iloc[-horizon:].isna().all() and before.iloc[60:-horizon].notna().all()


def test_unscaled_prices_only(sp500):
    for scaled in (
        (sp500 - sp500.mean()) / sp500.std(),
        (sp500 - sp500.min()) / (sp500.max() - sp500.min()) + 0.01,
        np.log(sp500[PRICES]) - 8,
    ):
        for name in ("direction", "threshold_1pct", "regression"):
            with pytest.raises(InputError, match="prices must be positive|Low ≤ Close ≤ High"):
                Task(name).labels(scaled)


def test_known_answers_on_real_data(sp500):
    "The base rate of threshold_1pct falls from 0.240 to 0.119 between training and the last 15 %."
    y = Task("threshold_1pct").labels(sp500).iloc[400:]
    assert round(y.iloc[: int(0.70 * len(y))].mean(), 3) == 0.240
    assert round(y.iloc[int(0.85 * len(y)) :].mean(), 3) in (0.119, 0.120)


def test_apple_at_its_split():
    "Bars of 2005-02-25 and 2005-02-28: the label is +0.008 in logs, not −0.685."
    bars = pd.DataFrame(
        {
            "Open": [89.6, 44.7],
            "High": [89.9, 45.1],
            "Low": [88.2, 43.9],
            "Close": [88.99, 44.86],
            "Adj Close": [44.495, 44.86],
            "Volume": [1.0, 2.0],
        },
        index=pd.to_datetime(["2005-02-25", "2005-02-28"]),
    )
    assert Task("direction").labels(bars).iloc[0] == 1
    move = Task("move", 1, ("real", lambda prices, h: np.log(prices["Close"].shift(-h) / prices["Close"]))).labels(bars)
    assert abs(move.iloc[0] - 0.008) < 5e-4


def test_loss_link_and_metrics_agree_with_the_kind():
    logits, y = torch.tensor([[-1.5], [0.0], [2.0]]), torch.tensor([0.0, 1.0, 1.0])
    for name in task_names():
        task = Task(name)
        loss = task.loss(logits, y)
        assert loss.shape == (3,) and task.n_outputs == 1
        if task.kind == "binary":
            p = 1 / (1 + np.exp(-logits[:, 0].numpy()))
            expected = -np.log(np.where(y == 1, p, 1 - p))
            assert task.metrics[0] == "log_loss" and np.allclose(task.link(logits.numpy())[:, 0], p)
        else:
            expected = (logits[:, 0] - y).numpy() ** 2
            assert task.metrics[0] == "mse" and np.array_equal(task.link(logits.numpy()), logits.numpy())
        np.testing.assert_allclose(loss, expected, rtol=1e-6)


@pytest.mark.parametrize("shapes", [((3, 1), (3, 1)), ((3,), (3,)), ((3, 2), (3,)), ((3, 1), (4,))])
def test_a_loss_never_broadcasts(shapes):
    for name in ("direction", "regression"):
        with pytest.raises(InputError, match=r"logits are \(B, 1\)"):
            Task(name).loss(torch.zeros(shapes[0]), torch.zeros(shapes[1]))


def test_a_gradient_reaches_the_logits_in_half_precision():
    logits = torch.zeros(4, 1, dtype=torch.bfloat16, requires_grad=True)
    Task("direction").loss(logits, torch.tensor([0.0, 1.0, 1.0, 0.0])).sum().backward()
    assert logits.grad.flatten().tolist() == [0.5, -0.5, -0.5, 0.5]


def test_prior_logit_minimises_the_loss():
    y = np.array([1.0, 0, 0, 0, np.nan])
    task = Task("direction")
    at = task.prior_logit(y)
    assert np.isclose(at, np.log(1 / 3))
    losses = [task.loss(torch.full((4, 1), at + step), torch.tensor(y[:4])).mean() for step in (-0.1, 0.0, 0.1)]
    assert losses[1] == min(losses) and Task("regression").prior_logit(y) == 0.25
    with pytest.raises(InputError, match="both classes"):
        task.prior_logit(np.ones(5))


def sum_of_two(prices, horizon):
    return (
        (np.log(prices["Close"]).diff().shift(-horizon) > 0)
        .astype(float)
        .where(prices["Close"].shift(-horizon).notna())
    )


def test_tasks_travel():
    "Equal, hashed and pickled as values, one's own included; written and read as one word."
    own = Task.from_function("sum_of_two", sum_of_two, "binary", 2)
    for task in (Task("direction"), Task("log_range", 5), own):
        again = pickle.loads(pickle.dumps(task))
        assert again == task and hash(again) == hash(task) and again.kind == task.kind
    assert Task("direction") != Task("direction", 2)
    assert parse_task(str(Task("threshold_0.5pct", 20))) == Task("threshold_0.5pct", 20)
    with pytest.raises(AttributeError):
        Task("direction").horizon = 5


BAD_RULES = {
    "looks further": lambda p, h: (
        (p["Close"].shift(-h - 1) > p["Close"]).astype(float).where(p["Close"].shift(-h - 1).notna())
    ),
    "looks at most": lambda p, h: (p["Close"] > p["Close"].mean()).astype(float).where(p["Close"].shift(-h).notna()),
    "NaN in the last": lambda p, h: (p["Close"].diff() > 0).astype(float),
    "0 or 1": lambda p, h: p["Close"].shift(-h) - p["Close"],
    "one label per session": lambda p, h: p["Close"].shift(-h).dropna(),
}


@pytest.mark.parametrize("message", BAD_RULES)
def test_rules_of_ones_own_keep_their_word(message):
    with pytest.raises(InputError, match=message):
        Task.from_function("mine", BAD_RULES[message], "binary", 3)


def test_class_balance_counts(sp500):
    table = class_balance(sp500.loc["2016":], (1, 5), ("threshold_2pct", "regression")).set_index(["task", "horizon"])
    assert table.at[("threshold_2pct", 1), "n_rarer"] == 16
    assert table.at[("threshold_2pct", 5), "n_episodes"] < table.at[("threshold_2pct", 5), "n_rarer"]
    assert table.loc["regression", "n_rarer"].isna().all() and table["n_labels"].tolist() == [
        754 - 1,
        754 - 5,
        754 - 61,
        754 - 65,
    ]


def test_importing_targets_loads_no_torch_and_no_ta_lib():
    code = "import sys, finpatch.targets, finpatch.features; print({'torch', 'talib', 'sklearn', 'scipy.stats'} & set(sys.modules))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        == "set()"
    )
