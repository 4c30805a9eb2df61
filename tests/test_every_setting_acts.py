"""G5. Risk: a setting is read, searched over and reported, and never reaches the model or the run.

Every field of the experiment is changed once, alone, and something that the field is about must change with it.
"""

import dataclasses
import itertools
from datetime import date
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from finpatch.callbacks import EarlyStop, Schedule, default_callbacks
from finpatch.checkpoint import Checkpoint
from finpatch.compute import recompute, set_up
from finpatch.config import dump_yaml, load_yaml, parse_config, plain
from finpatch.core import HardwareError, InputError, NotFoundError, read_json
from finpatch.dataset import FinancialDataset, SymbolRows, load_dataset
from finpatch.experiment import (
    ComputeConfig,
    ExperimentConfig,
    ModelConfig,
    OptimConfig,
    SplitsConfig,
    load_experiment_config,
)
from finpatch.panel import PanelConfig
from finpatch.pretrain import MaskedTrainer, PretrainConfig, load_masked, make_masked_model
from finpatch.run import make_model, override, resume_run, train_run
from finpatch.sensors import Reading
from finpatch.targets import Task
from finpatch.thermal import ThermalCallback
from finpatch.thermal_config import ThermalConfig
from finpatch.tracking import make_trackers, tracked
from finpatch.trainer import Callback, Trainer

SHIPPED = ("sp500_direction", "sp500_threshold_1pct", "sp500_regression", "sp500_log_range", "spy_direction")
DAYS = pd.DatetimeIndex(pd.bdate_range("2001-01-01", periods=1200), name="session")
BASE = ExperimentConfig(
    seed=0,
    dataset=("TOY.dataset.a20",),
    task="direction",
    horizon=1,
    context_length=20,
    splits=SplitsConfig(
        train_end=DAYS[499].date(), val_end=DAYS[799].date(), test_end=DAYS[1099].date(), max_context=30
    ),
    optim=OptimConfig(lr=1e-3, epochs=2, warmup_steps=4, patience=None),
)
MASKED = PretrainConfig(
    seed=0,
    dataset=("A.dataset.toy", "B.dataset.toy"),
    context_length=20,
    end=DAYS[499].date(),
    val_sessions=100,
    model=ModelConfig(patch_length=5, stride=5),
    optim=BASE.optim,
)
CPU = torch.device("cpu")
CHANGES = {
    "seed": 1,
    "task": "threshold_1pct",
    "horizon": 2,
    "context_length": 25,
    "splits.train_end": DAYS[480].date(),
    "splits.val_end": DAYS[780].date(),
    "splits.test_end": DAYS[1050].date(),
    "splits.train_start": DAYS[100].date(),
    "splits.embargo": 3,
    "splits.max_context": 40,
    "model.patch_length": 8,
    "model.stride": 4,
    "model.dropout": 0.3,
    "model.head_dropout": 0.3,
    "model.channel_mode": "independent",
    "model.revin": True,
    "optim.lr": 2e-3,
    "optim.weight_decay": 0.5,
    "optim.beta1": 0.5,
    "optim.beta2": 0.5,
    "optim.warmup_steps": 8,
    "optim.final_lr_ratio": 0.5,
    "optim.max_grad_norm": 0.01,
    "optim.global_batch_size": 32,
    "optim.epochs": 3,
    "optim.max_steps": 5,
    "optim.patience": 1,
    "compute.precision": "bf16",
    "compute.is_compiled": True,
    "compute.is_checkpointed": True,
    "compute.checkpoint_every_s": 7.0,
}
HEAT = {
    "thermal.fair_c": 60.0,
    "thermal.serious_c": 80.0,
    "thermal.critical_c": 90.0,
    "thermal.hysteresis_c": 0.0,
    "thermal.dwell_s": 5.0,
    "thermal.interval_s": 20.0,
    "thermal.duty": 0.25,
    "thermal.max_pause_s": 20.0,
    "thermal.stop_after_s": 60.0,
    "thermal.required": True,
}
PANEL = {"panel.scaler": "per_symbol", "panel.universe": "a file with spans", "panel.min_symbols": 3, "panel.train_symbols": 2}
BEGIN = {"model.pretrained", "model.is_frozen"}  # test_pretrain: where the weights begin, and which of them move
PRETRAIN = {
    "seed": 1,
    "dataset": ("A.dataset.toy",),
    "context_length": 25,
    "end": DAYS[450].date(),
    "start": DAYS[60].date(),
    "val_sessions": 80,
    "mask_ratio": 0.7,
    "model.patch_length": 4,
    "model.dropout": 0.3,
    "model.head_dropout": 0.3,
    "model.channel_mode": "independent",
    "model.revin": True,
    "panel.scaler": "per_symbol",
    "panel.universe": "a file with spans",
    "panel.train_symbols": 1,
    **{k: v for k, v in CHANGES.items() if k.startswith(("optim.", "compute.")) and k != "compute.checkpoint_every_s"},
}
TRACKED = {"wandb_project": ("wandb", "p"), "mlflow_experiment": ("mlflow", "m")}  # test_tracking reads them back


