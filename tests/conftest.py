"""Fixtures shared by the tests."""

import os
import shutil

import pytest
import torch
from browsing import BROWSERS

SKIPPED = {"mps": "no Apple GPU here: torch.backends.mps is not available", "cuda": "no CUDA device here"}


@pytest.fixture(params=["cpu", "mps", "cuda"])
def device(request) -> torch.device:
    "Each device in turn; one that this machine lacks is skipped with the reason."
    available = {"cpu": True, "mps": torch.backends.mps.is_available(), "cuda": torch.cuda.is_available()}
    if not available[request.param]:
        pytest.skip(SKIPPED[request.param])
    return torch.device(request.param)


def pytest_report_header(config):
    return f"torch {torch.__version__}, MPS {'tested' if torch.backends.mps.is_available() else 'not here: skipped'}"


@pytest.fixture(autouse=True)
def same_threads():
    "The number of threads decides the last bits: a test that changes it puts it back."
    before = torch.get_num_threads()
    yield
    after = torch.get_num_threads()
    torch.set_num_threads(before)
    assert after == before, f"a test left {after} threads instead of {before}"


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    "A data folder with the embedded SP500, tier a20; one for each file of tests."
    from finpatch.features import build_dataset
    from finpatch.market import fetch_ohlcv

    path = tmp_path_factory.mktemp("data")
    fetch_ohlcv("SP500", data_dir=path)
    build_dataset("SP500", "a20", data_dir=path)
    return path


@pytest.fixture(scope="module")
def raw6_dir(data_dir):
    "The same folder with tier raw6 beside it, as studies need it."
    from finpatch.features import build_dataset

    build_dataset("SP500", "raw6", data_dir=data_dir)
    return data_dir


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: `make install` does it")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not path:
        pytest.skip(f"none of {', '.join(BROWSERS)} is on the PATH: `.ci/run` installs Chromium where it may")
    with api.sync_playwright() as playwright:
        alone = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=path, args=alone)
        yield browser
        browser.close()
