"""The application: which path goes to which handler, and the document that describes them.

FastAPI's own pages load scripts from other hosts and are off; /openapi.json stays, behind the key like the rest.
This file does not know what the handlers do.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import Response

from tllm.api.bodies import json_response
from tllm.api.chat import chat_completions
from tllm.api.cluster import LinkBody, bench_link, drain_node, show_cluster, show_joining, undrain_node
from tllm.api.completions import completions
from tllm.api.edge import Edge
from tllm.api.errors import invalid_request, method_not_allowed, not_found, reply_for, unavailable
from tllm.api.models import list_models, show_model
from tllm.api.schema import Body, ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from tllm.api.state import ApiState
from tllm.api.tokens import detokenize, tokenize, tokenizer_info
from tllm.api.traces import trace_request, trace_window

Handler = Callable[[Request, ApiState], Awaitable[Response]]

_BODIES: tuple[type[Body], ...] = (ChatBody, CompletionBody, TokenizeBody, DetokenizeBody, LinkBody)
_SCHEMA_REF = "#/components/schemas/{model}"


def create_app(state: ApiState) -> FastAPI:
    """The HTTP API over `state`. Nothing runs and nothing is opened until a server serves it."""
    app = FastAPI(
        title="tllm", version=state.version, docs_url=None, redoc_url=None, redirect_slashes=False, debug=False
    )
    state.metrics.watch(state.deployments)
    app.add_middleware(Edge, state=state)
    app.add_exception_handler(HTTPException, _framework_error)

    _get(app, state, "/v1/models", list_models, "The models that are served.")
    _get(app, state, "/v1/models/{model:path}", show_model, "One model.")
    _post(app, state, "/v1/chat/completions", chat_completions, ChatBody, "Continue a conversation.")
    _post(app, state, "/v1/completions", completions, CompletionBody, "Continue texts.")
    _post(app, state, "/tokenize", tokenize, TokenizeBody, "Token ids of a text or a conversation.")
    _post(app, state, "/detokenize", detokenize, DetokenizeBody, "The text of token ids.")
    _get(app, state, "/tokenizer_info", tokenizer_info, "The tokenizer's special tokens and chat template.")
    _get(app, state, "/health", _health, "200 when requests can be answered, else 503 with the reason.")
    _get(app, state, "/ready", _health, "The same as /health.")
    _get(app, state, "/live", _live, "200 as long as the event loop turns.")
    _get(app, state, "/metrics", _metrics, "Prometheus metrics.")
    _get(app, state, "/version", _version, "The server's version.")
    _get(app, state, "/tllm/v1/cluster", show_cluster, "The cluster's nodes, its plan and what it predicts.")
    _get(app, state, "/tllm/v1/join", show_joining, "Where a node joins.")
    _post(app, state, "/tllm/v1/nodes/{node:path}/drain", drain_node, None, "Take a node out of every plan.")
    _post(app, state, "/tllm/v1/nodes/{node:path}/undrain", undrain_node, None, "Let plans use a node again.")
    _get(app, state, "/tllm/v1/trace", trace_window, "Where the time goes, for some seconds from now on.")
    _get(app, state, "/tllm/v1/traces/{request_id:path}", trace_request, "Where a traced request's time went.")
    _post(app, state, "/tllm/v1/links", bench_link, LinkBody, "Time matrices between two nodes.")
    app.openapi = functools.partial(_document, app)  # type: ignore[method-assign]
    return app


def _document(app: FastAPI) -> dict[str, Any]:
    """FastAPI's description of the routes, with the bodies that it does not see because we read them ourselves."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, routes=app.routes)
        _, bodies = models_json_schema([(kind, "validation") for kind in _BODIES], ref_template=_SCHEMA_REF)
        document.setdefault("components", {}).setdefault("schemas", {}).update(bodies["$defs"])
        app.openapi_schema = document
    return app.openapi_schema


def _get(app: FastAPI, state: ApiState, path: str, handler: Handler, summary: str) -> None:
    async def endpoint(request: Request) -> Response:
        return await handler(request, state)

    name = handler.__name__.strip("_")
    app.add_api_route(path, endpoint, methods=["GET"], name=name, operation_id=f"{name}{path}", summary=summary)
    app.add_api_route(path, endpoint, methods=["HEAD"], name=name, include_in_schema=False)


def _post(app: FastAPI, state: ApiState, path: str, handler: Handler, kind: type[Body] | None, summary: str) -> None:
    async def endpoint(request: Request) -> Response:
        return await handler(request, state)

    extra: dict[str, Any] = {}
    if kind is not None:
        schema = {"$ref": _SCHEMA_REF.format(model=kind.__name__)}
        extra["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    app.add_api_route(
        path, endpoint, methods=["POST"], name=handler.__name__, summary=summary, openapi_extra=extra or None
    )


async def _health(request: Request, state: ApiState) -> Response:
    status = state.status()
    if status == "ok":
        models = {name: deployment.state.value for name, deployment in state.deployments.items()}
        return json_response({"status": status, "models": models})
    return reply_for(unavailable(status, state.limits.retry_after_s)).response()


async def _live(request: Request, state: ApiState) -> Response:
    return json_response({"status": "ok"})


async def _version(request: Request, state: ApiState) -> Response:
    return json_response({"version": state.version})


async def _metrics(request: Request, state: ApiState) -> Response:
    page, content_type = state.metrics.exposition(request.headers.get("accept", ""))
    return Response(page, headers={"content-type": content_type})


async def _framework_error(request: Request, error: Exception) -> Response:
    """Unknown routes and wrong methods, in the shape of all other errors."""
    assert isinstance(error, HTTPException)
    path, method = request.scope["path"][:200], request.method[:20]
    match error.status_code:
        case 404:
            reply = not_found(
                f"There is nothing at {method} {path}. /openapi.json lists what there is.", code="not_found"
            )
        case 405:
            reply = method_not_allowed(method, path, Headers(error.headers).get("allow", ""))
        case _:
            reply = invalid_request(str(error.detail))
    return reply.response()
