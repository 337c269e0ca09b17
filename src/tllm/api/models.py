"""`/v1/models`: what is served, in OpenAI's shape, and in Anthropic's for clients that say they speak it.

Answers at any time, also while a model loads. This file does not know who may see the list.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

from starlette.requests import Request
from starlette.responses import Response

from tllm.api.bodies import json_response
from tllm.api.state import ApiState
from tllm.cluster.deployment import Deployment

OWNER = "tllm"


async def list_models(request: Request, state: ApiState) -> Response:
    names = list(state.deployments)
    describe = _describe(request)
    data = [describe(name, state.deployments[name]) for name in names]
    if _speaks_anthropic(request):
        ends = {"first_id": names[0] if names else None, "last_id": names[-1] if names else None}
        return json_response({"data": data, "has_more": False, **ends})
    return json_response({"object": "list", "data": data})


async def show_model(request: Request, state: ApiState) -> Response:
    name = str(request.path_params["model"])
    return json_response(_describe(request)(name, state.find(name)))


def _speaks_anthropic(request: Request) -> bool:
    return "anthropic-version" in request.headers


def _describe(request: Request) -> Callable[[str, Deployment], dict[str, object]]:
    return _for_anthropic if _speaks_anthropic(request) else _for_openai


def _for_openai(name: str, deployment: Deployment) -> dict[str, object]:
    return {
        "id": name,
        "object": "model",
        "created": deployment.created,
        "owned_by": OWNER,
        "root": deployment.root,
        "parent": None,
        "max_model_len": deployment.max_model_len,
    }


def _for_anthropic(name: str, deployment: Deployment) -> dict[str, object]:
    created = datetime.fromtimestamp(deployment.created, UTC).isoformat().replace("+00:00", "Z")
    return {"type": "model", "id": name, "display_name": name, "created_at": created}
