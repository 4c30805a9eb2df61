"""G8, hardware truth, and the heat of G7. The risk: a machine cooks because a failed read passed for cool, or a pause changes a result."""

import ctypes
import dataclasses
import gc
import json
import logging
import math
import os
import random
import signal
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from finpatch.callbacks import WriteMetrics
from finpatch.checkpoint import PauseOnSignal
from finpatch.core import HardwareError, read_json
from finpatch.dataset import FinancialDataset
from finpatch.experiment import OptimConfig, load_experiment_config
from finpatch.patchtst import PatchTST, PatchTSTConfig
from finpatch.run import override, train_run
from finpatch.sensors import LEVELS, Reading, choose_sensor, grade, merge, open_macos
from finpatch.thermal import SensorThread, ThermalCallback
from finpatch.thermal_config import ThermalConfig
from finpatch.thermal_policy import SEVERITY, ThermalState, decide, replay
from finpatch.thermal_trace import read_trace
from finpatch.trainer import Callback, Trainer

EPS = 1e-6
degrees = st.one_of(st.none(), st.floats(30, 120).map(lambda c: round(c, 1)))
readings = st.one_of(
    degrees.map(lambda c: Reading(temp_c=c, source="played")),
    st.sampled_from(LEVELS).map(lambda level: Reading(level, source="played")),
)
configs = st.builds(
    ThermalConfig,
    hysteresis_c=st.floats(0, 20),
    dwell_s=st.floats(0, 120),
    interval_s=st.sampled_from([1.0, 2.0, 5.0, 30.0]),
    duty=st.floats(0.1, 1),
    max_pause_s=st.floats(60, 3000),
    stop_after_s=st.floats(10, 3000),
)


