"""``/v1/chat/completions``, for models that have a chat template."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from gpt2rt.engine.outputs import CompletionOutput, RequestOutput

from . import logprobs
from .completions import check_counts
from .docs import ANSWERS, STREAMS
from .errors import bad_request
from .generation import GenerationResponse, Job, Usage, check_stream_options, sampling_params
from .json_io import JsonRoute
from .protocol.chat import ChatRequest, Message
from .service import Service
from .templates import render_chat, within

router = APIRouter(route_class=JsonRoute)

NO_TEMPLATE = (
    "the model {} is a base model without a chat template: it goes on with texts, it does not answer messages. Use "
    "/v1/completions, or start the server with --chat-template"
)


@router.post("/v1/chat/completions", responses=ANSWERS | STREAMS)
async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
    """Answer a chat, if the model has a template for chats."""
    service: Service = request.app.state.service
    model = service.check_model(body.model)
    service.check_task("generate")
    usage = check_stream_options(body)
    check_counts(service, 1, 1 if body.n is None else body.n)
    need_template(service)
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        raise bad_request("max_tokens and max_completion_tokens differ; send only one of them", "max_tokens")
    max_tokens = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
    top = body.top_logprobs
    if top is not None and not body.logprobs:
        raise bad_request("top_logprobs needs logprobs=true", "top_logprobs")
    params = sampling_params(service, body, max_tokens=max_tokens, logprobs=(top or 0) if body.logprobs else None)
    text = await chat_text(service, body.messages, body.add_generation_prompt, body.continue_final_message)
    # the template writes the special tokens
    ids = await service.prompt_ids([text], params, "messages", add_special_tokens=bool(body.add_special_tokens))
    job = Job(service.request_id("chatcmpl", body.request_id), ids, params, body.priority or 0, body.cache_salt)
    return GenerationResponse(service, job, ChatForm(service, body, model, job, usage), bool(body.stream))


def need_template(service: Service) -> None:
    """Raise ApiError where there is no template."""
    tokenizer = service.engine.tokenizer
    if tokenizer is None or (service.chat_template is None and getattr(tokenizer, "chat_template", None) is None):
        raise bad_request(NO_TEMPLATE.format(service.names[0]), "messages")


async def chat_text(service: Service, messages: Sequence[Message], begin: bool | None, go_on: bool | None) -> str:
    """The text of a chat, rendered beside the event loop.

    Args:
        messages: turns.
        begin: end with what begins the model's turn; None: unless ``go_on``.
        go_on: leave the last message open.

    Raises:
        RequestError, TokenizerError: the template refuses the chat, or takes too long.
    """
    work = functools.partial(
        render_chat,
        service.engine.tokenizer,
        service.chat_template,
        [message.plain() for message in messages],
        add_generation_prompt=not go_on if begin is None else begin,
        continue_final_message=bool(go_on),
    )
    return await within(service.settings.template_timeout, work, "writing out the chat by its template")


class ChatForm:
    """Outputs as OpenAI's chat completions."""

    def __init__(self, service: Service, body: ChatRequest, model: str, job: Job, usage: tuple[bool, bool]) -> None:
        self._service = service
        self._body = body
        self._params = job.params
        self._head: dict[str, Any] = {
            "id": job.request_id,
            "object": "chat.completion.chunk" if body.stream else "chat.completion",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": service.fingerprint,
        }
        self._usage = Usage(service.settings.enable_prompt_tokens_details)
        self._usage_last, self._usage_always = usage
        self._begun = False
        self._left = set(range(job.params.n))

    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """See :class:`gpt2rt.server.generation.Form`."""
        (output,) = outputs
        choices = []
        for completion in sorted(output.outputs, key=lambda one: one.index):
            self._usage.add(0, output, len(completion.token_ids))
            choices.append(
                {
                    "index": completion.index,
                    "message": {"role": "assistant", "content": completion.text},
                    **self._rest(completion),
                }
            )
        value = {**self._head, "choices": choices, "usage": self._usage.value()}
        return value | self._of_prompt(output)

    def events(self, place: int, output: RequestOutput) -> Iterator[dict[str, Any]]:
        """See :class:`gpt2rt.server.generation.Form`."""
        if not self._begun:
            self._begun = True
            self._usage.add(0, output, 0)
            delta = {"role": "assistant", "content": ""}
            ends = {"logprobs": None, "finish_reason": None, "stop_reason": None}
            choices = [{"index": index, "delta": delta, **ends} for index in range(self._params.n)]
            yield self._event(choices) | self._of_prompt(output)
        for completion in output.outputs:
            self._usage.add(0, output, len(completion.token_ids))
            if completion.finished():
                self._left.discard(completion.index)
            delta = {"content": completion.text} if completion.text or not completion.finished() else {}
            yield self._event([{"index": completion.index, "delta": delta, **self._rest(completion)}])

    def last_events(self) -> Iterator[dict[str, Any]]:
        """See :class:`gpt2rt.server.generation.Form`."""
        for index in sorted(self._left):
            end = {"index": index, "delta": {}, "logprobs": None, "finish_reason": "abort", "stop_reason": None}
            yield self._event([end])
        if self._usage_last:
            yield {**self._head, "choices": [], "usage": self._usage.value()}

    def _event(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        event = {**self._head, "choices": choices}
        if self._usage_last:
            event["usage"] = self._usage.value() if self._usage_always else None
        return event

    def _rest(self, completion: CompletionOutput) -> dict[str, Any]:
        """What a choice has beside its text."""
        body = self._body
        shown = None
        if body.logprobs:
            rows = completion.logprobs or []
            content = logprobs.chat_logprobs(
                self._service.tokens,
                completion.token_ids,
                rows,
                body.top_logprobs or 0,
                as_ids=bool(body.return_tokens_as_token_ids),
            )
            shown = {"content": content}
        rest = {"logprobs": shown, "finish_reason": completion.finish_reason, "stop_reason": completion.stop_reason}
        return rest | ({"token_ids": completion.token_ids} if body.return_token_ids else {})

    def _of_prompt(self, output: RequestOutput) -> dict[str, Any]:
        body = self._body
        value: dict[str, Any] = {}
        if body.prompt_logprobs is not None and output.prompt_logprobs is not None:
            value["prompt_logprobs"] = logprobs.prompt_logprobs(self._service.tokens, output.prompt_logprobs)
        if body.return_token_ids:
            value["prompt_token_ids"] = output.prompt_token_ids
        return value
