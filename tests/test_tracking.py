"""Trackers (G5, G9). Risk: a run that says it was tracked and was not, or a tracker that costs the run its result.

One run is trained with MLflow and Weights & Biases, stopped on the way and resumed; MLflow's own client and W&B's own
messages read back what arrived. Trackers that raise, hang or fall behind then change nothing in a run.
"""

import json
import logging
import os
import struct
import subprocess
import sys
import threading
import time
import zlib
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

import finpatch.tracking
from finpatch.cli import main
from finpatch.config import dump_yaml
from finpatch.core import file_digest, read_json
from finpatch.experiment import load_experiment_config
from finpatch.follow import Follower, summary_of
from finpatch.run import override, resume_run, train_run
from finpatch.sensors import Reading
from finpatch.thermal import ThermalCallback
from finpatch.trackers import MLflow, is_logged_in
from finpatch.tracking import Post, Remote, Tracker, TrackingCallback
from finpatch.trainer import Callback

PLAIN = override(load_experiment_config("sp500_direction"), epochs=2, lr=3e-4)
CONFIG = replace(PLAIN, mlflow_experiment="does bigger help?", wandb_project="finpatch-test")
STEPS = [36, 72]  # 36 steps an epoch

# MLflow 3.17 uses a part of SQLAlchemy that is being retired
pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")


