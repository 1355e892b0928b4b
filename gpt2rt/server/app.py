"""The ASGI application: endpoints, and the walls around them."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from gpt2rt.env import version

from . import chat, completions, errors, info, pooling, tokens
from .auth import Authentication
from .limits import Admission, BodyLimit
from .service import Service
from .settings import ServerSettings


def create_app(engine: Any, settings: ServerSettings | None = None) -> FastAPI:
    """An OpenAI-compatible API of an engine.

    Args:
        engine: an ``AsyncLLM``; the app neither starts nor ends it, and takes its ``observer``.
        settings: None: the defaults.

    Returns:
        the app; ``app.state.service`` is what its endpoints share.
    """
    settings = ServerSettings() if settings is None else settings
    service = Service(engine, settings)
    app = FastAPI(
        title="gpt2rt",
        version=version(),
        # the pages for browsers load their scripts from elsewhere
        docs_url=None,
        redoc_url=None,
        separate_input_output_schemas=False,
    )
    app.state.service = service
    errors.install(app)
    for module in (completions, chat, pooling, tokens, info):
        app.include_router(module.router)
    # the last one added is the first that a request meets
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes, seconds=settings.body_timeout)
    app.add_middleware(Authentication, keys=settings.api_key, prefix=settings.root_path)
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.allowed_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-request-id"],
        )
    app.add_middleware(Admission, service=service)
    return app
