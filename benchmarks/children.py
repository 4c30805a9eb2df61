"""Run commands as a user does, in processes of their own: their time, their answer, their own peak of memory."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


def environment() -> dict[str, str]:
    "This checkout first, whatever else is installed."
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(p for p in paths if p), "MPLBACKEND": "agg"}


def run(*arguments: str) -> str:
    "Run this Python with arguments; return what it printed, or raise with what it complained of."
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment())
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} ended with {done.returncode}: {done.stderr[-800:]}")
    return done.stdout


def command(*words: str) -> list[str]:
    "The command `finpatch` as arguments of Python."
    return ["-c", "import sys; from finpatch.cli import main; sys.exit(main())", *words]


def seconds(*arguments: str) -> float:
    began = time.perf_counter()
    run(*arguments)
    return time.perf_counter() - began


def answer(module: str, *arguments: str) -> dict:
    "Return the last line that a module of the benchmarks prints as JSON."
    return json.loads(run("-m", f"benchmarks.{module}", *arguments).splitlines()[-1])


def make_data(folder: Path, tier: str = "a20") -> None:
    "Fetch and build the embedded SP500."
    run(*command("data", "fetch", "SP500", "--data-dir", str(folder)))
    run(*command("data", "build", "SP500", "--tier", tier, "--data-dir", str(folder)))


def resident_gib() -> float:
    "Read what this process holds now, GiB; its peak where the system does not say."
    from finpatch.device import peak_mem_gib

    status = Path("/proc/self/status")
    if not status.exists():
        return peak_mem_gib()
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmRSS")) / 2**20
