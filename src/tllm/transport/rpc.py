"""Everything between processes that goes over gRPC: who is who in `trust`, `tokens` and `enrolment`, what listens in
`server`, the data plane in `stage`, the control plane in `control`, weights in `shards`.

This file does not know how any of them works; it is where the rest of tllm finds them.
"""

from __future__ import annotations

from tllm.transport.channels import WINDOW_BYTES, Liveness
from tllm.transport.control import ControlPeer, ControlServer, ControlStream, attach
from tllm.transport.enrolment import Enrolment, enrol
from tllm.transport.mailbox import Inbox
from tllm.transport.peers import Peer, peer_of
from tllm.transport.server import Server, Service
from tllm.transport.shards import NotHeldError, ShardClient, ShardProvider, ShardService
from tllm.transport.stage import RpcLink, StageServer, connect
from tllm.transport.tokens import JoinToken, Token, TokenStore
from tllm.transport.trust import Authority, Identity, token_id_of
from tllm.transport.wire import PROTOCOL

__all__ = [
    "WINDOW_BYTES",
    "PROTOCOL",
    "Authority",
    "ControlPeer",
    "ControlServer",
    "ControlStream",
    "Enrolment",
    "Identity",
    "Inbox",
    "JoinToken",
    "Liveness",
    "NotHeldError",
    "Peer",
    "RpcLink",
    "Server",
    "Service",
    "ShardClient",
    "ShardProvider",
    "ShardService",
    "StageServer",
    "Token",
    "TokenStore",
    "attach",
    "connect",
    "enrol",
    "peer_of",
    "token_id_of",
]
