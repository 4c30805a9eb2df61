"""G7 and G9 of a run that several processes share. Risk: another result than one process has, a rank that waits for ever, or
work that is lost with a rank.

Ranks are processes of this machine that talk over gloo; torchrun starts them where the command itself is tested, a
forkserver where it is not. NCCL, GPUs and several machines were not run. What one rank does in one process is shown in
the notebooks `distributed` and `shards`.
"""

import json
import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from processes import marked
from safetensors.torch import load_file, save_file

from finpatch.callbacks import Schedule
from finpatch.checkpoint import Checkpoint, digest_tensors, load_checkpoint, newest_checkpoint, read_checkpoint
from finpatch.cli import main
from finpatch.compute import set_up
from finpatch.config import dump_yaml
from finpatch.core import HardwareError, InputError, json_digest, read_json
from finpatch.dataset import FinancialDataset
from finpatch.distributed import arrange, joined
from finpatch.experiment import ComputeConfig, OptimConfig, load_experiment_config
from finpatch.patchtst import PatchTST, PatchTSTConfig
from finpatch.ranks import ALONE, Alone
from finpatch.run import load_run, override, resume_run, train_run
from finpatch.sensors import Reading
from finpatch.shards import SharedCheckpoint, read_shards
from finpatch.thermal import ThermalCallback
from finpatch.thermal_config import ThermalConfig
from finpatch.trainer import Callback, Trainer, deal

MODEL = PatchTSTConfig(n_features=4, context_length=20, d_model=16, n_heads=2, n_layers=1, d_ff=32, dropout=0.0)
OPTIM = OptimConfig(lr=3e-3, warmup_steps=5, max_grad_norm=0.55, global_batch_size=50, max_steps=20, epochs=9, patience=None)
DROPOUT = override(load_experiment_config("sp500_direction"), max_steps=40, epochs=2, is_cooled=False)
CONFIG = replace(DROPOUT, model=replace(DROPOUT.model, dropout=0.0, head_dropout=0.0))
WAYS = ("ddp", "fsdp")
SOURCES = {"ddp": ("ddp", "fsdp"), "fsdp": ("fsdp", "alone")}  # Whose checkpoints four ranks go on from


# What ranks do; they import this file


def as_rank(rank, n, port, answers, work, words):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with joined("cpu") as group:
        answer = work(group, *words)
    (answers / str(rank)).write_bytes(pickle.dumps(answer))


def on_ranks(n, work, *words) -> list:
    "Do some work on n ranks; return the answer of each."
    port = free_port()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_distributed", "torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp"])
    with tempfile.TemporaryDirectory() as answers:
        words = (n, port, Path(answers), work, words)
        ranks = [context.Process(target=as_rank, args=(r, *words)) for r in range(n)]
        for rank in ranks:
            rank.start()
        try:
            end = time.monotonic() + 300
            while any(rank.exitcode is None for rank in ranks) and time.monotonic() < end:
                time.sleep(0.02)
            assert [rank.exitcode for rank in ranks] == [0] * n
            return [pickle.loads((Path(answers) / str(r)).read_bytes()) for r in range(n)]
        finally:
            for rank in ranks:
                rank.kill()


def make_trainer(ranks, *callbacks, micro_batch_size=None, compute=None):
    "A tiny model in float64 on 473 training windows, so that the last of ten steps gets 23 instead of 50."
    rng = np.random.default_rng(0)
    x = rng.normal(size=(705, 4))
    data = FinancialDataset.from_arrays(x, (x[:, 0] > 0).astype(float), kind="binary", context_length=20)
    data.x, data.y = data.x.double(), data.y.double()
    torch.manual_seed(0)
    model = ranks.shard(PatchTST(MODEL).double())
    if compute is not None:
        set_up(model, compute, data.batch(data.index["train"][:9])[0], torch.device("cpu"))
    return Trainer(model, data, OPTIM, micro_batch_size=micro_batch_size, ranks=ranks, callbacks=[Schedule(), Gradients(), *callbacks])


