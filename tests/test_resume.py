"""G7 and G9 of a run that is disturbed. Risk: days of work lost, or a resumed run that is another run.

A run is killed twenty times at random moments and resumed each time; what it ends with must be the bits of a run that
nobody touched. Requests to stop, damaged checkpoints and changed circumstances follow.
"""

import fcntl
import json
import logging
import multiprocessing
import os
import pty
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from dataclasses import replace

import pytest
from pausing import PauseIn

from finpatch.checkpoint import Checkpoint
from finpatch.cli import main
from finpatch.config import dump_yaml
from finpatch.core import InputError, NotFoundError, read_json
from finpatch.experiment import load_experiment_config
from finpatch.run import load_run, newest_unfinished, override, resume_run, train_run
from finpatch.trainer import Callback

CONFIG = override(load_experiment_config("sp500_direction"), epochs=3, lr=3e-4)
SAME = ("weights_sha256", "best_weights_sha256", "n_steps", "best_epoch", "stop_reason", "val", "test")


@pytest.fixture(scope="module")
def whole(data_dir, tmp_path_factory):
    "The run that nobody touches."
    return train_run(
        CONFIG, "10k", data_dir=data_dir, run_dir=tmp_path_factory.mktemp("whole"), is_progress_shown=False
    )


def metrics(run_dir):
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("wall_s", "level", "temp_c", "lost_s")} for row in rows]


def assert_same(run_dir, whole):
    a, b = read_json(run_dir / "result.json"), read_json(whole / "result.json")
    assert {k: a[k] for k in SAME} == {k: b[k] for k in SAME}
    assert metrics(run_dir) == metrics(whole)


class Slow(Callback):
    "Make a step last long enough to be killed in, and say that training has begun."

    def __init__(self, started=None):
        self.started = started

    def after_step(self, trainer):
        time.sleep(0.01)
        if self.started is not None:
            self.started.set()


def work(run_dir, data_dir, started):
    options = {"data_dir": data_dir, "is_progress_shown": False, "checkpoint_every_s": 0.02}
    if (run_dir / "run.json").exists():
        resume_run(run_dir, callbacks=(Slow(started),), **options)
    else:
        train_run(CONFIG, "10k", run_dir=run_dir, device="cpu", callbacks=(Slow(started),), **options)


@pytest.mark.soak
def test_twenty_kills_end_in_the_bits_of_the_run_that_nobody_touched(data_dir, whole, tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["finpatch.run"])
    rng, run_dir, n_kills, steps = random.Random(0), tmp_path / "run", 0, []
    while n_kills < 20:
        started = context.Event()
        child = context.Process(target=work, args=(run_dir, data_dir, started))
        child.start()
        assert started.wait(60)
        time.sleep(rng.uniform(0, 0.12))
        child.kill()
        child.join()
        n_kills += 1
        assert not (run_dir / "result.json").exists(), "the run was too short to be killed twenty times"
        steps.append(max([int(p.stem[5:]) for p in (run_dir / "checkpoints").glob("step-*.json")], default=0))
    assert steps == sorted(steps)  # no step before a checkpoint ever runs again
    resume_run(run_dir, data_dir, is_progress_shown=False)
    assert read_json(run_dir / "result.json")["resumed_from_step"] == steps[-1] > 0
    assert read_json(run_dir / "result.json")["is_bitwise"] is True
    assert len(read_json(run_dir / "run.json")["sessions"]) == 20
    assert_same(run_dir, whole)


class PauseAt(Callback):
    order = 1

    def __init__(self, step):
        self.step = step

    def after_step(self, trainer):
        if trainer.step == self.step:
            trainer.request_pause("asked")


@pytest.fixture
def stopped(data_dir, tmp_path):
    callbacks, options = (PauseAt(30), PauseAt(60)), {"data_dir": data_dir, "is_progress_shown": False}
    path = train_run(CONFIG, "10k", run_dir=tmp_path / "runs" / "run", callbacks=callbacks, **options)
    resume_run(path, callbacks=(PauseAt(60),), **options)
    return path


@pytest.mark.parametrize("step", [35, 36, 37, 108])
def test_a_stop_at_the_end_of_an_epoch_changes_nothing(step, data_dir, whole, tmp_path):
    "36 steps an epoch, 108 in all: the epoch is complete, its metrics and weights are not written yet."
    options = {"data_dir": data_dir, "is_progress_shown": False}
    path = train_run(CONFIG, "10k", run_dir=tmp_path / "run", callbacks=(PauseAt(step),), **options)
    resume_run(path, **options)
    assert_same(path, whole)


