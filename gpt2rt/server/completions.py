"""``/v1/completions``: OpenAI's text completions with vLLM's further fields."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from gpt2rt.engine.outputs import CompletionOutput, RequestOutput

from . import logprobs
from .docs import ANSWERS, STREAMS
from .errors import bad_request
from .generation import GenerationResponse, Job, Usage, check_stream_options, sampling_params
from .json_io import JsonRoute
from .protocol.common import as_prompts
from .protocol.completions import CompletionRequest
from .service import Service

router = APIRouter(route_class=JsonRoute)

# OpenAI's default
_MAX_TOKENS = 16


@router.post("/v1/completions", responses=ANSWERS | STREAMS)
async def create_completion(body: CompletionRequest, request: Request) -> Response:
    """Go on with one or several texts."""
    service: Service = request.app.state.service
    model = service.check_model(body.model)
    service.check_task("generate")
    usage = check_stream_options(body)
    prompts = as_prompts(body.prompt)
    n = 1 if body.n is None else body.n
    check_counts(service, len(prompts), n)
    if body.best_of is not None and body.best_of != n:
        raise bad_request(f"best_of is {body.best_of} and n is {n}; only best_of = n is supported", "best_of")
    max_tokens = _MAX_TOKENS if body.max_tokens is None else body.max_tokens
    if max_tokens == 0 and not body.echo:
        raise bad_request("max_tokens is 0, expected at least 1; 0 is only for echo=true", "max_tokens")
    params = sampling_params(
        service,
        body,
        # the engine makes at least one token; it is not shown
        max_tokens=max_tokens or 1,
        logprobs=body.logprobs,
        detokenize=service.engine.tokenizer is not None,
        **({"prompt_logprobs": body.logprobs} if body.echo and body.logprobs is not None else {}),
    )
    if body.prompt_logprobs is not None and params.prompt_logprobs != body.prompt_logprobs:
        raise bad_request(
            f"prompt_logprobs is {body.prompt_logprobs}, but echo with logprobs={body.logprobs} decides it",
            "prompt_logprobs",
        )
    ids = await service.prompt_ids(prompts, params, "prompt", add_special_tokens=body.add_special_tokens is not False)
    name = service.request_id("cmpl", body.request_id)
    job = Job(name, ids, params, body.priority or 0, body.cache_salt, echo=bool(body.echo))
    form = CompletionForm(service, body, model, job, max_tokens, usage)
    return GenerationResponse(service, job, form, bool(body.stream))


def check_counts(service: Service, num_prompts: int, n: int) -> None:
    """Raise ApiError for more prompts or continuations than a request may have."""
    settings = service.settings
    if num_prompts > settings.max_prompts:
        raise bad_request(f"the request has {num_prompts} prompts, expected at most {settings.max_prompts}", "prompt")
    if num_prompts * n > settings.max_choices:
        raise bad_request(
            f"the request has {num_prompts} prompts times n={n}, expected at most {settings.max_choices} continuations",
            "n",
        )


class _Choice:
    """What is known of a continuation while it is streamed."""

    __slots__ = ("begun", "finished", "offsets")

    def __init__(self) -> None:
        self.begun = False
        self.finished = False
        self.offsets: logprobs.Offsets | None = None


class CompletionForm:
    """Outputs as OpenAI's text completions."""

    def __init__(
        self,
        service: Service,
        body: CompletionRequest,
        model: str,
        job: Job,
        max_tokens: int,
        usage: tuple[bool, bool],
    ) -> None:
        self._service = service
        self._body = body
        self._params = job.params
        self._max_tokens = max_tokens
        self._head: dict[str, Any] = {
            "id": job.request_id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": service.fingerprint,
        }
        self._prompts = as_prompts(body.prompt)
        self._as_ids = bool(body.return_tokens_as_token_ids)
        self._usage = Usage(service.settings.enable_prompt_tokens_details)
        self._usage_last, self._usage_always = usage
        self._choices = [_Choice() for _ in range(len(self._prompts) * self._params.n)]
        # place -> log-probabilities of the prompt, which come once
        self._prompt_rows: dict[int, Any] = {}

    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """See :class:`gpt2rt.server.generation.Form`."""
        choices = []
        for place, output in enumerate(outputs):
            for completion in sorted(output.outputs, key=lambda one: one.index):
                choices.append(self._choice(place, output, completion))
        return {**self._head, "choices": choices, "usage": self._usage.value()}

    def events(self, place: int, output: RequestOutput) -> Iterator[dict[str, Any]]:
        """See :class:`gpt2rt.server.generation.Form`."""
        for completion in output.outputs:
            event = {**self._head, "choices": [self._choice(place, output, completion)]}
            if self._usage_last:
                event["usage"] = self._usage.value() if self._usage_always else None
            yield event

    def last_events(self) -> Iterator[dict[str, Any]]:
        """See :class:`gpt2rt.server.generation.Form`."""
        for index, choice in enumerate(self._choices):
            if not choice.finished:
                end = {"index": index, "text": "", "logprobs": None, "finish_reason": "abort", "stop_reason": None}
                yield {**self._head, "choices": [end]}
        if self._usage_last:
            yield {**self._head, "choices": [], "usage": self._usage.value()}

    def _choice(self, place: int, output: RequestOutput, completion: CompletionOutput) -> dict[str, Any]:
        index = place * self._params.n + completion.index
        choice = self._choices[index]
        first = not choice.begun
        choice.begun = True
        # max_tokens=0: the one token that the engine made is not shown
        shown = self._max_tokens > 0
        text = completion.text if shown else ""
        tokens = completion.token_ids if shown else []
        rows = (completion.logprobs or []) if shown else []
        self._usage.add(place, output, len(tokens))
        reason = completion.finish_reason
        if reason is not None and not shown:
            reason = "length"
        choice.finished |= reason is not None
        if output.prompt_logprobs is not None:
            self._prompt_rows[place] = output.prompt_logprobs
        prompt_ids = output.prompt_token_ids
        echo = first and bool(self._body.echo)
        if echo:
            text = self._prompt_text(place, prompt_ids) + text
        value: dict[str, Any] = {
            "index": index,
            "text": text,
            "logprobs": None,
            "finish_reason": reason,
            "stop_reason": completion.stop_reason if shown else None,
        }
        if self._body.logprobs is not None:
            value["logprobs"] = self._logprobs(choice, place, prompt_ids, tokens, rows, echo)
        if first and self._body.prompt_logprobs is not None:
            value["prompt_logprobs"] = logprobs.prompt_logprobs(self._service.tokens, self._prompt_rows[place])
        if self._body.return_token_ids:
            value["token_ids"] = tokens
            value["prompt_token_ids"] = prompt_ids if first else None
        return value

    def _prompt_text(self, place: int, prompt_ids: Sequence[int]) -> str:
        prompt = self._prompts[place]
        if isinstance(prompt, str) and self._body.truncate_prompt_tokens is None:
            return prompt
        tokenizer = self._service.engine.tokenizer
        return "" if tokenizer is None else tokenizer.decode(list(prompt_ids))

    def _logprobs(
        self,
        choice: _Choice,
        place: int,
        prompt_ids: Sequence[int],
        tokens: Sequence[int],
        rows: Sequence[Any],
        echo: bool,
    ) -> dict[str, list[Any]]:
        tokenizer = self._service.engine.tokenizer
        most = self._body.logprobs or 0
        texts = self._service.tokens
        skip = self._params.skip_special_tokens
        parts = []
        if echo:
            # the prompt is shown with its special tokens
            offsets = logprobs.Offsets(tokenizer, skip_special_tokens=False)
            parts.append(
                logprobs.completion_logprobs(
                    texts, prompt_ids, self._prompt_rows[place], offsets, most, as_ids=self._as_ids
                )
            )
            choice.offsets = logprobs.Offsets(tokenizer, prompt_ids, offsets.at, skip)
        elif choice.offsets is None:
            choice.offsets = logprobs.Offsets(tokenizer, prompt_ids, 0, skip)
        parts.append(logprobs.completion_logprobs(texts, tokens, rows, choice.offsets, most, as_ids=self._as_ids))
        return {name: [item for part in parts for item in part[name]] for name in parts[0]}
