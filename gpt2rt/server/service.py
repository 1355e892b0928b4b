"""What all endpoints share: the engine, the settings, who is being served, and the prompts of requests."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2rt.env import version
from gpt2rt.errors import EngineDeadError, RequestError

from .errors import ApiError, bad_request
from .logprobs import TokenTexts
from .metrics import Metrics
from .settings import ServerSettings

if TYPE_CHECKING:
    from .guard import Guard

# how long aborted requests get to hand out what they have
_ABORT_GRACE_SECONDS = 1.0


class Service:
    """One engine behind one app.

    Attributes:
        engine: an ``AsyncLLM``.
        settings: of the server.
        names: of the model, as clients may call it.
        metrics: what ``/metrics`` shows.
        tokens: the texts of single tokens.
        chat_template: Jinja text, or None: the tokenizer's, if it has one.
        created: when the server began, in seconds of the clock on the wall.
        fingerprint: what answers name as the system.
        guards: one for each request in work.
        draining: no further requests are taken.
        aborting: no further work is begun.
    """

    def __init__(self, engine: Any, settings: ServerSettings) -> None:
        self.engine = engine
        self.settings = settings
        self.names = settings.served_model_name or (public_name(engine.model_name),)
        self.metrics = Metrics(engine, self.names[0])
        self.tokens = TokenTexts(engine.tokenizer)
        self.chat_template = settings.chat_template
        self.created = int(time.time())
        self.fingerprint = f"gpt2rt-{version()}-{engine.executor_name}"
        self.guards: set[Guard] = set()
        self.draining = False
        self.aborting = False
        config = engine.config
        queued = config.max_num_queued_reqs
        self.max_in_flight = settings.max_in_flight or config.max_num_seqs + (256 if queued is None else queued)
        self.in_flight = 0

    @property
    def healthy(self) -> bool:
        """Whether requests are taken and answered."""
        return not self.draining and not self.engine.errored

    def check_model(self, name: str | None) -> str:
        """The name that an answer bears.

        Raises:
            ApiError: 404, another model is asked for.
        """
        if name is None or name in self.names:
            return name or self.names[0]
        shown = name if len(name) <= 100 else name[:100] + "..."
        raise ApiError(
            404,
            f"the model {shown!r} does not exist; this server has {', '.join(self.names)}",
            param="model",
            code="model_not_found",
        )

    def check_task(self, *tasks: str) -> None:
        """The model can do one of these.

        Raises:
            ApiError: 400, it cannot.
        """
        if not any(task in self.engine.tasks for task in tasks):
            raise bad_request(
                f"the model {self.names[0]} cannot do this: it is made for {', '.join(sorted(self.engine.tasks))}, "
                f"and {' or '.join(tasks)} was asked for"
            )

    def need_tokenizer(self) -> Any:
        """The tokenizer.

        Raises:
            ApiError: 400, there is none.
        """
        if self.engine.tokenizer is None:
            raise bad_request("this server has no tokenizer, so prompts must be lists of token ids")
        return self.engine.tokenizer

    async def prompt_ids(
        self, prompts: Sequence[str | list[int]], params: Any, field: str, *, add_special_tokens: bool = True
    ) -> list[list[int]]:
        """The token ids of prompts; a long text is encoded beside the event loop.

        Args:
            prompts: texts, or their ids, which the engine checks.
            params: of the request; with ``truncate_prompt_tokens`` a text may have any length.
            field: of the request, for messages.
            add_special_tokens: those that the tokenizer adds.

        Raises:
            RequestError: one is no valid text, has no tokens, or is much too long for the model.
        """
        most = self.engine.max_model_len
        found: list[list[int]] = []
        for prompt in prompts:
            if isinstance(prompt, str):
                ids = await self.encode(prompt, field, params, add_special_tokens=add_special_tokens)
                if not ids:
                    # a text from nothing begins with the bos token, as in generate()
                    bos = getattr(self.engine.tokenizer, "bos_token_id", None)
                    if bos is None:
                        raise RequestError(f"{field} has no tokens, and the model has no bos token to begin with")
                    ids = [bos]
                found.append(ids)
                # a hundred short texts together are long
                await asyncio.sleep(0)
            elif params.truncate_prompt_tokens is not None:
                # the rest will be cut off, so it need not be looked at
                found.append(prompt[-most:])
            elif len(prompt) > most:
                raise RequestError(
                    f"{field} has {len(prompt)} tokens, but the model takes at most {most}; shorten it or set "
                    "truncate_prompt_tokens"
                )
            else:
                found.append(prompt)
        return found

    async def encode(self, text: str, field: str, cut: Any, *, add_special_tokens: bool) -> list[int]:
        """The token ids of a text.

        Args:
            text: any.
            field: of the request, for messages.
            cut: parameters; with ``truncate_prompt_tokens`` the text may be longer than the context.
            add_special_tokens: those that the tokenizer adds.

        Raises:
            RequestError: it is no valid text, or too long.
        """
        self.need_tokenizer()
        size, most = len(text.encode("utf-8")), self.settings.max_text_bytes
        if size > most:
            raise RequestError(f"{field} has {size} bytes, and at most {most} are tokenised (max_text_bytes)")
        return await self.engine.tokenize(
            text,
            add_special_tokens=add_special_tokens,
            split_special_tokens=self.settings.split_special_tokens or None,
            cut=cut,
        )

    def request_id(self, kind: str, given: str | None) -> str:
        """A name for a request, the caller's own if there is one."""
        return f"{kind}-{given or secrets.token_hex(16)}"

    async def abort_all(self) -> None:
        """End every request in work: those that can hand out what they have with finish_reason "abort"."""
        self.aborting = True
        # a dead engine ends them by itself
        with contextlib.suppress(EngineDeadError):
            await self.engine.abort([name for guard in self.guards for name in guard.request_ids])
        deadline = time.monotonic() + _ABORT_GRACE_SECONDS
        while self.guards and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        for guard in list(self.guards):
            guard.end("shutdown")


def public_name(name: str) -> str:
    """A model's name without the folders that it lies in."""
    return Path(name).resolve().name if Path(name).is_dir() else name
