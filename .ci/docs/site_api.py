"""The API on a module's page, read from the exported package: signatures as they are written, docstrings, refusals.

nbdev puts a cell `show_doc(name)` after each export; its own next step runs every cell that imports, which takes
minutes with torch and fails where such a cell leans on one that is not run. Notebooks and package agree (the sync
gate), so all that the page shows can be read from the package. nbdev's links from names in backticks reach into its
own libraries as well; here they lead to this package alone. Named in settings.ini under `skip_procs` and `procs`.
"""

import ast
import re
import runpy
from collections import Counter
from functools import cache
from pathlib import Path
from textwrap import dedent

from nbdev.config import get_config
from nbdev.process import Processor

NAME = re.compile(r"(?<!\[)`([\w.]+)(\(\))?`(?!\])")
SHOW_DOC = re.compile(r"^show_doc\(([\w.]+)", re.MULTILINE)
DEFS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def children(node: ast.AST) -> dict[str, ast.AST]:
    "Map the names of the functions and classes that stand directly in a module or class to their nodes."
    return {child.name: child for child in node.body if isinstance(child, DEFS)}


def head(node: ast.AST, lines: list[str]) -> str:
    "Return the source of a definition up to its body; of a class also its fields and the head of its `__init__`."
    start = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
    first = node.body[0]
    if first.lineno == node.lineno:  # all on one line
        text = lines[start][: first.col_offset]
    else:
        text = "\n".join(lines[start : first.lineno - 1])
    if isinstance(node, ast.ClassDef):
        fields = [child for child in node.body if isinstance(child, ast.AnnAssign)]
        text += "".join("\n" + "\n".join(lines[f.lineno - 1 : f.end_lineno]) for f in fields)
        if "__init__" in children(node):
            text += "\n" + head(children(node)["__init__"], lines)
    return text.rstrip()


def phrase(value: ast.AST, names: dict[str, ast.AST]) -> str | None:
    "Return the text of a string or f-string, with `…` for what is filled in; of a name, the text that it was given."
    if isinstance(value, ast.Constant) and isinstance(value.value, str):
        return value.value
    if isinstance(value, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in value.values)
    return phrase(names[value.id], {}) if isinstance(value, ast.Name) and value.id in names else None


def raised(node: ast.AST) -> list[tuple[str, str | None]]:
    "List the errors that stand in a function's own source, each with the rule that it names."
    names = {
        t.id: a.value for a in ast.walk(node) if isinstance(a, ast.Assign) for t in a.targets if isinstance(t, ast.Name)
    }
    calls = [each.exc for each in ast.walk(node) if isinstance(each, ast.Raise) and isinstance(each.exc, ast.Call)]
    named = [c for c in calls if isinstance(c.func, ast.Name) and c.func.id.endswith("Error")]
    return [(c.func.id, phrase(c.args[0], names) if c.args else None) for c in named]


def refusals(node: ast.AST, module: dict[str, ast.AST]) -> list[str]:
    "List as Markdown the errors of a function, or of making a class, and of what it calls in its own module."
    if isinstance(node, ast.ClassDef):
        own = children(node)
        starts = [own[name] for name in ("__init__", "__post_init__") if name in own]
    else:
        starts = [node]
    seen, found = [], []
    while starts:
        seen.append(each := starts.pop(0))
        found += raised(each)
        called = [c.func.id for c in ast.walk(each) if isinstance(c, ast.Call) and isinstance(c.func, ast.Name)]
        functions = [module[n] for n in called if isinstance(module.get(n), ast.FunctionDef)]
        starts += [f for f in functions if f not in seen and f not in starts]
    ruled = {error for error, rule in found if rule}
    lines = [f"- `{error}`: {rule}" if rule else f"- `{error}`" for error, rule in found if rule or error not in ruled]
    return [*dict.fromkeys(lines)]


def prose(node: ast.AST) -> str:
    "Return the docstring; a line that begins a sentence after the end of another stays a line of its own."
    text = ast.get_docstring(node) or ""
    return re.sub(r"(?<=[.:])\n(?=[A-Z`])", "  \n", text)