class Machine:
    "A clock that moves when the machine works or sleeps, a true temperature each second, and a trainer's face."

    def __init__(self, temps, interval_s):
        self.temps, self.interval_s = temps, interval_s
        self.now, self.step, self.stop_reason, self.read_at, self.last = 0.0, 0, None, -math.inf, None
        self.shown, self.extra = {}, {}

    def temp(self, t):
        return self.temps[min(int(t), len(self.temps) - 1)]

    def clock(self):
        return self.now

    def sleep(self, seconds):
        assert 0 < seconds <= 1, "a sleep must be short enough to hear a request to stop"
        self.now += seconds

    def latest(self):  # what the thread would have read last, each `interval_s`
        return Reading(temp_c=self.temp(self.now // self.interval_s * self.interval_s), source="played")

    def make_reader(self, *_):
        return SimpleNamespace(latest=self.latest, first=self.latest, end=lambda: None)

    def request_pause(self, reason):
        self.stop_reason = self.stop_reason or reason

    def emit(self, event): ...

    @property
    def is_over(self):
        return self.stop_reason is not None

    def callback(self, config, **kw):
        faces = {"sleep": self.sleep, "clock": self.clock, "make_reader": self.make_reader}
        return ThermalCallback(self.latest, config, **faces | kw)

    def hot_for(self, limit):
        "Seconds up to now without a break in which the true temperature was at the limit or above."
        start = math.floor(self.now)
        if self.temp(self.now) < limit:
            return 0.0
        while start > 0 and self.temp(start - 1) >= limit:
            start -= 1
        return self.now - start


@settings(max_examples=200, deadline=None)
@given(
    temps=st.lists(st.tuples(st.floats(40, 110), st.integers(1, 40)), min_size=1, max_size=30),
    works=st.lists(st.floats(0.05, 20), min_size=5, max_size=60),
    n_micro=st.integers(1, 4),
    config=configs,
)
def test_no_micro_batch_starts_when_it_has_been_critical_for_an_interval(temps, works, n_micro, config):
    "So none runs above critical for longer than one sensor interval plus itself."
    machine = Machine([c for c, n in temps for _ in range(n)] + [40.0], config.interval_s)
    heat = machine.callback(config)
    heat.before_fit(machine)
    for i, work in enumerate(works):
        if i and not machine.is_over:
            assert machine.hot_for(config.critical_c) <= config.interval_s + EPS
        if machine.is_over:
            break
        machine.now += work
        machine.step += i % n_micro == n_micro - 1
        (heat.after_step if i % n_micro == n_micro - 1 else heat.after_micro_batch)(machine)
    heat.after_fit(machine)


@settings(max_examples=200, deadline=None)
@given(steps=st.lists(st.tuples(readings, st.floats(0.01, 40)), min_size=2, max_size=80), config=configs)
def test_levels_fall_no_faster_than_dwell(steps, config):
    state, now, changed_at = ThermalState(), 0.0, -math.inf
    for reading, gap in steps:
        now += gap
        before, (state, _) = state.level, decide(state, reading, now, config)
        if LEVELS.index(state.level) < LEVELS.index(before):
            assert now - changed_at >= config.dwell_s
        if state.level != before:
            changed_at = now


@settings(max_examples=200, deadline=None)
@given(
    past=st.lists(st.tuples(readings, st.floats(0.01, 40)), max_size=40),
    pair=st.tuples(st.floats(30, 120), st.floats(30, 120)),
    gap=st.floats(0.01, 200),
    config=configs,
)
def test_hotter_is_never_milder_and_critical_acts_at_once(past, pair, gap, config):
    state, now = ThermalState(), 0.0
    for reading, step in past:
        now += step
        state, _ = decide(state, reading, now, config)
    cool, hot = (decide(state, Reading(temp_c=c), now + gap, config) for c in sorted(pair))
    assert SEVERITY.index(cool[1]) <= SEVERITY.index(hot[1])
    assert LEVELS.index(cool[0].level) <= LEVELS.index(hot[0].level)
    assert hot[0].level != "unknown" and LEVELS.index(hot[0].level) >= LEVELS.index(
        grade(Reading(temp_c=max(pair)), config)
    )
    assert decide(state, Reading("critical"), now + gap, config)[1] in ("pause", "stop")


@settings(max_examples=200, deadline=None)
@given(
    past=st.lists(st.tuples(readings, st.floats(0.01, 40)), max_size=40),
    gaps=st.lists(st.floats(0.01, 2000), min_size=1, max_size=20),
    config=configs,
)
def test_an_unknown_reading_neither_cools_nor_ends_a_run(past, gaps, config):
    state, now, action = ThermalState(), 0.0, "run"
    for reading, step in past:
        now += step
        state, action = decide(state, reading, now, config)
    assume(action != "stop")
    level, blind_at = state.level, state.blind_at
    for gap in gaps:
        now += gap
        blind_at = now if blind_at is None else blind_at
        state, new = decide(state, Reading(detail="driver gone"), now, config)
        waited = now - blind_at >= config.max_pause_s
        assert state.level == level
        assert new == {"pause": "slow" if waited else "pause"}.get(action, action)
        action = new


ACTS = {  # each setting, another value, and degrees that tell the two apart
    "fair_c": (60.0, [65, 65]),
    "serious_c": (80.0, [82, 82]),
    "critical_c": (90.0, [92, 92, 92]),
    "hysteresis_c": (0.0, [86, 82, 82, 82, 82]),
    "dwell_s": (0.0, [86, 60, 60]),
    "interval_s": (20.0, [86, 60, 60]),
    "max_pause_s": (10.0, [86, 86, 86, 86]),
    "stop_after_s": (60.0, [97] * 5),
}


@pytest.mark.parametrize(
    "field", [f.name for f in dataclasses.fields(ThermalConfig) if f.name not in ("duty", "required")]
)
def test_every_threshold_acts(field):
    base = {"dwell_s": 15.0, "stop_after_s": 10.0}
    value, temps = ACTS[field]
    played = [Reading(temp_c=t) for t in temps]
    assert replay(played, ThermalConfig(**base)) != replay(played, ThermalConfig(**base | {field: value}))


@pytest.mark.parametrize("duty", [0.25, 0.5, 1.0])
def test_a_slowed_run_computes_for_its_duty(duty):
    machine = Machine([75.0], 5.0)
    heat = machine.callback(ThermalConfig(duty=duty))
    heat.before_fit(machine)
    for _ in range(50):
        machine.now += 0.3
        machine.step += 1
        heat.after_step(machine)
    assert 50 * 0.3 / machine.now == pytest.approx(duty, rel=1e-3)


def test_it_keeps_a_machine_cool_that_would_cook():
    "A body that heats while it works and loses heat to a room, closed loop; without the callback it passes critical."

    def night(config):
        machine = Machine([], 5.0)
        machine.t, machine.hottest = 45.0, 45.0

        def move(seconds, power):
            for _ in range(round(seconds / 0.1)):
                machine.t += 0.1 * (power - 0.02 * (machine.t - 25))
                machine.now += 0.1
            machine.hottest = max(machine.hottest, machine.t)

        machine.sleep = lambda seconds: move(max(seconds, 0.1), 0.0)
        machine.temp = lambda t: machine.t
        heat = machine.callback(config)
        heat.before_fit(machine)
        for _ in range(600):
            move(1.0, 1.7)
            machine.step += 1
            heat.after_step(machine)
        return machine

    idle = ThermalConfig(fair_c=147, serious_c=148, critical_c=149)
    assert night(idle).hottest > 95
    cooled = night(ThermalConfig())
    assert cooled.hottest < 85 + 2 and cooled.stop_reason is None and cooled.step == 600


# ---- with the real trainer -----------------------------------------------------------------------------------------


def make_dataset():
    x = np.random.default_rng(0).normal(size=(900, 3)).astype(np.float32)
    return FinancialDataset.from_arrays(x, (x[:, 0] > 0).astype(float), kind="binary", context_length=20)


def fit(*callbacks, epochs=2):
    torch.manual_seed(0)
    size = {"d_model": 16, "n_heads": 2, "n_layers": 1, "d_ff": 32, "dropout": 0.1}
    model = PatchTST(PatchTSTConfig(n_features=3, context_length=20, **size))
    optim = OptimConfig(lr=3e-3, epochs=epochs, global_batch_size=32)
    return Trainer(model, make_dataset(), optim, callbacks=callbacks, micro_batch_size=12).fit()


def weights(trainer):
    return {k: v.clone() for k, v in trainer.model.state_dict().items()}


def heat_threads():
    return [t for t in threading.enumerate() if t.name == "finpatch-thermal"]


def test_pauses_change_nothing_but_the_clock(tmp_path):
    "The real thread and clock; a sensor that is hot most of the time."
    temps = [60.0, 75.0, 75.0, 90.0, 90.0, 60.0, 60.0]
    count = iter(range(10**9))
    config = ThermalConfig(interval_s=0.005, dwell_s=0.005, duty=0.5)
    heat = ThermalCallback(
        lambda: Reading(temp_c=temps[next(count) % 7]),
        config,
        path=tmp_path / "thermal.jsonl",
        sleep=lambda s: time.sleep(min(s, 0.002)),
    )
    hot, cool = fit(heat), fit()
    assert heat.lost_s > 0 and "pause" in {r["action"] for r in read_trace(tmp_path / "thermal.jsonl")}
    assert all(torch.equal(v, weights(hot)[k]) for k, v in weights(cool).items())
    assert (hot.train_loss, hot.val_loss) == (cool.train_loss, cool.val_loss)
    assert not heat_threads()


def test_every_step_has_a_row(tmp_path):
    path = tmp_path / "thermal.jsonl"
    trainer = fit(ThermalCallback(lambda: Reading(temp_c=50.0), path=path))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [r["step"] for r in rows] == list(range(1, trainer.step + 1))
    assert {frozenset(r) for r in rows} == {frozenset(("step", "level", "temp_c", "action", "lost_s"))}
    assert {r["temp_c"] for r in rows} == {50.0}


def at_once(sensor, *_):
    "A reader without a thread to wait for."
    return SimpleNamespace(latest=sensor, first=sensor, end=lambda: None)


def test_a_pause_writes_the_rows_that_wait(tmp_path):
    "Rows are written once a second; a run that is killed in half an hour's pause must not lose those before it."
    path, seen = tmp_path / "thermal.jsonl", []
    readings = iter([50.0] * 20 + [90.0] * 3)

    class Look(Callback):
        order = 99

        def while_waiting(self, trainer):
            seen.append((trainer.step, [r["step"] for r in read_trace(path)]))

    sensor = lambda: Reading(temp_c=next(readings, 50.0))
    heat = ThermalCallback(sensor, ThermalConfig(dwell_s=0.0), path=path, sleep=lambda s: None, make_reader=at_once)
    heat.trace.every_s = math.inf  # the clock alone writes nothing
    fit(heat, Look())
    step, rows = seen[0]
    assert step > 0 and rows == list(range(1, len(rows) + 1)) and len(rows) >= step - 1 > 1, seen[0]


def test_a_failing_sensor_never_ends_a_run_and_is_said_once(caplog):
    draw = random.Random(0)

    def flaky():
        if draw.random() < 0.5:
            raise OSError("driver gone")
        return Reading(temp_c=50.0)

    with caplog.at_level(logging.WARNING, "finpatch"):
        heat = ThermalCallback(flaky, ThermalConfig(interval_s=0.001))
        trainer = fit(heat)
    assert trainer.step == trainer.n_steps and trainer.stop_reason is None
    assert [r.getMessage().count("OSError: driver gone") for r in caplog.records] == [1]
    assert {r["level"] for r in heat.trace.rows} == {"unknown", "nominal"}
    assert not heat_threads()


@pytest.mark.parametrize(
    "answer", [None, "hot", Reading(level="boiling"), Reading(temp_c="hot"), Reading(temp_c=float("nan"))]
)
def test_nonsense_from_a_sensor_is_unknown(answer):
    heat = ThermalCallback(lambda: answer)
    assert fit(heat, epochs=1).stop_reason is None
    assert {r["level"] for r in heat.trace.rows} == {"unknown"}


def test_a_sensor_that_hangs_does_not_hold_the_run():
    gate = threading.Event()
    heat = ThermalCallback(gate.wait, make_reader=lambda *a: Impatient(*a))
    began = time.monotonic()
    assert fit(heat, epochs=1).stop_reason is None
    assert time.monotonic() - began < 30
    assert {r["level"] for r in heat.trace.rows} == {"unknown"}
    gate.set()


class Impatient(SensorThread):
    def first(self, timeout_s=0.05):
        return super().first(timeout_s)


def test_no_thread_is_left_behind():
    class Fails(Callback):
        def after_step(self, trainer):
            raise RuntimeError("broken step")

    with pytest.raises(RuntimeError, match="broken step"):
        fit(ThermalCallback(lambda: Reading(temp_c=50.0)), Fails())
    assert not heat_threads()

    class FailsEarly(Callback):
        order = 99

        def before_fit(self, trainer):
            raise RuntimeError("broken start")

    with pytest.raises(RuntimeError, match="broken start"):
        fit(ThermalCallback(lambda: Reading(temp_c=50.0)), FailsEarly())
    end = time.monotonic() + 5
    while heat_threads() and time.monotonic() < end:
        gc.collect()
        time.sleep(0.01)
    assert not heat_threads()


def test_a_run_that_fails_before_it_trains_leaves_no_thread(data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("finpatch.run.Trainer", lambda *_, **__: 1 / 0)
    config = override(load_experiment_config("sp500_direction"), max_steps=3)
    with pytest.raises(ZeroDivisionError):
        train_run(config, "5k", data_dir=data_dir, run_dir=tmp_path / "run", device="cpu")
    assert not heat_threads()


def test_a_machine_that_gives_no_more_threads_is_one_without_a_temperature(monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    heat = ThermalCallback(lambda: Reading(temp_c=50.0))
    assert fit(heat, epochs=1).stop_reason is None
    assert {r["level"] for r in heat.trace.rows} == {"unknown"}


def test_required_refuses_and_leaves_no_thread():
    def gone():
        raise OSError("driver gone")

    with pytest.raises(HardwareError, match="needs a temperature; got OSError: driver gone"):
        fit(ThermalCallback(gone, ThermalConfig(required=True)))
    assert not heat_threads()


def test_a_request_to_stop_ends_a_pause():
    machine = Machine([90.0], 5.0)
    heat = machine.callback(ThermalConfig())
    heat.before_fit(machine)
    calls = iter(range(10))
    heat.brake.sleep = lambda s: (machine.sleep(s), next(calls) == 3 and machine.request_pause("signal"))
    machine.now += 1
    heat.after_step(machine)
    assert machine.stop_reason == "signal" and machine.now == pytest.approx(5)


@pytest.mark.parametrize("ask", [signal.SIGTERM, signal.SIGINT, "STOP"], ids=str)
def test_a_signal_or_a_stop_file_is_noticed_in_the_middle_of_a_long_pause(ask, tmp_path):
    "A machine too hot for its first micro-batch would wait for half an hour."

    class Ask(Callback):
        "Ask from another thread, once the handlers are there."

        order = 99

        def before_fit(self, trainer):
            threading.Timer(0.3, self.act).start()

        def act(self):
            (tmp_path / "STOP").write_text("") if ask == "STOP" else os.kill(os.getpid(), ask)

    began = time.monotonic()
    trainer = fit(ThermalCallback(lambda: Reading(temp_c=90.0)), PauseOnSignal(tmp_path / "STOP"), Ask())
    assert time.monotonic() - began < 30 and not heat_threads()
    assert trainer.is_paused and trainer.stop_reason == (ask.name if ask != "STOP" else "STOP file")
    assert trainer.step == 0 and not (tmp_path / "STOP").exists()


def test_a_validation_is_held_back_too():
    "Cool while it trains, hot at each batch of the validation."
    temps = {"now": 50.0}

    class Heats(Callback):
        order = 59

        def after_eval_batch(self, trainer):
            temps["now"] = 90.0

        def while_waiting(self, trainer):
            held.append(trainer.epoch_step == trainer.steps_per_epoch)
            temps["now"] = 50.0

    held, cool = [], ThermalConfig(dwell_s=0.0)
    heat = ThermalCallback(lambda: Reading(temp_c=temps["now"]), cool, sleep=lambda s: None, make_reader=at_once)
    assert fit(heat, Heats()).stop_reason is None
    assert len(held) >= 2 and all(held)


def test_the_heat_is_shown_and_stands_in_the_metrics(tmp_path):
    class Seen(Callback):
        order = 80

        def __init__(self):
            self.texts = set()

        def after_step(self, trainer):
            self.texts.add(trainer.shown["heat"])

        def while_waiting(self, trainer):
            self.texts.add(trainer.shown["heat"])

    machine, seen = Machine([60.0] * 8 + [90.0] * 2 + [60.0], 1.0), Seen()
    heat = machine.callback(ThermalConfig(interval_s=1.0, dwell_s=0.0), path=tmp_path / "thermal.jsonl")

    class Works(Callback):
        order = 1

        def after_step(self, trainer):
            machine.now += 0.5

    fit(heat, Works(), seen, WriteMetrics(tmp_path / "metrics.jsonl"))
    assert seen.texts == {"nominal 60 °C", "pause: serious 90 °C"}
    rows, steps = read_trace(tmp_path / "metrics.jsonl"), read_trace(tmp_path / "thermal.jsonl")
    assert [r["epoch"] for r in rows] == [1, 2]
    lost_s = [sum(r["lost_s"] for r in table) for table in (rows, steps)]
    assert lost_s[0] == pytest.approx(lost_s[1], abs=1e-2) and lost_s[0] > 1
    hot = next(i for i, r in enumerate(rows) if r["lost_s"] > 0)
    assert (rows[hot]["level"], rows[hot]["temp_c"]) == ("serious", 90.0)
    assert (rows[1 - hot]["level"], rows[1 - hot]["temp_c"], rows[1 - hot]["lost_s"]) == ("nominal", 60.0, 0.0)


@pytest.mark.parametrize("required", [False, True])
def test_a_run_whose_sensor_fails_goes_on_unless_one_is_required(required, data_dir, tmp_path, monkeypatch):
    "By the one path to a run: it records that nothing was read, or refuses before its folder has a record."

    def gone():
        raise OSError("driver gone")

    monkeypatch.setattr("finpatch.thermal.choose_sensor", lambda config: gone)
    config = override(load_experiment_config("sp500_direction"), max_steps=3)
    config = dataclasses.replace(config, thermal=ThermalConfig(required=required))
    train = lambda: train_run(
        config, "5k", data_dir=data_dir, run_dir=tmp_path / "run", is_progress_shown=False, device="cpu"
    )
    if required:
        with pytest.raises(HardwareError, match="got OSError: driver gone.*--no-thermal"):
            train()
        assert not list((tmp_path / "run").iterdir())
    else:
        train()
        record, rows = read_json(tmp_path / "run" / "run.json"), read_trace(tmp_path / "run" / "metrics.jsonl")
        assert record["status"] == "done" and record["effective"]["heat"] == "unknown"
        assert {r["level"] for r in [*rows, *read_trace(tmp_path / "run" / "thermal.jsonl")]} == {"unknown"}
    assert not heat_threads()


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full is Linux's")
def test_a_full_disk_ends_the_trace_and_not_the_run(caplog):
    with caplog.at_level(logging.WARNING, "finpatch"):
        heat = ThermalCallback(lambda: Reading(temp_c=50.0), path="/dev/full")
        assert fit(heat, epochs=1).stop_reason is None
    assert len([r for r in caplog.records if "no longer written" in r.getMessage()]) == 1
    assert len(heat.trace.rows) > 1


# ---- sensors -------------------------------------------------------------------------------------------------------


def test_macos_pressure_through_real_ctypes_calls():
    "C functions made by ctypes stand in for libSystem's; pointers and integers are converted for real."
    store = {"state": 0, "status": 0}

    def register(name, token):
        token[0] = 41
        return 0 if name == b"com.apple.system.thermalpressurelevel" else 1

    def get_state(token, state):
        state[0] = store["state"]
        return store["status"] if token == 41 else 99

    lib = SimpleNamespace(
        notify_register_check=ctypes.CFUNCTYPE(ctypes.c_uint32, ctypes.c_char_p, ctypes.POINTER(ctypes.c_int))(
            register
        ),
        notify_get_state=ctypes.CFUNCTYPE(ctypes.c_uint32, ctypes.c_int, ctypes.POINTER(ctypes.c_uint64))(get_state),
    )
    read = open_macos(lib)
    seen = []
    for store["state"] in (0, 1, 2, 3, 4, 2**40):
        seen.append(read().level)
    assert seen == ["nominal", "fair", "serious", "critical", "critical", "unknown"]
    store["status"] = 5
    with pytest.raises(HardwareError, match="notify_get_state"):
        read()


@settings(max_examples=100, deadline=None)
@given(parts=st.lists(readings, min_size=1, max_size=3))
def test_merged_sensors_are_no_cooler_than_any_and_silence_is_no_proof(parts):
    config = ThermalConfig()
    levels = [LEVELS.index(grade(r, config)) for r in parts]
    merged = LEVELS.index(grade(merge(parts, config), config))
    if max(levels) >= LEVELS.index("serious") or min(levels) > 0:
        assert merged == max(levels)
    else:
        assert merged == 0


def test_choosing_survives_every_way_to_fail():
    def raises(error):
        def opener():
            raise error

        return opener

    def gone():
        raise OSError("driver gone")

    broken = {
        "a": raises(ImportError("no module")),
        "b": raises(OSError("no library")),
        "c": lambda: gone,
        "d": lambda: lambda: None,
    }
    reading = choose_sensor(ThermalConfig(), broken)()
    assert (reading.level, reading.temp_c, reading.source) == ("unknown", None, "none")
    assert all(
        reason in reading.detail for reason in ("a: no module", "b: no library", "c: OSError: driver gone", "d: ")
    )
    assert (
        choose_sensor(ThermalConfig(), broken | {"e": lambda: lambda: Reading(temp_c=40.0, source="e")})().source == "e"
    )
