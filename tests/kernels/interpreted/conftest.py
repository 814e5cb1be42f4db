"""These tests are for `../test_interpreted.py` to run: without TRITON_INTERPRET=1 they are not even collected.

Of each test, the first case is quick; the others are where the kernel has changed.
"""

import os
from pathlib import Path

import pytest

from tests.helpers.kernel_changes import changed, slow_unless_changed

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    first: set[tuple[str, str]] = set()
    for item in (item for item in items if item.path.parent == Path(__file__).parent):
        file, name = item.path.stem.removeprefix("test_"), item.name.partition("[")[0]
        if (file, name) in first:
            # test_solve.py is about all kernels.
            for mark in slow_unless_changed(file) if file != "solve" or not changed() else []:
                item.add_marker(mark)
        first.add((file, name))
