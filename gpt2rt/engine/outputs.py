"""What a request gets back, with vLLM's names."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from gpt2rt.errors import RequestError


@dataclasses.dataclass(slots=True)
class Logprob:
    """How likely a token was, by the model's own logits: before penalties, temperature and every other rule.

    Attributes:
        logprob: natural logarithm of its probability.
        rank: 1 + the number of tokens with larger logits.
        decoded_token: its text alone; a part of a character is "\\ufffd". None without a tokenizer.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclasses.dataclass(slots=True)
class CompletionOutput:
    """One continuation: all of it so far, or, with ``RequestOutputKind.DELTA``, what is new.

    Attributes:
        index: which of the ``n`` continuations.
        text: "" without detokenization.
        token_ids: the new tokens, the one that ended the continuation included.
        cumulative_logprob: the sum of the log-probabilities of all tokens so far; None unless those were asked for.
        logprobs: for each token: of it and of the likeliest tokens; None unless asked for.
        finish_reason: "stop": an end token, a stop token or a stop string; "length": max_tokens or the end of the
            context; "abort"; "error"; None while it goes on.
        stop_reason: the stop token or stop string; None for an end token, and whenever it was something else.
    """

    index: int
    text: str = ""
    token_ids: list[int] = dataclasses.field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def finished(self) -> bool:
        """Whether nothing more comes."""
        return self.finish_reason is not None

    def _add(self, later: CompletionOutput) -> None:
        """Go on with what came after it."""
        self.text += later.text
        # new lists: the old ones may be in another reader's hands
        self.token_ids = [*self.token_ids, *later.token_ids]
        if later.logprobs is not None:
            self.logprobs = [*(self.logprobs or ()), *later.logprobs]
        if later.cumulative_logprob is not None:
            self.cumulative_logprob = later.cumulative_logprob
        self.finish_reason, self.stop_reason = later.finish_reason, later.stop_reason


@dataclasses.dataclass(slots=True)
class RequestMetrics:
    """When things happened to a request, in seconds of ``time.monotonic``; None: not yet.

    Attributes:
        arrival_time: the engine got it.
        first_scheduled_time: the first step with a token of it began.
        first_token_time, last_token_time: its first and its last new token so far were chosen.
        finished_time: nothing more comes.
        num_preemptions: how many times it lost its blocks and was computed again.
        num_cached_tokens: tokens of the prompt that the prefix cache held.
    """

    arrival_time: float = 0.0
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    last_token_time: float | None = None
    finished_time: float | None = None
    num_preemptions: int = 0
    num_cached_tokens: int = 0


