"""How this process gives memory back to the machine.

A training step allocates and frees the same large tensors over and over. By default the C library returns each block
above 32 MiB at once and fetches it again, zeroed page by page, which can take a third of a CPU step. Here freed blocks
are kept for the next step; the process holds what its largest step needed, which it must have anyway.
"""

from __future__ import annotations

import ctypes
import platform

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # parameter numbers in <malloc.h>


def keep_freed_memory() -> bool:
    """Lets the C library keep freed memory; call it before the first large tensor.

    Returns:
        Whether the C library took the setting: only glibc knows it.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL("libc.so.6")
    largest = 2**31 - 1
    settings = ((_MMAP_THRESHOLD, 2**30), (_TRIM_THRESHOLD, largest), (_TOP_PAD, 64 << 20))
    return all([library.mallopt(parameter, value) == 1 for parameter, value in settings])
