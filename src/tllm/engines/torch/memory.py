"""How much memory a device has left, and giving back what was freed. This file does not know what it is for."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import torch

_CGROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int:
    """Bytes that this process may still take on the device; on a CPU the least of machine and control group."""
    match device.type:
        case "cuda":
            return torch.cuda.mem_get_info(device)[0]
        case "mps":
            return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
        case _:
            return min(psutil.virtual_memory().available, cgroup_free_bytes(_CGROUP))


def give_back(device: torch.device) -> None:
    """Return to the machine what this process freed on the device and its allocator kept for itself.

    glibc maps only large allocations one by one, and raises what it calls large to 32 MB when such are freed: weights
    of smaller size lie in its heap, and holes in the heap stay with the process until it is told to trim.
    """
    match device.type:
        case "cuda":
            torch.cuda.empty_cache()
        case "mps":
            torch.mps.empty_cache()
        case _ if sys.platform == "linux":
            with suppress(AttributeError):  # only glibc has it
                ctypes.CDLL(None).malloc_trim(0)


def cgroup_free_bytes(group: Path) -> int:
    """Limit minus use, where files in the page cache that nobody needs do not count as use (cgroup v2)."""
    try:
        limit = (group / "memory.max").read_text().strip()
        current = int((group / "memory.current").read_text())
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except OSError:
        return 1 << 62  # no such group: no limit
    if limit == "max":
        return 1 << 62
    return max(0, int(limit) - current + int(statistics.get("inactive_file", 0)))