class PauseAt(Callback):
    def after_step(self, trainer):
        if trainer.step == 50:
            trainer.request_pause("asked")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A working directory and a home of one's own, and nobody logged in anywhere."
    path = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in os.environ if n.startswith(("MLFLOW_", "WANDB_", "NETRC"))]:
            patch.delenv(name)
        for name in ("MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
            patch.setenv(name, "true")
        (path / "home").mkdir()
        (path / "cwd").mkdir()
        patch.setenv("HOME", str(path / "home"))
        patch.chdir(path / "cwd")
        yield path


class Here(Follower):
    "MLflow in this process, which needs it anyway to read back: seconds less than another child."

    name = "mlflow"

    def abandon(self):
        raise AssertionError("MLflow failed")


def resumed_trackers(config, run_dir):
    return [Here(run_dir, MLflow(config.mlflow_experiment, run_dir.parent)), Remote("wandb", "finpatch-test", run_dir)]


@pytest.fixture(scope="module")
def run_dir(place, data_dir):
    "The run that is tracked, stopped and resumed, on a machine that is warm."
    path, options = place / "runs of mine" / "run", {"data_dir": data_dir, "is_progress_shown": False}
    heat = lambda: ThermalCallback(lambda: Reading(temp_c=61.0, source="played"), path=path / "thermal.jsonl")
    train_run(CONFIG, "10k", run_dir=path, is_cooled=False, callbacks=(heat(), PauseAt()), **options)
    ids = [read_json(path / f"{name}.json")["run_id"] for name in ("mlflow", "wandb")]
    assert read_json(path / "mlflow.json")["sent_step"] == STEPS[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finpatch.tracking, "make_trackers", resumed_trackers)
        resume_run(path, is_cooled=False, callbacks=(heat(),), **options)
    assert ids == [read_json(path / f"{name}.json")["run_id"] for name in ("mlflow", "wandb")]
    return path


@pytest.fixture(scope="module")
def result(run_dir):
    return read_json(run_dir / "result.json")


@pytest.fixture(scope="module")
def client(run_dir):
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{run_dir.parent}/mlflow.db")


def losses(run_dir):
    return [json.loads(line)["val_loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_mlflow_holds_one_run_with_all_of_it(client, run_dir, result):
    experiment = client.get_experiment_by_name("does bigger help?")
    (run,) = client.search_runs([experiment.experiment_id])
    record = read_json(run_dir / "run.json")
    assert run.info.run_id == read_json(run_dir / "mlflow.json")["run_id"]
    assert run.info.status == "FINISHED" and run.info.run_name == "run"
    assert run.data.params["optim.lr"] == "0.0003" and run.data.params["optim.epochs"] == "2"
    assert run.data.params["n_params"] == str(result["n_params"])
    assert run.data.params["n_params_by_part.head"] == str(record["n_params_by_part"]["head"])
    for entry in record["lineage"]:
        assert run.data.params[f"data.{entry['dataset_id']}.v1"] == entry["content_sha256"]
    assert run.data.tags["mlflow.source.git.commit"] == record["commit"] == run.data.params["commit"]
    summary = summary_of(result)
    assert summary["test.log_loss"] == result["test"]["log_loss"]["value"]
    assert {k: run.data.metrics[k] for k in summary} == summary
    history = client.get_metric_history(run.info.run_id, "val_loss")
    assert [m.step for m in history] == STEPS  # each epoch once, though the run was stopped in the second
    assert [m.value for m in history] == losses(run_dir)
    assert [m.value for m in client.get_metric_history(run.info.run_id, "heat.temp_c")] == [61.0] * 2


def test_mlflow_holds_the_files_and_the_figures(client, run_dir, tmp_path):
    run_id = read_json(run_dir / "mlflow.json")["run_id"]
    names = {f.path for f in client.list_artifacts(run_id)} | {f.path for f in client.list_artifacts(run_id, "figures")}
    assert names >= {"figures/learning_curve.png", "figures/thermal.png", "thermal.jsonl", "metrics.jsonl"}
    for name in ("best.safetensors", "config.yaml", "run.json", "result.json"):
        got = client.download_artifacts(run_id, name, str(tmp_path))
        assert file_digest(got) == file_digest(run_dir / name)
    assert client.get_run(run_id).info.artifact_uri.startswith((run_dir.parent / "mlartifacts").as_uri())


def read_records(path):
    "Parse a .wandb file: a log in blocks of 32 KiB, of records in W&B's own protobuf message."
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, text, out = path.read_bytes(), 7, b"", []
    assert data[:4] == b":W&B"
    while at < len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        digest, size, kind = struct.unpack("<IHB", data[at : at + 7])
        assert zlib.crc32(data[at + 6 : at + 7 + size]) == digest
        text, at = text + data[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):  # whole, or its last part
            out.append(Record.FromString(text))
            text = b""
    return out


@pytest.fixture(scope="module")
def records(run_dir):
    "What W&B wrote: one list for the first part of the run, one for the second."
    run_id = read_json(run_dir / "wandb.json")["run_id"]
    paths = sorted((run_dir.parent / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb"))
    assert len(paths) == 2
    return [read_records(path) for path in paths]


def items(message):
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in message}


def rows(part):
    return [items(r.history.item) for r in part if r.WhichOneof("record_type") == "history"]


def test_wandb_holds_one_run_with_all_of_it(records, run_dir, result):
    record, runs = read_json(run_dir / "run.json"), [r.run for part in records for r in part if r.HasField("run")]
    assert {r.run_id for r in runs} == {read_json(run_dir / "wandb.json")["run_id"]}
    assert {(r.project, r.display_name) for r in runs} == {("finpatch-test", "run")}
    config = items(runs[-1].config.update)
    assert config["optim"]["lr"] == 3e-4 and config["n_params"] == result["n_params"]
    assert config["commit"] == record["commit"] and config["model"]["d_model"] == record["model"]["d_model"]
    assert config["data"] == {f"{e['dataset_id']}.v1": e["content_sha256"] for e in record["lineage"]}
    told = [row for part in records for row in rows(part) if "val_loss" in row]
    assert [row["_step"] for row in told] == STEPS
    assert not any(
        key.startswith("thermal/") for row in told for key in row
    )  # sent when its epoch ended, not with the end
    assert [row["val_loss"] for row in told] == losses(run_dir)
    assert [row["heat.temp_c"] for row in told] == [61.0] * 2
    summary = {}
    for r in records[1]:
        summary |= items(r.summary.update)
    assert summary["status"] == "done"
    assert {k: summary[k] for k in summary_of(result)} == summary_of(result)
    assert [r.exit.exit_code for part in records for r in part if r.HasField("exit")] == [0, 0]


def test_wandb_holds_the_weights_and_the_figures(records, run_dir):
    (artifact,) = [r.artifact for r in records[1] if r.HasField("artifact")]
    files = {entry.path: Path(entry.local_path) for entry in artifact.manifest.contents}
    assert {"best.safetensors", "config.yaml", "run.json", "thermal.jsonl"} <= set(files)
    assert file_digest(files["best.safetensors"]) == file_digest(run_dir / "best.safetensors")
    figures = {k: v for row in rows(records[1]) for k, v in row.items() if k.endswith("/path")}
    assert set(figures) == {"learning_curve/path", "thermal/path"}
    (image,) = (run_dir.parent / "wandb").glob(f"offline-run-*/files/{figures['thermal/path']}")
    assert image.read_bytes()[:4] == b"\x89PNG"


def test_nothing_lies_outside_the_runs_folder(run_dir, place):
    assert list((place / "cwd").iterdir()) == []
    assert [p for p in (place / "home").rglob("*") if "mlflow" in str(p) or "wandb" in str(p)] == []
    assert {p.name for p in run_dir.parent.iterdir()} == {"run", "mlflow.db", "mlartifacts", "wandb"}
    assert [p.name for p in run_dir.glob("*.log")] == []  # neither had anything to say


def test_a_tracking_uri_is_used_and_its_artifacts_stay_with_the_runs(client, run_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{run_dir.parent}/mlflow.db")
    mine = MLflow("another", tmp_path)
    kept = mine.begin("elsewhere", {"seed": 1}, {})
    assert kept["is_local"] is False and "sqlite" not in json.dumps(kept)  # an address may hold a password
    assert client.get_run(kept["run_id"]).info.artifact_uri.startswith(tmp_path.as_uri())
    mine.end("failed", {}, 0)
    assert client.get_run(kept["run_id"]).info.status == "FAILED"


def test_credentials_decide_whether_wandb_is_online(place, monkeypatch):
    assert not is_logged_in()
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert is_logged_in()


class Raises(Tracker):
    name = "raises"

    def begin(self):
        raise OSError("no route to host")


class Hangs(Tracker):
    name = "hangs"

    def __init__(self, order="look"):
        self.free = threading.Event()
        setattr(self, order, self.free.wait)


def test_trackers_that_raise_or_hang_change_nothing(result, data_dir, tmp_path, monkeypatch, caplog):
    hanging = Hangs()
    monkeypatch.setattr(finpatch.tracking, "make_trackers", lambda *_: [Raises(), hanging])
    monkeypatch.setattr(TrackingCallback, "LIMIT_S", 0.5)
    with caplog.at_level(logging.WARNING, "finpatch"):
        path = train_run(PLAIN, "10k", data_dir=data_dir, run_dir=tmp_path / "run", is_progress_shown=False)
    assert read_json(path / "result.json")["weights_sha256"] == result["weights_sha256"]
    assert read_json(path / "run.json")["status"] == "done"
    said = [r.getMessage() for r in caplog.records if r.getMessage().startswith(("raises", "hangs"))]
    assert sorted(line.split(".")[0] for line in said) == [
        "hangs: did not finish in time",
        "raises: OSError: no route to host",
    ]
    hanging.free.set()


def test_a_full_queue_never_makes_training_wait(caplog):
    post, began = Post(Hangs("begin"), size=3), time.monotonic()
    post.thread.start()
    for _ in range(10_000):
        post.put("look")
    assert time.monotonic() - began < 2.0 and post.orders.qsize() == 3
    assert [r.getMessage() for r in caplog.records if "3 orders wait" in r.getMessage()] == [
        "hangs: does not keep up, 3 orders wait. The run goes on, and its folder holds everything"
    ]
    post.tracker.free.set()


def test_what_a_full_queue_dropped_is_sent_at_the_end():
    orders = []

    class Slow(Tracker):
        def begin(self):
            time.sleep(0.1)

        def end(self):
            orders.append("end")

    with closing(TrackingCallback([Slow()])) as tracking:
        tracking.before_fit(None)
        for _ in range(100):
            tracking.after_epoch(None)
    assert orders == ["end"]


def test_a_process_that_hangs_is_ended(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(finpatch.tracking, "SERVE", "import time; time.sleep(600)")
    tracking = TrackingCallback([Remote("mlflow", "e", tmp_path)], limit_s=0.5)
    tracking.before_fit(None)
    deadline = time.monotonic() + 20
    while (child := tracking.posts[0].tracker.child) is None and time.monotonic() < deadline:
        time.sleep(0.01)
    tracking.close()
    assert child.process.wait(10) == -9
    assert caplog.text.count("mlflow: did not finish in time") == 1


def test_a_process_that_dies_is_reported(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(finpatch.tracking, "SERVE", "import sys; sys.exit('no module named mlflow')")
    with closing(TrackingCallback([Remote("mlflow", "e", tmp_path)], limit_s=20)) as tracking:
        tracking.before_fit(None)
    assert "mlflow: its process ended with status 1" in caplog.text
    assert "no module named mlflow" in (tmp_path / "mlflow.log").read_text()


def test_a_hanging_tracker_cannot_keep_the_interpreter(tmp_path):
    "Neither its thread, closed or not, nor the process that it waits for."
    code = """
import time
import finpatch.tracking as t
t.SERVE = "import sys; sys.stdin.read()"  # answers nothing, and is gone when nobody could ask any more
tracking = t.TrackingCallback([t.Remote("mlflow", "e", "."), t.Remote("wandb", "p", ".")], limit_s=0.5)
tracking.before_fit(None)
time.sleep(0.5)
tracking.posts.pop()  # this one is never closed
tracking.close()
"""
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < 100


def test_without_the_package_tracking_is_refused_or_left_out(run_dir, result, data_dir, tmp_path, monkeypatch, capsys):
    "One line, before anything is made; and with --no-tracking the weights and numbers of the run that was tracked."
    (tmp_path / "mine.yaml").write_text(dump_yaml(CONFIG))
    monkeypatch.setattr(finpatch.tracking, "find_spec", lambda name: None)
    words = [
        "train",
        "--config",
        str(tmp_path / "mine.yaml"),
        "--budget",
        "10k",
        "--no-thermal",
        "--data-dir",
        str(data_dir),
    ]
    words += ["--runs-dir", str(tmp_path / "runs")]
    assert main(words) == 1
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1 and "finpatch[tracking]" in error and "--no-tracking" in error
    assert not (tmp_path / "runs").exists()
    assert main([*words, "--no-tracking"]) == 0
    (alone,) = (tmp_path / "runs").iterdir()
    for key in ("weights_sha256", "best_weights_sha256", "val", "test", "n_steps", "stop_reason"):
        assert read_json(alone / "result.json")[key] == result[key]
    assert read_json(alone / "run.json")["trackers"] == []
    assert read_json(run_dir / "run.json")["trackers"] == ["mlflow", "wandb"]
    capsys.readouterr()
    assert main(["runs", str(run_dir), str(alone), "--json"]) == 0
    differing = json.loads(capsys.readouterr().out)
    assert differing["config"]["mlflow_experiment"] == ["does bigger help?", None]
    assert differing["data"] == differing["machine"] == {}
    assert not {"status", "weights_sha256", "val.log_loss", "test.log_loss"} & set(differing["result"])
