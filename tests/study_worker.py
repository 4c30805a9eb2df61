"""A tiny study, what its child processes do, and how they start."""

import multiprocessing
import sys
import time
from datetime import date

from finpatch.experiment import ModelConfig, OptimConfig
from finpatch.folds import FoldsConfig
from finpatch.plan import AxesConfig, StudyConfig
from finpatch.rates import RatesConfig
from finpatch.search import run_search
from finpatch.study import run_study
from finpatch.trainer import Callback
from finpatch.work import serve

STUDY = StudyConfig(
    symbols=("SP500",),
    axes=AxesConfig(budgets=("2k", "4k"), n_seeds=2, tasks=("direction",), tiers=("raw6",), contexts=(20,)),
    folds=FoldsConfig(test_start=date(2013, 1, 1), test_end=date(2018, 12, 31), n_folds=2),
    optim=OptimConfig(lr=3e-3, warmup_steps=5, global_batch_size=256, epochs=2, patience=1),
    model=ModelConfig(patch_length=5, stride=5),
    rates=RatesConfig(n_points=3, max_extensions=0),
    thermal=None,
)
QUIET = {"device": "cpu", "is_progress_shown": False, "n_workers": 0}

# A forked child has torch, scikit-learn and the certificate of the device at once; elsewhere forking is not safe.
CONTEXT = multiprocessing.get_context("fork" if sys.platform == "linux" else "forkserver")


class Slow(Callback):
    "Make a step last long enough to be killed in."

    def after_step(self, trainer):
        time.sleep(0.1)


class HoldUntil(Callback):
    "Hold a cell after its third step, when it has sent checkpoints, until a file is there."

    def __init__(self, path):
        self.path = path

    def after_step(self, trainer):
        deadline = time.monotonic() + 60
        while trainer.step >= 3 and not self.path.exists() and time.monotonic() < deadline:
            time.sleep(0.02)


def study_in_child(study_dir, data):
    run_study(STUDY, data_dir=data, study_dir=study_dir, **QUIET)


def search_quietly(config, search_dir, data):
    how = {"device": "cpu", "is_cooled": False, "is_progress_shown": False}
    return run_search(config, "2k", data_dir=data, search_dir=search_dir, **how)


def parent_of_worker(study_dir, data, answer):
    "Start a worker, tell its process number, and wait to be killed."
    options = {"is_cooled": False, "callbacks": (Slow(),)}
    worker = CONTEXT.Process(target=serve, args=(STUDY, study_dir, data, "cpu", options, answer))
    worker.start()
    answer.send(worker.pid)
    time.sleep(600)
