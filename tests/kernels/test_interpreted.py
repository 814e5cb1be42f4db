"""Runs the tests of `interpreted`, which need a process of their own: Triton decides on its import whether it compiles
or interprets kernels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def run(*arguments: str) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-n", "0", *arguments, HERE / "interpreted"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, cwd=HERE, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_kernels_under_the_interpreter() -> None:
    run("-m", "not slow")


@pytest.mark.slow
def test_every_case_under_the_interpreter() -> None:
    run("-m", "slow or not slow")