def changed(config: ExperimentConfig, key: str, value: object) -> ExperimentConfig:
    owner, _, name = key.rpartition(".")
    if not owner:
        return dataclasses.replace(config, **{name: value})
    return dataclasses.replace(config, **{owner: dataclasses.replace(getattr(config, owner), **{name: value})})


def outcome(config: ExperimentConfig, folder) -> tuple:
    "Train and return what a reader would see: samples, weights, steps, losses, checkpoints, effective settings."
    rng = np.random.default_rng(0)
    close = 100 * np.exp(np.cumsum(rng.normal(0, 0.01, len(DAYS))))
    prices = pd.DataFrame(
        {"Open": close, "High": close * 1.012, "Low": close * 0.99, "Close": close, "Volume": 1.0}, index=DAYS
    )
    task = Task(config.task, horizon=config.horizon)
    x = rng.normal(size=(len(DAYS), 3)).astype(np.float32)
    rows = SymbolRows("TOY", DAYS, x, task.labels(prices).to_numpy())
    data = FinancialDataset([rows], ("a", "b", "c"), task, config.splits, config.context_length)
    model = make_model(config, "10k", data)
    x, _ = data.batch(data.index["train"][: config.optim.global_batch_size])
    effective = set_up(model, config.compute, x, CPU, backend="eager")
    checkpoint = Counted(folder / "checkpoints", config.compute.checkpoint_every_s, clock=itertools.count(0.0).__next__)
    callbacks = [*default_callbacks(folder, config.optim, False), checkpoint]
    options = {"seed": config.seed, "precision": effective["precision"], "callbacks": callbacks}
    trainer = Trainer(model, data, config.optim, **options).fit()
    weights = torch.cat([p.detach().flatten() for p in model.parameters()]).sum().item()
    seen = (trainer.step, trainer.val_loss, len(data.samples), data.samples["y"].sum())
    return weights, *seen, checkpoint.n_saved, *effective.items()


class Counted(Checkpoint):
    "A checkpoint whose clock goes on by a second each time it is read, and that counts instead of writing."

    n_saved = 0

    def save(self, trainer):
        self.n_saved, self.saved_at = self.n_saved + 1, self.clock()


