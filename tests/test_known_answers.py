"""G6, honest numbers. The risk: a verdict that sounds right on markets, where nobody knows the truth, and is wrong where one does.

One small draw of each kind is trained; seed 0 of everything. `make calibrate` trains twenty draws of nothing and the
larger ladders, and its page says how often each answer was right.
"""

import pytest

from finpatch.known_answers import RIGHT, known_answer, train_surface
from finpatch.surface import best_sizes, favour
from finpatch.synthetic import make_series

SHAPE = {"patch_length": 5, "stride": 5}
DRAWS = {
    "helps": {"n": 8000, "n_pairs": 4, "budgets": ("2k", "6k", "20k")},
    "best_then_worse": {"n": 20_000, "n_pairs": 4, "budgets": ("5k", "30k", "120k"), "n_seeds": 3},  # as studies have
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


def test_more_data_favours_larger_sizes_where_the_signal_takes_them():
    "The contrast must say so, and the best size on the most data must be larger than on the least."
    series = make_series("helps", 22_858, n_pairs=4)
    surface = train_surface(series, ("2500", "40k"), (2000, 16_000), n_steps=800, **SHAPE)
    best, _ = best_sizes(surface)
    assert favour(surface).high < 0 and best[0] < best[1], (favour(surface), surface.mean)
    assert surface.mean[1].max() < surface.mean[0].min(), surface.mean  # more data is better at every size
