"""What this machine's torch can compute on, for people.

This file does not know models or engines.
"""

from __future__ import annotations

import torch


def describe_devices() -> tuple[str, ...]:
    """One line a device, each after one small operation on it in bfloat16; raises what torch raises if that fails."""
    lines = [f"cpu with {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"]
    _try(torch.device("cpu"))
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        _try(torch.device("cuda", index))
        lines.append(f"cuda:{index} {properties.name}, {properties.total_memory / 1e9:.0f} GB")
    if torch.backends.mps.is_available():
        _try(torch.device("mps"))
        lines.append("mps")
    return tuple(lines)


def _try(device: torch.device) -> None:
    ones = torch.ones(8, 8, dtype=torch.bfloat16, device=device)
    assert float((ones @ ones)[0, 0]) == 8.0, f"{device} cannot multiply"
