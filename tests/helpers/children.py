"""Processes to be killed, or to work together: forked from one that has imported everything, to start at once.

That one has computed nothing, and so has no threads that a fork would lose.
"""

import multiprocessing
import os
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any
from unittest import mock

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["quailora.pipeline.build", "quailora.kernels", "datasets", "peft", "transformers"])


class Child:
    """`function(*arguments)` in a process of its own, with one thread."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        # Else the working folder is on its path, where our folder `kernels/` would answer `import kernels`.
        with mock.patch.dict(os.environ, {"PYTHONSAFEPATH": "1"}):
            forkserver.ensure_running()
        self._results, theirs = _context.Pipe(duplex=False)
        self.process: BaseProcess = _context.Process(target=_run, args=(theirs, function, arguments))
        self.process.start()
        theirs.close()

    def result(self, timeout: float = 120) -> Any:
        """What it returned; what it raised is raised, and EOFError where it died without a word."""
        if not self._results.poll(timeout):
            self.process.kill()
            raise TimeoutError(f"no result within {timeout} s")
        value = self._results.recv()
        self.process.join()
        if isinstance(value, _Raised):
            raise value.error from RuntimeError(value.trace)
        return value

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        self.process.kill()
        self.process.join()


class _Raised:
    def __init__(self, error: BaseException) -> None:
        self.error, self.trace = error, "".join(traceback.format_exception(error))


def _run(results: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    import torch

    torch.set_num_threads(1)
    try:
        value = function(*arguments)
    except BaseException as error:
        value = _Raised(error)
    results.send(value)
    results.close()
