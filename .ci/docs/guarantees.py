#!/usr/bin/env python3
"""Write what the tests of each guarantee check beside its page; `_quarto.yml` runs this before it renders.

A file of tests serves a guarantee if its docstring names it (`G4`), or if the page lists it under `tests:`. So the
pages cannot name a test that is gone, and a new one appears by itself.
"""

import ast
import configparser
import re
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
PAGES = Path("guarantees")  # in the folder that is rendered
TESTS = "tests"


def front(path: Path) -> dict:
    "Read the YAML between the first two lines of dashes."
    return yaml.safe_load(path.read_text(encoding="utf-8").split("---\n")[1])


def repository() -> str:
    "Return the address of the tests in the repository."
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return f"{parser['DEFAULT']['git_url']}/blob/{parser['DEFAULT']['branch']}/{TESTS}"


def read_tests() -> dict[str, ast.Module]:
    "Parse each file of tests."
    files = sorted((ROOT / TESTS).glob("test_*.py"))
    return {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in files}


def functions(tree: ast.Module) -> list[ast.FunctionDef]:
    "List the tests of a file."
    return [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")]


def serving(tag: str, page: Path, tests: dict[str, ast.Module]) -> list[str]:
    "List the files that serve a guarantee: those that name it, and those that its page lists."
    listed = front(page).get("tests", [])
    if gone := [name for name in listed if name not in tests]:
        raise SystemExit(f"{page}: every file under `tests:` must exist; got {gone}. Rename or remove it.")
    named = [name for name, tree in tests.items() if re.search(rf"\b{tag}\b", ast.get_docstring(tree) or "")]
    return [name for name in tests if name in {*listed, *named}]


def sentence(test: ast.FunctionDef) -> str:
    "Return the name of a test as a sentence, and its docstring."
    text = test.name.removeprefix("test_").replace("_", " ")
    doc = " ".join((ast.get_docstring(test) or "").split())
    return text[:1].upper() + text[1:] + (f": {doc}" if doc else "")


def section(name: str, tree: ast.Module) -> str:
    "Write what one file of tests checks, with a link to the source of each test."
    where = f"{repository()}/{name}.py"
    risk = " ".join((ast.get_docstring(tree) or "").split())
    lines = [f"- {sentence(test)} ([line {test.lineno}]({where}#L{test.lineno}))" for test in functions(tree)]
    return "\n".join([f"### `{name}.py`", "", f"{risk} [Source]({where}).", "", *lines, ""])


def main() -> None:
    "Write `_tests_TAG.md` for every page, and the table of all for the index."
    tests = read_tests()
    rows = ["| guarantee | tested by | what it says |", "|---|---|---|"]
    for page in sorted(PAGES.glob("g*.qmd")):
        tag = page.stem.split("_")[0].upper()
        names = serving(tag, page, tests)
        count = sum(len(functions(tests[name])) for name in names)
        parts = [f"{count} tests in {len(names)} files, read from the source of this version.\n"]
        parts += [section(name, tests[name]) for name in names]
        (PAGES / f"_tests_{tag.lower()}.md").write_text("\n".join(parts), encoding="utf-8")
        about = front(page)
        rows.append(
            f"| [{about['title']}]({page.name}) | {count} tests in {len(names)} files | {about['description']} |"
        )
    (PAGES / "_all.md").write_text("\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
