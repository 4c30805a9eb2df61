"""The page of a study. Risk: a number that nobody can trace, a page that needs a network, torch, or luck to be had again.

One tiny study is trained for all tests; its page is made in a process that refuses torch.
"""

import re
import shutil
import subprocess
import sys
from datetime import date
from html.parser import HTMLParser

import pandas as pd
import pytest
from browsing import LOOK, WIDTHS, Watch

from finpatch.core import read_json, write_json
from finpatch.experiment import OptimConfig
from finpatch.features import build_dataset
from finpatch.folds import FoldsConfig
from finpatch.market import fetch_ohlcv
from finpatch.plan import AxesConfig, StudyConfig
from finpatch.report import build_report, make_report
from finpatch.stored import read_stored
from finpatch.study import run_study

REFUSING = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "safetensors"):
            raise ImportError(f"{name} is refused here")

sys.meta_path.insert(0, Refuse())
from finpatch.cli import main
sys.exit(main(["report", sys.argv[1]]))
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A study of two sizes and two seeds on one fold, as it is when it ends."
    tmp = tmp_path_factory.mktemp("report")
    fetch_ohlcv("SP500", data_dir=tmp / "data")
    build_dataset("SP500", "raw6", data_dir=tmp / "data")
    folds = FoldsConfig(test_start=date(2017, 1, 1), test_end=date(2018, 12, 31), n_folds=1)
    axes = AxesConfig(budgets=("2k", "4k"), n_seeds=2, tasks=("log_range",), tiers=("raw6",))
    optim = OptimConfig(lr=3e-3, warmup_steps=5, global_batch_size=256, epochs=2, patience=1)
    config = StudyConfig(symbols=("SP500",), axes=axes, folds=folds, optim=optim, rates=None, thermal=None)
    how = {"n_workers": 0, "is_cooled": False, "is_progress_shown": False, "device": "cpu"}
    return run_study(config, data_dir=tmp / "data", study_dir=tmp / "study", **how)


@pytest.fixture(scope="module")
def text(trained):
    "Its page, made once."
    return build_report(trained).read_text()


def page_of(folder):
    "The page of a changed copy, without the files beside it."
    return "\n".join(make_report(read_stored(folder)).body)


@pytest.fixture
def study(trained, tmp_path):
    "A copy, to be changed."
    return shutil.copytree(trained, tmp_path / "study")


def report_without_torch(folder):
    return subprocess.run([sys.executable, "-c", REFUSING, str(folder)], capture_output=True, text=True)


def files_of(study):
    return {p.name: p.read_bytes() for p in (study / "report.html", *(study / "report").iterdir())}


def test_same_bytes_and_no_torch(trained, text, tmp_path):
    "A second process, which cannot import torch and has no data folder, makes the same files."
    first, study = files_of(trained), shutil.copytree(trained, tmp_path / "study")
    for path in (study / "report.html", *(study / "report").iterdir()):
        path.unlink()
    done = report_without_torch(study)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("report.html")
    assert files_of(study) == first
    assert {name.rsplit(".")[-1] for name in first} == {"html", "png", "csv"}
    assert len([name for name in first if name.endswith(".png")]) == 6


class Links(HTMLParser):
    "What a page would fetch, and where its links lead."

    def __init__(self):
        super().__init__()
        self.fetched, self.links, self.ids, self.tags = [], [], [], set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        for name, value in attrs:
            if name in ("href", "xlink:href"):
                (self.links if tag in ("a", "use") else self.fetched).append(value)
            elif name in ("src", "srcset", "data", "poster"):
                self.fetched.append(value)
            elif name == "id":
                self.ids.append(value)


def test_offline(text):
    "The page names no address at all, runs nothing, and its links lead within it."
    page = Links()
    page.feed(text)
    assert not page.fetched and "script" not in page.tags
    assert "http" not in text and "@import" not in text
    assert {link[0] for link in page.links} == {"#"}
    assert {link[1:] for link in page.links} <= set(page.ids)


def test_every_key_is_a_row(trained, text):
    "Each key of page and tables names a row of the results; each row can be reached."
    keys = set(pd.read_parquet(trained / "results.parquet")["key"])
    linked = set(re.findall(r'<a href="#([^"]+)">', text))
    assert linked == keys  # no cell is outside what was judged: nothing was searched
    assert set(re.findall(r'<tr id="([^"]+)">', text)) == keys
    sizes = pd.read_csv(next((trained / "report").glob("*.sizes.csv")))
    assert set(" ".join(sizes["cells"]).split()) == keys


def test_numbers_are_those_of_the_verdict(study):
    "Sentence, losses and looks come from verdict.json, and power stands before the verdict."
    said = read_json(study / "verdict.json")
    said["questions"][0] |= {"sentence": "Bigger is <odd>.", "n_test_looks": 4321}  # as no other number of the page
    said["questions"][0]["by_size"][0]["loss"] = {"value": 0.1234, "low": 0.1134, "high": 0.1334}
    write_json(study / "verdict.json", said)
    text = page_of(study)
    assert "Bigger is &lt;odd&gt;." in text and ">4321<" in text and "0.1234 ± 0.0100" in text
    assert text.index("separate budgets") < text.index("Bigger is &lt;odd&gt;.")


def test_refused_and_capped_cells_are_named(study):
    table = pd.read_parquet(study / "results.parquet")
    is_size = (table["role"] == "study") & (table["budget"] == "4k")
    table.loc[is_size, ["status", "reason"]] = ["refused", "the model is too large"]
    table["is_capped"] = False
    table.to_parquet(study / "results.parquet")
    said = read_json(study / "verdict.json")
    one = said["questions"][0]
    one |= {
        "budgets": ["2k"],
        "by_size": one["by_size"][:1],
        "left_out": {"4k": "2 of 2 cells refused"},
        "sentence": "fewer than two",
    }
    write_json(study / "verdict.json", said)
    text = page_of(study)
    assert text.count("the model is too large") == 2
    assert "2 of 5 cells are open, refused" in text
    assert "nothing can be said of sizes" in text


def test_a_study_without_cells_on_disk(study):
    "Curves and lineage leave a gap where the cells were removed."
    shutil.rmtree(study / "cells")
    assert "<h2>Verdict</h2>" in page_of(study)


def test_a_stopped_study_has_no_verdict(study):
    for name in ("verdict.json", "folds.json", "losses.parquet", "predictions.parquet"):
        (study / name).unlink()
    write_json(
        study / "state.json", {"status": "stopped", "n_cells": 5, "n_open": 2, "failed": {"worker": "process ended"}}
    )
    text = page_of(study)
    assert "The study is stopped: 2 of 5 cells are open" in text and "process ended" in text
    assert "<h2>Verdict</h2>" not in text


@pytest.mark.parametrize("name", ["nothing", "empty"])
def test_no_study(tmp_path, name):
    (tmp_path / "empty").mkdir()
    done = report_without_torch(tmp_path / name)
    assert done.returncode == 1
    assert done.stderr.startswith("finpatch: a report needs the folder of a study; got no")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_fits_a_telephone_and_a_desk(browser, trained, text, width):
    "Opened as a file with the network cut, with every folded part open; a wide table scrolls by itself."
    with Watch(browser, width) as watch:
        watch.context.set_offline(True)
        assert watch.look((trained / "report.html").as_uri()) == []
        watch.page.evaluate("document.querySelectorAll('details').forEach((part) => (part.open = true))")
        assert watch.page.evaluate(LOOK) == [] and watch.page.locator("details[open]").count() > 0
        assert watch.page.locator("img, svg").count() > 3