class Gradients(Callback):
    "Keep the norm of the gradients that the optimiser was given: AdamW would forgive a factor."

    def before_fit(self, trainer):
        self.norms = []

    def after_step(self, trainer):
        norm = torch.nn.utils.get_total_norm([p.grad for p in trainer.model.parameters()])
        self.norms.append(trainer.ranks.whole(norm).item())


def outcome(trainer):
    "Train, and return the weights, the losses, and the norms of the gradients in the last nine steps."
    norms = next(c for c in trainer.fit().callbacks if isinstance(c, Gradients)).norms
    weights = torch.cat([trainer.ranks.whole(p.detach()).flatten() for p in trainer.model.parameters()])
    return weights.numpy(), trainer.train_loss, trainer.val_loss, trainer.split_logits.numpy(), norms[-9:]


class PauseAt(Callback):
    def __init__(self, step):
        self.step = step

    def after_step(self, trainer):
        if trainer.step == self.step:
            trainer.request_pause("asked")


def arranged(group, parallel):
    config = replace(CONFIG, compute=ComputeConfig(parallel=parallel))
    return arrange(group, config, MODEL)


def train_and_save(group, folder):
    "Both ways: an undisturbed run; two ranks also take micro-batches and leave a checkpoint, four go on from what there is."
    found = {}
    for way in WAYS:
        ranks, _ = arranged(group, way)
        found[way] = outcome(make_trainer(ranks))
        if group.size == 2:
            found[way, "cut"] = outcome(make_trainer(ranks, micro_batch_size=6))
            make_trainer(ranks, PauseAt(11), SharedCheckpoint(folder / way)).fit()
        if group.size == 4:
            for of in SOURCES[way]:
                trainer = make_trainer(ranks)
                assert load_checkpoint(trainer, folder / of, read=read_shards) == 11
                found[way, of] = outcome(trainer)
    if group.size == 2:
        ranks, compute = in_little_memory(group)
        found["short"] = outcome(make_trainer(ranks, compute=compute))
    return found


def in_little_memory(group):
    "Let the memory model choose for a device that offers less than the activations need."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("finpatch.distributed.memory_limit", lambda device: (1e-6, "test"))
        ranks, compute = arranged(group, "auto")
    assert (ranks.parallel, compute.is_checkpointed) == ("fsdp", True)
    assert arranged(group, "auto")[0].parallel == "ddp"
    return ranks, compute


@pytest.fixture(scope="module")
def alone():
    "One process that nobody disturbs."
    return outcome(make_trainer(ALONE))


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    "What 1, 2 and 4 ranks came to, and the folder of their checkpoints."
    folder = tmp_path_factory.mktemp("shared")
    make_trainer(ALONE, PauseAt(11), Checkpoint(folder / "alone")).fit()
    return {n: on_ranks(n, train_and_save, folder) for n in (1, 2, 4)}, folder


def assert_close(found, want):
    for a, b in zip(found, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("n", "way"), [*product((1, 2, 4), WAYS), (2, ("ddp", "cut")), (2, ("fsdp", "cut")), (2, "short")])
def test_ranks_end_with_the_weights_and_losses_of_one_process(n, way, shared, alone):
    for answer in shared[0][n]:
        assert_close(answer[way], alone)


@pytest.mark.parametrize(("way", "of"), [(way, of) for way in WAYS for of in SOURCES[way]])
def test_four_ranks_go_on_with_what_two_or_one_have_saved(way, of, shared, alone):
    for answer in shared[0][4]:
        assert_close(answer[way, of], alone)


@pytest.mark.parametrize("of", WAYS)
def test_one_process_goes_on_with_what_two_ranks_have_saved(of, shared, alone):
    trainer = make_trainer(ALONE)
    assert load_checkpoint(trainer, shared[1] / of, read=read_shards) == 11
    assert_close(outcome(trainer), alone)


def test_each_rank_of_fsdp_writes_its_part_and_ddp_nothing_twice(shared):
    for way in WAYS:
        path, _ = newest_checkpoint(shared[1] / way)
        files = sorted(path.with_suffix("").iterdir())
        assert len(files) == 2
        total = sum(p.numel() for p in PatchTST(MODEL).parameters())
        held = [sum(v.numel() for k, v in load_file(f).items() if k.startswith("model.")) for f in files]
        assert sum(held) == total and (way == "ddp" or max(held) < 0.6 * total)


