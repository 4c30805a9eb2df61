"""G6, honest numbers. The risk: a verdict that sounds right on markets, where nobody knows the truth, and is wrong where one does.

One small draw of each kind is trained; seed 0 of everything. `make calibrate` trains twenty draws of nothing and the
larger ladders, and its page says how often each answer was right.
"""

import pytest

from finpatch.known_answers import RIGHT, known_answer

SHAPE = {"patch_length": 5, "stride": 5}
DRAWS = {
    "helps": {"n": 8000, "n_pairs": 4, "budgets": ("2k", "6k", "20k")},
    "best_then_worse": {"n": 20_000, "n_pairs": 4, "budgets": ("5k", "30k", "120k")},
    "nothing": {"n": 6000, "budgets": ("2k", "6k", "20k")},
    "leak_column": {"n": 6000, "budgets": ("2k", "6k")},
}


@pytest.mark.parametrize("kind", DRAWS)
def test_a_trained_draw_gets_its_right_answer(kind):
    found = known_answer(kind, **DRAWS[kind], **SHAPE)
    assert found["answer"] in RIGHT[kind], found
    if kind in ("helps", "best_then_worse"):
        assert found["bayes"] < min(found["loss"].values()) < found["baseline"], found
    if kind == "leak_column":  # the models use it: no honest forecast is better than the truth
        assert max(found["loss"].values()) < found["bayes"], found
    if kind == "nothing":
        assert min(found["loss"].values()) > found["bayes"] - 0.01, found
