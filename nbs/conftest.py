"""Teach nbval the directives of nbdev: which cells not to run, and that a cleaned notebook was run once."""

import re

from nbval.plugin import IPyNbCell

SKIP = re.compile(r"^#\s*\|\s*(eval:\s*false|slow)\s*$|nbdev_export\(\)", re.MULTILINE)


def pytest_collection_modifyitems(items):
    for item in items:
        if not isinstance(item, IPyNbCell):
            continue
        if SKIP.search(item.cell.source):
            item.options["skip"] = True
        if item.cell.get("execution_count") is None:
            item.cell["execution_count"] = 1
