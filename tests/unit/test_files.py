"""Files that are written whole or not at all."""

from pathlib import Path

import pytest

from quailora.errors import QuailoraError
from quailora.files import write_files


def test_a_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(QuailoraError, match=r"taken cannot be written: File exists"):
        write_files(tmp_path / "taken", {"a": "b"})
