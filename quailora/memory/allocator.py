"""Freed host memory: malloc of glibc keeps it for later, and all the while it counts as the process's."""

from __future__ import annotations

import ctypes
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # malloc.h
_OWN_PAGES = 256 * 2**10
_GLIBC_MOST = 32 * 2**20  # where glibc's threshold, which grows by itself with what is freed, ends; half the other's
_IS_MMAPPED = 2  # malloc.c: a bit of the size that stands before every chunk


@contextmanager
def freed_at_once() -> Iterator[None]:
    """Within it every allocation of 256 KiB or more has pages of its own, which go when it is freed: resident memory is
    then within some hundredths of what is live. Without it gaps between tensors add half to the peak of a small model.

    It costs a page fault for every 4 KiB that is allocated anew: a quarter of the time for SmolLM2-135M, less for wider
    models. Afterwards the thresholds are fixed where glibc's own growth would end.
    """
    libc = _glibc()
    if libc is None:
        yield
        return
    libc.mallopt(_M_MMAP_THRESHOLD, _OWN_PAGES)
    libc.mallopt(_M_MMAP_MAX, 65536)  # glibc's own; with MALLOC_MMAP_MAX_=0 nothing would ever have pages of its own
    gaps = list(_gaps(libc))
    try:
        yield
    finally:
        for gap in gaps:
            libc.free(gap)
        libc.mallopt(_M_MMAP_THRESHOLD, _GLIBC_MOST)
        libc.mallopt(_M_TRIM_THRESHOLD, 2 * _GLIBC_MOST)


def _gaps(libc: ctypes.CDLL) -> Iterator[int]:
    """Take what the heap has free in pieces of that size, which malloc would use first. Nothing is written to them, so
    that after `malloc_trim` they are address space and no memory."""
    libc.malloc_trim(0)
    while (chunk := libc.malloc(_OWN_PAGES)) is not None:
        if ctypes.c_size_t.from_address(chunk - ctypes.sizeof(ctypes.c_size_t)).value & _IS_MMAPPED:
            libc.free(chunk)
            return
        yield chunk


def return_freed_memory() -> None:
    """Give the operating system what was freed, of the heaps of all threads."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


@cache
def _glibc() -> ctypes.CDLL | None:
    """The C library, where it is that of GNU, and its malloc the process's: another may have been preloaded."""
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return None
    libc = ctypes.CDLL(None)
    first, own = (ctypes.cast(of.malloc, ctypes.c_void_p).value for of in (libc, ctypes.CDLL("libc.so.6")))
    if first != own:
        return None
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
    return libc
