"""The command as a user meets it. Risk: a guarantee that holds in the library and is lost on the way to the terminal."""

import json
import multiprocessing
import random
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.numpy import load_file

from finpatch.cli import main, make_parser
from finpatch.market import load_ohlcv
from finpatch.status import read_record

ROOT = Path(__file__).parent.parent


def finpatch(*words, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "finpatch", *map(str, words)], capture_output=True, text=True, **options
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    path = tmp_path_factory.mktemp("built") / "data"
    for words in (("data", "fetch", "SP500"), ("data", "build", "SP500")):
        assert main([*words, "--data-dir", str(path)]) == 0
    return path


@pytest.fixture
def data_dir(built, tmp_path):
    return shutil.copytree(built, tmp_path / "data")


@pytest.fixture
def run(data_dir, tmp_path, capsys):
    "Run the command in this process; return status, standard output and standard error."

    def call(*words):
        capsys.readouterr()
        try:
            status = main([str(w) for w in words] + ["--data-dir", str(data_dir), "--runs-dir", str(tmp_path / "runs")])
        except SystemExit as stop:
            status = stop.code
        out, err = capsys.readouterr()
        return status, out, err

    return call


def names(parser, prefix=()):
    "List the subcommands of a parser, at any depth."
    actions = [a for a in parser._actions if getattr(a, "choices", None) and isinstance(a.choices, dict)]
    if not actions:
        return [prefix]
    return [n for name, p in actions[0].choices.items() for n in names(p, (*prefix, name))]


