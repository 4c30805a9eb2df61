"""What a user installs. Risk: it works in the checkout and nowhere else."""

import configparser
import json
import re
import subprocess
import sys
import sysconfig
import zipfile
from importlib.metadata import distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "sklearn", "matplotlib", "talib", "transformers", "exchange_calendars", "yfinance")


def imported(statement: str) -> set[str]:
    "Return the top-level packages that a fresh interpreter has loaded after a statement."
    code = f"{statement}; import sys; print(*{{m.split('.')[0] for m in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_importing_the_package_loads_nothing_heavy():
    assert not imported("import finpatch") & set(HEAVY)


@pytest.mark.parametrize("module", ["manifest", "experiment", "targets", "budget", "evaluate", "cli"])
def test_modules_that_need_no_torch_do_not_load_it(module):
    assert "torch" not in imported(f"import finpatch.{module}")


def test_the_wheel_runs_outside_the_checkout(tmp_path):
    "Built, unpacked where there is no checkout, and asked for the budgets: configs are inside."
    wheel = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(wheel, check=True, capture_output=True)
    site = tmp_path / "site"
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as archive:
        archive.extractall(site)
    code = f"import sys; sys.path.insert(0, {str(site)!r}); from finpatch.cli import main; import finpatch; print(finpatch.__file__); main(['budget', '2m'])"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert str(site) in done.stdout and "1,822,657" in done.stdout
    shipped = {p.name for p in (site / "finpatch" / "configs").rglob("*.yaml")}
    assert {"patchtst_200m.yaml", "sp500_log_range.yaml"} <= shipped


def locked() -> dict[str, str]:
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if line and line[0] != "#"]
    return dict(line.split(";")[0].strip().split("==") for line in lines)


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_lock_is_public_and_exact():
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        assert line.startswith("#") or re.fullmatch(r"[\w.-]+==[\w.]+(; .+)?", line), line


def test_the_lock_covers_every_requirement():
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini")
    cfg, names = parser["DEFAULT"], {normal(n) for n in locked()}
    for key in ("requirements", "market_requirements", "panel_requirements", "cluster_requirements", "bench_requirements", "dev_requirements"):
        for requirement in cfg[key].split():
            assert normal(re.split(r"[<>=]", requirement)[0]) in names, requirement
    core = cfg["requirements"].lower()
    assert not re.search(r"mlflow|wandb|ray|optuna|playwright|jupyterlab", core)


def test_what_is_installed_is_what_the_lock_says():
    "Only in the environment of the Makefile; another one may be of other versions on purpose."
    if not Path(sys.prefix).resolve().is_relative_to(ROOT):
        pytest.skip(f"not the environment that `make install` makes: {sys.prefix}")
    want = {normal(k): v for k, v in locked().items()}
    found = {normal(d.metadata["Name"]): d.version.split("+")[0] for d in distributions(path=[sysconfig.get_path("purelib")])}
    odd = {n: v for n, v in found.items() if n != "finpatch" and want.get(n) != v}
    assert not odd


def test_the_readme_is_the_index():
    "README.md is kept by hand beside `index.ipynb`: every paragraph and every code cell stands in both."
    cells = json.loads((ROOT / "nbs" / "index.ipynb").read_text(encoding="utf-8"))["cells"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8").replace("](nbs/images/", "](images/")
    for cell in cells:
        assert "".join(cell["source"]) in readme


def test_the_map_names_every_module():
    "A module that the map does not name cannot be found by a reader."
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    modules = {p.stem for p in (ROOT / "finpatch").glob("*.py")} - {"__init__", "__main__", "_modidx"}
    assert not {m for m in modules if f"`{m}`" not in readme}


def test_the_map_points_at_notebooks_that_exist():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(\d\d[a-z]?_\w+)`", readme))
    assert named <= {p.stem for p in (ROOT / "nbs").glob("*.ipynb")}
