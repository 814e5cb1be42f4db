"""Memory that holds no live tensor: what allocators and libraries take, and freed host memory, which glibc's malloc
keeps for reuse, so that it still counts as the process's."""

from __future__ import annotations

import ctypes
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # malloc.h
_OWN_PAGES = 256 * 2**10
_GLIBC_MAX = 32 * 2**20  # glibc's mmap threshold grows up to this as memory is freed; trim is twice that

# What shapes do not show: allocators round up and leave gaps, BLAS packs its operands, threads have stacks. A GPU's
# caching allocator allocates 2 MiB or more at a time, and cuBLAS takes a workspace of 32 MiB (on Hopper; 8 elsewhere).
# A CPU with AVX-512 took 40 MiB, one with AVX2 20 MiB.
_SLACK = 0.03
_LIBRARIES = {
    "cpu": (40 if torch.backends.cpu.get_cpu_capability().startswith("AVX512") else 30) * 2**20,
    "cuda": 64 * 2**20,
}


def overhead(live: int, device: torch.device) -> int:
    """Bytes that the allocator and libraries take on a device besides `live` bytes of tensors."""
    return int(_SLACK * live) + _LIBRARIES.get(device.type, 0)


@contextmanager
def freed_at_once() -> Iterator[None]:
    """Within it, allocations of 256 KiB or more get pages of their own, which are returned as soon as they are freed.

    Resident memory is then close to what is live; without it, gaps between tensors add half to the peak of a small
    model. It costs a page fault for every 4 KiB allocated: a quarter of the time for SmolLM2-135M, less for wider
    models. So it is only for a tight budget. Afterwards the thresholds are the largest that glibc itself would choose.
    """
    libc = _glibc()
    if libc is None:
        yield
        return
    libc.mallopt(_M_MMAP_THRESHOLD, _OWN_PAGES)
    libc.mallopt(_M_MMAP_MAX, 65536)  # glibc's default; MALLOC_MMAP_MAX_=0 in the environment would turn this off
    libc.malloc_trim(0)
    try:
        yield
    finally:
        libc.mallopt(_M_MMAP_THRESHOLD, _GLIBC_MAX)
        libc.mallopt(_M_TRIM_THRESHOLD, 2 * _GLIBC_MAX)


def return_freed_memory() -> None:
    """Return freed memory of all threads' heaps to the operating system."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


@cache
def _glibc() -> ctypes.CDLL | None:
    """The C library, if it is glibc and its malloc is the one in use: another may have been preloaded."""
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return None
    libc = ctypes.CDLL(None)
    used, own = (ctypes.cast(of.malloc, ctypes.c_void_p).value for of in (libc, ctypes.CDLL("libc.so.6")))
    return libc if used == own else None