class Seat(Alone):
    def __init__(self, rank, size):
        self.rank, self.size = rank, size


@given(st.integers(1, 200), st.integers(1, 40), st.integers(1, 9))
def test_no_window_is_lost_or_counted_twice(n_samples, micro, n_ranks):
    samples = torch.randperm(500)[:n_samples]
    hands = [deal(samples, micro, Seat(r, n_ranks)) for r in range(n_ranks)]
    assert len({len(mine) for mine, _ in hands}) == 1 and len(hands[0][0]) % micro == 0
    counted = [s for mine, w in hands for s, weight in zip(mine.tolist(), [1] * len(mine) if w is None else w.tolist(), strict=True) if weight]
    assert sorted(counted) == sorted(samples.tolist())


# Requests


class Ask(Callback):
    "Ask one rank alone, when an event comes for the n-th time."

    def __init__(self, event, n, ask):
        self.n, self.ask = n, ask
        setattr(self, event, self.count)

    def count(self, trainer):
        self.n -= 1
        if self.n == 0:
            getattr(trainer, self.ask)(f"{self.ask} of rank {trainer.ranks.rank}")


ASKED = [
    *[(event, n, "request_pause") for event, n in (("before_fit", 1), ("before_epoch", 2), ("before_step", 4), ("after_step", 5))],
    *[(event, n, "request_pause") for event, n in (("after_micro_batch", 8), ("after_eval_batch", 1), ("after_epoch", 1))],
    *[(event, n, "request_stop") for event, n in (("after_step", 3), ("after_epoch", 1))],
]


def ask_one(group, folder):
    "Let one rank be asked, at every moment at which a callback may ask; return where each rank ended."
    ranks, found = arranged(group, "ddp")[0], []
    for i, (event, n, ask) in enumerate(ASKED):
        who = i % group.size
        callbacks = [Ask(event, n, ask)] if group.rank == who else []
        trainer = make_trainer(ranks, *callbacks, SharedCheckpoint(folder / str(i)), micro_batch_size=13).fit()
        found.append((trainer.stop_reason, trainer.is_paused, trainer.step, trainer.epoch, f"{ask} of rank {who}"))
    return found


class Machine:
    "A thermometer that one rank has, and a clock that moves when it sleeps."

    now = 0.0

    def __init__(self, temp_c):
        self.reading = Reading(temp_c=temp_c)

    def sleep(self, seconds):
        self.now += seconds
        time.sleep(0.002)

    def make_reader(self, *_):
        return self

    def latest(self):
        return self.reading

    first = latest

    def end(self): ...


def heat_one(group, folder):
    "Two ranks, of which the second has a machine that stays critical."
    machine = Machine(99.0 if group.rank == 1 else 40.0)
    faces = {"sleep": machine.sleep, "clock": lambda: machine.now, "make_reader": machine.make_reader}
    heat = ThermalCallback(machine.latest, ThermalConfig(stop_after_s=60.0), **faces)
    trainer = make_trainer(arranged(group, "fsdp")[0], heat, SharedCheckpoint(folder / "heat")).fit()
    return trainer.stop_reason, trainer.is_paused, trainer.step


def requests(group, folder):
    return ask_one(group, folder), heat_one(group, folder)


def test_what_one_rank_is_asked_all_do_at_the_same_step(tmp_path):
    (first, hot), (second, hot_too) = on_ranks(2, requests, tmp_path)
    assert first == second
    for i, ((event, _, ask), (reason, is_paused, step, _, want)) in enumerate(zip(ASKED, first, strict=True)):
        assert (reason, is_paused) == (want, ask == "request_pause"), event
        saved = newest_checkpoint(tmp_path / str(i))
        assert (saved is not None) == is_paused and (not saved or saved[1]["step"] == step), event
    assert hot == hot_too and hot[:2] == ("thermal", True)
    assert newest_checkpoint(tmp_path / "heat")[1]["step"] == hot[2]


# Checkpoints that somebody has tampered with


