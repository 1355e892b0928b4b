"""What a server says of itself: ``/v1/models``, ``/health``, ``/version`` and ``/metrics``."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from gpt2rt.env import version

from .docs import ANSWERS, OBJECT
from .errors import ApiError
from .json_io import dumps
from .service import Service

router = APIRouter()

_LOCKED: dict[int | str, dict[str, Any]] = {401: ANSWERS[401]}


def _answer(value: dict[str, Any]) -> Response:
    return Response(dumps(value), media_type="application/json")


def _card(service: Service, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "gpt2rt",
        "root": service.names[0],
        "parent": None,
        "max_model_len": service.engine.max_model_len,
        "permission": [],
    }


@router.get("/v1/models", responses=_LOCKED | OBJECT)
async def list_models(request: Request) -> Response:
    """The model, under each of its names."""
    service: Service = request.app.state.service
    return _answer({"object": "list", "data": [_card(service, name) for name in service.names]})


@router.get("/v1/models/{model:path}", responses=_LOCKED | {404: ANSWERS[404]} | OBJECT)
async def show_model(model: str, request: Request) -> Response:
    """One model."""
    service: Service = request.app.state.service
    return _answer(_card(service, service.check_model(model)))


@router.get(
    "/health",
    response_class=Response,
    responses={200: {"description": "Requests are taken."}, 503: ANSWERS[503]},
)
async def health(request: Request) -> Response:
    """200 as long as requests are taken and answered; needs no key."""
    service: Service = request.app.state.service
    if service.healthy:
        return Response()
    if service.engine.errored:
        raise ApiError(503, "the engine has stopped; the server restarts", kind="server_error", code="engine_dead")
    raise ApiError(503, "the server is shutting down", kind="server_error", code="shutting_down")


@router.get("/version", responses=_LOCKED | OBJECT)
async def show_version(request: Request) -> Response:
    """The version of gpt2rt."""
    return _answer({"version": version()})


@router.get(
    "/metrics",
    response_class=Response,
    responses=_LOCKED | {200: {"description": "Prometheus' text format.", "content": {"text/plain": {}}}},
)
async def metrics(request: Request) -> Response:
    """Counts and times for Prometheus."""
    service: Service = request.app.state.service
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")