def test_a_stop_inside_a_step_a_validation_or_the_last_one_changes_nothing(data_dir, tmp_path):
    "Two micro-batches a step, four batches a validation; with dropout, whose draws a step taken anew must repeat."
    config, options = override(CONFIG, epochs=2), {"data_dir": data_dir, "is_progress_shown": False}
    begin = lambda name, **more: train_run(
        config, "5k", run_dir=tmp_path / name, micro_batch_size=32, **options, **more
    )
    whole, path = begin("whole"), tmp_path / "run"
    for event, n, step in [("after_micro_batch", 21, 10), ("after_eval_batch", 2, 36), ("after_eval_batch", 7, 72)]:
        callbacks = (PauseIn(event, n),)
        resume_run(path, callbacks=callbacks, **options) if path.exists() else begin("run", callbacks=callbacks)
        record = read_json(path / "run.json")
        assert (record["status"], record["step"]) == ("stopped", step)
    resume_run(path, **options)
    assert_same(path, whole)


def test_a_kill_between_the_result_and_the_last_record_leaves_a_run_that_is_done(data_dir, tmp_path, capsys):
    context, path = multiprocessing.get_context("forkserver"), tmp_path / "runs" / "run"
    child = context.Process(target=die_after_the_result, args=(path, data_dir))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert read_json(path / "run.json")["status"] == "running" and read_json(path / "result.json")["status"] == "done"
    assert load_run(path, None).record["status"] == "done"
    with pytest.raises(NotFoundError, match="unfinished"):
        newest_unfinished(tmp_path / "runs")
    with pytest.raises(InputError, match="got a finished one"):
        resume_run(path, data_dir)
    assert main(["runs", "--runs-dir", str(tmp_path / "runs"), "--json"]) == 0
    assert [row["status"] for row in json.loads(capsys.readouterr().out)["runs"]] == ["done"]


def die_after_the_result(run_dir, data_dir):
    import finpatch.run

    finpatch.run.draw = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    train_run(override(CONFIG, max_steps=2), "5k", data_dir=data_dir, run_dir=run_dir, is_progress_shown=False)


def newest(run_dir):
    return sorted((run_dir / "checkpoints").glob("step-*.json"))[-1]


def truncate_tensors(path):
    path.with_suffix(".safetensors").write_bytes(path.with_suffix(".safetensors").read_bytes()[:-9])


def flip_tensors(path):
    data = bytearray(path.with_suffix(".safetensors").read_bytes())
    data[-9] ^= 1
    path.with_suffix(".safetensors").write_bytes(data)


def edit_state(path):
    path.write_text(path.read_text().replace('"step": 60', '"step": 61'))


def empty_state(path):
    path.write_text("")


@pytest.mark.parametrize("damage", [truncate_tensors, flip_tensors, edit_state, empty_state])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(damage, stopped, data_dir, whole, caplog):
    damage(newest(stopped))
    with caplog.at_level(logging.WARNING, "finpatch"):
        resume_run(stopped, data_dir, is_progress_shown=False)
    assert "the checkpoint before it is used" in caplog.text
    assert read_json(stopped / "result.json")["resumed_from_step"] == 30
    assert_same(stopped, whole)


def test_without_any_checkpoint_the_run_begins_again(stopped, data_dir, whole):
    shutil.rmtree(stopped / "checkpoints")
    resume_run(stopped, data_dir, is_progress_shown=False)
    assert read_json(stopped / "result.json")["resumed_from_step"] is None
    assert_same(stopped, whole)


def change_config(run_dir, data_dir):
    path = run_dir / "config.yaml"
    path.write_text(path.read_text().replace("lr: 0.0003", "lr: 0.003"))


def change_record(run_dir, data_dir):
    path = run_dir / "run.json"
    path.write_text(path.read_text().replace('"budget": "10k"', '"budget": "20k"'))


def change_data(run_dir, data_dir):
    path = next((data_dir / "raw").glob("*.parquet"))
    path.write_bytes(path.read_bytes()[:-1] + b"x")


CHANGES = {change_config: "`config.optim`", change_record: "`model.", change_data: "verified data"}


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_that_would_be_another_is_refused_and_the_difference_named(change, stopped, data_dir, tmp_path):
    own = shutil.copytree(data_dir, tmp_path / "data")
    change(stopped, own)
    with pytest.raises(InputError) as caught:
        resume_run(stopped, own, is_progress_shown=False)
    assert CHANGES[change] in str(caught.value)
    assert newest(stopped).exists()


def test_other_threads_warn_and_are_recorded(stopped, data_dir, caplog):
    record = read_json(stopped / "run.json")
    record["machine"]["n_threads"] += 1
    (stopped / "run.json").write_text(json.dumps(record))
    with caplog.at_level(logging.WARNING, "finpatch"):
        resume_run(stopped, data_dir, is_progress_shown=False)
    assert "n_threads" in caplog.text
    assert read_json(stopped / "result.json")["is_bitwise"] is False


