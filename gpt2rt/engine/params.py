"""What a request asks for: sampling parameters and pooling parameters, with vLLM's names and defaults, checked early.

A value is checked twice: where it is set, as far as no model is needed for that, and by ``check`` against the model and
the limits of the engine that takes the request, before any work is done for it.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
from collections.abc import Callable
from typing import Any

from torch import Tensor

from gpt2rt import ops
from gpt2rt.errors import RequestError

from .fields import (
    LONGEST,
    Reader,
    as_texts,
    bad_words_ids,
    bias_map,
    boolean,
    check_count,
    check_listed_ids,
    check_most,
    functions,
    integer,
    is_integer,
    number,
    one_of,
    refuse,
    shown,
    texts,
    token_ids,
    truncation,
)

#: temperatures below are greedy, as in vLLM: a draw would give the largest score anyway
GREEDY_BELOW = 1e-5

#: ``processor(output ids, logits [vocab_size])`` or ``processor(prompt ids, output ids, logits)`` -> logits
LogitsProcessor = Callable[..., Tensor]


class RequestOutputKind(enum.Enum):
    """What the outputs of a request hold: everything so far, what is new, or everything in one output at the end."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@dataclasses.dataclass(frozen=True)
class RequestLimits:
    """The most that one request may ask for. The defaults are finite; who runs the engine may raise them.

    Attributes:
        n: continuations of a prompt.
        stop_strings: stop strings.
        stop_string_bytes: UTF-8 bytes of each; text is held back for them, and searched again with each token.
        stop_token_ids: stop tokens.
        logprobs: likeliest tokens whose log-probabilities are returned, at each place of output or prompt; at most 128.
        bad_words: bad words.
        bad_words_tokens: tokens of all bad words together; each is compared with the end of the output in each step.
        logit_bias: tokens with a bias; each is written in each step.

    Raises:
        ValueError: a limit is no integer from 0 on (``n``: from 1 on), or ``logprobs`` is above 128.
    """

    n: int = 16
    stop_strings: int = 4
    stop_string_bytes: int = 256
    stop_token_ids: int = 128
    logprobs: int = 20
    bad_words: int = 128
    bad_words_tokens: int = 1024
    logit_bias: int = 1024

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            low = 1 if field.name == "n" else 0
            high = ops.MAX_BEST if field.name == "logprobs" else LONGEST
            if not is_integer(value) or not low <= value <= high:
                raise ValueError(f"limit {field.name} must be an integer from {low} to {high}, got {shown(value)}")


