"""`/tokenize`, `/detokenize`, `/tokenizer_info`: what evaluation harnesses ask before they measure anything.

This file does not know how tokens are made.
"""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import Response

from tllm.api.bodies import json_response, read
from tllm.api.prompts import checked_ids, tokenize_prompt
from tllm.api.refusals import refuse_unsupported, unsupported
from tllm.api.schema import DetokenizeBody, TokenizeBody
from tllm.api.state import ApiState


async def tokenize(request: Request, state: ApiState) -> Response:
    body = await read(TokenizeBody, request, state)
    deployment = state.find(body.model)
    refuse_unsupported(body)
    if (body.model_extra or {}).get("tools"):
        raise unsupported("tools", "Tools are not rendered by this server.")
    ids = await asyncio.to_thread(tokenize_prompt, body, deployment)
    made: dict[str, object] = {"tokens": ids, "count": len(ids), "max_model_len": deployment.max_model_len}
    if body.return_token_strs:
        made["token_strs"] = [deployment.tokenizer.token_text(token) for token in ids]
    return json_response(made)


async def detokenize(request: Request, state: ApiState) -> Response:
    body = await read(DetokenizeBody, request, state)
    deployment = state.find(body.model)
    ids = checked_ids(body.tokens, deployment.vocab_size, param="tokens")
    text = await asyncio.to_thread(deployment.tokenizer.decode, ids, skip_special_tokens=False)
    return json_response({"prompt": text})


async def tokenizer_info(request: Request, state: ApiState) -> Response:
    deployment = state.find(request.query_params.get("model"))
    return json_response(deployment.tokenizer.info())