@dataclasses.dataclass
class RequestOutput:
    """What a request has so far, or what is new since its last output.

    Attributes:
        request_id: its name.
        prompt: the text, if it was given as one.
        prompt_token_ids: the tokens of the prompt.
        prompt_logprobs: for each token of the prompt: of it and of the likeliest in its place; the first has none,
            nothing stands before it. None unless asked for.
        outputs: continuations, each named by its ``index``; those of which nothing is new may be missing.
        finished: nothing more comes.
        metrics: its times.
        num_cached_tokens: tokens of the prompt that the prefix cache held.
        error: what ended it, if its ``finish_reason`` is "error".
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics | None = None
    num_cached_tokens: int = 0
    error: Exception | None = None

    def add(self, later: RequestOutput, *, aggregate: bool) -> None:
        """Take in a later output of the same request, so that a slow reader gets one for both.

        Args:
            later: the output; its continuations may become this one's.
            aggregate: it holds what is new (``RequestOutputKind.DELTA``): append. Otherwise it holds everything so far,
                and takes the place of what was here.
        """
        places = {completion.index: place for place, completion in enumerate(self.outputs)}
        for completion in later.outputs:
            place = places.get(completion.index)
            if place is None:
                self.outputs.append(completion)
            elif aggregate:
                self.outputs[place]._add(completion)
            else:
                self.outputs[place] = completion
        self.finished |= later.finished
        if later.prompt_logprobs is not None:
            self.prompt_logprobs = later.prompt_logprobs
        self.metrics = later.metrics if later.metrics is not None else self.metrics
        self.num_cached_tokens = max(self.num_cached_tokens, later.num_cached_tokens)
        self.error = later.error if later.error is not None else self.error


@dataclasses.dataclass(eq=False)
class PoolingOutput:
    """What a pooling task made.

    Attributes:
        data: [n_embd] for "embed", [num_labels] for "classify", with one row for each token for "token_embed" and
            "token_classify"; float32 on the CPU.
    """

    data: Tensor


@dataclasses.dataclass
class PoolingRequestOutput:
    """The result of a pooling request.

    Attributes:
        request_id: its name.
        outputs: what was made.
        prompt_token_ids: the tokens of the prompt.
        finished: always, unless ``error`` says why not.
        num_cached_tokens: tokens of the prompt that the prefix cache held.
        error: what ended it.
        metrics: its times.
    """

    request_id: str
    outputs: PoolingOutput | None
    prompt_token_ids: list[int]
    finished: bool
    num_cached_tokens: int = 0
    error: Exception | None = None
    metrics: RequestMetrics | None = None


@dataclasses.dataclass
class EmbeddingOutput:
    """A vector.

    Attributes:
        embedding: n_embd numbers.
    """

    embedding: list[float]

    @classmethod
    def from_base(cls, output: PoolingOutput) -> EmbeddingOutput:
        """From one row of numbers.

        Raises:
            RequestError: there is more or less than one row.
        """
        return cls(_row(output, "an embedding"))

    @property
    def hidden_size(self) -> int:
        """How many numbers."""
        return len(self.embedding)


@dataclasses.dataclass
class ClassificationOutput:
    """Classes.

    Attributes:
        probs: a number for each class: probabilities, or logits if those were asked for.
    """

    probs: list[float]

    @classmethod
    def from_base(cls, output: PoolingOutput) -> ClassificationOutput:
        """From one row of numbers.

        Raises:
            RequestError: there is more or less than one row.
        """
        return cls(_row(output, "a classification"))

    @property
    def num_classes(self) -> int:
        """How many classes."""
        return len(self.probs)


@dataclasses.dataclass
class ScoringOutput:
    """How well two texts fit.

    Attributes:
        score: the cosine of their embeddings, or what a classifier with one class says.
    """

    score: float

    @classmethod
    def from_base(cls, output: PoolingOutput) -> ScoringOutput:
        """From one number.

        Raises:
            RequestError: there is more or less than one.
        """
        if output.data.numel() != 1:
            raise RequestError(f"a score is one number, got shape {list(output.data.shape)}")
        return cls(float(output.data))


@dataclasses.dataclass
class _TypedRequestOutput:
    request_id: str
    prompt_token_ids: list[int]
    finished: bool
    num_cached_tokens: int = 0


@dataclasses.dataclass
class EmbeddingRequestOutput(_TypedRequestOutput):
    """A :class:`PoolingRequestOutput` as a vector."""

    outputs: EmbeddingOutput = dataclasses.field(kw_only=True)

    @classmethod
    def from_base(cls, output: PoolingRequestOutput) -> EmbeddingRequestOutput:
        """From the result of the task "embed".

        Raises:
            RequestError: it is no single vector.
        """
        return cls(*_common(output), outputs=EmbeddingOutput.from_base(_result(output)))


@dataclasses.dataclass
class ClassificationRequestOutput(_TypedRequestOutput):
    """A :class:`PoolingRequestOutput` as classes."""

    outputs: ClassificationOutput = dataclasses.field(kw_only=True)

    @classmethod
    def from_base(cls, output: PoolingRequestOutput) -> ClassificationRequestOutput:
        """From the result of the task "classify".

        Raises:
            RequestError: it is no single row of classes.
        """
        return cls(*_common(output), outputs=ClassificationOutput.from_base(_result(output)))


@dataclasses.dataclass
class ScoringRequestOutput(_TypedRequestOutput):
    """A :class:`PoolingRequestOutput` as a score."""

    outputs: ScoringOutput = dataclasses.field(kw_only=True)

    @classmethod
    def from_base(cls, output: PoolingRequestOutput) -> ScoringRequestOutput:
        """From the result of a task with one number.

        Raises:
            RequestError: it is no single number.
        """
        return cls(*_common(output), outputs=ScoringOutput.from_base(_result(output)))


def _common(output: PoolingRequestOutput) -> tuple[str, list[int], bool, int]:
    return output.request_id, output.prompt_token_ids, output.finished, output.num_cached_tokens


def _result(output: PoolingRequestOutput) -> PoolingOutput:
    if output.error is not None:
        raise output.error
    if output.outputs is None:
        raise RequestError(f"request {output.request_id!r} has no result yet")
    return output.outputs


def _row(output: PoolingOutput, what: str) -> list[float]:
    if output.data.dim() != 1:
        raise RequestError(f"{what} is one row of numbers, got shape {list(output.data.shape)}")
    return output.data.tolist()