class Boom:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def reseal(path):
    "Write the digests anew, as one who tampers would."
    state = {k: v for k, v in read_json(path).items() if k != "sha256"}
    state["tensors_sha256"] = digest_tensors(path.with_suffix(""))
    path.write_text(json.dumps(state | {"sha256": json_digest(state)}))


def test_hostile_metadata_runs_nothing(shared, alone, tmp_path):
    "The table that torch's usual storage keeps in a pickle is refused; with matching digests it is not opened."
    folder = shutil.copytree(shared[1] / "fsdp", tmp_path / "checkpoints")
    path, hostile = next(folder.glob("step-*.json")), pickle.dumps(Boom(tmp_path / "boom"))
    (path.with_suffix("") / ".metadata").write_bytes(hostile)
    with pytest.raises(InputError, match="another content of step-00000011"):
        read_checkpoint(path)
    reseal(path)
    trainer = make_trainer(ALONE)
    assert load_checkpoint(trainer, folder, read=read_shards) == 11
    assert_close(outcome(trainer), alone)
    assert not (tmp_path / "boom").exists()
    pickle.loads(hostile)
    assert (tmp_path / "boom").exists()  # whoever opens it is hit


HEADERS = {
    "no JSON": "{",
    "no offsets": "{}",
    "a list": json.dumps(["model.head.bias"]),
    "far away": {"saved_offsets": [10**15, 0]},
    "text": {"saved_offsets": "__import__('os').abort()"},
}


@pytest.mark.parametrize("header", HEADERS)
def test_a_header_that_lies_is_an_error_that_names_the_checkpoint(header, shared, tmp_path):
    folder = shutil.copytree(shared[1] / "fsdp", tmp_path / "checkpoints")
    path, lie = next(folder.glob("step-*.json")), HEADERS[header]
    for file in path.with_suffix("").iterdir():
        tensors = load_file(file)
        text = lie if isinstance(lie, str) else json.dumps(dict.fromkeys(tensors, lie))
        save_file(tensors, file, metadata={"DCP_SHARDING_INFO": text})
    reseal(path)
    with pytest.raises(InputError, match="must hold the tensors of its run; got step-00000011"):
        load_checkpoint(make_trainer(ALONE), folder, read=read_shards)


# The whole path to a run


class Leave(PauseAt):
    "Leave a STOP file at a step, for whichever rank sees it first."

    order = 1

    def __init__(self, path, step):
        self.path, self.step = path, step

    def after_step(self, trainer):
        if trainer.step == self.step:
            self.path.touch()
            time.sleep(0.3)


def run_together(group, data_dir, run_dir, config, callbacks=()):
    "Train on real data, as the command does."
    how = {"is_progress_shown": False, "ranks": group, "callbacks": callbacks if group.rank else ()}
    train_run(config, "5k", data_dir=data_dir, run_dir=run_dir, device="cpu", **how)


def run_two(group, data_dir, folder):
    "Undisturbed with dropout; and without, as FSDP, until a STOP file that the second rank leaves."
    run_together(group, data_dir, folder / "whole", DROPOUT)
    run_together(group, data_dir, folder / "stopped", override(CONFIG, parallel="fsdp"), (Leave(folder / "stopped" / "STOP", 12),))


@pytest.fixture(scope="module")
def runs(data_dir, tmp_path_factory):
    "A folder with two runs of two ranks."
    folder = tmp_path_factory.mktemp("runs")
    on_ranks(2, run_two, data_dir, folder)
    return folder


def weights_of(run_dir):
    return torch.cat([v.flatten() for _, v in sorted(load_file(run_dir / "last.safetensors").items())]).numpy()


