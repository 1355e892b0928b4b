"""``LLM``: many requests at once, from a program that waits for them."""

from __future__ import annotations

import itertools
import threading
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from gpt2rt.errors import EngineDeadError, RequestError
from gpt2rt.graph.streams import StreamOrder

from .base import DEFAULT_MODEL, ModelHolder
from .config import EngineConfig
from .core import EngineCore
from .fitting import new_core
from .inputs import Prompt, is_single, prompt_parts
from .outputs import (
    ClassificationRequestOutput,
    EmbeddingRequestOutput,
    PoolingRequestOutput,
    RequestOutput,
    ScoringOutput,
    ScoringRequestOutput,
)
from .params import PoolingParams, RequestOutputKind, SamplingParams
from .progress import ProgressBar
from .request import Output, Request
from .stats import EngineStats


class LLM(ModelHolder):
    """A model that answers many requests at once, batched continuously over one paged KV cache.

    Names are those of vLLM's ``LLM``. A request's tokens depend on nothing but itself: not on the others, nor on what
    the prefix cache holds. Calls of several threads wait for each other.

    Args:
        model: a folder, hub id, embedded id, or a model of gpt2rt.
        tokenizer: the same, or a tokenizer; None: the checkpoint's own.
        task: "generate", "embed", "classify" or "token_classify": which class of model is loaded; None: the
            checkpoint's own.
        config: settings; or give its fields as keywords. ``max_num_queued_reqs`` is without bound unless given.
        **options: fields of :class:`EngineConfig`, and keywords of ``from_pretrained`` (dtype, quantization, revision,
            device, ...).

    Raises:
        OSError, ValueError, TypeError: as ``from_pretrained`` and :class:`EngineConfig`.
    """

    def __init__(
        self,
        model: Any = DEFAULT_MODEL,
        *,
        tokenizer: Any = None,
        task: str | None = None,
        config: EngineConfig | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, tokenizer, task, config, options, {"max_num_queued_reqs": None})
        self._core: EngineCore | None = new_core(self._served)
        self._numbers = itertools.count()
        # of the threads that make steps, each may have a stream of its own
        self._streams = StreamOrder(self._served.device)
        self._lock = threading.RLock()

    # ---- what it is ------------------------------------------------------------------------------------------------

    def get_tokenizer(self) -> Any:
        """The same, as vLLM names it."""
        return self._served.tokenizer

    @property
    def core(self) -> EngineCore:
        """The engine's loop.

        Raises:
            EngineDeadError: the engine was shut down.
        """
        if self._core is None:
            raise EngineDeadError("this LLM was shut down; make a new one")
        return self._core

    def stats(self) -> EngineStats:
        """What it does now, and the sums of all it did."""
        return self.core.stats()

    # ---- text ------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
        priority: int | Sequence[int] | None = None,
        cache_salt: str | None = None,
    ) -> list[RequestOutput]:
        """Continue prompts.

        Every prompt is checked before the first is begun. A request that fails on its way has ``finish_reason``
        "error" and its ``error`` set, with a warning; the others are not touched by it.

        Args:
            prompts: a text, its token ids, ``{"prompt": ...}`` or ``{"prompt_token_ids": ...}``; or a list of them.
            sampling_params: for all, or one for each; None: :class:`SamplingParams`'s defaults.
            use_tqdm: show how far it is, on a terminal.
            priority: for all or one for each; the smaller goes first.
            cache_salt: prefixes are shared only with prompts of the same salt.

        Returns:
            An output for each prompt, in their order.

        Raises:
            RequestError: a prompt or a parameter is wrong; nothing was begun.
        """
        listed = self._listed(prompts)
        params = _each(sampling_params if sampling_params is not None else SamplingParams(), len(listed), "parameters")
        levels = _each(0 if priority is None else priority, len(listed), "priorities")
        wanted = []
        for one in params:
            if not isinstance(one, SamplingParams):
                raise RequestError(f"sampling_params are SamplingParams, got {type(one).__name__}")
            one = one.clone()
            one.output_kind = RequestOutputKind.FINAL_ONLY
            wanted.append(one)
        outputs = self._run_all(listed, wanted, levels, cache_salt, use_tqdm)
        for output in outputs:
            if output.error is not None:
                warnings.warn(f"request {output.request_id} failed: {output.error}", stacklevel=3)
        return outputs

    def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> Iterator[RequestOutput]:
        """Continue one prompt and give each piece as it comes.

        Args:
            prompt, sampling_params, priority, cache_salt: as for :meth:`generate`. ``output_kind`` says whether the
                outputs hold everything so far (the default) or what is new.

        Yields:
            Outputs; the last one is ``finished``. Closing the iterator ends the request.

        Raises:
            RequestError: the prompt or a parameter is wrong; or, with the first output, it does not fit into the cache.
            QueueFullError: with the first output: too many requests wait.
            NumericsError, RequestFailedError: the request failed on its way.
        """
        params = SamplingParams() if sampling_params is None else sampling_params
        outputs: deque[Output] = deque()
        with self._lock:
            request = self._request(prompt, params, outputs.append, priority, cache_salt)
        return self._pump(request, outputs)

    def _pump(self, request: Request, outputs: deque[Output]) -> Iterator[RequestOutput]:
        try:
            # not before the first output is asked for: an iterator that is not begun is not ended either
            with self._lock, torch.inference_mode():
                self.core.add(request)
            while True:
                while not outputs:
                    with self._lock, torch.inference_mode():
                        # another thread's step may have brought them while this one waited
                        if not outputs:
                            self._step()
                output = outputs.popleft()
                assert isinstance(output, RequestOutput)
                if output.error is not None:
                    raise output.error
                yield output
                if output.finished:
                    return
        finally:
            with self._lock:
                if self._core is not None and not request.finished:
                    self._core.abort(request.request_id)

    def chat(
        self,
        messages: Sequence[dict[str, Any]] | Sequence[Sequence[dict[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """Continue conversations, rendered by the tokenizer's chat template.

        Args:
            messages: ``{"role": ..., "content": ...}`` each; or a list of such lists.
            sampling_params, use_tqdm: as for :meth:`generate`.
            chat_template: instead of the tokenizer's own.
            add_generation_prompt: end with what begins an answer.

        Raises:
            RequestError: there is no template, or as :meth:`generate`.
        """
        if not messages:
            raise RequestError("messages is empty; give at least one")
        tokenizer = self.tokenizer
        if tokenizer is None or (chat_template is None and getattr(tokenizer, "chat_template", None) is None):
            raise RequestError(
                "this model's tokenizer has no chat template: it is a base model, which continues text; use generate, "
                "or pass chat_template"
            )
        talks = [messages] if isinstance(messages[0], dict) else messages
        texts = [
            tokenizer.apply_chat_template(
                list(talk), chat_template=chat_template, tokenize=False, add_generation_prompt=add_generation_prompt
            )
            for talk in talks
        ]
        return self.generate(texts, sampling_params, use_tqdm=use_tqdm)

    # ---- numbers ---------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def encode(
        self,
        prompts: Prompt | Sequence[Prompt],
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        *,
        use_tqdm: bool = False,
        cache_salt: str | None = None,
    ) -> list[PoolingRequestOutput]:
        """What a task makes of the hidden states of prompts.

        Args:
            prompts, use_tqdm, cache_salt: as for :meth:`generate`.
            pooling_params: for all, or one for each; None: embeddings, or the model's own task.

        Raises:
            RequestError: a prompt is wrong, or the model has no such task; nothing was begun.
            NumericsError, RequestFailedError: a request failed on its way; the others were finished.
        """
        listed = self._listed(prompts)
        params = _each(pooling_params if pooling_params is not None else self._default_pooling(), len(listed), "params")
        for one in params:
            if not isinstance(one, PoolingParams):
                raise RequestError(f"pooling_params are PoolingParams, got {type(one).__name__}")
        outputs = self._run_all(listed, list(params), [0] * len(listed), cache_salt, use_tqdm)
        for output in outputs:
            if output.error is not None:
                raise output.error
        return outputs

    def _default_pooling(self) -> PoolingParams:
        order = ("embed", "classify", "token_classify")
        return PoolingParams(task=next(task for task in order if task in self.tasks))

    def embed(self, prompts: Prompt | Sequence[Prompt], **options: Any) -> list[EmbeddingRequestOutput]:
        """A vector for each prompt: the last token's hidden state after the final norm, of length 1.

        Args:
            prompts: as for :meth:`generate`.
            **options: of :class:`PoolingParams`: ``pooling``, ``normalize``, ``truncate_prompt_tokens``.
        """
        outputs = self.encode(prompts, PoolingParams(task="embed", **options))
        return [EmbeddingRequestOutput.from_base(output) for output in outputs]

    def classify(self, prompts: Prompt | Sequence[Prompt], **options: Any) -> list[ClassificationRequestOutput]:
        """The probabilities of each prompt's classes.

        Args:
            prompts: as for :meth:`generate`.
            **options: of :class:`PoolingParams`: ``use_activation``, ``truncate_prompt_tokens``.
        """
        outputs = self.encode(prompts, PoolingParams(task="classify", **options))
        return [ClassificationRequestOutput.from_base(output) for output in outputs]

    def score(
        self, text_1: Prompt | Sequence[Prompt], text_2: Prompt | Sequence[Prompt], **options: Any
    ) -> list[ScoringRequestOutput]:
        """How well texts fit: the cosine of their embeddings, or what a classifier with one class says of the pair.

        Args:
            text_1: one, or as many as ``text_2``.
            text_2: one or several.
            **options: of :class:`PoolingParams`.

        Raises:
            RequestError: the numbers of texts do not fit, or as :meth:`encode`.
        """
        if "score" not in self.tasks:
            raise RequestError(f"{type(self.model).__name__} has no scores; its tasks are {sorted(self.tasks)}")
        first, second = self._listed(text_1), self._listed(text_2)
        if len(first) == 1:
            first = first * len(second)
        if len(first) != len(second):
            raise RequestError(f"text_1 has {len(first)} texts and text_2 {len(second)}; give one or equally many")
        if "classify" in self.tasks and "embed" not in self.tasks:
            pairs = [[*self._ids(a), *self._ids(b)] for a, b in zip(first, second, strict=True)]
            results = self.encode(pairs, PoolingParams(task="classify", **options))
            return [
                ScoringRequestOutput(
                    output.request_id,
                    output.prompt_token_ids,
                    True,
                    output.num_cached_tokens,
                    outputs=ScoringOutput.from_base(_made(output)),
                )
                for output in results
            ]
        results = self.encode([*first, *second], PoolingParams(task="embed", **{**options, "normalize": True}))
        scores = []
        for one, other in zip(results[: len(first)], results[len(first) :], strict=True):
            cosine = float(_made(one).data @ _made(other).data)
            ids = [*one.prompt_token_ids, *other.prompt_token_ids]
            cached = one.num_cached_tokens + other.num_cached_tokens
            scores.append(ScoringRequestOutput(one.request_id, ids, True, cached, outputs=ScoringOutput(cosine)))
        return scores

    def choose(self, stem: Prompt, choices: Sequence[Prompt]) -> list[float]:
        """What the multiple choice head says of each choice after a common stem, which is computed once.

        Args:
            stem: text or ids.
            choices: their continuations; with a double heads model each ends with its classification token, if it was
                trained with one.

        Returns:
            A logit for each choice.

        Raises:
            RequestError: the model has no such head, or as :meth:`encode`.
        """
        if "classify" not in self.tasks or not hasattr(self.model, "multiple_choice_head"):
            raise RequestError(f"{type(self.model).__name__} has no multiple choice head; load a DoubleHeadsModel")
        begin = self._ids(stem)
        params = PoolingParams(task="classify", use_activation=False)
        rows = [[*begin, *self._ids(choice)] for choice in choices]
        if not rows:
            return []
        # the first brings the stem into the prefix cache
        outputs = self.encode(rows[:1], params) + (self.encode(rows[1:], params) if rows[1:] else [])
        return [float(_made(output).data[0]) for output in outputs]

    # ---- the end ---------------------------------------------------------------------------------------------------

    def reset_prefix_cache(self) -> None:
        """Forget the blocks of earlier prompts."""
        self.core.reset_prefix_cache()

    def shutdown(self) -> None:
        """End all requests and give the KV cache back; may be called again."""
        with self._lock:
            core, self._core = self._core, None
            if core is not None:
                core.abort_all()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: Any) -> None:
        self.shutdown()

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _listed(self, prompts: Any) -> list[Any]:
        if is_single(prompts):
            return [prompts]
        if isinstance(prompts, Iterable):
            return list(prompts)
        raise RequestError(f"prompts are texts or lists of token ids, got {type(prompts).__name__}")

    def _ids(self, prompt: Any) -> list[int]:
        text, ids = prompt_parts(prompt)
        return self._frontend.encode(text) if ids is None and text is not None else list(ids)

    def _request(self, prompt: Any, params: Any, sink: Any, priority: int, salt: str | None) -> Request:
        text, ids = prompt_parts(prompt)
        if ids is None:
            assert text is not None
            ids = self._frontend.encode(text, params)
        name = f"llm-{next(self._numbers)}"
        return self._frontend.make(ids, params, sink, request_id=name, prompt=text, priority=priority, salt=salt)

    def _run_all(
        self, prompts: list[Any], params: list[Any], levels: Sequence[int], salt: str | None, use_tqdm: bool
    ) -> list[Any]:
        """The final outputs of requests, in order."""
        done: dict[str, Output] = {}
        with self._lock:
            core = self.core
            requests = []
            for prompt, one, level in zip(prompts, params, levels, strict=True):
                sink = _final_into(done)
                requests.append(self._request(prompt, one, sink, level, salt))
            try:
                for request in requests:
                    core.add(request)
                with ProgressBar(len(requests), use_tqdm) as advance:
                    shown = 0
                    while len(done) < len(requests):
                        self._step()
                        if len(done) > shown:
                            advance(len(done) - shown)
                            shown = len(done)
            except Exception:
                for request in requests:
                    core.abort(request.request_id)
                raise
            except BaseException as error:
                # such as Ctrl-C, at any place
                core.reset(error)
                raise
        return [done[request.request_id] for request in requests]

    def _step(self) -> None:
        """One step; where it does not come to its end, all requests do, and the engine begins anew.

        Raises:
            EngineDeadError: nothing is left to compute, although somebody waits for it.
        """
        core = self.core
        if not core.has_unfinished:
            raise EngineDeadError("a request has ended without an output; please report this")
        try:
            # blocks are copied before the executor is called
            self._streams.join()
            core.step()
        except BaseException as error:
            core.reset(error)
            raise


def _final_into(done: dict[str, Output]) -> Any:
    def sink(output: Output) -> None:
        if output.finished:
            done[output.request_id] = output

    return sink


def _made(output: PoolingRequestOutput) -> Any:
    assert output.outputs is not None
    return output.outputs


def _each(value: Any, count: int, what: str) -> Sequence[Any]:
    """One for each prompt."""
    if not isinstance(value, Sequence):
        return [value] * count
    if len(value) != count:
        raise RequestError(f"{len(value)} {what} for {count} prompts; give one for all or one for each")
    return value
