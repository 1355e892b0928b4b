"""``/tokenize``, ``/detokenize`` and ``/tokenizer_info``, with vLLM's shapes."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from gpt2rt.engine.inputs import check_token_ids
from gpt2rt.engine.params import PoolingParams

from .chat import chat_text, need_template
from .docs import ANSWERS, OBJECT
from .errors import bad_request
from .json_io import JsonRoute, dumps
from .protocol.tokens import DetokenizeRequest, TokenizeRequest
from .service import Service

router = APIRouter(route_class=JsonRoute)

# so many are decoded on the event loop: a thread costs more
_FEW_TOKENS = 2048
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def _answer(value: dict[str, Any]) -> Response:
    return Response(dumps(value), media_type="application/json")


@router.post("/tokenize", responses=ANSWERS | OBJECT)
async def tokenize(body: TokenizeRequest, request: Request) -> Response:
    """The token ids of a text or of a chat."""
    service: Service = request.app.state.service
    service.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise bad_request("send either prompt or messages", "prompt")
    if body.messages is not None:
        need_template(service)
        text = await chat_text(service, body.messages, body.add_generation_prompt, body.continue_final_message)
        special = bool(body.add_special_tokens)
    else:
        assert body.prompt is not None
        text, special = body.prompt, body.add_special_tokens is not False
    # longer than the model's context is no fault here
    ids = await service.encode(text, "prompt", PoolingParams(truncate_prompt_tokens=-1), add_special_tokens=special)
    value: dict[str, Any] = {"count": len(ids), "max_model_len": service.engine.max_model_len, "tokens": ids}
    value["token_strs"] = service.engine.tokenizer.convert_ids_to_tokens(ids) if body.return_token_strs else None
    return _answer(value)


@router.post("/detokenize", responses=ANSWERS | OBJECT)
async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
    """The text of token ids."""
    service: Service = request.app.state.service
    service.check_model(body.model)
    tokenizer = service.need_tokenizer()
    ids = check_token_ids(body.tokens, service.engine.vocab_size) if body.tokens else []
    if len(ids) <= _FEW_TOKENS:
        return _answer({"prompt": tokenizer.decode(ids)})
    return _answer({"prompt": await asyncio.to_thread(tokenizer.decode, ids)})


@router.get("/tokenizer_info", responses={400: ANSWERS[400], 401: ANSWERS[401], **OBJECT})
async def tokenizer_info(request: Request) -> Response:
    """The tokenizer's kind, special tokens and chat template."""
    service: Service = request.app.state.service
    tokenizer = service.need_tokenizer()
    value: dict[str, Any] = {"tokenizer_class": type(tokenizer).__name__}
    value |= {name: getattr(tokenizer, name, None) for name in _SPECIAL}
    value["chat_template"] = service.chat_template or getattr(tokenizer, "chat_template", None)
    value["model_max_length"] = service.engine.max_model_len
    value["vocab_size"] = len(tokenizer)
    return _answer(value)
