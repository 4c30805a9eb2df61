"""The documentation site and JupyterLab, opened in a real browser. Risk: pages and tutorials that nobody has opened.

A link that leads nowhere, a formula that needs a network, a table wider than a telephone, a tutorial that stops half-way.
The site is built once, in a copy of the checkout, by the stand-in for Quarto: it shows our pages, not Quarto's rendering.
"""

import ast
import functools
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import pytest
from browsing import LOOK, WIDTHS, Watch

ROOT = Path(__file__).parent.parent
TUTORIALS = sorted((ROOT / "nbs" / "tutorials").glob("*.ipynb"))
IN_LAB = sorted(TUTORIALS, key=lambda path: path.stem != "first_run")[:2]  # the first run, and one more


# ---- the site, built once


def git(folder: Path, *args: str) -> str:
    return subprocess.run(["git", *args], cwd=folder, capture_output=True, text=True, check=True).stdout


def copy_checkout(target: Path) -> Path:
    "Copy what git knows or would add, and put it in the index of a repository of its own."
    names = git(ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    for name in filter(None, names):
        if (ROOT / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name, follow_symlinks=False)
    git(target, "init", "-q")
    git(target, "add", "-A")
    return target


def surroundings(root: Path) -> dict[str, str]:
    "The environment of `make docs`, with the stand-in before any real Quarto."
    path = [str(Path(sys.executable).parent), str(root / ".ci" / "docs"), os.environ["PATH"]]
    return os.environ | {"PATH": os.pathsep.join(path), "PYTHONPATH": str(root)}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    root = copy_checkout(tmp_path_factory.mktemp("docs") / "checkout")
    before, readme = git(root, "status", "--porcelain"), (root / "README.md").read_bytes()
    os.utime(root / "README.md", (0, 0))  # older than index.ipynb, as a fresh clone may have it
    done = subprocess.run(
        ["bash", ".ci/docs/build"], cwd=root, env=surroundings(root), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return SimpleNamespace(root=root, site=root / "_docs", log=done.stderr, before=before, readme=readme)


@pytest.fixture(scope="module")
def pages(built) -> list[Path]:
    return sorted(built.site.rglob("*.html"))


class Outline(HTMLParser):
    "Collect the ids, links and loaded files of a page."

    def __init__(self, text: str):
        super().__init__()
        self.ids, self.links, self.loads = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        named = dict(attrs)
        self.ids += [named["id"]] if named.get("id") else []
        if tag == "a" and named.get("href"):
            self.links.append(named["href"])
        elif tag in ("link", "script", "img", "iframe", "source", "video"):
            self.loads += [named[key] for key in ("src", "href", "srcset") if named.get(key)]


@functools.cache
def outline(path: Path) -> Outline:
    return Outline(path.read_text(encoding="utf-8"))


def dead_links(site: Path) -> list[str]:
    "List every link, to a page, an anchor or a file of the site, that leads nowhere."
    outlines, dead = {path: outline(path) for path in site.rglob("*.html")}, []
    for path, page in outlines.items():
        for href in page.links + page.loads:
            parts = urlsplit(href)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            anchors = outlines[target].ids if target in outlines else []
            if not target.is_file() or (parts.fragment and unquote(parts.fragment) not in anchors):
                dead.append(f"{path.relative_to(site)} -> {href}")
    return dead


# ---- what the files say


def test_the_build_changes_nothing_that_git_knows(built):
    assert git(built.root, "status", "--porcelain") == built.before
    assert (built.root / "README.md").read_bytes() == built.readme
    assert "warning" not in built.log, built.log


def test_links_and_anchors_resolve(built, pages):
    assert len(pages) > 60
    assert dead_links(built.site) == []


def test_a_dead_link_is_found(tmp_path):
    (tmp_path / "a.html").write_text(
        '<h2 id="here"></h2><a href="#here"></a><a href="#gone"></a><a href="b.html"></a><img src="c.png">'
    )
    assert [line.split(" -> ")[1] for line in dead_links(tmp_path)] == ["#gone", "b.html", "c.png"]


def test_nothing_is_loaded_from_elsewhere(built, pages):
    "Neither by a page nor by a stylesheet: no fonts, no formulas, no counters."
    loads = [(path.name, load) for path in pages for load in outline(path).loads]
    assert not [each for each in loads if re.match(r"(https?:)?//", each[1])]
    for sheet in built.site.rglob("*.css"):
        text = sheet.read_text(encoding="utf-8")
        assert not re.search(r"""(@import|url\()\s*(url\()?['"]?(https?:)?//""", text), sheet


def test_every_formula_is_mathml(built, pages):
    text = {
        path: re.sub(r"base64,[\w+/=]+", "", path.read_text(encoding="utf-8")) for path in pages
    }  # a picture spells anything
    assert not [path for path, page in text.items() if re.search(r"katex|mathjax|\\\(|\\\[[^\]]", page, re.IGNORECASE)]
    for path in (ROOT / "nbs").glob("*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        prose = "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
        if "$$" in prose:
            assert 'display="block"' in text[built.site / f"{page_name(path)}.html"], path


def page_name(notebook: Path) -> str:
    return re.sub(r"^\d+[a-z]?_", "", notebook.stem)


def sidebar(built) -> dict[str, list[str]]:
    "Map each section of the landing page's sidebar to its links."
    page = (built.site / "index.html").read_text(encoding="utf-8")
    start = page.index('id="quarto-sidebar"')
    first, *sections = page[start : page.index("</nav>", start)].split("sidebar-item-section")
    found = {"": Outline(first).links}
    for text in sections:
        title = re.search(r'class="menu-text">([^<]+)', text)[1]
        found[title] = [href for href in Outline(text).links if ".html" in href]
    return found


def test_the_sidebar_leads_to_every_page_once(built, pages):
    found = [href for links in sidebar(built).values() for href in links]
    assert sorted(found) == sorted(path.relative_to(built.site).as_posix() for path in pages)


STAGES = {0: {"Foundations"}, 1: {"Data"}, 2: {"Model and device"}, 3: {"Training", "Evaluation"}, 5: {"Command"}}


def test_every_notebook_has_a_page_under_its_stage(built):
    "The tens digit of a notebook is its stage; 39 belongs to the evaluation, 49 to the command."
    stage_of = {href: title for title, links in sidebar(built).items() for href in links}
    for path in (ROOT / "nbs").glob("[0-9]*.ipynb"):
        allowed = STAGES.get(int(path.stem[0]), {"Evaluation", "Study", "Command"})
        assert stage_of[f"{page_name(path)}.html"] in allowed, path.stem
    for path in TUTORIALS:
        assert stage_of[f"tutorials/{page_name(path)}.html"] == "Tutorials"


def definitions(path: Path) -> list[ast.AST]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and not n.name.startswith("_")]


def test_every_public_name_is_on_its_page_with_its_source(built):
    "Heading, signature with its comments, and a link to the line where it is defined."
    for module in sorted((ROOT / "finpatch").glob("[a-z]*.py")):
        page = (built.site / f"{module.stem}.html").read_text(encoding="utf-8")
        text = re.sub(r"<[^>]+>", "", page)
        for node in definitions(module):
            assert f'id="{node.name.lower()}' in page, f"{module.stem}.{node.name}"
            assert f"finpatch/{module.name}#L{node.lineno}" in page, f"{module.stem}.{node.name}"
            assert re.search(rf"(def|class) {node.name}\b", text), f"{module.stem}.{node.name}"


def test_the_api_says_shapes_methods_and_refusals(built):
    text = re.sub(r"<[^>]+>", "", (built.site / "patchtst.html").read_text(encoding="utf-8"))
    assert "# (B, n_outputs) or (B, h, F)" in text and "PatchTST.attention_maps" in text
    text = re.sub(r"<[^>]+>", "", (built.site / "interval.html").read_text(encoding="utf-8"))
    assert re.search(r"InputError\s*: an interval needs at least … values", text)


def test_names_in_prose_lead_to_their_place(built):
    page = outline(built.site / "tutorials" / "first_run.html")
    assert "../run.html#train_run" in page.links
    assert "patchtst.html" in outline(built.site / "index.html").links  # the map


# ---- the nine guarantees


def functions_in(name: str) -> list[str]:
    tree = ast.parse((ROOT / "tests" / f"{name}.py").read_text(encoding="utf-8"))
    return [n.name for n in tree.body if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")]


@pytest.mark.parametrize("number", range(1, 10))
def test_a_guarantee_names_every_test_behind_it(built, number):
    (path,) = (built.site / "guarantees").glob(f"g{number}_*.html")
    text = re.sub(r"<[^>]+>", "", path.read_text(encoding="utf-8"))
    files = sorted(set(re.findall(r"\btest_\w+(?=\.py)", text)))
    assert files
    for name in files:
        for test in functions_in(name):
            assert test.removeprefix("test_").replace("_", " ").lower() in text.lower(), f"{name}.{test}"
    for source in (ROOT / "tests").glob("test_*.py"):
        doc = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or ""
        assert source.stem in files or not re.search(rf"\bG{number}\b", doc), f"{source.stem} names G{number}"


def test_a_guarantee_cannot_name_a_test_that_is_gone(tmp_path):
    shutil.copytree(ROOT / "nbs" / "guarantees", tmp_path / "guarantees", ignore=shutil.ignore_patterns("_*"))
    page = tmp_path / "guarantees" / "g7_same_run.qmd"
    page.write_text(page.read_text(encoding="utf-8").replace("test_golden", "test_silver"), encoding="utf-8")
    script = [sys.executable, str(ROOT / ".ci" / "docs" / "guarantees.py")]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "test_silver" in done.stderr and "Traceback" not in done.stderr


# ---- the stand-in beyond the site


def quarto(built, *args: str) -> subprocess.CompletedProcess:
    stand_in = [sys.executable, str(built.root / ".ci" / "docs" / "quarto"), *args]
    return subprocess.run(stand_in, cwd=built.root / "_proc", capture_output=True, text=True, check=False)


def test_the_stand_in_makes_markdown_of_the_index(built):
    done = quarto(built, "render", "index.ipynb", "-o", "README.md", "-t", "gfm", "--no-execute")
    made = (built.root / "_proc" / "_docs" / "README.md").read_text(encoding="utf-8")
    assert done.returncode == 0 and "## Two commands" in made and "1,822,657 trainable parameters" in made
    assert "output-file" not in made


def test_the_stand_in_refuses_what_it_does_not_know(built):
    assert quarto(built, "preview").returncode == 2


def test_a_page_that_links_nowhere_stops_the_build(built, tmp_path):
    (tmp_path / "_quarto.yml").write_text("project: {type: website, output-dir: _docs}\n")
    (tmp_path / "index.qmd").write_text("# One\n\n[nowhere](gone.qmd)\n")
    stand_in = [sys.executable, str(built.root / ".ci" / "docs" / "quarto"), "render", "--no-cache"]
    done = subprocess.run(stand_in, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "gone.qmd" in done.stderr and "Traceback" not in done.stderr


# ---- the browser


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def served(built):
    "The site on a loopback server."
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(built.site)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(params=["file", "loopback"])
def base(request, built) -> str:
    "Where the site begins: opened as a file, with the network cut, or from a server on this machine."
    return built.site.as_uri() + "/" if request.param == "file" else request.getfixturevalue("served")


FAULTS = {
    "<script>console.error('planted')</script>": "planted",
    "<script>throw new Error('thrown')</script>": "thrown",
    "<img src='gone.png'>": "image gone.png",
    "<script>fetch('http://192.0.2.1/count').catch(() => 0)</script>": "asked http://192.0.2.1",
    "<div style='width: 500px'>wide</div>": "in a window of 390",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_of_a_page_is_seen(browser, tmp_path, fault):
    (tmp_path / "page.html").write_text(f"<!doctype html><meta name=viewport content='width=device-width'>{fault}")
    with Watch(browser, 390) as watch:
        assert any(FAULTS[fault] in problem for problem in watch.look((tmp_path / "page.html").as_uri()))


def test_every_page_opens_fits_and_asks_for_nothing(browser, built, pages):
    "Opened from its file with the network cut, then narrowed to a telephone."
    found = {}
    with Watch(browser, 1440) as watch:
        watch.context.set_offline(True)
        for path in pages:
            watch.resize(1440)
            found[path.name] = watch.look(path.as_uri())
            watch.resize(390)
            found[path.name] += watch.page.evaluate(LOOK)
    assert not {name: problems for name, problems in found.items() if problems}


@pytest.mark.parametrize("width", WIDTHS)
def test_the_landing_page_shows_its_figure_and_its_tables_scroll(browser, base, width):
    with Watch(browser, width) as watch:
        assert watch.look(base + "index.html") == []
        figure = watch.page.locator("main img[src$='result.svg']")
        assert figure.is_visible() and figure.bounding_box()["width"] > 0.8 * min(width, 800)
        boxes = [box.bounding_box() for box in watch.page.locator("main table, main pre").all()]
        assert len(boxes) > 5 and all(box["x"] + box["width"] <= width for box in boxes)


@pytest.mark.parametrize("name", ["patchtst", "interval", "tutorials/first_run", "guarantees/g6_honest_numbers"])
def test_pages_open_from_a_server(browser, served, name):
    with Watch(browser, 390) as watch:
        assert watch.look(f"{served}{name}.html") == []


def test_search_finds_patchtst(browser, base):
    with Watch(browser, 1440) as watch:
        watch.look(base + "guarantees/index.html")
        watch.page.locator(".smalldocs-search input").first.fill("PatchTST")
        first = watch.page.locator(".search-result").first
        first.wait_for()
        assert "patchtst" in first.inner_text().lower()
        watch.page.locator(".search-result[href*='patchtst.html']").first.click()
        watch.page.wait_for_url("**/patchtst.html*")
        assert watch.page.locator("h1").inner_text() == "patchtst" and watch.problems == []


def test_menus_open_on_a_telephone(browser, base):
    with Watch(browser, 390) as watch:
        watch.look(base + "features.html")
        link = watch.page.locator("#quarto-sidebar a[href*='targets.html']")
        assert link.bounding_box()["x"] < 0
        watch.page.locator(".quarto-btn-toggle").first.click()
        link.click()
        watch.page.wait_for_url("**/targets.html")
        assert watch.problems == []


# ---- JupyterLab

RUN_ALL = """async () => {
  const app = window.jupyterapp;
  await app.restored;
  const panel = app.shell.currentWidget;
  await panel.context.ready;
  await panel.sessionContext.ready;
  await panel.sessionContext.session.kernel.info;
  await panel.sessionContext.session.kernel.restart();
  await panel.sessionContext.session.kernel.info;
  await app.commands.execute("notebook:clear-all-cell-outputs");
  const cleared = [...panel.content.model.cells].every((cell) => cell.type !== "code" || cell.executionCount === null);
  await app.commands.execute("notebook:run-all-cells");
  const code = panel.content.widgets.filter((cell) => cell.model.type === "code" && cell.model.sharedModel.source.trim());
  return {
    cleared,
    counts: code.map((cell) => cell.model.executionCount),
    prompts: code.map((cell) => cell.inputArea.promptNode.textContent.trim()),
    errors: code.flatMap((cell) => cell.model.outputs.toJSON().filter((output) => output.output_type === "error")),
    outputs: code.reduce((sum, cell) => sum + cell.model.outputs.length, 0),
  };
}"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "A JupyterLab of its own, on a copy of the tutorials, that asks nobody for news."
    home, port, token = tmp_path_factory.mktemp("lab"), free_port(), secrets.token_hex(8)
    shutil.copytree(ROOT / "nbs" / "tutorials", home / "work", ignore=shutil.ignore_patterns(".*"))
    settings = {
        "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
        "notebook-extension/tracker": {"windowingMode": "none"},
    }
    for name, value in settings.items():
        path = home / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value))
    own = {f"JUPYTER_{name}_DIR": str(home / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")}
    own |= {"JUPYTERLAB_SETTINGS_DIR": str(home / "settings"), "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces")}
    own |= {"PYTHONPATH": str(ROOT), "IPYTHONDIR": str(home / "ipython")}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--expose-app-in-browser"]
    command += [f"--ServerApp.port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}"]
    command += ["--ServerApp.ip=127.0.0.1", f"--ServerApp.root_dir={home / 'work'}"]
    with (home / "log").open("w") as log:
        server = subprocess.Popen(command, cwd=home, env=os.environ | own, stdout=log, stderr=log)
        url = f"http://127.0.0.1:{port}"
        limit = time.monotonic() + 90
        while not answers(f"{url}/api/status?token={token}"):
            assert server.poll() is None and time.monotonic() < limit, (home / "log").read_text()
            time.sleep(0.2)
        yield SimpleNamespace(url=url, token=token)
        server.terminate()
        server.wait(30)


@pytest.mark.soak
@pytest.mark.jupyterlab
@pytest.mark.parametrize("tutorial", IN_LAB, ids=lambda path: path.stem)
def test_jupyterlab_restarts_and_runs_a_tutorial(browser, lab, tutorial):
    "Every prompt is numbered in order after a restart: old output text would prove nothing."
    with Watch(browser, 1440) as watch:
        watch.page.goto(f"{lab.url}/lab/tree/{tutorial.name}?reset&token={lab.token}")
        watch.page.wait_for_function("window.jupyterapp?.shell.currentWidget?.context !== undefined", timeout=60_000)
        watch.page.set_default_timeout(240_000)
        ran = watch.page.evaluate(RUN_ALL)
        assert ran["cleared"] and ran["errors"] == []
        assert ran["counts"] == list(range(1, len(ran["counts"]) + 1)) and len(ran["counts"]) > 5
        assert ran["prompts"] == [f"[{n}]:" for n in ran["counts"]]
        assert ran["outputs"] > 0 and not [p for p in watch.problems if p.startswith("asked")]