def members(node: ast.AST) -> list[ast.AST]:
    "List the documented public methods that a class defines itself, in the order of the source."
    own = children(node).values() if isinstance(node, ast.ClassDef) else []
    return [m for m in own if ast.get_docstring(m) and (m.name == "__call__" or not m.name.startswith("_"))]


def render(node: ast.AST, name: str, lines: list[str], source: str, module: dict, level: int = 3) -> str:
    "Render one definition as Markdown, and the methods of a class below it."
    parts = ["---", f'[source]({source}#L{node.lineno}){{.api-source target="_blank"}}', f"{'#' * level} {name}"]
    parts += [f"```python\n{dedent(head(node, lines))}\n```", prose(node)]
    errors = refusals(node, module)
    parts += ["Raises:", "\n".join(errors)] if errors else []
    parts += [render(m, f"{name}.{m.name}", lines, source, module, level + 1) for m in members(node)]
    return "\n\n".join(p for p in parts if p)


@cache
def symbols() -> dict[str, str]:
    "Map each name of the package to its place on the site; of two with one name, that of the module of this name."
    cfg = get_config()
    index = runpy.run_path(str(cfg.lib_path / "_modidx.py"))["d"]["syms"]
    rows = [(module, name, page) for module, names in index.items() for name, (page, _) in names.items()]
    short = Counter(name.removeprefix(f"{module}.") for module, name, _ in rows)
    found = {}
    for module, name, page in rows:
        own = name.removeprefix(f"{module}.")
        within = name.partition(".")[2]
        is_plain = short[own] == 1 or module.endswith(f".{own}")
        keys = [name, within, own] if is_plain else [name, within]
        found |= dict.fromkeys(keys, f"{cfg.doc_host}{cfg.doc_baseurl}/{page}")
    return found


@cache
def pages() -> dict[str, str]:
    "Map the modules and their notebooks to their pages, for the map of the index."
    cfg = get_config()
    index = runpy.run_path(str(cfg.lib_path / "_modidx.py"))["d"]["syms"]
    names = {module.partition(".")[2] for module in index}
    base = f"{cfg.doc_host}{cfg.doc_baseurl}"
    books = {path.stem: path.stem.partition("_")[2] for path in cfg.nbs_path.glob("*_*.ipynb")}
    return {key: f"{base}/{name}.html" for key, name in [*zip(names, names, strict=True), *books.items()]}


def link(text: str, places: dict[str, str]) -> str:
    "Link the names in backticks of a Markdown text, but for headings and code."
    lines, fenced = text.split("\n"), False
    for i, line in enumerate(lines):
        fenced ^= line.lstrip().startswith("```")
        if not fenced and not line.startswith(("#", "    ")):
            lines[i] = NAME.sub(lambda m: f"[{m[0]}]({places[m[1]]})" if m[1] in places else m[0], line)
    return "\n".join(lines)


class api(Processor):
    "Fill the `show_doc` cells of a notebook, and link the names in its prose."

    def __init__(self, nb):
        self.nb, self.places, cfg = nb, symbols(), get_config()
        modules = [cell.directives_["default_exp"][0] for cell in nb.cells if "default_exp" in cell.directives_]
        if modules:
            path = Path(cfg.lib_path, *modules[0].split(".")).with_suffix(".py")
            self.lines = path.read_text(encoding="utf-8").splitlines()
            self.tree = ast.parse("\n".join(self.lines))
            self.source = f"{cfg.git_url}/blob/{cfg.branch}/{path.relative_to(cfg.config_path).as_posix()}"

    def cell(self, cell):
        if cell.cell_type == "markdown":
            is_map = Path(self.nb.path_).name == get_config().readme_nb
            cell.source = link(cell.source, self.places | pages() if is_map else self.places)
        match = SHOW_DOC.search(cell.source or "") if cell.cell_type == "code" else None
        if match:
            node, module = self.tree, children(self.tree)
            for part in match[1].split("."):
                node = children(node)[part]
            text = link(render(node, match[1], self.lines, self.source, module), self.places)
            cell.outputs = [{"output_type": "display_data", "metadata": {}, "data": {"text/markdown": text}}]
