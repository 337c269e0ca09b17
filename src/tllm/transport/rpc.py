"""Streams between processes over gRPC: the data plane of `stage`, the control plane of `control`.

This file does not know how either works; it is where the rest of tllm finds them.
"""

from __future__ import annotations

from tllm.transport.channels import Liveness
from tllm.transport.control import ControlPeer, ControlServer, ControlStream, attach
from tllm.transport.mailbox import Inbox
from tllm.transport.stage import RpcLink, StageServer, connect
from tllm.transport.wire import PROTOCOL

__all__ = [
    "PROTOCOL",
    "ControlPeer",
    "ControlServer",
    "ControlStream",
    "Inbox",
    "Liveness",
    "RpcLink",
    "StageServer",
    "attach",
    "connect",
]