def test_a_stopped_run_of_two_ranks_ends_in_one_process_as_if_it_had_always_had_one(runs, data_dir, tmp_path, caplog):
    stopped = shutil.copytree(runs / "stopped", tmp_path / "run")
    record = read_json(stopped / "run.json")
    assert (record["status"], record["stop_reason"]) == ("stopped", "STOP file") and 12 <= record["step"] <= 13
    assert (record["effective"]["parallel"], record["effective"]["n_ranks"]) == ("fsdp", 2)
    how = {"is_progress_shown": False, "conclude": lambda *_: {}}  # the weights are enough
    whole = train_run(CONFIG, "5k", data_dir=data_dir, run_dir=tmp_path / "whole", device="cpu", **how)
    resume_run(stopped, data_dir, is_progress_shown=False)
    assert "parallel None instead of fsdp" in caplog.text and "n_ranks 1 instead of 2" in caplog.text
    np.testing.assert_allclose(weights_of(stopped), weights_of(whole), rtol=0, atol=2e-4)  # float32, 40 steps of AdamW
    result = read_json(stopped / "result.json")
    assert result["resumed_from_step"] == record["step"] and not result["is_bitwise"]


def test_a_run_of_two_ranks_is_a_run_like_any_other(runs, data_dir):
    run, record = load_run(runs / "whole", data_dir), read_json(runs / "whole" / "run.json")
    assert (record["status"], record["effective"]["parallel"], record["effective"]["n_ranks"]) == ("done", "ddp", 2)
    assert run.result["n_params"] == sum(p.numel() for p in run.model.parameters())
    names = {p.name for p in (runs / "whole").iterdir()}
    assert {"config.yaml", "metrics.jsonl", "predictions.parquet", "result.json"} <= names and "checkpoints" not in names
    rows = [json.loads(line) for line in (runs / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]  # one writer


def kill_rank(mark, rank):
    for path in marked(mark):
        if f"\0RANK={rank}\0".encode() in (path / "environ").read_bytes():
            os.kill(int(path.name), signal.SIGKILL)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the ranks by /proc, which Linux alone has")
def test_a_rank_that_is_killed_costs_the_time_since_the_last_checkpoint(runs, data_dir, tmp_path):
    "By the command, under torchrun, which starts the ranks again once; the weights are those of the undisturbed run."
    (tmp_path / "mine.yaml").write_text(dump_yaml(DROPOUT))
    run_dir, mark = tmp_path / "run", uuid.uuid4().hex
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1", "--master-port", str(free_port())]
    words = ["train", "--config", str(tmp_path / "mine.yaml"), "--budget", "5k", "--device", "cpu", "--no-thermal"]
    words += ["--data-dir", str(data_dir), "--run-dir", str(run_dir), "--checkpoint-every-s", "0", "--json"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, *launch, "-m", "finpatch", *words], env=os.environ | {"MARK": mark}, **pipes) as child:
        while child.poll() is None and not list(run_dir.glob("checkpoints/step-*.json")):
            time.sleep(0.02)
        kill_rank(mark, 1)
        out, err = child.communicate(timeout=300)
    assert child.returncode == 0, err
    assert "finpatch, rank 0: all ranks of a run must live" in err
    result = json.loads(out.splitlines()[-1])
    assert result["status"] == "done" and 0 < result["resumed_from_step"] < 40
    assert result["weights_sha256"] == read_json(runs / "whole" / "result.json")["weights_sha256"]
    assert read_json(run_dir / "run.json")["is_bitwise"] is True
    assert not marked(mark)


# What is refused


def test_apples_gpu_is_refused_before_anything_else(monkeypatch):
    monkeypatch.setattr("finpatch.device.is_available", lambda kind: True)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(HardwareError, match="mps, on which torch has no collectives"), joined("mps"):
        pass


def test_the_command_says_what_ranks_cannot_share(monkeypatch, capsys, data_dir, tmp_path):
    where = ["--data-dir", str(data_dir), "--runs-dir", str(tmp_path)]
    train = ["train", "--config", "sp500_direction", "--budget", "5k", *where]
    assert main([*train, "--parallel", "ddp"]) == 1
    assert "`--parallel` says how ranks share a run; got one process" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["study", "--config", "sp500_study", *where]) == 1
    assert "ranks share `train` and `pretrain` alone; got study" in capsys.readouterr().err
    with pytest.raises(InputError, match="measures what one process can hold; got 2 ranks"):
        train_run("sp500_direction", "5k", data_dir=data_dir, run_dir=tmp_path / "x", micro_batch_size="auto", ranks=Seat(0, 2))