class Machine:
    "A clock, a temperature each ten seconds of it, and a trainer's face; a step works for four seconds."

    temps = (66, 66, 72, 72, 82, 86, 83, 60, 60, 60, 60, 92, 60, 60, 60, 60, *[97] * 40)

    def __init__(self, interval_s):
        self.interval_s, self.now, self.step, self.stop_reason = interval_s, 0.0, 0, None
        self.shown, self.extra = {}, {}

    def latest(self):
        at = self.now // self.interval_s * self.interval_s
        return Reading(temp_c=self.temps[min(int(at // 10), len(self.temps) - 1)])

    def sleep(self, seconds):
        self.now += seconds

    def make_reader(self, *_):
        return SimpleNamespace(latest=self.latest, first=Reading, end=lambda: None)

    def request_pause(self, reason):
        self.stop_reason = self.stop_reason or reason

    def emit(self, event): ...

    is_over = property(lambda self: self.stop_reason is not None)


def heat_outcome(config: ThermalConfig) -> list:
    "Return what became of each step under heat; a machine without a sensor if one is required."
    machine = Machine(config.interval_s)
    faces = {"sleep": machine.sleep, "clock": lambda: machine.now, "make_reader": machine.make_reader}
    heat = ThermalCallback(machine.latest, config, **faces)
    heat.before_fit(machine)
    while not machine.is_over:
        machine.now, machine.step = machine.now + 4, machine.step + 1
        heat.after_step(machine)
    return list(heat.trace.rows)


def panel_outcome(config: ExperimentConfig) -> tuple:
    "Return samples, labels and scaled rows of three symbols, of which one is listed late and trades on fewer days."
    rng, frames = np.random.default_rng(0), {}
    for i, symbol in enumerate(config.symbols):
        days = DAYS[i * 40 :][rng.random(len(DAYS) - i * 40) < 1 - 0.1 * i]
        close = 100 * np.exp(np.cumsum(rng.normal(0, 0.01, len(days))))
        features = rng.normal(i, 1 + i, size=(len(days), 3)).astype(np.float32)
        frames[symbol] = pd.DataFrame(features, index=days, columns=list("abc")).assign(Close=close)
    data = load_dataset(config, frames=frames, is_checked=False)
    return len(data.samples), data.samples["y"].sum(), data.x.sum().item()


def all_fields(config=BASE) -> set[str]:
    names = set()
    for f in dataclasses.fields(config):
        owner = getattr(config, f.name)
        nested = dataclasses.is_dataclass(owner)
        names |= {f"{f.name}.{g.name}" for g in dataclasses.fields(owner)} if nested else {f.name}
    return names


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return outcome(BASE, tmp_path_factory.mktemp("base"))


def test_every_field_is_listed_here():
    tested_there = {"dataset", "compute.parallel"}  # test_integration, test_distributed
    assert all_fields() == set(CHANGES) | set(HEAT) | set(PANEL) | set(TRACKED) | BEGIN | tested_there
    elsewhere = {"thermal", "model.stride", "panel.min_symbols", "compute.checkpoint_every_s", "compute.parallel"}
    asked = {k for k in all_fields(MASKED) if k not in BEGIN and not k.startswith("thermal.")} | {"thermal"}
    assert asked == set(PRETRAIN) | elsewhere  # by the one path to a run; a stride is its patch length; no label, no peers


def test_the_same_config_gives_the_same_outcome(base, tmp_path):
    assert outcome(BASE, tmp_path) == base


@pytest.mark.parametrize("key", CHANGES)
def test_changing_a_field_changes_the_outcome(key, base, tmp_path):
    config, reference = changed(BASE, key, CHANGES[key]), base
    if key == "optim.patience":  # acts where validation gets worse
        config = changed(changed(config, "optim.epochs", 12), "optim.lr", 2e-2)
        (tmp_path / "without").mkdir()
        reference = outcome(changed(config, key, None), tmp_path / "without")
    assert outcome(config, tmp_path) != reference


@pytest.mark.parametrize("key", HEAT)
def test_changing_a_field_of_the_heat_changes_what_becomes_of_a_step(key):
    changed_config = changed(BASE, key, HEAT[key]).thermal
    if key == "thermal.required":
        with pytest.raises(HardwareError, match="thermal.required"):
            heat_outcome(changed_config)
    else:
        assert heat_outcome(changed_config) != heat_outcome(BASE.thermal)


@pytest.mark.parametrize("key", PANEL)
def test_changing_a_field_of_the_panel_changes_its_samples_labels_or_rows(key, tmp_path):
    names = tuple(f"{s}.dataset.c12" for s in "ABC")
    base = dataclasses.replace(BASE, task="excess", dataset=names, panel=PanelConfig(min_symbols=2))
    value = PANEL[key]
    if key == "panel.universe":
        (tmp_path / "own.csv").write_text(f"symbol,from,to\nA,,\nB,{DAYS[300].date()},{DAYS[700].date()}\nC,,\n")
        value = str(tmp_path / "own.csv")
    assert panel_outcome(changed(base, key, value)) != panel_outcome(base)
    assert panel_outcome(base) == panel_outcome(base)


def masked_outcome(config: PretrainConfig) -> tuple:
    "Pre-train and return what a reader would see: windows, weights, steps, the validation error, effective settings."
    rng, frames = np.random.default_rng(0), {}
    for i, symbol in enumerate("AB"):
        wave = np.sin(np.arange(len(DAYS))[:, None] / 4 + i + np.arange(3)) + rng.normal(i, 0.3, size=(len(DAYS), 3))
        frames[symbol] = pd.DataFrame(wave.astype(np.float32), index=DAYS, columns=list("abc")).assign(Close=1.0)
    data = load_masked(config, frames=frames)
    model = make_masked_model(config, "10k", data)
    x, _ = data.batch(data.index["train"][: config.optim.global_batch_size])
    effective = set_up(model, config.compute, x, CPU, backend="eager")
    callbacks = [Schedule(), EarlyStop(config.optim.patience)]
    options = {"seed": config.seed, "precision": effective["precision"], "callbacks": callbacks}
    trainer = MaskedTrainer(model, data, config.optim, **options).fit()
    weights = torch.cat([p.detach().flatten() for p in model.parameters()]).sum().item()
    return weights, trainer.step, trainer.val_loss, len(data.samples), data.x.sum().item(), *effective.items()


@pytest.fixture(scope="module")
def masked_base():
    return masked_outcome(MASKED)


@pytest.mark.parametrize("key", PRETRAIN)
def test_changing_a_field_of_a_pre_training_changes_the_outcome(key, masked_base, tmp_path):
    config, reference, value = changed(MASKED, key, PRETRAIN[key]), masked_base, PRETRAIN[key]
    if key == "model.patch_length":
        config = changed(MASKED, "model", ModelConfig(patch_length=value, stride=value))
    if key == "panel.universe":
        (tmp_path / "own.csv").write_text(f"symbol,from,to\nA,,\nB,{DAYS[300].date()},\n")
        config = changed(MASKED, key, str(tmp_path / "own.csv"))
    if key == "optim.patience":
        config = changed(changed(config, "optim.epochs", 20), "optim.lr", 5e-2)
        reference = masked_outcome(changed(config, key, None))
    assert masked_outcome(config) != reference


def test_the_same_pre_training_gives_the_same_outcome(masked_base):
    assert masked_outcome(MASKED) == masked_base


class Caught(Exception):
    pass


def test_the_settings_of_compute_and_thermal_reach_the_run(data_dir, tmp_path, monkeypatch):
    "What is built for a run, by the one path to a run; nothing is trained."

    def catch(model, *_, **options):
        raise Caught(model, options)

    monkeypatch.setattr("finpatch.run.Trainer", catch)
    config = override(load_experiment_config("sp500_direction"), precision="bf16", checkpoint_every_s=7.0)
    config = changed(changed(config, "compute.is_checkpointed", True), "thermal.dwell_s", 5.0)
    with pytest.raises(Caught) as caught:
        train_run(config, "5k", data_dir=data_dir, run_dir=tmp_path / "run", is_progress_shown=False)
    model, options = caught.value.args
    parts = {type(c): c for c in options["callbacks"]}
    assert options["precision"] == "bf16" and model.run_block is recompute
    assert parts[Checkpoint].every_s == 7.0 and parts[ThermalCallback].config == config.thermal
    record = read_json(tmp_path / "run" / "run.json")
    assert record["config"]["compute"] == plain(config.compute) and record["config"]["thermal"]["dwell_s"] == 5.0
    effective = {"precision": "bf16", "is_compiled": False, "is_checkpointed": True, "is_fused": True, "parallel": None, "n_ranks": 1}
    heat = parts[ThermalCallback].start()
    parts[ThermalCallback].close()
    assert record["effective"] == effective | {"checkpoint_every_s": 7.0, "heat": heat}
    with pytest.raises(Caught) as caught:
        train_run(override(config, is_cooled=False), "5k", data_dir=data_dir, run_dir=tmp_path / "off")
    assert ThermalCallback not in {type(c) for c in caught.value.args[1]["callbacks"]}
    assert read_json(tmp_path / "off" / "run.json")["effective"]["heat"] == "off"


class PauseAt(Callback):
    def after_step(self, trainer):
        if trainer.step == 2:
            trainer.request_pause("asked")


def test_what_was_asked_is_kept_beside_what_was_done_and_a_resumed_run_keeps_both(data_dir, tmp_path, monkeypatch):
    "Asked to compile on a machine whose compiler fails, and resumed with a checkpoint each five seconds."
    monkeypatch.setattr("torch.nn.Module.compile", lambda *_, **__: 1 / 0)
    config = override(load_experiment_config("sp500_direction"), precision="auto", max_steps=4, is_cooled=False)
    config = changed(config, "compute.is_compiled", True)
    options = {"data_dir": data_dir, "is_progress_shown": False}
    path = train_run(config, "5k", run_dir=tmp_path / "run", callbacks=(PauseAt(),), **options)
    resume_run(path, checkpoint_every_s=5.0, **options)
    record = read_json(path / "run.json")
    assert record["config"]["compute"] == plain(config.compute) and record["config"]["thermal"] is None
    first, last = record["effective"], record["sessions"][-1]["effective"]
    assert (first["precision"], first["is_compiled"], first["checkpoint_every_s"], first["heat"]) == (
        "fp32",
        False,
        60.0,
        "off",
    )
    assert last == first | {"checkpoint_every_s": 5.0}
    assert read_json(path / "result.json")["is_bitwise"] is True


def test_a_file_without_the_newer_sections_has_their_defaults(tmp_path):
    mapping = plain(BASE)
    elder = {k: v for k, v in mapping.items() if k not in ("compute", "thermal")}
    assert parse_config(ExperimentConfig, elder) == BASE
    assert parse_config(ExperimentConfig, mapping | {"thermal": None}).thermal is None


@pytest.mark.parametrize("key", TRACKED)
def test_naming_a_tracker_makes_it_and_the_record_says_so(key, tmp_path):
    record, config = {}, changed(BASE, key, TRACKED[key][1])
    assert make_trackers(BASE, tmp_path) == []
    with tracked(config, tmp_path, record) as callback:
        assert [(post.tracker.name, post.tracker.where) for post in callback.posts] == [TRACKED[key]]
    assert record == {"trackers": [TRACKED[key][0]]}
    with pytest.raises(InputError, match=key):
        changed(BASE, key, "")


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_experiments_read_back_and_build(name, tmp_path):
    config = load_experiment_config(name)
    (tmp_path / "copy.yaml").write_text(dump_yaml(config))
    assert load_experiment_config(tmp_path / "copy.yaml") == config
    assert config.splits.train_end == date(2011, 12, 31)
    assert Task(config.task, horizon=config.horizon).kind in ("binary", "real")


BAD = {
    "unknown key": (lambda c: c | {"horizn": 1}, "Did you mean `horizon`"),
    "unknown nested key": (lambda c: c | {"optim": c["optim"] | {"learning_rate": 1}}, "`optim.learning_rate`"),
    "missing key": (lambda c: {k: v for k, v in c.items() if k != "task"}, "`task` is required"),
    "missing nested key": (lambda c: c | {"splits": {"train_end": date(2011, 1, 1)}}, "`splits.val_end` is required"),
    "text for a number": (lambda c: c | {"horizon": "one"}, "`horizon` must be int; got 'one'"),
    "a boolean for a number": (lambda c: c | {"seed": True}, "`seed` must be int"),
    "text for a date": (
        lambda c: c | {"splits": c["splits"] | {"train_end": "soon"}},
        "`splits.train_end` must be date",
    ),
    "out of range": (lambda c: c | {"horizon": 0}, "horizon"),
    "nested out of range": (lambda c: c | {"model": {"dropout": 1.5}}, "`model.dropout` must be ≥ 0"),
    "dates out of order": (lambda c: c | {"splits": c["splits"] | {"val_end": date(2001, 1, 1)}}, "must ascend"),
    "unknown precision": (lambda c: c | {"compute": {"precision": "bf8"}}, "Did you mean `bf16`"),
    "unknown setting of heat": (lambda c: c | {"thermal": {"fare_c": 60}}, "`thermal.fare_c`"),
    "heat out of order": (lambda c: c | {"thermal": {"fair_c": 90.0}}, "must ascend"),
    "unknown task": (lambda c: c | {"task": "directoin"}, "Did you mean `direction`"),
    "unknown choice": (lambda c: c | {"model": {"channel_mode": "mixd"}}, "channel_mode"),
    "bad dataset id": (lambda c: c | {"dataset": "SP500"}, "SYMBOL.dataset.TIER"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_configs_say_rule_finding_and_remedy(case):
    from finpatch.config import find_config

    change, text = BAD[case]
    mapping = load_yaml(find_config("sp500_direction", "experiment"))
    with pytest.raises(InputError) as caught:
        parse_config(ExperimentConfig, change(mapping))
    assert text in str(caught.value)
    assert caught.value.rule and caught.value.found and caught.value.remedy


def test_a_missing_config_names_the_nearest():
    with pytest.raises(NotFoundError, match="Did you mean `sp500_direction`"):
        load_experiment_config("sp500_directio")


def test_defaults_differ_from_the_changes():
    "A change that equals the default would prove nothing."
    for key, value in (CHANGES | HEAT).items():
        owner, _, name = key.rpartition(".")
        assert getattr(getattr(BASE, owner) if owner else BASE, name) != value, key


def test_model_and_optim_configs_are_covered():
    owners = {"model": ModelConfig, "optim": OptimConfig, "splits": SplitsConfig, "compute": ComputeConfig}
    names = itertools.chain(*[[f"{k}.{f.name}" for f in dataclasses.fields(v)] for k, v in owners.items()])
    assert set(names) <= set(CHANGES) | BEGIN | {"compute.parallel"}
