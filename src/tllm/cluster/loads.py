"""What makes two load orders one engine's: both ends ask, the head to choose a worker, the worker to keep its weights.

This file does not know who orders or loads.
"""

from __future__ import annotations

from typing import Final

from tllm.transport import wire_pb2 as pb

ENGINE: Final = "torch"

_FIXED = ("fingerprint", "dtype", "device", "num_threads", "engine", "max_positions", "quantization")


def alike(one: pb.Load, other: pb.Load) -> bool:
    """Whether the engine of one load can become that of the other by changing its layers alone."""
    return all(getattr(one, field) == getattr(other, field) for field in _FIXED)
