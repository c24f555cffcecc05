"""How the process keeps its memory while it trains on a CPU, and gives it free at the end of a stage.

A training step allocates and frees the same gigabytes each time. By default glibc gives them back to the kernel, which
then spends part of the step on mapping and clearing pages again. This keeps them, and asks for large pages;
benchmarks/sft_step.py measures what it is worth.
"""

import ctypes
import gc
import os
import sys

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8
"""Parameter numbers of glibc's mallopt(3)."""


def keep() -> None:
    """Keep freed memory for the next step. Call before torch allocates; does nothing without glibc."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by torch's CPU allocator
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    for parameter, value in ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 2**28)):
        mallopt(parameter, value)


def free() -> None:
    """Free what a finished trainer held, for the next stage: its parts name one another, so that only the collector
    ends them, and torch keeps a GPU's memory that no tensor has."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