@pytest.mark.parametrize("words", names(make_parser()), ids=" ".join)
def test_every_subcommand_has_help_with_an_example(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*words, "--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0
    assert f"finpatch {' '.join(words)}" in out.split("example:")[1]
    for option in ("--data-dir", "--runs-dir", "--json", "--debug"):
        assert option in out


def test_budget_counts_are_those_of_the_study(run):
    status, out, _ = run("budget", "2m", "20m", "200m", "--json")
    budgets = json.loads(out)["budgets"]
    assert status == 0
    assert [budgets[k]["n_params"] for k in ("2m", "20m", "200m")] == [1822657, 19029505, 201769985]


def test_wrong_usage_is_status_2_and_json_where_asked():
    done = finpatch("train", "--budget", "2m", "--json")
    assert done.returncode == 2
    assert "--config" in json.loads(done.stdout)["error"]["found"]
    assert finpatch("tran").returncode == 2


def flip(data_dir):
    path = data_dir / "raw" / "SP500.OHLCV.daily.v1.parquet"
    data = bytearray(path.read_bytes())
    data[random.Random(0).randrange(len(data))] ^= 1
    path.write_bytes(data)


def remove_parent(data_dir):
    (data_dir / "raw" / "SP500.OHLCV.daily.v1.parquet").unlink()


def add_file(data_dir):
    path = data_dir / "processed" / "SP500.dataset.a20.v1.parquet"
    shutil.copy(path, path.with_name("SP500.dataset.a20.copy.parquet"))


def edit_manifest(data_dir):
    path = data_dir / "processed" / "manifest.json"
    path.write_text(path.read_text().replace('"n_rows": 4531', '"n_rows": 4532', 1))


ACCIDENTS = {
    flip: ("changed", "raw/SP500.OHLCV.daily.v1.parquet"),
    remove_parent: ("missing", "raw/SP500.OHLCV.daily.v1.parquet"),
    add_file: ("unregistered", "processed/SP500.dataset.a20.copy.parquet"),
    edit_manifest: ("manifest_edited", "processed/manifest.json"),
}


@pytest.mark.parametrize("accident", ACCIDENTS, ids=lambda f: f.__name__)
def test_verify_names_the_accident_and_train_refuses(accident, run, data_dir):
    assert run("verify")[0] == 0
    accident(data_dir)
    problem, path = ACCIDENTS[accident]
    status, out, _ = run("verify", "--json")
    found = [(f["problem"], f["path"]) for f in json.loads(out)["findings"]]
    assert status == 1 and (problem, path) in found
    assert path in run("verify")[1]
    status, out, err = run("train", "--config", "sp500_direction", "--budget", "10k", "--json")
    assert status == 1 and path.rsplit("/", 1)[1] in err
    assert set(json.loads(out)["error"]) == {"rule", "found", "remedy"}
    assert not (data_dir / "ledger.jsonl").exists()


def test_training_on_data_that_is_not_built_says_what_to_run(run):
    status, _, err = run("train", "--config", "spy_direction", "--budget", "10k")
    assert status == 1 and "SPY.dataset.a20" in err and len(err.strip().splitlines()) == 1


def test_a_defect_is_one_line_unless_debug_is_asked_for(run, monkeypatch):
    import finpatch.budget

    monkeypatch.setattr(finpatch.budget, "describe_budgets", lambda names: 1 / 0)
    assert len(run("budget")[2].splitlines()) == 1
    assert "Traceback" in run("budget", "--debug")[2]


def test_an_outside_table_without_a_rule_is_refused_and_with_one_becomes_columns(run, tmp_path):
    days = pd.bdate_range("1998-01-01", "2018-12-31")
    pd.DataFrame({"date": days, "level": range(len(days))}).to_csv(tmp_path / "rate.csv", index=False)
    status, _, err = run("data", "outside", "RATE", "--path", tmp_path / "rate.csv")
    assert status == 1 and "needs `available_at`" in err and len(err.strip().splitlines()) == 1
    assert run("data", "outside", "RATE", "--path", tmp_path / "rate.csv", "--lag-days", "3")[0] == 0
    assert run("data", "build", "SP500", "--tier", "a20+RATE")[0] == 0
    status, out, _ = run("audit", "SP500", "--tier", "a20+RATE", "--cuts", "3", "--json")
    assert status == 0 and json.loads(out)["n_columns"] == 21
    assert run("verify")[0] == 0


def test_a_revised_close_is_traced_to_features_labels_and_runs(run, tmp_path):
    assert (
        run(
            "train",
            "--config",
            "sp500_direction",
            "--budget",
            "5k",
            "--max-steps",
            "1",
            "--run-dir",
            tmp_path / "runs/r",
        )[0]
        == 0
    )
    bars = load_ohlcv("SP500")
    bars.loc["2010-05-06", ["Close", "Adj Close"]] *= 1.001
    bars.to_csv(tmp_path / "new.csv")
    words = ("data", "fetch", "SP500", "--source", "file", "--path", tmp_path / "new.csv", "--new-version")
    assert run(*words)[0] == 0
    status, out, _ = run("data", "diff", "SP500.OHLCV.daily.v1", "SP500.OHLCV.daily", "--json")
    found = json.loads(out)
    assert status == 0 and [c["column"] for c in found["columns"]] == ["Close", "Adj Close, returns"]
    assert [c["n_sessions"] for c in found["columns"]] == [1, 2]
    assert {f["tier"] for f in found["features"]} == {"a20"} and "regression.h1" in {x["task"] for x in found["labels"]}
    assert found["runs"] == [str(tmp_path / "runs/r")]


def test_a_budget_off_tolerance_does_not_train(run, monkeypatch):
    import finpatch.job as owner

    monkeypatch.setattr(owner, "count_parameters", lambda model: 10_201)
    status, _, err = run("train", "--config", "sp500_direction", "--budget", "10k", "--max-steps", "1")
    assert (status == 1 and "10,201" in err) or "10201" in err


def test_train_predict_evaluate_and_the_ledger(run, tmp_path):
    status, out, _ = run("train", "--config", "sp500_direction", "--budget", "10k", "--max-steps", "4", "--json")
    result = json.loads(out)
    assert status == 0 and result["n_test_looks"] == 1
    wanted = {"run_dir", "status", "stop_reason", "resumed_from_step", "n_steps", "n_params", "n_windows", "val", "test",
              "baselines", "weights_sha256", "wall_s", "peak_mem_gib", "schema_version"}  # fmt: skip
    assert wanted <= set(result)
    for name in ("log_loss", "auc", "accuracy", "brier", "skill"):
        assert result["test"][name]["low"] <= result["test"][name]["value"] <= result["test"][name]["high"]
    assert {"prior", "climatology", "volatility", "last_row"} <= set(result["baselines"])
    status, out, _ = run("predict", "--run", result["run_dir"], "--asof", "2018-12-31", "--json")
    assert [p["origin"] for p in json.loads(out)["predictions"]] == ["2018-12-31"]
    file = f"{result['run_dir']}/predictions.parquet"
    again = json.loads(run("evaluate", file, "--config", "sp500_direction", "--json")[1])
    assert again["test"]["log_loss"] == result["test"]["log_loss"]
    assert again["n_test_looks"] == 2
    assert json.loads(run("evaluate", file, "--json")[1])["n_test_looks"] == 3
    assert run("runs")[1].splitlines()[1].split()[0] == "done"


def test_make_run_works_on_a_fresh_clone(tmp_path):
    "Every command of the recipe, where only the manifests are there, as committed; the study is estimated, not trained."
    for kind in ("raw", "processed"):
        (tmp_path / "data" / kind).mkdir(parents=True)
        name = f"data/{kind}/manifest.json"
        committed = subprocess.run(["git", "show", f"HEAD:{name}"], cwd=ROOT, capture_output=True, check=True).stdout
        (tmp_path / name).write_bytes(committed)
    recipe = subprocess.run(["make", "-n", "run"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    commands = [shlex.split(line)[1:] for line in recipe.splitlines() if "/finpatch " in line]
    assert [words[0] for words in commands] == ["data", "data", "study"]
    for words in commands:
        short = ["--dry-run"] if words[0] == "study" else []
        done = finpatch(*words, *short, cwd=tmp_path)
        assert done.returncode == 0, (words, done.stdout, done.stderr)
    assert "120 to judge" in done.stdout, done.stdout


def test_a_refused_file_is_no_look_at_the_test_span(run, data_dir, tmp_path):
    rows = [f"test,2016-01-{day:02d},2016-01-{day + 1:02d},{day % 2},0.5" for day in range(4, 9)]
    (tmp_path / "short.csv").write_text("\n".join(["split,origin,target_end,y,p", *rows]))
    status, _, err = run("evaluate", tmp_path / "short.csv")
    assert status == 1 and "at least 100" in err
    assert not (data_dir / "ledger.jsonl").exists()


def test_a_date_that_can_be_read_in_two_ways_is_refused(run):
    status, _, err = run("predict", "--run", "nowhere", "--asof", "01/02/2018")
    assert status == 1 and "01/02/2018" in err and "2024-01-31" in err


def test_one_unreadable_record_hides_no_run(run, tmp_path):
    good = {"status": "done", "budget": "2m", "n_params": 5, "started_utc": "2026-01-31T12:00:00Z"}
    texts = {"good": json.dumps(good), "torn": "{", "empty": "{}", "list": "[]"}
    for name, text in texts.items():
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "run.json").write_text(text)
    status, out, _ = run("runs", "--json")
    found = {r["run_dir"].rsplit("/", 1)[1]: r["status"] for r in json.loads(out)["runs"]}
    assert status == 0 and found == {"good": "done", "torn": "unreadable", "empty": "unreadable", "list": "unreadable"}
    assert [line.split()[0] for line in run("runs")[1].splitlines()].count("unreadable") == 3


def test_what_the_file_system_refuses_has_a_remedy(tmp_path):
    (tmp_path / "data").write_text("a file, no folder")
    done = finpatch("data", "fetch", "SP500", "--json", cwd=tmp_path)
    error = json.loads(done.stdout)["error"]
    assert done.returncode == 1 and "data" in error["found"] and "--data-dir" in error["remedy"]
    assert done.stderr.strip().splitlines()[-1].startswith("finpatch: files must be readable and writable")


def test_the_keyboard_stops_a_command_with_an_object(run, monkeypatch):
    import finpatch.budget

    def stop(names):
        raise KeyboardInterrupt

    monkeypatch.setattr(finpatch.budget, "describe_budgets", stop)
    status, out, err = run("budget", "--json")
    assert status == 1 and "keyboard" in json.loads(out)["error"]["found"] and len(err.strip().splitlines()) == 1


def test_a_missing_file_is_one_line(run):
    status, _, err = run("evaluate", "nothing.csv")
    assert status == 1 and "nothing.csv" in err and len(err.strip().splitlines()) == 1


def save_for_ever(path, started):
    from finpatch.callbacks import save_weights

    model = torch.nn.Linear(800, 800)
    started.set()
    while True:
        save_weights(model, path)


@pytest.mark.soak
def test_twenty_kills_while_saving_weights(tmp_path):
    "Whatever moment a kill meets, the weights under the final name are whole."
    context = multiprocessing.get_context("forkserver")  # children start in milliseconds
    context.set_forkserver_preload(["finpatch.callbacks"])
    rng, path = random.Random(1), tmp_path / "last.safetensors"
    for _ in range(20):
        started = context.Event()
        child = context.Process(target=save_for_ever, args=(path, started))
        child.start()
        assert started.wait(60)
        time.sleep(rng.uniform(0, 0.1))
        child.kill()
        child.join()
        if path.exists():
            assert load_file(path)["weight"].shape == (800, 800)
    assert path.exists()


@pytest.mark.soak
def test_kills_during_fetch_build_and_train_leave_the_next_command_working(tmp_path):
    "The whole chain is killed at six moments, then runs through."
    where = ["--data-dir", str(tmp_path / "data"), "--runs-dir", str(tmp_path / "runs")]
    steps = [["data", "fetch", "SP500"], ["data", "build", "SP500"]]
    steps += [["train", "--config", "sp500_direction", "--budget", "10k", "--max-steps", "40"]]
    rng = random.Random(2)
    for words in steps:
        for low, high in ((0.3, 1.0), (1.0, 2.5)):
            child = subprocess.Popen([sys.executable, "-m", "finpatch", *words, *where], stderr=subprocess.DEVNULL)
            time.sleep(rng.uniform(low, high))
            child.kill()
            child.wait()
        done = finpatch(*words, *where)
        assert done.returncode == 0, done.stderr
    assert finpatch("verify", *where).returncode == 0
    for folder in (tmp_path / "runs").iterdir():
        status = read_record(folder)["status"] if (folder / "run.json").exists() else "running"
        assert (status == "done") == (folder / "result.json").exists()