@dataclasses.dataclass
class SamplingParams:
    """How the continuations of a prompt are chosen, when they end, and what is returned with them.

    Attributes:
        n: how many continuations; above 1 they are drawn, so ``temperature`` is not 0 then.
        presence_penalty: taken once from the score of each token that stands in the output, -2 to 2.
        frequency_penalty: taken for each time it stands there, -2 to 2.
        repetition_penalty: scores of tokens of prompt and output are divided by it if positive, else multiplied.
        temperature: scores are divided by it, 0 to 1e30; below 1e-5: the token with the largest score is taken.
        top_p: the likeliest tokens with this share of the probability are drawn from, above 0 to 1.
        top_k: so many of the likeliest; 0 or -1: all.
        min_p: those at least this times as likely as the likeliest, 0 to 1.
        seed: 64 bits with sign; the same seed gives the same text, whatever else runs. None or -1: the engine's own.
        stop: one text or several that end a continuation; kept as a list.
        stop_token_ids: tokens that end it, besides the model's end tokens.
        ignore_eos: the model's end tokens do not end it.
        max_tokens: the most new tokens; None: up to the end of the context.
        min_tokens: so many before an end token, a stop token or a stop string can end it.
        logprobs: log-probabilities of the token and of so many likeliest ones; 0: of the token alone; None: none.
        prompt_logprobs: the same for the tokens of the prompt; with ``max_tokens`` 1 it may fill the whole context.
        detokenize: make text.
        skip_special_tokens: leave special tokens out of it.
        include_stop_str_in_output: show the stop string, or the text of the stop token, that ended it.
        truncate_prompt_tokens: use only so many of the prompt's last tokens; -1: as many as the model takes.
        output_kind: what the outputs hold.
        bad_words: texts that are not written, as far as they are spelt with the tokens that the tokenizer spells them
            with, with or without a space before.
        logit_bias: added to the scores of tokens, -100 to 100. Keys may be numbers as texts, as JSON has them.
        allowed_token_ids: the only tokens that are chosen.
        logits_processors: functions that change the scores of a row, see ``LogitsProcessor``.

    Raises:
        RequestError: a value has a wrong type or is out of range, or two do not go together; the message names the
            field, the value and the range.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    truncate_prompt_tokens: int | None = None
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    bad_words: list[str] | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    logits_processors: list[LogitsProcessor] | None = None
    #: what ``bad_words`` are in tokens; ``check`` fills it
    bad_words_token_ids: list[list[int]] | None = dataclasses.field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._validate()

    def _validate(self) -> None:
        """What needs no model; values become plain int, float and list."""
        for name, read in _SAMPLING_FIELDS.items():
            setattr(self, name, read(name, getattr(self, name)))
        if self.seed == -1:
            self.seed = None
        if self.greedy and self.n > 1:
            raise RequestError(
                f"n is {self.n} with temperature {self.temperature}, expected n=1: without drawing all continuations "
                "are the same; set a temperature above 0"
            )
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(f"min_tokens must be at most max_tokens, {self.max_tokens}, got {self.min_tokens}")
        if self.stop and not self.detokenize:
            raise RequestError(f"stop={shown(self.stop)} needs text to look for it in; leave detokenize=True")

    @property
    def greedy(self) -> bool:
        """Whether the token with the largest score is taken; top_k, top_p and min_p make no difference then."""
        return self.temperature < GREEDY_BELOW

    def clone(self) -> SamplingParams:
        """A copy with lists of its own; processors are shared."""
        twin = copy.copy(self)
        for name in _LISTS:
            value = getattr(twin, name)
            setattr(twin, name, copy.copy(value))
        return twin

    def check(self, *, vocab_size: int, limits: RequestLimits, tokenizer: Any) -> None:
        """Whether a model can do this; fills ``bad_words_token_ids``. All fields are checked again, they may be new.

        Args:
            vocab_size: tokens of the model.
            limits: of the engine.
            tokenizer: of the model, or None.

        Raises:
            RequestError: a value is out of range, the message names field, value and range.
        """
        self._validate()
        check_most("n", self.n, limits.n)
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None:
                # no row has more than all tokens
                check_most(name, value, min(limits.logprobs, vocab_size))
        stop = as_texts(self.stop)
        check_count("stop", stop, limits.stop_strings, "texts")
        for text in stop:
            size = len(text.encode())
            if size > limits.stop_string_bytes:
                raise RequestError(
                    f"stop: each text has at most {limits.stop_string_bytes} bytes, got {size}: {shown(text)}"
                )
        if self.detokenize and tokenizer is None:
            raise RequestError("detokenize=True needs a tokenizer, and this engine has none; set detokenize=False")
        check_count("stop_token_ids", self.stop_token_ids or (), limits.stop_token_ids, "tokens")
        check_listed_ids("stop_token_ids", self.stop_token_ids or (), vocab_size)
        check_count("logit_bias", self.logit_bias or (), limits.logit_bias, "tokens")
        check_listed_ids("logit_bias", self.logit_bias or (), vocab_size)
        check_count("allowed_token_ids", self.allowed_token_ids or (), vocab_size, "tokens")
        check_listed_ids("allowed_token_ids", self.allowed_token_ids or (), vocab_size)
        self._check_bad_words(vocab_size, limits, tokenizer)

    def _check_bad_words(self, vocab_size: int, limits: RequestLimits, tokenizer: Any) -> None:
        self.bad_words_token_ids = None
        if not self.bad_words:
            return
        check_count("bad_words", self.bad_words, limits.bad_words, "words")
        # a megabyte is refused before the tokenizer reads it: tokens have fewer than 64 characters on average
        characters = sum(map(len, self.bad_words))
        if characters > 64 * limits.bad_words_tokens:
            raise RequestError(
                f"bad_words must have at most {64 * limits.bad_words_tokens} characters in all, got {characters}"
            )
        sequences = bad_words_ids(self.bad_words, tokenizer)
        total = sum(map(len, sequences))
        if total > limits.bad_words_tokens:
            raise RequestError(
                f"bad_words must be at most {limits.bad_words_tokens} tokens in all, with and without a space before "
                f"each, got {total}"
            )
        for sequence in sequences:
            check_listed_ids("bad_words", sequence, vocab_size)
        self.bad_words_token_ids = sequences


#: tasks of a request that asks for no text
POOLING_TASKS = ("embed", "classify", "token_embed", "token_classify")
#: how hidden states of tokens become one. The first token's is no choice: without looking ahead it knows itself alone
POOLINGS = ("last", "mean")


@dataclasses.dataclass
class PoolingParams:
    """What is made of the hidden states of a prompt.

    Attributes:
        task: "embed": one vector; "classify": one row of classes; "token_embed", "token_classify": one for each token.
        pooling: for "embed": the "last" token's state or the "mean" of all.
        normalize: for "embed" and "token_embed": vectors get length 1.
        use_activation: for "classify" and "token_classify": probabilities instead of logits.
        truncate_prompt_tokens: use only so many of the prompt's last tokens; -1: as many as the model takes.

    Raises:
        RequestError: a value has a wrong type or is out of range.
    """

    task: str = "embed"
    pooling: str = "last"
    normalize: bool = True
    use_activation: bool = True
    truncate_prompt_tokens: int | None = None

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """All fields again; they may be new.

        Raises:
            RequestError: as the class.
        """
        for name, read in _POOLING_FIELDS.items():
            setattr(self, name, read(name, getattr(self, name)))

    def clone(self) -> PoolingParams:
        """A copy."""
        return copy.copy(self)


def _output_kind(name: str, value: Any) -> RequestOutputKind:
    if not isinstance(value, RequestOutputKind):
        raise refuse(name, value, f"one of {', '.join(map(str, RequestOutputKind))}")
    return value


_NOT_EMPTY = "a text or a list of texts, none of them empty"
_SAMPLING_FIELDS: dict[str, Reader] = {
    "n": integer(1, LONGEST),
    "presence_penalty": number(-2.0, 2.0),
    "frequency_penalty": number(-2.0, 2.0),
    # scores times or by these are finite in float32
    "repetition_penalty": number(1e-6, 1e6, hint=" (1 changes nothing)"),
    "temperature": number(0.0, 1e30, hint=" (0 takes the likeliest token)"),
    "top_p": number(0.0, 1.0, above=True, hint=" (1 keeps all tokens)"),
    "top_k": integer(-1, LONGEST, " (0 and -1 keep all tokens)"),
    "min_p": number(0.0, 1.0, hint=" (0 keeps all tokens)"),
    "seed": integer(-(2**63), 2**63 - 1, optional=True),
    "stop": texts(_NOT_EMPTY),
    "stop_token_ids": token_ids(optional=False),
    "ignore_eos": boolean,
    "max_tokens": integer(1, LONGEST, optional=True),
    "min_tokens": integer(0, LONGEST),
    "logprobs": integer(0, LONGEST, optional=True),
    "prompt_logprobs": integer(0, LONGEST, optional=True),
    "detokenize": boolean,
    "skip_special_tokens": boolean,
    "include_stop_str_in_output": boolean,
    "truncate_prompt_tokens": truncation,
    "output_kind": _output_kind,
    "bad_words": texts(_NOT_EMPTY),
    "logit_bias": bias_map,
    "allowed_token_ids": token_ids(optional=True),
    "logits_processors": functions,
}
_POOLING_FIELDS: dict[str, Reader] = {
    "task": one_of(*POOLING_TASKS),
    "pooling": one_of(*POOLINGS),
    "normalize": boolean,
    "use_activation": boolean,
    "truncate_prompt_tokens": truncation,
}
_LISTS = ("stop", "stop_token_ids", "bad_words", "logit_bias", "allowed_token_ids", "logits_processors")
