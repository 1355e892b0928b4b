"""``/v1/embeddings``, ``/classify`` and ``/score``."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gpt2rt.engine.outputs import PoolingRequestOutput
from gpt2rt.engine.params import PoolingParams

from .completions import check_counts
from .docs import ANSWERS, OBJECT
from .errors import bad_request, shutting_down
from .generation import collect, merged
from .json_io import JsonRoute, dumps
from .protocol.common import as_prompts
from .protocol.pooling import ClassificationRequest, EmbeddingRequest, PoolingFields, ScoreRequest
from .service import Service

router = APIRouter(route_class=JsonRoute)


class PoolingResponse(Response):
    """The answer to prompts whose hidden states are asked for.

    Args:
        service: whose engine computes them.
        request_id: their name.
        prompts: token ids.
        params: what is made of them.
        fields: of the request.
        shape: makes the answer of the results.
    """

    def __init__(
        self,
        service: Service,
        request_id: str,
        prompts: list[list[int]],
        params: PoolingParams,
        fields: PoolingFields,
        shape: Callable[[list[PoolingRequestOutput]], dict[str, Any]],
    ) -> None:
        super().__init__()
        self.service = service
        self.prompts = prompts
        self.params = params
        self.fields = fields
        self.shape = shape
        single = len(prompts) == 1
        self.request_ids = [request_id] if single else [f"{request_id}-{place}" for place in range(len(prompts))]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Compute and send.

        Raises:
            ApiError, RuntimeError, ValueError: why there is no answer.
        """
        engine, fields = self.service.engine, self.fields
        streams = [
            engine.encode(
                {"prompt_token_ids": ids},
                self.params,
                name,
                priority=fields.priority or 0,
                cache_salt=fields.cache_salt,
            )
            for name, ids in zip(self.request_ids, self.prompts, strict=True)
        ]
        outputs = await collect(self.service, receive, self.request_ids, merged(streams))
        if outputs is None:
            return
        if any(output.outputs is None for output in outputs):
            # aborted
            raise shutting_down()
        await Response(dumps(self.shape(outputs)), media_type="application/json")(scope, receive, send)


def _usage(outputs: Sequence[PoolingRequestOutput]) -> dict[str, int]:
    tokens = sum(len(output.prompt_token_ids) for output in outputs)
    return {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0}


async def _encode(service: Service, prompts: Any, params: PoolingParams, body: PoolingFields) -> list[list[int]]:
    return await service.prompt_ids(prompts, params, "input", add_special_tokens=body.add_special_tokens is not False)


@router.post("/v1/embeddings", responses=ANSWERS | OBJECT)
async def create_embedding(body: EmbeddingRequest, request: Request) -> Response:
    """A vector for each text."""
    service: Service = request.app.state.service
    model = service.check_model(body.model)
    service.check_task("embed")
    prompts = as_prompts(body.input)
    check_counts(service, len(prompts), 1)
    params = PoolingParams(
        task="embed",
        pooling=body.pooling or "last",
        normalize=body.normalize is not False,
        truncate_prompt_tokens=body.truncate_prompt_tokens,
    )
    size = service.engine.model.config.n_embd
    if body.dimensions not in (None, size):
        raise bad_request(f"dimensions is {body.dimensions}, but the model's vectors have {size} numbers", "dimensions")
    as_text = body.encoding_format == "base64"

    def shape(outputs: list[PoolingRequestOutput]) -> dict[str, Any]:
        data = []
        for place, output in enumerate(outputs):
            assert output.outputs is not None
            numbers = output.outputs.data
            # little-endian float32, as OpenAI's clients read it
            vector: Any = base64.b64encode(numbers.numpy().astype("<f4").tobytes()).decode() if as_text else None
            data.append({"object": "embedding", "index": place, "embedding": vector or numbers.tolist()})
        return {"object": "list", "data": data, "model": model, "usage": _usage(outputs)}

    ids = await _encode(service, prompts, params, body)
    return PoolingResponse(service, service.request_id("embd", body.request_id), ids, params, body, shape)


@router.post("/classify", responses=ANSWERS | OBJECT)
async def classify(body: ClassificationRequest, request: Request) -> Response:
    """The class of each text."""
    service: Service = request.app.state.service
    model = service.check_model(body.model)
    service.check_task("classify")
    prompts = as_prompts(body.input)
    check_counts(service, len(prompts), 1)
    params = PoolingParams(
        task="classify",
        use_activation=body.use_activation is not False,
        truncate_prompt_tokens=body.truncate_prompt_tokens,
    )
    labels = service.engine.model.config.id2label
    name = service.request_id("classify", body.request_id)

    def shape(outputs: list[PoolingRequestOutput]) -> dict[str, Any]:
        data = []
        for place, output in enumerate(outputs):
            assert output.outputs is not None
            probs = output.outputs.data.tolist()
            best = max(range(len(probs)), key=probs.__getitem__)
            label = labels.get(best, f"LABEL_{best}")
            data.append({"index": place, "label": label, "probs": probs, "num_classes": len(probs)})
        head = {"id": name, "object": "list", "created": int(time.time()), "model": model}
        return {**head, "data": data, "usage": _usage(outputs)}

    ids = await _encode(service, prompts, params, body)
    return PoolingResponse(service, name, ids, params, body, shape)


@router.post("/score", responses=ANSWERS | OBJECT)
@router.post("/v1/score", responses=ANSWERS | OBJECT, include_in_schema=False)
async def score(body: ScoreRequest, request: Request) -> Response:
    """How well pairs of texts fit: what a classifier with one class says of them, else the cosine of their vectors."""
    service: Service = request.app.state.service
    model = service.check_model(body.model)
    service.check_task("score")
    first = [body.text_1] if isinstance(body.text_1, str) else body.text_1
    second = [body.text_2] if isinstance(body.text_2, str) else body.text_2
    if len(first) not in (1, len(second)):
        raise bad_request(
            f"text_1 has {len(first)} texts and text_2 {len(second)}; send one text_1, or as many as there are text_2",
            "text_1",
        )
    check_counts(service, len(first) + len(second), 1)
    truncate = body.truncate_prompt_tokens
    name = service.request_id("score", body.request_id)
    pairs = "embed" not in service.engine.tasks
    params = PoolingParams(task="classify" if pairs else "embed", truncate_prompt_tokens=truncate)
    ids_1 = await _encode(service, first, params, body)
    ids_2 = await _encode(service, second, params, body)
    prompts = [*ids_1, *ids_2]
    if pairs:
        prompts = [[*ids_1[place if len(first) > 1 else 0], *ids] for place, ids in enumerate(ids_2)]

    def shape(outputs: list[PoolingRequestOutput]) -> dict[str, Any]:
        rows = [output.outputs.data for output in outputs if output.outputs is not None]
        if pairs:
            scores = [float(row) for row in rows]
        else:
            left, right = rows[: len(first)], rows[len(first) :]
            scores = [float(left[place if len(first) > 1 else 0] @ row) for place, row in enumerate(right)]
        data = [{"index": place, "object": "score", "score": value} for place, value in enumerate(scores)]
        head = {"id": name, "object": "list", "created": int(time.time()), "model": model}
        return {**head, "data": data, "usage": _usage(outputs)}

    return PoolingResponse(service, name, prompts, params, body, shape)
