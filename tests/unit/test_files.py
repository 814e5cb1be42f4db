"""Files that are written whole or not at all."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quailora.errors import QuailoraError
from quailora.files import DTYPES, LazyTensor, new_folder, write_files, write_tensors


def test_a_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(QuailoraError, match=r"taken cannot be written: File exists"):
        write_files(tmp_path / "taken", {"a": "b"})


@pytest.mark.skipif(os.name != "posix", reason="takes a umask")
@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_a_new_folder_has_the_mode_that_mkdir_gives(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        with new_folder(tmp_path / "new") as folder:
            (folder / "file").write_text("text")
    finally:
        os.umask(before)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o777 & ~umask
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_tensors_of_every_dtype_are_written(tmp_path: Path) -> None:
    """A checkpoint may hold any: GPT-NeoX's has masks of bool."""
    tensors = {name: torch.arange(6).view(2, 3).to(dtype) for name, dtype in DTYPES.items()}
    write_tensors(tmp_path / "all", {name: LazyTensor.of(tensor) for name, tensor in tensors.items()})
    for name, found in load_file(tmp_path / "all").items():
        assert found.dtype == DTYPES[name] and torch.equal(found.view(torch.uint8), tensors[name].view(torch.uint8))