def test_a_full_disk_costs_the_new_checkpoint_only(stopped, data_dir, whole, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("finpatch.checkpoint.save_file", full)
    options = {"is_progress_shown": False, "checkpoint_every_s": 0.0}
    with caplog.at_level(logging.WARNING, "finpatch"):
        resume_run(stopped, data_dir, callbacks=(PauseAt(70),), **options)
    assert "no checkpoint at step" in caplog.text and newest(stopped).stem == "step-00000060"
    monkeypatch.undo()
    resume_run(stopped, data_dir, is_progress_shown=False)
    assert_same(stopped, whole)


def test_a_checkpoint_draws_nothing_from_the_clock(data_dir, whole, tmp_path):
    options = {"data_dir": data_dir, "is_progress_shown": False, "checkpoint_every_s": 0.0}
    assert_same(train_run(CONFIG, "10k", run_dir=tmp_path / "often", **options), whole)
    assert Checkpoint.order > 40  # after metrics, whose length it stores


def test_the_newest_unfinished_run_is_found(stopped, whole):
    assert newest_unfinished(stopped.parent) == stopped
    with pytest.raises(NotFoundError, match="unfinished"):
        newest_unfinished(whole)


def in_terminal(words, columns=100, answer=None) -> tuple[int, str]:
    "Run the command in a terminal; `answer` looks at what it shows and may return keys to press, once."
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
    start = {"start_new_session": True, "preexec_fn": lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0)}
    child = subprocess.Popen(
        [sys.executable, "-m", "finpatch", *words], stdin=theirs, stdout=theirs, stderr=theirs, **start
    )
    os.close(theirs)
    shown = b""
    while chunk := read_some(ours):
        shown += chunk
        if answer and (keys := answer(shown.decode(errors="ignore"))):
            answer = os.write(ours, keys) and None
    os.close(ours)
    return child.wait(timeout=60), shown.decode()


def read_some(handle) -> bytes:
    try:
        return os.read(handle, 65_536)
    except OSError:  # Linux's way to say that the other side is closed
        return b""


LINE = re.compile(
    r"\|\S*\s*\| \d+/70 \[\d\d:\d\d<[\d:?]+, +[\d.?]+(step/s|s/step), epoch [12]/2, (heat unknown|\w+( \d+ °C)?)"
)


def test_a_terminal_shows_one_line_of_progress_and_nothing_from_libraries(data_dir, tmp_path):
    "With what can be switched on, stopped by Ctrl-C and resumed: the heat and the time left, in one line."
    config = override(CONFIG, epochs=2, max_steps=70, precision="auto", checkpoint_every_s=0.1)
    config = replace(config, compute=replace(config.compute, is_checkpointed=True))
    (tmp_path / "mine.yaml").write_text(dump_yaml(config))
    where = ["--data-dir", str(data_dir), "--run-dir", str(tmp_path / "run")]
    begin = ["train", "--config", str(tmp_path / "mine.yaml"), "--budget", "200k", *where]
    status, first = in_terminal(begin, answer=lambda text: b"\x03" if re.search(r" [1-9]\d*/70 ", text) else b"")
    assert status == 3, first
    status, second = in_terminal(["train", "--resume", *where])
    assert status == 0, second
    for text, last in ((first, "Go on with: finpatch train --resume"), (second, "Learning curve: ")):
        lines = [line for line in text.split("\r\n") if line]
        assert last in lines[-1] and "Warning" not in text and "File " not in text
        (bar,) = [line for line in lines if "/70 [" in line and LINE.search(line)]
        drawn = [part.replace("^C", "") for part in bar.split("\r") if part.strip()]  # the terminal's echo is not ours
        assert len(drawn) > 2 and max(map(len, drawn)) <= 100 and sum(bool(LINE.search(part)) for part in drawn) > 1
    assert "resumed from step" in second


@pytest.mark.soak
@pytest.mark.parametrize("ask", [signal.SIGTERM, "STOP"])
def test_a_request_to_stop_ends_with_status_3_and_can_be_resumed(ask, data_dir, tmp_path):
    "As in a terminal: the line says how to go on, and that line works."
    run_dir, where = tmp_path / "run", ["--data-dir", str(data_dir)]
    words = ["train", "--config", "sp500_direction", "--budget", "300k", "--epochs", "2", "--run-dir", str(run_dir)]
    words += ["--checkpoint-every-s", "0.1"]
    child = subprocess.Popen(
        [sys.executable, "-m", "finpatch", *words, *where, "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not list(run_dir.glob("checkpoints/step-*.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    (run_dir / "STOP").write_text("") if ask == "STOP" else child.send_signal(ask)
    out, err = child.communicate(timeout=60)
    answer = json.loads(out)
    assert child.returncode == 3, err
    assert answer["status"] == "stopped" and answer["n_steps"] > 0
    done = subprocess.run(
        [sys.executable, "-m", "finpatch", "train", "--resume", "--run-dir", str(run_dir), *where, "--json"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["resumed_from_step"] == answer["n_steps"]


@pytest.mark.parametrize("words", [["--lr", "1"], ["--precision", "bf16"]])
def test_a_resumed_run_keeps_its_own_settings(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--resume", *words])
    assert stop.value.code == 2 and words[0] in capsys.readouterr().err
