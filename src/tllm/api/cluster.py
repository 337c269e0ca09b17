"""`/tllm/v1`: the cluster behind this server, as no other API has it: who computes what, who shall not, how to join.

All of it needs the key, as everything but health does.
This file does not know how the cluster does any of it.
"""

from __future__ import annotations

import base64

from pydantic import TypeAdapter
from starlette.requests import Request
from starlette.responses import Response

from tllm.api.bodies import read
from tllm.api.errors import NEVER_HEALS, ErrorReply, RefusedError, listed, not_found
from tllm.api.schema import Body, Int
from tllm.api.sse import while_connected
from tllm.api.state import ApiState
from tllm.cluster.status import Cluster, ClusterStatus, Joining, LinkOrder, NodeStatus
from tllm.core.errors import ConfigError, PlanError, RequestError
from tllm.core.types import DType
from tllm.transport.codecs import CodecName, parse_codec_name
from tllm.transport.link_sweep import LinkSample, Sweep, SweepSettings

_STATUS = TypeAdapter(ClusterStatus)
_NODE = TypeAdapter(NodeStatus)
_JOINING = TypeAdapter(Joining)
_SWEEP = TypeAdapter(Sweep)


class LinkBody(Body):
    """A link to be measured; as `tllm bench link NODE NODE` sends it."""

    source: str
    target: str
    rows: tuple[Int, ...]
    columns: Int
    dtype: str = DType.BFLOAT16
    codecs: tuple[str, ...] = tuple(CodecName)
    repeats: Int = 7
    seed: Int = 0
    seconds: float = 30.0
    sample: str = ""  # base64: rows of hidden states in that dtype
    sample_width: Int = 0
    sample_name: str = "sample"


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


async def bench_link(request: Request, state: ApiState) -> Response:
    cluster, order = _cluster(state), _link_order(await read(LinkBody, request, state))
    try:
        found = await while_connected(request.receive, cluster.bench_link(order))
    except RequestError as error:
        if error.code == "not_found":
            raise RefusedError(_no_such_node(str(error))) from error
        raise
    return _json(_SWEEP.dump_json(found))


def _link_order(body: LinkBody) -> LinkOrder:
    """Raises RequestError."""
    try:
        sample = base64.b64decode(body.sample, validate=True)
        settings = SweepSettings(
            rows=body.rows,
            columns=body.columns,
            dtype=DType(body.dtype),
            codecs=tuple(map(parse_codec_name, body.codecs)),
            repeats=body.repeats,
            seed=body.seed,
            budget_s=body.seconds,
        )
        width = body.sample_width
        return LinkOrder(
            source=body.source,
            target=body.target,
            settings=settings,
            sample=LinkSample(name=body.sample_name, data=sample, width=width) if sample else None,
        )
    except (ValueError, ConfigError) as error:  # neither base64 nor a dtype are our errors
        raise RequestError(str(error)) from error


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
