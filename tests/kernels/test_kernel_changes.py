"""All tests of a kernel are quick ones where its code has changed since they last passed."""

from pathlib import Path

import pytest

from tests.helpers import kernel_changes


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three files: `first` imports `shared`, `second` does not. All are verified."""
    (tmp_path / "shared.py").write_text("def f(x):\n    return x\n")
    (tmp_path / "first.py").write_text("from quailora.kernels.shared import f\n")
    (tmp_path / "second.py").write_text('"""A kernel."""\n\nLIMIT = 3  # registers\n')
    monkeypatch.setattr(kernel_changes, "KERNELS", tmp_path)
    monkeypatch.setattr(kernel_changes, "VERIFIED", tmp_path / "verified.json")
    monkeypatch.setattr(kernel_changes, "changed", kernel_changes.changed.__wrapped__)
    kernel_changes.record(tmp_path / "verified.json")
    return tmp_path


def test_nothing_has_changed(kernels: Path) -> None:
    assert kernel_changes.changed() == set()
    assert kernel_changes.slow_unless_changed("first") == [pytest.mark.slow]


def test_a_change_reaches_whatever_imports_the_file(kernels: Path) -> None:
    (kernels / "shared.py").write_text("def f(x):\n    return 2 * x\n")
    assert kernel_changes.changed() == {"shared", "first"}
    assert kernel_changes.slow_unless_changed("first") == []


def test_comments_and_docstrings_are_no_change(kernels: Path) -> None:
    (kernels / "second.py").write_text('"""Another docstring."""\n\nLIMIT = 3\n')
    assert kernel_changes.changed() == set()
    (kernels / "second.py").write_text('"""Another docstring."""\n\nLIMIT = 4\n')
    assert kernel_changes.changed() == {"second"}


def test_a_file_without_a_record_has_changed(kernels: Path) -> None:
    (kernels / "third.py").write_text("")
    assert kernel_changes.changed() == {"third"}
    (kernels / "verified.json").unlink()
    assert kernel_changes.changed() == {"shared", "first", "second", "third"}
