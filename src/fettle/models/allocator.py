"""glibc's allocator told to keep its pages, so that a training step on a CPU does not fault them in again."""

from __future__ import annotations

import ctypes
import sys

# Names of malloc.h. MMAP_MAX = 0 takes every block from the heap; glibc caps MMAP_THRESHOLD at 32 MiB on 64 bits.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_pages() -> bool:
    """Stop glibc from returning freed memory to the system; False where there is no glibc.

    Activations are freed and taken again every step. Each return costs the kernel a page fault and a
    page of zeros per 4 KiB the next time.
    """
    libc = _glibc()
    if libc is None:
        return False
    mallopt = libc.mallopt
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1) and mallopt(_M_TOP_PAD, 64 << 20))


def release() -> bool:
    """Give the whole free pages back once, as after a model's weights have shrunk; False where nothing was given."""
    libc = _glibc()
    if libc is None:
        return False
    libc.malloc_trim.argtypes, libc.malloc_trim.restype = (ctypes.c_size_t,), ctypes.c_int
    return bool(libc.malloc_trim(0))


def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.gnu_get_libc_version  # noqa: B018 - its absence says that this is another libc
    except (OSError, AttributeError):
        return None
    return libc
