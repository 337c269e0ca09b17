"""`/tllm/v1`: the cluster behind this server, as no other API has it: who computes what, who shall not, how to join.

All of it needs the key, as everything but health does.
This file does not know how the cluster does any of it.
"""

from __future__ import annotations

from pydantic import TypeAdapter
from starlette.requests import Request
from starlette.responses import Response

from tllm.api.errors import NEVER_HEALS, ErrorReply, RefusedError, listed, not_found
from tllm.api.state import ApiState
from tllm.cluster.status import Cluster, ClusterStatus, Joining, NodeStatus
from tllm.core.errors import PlanError, RequestError

_STATUS = TypeAdapter(ClusterStatus)
_NODE = TypeAdapter(NodeStatus)
_JOINING = TypeAdapter(Joining)


async def show_cluster(request: Request, state: ApiState) -> Response:
    return _json(_STATUS.dump_json(_cluster(state).status()))


async def show_joining(request: Request, state: ApiState) -> Response:
    return _json(_JOINING.dump_json(_cluster(state).joining()))


async def drain_node(request: Request, state: ApiState) -> Response:
    cluster, node = _cluster(state), _node(request, state)
    try:
        await cluster.drain(node.id)
    except RequestError as error:  # it left since
        raise RefusedError(_no_such_node(str(error))) from error
    except PlanError as error:
        raise RefusedError(_conflict(str(error), code="node_needed")) from error
    return _shown(cluster, node)


async def undrain_node(request: Request, state: ApiState) -> Response:
    cluster, node = _cluster(state), _node(request, state)
    try:
        await cluster.undrain(node.id)
    except RequestError as error:
        raise RefusedError(_no_such_node(str(error))) from error
    return _shown(cluster, node)


def _cluster(state: ApiState) -> Cluster:
    if state.cluster is None:
        raise RefusedError(not_found("This server has no cluster behind it.", code="no_cluster"))
    return state.cluster


def _node(request: Request, state: ApiState) -> NodeStatus:
    """The node that the path means, by its id or by its name where only one has it."""
    meant = str(request.path_params["node"])
    nodes = _cluster(state).status().nodes
    by_id = [node for node in nodes if node.id == meant]
    found = by_id or [node for node in nodes if node.name == meant]
    match found:
        case [node]:
            return node
        case []:
            names = listed(tuple(node.name for node in nodes)) or "none"
            raise RefusedError(_no_such_node(f"There is no node {meant[:200]!r} here. Nodes: {names}."))
        case _:
            ids = listed(tuple(node.id for node in found))
            message = f"{len(found)} nodes are called {meant[:200]!r}. Use an id: {ids}."
            raise RefusedError(_conflict(message, code="ambiguous_node"))


def _no_such_node(message: str) -> ErrorReply:
    return not_found(message, param="node", code="node_not_found")


def _conflict(message: str, *, code: str) -> ErrorReply:
    """409: the request is right, but not with the cluster as it is."""
    return ErrorReply(
        status=409, message=message, type="invalid_request_error", param="node", code=code, headers=NEVER_HEALS
    )


def _shown(cluster: Cluster, before: NodeStatus) -> Response:
    """The node as it is now; as it was when it left in the meantime."""
    now = next((node for node in cluster.status().nodes if node.id == before.id), before)
    return _json(_NODE.dump_json(now))


def _json(content: bytes) -> Response:
    return Response(content, media_type="application/json")
